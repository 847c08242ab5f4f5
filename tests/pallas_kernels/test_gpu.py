"""The GPU kernel, executed by Pallas' plain interpreter, and lowered for CUDA."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gpu
from pasa_jax import Precision, Schedule, dot_product_attention, explain
from pasa_jax._errors import BackendUnsupported
from tests.cases import CASES, Case, exact
from tests.pasa_jax.test_contract import BOUND, check

TILES = Schedule(block_q=32, block_kv=16, target="h100")
OURS = {"implementation": "pallas_gpu", "schedule": TILES}
HALF = Precision(scores="float16", probabilities="float16", products="float16")


@pytest.fixture
def interpreter(monkeypatch):
    monkeypatch.setattr(gpu, "INTERPRET", True)


INTERPRETED = pytest.mark.usefixtures("interpreter")


@INTERPRETED
@pytest.mark.parametrize("name", CASES)
def test_contract(name):
    check(CASES[name], "float32", BOUND["float32"], **OURS)


@INTERPRETED
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["lengths, bottom right", "bias", "soft cap, causal, biased"])
def test_contract_in_16_bits(name, dtype):
    check(CASES[name], dtype, BOUND[dtype], **OURS)


@INTERPRETED
@pytest.mark.parametrize("d", [64, 80, 96, 192])
def test_head_sizes(d):
    case = Case(t=40, s=50, n=2, k=1, d=d, e=d, keywords={"is_causal": True})
    check(case, "float16", BOUND["float16"], **OURS)


@INTERPRETED
@pytest.mark.parametrize("shift", ["none", "mean", "mean_past", "reference"])
def test_every_shift(shift):
    options = {"shift": shift, "precision": "float16", **OURS}
    check(CASES["causal, fewer keys"], "float16", 3e-3, **options)


@INTERPRETED
@pytest.mark.parametrize("name", ["biased", "causal", "lengths, bottom right", "mask of keys"])
@pytest.mark.parametrize("shift", ["auto", "mean"])
def test_float16_products(name, shift):
    check(CASES[name], "float16", 1e-2, shift=shift, precision=HALF, **OURS)


@INTERPRETED
def test_float16_exponentials():
    precision = Precision(probabilities="float16", exponential="float16")
    check(CASES["causal"], "float16", 3e-3, precision=precision, **OURS)


def pair(arrays, **options):
    """Results of the kernel and of lax, from the same schedule and precision."""
    options = {"precision": "float32", "schedule": TILES} | options
    return [
        np.asarray(
            dot_product_attention(**arrays, **options, implementation=name).astype(jnp.float32)
        )
        for name in ("pallas_gpu", "lax")
    ]


@INTERPRETED
def test_float16_products_of_huge_values_stay_finite():
    arrays = {name: x * 1000 for name, x in CASES["biased"].arrays("float16").items()}
    arrays["value"] = jnp.full_like(arrays["value"], 60000)  # sums of them leave float16
    found, by_lax = pair(arrays, precision=HALF)
    np.testing.assert_allclose(found, 60000, rtol=2e-3)
    np.testing.assert_allclose(by_lax, 60000, rtol=2e-3)


@INTERPRETED
@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_what_a_masked_key_holds_does_not_matter(value):
    arrays = CASES["full"].arrays("bfloat16")
    options = {"key_value_seq_lengths": jnp.asarray([30, 50])}
    clean, _ = pair(arrays, **options)
    for name in ("key", "value"):
        arrays[name] = arrays[name].at[0, 30:].set(value)
    found, by_lax = pair(arrays, **options)
    np.testing.assert_allclose(found, clean, atol=1e-2)
    np.testing.assert_allclose(found, by_lax, atol=1e-2)


@INTERPRETED
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_finite_inputs_give_finite_outputs_whatever_their_size(dtype):
    factor = jnp.asarray(1e4 if dtype == "float16" else 5e37, dtype)
    arrays = {k: v * factor for k, v in CASES["full"].arrays(dtype).items()}
    found, by_lax = pair(arrays)
    assert np.all(np.isfinite(found))
    np.testing.assert_allclose(found, by_lax, rtol=1e-2, atol=1e-2 * np.abs(by_lax).max())


@INTERPRETED
def test_a_row_that_sees_nan_says_so():
    arrays = CASES["causal"].arrays("float32")
    arrays["key"] = arrays["key"].at[0, 20, 0].set(jnp.nan)
    found, by_lax = pair(arrays, is_causal=True)
    np.testing.assert_allclose(found, by_lax, atol=2e-6)
    assert np.all(np.isnan(found[0, 20:, :2]))
    assert np.all(np.isfinite(found[0, :20]))


@INTERPRETED
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_gradients(dtype):
    arrays = CASES["causal"].arrays(dtype)

    def loss(q, k, v, name):
        out, lse = dot_product_attention(
            q, k, v, is_causal=True, implementation=name, schedule=TILES, return_residual=True
        )
        return jnp.sum(out.astype(jnp.float32) ** 2) + jnp.sum(jnp.sin(lse))

    ours, by_lax = (
        jax.jit(jax.grad(lambda *x: loss(*x, name), (0, 1, 2)))(*arrays.values())  # noqa: B023
        for name in ("pallas_gpu", "lax")
    )
    for a, b in zip(ours, by_lax, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 if dtype == "float32" else 2e-2)


@INTERPRETED
def test_under_x64(x64):
    check(CASES["causal"], "float32", 4e-6, **OURS)


@INTERPRETED
def test_vmap():
    arrays = CASES["causal"].arrays("float32")
    twice = {name: jnp.stack([x, 2 * x]) for name, x in arrays.items()}
    found = jax.vmap(lambda a: dot_product_attention(**a, **OURS))(twice)
    for i in range(2):
        alone = dot_product_attention(**{name: x[i] for name, x in twice.items()}, **OURS)
        np.testing.assert_allclose(found[i], alone, atol=2e-6)


class TestChoice:
    arrays = CASES["causal"].arrays("float16")

    def test_none_takes_the_kernel_for_a_gpu_and_says_what_it_stores(self):
        told = explain(**self.arrays, is_causal=True, schedule=TILES)
        assert told.implementation == "pallas_gpu"
        assert told.precision == Precision(scores="float32", probabilities="float16")

    def test_none_runs_on_the_cpu_too(self):
        out = dot_product_attention(**self.arrays, is_causal=True, schedule=TILES)
        true, _ = exact(self.arrays, {"is_causal": True})
        np.testing.assert_allclose(np.asarray(out, np.float64), true, atol=3e-3)

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"shift": "paper", "precision": "paper"}, "it keeps float32 statistics"),
            ({"shift": "reference", "precision": HALF}, "'reference' needs a float32 product"),
            (
                {"schedule": dataclasses.replace(TILES, block_kv=24)},
                "schedule.block_kv must be a power of two of at least 16, and is 24",
            ),
        ],
    )
    def test_what_it_cannot_do(self, options, reason):
        with pytest.raises(BackendUnsupported, match=reason):
            dot_product_attention(**{**self.arrays, **OURS, **options})

    def test_float16_products_are_for_float16_inputs(self):
        arrays = CASES["causal"].arrays("bfloat16")
        with pytest.raises(ValueError, match='products="float32"'):
            dot_product_attention(**arrays, precision=HALF)
