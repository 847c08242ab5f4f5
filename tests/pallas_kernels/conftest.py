"""The TPU interpreter with its checks: NaN-filled memory, bounds, and races where two cores run.

Kernels are interpreted where the call says ``interpret=True``; this makes it strict.
"""

from contextlib import contextmanager

import pytest
from jax.experimental.pallas import tpu as pltpu


@contextmanager
def strict(cores):
    params = pltpu.InterpretParams(
        detect_races=cores > 1,
        num_cores_or_threads=cores,
        uninitialized_memory="nan",
        out_of_bounds_reads="raise",
    )
    with pltpu.force_tpu_interpret_mode(params):
        yield


@pytest.fixture
def tpu_interpreter():
    with strict(cores=1):
        yield


@pytest.fixture
def two_tpu_cores():
    """Slower by half."""
    with strict(cores=2):
        yield
    races = pytest.importorskip(
        "jax._src.pallas.mosaic.interpret.interpret_pallas_call",
        reason="this jax has moved the interpreter's race report: find it again",
    ).races
    assert races is None or not races.races_found


@pytest.fixture(params=["tpu", "gpu"])
def kernel(request):
    """The name of an implementation, for calls with ``interpret=True``."""
    if request.param == "tpu":
        request.getfixturevalue("tpu_interpreter")
    return f"pallas_{request.param}"
