"""Attention over some of the keys, and the parts put together again."""

import itertools
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax import Partial, dot_product_attention, merge, partial_attention
from tests.cases import TILES
from tests.thin import some


def arrays(dtype, t=24, s=60, n=4, k=2, d=8):
    rng = np.random.default_rng(0)
    shapes = ((2, t, n, d), (2, s, k, d), (2, s, k, d))
    return [jnp.asarray(rng.normal(3, 1, x), dtype) for x in shapes]


@cache
def part(shift="auto"):
    """`partial_attention`, compiled once for each shape."""
    return jax.jit(
        lambda q, k, v, options: partial_attention(q, k, v, shift=shift, schedule=TILES, **options)
    )


def parts(q, k, v, cuts, shift="auto", **options):
    edges = [0, *cuts, k.shape[1]]
    return [part(shift)(q, k[:, a:b], v[:, a:b], options) for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("cuts", some([(30,), (7, 20, 21)]))
@pytest.mark.parametrize("shift", ["auto", "bound"])
@pytest.mark.parametrize("dtype", some(["float32", "bfloat16", "float16"]))
def test_merged_parts_are_the_whole(dtype, shift, cuts):
    q, k, v = arrays(dtype)
    out, lse = merge(*parts(q, k, v, cuts, shift=shift)).output()
    whole = [x.astype(jnp.float32) for x in (q, k, v)]
    true, true_lse = dot_product_attention(*whole, return_residual=True, implementation="reference")
    assert out.dtype == jnp.float32
    bound = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3}[dtype]
    np.testing.assert_allclose(out, true, atol=bound)
    np.testing.assert_allclose(lse, true_lse, atol=bound)


def test_parts_with_one_reference_add():
    q, k, v = arrays("float32")
    _, lse = dot_product_attention(q, k, v, return_residual=True)
    some_parts = parts(q, k, v, (20, 40), reference=lse + 5)
    total = Partial(*map(sum, zip(*(x._replace(m=lse * 0) for x in some_parts), strict=True)))
    out, found = total._replace(m=lse + 5).output()
    np.testing.assert_allclose(out, dot_product_attention(q, k, v), atol=1e-5)
    np.testing.assert_allclose(found, lse, atol=1e-5)


def test_causal_parts_whose_rows_see_nothing():
    q, k, v = arrays("float32", t=60)
    lengths = jnp.asarray([0, 0])
    empty = partial_attention(q, k, v, key_value_seq_lengths=lengths)
    assert not np.any(empty.l)
    out, lse = empty.output()
    assert not np.any(out)
    assert np.all(lse == np.finfo(np.float32).min)
    whole = partial_attention(q, k, v, is_causal=True)
    out, _ = merge(empty, whole, empty).output()
    np.testing.assert_allclose(out, dot_product_attention(q, k, v, is_causal=True), atol=1e-5)


def test_sinks_count_once():
    q, k, v = arrays("float32")
    sinks = jnp.asarray([0.0, 30.0, -jnp.inf, 60.0])
    out, lse = merge(*parts(q, k, v, (30,))).output(sinks)
    true, true_lse = dot_product_attention(q, k, v, sinks=sinks, return_residual=True)
    np.testing.assert_allclose(out, true, atol=1e-5)
    np.testing.assert_allclose(lse, true_lse, rtol=1e-6)


@pytest.mark.parametrize("reference", some([20.0, None]))
def test_gradients(reference):
    q, k, v = arrays("float32")
    sinks = jnp.asarray([5.0, 20.0, 1.0, 10.0])

    def by_parts(q, k, v, sinks):
        out, lse = merge(*parts(q, k, v, (30,), reference=reference)).output(sinks)
        return jnp.sum(out**2) + jnp.sum(jnp.sin(lse))

    def whole(q, k, v, sinks):
        options = {"sinks": sinks, "return_residual": True, "implementation": "reference"}
        out, lse = dot_product_attention(q, k, v, **options)
        return jnp.sum(out**2) + jnp.sum(jnp.sin(lse))

    found, true = (jax.jit(jax.grad(f, (0, 1, 2, 3)))(q, k, v, sinks) for f in (by_parts, whole))
    for a, b in zip(found, true, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())


@pytest.mark.parametrize(
    "option", [{"sinks": jnp.zeros(4)}, {"return_residual": True}, {"return_statistics": True}]
)
def test_refusals(option):
    message = f"`{next(iter(option))}` must be .* in `partial_attention`"
    with pytest.raises(ValueError, match=message):
        partial_attention(*arrays("float32"), **option)


def test_merge_of_nothing():
    with pytest.raises(ValueError, match="`parts` must be one or more results"):
        merge()
