"""npu_bridge: the schedule and the tile functions of `pasa_jax` as AscendC kernels.

>>> import npu_bridge
>>> kernel = npu_bridge.kernel(head_dim=128, shift="mean", is_causal=True)
>>> print(npu_bridge.plan(kernel).splitlines()[0])
Schedule: 128 queries x 1024 keys a tile, 8 rows a slab of a vector core.
"""

from npu_bridge._api import check, cost, emit, kernel, plan, run, visits
from npu_bridge.functions import inputs_of
from npu_bridge.specification import Kernel
from pasa_jax.core.errors import EmulationError, LoweringError, PlanError

__all__ = [
    "EmulationError",
    "Kernel",
    "LoweringError",
    "PlanError",
    "check",
    "cost",
    "emit",
    "inputs_of",
    "kernel",
    "plan",
    "run",
    "visits",
]
