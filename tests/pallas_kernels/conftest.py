"""The TPU interpreter with all its checks: two cores, races, NaN-filled memory, bounds.

Kernels are interpreted where the call says ``interpret=True``; this makes it strict.
"""

import pytest
from jax.experimental.pallas import tpu as pltpu


@pytest.fixture
def tpu_interpreter():
    params = pltpu.InterpretParams(
        detect_races=True,
        num_cores_or_threads=2,
        uninitialized_memory="nan",
        out_of_bounds_reads="raise",
    )
    with pltpu.force_tpu_interpret_mode(params):
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
