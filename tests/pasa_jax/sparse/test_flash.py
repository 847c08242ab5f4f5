"""Dropped keys and hash buckets."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax import Schedule, dot_product_attention
from pasa_jax.sparse import dropped_keys, hash_buckets, random_buckets
from tests.pasa_jax.sparse.draws import arrays, attention, relative
from tests.thin import some

TILES = Schedule(block_q=16, block_kv=16)
T, S = 45, 61


def draw(**options):
    return arrays(T, S, n=4, k=2, b=2, **options)


def masks(by_head):
    rng = np.random.default_rng(2)
    of_q, of_k = ((2, T, 4), (2, S, 2)) if by_head else ((2, T), (2, S))
    return rng.random(of_q) < 0.6, rng.random(of_k) < 0.5


def per_head(x, heads):
    """[B, heads, L] of [B, L] or [B, L, some]."""
    x = x[..., None] if x.ndim == 2 else x
    return np.swapaxes(np.repeat(x, heads // x.shape[2], axis=2), 1, 2)


@pytest.mark.parametrize("by_head", some([True, False], 2))
def test_dropped_keys_are_unseen_and_dropped_queries_0(by_head):
    q, k, v = draw()
    keep_q, keep_k = masks(by_head)
    out = jax.jit(partial(dropped_keys, schedule=TILES))(q, k, v, keep_q, keep_k)
    rows, keys = per_head(keep_q, 4), per_head(keep_k, 4)
    wanted = attention(q, k, v, keys[:, :, None])
    wanted *= np.swapaxes(rows, 1, 2)[..., None]
    assert relative(out, wanted) < 1e-6
    assert not np.asarray(out)[~np.swapaxes(rows, 1, 2)].any()


@pytest.mark.full
def test_nothing_dropped_is_dense_attention():
    q, k, v = draw()
    assert relative(dropped_keys(q, k, v, schedule=TILES), attention(q, k, v)) < 1e-6


@pytest.mark.full
def test_all_dropped_is_0():
    q, k, v = draw()
    none = np.zeros((2, S), bool)
    assert not np.asarray(dropped_keys(q, k, v, keep_k=none, schedule=TILES)).any()


@pytest.mark.full
def test_what_is_dropped_may_hold_anything():
    q, k, v = draw()
    keep_q, keep_k = masks(by_head=False)
    expected = dropped_keys(q, k, v, keep_q, keep_k, schedule=TILES)
    k, v = (jnp.where(keep_k[..., None, None], x, jnp.nan) for x in (k, v))
    q = jnp.where(keep_q[..., None, None], q, jnp.nan)
    assert np.array_equal(dropped_keys(q, k, v, keep_q, keep_k, schedule=TILES), expected)


@pytest.mark.parametrize("by_head", some([True, False], 2))
def test_a_query_sees_the_keys_of_its_bucket(by_head):
    q, k, v = draw()
    rng = np.random.default_rng(4)
    of_q, of_k = (rng.integers(-3, 3, x.shape) for x in masks(by_head))
    out = jax.jit(partial(hash_buckets, schedule=TILES))(q, k, v, of_q, of_k)
    seen = per_head(of_q, 4)[..., :, None] == per_head(of_k, 4)[..., None, :]
    assert relative(out, attention(q, k, v, seen)) < 1e-6


@pytest.mark.full
@pytest.mark.parametrize("which", ["dropped", "buckets"])
def test_gradients_are_those_of_masked_attention(which):
    q, k, v = draw()
    keep_q, keep_k = masks(by_head=True)
    if which == "dropped":
        seen = per_head(keep_q, 4)[..., :, None] & per_head(keep_k, 4)[..., None, :]
    else:
        seen = per_head(keep_q, 4)[..., :, None] == per_head(keep_k, 4)[..., None, :]
    buckets = keep_q.astype(np.int32), keep_k.astype(np.int32)

    @jax.jit
    def sparse(q, k, v):
        if which == "dropped":
            return jnp.sum(dropped_keys(q, k, v, keep_q, keep_k, schedule=TILES) ** 2)
        return jnp.sum(hash_buckets(q, k, v, *buckets, schedule=TILES) ** 2)

    @jax.jit
    def masked(q, k, v):
        options = {"is_causal": True, "causal_alignment": "bottom_right", "schedule": TILES}
        return jnp.sum(dot_product_attention(q, k, v, mask=jnp.asarray(seen), **options) ** 2)

    for got, exact in zip(
        *(jax.grad(f, argnums=(0, 1, 2))(q, k, v) for f in (sparse, masked)), strict=True
    ):
        assert relative(got, np.asarray(exact, np.float64)) < 1e-5


@pytest.mark.full
def test_random_buckets_follow_the_direction():
    x = jax.random.normal(jax.random.key(0), (2, 400, 3, 16))
    key = jax.random.key(1)
    buckets = random_buckets(x, 8, key)
    assert buckets.dtype == jnp.int32
    assert np.array_equal(random_buckets(3 * x, 8, key), buckets)
    assert np.array_equal((random_buckets(-x, 8, key) + 4) % 8, buckets)
    assert set(np.unique(buckets).tolist()) == set(range(8))
    near = random_buckets(x + 0.01 * x[:, ::-1], 8, key)
    assert np.mean(np.asarray(near == buckets)) > 0.95
