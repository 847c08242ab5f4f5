"""The KV cache: prompt and tokens one by one give what one causal call over all of them gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax import Precision, Schedule, dot_product_attention
from pasa_jax.plugins import KVCache
from tests.thin import some_tuples

B, N, K, D, E, LENGTH, PROMPT = 2, 4, 2, 16, 12, 40, 21
TILES = Schedule(block_q=32, block_kv=16)
ASCEND = Schedule(block_q=32, block_kv=16, target="ascend_910b")
# Error over the largest output, of the call over all tokens at once and of the cache's steps.
BOUND = {"float32": 3e-6, "float16": 3e-3, "bfloat16": 2e-2}


def arrays(dtype="float32", bias=0.0, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((B, LENGTH, N, D))
    k = rng.standard_normal((B, LENGTH, K, D)) + bias
    return [jnp.asarray(x, dtype) for x in (q, k, rng.standard_normal((B, LENGTH, K, E)))]


def empty(dtype="float32", schedule=TILES, max_length=LENGTH + 7):
    return KVCache.empty(B, max_length, K, D, dtype, value_head_dim=E, schedule=schedule)


def decode(cache, q, k, v, prompt=PROMPT, **options):
    """Outputs of all tokens: the prompt at once, the rest one by one under scan."""

    def step(cache, token):
        q, k, v = (x[:, None] for x in token)
        cache = cache.append(k, v)
        return cache, cache.attend(q, **options)[:, 0]

    cache = cache.append(k[:, :prompt], v[:, :prompt])
    first = cache.attend(q[:, :prompt], **options)
    rest = [jnp.moveaxis(x[:, prompt:], 1, 0) for x in (q, k, v)]
    cache, outs = jax.lax.scan(step, cache, rest)
    return jnp.concatenate([first, jnp.moveaxis(outs, 0, 1)], axis=1), cache


def close(found, expected, dtype):
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    assert np.abs(found - expected).max() <= BOUND[dtype] * np.abs(expected).max()


@pytest.mark.parametrize(
    ("dtype", "schedule", "options"),
    some_tuples(
        [
            ("float32", TILES, {"scale": 0.3, "logits_soft_cap": 3.0, "local_window_size": (9, 0)}),
            ("float16", TILES, {}),
            ("bfloat16", TILES, {"shift": "mean_past"}),
            ("float16", ASCEND, {}),
            ("float16", TILES, {"precision": Precision(scores="float16", products="float16")}),
        ],
        4,
    ),
)
def test_steps_equal_one_causal_call(dtype, schedule, options):
    q, k, v = arrays(dtype, bias=4.0 if schedule is ASCEND else 0.0)
    found, cache = jax.jit(lambda *x: decode(empty(dtype, schedule), *x, **options))(q, k, v)
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    keywords = {x: y for x, y in options.items() if x not in ("shift", "precision")}
    expected = dot_product_attention(*wide, is_causal=True, implementation="reference", **keywords)
    assert found.dtype == q.dtype
    close(found, expected, dtype)
    assert cache.length.tolist() == [LENGTH] * B


def test_what_is_kept_is_what_the_arrays_say():
    _, k, v = arrays(bias=3.0)
    cache = empty(max_length=LENGTH)
    append = jax.jit(KVCache.append)
    for start in range(0, LENGTH, 5):
        cache = append(cache, k[:, start : start + 5], v[:, start : start + 5])
    np.testing.assert_array_equal(cache.key, k)
    facts = jax.tree.map(lambda x: x.reshape(B, -1, *x.shape[1:]), cache.pages.facts)

    def per_block(x, reduce):
        return np.stack([reduce(x[:, i : i + 16], 1) for i in range(0, LENGTH, 16)], 1)

    np.testing.assert_allclose(facts.total, per_block(k, np.sum), rtol=1e-6)
    np.testing.assert_array_equal(facts.count, per_block(np.ones((B, LENGTH, K)), np.sum))
    np.testing.assert_array_equal(facts.key_top, per_block(jnp.abs(k).max(3), np.max))
    np.testing.assert_array_equal(facts.value_top, per_block(jnp.abs(v).max(3), np.max))
    norms = per_block(np.log2(np.linalg.norm(k, axis=-1)), np.max)
    np.testing.assert_allclose(facts.key_norm, norms, rtol=1e-5, atol=1e-5)


@pytest.mark.full
def test_prompts_of_unlike_length():
    q, k, v = arrays()
    lengths = jnp.asarray([PROMPT, 9], jnp.int32)
    garbage = jnp.arange(PROMPT)[None, :, None, None] >= lengths[:, None, None, None]
    bad_k, bad_v = (jnp.where(garbage, jnp.nan, x[:, :PROMPT]) for x in (k, v))

    @jax.jit
    def run(cache, q, k, v):
        cache = cache.append(bad_k, bad_v, lengths=lengths)
        first = cache.attend(q[:, :PROMPT], lengths=lengths)
        cache = cache.append(k[:, PROMPT:], v[:, PROMPT:])
        return first, cache.attend(q[:, PROMPT:])

    first, then = run(empty(), q, k, v)
    for b, length in enumerate(lengths.tolist()):
        kept = [jnp.concatenate([x[b, :length], x[b, PROMPT:]]) for x in (q, k, v)]
        expected = dot_product_attention(*kept, is_causal=True, implementation="reference")
        close(first[b, :length], expected[:length], "float32")
        assert not np.any(first[b, length:])
        close(then[b], expected[length:], "float32")


def test_huge_and_nonfinite_keys():
    q, k, v = (4e37 * x for x in arrays("bfloat16", bias=0.5))
    out, cache = jax.jit(lambda *x: decode(empty("bfloat16"), *x, shift="mean"))(q, k, v)
    assert not np.isfinite(cache.pages.facts.total).all()
    assert bool(jnp.isfinite(out).all())
    k, v = (x.at[:, 30].set(jnp.nan) for x in arrays()[1:])
    out, _ = jax.jit(lambda *x: decode(empty(), *x))(arrays()[0], k, v)
    nan = np.isnan(np.asarray(out)).all((0, 2, 3))
    assert not nan[:30].any()
    assert nan[30:].all()


def test_a_full_cache_is_an_error_where_it_is_known_and_nan_where_not():
    q, k, v = arrays()
    full = empty(max_length=LENGTH).append(k, v)
    with pytest.raises(ValueError, match="at most 40 in all; got 41"):
        full.append(k[:, :1], v[:, :1])
    short = jnp.asarray([LENGTH - 3, LENGTH], jnp.int32)
    cache = jax.jit(KVCache.append)(empty(max_length=LENGTH), k, v, lengths=short)
    cache = jax.jit(KVCache.append)(cache, k[:, :2], v[:, :2])
    out = jax.jit(KVCache.attend)(cache, q[:, :2])
    assert np.isnan(np.asarray(out)).all((1, 2, 3)).tolist() == [False, True]
    assert np.isfinite(np.asarray(out[0])).all()
    with pytest.raises(ValueError, match="which fit; got 2 beside"):
        cache.attend(q[:, :2])


def test_more_queries_than_tokens():
    q, k, v = arrays()
    cache = empty().append(k[:, :2], v[:, :2])
    with pytest.raises(ValueError, match=r"`query` must hold at most .*; got 3 beside \[2, 2\]"):
        cache.attend(q[:, :3])
    assert np.isnan(jax.jit(KVCache.attend)(cache, q[:, :3])).all()


def test_vmap_and_donation():
    q, k, v = (jnp.stack([x, 2 * x]) for x in arrays())
    caches = jax.tree.map(lambda x: jnp.stack([x, x]), empty())

    @jax.jit
    def run(cache, q, k, v):
        cache = cache.append(k, v)
        return cache.attend(q)

    found = jax.vmap(run)(caches, q, k, v)
    expected = dot_product_attention(q[1], k[1], v[1], is_causal=True, implementation="reference")
    close(found[1], expected, "float32")
    grow = jax.jit(KVCache.append, donate_argnums=0)
    before = empty()
    after = grow(before, k[0, :, :1], v[0, :, :1])
    assert before.pages.key.is_deleted()
    assert after.length.tolist() == [1, 1]


X = jnp.zeros((B, 3, K, D))
V = jnp.zeros((B, 3, K, E))
WRONG = {
    "type": (
        lambda c: c.append(X.astype(jnp.float16), V),
        "`key` must be of the cache's type float32; got float16. Cast it.",
    ),
    "value's type": (
        lambda c: c.append(X, V.astype(jnp.bfloat16)),
        "`value` must be of the cache's type float32; got bfloat16. Cast it.",
    ),
    "heads": (
        lambda c: c.append(X[:, :, :1], V),
        "`key` must be [2, T, 2, 16] with one T ≥ 1; got (2, 3, 1, 16).",
    ),
    "value's length": (
        lambda c: c.append(X, V[:, :2]),
        "`value` must be [2, T, 2, 12] with one T ≥ 1; got (2, 2, 2, 12).",
    ),
    "too long": (
        lambda c: c.append(jnp.zeros((B, 50, K, D)), jnp.zeros((B, 50, K, E))),
        "`key` must hold at most the cache's 47 tokens; got 50. Make a longer cache.",
    ),
    "lengths": (
        lambda c: c.append(X, V, lengths=jnp.zeros(3, jnp.int32)),
        "`lengths` must be integers of shape [B] = [2]; got int32[3].",
    ),
    "query's type": (
        lambda c: c.append(X, V).attend(jnp.zeros((B, 1, N, D), jnp.float16)),
        "`query` must be of the cache's type float32; got float16. Cast one of them.",
    ),
    "option": (
        lambda c: c.append(X, V).attend(jnp.zeros((B, 1, N, D)), is_causal=False),
        "`options` must be among scale, local_window_size, logits_soft_cap, sinks, shift, beta, "
        "precision, implementation, interpret; got is_causal.",
    ),
    "size": (
        lambda c: KVCache.empty(1, 0, 1, 1, "float32"),
        "`max_length` must be a positive int; got 0.",
    ),
    "dtype": (
        lambda c: KVCache.empty(1, 1, 1, 1, "int8"),
        "`dtype` must be one of float16, bfloat16, float32, float64; got int8.",
    ),
    "schedule": (
        lambda c: KVCache.empty(1, 1, 1, 1, "float32", schedule=3),
        "`schedule` must be a pasa_jax.Schedule or None; got 3.",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name):
    call, message = WRONG[name]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call(empty())
    assert str(error.value) == message
