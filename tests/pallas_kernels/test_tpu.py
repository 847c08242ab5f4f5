"""What is particular to the TPU kernel: tiles along lanes, float16 as bits, what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._float16 import from_bits, to_bits
from pasa_jax import Precision, Schedule, dot_product_attention, explain
from pasa_jax.core.errors import BackendUnsupported
from tests.cases import CASES, Case, exact
from tests.pasa_jax.test_contract import check
from tests.thin import only, some

TILES = Schedule(block_q=32, block_kv=16, target="tpu_v6e")
# Biases, arrays and segments are cut along the lanes, which takes tiles of 128 keys.
BY_LANES = dataclasses.replace(TILES, block_kv=128)
INTERPRETED = pytest.mark.usefixtures("tpu_interpreter")
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


@pytest.mark.usefixtures("two_tpu_cores")
@pytest.mark.parametrize("name", some(LARGE, 5))
def test_many_tiles(name):
    """And no two cores write the same place."""
    schedule = dataclasses.replace(BY_LANES, block_q=128)
    check(
        LARGE[name], "float32", 4e-6, implementation="pallas_tpu", interpret=True, schedule=schedule
    )


@INTERPRETED
@pytest.mark.parametrize("unroll", only([3], [2, 3]))
def test_tiles_of_one_step(unroll):
    schedule = dataclasses.replace(TILES, unroll=unroll)
    check(
        CASES["causal"],
        "float32",
        4e-6,
        implementation="pallas_tpu",
        interpret=True,
        schedule=schedule,
    )


@INTERPRETED
def test_the_lowest_number_of_a_float16_bias_hides_a_key():
    """Mosaic has no float16: the bias is widened, and that number with it."""
    arrays = Case(b=1, t=20, s=128, n=1, k=1).arrays("float16")
    hides = np.random.default_rng(0).random((1, 1, 20, 128)) < 0.9
    hides[0, 0, 3] = True
    bias = jnp.where(hides, jnp.finfo(jnp.float16).min, jnp.float16(0.5))
    options = {"implementation": "pallas_tpu", "interpret": True, "schedule": BY_LANES}
    found = dot_product_attention(**arrays, bias=bias, **options)
    true, _ = exact(arrays | {"mask": jnp.asarray(~hides)}, {})
    np.testing.assert_allclose(np.asarray(found, np.float64), true, atol=3e-3)


def test_float16_is_widened_bit_by_bit():
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    widened = np.asarray(from_bits(to_bits(jnp.asarray(every))))
    assert widened.dtype == np.float32
    np.testing.assert_array_equal(widened, every.astype(np.float32))


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
            "its schedule would have to be for a TPU, and is for cpu "
            "(schedule=Schedule.for_target('tpu_v6e'))"
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
                "block_kv must be a multiple of 128 beside a bias, an array or data",
            ),
        ],
    )
    def test_what_it_cannot_do(self, options, reason):
        with pytest.raises(BackendUnsupported, match=reason):
            dot_product_attention(
                **self.arrays, **options, schedule=TILES, implementation="pallas_tpu"
            )

    def test_what_no_chunk_of_keys_fits_into(self):
        x = jax.ShapeDtypeStruct((1, 2048, 1, 2**15), jnp.float32)
        told = explain(x, x, x, schedule=TILES)
        assert told.implementation == "lax"
        assert "bytes of VMEM" in told.why_not["pallas_tpu"]

    def test_no_length_is_too_long(self):
        x = jax.ShapeDtypeStruct((1, 2**20, 1, 128), jnp.float32)
        told = explain(x, x, x, schedule=Schedule.for_target("tpu_v6e"))
        assert told.implementation == "pallas_tpu"
