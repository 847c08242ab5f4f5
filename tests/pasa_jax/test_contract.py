"""The contract: every implementation, every named case, against float64."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax import SHIFTS, dot_product_attention
from pasa_jax.call.backends import BACKENDS
from tests.cases import CASES, TILES, Case, exact
from tests.thin import only, some, some_tuples

# Error allowed relative to the size of the output: a few units of the type.
BOUND = {"float32": 4e-6, "bfloat16": 2e-2, "float16": 2.5e-3}


def check(case: Case, dtype: str, bound: float, **options):
    arrays = case.arrays(dtype)
    call = jax.jit(
        lambda a: dot_product_attention(**a, **case.keywords, **options, return_residual=True)
    )
    out, lse = call(arrays)
    true_out, true_lse = exact(arrays, case.keywords)
    assert out.dtype == dtype
    assert lse.dtype == jnp.float32
    size = max(1.0, float(np.abs(true_out).max()))
    np.testing.assert_allclose(np.asarray(out, np.float64), true_out, atol=bound * size, rtol=0)
    none_seen = ~np.isfinite(true_lse)
    assert np.all(np.asarray(lse)[none_seen] == np.finfo(np.float32).min)
    found, true_lse = np.asarray(lse)[~none_seen], true_lse[~none_seen]
    size = np.maximum(1, np.abs(true_lse))
    np.testing.assert_allclose(found / size, true_lse / size, atol=2 * bound, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_lax_in_float32(name):
    check(CASES[name], "float32", BOUND["float32"], implementation="lax", schedule=TILES)


@pytest.mark.parametrize(
    ("name", "dtype"), some_tuples(product(CASES, ["float16", "bfloat16"]), 9, 1)
)
def test_lax_in_16_bits(name, dtype):
    check(CASES[name], dtype, BOUND[dtype], implementation="lax", schedule=TILES)


@pytest.mark.parametrize(("name", "dtype"), some_tuples(product(CASES, ["float32", "float16"]), 3))
def test_reference(name, dtype):
    check(CASES[name], dtype, BOUND[dtype], implementation="reference")


def test_the_table_of_implementations_is_the_one_tested():
    assert tuple(BACKENDS) == ("pallas_tpu", "pallas_gpu", "lax", "reference")


@pytest.mark.parametrize("shift", [s for s in SHIFTS if s != "paper"])
@pytest.mark.parametrize(
    "name",
    some(
        [
            "biased",
            "lengths, bottom right",
            "bottom right",
            "mask",
            "soft cap, causal, biased",
            "bias",
        ],
        4,
        1,
    ),
)
def test_every_shift(name, shift):
    check(CASES[name], "float16", 3e-3, shift=shift, schedule=TILES)


@pytest.mark.parametrize(
    "name", some(["full", "lengths", "bottom right, fewer keys", "segments, causal"], 4, 1)
)
@pytest.mark.parametrize("precision", ["float16", "paper"])
def test_paper_shift(name, precision):
    # 63.5 times the rounding of a row mean: eq. 5 of docs/algorithm.md.
    check(CASES[name], "float16", 2e-2, shift="paper", precision=precision, schedule=TILES)


@pytest.mark.parametrize(
    "shift", only(["mean", "reference"], ["none", "mean", "reference", "auto"])
)
@pytest.mark.parametrize(
    "name", some(["biased", "causal", "window", "mask of keys", "sinks"], 3, 1)
)
def test_behind_the_rounding(name, shift):
    """On a target whose products are rounded before anything can be done about it."""
    from dataclasses import replace

    schedule = replace(TILES, target="ascend_910b")
    check(CASES[name], "float16", 1e-2, shift=shift, schedule=schedule)


@pytest.mark.parametrize(
    "name", some(["causal", "lengths, bottom right", "mask", "segments"], 2, 1)
)
def test_heads_at_once_equal_heads_in_turn(name):
    from dataclasses import replace

    case = CASES[name]
    arrays = case.arrays("float32")
    one, all_at_once = (
        dot_product_attention(**arrays, **case.keywords, schedule=replace(TILES, batch_heads=batch))
        for batch in (False, True)
    )
    np.testing.assert_allclose(one, all_at_once, atol=2e-6)


def test_unbatched_layout():
    arrays = CASES["causal"].arrays("float32")
    whole = dot_product_attention(**arrays, is_causal=True, return_residual=True)
    first = dot_product_attention(
        **{k: v[0] for k, v in arrays.items()}, is_causal=True, return_residual=True
    )
    for batched, single in zip(whole, first, strict=True):
        np.testing.assert_allclose(batched[0], single, atol=2e-6)


def test_float64(x64):
    case = CASES["causal"]
    arrays = {k: v.astype(jnp.float64) for k, v in case.arrays("float32").items()}
    true_out, true_lse = exact(arrays, case.keywords)
    for implementation in ("lax", "reference"):
        out, lse = dot_product_attention(
            **arrays, **case.keywords, implementation=implementation, return_residual=True
        )
        assert out.dtype == lse.dtype == jnp.float64
        np.testing.assert_allclose(out, true_out, atol=1e-13)
        np.testing.assert_allclose(lse, true_lse, atol=1e-13)


def test_float16_under_x64_stays_float16(x64):
    case = CASES["causal"]
    arrays = case.arrays("float16")
    out, lse = dot_product_attention(**arrays, is_causal=True, return_residual=True)
    assert (out.dtype, lse.dtype) == (jnp.float16, jnp.float32)
    grad = jax.grad(lambda q: dot_product_attention(q, arrays["key"], arrays["value"]).sum())
    assert grad(arrays["query"]).dtype == jnp.float16
