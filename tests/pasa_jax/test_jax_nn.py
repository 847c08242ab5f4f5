"""Behaves as `jax.nn.dot_product_attention` does, over a wide table of calls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pasa_jax
from tests.thin import some, some_tuples

B, T, S, N, K, D = 2, 24, 30, 4, 2, 16


def arrays(dtype="float32", t=T, s=S, n=N, k=K, batched=True, seed=0):
    rng = np.random.default_rng(seed)
    batch = (B,) if batched else ()

    def normal(*shape):
        return jnp.asarray(rng.standard_normal((*batch, *shape)), dtype)

    return normal(t, n, D), normal(s, k, D), normal(s, k, D)


def normal(*shape):
    return jnp.asarray(np.random.default_rng(7).standard_normal(shape), jnp.float32)


def mask(*shape):
    # The first key is seen by all: jax.nn averages V where a row sees nothing, we give 0.
    x = np.random.default_rng(8).random(shape) > 0.4
    x[..., 0] = True
    return jnp.asarray(x)


def int32(*x):
    return jnp.asarray(x, jnp.int32)


CALLS = {
    "plain": {},
    "scale": {"scale": 0.3},
    "causal": {"is_causal": True},
    "window int": {"local_window_size": 10},
    "window pair": {"local_window_size": (9, 4)},
    "window causal": {"local_window_size": (5, 2), "is_causal": True},
    "key lengths": {"key_value_seq_lengths": int32(30, 11)},
    "query lengths": {"query_seq_lengths": int32(3, 24)},
    "both lengths": {
        "query_seq_lengths": int32(24, 7),
        "key_value_seq_lengths": int32(9, 30),
        "is_causal": True,
    },
    "lengths past the end": {"key_value_seq_lengths": int32(99, 30)},
    "mask": {"mask": mask(B, N, T, S)},
    "mask of heads": {"mask": mask(1, N, 1, S)},
    "mask of keys": {"mask": mask(B, 1, 1, S)},
    "mask of two axes": {"mask": mask(T, S)},
    "bias": {"bias": normal(B, N, T, S)},
    "bias of heads": {"bias": normal(N, T, S)},
    "bias of keys": {"bias": normal(1, 1, 1, S)},
    "bias of rows": {"bias": normal(1, N, T, 1)},
    "bias, mask, causal": {"bias": normal(N, 1, S), "mask": mask(T, S), "is_causal": True},
    "bias that hides": {"bias": jnp.where(mask(1, 1, T, S), 0.0, -jnp.inf)},
    "bias of -1e9": {"bias": jnp.where(mask(1, 1, T, S), 0.0, -1e9)},
}


@pytest.mark.parametrize("implementation", ["lax", "reference"])
@pytest.mark.parametrize("name", some(CALLS, 3))
def test_float32(name, implementation):
    q, k, v = arrays()
    theirs = jax.nn.dot_product_attention(q, k, v, **CALLS[name])
    ours = pasa_jax.dot_product_attention(q, k, v, **CALLS[name], implementation=implementation)
    np.testing.assert_allclose(ours, theirs, atol=3e-6)


@pytest.mark.parametrize(
    "name", some(["plain", "causal", "both lengths", "bias, mask, causal"], 4, 3)
)
def test_bfloat16(name):
    q, k, v = arrays("bfloat16")
    with jax.numpy_dtype_promotion("standard"):
        theirs = jax.nn.dot_product_attention(q, k, v, **CALLS[name])
    ours = pasa_jax.dot_product_attention(q, k, v, **CALLS[name])
    assert ours.dtype == theirs.dtype
    np.testing.assert_allclose(
        np.asarray(ours, np.float32), np.asarray(theirs, np.float32), atol=3e-2
    )


@pytest.mark.parametrize(("n", "k"), some_tuples([(6, 3), (4, 4), (4, 1)]))
@pytest.mark.parametrize("batched", some([False, True]))
def test_heads_and_layouts(n, k, batched):
    q, key, v = arrays(n=n, k=k, batched=batched)
    theirs, their_lse = jax.nn.dot_product_attention(
        q, key, v, is_causal=True, return_residual=True
    )
    ours, our_lse = pasa_jax.dot_product_attention(q, key, v, is_causal=True, return_residual=True)
    assert (ours.shape, our_lse.shape) == (theirs.shape, their_lse.shape)
    np.testing.assert_allclose(ours, theirs, atol=3e-6)
    np.testing.assert_allclose(our_lse, their_lse, atol=3e-6)


def test_bias_and_mask_are_positional():
    q, k, v = arrays()
    theirs = jax.nn.dot_product_attention(q, k, v, normal(1, N, T, S), mask(1, 1, T, S))
    ours = pasa_jax.dot_product_attention(q, k, v, normal(1, N, T, S), mask(1, 1, T, S))
    np.testing.assert_allclose(ours, theirs, atol=3e-6)


def test_gradients():
    q, k, v = arrays()
    bias = normal(1, N, T, S)

    def loss(function, *operands):
        return jnp.sum(jnp.square(function(*operands, is_causal=True)))

    theirs = jax.grad(lambda *x: loss(jax.nn.dot_product_attention, *x), (0, 1, 2, 3))
    ours = jax.grad(lambda *x: loss(pasa_jax.dot_product_attention, *x), (0, 1, 2, 3))
    for a, b in zip(ours(q, k, v, bias), theirs(q, k, v, bias), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_documented_difference_rows_that_see_nothing():
    q, k, v = arrays()
    nothing = jnp.zeros((1, 1, T, S), bool)
    theirs = jax.nn.dot_product_attention(q, k, v, mask=nothing)
    average = np.repeat(np.asarray(v).mean(axis=1)[:, None], N // K, axis=2)
    np.testing.assert_allclose(theirs, np.broadcast_to(average, theirs.shape), atol=1e-5)
    assert np.all(np.asarray(pasa_jax.dot_product_attention(q, k, v, mask=nothing)) == 0)


@pytest.mark.full
def test_the_documented_difference_log_sum_exp():
    q, k, v = arrays("bfloat16")

    def lse(q):
        return pasa_jax.dot_product_attention(q, k, v, return_residual=True)[1]

    assert lse(q).dtype == jnp.float32
    assert np.abs(jax.grad(lambda q: lse(q).sum())(q).astype(jnp.float32)).max() > 0
