"""The interpreters: JAX's for TPUs (two cores, races, NaN-filled memory, bounds), Pallas' own."""

import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import gpu


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


@pytest.fixture
def gpu_interpreter(monkeypatch):
    monkeypatch.setattr(gpu, "INTERPRET", True)


@pytest.fixture(params=["tpu", "gpu"])
def kernel(request):
    """The name of an implementation, whose kernel is interpreted."""
    request.getfixturevalue(f"{request.param}_interpreter")
    return f"pallas_{request.param}"
