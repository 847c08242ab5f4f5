"""How fast the pipes of a core are.

Sources: the configuration of Huawei's own performance model for 910B1 (PyPI msopmodeling 1.0.9,
core/config/arc_config/910B1: bandwidths per core, vector cycles per repeat), 16 × 16 × 16
multiplications per cycle of the cube unit (AscendC documentation). The vector instructions that
take more than one cycle per repeat say so themselves (`npu_bridge.instructions`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """What one core does in a cycle.

    Arguments:
      clock: cycles a second.
      blocks: cube cores of the chip.
      multiply: multiplications of float16 and bfloat16.
      to_l1, to_ub, from_ub, fixpipe: bytes from L2 to L1, from L2 to UB and back, from L0C to L2.
      to_l0a, to_l0b: bytes from L1.
      head: cycles before a vector instruction's first repeat, or a product.
      drain: cycles that a barrier of the vector pipe costs.
      copy_head: cycles before a copy's first byte.
    """

    clock: float = 1.85e9
    blocks: int = 24
    multiply: float = 16**3
    to_l1: float = 221 / 1.85
    to_ub: float = 137 / 1.85
    from_ub: float = 93 / 1.85
    fixpipe: float = 70 / 1.85
    to_l0a: float = 441 / 1.85
    to_l0b: float = 220.5 / 1.85
    head: float = 14
    drain: float = 18
    copy_head: float = 30
