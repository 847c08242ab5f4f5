"""The TPU kernel, executed by JAX's TPU interpreter: two cores, races, NaN-filled memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._float16 import from_bits, to_bits
from pasa_jax import Precision, Schedule, dot_product_attention, explain
from pasa_jax._errors import BackendUnsupported
from tests.cases import CASES, Case, exact
from tests.pasa_jax.test_contract import BOUND, check

TILES = Schedule(block_q=32, block_kv=16, target="tpu_v6e")
# Biases, arrays and segments are cut along the lanes, which takes tiles of 128 keys.
BY_LANES = dataclasses.replace(TILES, block_kv=128)
INTERPRETED = pytest.mark.usefixtures("interpreter")
LARGE = {
    "many tiles": Case(b=1, t=300, s=400, n=4, k=2, keywords={"is_causal": True}),
    "many tiles, bias": Case(b=1, t=300, s=400, n=2, k=1, bias=(1, 2, 300, 400)),
    "many tiles, mask": Case(b=1, t=300, s=400, n=2, k=2, mask=(1, 1, 300, 400)),
    "many tiles, window": Case(
        b=1, t=400, s=400, n=1, k=1, keywords={"local_window_size": (150, 10)}
    ),
    "many tiles, segments": Case(
        b=1,
        t=300,
        s=300,
        n=1,
        k=1,
        keywords={"segment_ids": np.repeat([[0, 1, 2]], [100, 60, 140], axis=1).astype(np.int32)},
    ),
}


@pytest.fixture
def interpreter():
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


def tiles(case):
    by_lanes = case.bias or case.mask or "segment_ids" in case.keywords
    return BY_LANES if by_lanes else TILES


@INTERPRETED
@pytest.mark.parametrize("name", CASES)
def test_contract(name):
    case = CASES[name]
    check(case, "float32", 4e-6, implementation="pallas_tpu", schedule=tiles(case))


@INTERPRETED
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["lengths, bottom right", "bias", "soft cap, causal, biased"])
def test_contract_in_16_bits(name, dtype):
    case = CASES[name]
    check(case, dtype, BOUND[dtype], implementation="pallas_tpu", schedule=tiles(case))


@INTERPRETED
@pytest.mark.parametrize("name", LARGE)
def test_many_tiles(name):
    schedule = dataclasses.replace(BY_LANES, block_q=128)
    check(LARGE[name], "float32", 4e-6, implementation="pallas_tpu", schedule=schedule)


@INTERPRETED
@pytest.mark.parametrize("unroll", [2, 3])
def test_tiles_of_one_step(unroll):
    schedule = dataclasses.replace(TILES, unroll=unroll)
    check(CASES["causal"], "float32", 4e-6, implementation="pallas_tpu", schedule=schedule)


@INTERPRETED
@pytest.mark.parametrize("shift", ["none", "mean", "mean_past", "reference"])
def test_every_shift(shift):
    options = {"shift": shift, "implementation": "pallas_tpu", "schedule": TILES}
    check(CASES["causal, fewer keys"], "bfloat16", BOUND["bfloat16"], **options)


def test_float16_is_widened_bit_by_bit():
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    widened = np.asarray(from_bits(to_bits(jnp.asarray(every))))
    assert widened.dtype == np.float32
    np.testing.assert_array_equal(widened, every.astype(np.float32))


def both(arrays, **options):
    """Results of the kernel and of lax in float32 scores, from the same schedule."""
    return [
        np.asarray(
            dot_product_attention(
                **arrays, **options, schedule=TILES, precision="float32", implementation=name
            ).astype(jnp.float32)
        )
        for name in ("pallas_tpu", "lax")
    ]


@INTERPRETED
@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_what_a_masked_key_holds_does_not_matter(value):
    arrays = CASES["full"].arrays("bfloat16")
    options = {"key_value_seq_lengths": jnp.asarray([30, 50])}
    clean, _ = both(arrays, **options)
    for name in ("key", "value"):
        arrays[name] = arrays[name].at[0, 30:].set(value)
    found, by_lax = both(arrays, **options)
    np.testing.assert_allclose(found, clean, atol=1e-2)
    np.testing.assert_allclose(found, by_lax, atol=1e-2)


@INTERPRETED
def test_finite_inputs_give_finite_outputs_whatever_their_size():
    arrays = {k: v * jnp.bfloat16(5e37) for k, v in CASES["full"].arrays("bfloat16").items()}
    found, by_lax = both(arrays)
    assert np.all(np.isfinite(found))
    np.testing.assert_allclose(found, by_lax, rtol=1e-2)


@INTERPRETED
def test_a_row_that_sees_nan_says_so():
    arrays = CASES["causal"].arrays("float32")
    arrays["key"] = arrays["key"].at[0, 20, 0].set(jnp.nan)
    found, by_lax = both(arrays, is_causal=True)
    np.testing.assert_allclose(found, by_lax, atol=2e-6)
    assert np.all(np.isnan(found[0, 20:, :2]))
    assert np.all(np.isfinite(found[0, :20]))


@INTERPRETED
def test_gradients():
    arrays = CASES["causal"].arrays("float32")

    def loss(q, k, v, name):
        out, lse = dot_product_attention(
            q, k, v, is_causal=True, implementation=name, schedule=TILES, return_residual=True
        )
        return jnp.sum(out**2) + jnp.sum(jnp.sin(lse))

    ours, by_lax = (
        jax.jit(jax.grad(lambda *x: loss(*x, name), (0, 1, 2)))(*arrays.values())  # noqa: B023
        for name in ("pallas_tpu", "lax")
    )
    for a, b in zip(ours, by_lax, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@INTERPRETED
def test_under_x64(x64):
    check(CASES["causal"], "float32", 4e-6, implementation="pallas_tpu", schedule=TILES)


class TestChoice:
    arrays = CASES["causal"].arrays("float16")

    def test_none_takes_the_kernel_for_a_tpu_and_says_what_it_stores(self):
        told = explain(**self.arrays, is_causal=True, schedule=TILES)
        assert told.implementation == "pallas_tpu"
        assert told.precision == Precision()

    def test_none_takes_lax_elsewhere(self):
        told = explain(**self.arrays, is_causal=True)
        assert told.implementation == "lax"
        assert told.why_not["pallas_tpu"] == (
            "its schedule would have to be for a TPU, and is for cpu"
        )

    def test_none_runs_on_the_cpu_too(self):
        out = dot_product_attention(**self.arrays, is_causal=True, schedule=TILES)
        true, _ = exact(self.arrays, {"is_causal": True})
        np.testing.assert_allclose(np.asarray(out, np.float64), true, atol=3e-3)

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            (
                {"precision": "float16"},
                "Mosaic has no float16: store scores in bfloat16 or float32",
            ),
            (
                {"shift": "paper", "precision": "float32"},
                "the shift 'paper' multiplies float16 matrices, which Mosaic refuses",
            ),
            (
                {"bias": np.zeros((1, 1, 1, 50), np.float32)},
                "block_kv must be a multiple of 128 beside a bias, an array or segments",
            ),
        ],
    )
    def test_what_it_cannot_do(self, options, reason):
        with pytest.raises(BackendUnsupported, match=reason):
            dot_product_attention(
                **self.arrays, **options, schedule=TILES, implementation="pallas_tpu"
            )

    def test_heads_too_long_for_the_memory(self):
        x = jax.ShapeDtypeStruct((1, 2**18, 1, 128), jnp.float32)
        told = explain(x, x, x, schedule=Schedule.for_target("tpu_v6e"))
        assert told.implementation == "lax"
        assert "bytes of VMEM" in told.why_not["pallas_tpu"]
