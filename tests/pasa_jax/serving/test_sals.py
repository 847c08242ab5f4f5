"""The cache of low-rank keys: beside dense attention, and beside its own rules in NumPy."""

import inspect
import re
import textwrap
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pasa_jax import models
from pasa_jax.core.rotary import rotated, rotation, rotation_below
from pasa_jax.evidence.plain import numpy_attention
from pasa_jax.models.decoder import Decoder, DecoderConfig
from pasa_jax.serving import sals
from pasa_jax.serving.sals._values import packed, unpacked
from tests.pasa_jax.sparse.draws import arrays, relative
from tests.weights import needs_smollm2

K, N, D = 2, 4, 8
BASE = 100.0
SMALL = DecoderConfig(
    vocabulary=50, width=32, hidden=64, layers=2, heads=4, kv_heads=2, head_dim=8, max_length=64
)


def draws(s=40, b=1, rank=K * D, seed=0):
    """q [b, s, N, D], k and v [b, s, K, D], and the basis of k."""
    q, k, v = arrays(s, s, n=N, k=K, d=D, b=b, seed=seed, size=1.0)
    return q, k, v, sals.Basis.of(k.reshape(-1, K, D), rank)


def cache_of(basis, k, v, most=64, lengths=None, **options):
    options = {"dtype": "float32", "sinks": 2, "window": 4, "top": 64, "rope_base": BASE} | options
    empty = sals.LatentCache.empty(basis, len(k), most, **options)
    return empty.append(k, v, lengths=lengths)


def turned(x, base=BASE):
    at = jnp.arange(x.shape[1], dtype=jnp.int32)
    return np.asarray(rotated(x, rotation(at, D, base)))


def dense(q, k, v, t=1, base=BASE):
    """Of the last t queries of one batch entry, [t, N, D] float64."""
    s = k.shape[1]
    seen = np.arange(s)[None] <= np.arange(s - t, s)[:, None]
    q, k = turned(q, base)[0, -t:], turned(k, base)[0]
    return numpy_attention(q, k, np.asarray(v)[0], visible=seen)


# Nothing left out.


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", pytest.param("float16", marks=pytest.mark.full)]
)
def test_full_rank_and_all_tokens_is_dense_attention(dtype):
    q, k, v, basis = draws()
    out = cache_of(basis, k, v, dtype=dtype).attend(q[:, -3:])
    error = {"float32": 0.01, "bfloat16": 0.02, "float16": 0.01}[dtype]  # 0.004 by int8 values
    assert relative(out[0], dense(q, k, v, 3)) < error


def test_integer_values_are_exact():
    q, k, _, basis = draws()
    v = jnp.asarray(np.random.default_rng(1).integers(-127, 128, k.shape), jnp.float32)
    v = v.at[..., 0, 0].set(127)
    out = cache_of(basis, k, v).attend(q[:, -3:])
    assert relative(out[0], dense(q, k, v, 3)) < 1e-5


def test_integer_values_of_4_bits_are_exact():
    v = np.random.default_rng(1).integers(-7, 8, (1, 3, K, D))
    v[..., 0] = [7, -7]
    v = jnp.asarray(v * np.array([[0.5], [4]]), jnp.float32)  # a scale for each head
    whole, scale = packed(v, 4)
    assert whole.shape == (1, 3, K, D // 2)
    assert np.array_equal(unpacked(whole, scale, 4), v)


@pytest.mark.parametrize("bits", [8, 4])
def test_values_are_off_by_half_a_step(bits):
    v = arrays(s=50, k=K, d=D)[2].at[0, 7].set(0)
    found = np.asarray(unpacked(*packed(v, bits), bits))
    step = np.abs(v).max(axis=(2, 3) if bits == 8 else 3, keepdims=True) / {8: 127, 4: 7}[bits]
    room = {8: 1.01, 4: 0.52}[bits]  # the largest is cut where bfloat16 rounds the scale down
    assert np.all(np.abs(found - v) <= room * step)


@pytest.mark.full
def test_values_of_4_bits():
    q, k, v, basis = draws()
    out = cache_of(basis, k, v, value_bits=4).attend(q[:, -3:])
    assert 0.02 < relative(out[0], dense(q, k, v, 3)) < 0.2


@pytest.mark.full
def test_tokens_may_come_one_at_a_time():
    q, k, v, basis = draws(20)
    cache = cache_of(basis, k[:, :5], v[:, :5], top=6)
    for i in range(5, 20):
        cache = cache.append(k[:, i : i + 1], v[:, i : i + 1])
    at_once = cache_of(basis, k, v, top=6)
    for one, other in zip(jax.tree.leaves(cache), jax.tree.leaves(at_once), strict=True):
        assert np.allclose(one, other, atol=1e-5)
    assert np.allclose(cache.attend(q[:, -1:]), at_once.attend(q[:, -1:]), atol=1e-5)


@pytest.mark.full
def test_texts_of_unlike_lengths():
    q, k, v, basis = draws(b=3)
    lengths = np.array([40, 17, 3], np.int32)
    cache = cache_of(basis, k, v, lengths=lengths)
    rows = jnp.arange(3, dtype=jnp.int32)[:, None]
    out = cache.attend(q[rows, lengths[:, None] - 1])
    for b, s in enumerate(lengths):
        entry = (x[b : b + 1, :s] for x in (q, k, v))
        assert relative(out[b], dense(*entry)) < 0.01


@pytest.mark.full
def test_padding_behind_the_queries():
    q, k, v, basis = draws(b=2)
    first = cache_of(basis, k[:, :30], v[:, :30])
    lengths = jnp.asarray([4, 2], jnp.int32)
    cache = first.append(k[:, 30:34], v[:, 30:34], lengths=lengths)
    out = cache.attend(q[:, 30:34], lengths=lengths)
    assert relative(out[0], dense(q[:1, :34], k[:1, :34], v[:1, :34], 4)) < 0.01
    assert relative(out[1, :2], dense(q[1:, :32], k[1:, :32], v[1:, :32], 2)) < 0.01
    assert not out[1, 2:].any()


@pytest.mark.full
def test_few_tokens_in_a_short_cache():
    """No token is beyond the sinks and the window."""
    q, k, v, basis = draws(5)
    cache = cache_of(basis, k, v, most=5, sinks=4, window=8)
    assert relative(cache.attend(q)[0], dense(q, k, v, 5)) < 0.01


# What is chosen.


def chosen_by_definition(q, k, basis, sinks, window, top, scored):
    """The tokens that the last query attends, and the keys it finds there."""
    s = k.shape[1]
    u = np.asarray(basis.directions, np.float64)
    centred = np.asarray(k[0], np.float64) - np.asarray(basis.mean)
    z = np.einsum("skd,rkd->sr", centred, u)
    far = np.arange(sinks, s - window)
    weight = np.zeros(len(far))
    for head in range(N):
        lifted = u[:, head // (N // K)] @ np.asarray(q[0, -1, head], np.float64)
        score = z[far, :scored] @ lifted[:scored] / np.sqrt(D)
        p = np.exp(score - score.max())
        weight += p / p.sum()
    best = far[np.argsort(-weight)[:top]]
    rebuilt = np.einsum("sr,rkd->skd", z, u) + np.asarray(basis.mean)
    keys = np.where(np.isin(np.arange(s), best)[:, None, None], rebuilt, np.asarray(k[0]))
    seen = np.zeros(s, bool)
    seen[[*range(sinks), *best, *range(s - window, s)]] = True
    return seen, jnp.asarray(keys, jnp.float32)[None]


@pytest.mark.parametrize(("rank", "scored"), [(16, 16), (6, 3)])
def test_the_choice_and_the_keys_are_those_of_the_definition(rank, scored):
    q, k, v, basis = draws(rank=rank, seed=2)
    q = 3 * q
    cache = cache_of(basis, k, v, top=7, scored=scored)
    seen, keys = chosen_by_definition(q, k, basis, 2, 4, 7, scored)
    assert seen.sum() == 13
    exact = numpy_attention(
        turned(q)[0, -1:], turned(keys)[0], np.asarray(v)[0], visible=seen[None]
    )
    assert relative(cache.attend(q[:, -1:])[0], exact) < 0.01


def test_the_token_that_one_head_asks_for_is_attended():
    """The other heads ask for nothing."""
    q, k, v, basis = draws(seed=3)
    needle, head, slow = 13, 2, [3, 7]  # the slowest pair of channels: at this base it stands still
    k = k.at[0, needle, :, slow].set(6)
    q = (0.01 * q).at[0, -1, head, slow].set(6)
    out = cache_of(basis, k, v, top=2, rope_base=1e12).attend(q[:, -1:])
    exact = dense(q, k, v, base=1e12)
    assert relative(out[0], exact) > 0.1  # the others miss most tokens
    assert relative(out[0, :, head], exact[:, head]) < 0.01


@pytest.mark.full
def test_scores_have_no_rotary_positions():
    """Tokens alike but for their place are chosen alike."""
    q, k, v, basis = draws(seed=4)
    k = k.at[:, 25].set(k[:, 9])
    q = q.at[0, -1].set(20 * jnp.repeat(k[0, 9], N // K, axis=0))
    cache = cache_of(basis, k, v, scored=16)
    place, _ = cache._chosen(q[:, -1:], 1.0, 2)
    assert sorted(np.asarray(place).ravel()) == [9, 25]


@pytest.mark.full
def test_each_query_of_several_chooses_for_itself():
    q, k, v, basis = draws(rank=6, seed=5)
    q = 3 * q
    both = cache_of(basis, k, v, top=7, scored=3).attend(q[:, -2:])
    last = cache_of(basis, k, v, top=7, scored=3).attend(q[:, -1:])
    first = cache_of(basis, k[:, :-1], v[:, :-1], top=7, scored=3, window=3).attend(q[:, -2:-1])
    assert np.allclose(both[:, 1:], last, atol=1e-5)
    assert np.allclose(both[:, :1], first, atol=1e-5)


# What must not matter.


def test_what_stands_in_slots_that_are_not_used():
    q, k, v, basis = draws(9)
    clean = cache_of(basis, k, v, window=16)
    used = {
        "latents": np.arange(64) < 9,
        "exact": (np.arange(18) < 9)[:, None, None],
    }
    dirty = {name: jnp.where(x, getattr(clean, name), jnp.nan) for name, x in used.items()}
    assert all(bool(jnp.isnan(x).any()) for x in dirty.values())
    unused = np.arange(64)[:, None] >= 9
    dirty["value_scale"] = jnp.where(unused, jnp.uint16(0x7FC0), clean.value_scale)  # NaN
    assert np.array_equal(replace(clean, **dirty).attend(q[:, -2:]), clean.attend(q[:, -2:]))


@pytest.mark.parametrize("number", [np.nan, pytest.param(np.inf, marks=pytest.mark.full)])
def test_a_token_that_is_seen_and_not_finite_shows(number):
    q, k, v, basis = draws(b=2)
    for bad in ((k.at[0, 20].set(number), v), (k, v.at[0, 20].set(number))):
        out = cache_of(basis, *bad).attend(q[:, -1:])
        assert bool(jnp.all(jnp.isnan(out[0])))
        assert bool(jnp.all(jnp.isfinite(out[1])))


def test_tokens_that_do_not_fit_give_nan_under_jit():
    q, k, v, basis = draws(12, b=2)
    lengths = jnp.asarray([12, 8], jnp.int32)

    @jax.jit
    def run(k, v, q):
        return cache_of(basis, k, v, most=12, lengths=lengths).append(k, v, lengths=lengths - 8)

    cache = run(k, v, q)
    assert list(cache.length) == [16, 8]
    out = jax.jit(sals.LatentCache.attend)(cache, q[:, -1:])
    assert bool(jnp.all(jnp.isnan(out[0])))
    assert bool(jnp.all(jnp.isfinite(out[1])))


@pytest.mark.full
def test_loops_and_batches_of_layers():
    q, k, v, basis = draws(12, rank=6)
    layers = jax.tree.map(lambda x: jnp.stack([x, x]), basis)
    options = {"rope_base": BASE, "dtype": "bfloat16", "sinks": 2, "window": 4, "top": 3}
    stacked = sals.LatentCache.empty(layers, 1, 16, **options)
    single = sals.LatentCache.empty(basis, 1, 16, **options)
    assert jax.tree.map(lambda x: x.shape[1:], stacked) == jax.tree.map(lambda x: x.shape, single)

    def token(cache, qkv):
        q, k, v = (x[:, None] for x in qkv)
        cache = cache.append(k, v)
        return cache, cache.attend(q)[:, 0]

    tokens = tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v))
    loop = jax.jit(lambda cache: jax.lax.scan(token, cache, tokens))
    cache, out = loop(single)
    caches, outs = jax.vmap(loop)(stacked)
    assert np.allclose(outs[1], out, atol=1e-5)
    assert list(caches.length.ravel()) == [12, 12]
    assert np.array_equal(caches.latents[0], cache.latents)
    assert relative(out[-1], np.asarray(cache.attend(q[:, -1:])[:, 0], np.float64)) < 1e-5


# The basis.


@pytest.mark.full
def test_keys_of_low_rank_are_kept_whole():
    rng = np.random.default_rng(0)
    k = rng.standard_normal((1, 40, 3)) @ rng.standard_normal((3, K * D)) + 5
    k = jnp.asarray(k.reshape(1, 40, K, D), jnp.float32)
    q, _, v, _ = draws()
    basis = sals.Basis.of(k[0], 3)
    flat = np.asarray(basis.directions).reshape(3, -1)
    assert np.allclose(flat @ flat.T, np.eye(3), atol=1e-6)
    assert float(basis.kept) > 1 - 1e-5
    out = cache_of(basis, k, v, scored=3).attend(0.1 * q[:, -1:])
    assert relative(out[0], dense(0.1 * q, k, v)) < 0.01


def test_the_share_kept_is_that_of_the_squares():
    _, k, _, basis = draws(200, rank=5)
    centred = np.asarray(k[0] - basis.mean, np.float64).reshape(200, -1)
    flat = np.asarray(basis.directions).reshape(5, -1)
    left = centred - centred @ flat.T @ flat
    assert np.isclose(float(basis.kept), 1 - np.sum(left**2) / np.sum(centred**2), atol=1e-4)


def test_the_cache_is_as_small_as_it_is_said_to_be():
    basis = sals.Basis.of(jnp.ones((2, 4, 64)), 32)
    cache = sals.LatentCache.empty(basis, 1, 32768, rope_base=1e4)
    half = sals.LatentCache.empty(basis, 1, 32768, rope_base=1e4, value_bits=4)
    assert cache.nbytes - half.nbytes == 32768 * (128 - 3 * 2)
    assert cache.nbytes == 32768 * (32 * 2 + 256 + 2) + (16 + 128) * 256 * 2


def test_angles_from_tables():
    at = jnp.asarray([0, 1, 31, 32, 999, 1000], jnp.int32)
    for one, other in zip(rotation_below(1001, at, D, BASE), rotation(at, D, BASE), strict=True):
        assert np.allclose(one, other, atol=1e-4)
    assert np.allclose(rotation_below(1, at[:1], D, BASE)[0], 1)


# Decoders.


def small_model():
    model = Decoder(SMALL, rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, 50, (2, 24))
    return model, jnp.asarray(tokens, jnp.int32)


@pytest.mark.full
def test_a_decoder_at_full_rank():
    model, tokens = small_model()
    basis = sals.calibrate(model, tokens, K * D, skip=2)
    caches = sals.LatentCache.empty(
        basis, 2, 24, rope_base=SMALL.rope_base, dtype="float32", sinks=2, window=4, top=24
    )
    states, caches = sals.prefill(model, tokens[:, :20], caches)
    more, caches = sals.step(model, tokens[:, 20:], caches)
    exact, _ = jax.jit(Decoder.walk)(model, tokens)
    assert np.allclose(states, exact[:, :20], atol=1e-4)
    assert relative(more, np.asarray(exact[:, 20:], np.float64)) < 0.01
    assert np.array_equal(caches.length, np.full((2, 2), 24))


@pytest.mark.full
def test_generating_at_full_rank():
    model, tokens = small_model()
    basis = sals.calibrate(model, tokens, K * D, skip=2)
    found = sals.generate(model, basis, tokens, 8, sinks=2, window=4, top=32)
    assert np.array_equal(found, model.generate(tokens, 8))


@pytest.mark.full
@needs_smollm2
def test_smollm2_at_a_quarter_of_the_rank():
    model, tokenizer = models.load("smollm2")
    text, other = (
        jnp.asarray([tokenizer.encode(inspect.getsource(x)).ids[:512]]) for x in (textwrap, inspect)
    )
    basis = sals.calibrate(model, other, 48)
    caches = sals.LatentCache.empty(basis, 1, 512, rope_base=model.config.rope_base, top=64)
    states = []
    for start in range(0, 512, 32):
        x, caches = sals.step(model, text[:, start : start + 32], caches)
        states.append(x)

    def perplexity(states):
        true = models.metrics.log_probabilities(model.logits(states))
        return models.metrics.perplexity(true, text)

    exact = perplexity(jax.jit(Decoder.walk)(model, text)[0])
    assert perplexity(jnp.concatenate(states, axis=1)) < 1.1 * exact


# What is refused.


def refused(message, call):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 0}, "`max_length` must be a positive int; got 0."),
        ({"window": 0}, "`window` must be a positive int; got 0."),
        ({"top": 1.5}, "`top` must be a positive int; got 1.5."),
        ({"sinks": -1}, "`sinks` must be an int of at least 0; got -1."),
        ({"scored": 9}, "`scored` must be at most the basis's rank r = 8; got 9."),
        ({"value_bits": 3}, "`value_bits` must be 8 or 4; got 3."),
        (
            {"value_bits": 4, "value_head_dim": 5},
            "`value_head_dim` must be even, for two values in a byte; got 5.",
        ),
        ({"rope_base": 0}, "`rope_base` must be a finite number of at least 1; got 0."),
        (
            {"dtype": "int8"},
            "`dtype` must be one of 'float16', 'bfloat16', 'float32'; got 'int8'.",
        ),
        (
            {"basis": None},
            "`basis` must be a Basis; got NoneType. `calibrate` makes one.",
        ),
    ],
)
def test_wrong_sizes(options, message):
    basis = sals.Basis.of(jnp.ones((2, K, D)), 8)
    given = {"basis": basis, "batch": 1, "max_length": 8, "rope_base": BASE} | options
    refused(message, lambda: sals.LatentCache.empty(**given))


def test_wrong_calls():
    q, k, v, basis = draws(8)
    cache = cache_of(basis, k, v, most=8)
    one, many = q[:, :1], jnp.zeros((1, 5, N, D))
    refused(
        "`query` must be of at most 4 tokens, the window; got 5. "
        "Attend fewer at a time, or make a cache with a larger window.",
        lambda: cache.attend(many),
    )
    refused(
        "`query` must be [1, T, N, 8], N a multiple of 2; got (1, 1, 3, 8).",
        lambda: cache.attend(one[:, :, :3]),
    )
    refused(
        "`scale` must be a positive, finite number; got -1.", lambda: cache.attend(one, scale=-1)
    )
    refused(
        "`options` must be among logits_soft_cap, precision, shift; got bias.",
        lambda: cache.attend(one, bias=None),
    )
    refused(
        "`key` must hold tokens that fit beside the cache's: at most 8 in all; got 9. "
        "Make a longer cache.",
        lambda: cache.append(k[:, :1], v[:, :1]),
    )
    refused(
        "`value` must be [1, T, 2, 8] with one T ≥ 1; got (1, 2, 2, 8).",
        lambda: cache.append(k[:, :1], v[:, :2]),
    )
    refused(
        "`value` must be of type float16, bfloat16, float32, as `key` is; got float16. Cast it.",
        lambda: cache.append(k, v.astype("float16")),
    )
    layers = jax.tree.map(lambda x: x[None], cache)
    refused(
        "`cache` must be of one layer; got (1,) of them. "
        "`jax.lax.scan` or `jax.vmap` goes through the layers.",
        lambda: layers.attend(one),
    )


def test_wrong_calibration():
    model, tokens = small_model()
    refused(
        "`rank` must be an int from 1 to K·D = 16; got 17.",
        lambda: sals.calibrate(model, tokens, 17),
    )
    refused(
        "`skip` must be an int from 0 to 23, below T; got 24.",
        lambda: sals.calibrate(model, tokens, 4, skip=24),
    )
    refused(
        "`keys` must be floats [M, K, D]; got int32[2, 2, 4].",
        lambda: sals.Basis.of(jnp.ones((2, 2, 4), jnp.int32), 2),
    )
