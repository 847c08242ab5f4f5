"""Pages of 8 bits: what is stored, what attention makes of it, how far that is from the truth."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pasa_jax import Schedule, dot_product_attention
from pasa_jax.core.packed import FORMATS, pack_keys, pack_values
from pasa_jax.plugins import KVCache
from pasa_jax.serving import PagedCache, as_stored, format_errors
from tests.thin import only

B, N, K, D, E, PAGE = 2, 4, 2, 16, 12, 8
TILES = Schedule(block_q=16, block_kv=PAGE)
CODES = {"int8": None, "float8_e4m3": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2}
# Error of an output over its largest number, keys around 0.
ERROR = {"int8": 0.02, "float8_e4m3": 0.08, "float8_e5m2": 0.15}


def stored(x, scale, name):
    """What the format makes of x, by NumPy and ml_dtypes."""
    codes = x / scale
    codes = np.round(codes) if CODES[name] is None else codes.astype(CODES[name])
    return codes.astype(np.float32) * scale


@pytest.mark.parametrize("name", FORMATS)
def test_codes_scales_and_means(name):
    rng = np.random.default_rng(0)
    k = rng.standard_normal((K, PAGE, D)).astype(np.float32) * np.geomspace(1e-3, 1e3, D) + 50
    v = rng.standard_normal((K, PAGE, E)).astype(np.float32) * 1e-3
    k, v = k.astype(np.float32), v.astype(np.float32)
    k[0, 3, 5] = np.nan
    format = FORMATS[name]
    codes, scale, mean = pack_keys(jnp.asarray(k), format)
    found = format.read(codes) * scale[:, None] + mean[:, None]
    true_mean = np.nanmean(k, axis=1)
    np.testing.assert_allclose(mean, true_mean, rtol=1e-5)
    off = np.nan_to_num(k - np.asarray(mean)[:, None])
    np.testing.assert_allclose(scale, np.abs(off).max(1) / format.largest, rtol=1e-6)
    expected = stored(off, np.asarray(scale)[:, None], name) + np.asarray(mean)[:, None]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    codes, scale = pack_values(jnp.asarray(v), format)
    np.testing.assert_allclose(scale, np.abs(v).max(-1) / format.largest, rtol=1e-6)
    found = format.read(codes) * scale[..., None]
    np.testing.assert_allclose(found, stored(v, np.asarray(scale)[..., None], name), rtol=1e-5)


def test_zeros_and_tiny_numbers_have_codes():
    for x in (0.0, 1e-42):
        codes, scale, mean = pack_keys(jnp.full((PAGE, D), x), FORMATS["int8"])
        assert np.isfinite(np.asarray(FORMATS["int8"].read(codes) * scale + mean)).all()


def arrays(dtype, length, bias=0.0, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((B, length, N, D))
    k = rng.standard_normal((B, length, K, D)) + bias
    return [jnp.asarray(x, dtype) for x in (q, k, rng.standard_normal((B, length, K, E)))]


@partial(jax.jit, static_argnames="chunks")
def filled(cache, k, v, chunks):
    start = 0
    for size in chunks:
        cache = cache.append(k[:, start : start + size], v[:, start : start + size])
        start += size
    return cache


@pytest.mark.parametrize("dtype", only(["bfloat16"], ["float16", "bfloat16", "float32"]))
@pytest.mark.parametrize("name", only(["int8"], FORMATS))
def test_attention_is_that_of_what_is_stored(name, dtype):
    q, k, v = arrays(dtype, 43)
    empty = KVCache.empty(B, 50, K, D, dtype, value_head_dim=E, schedule=TILES, format=name)
    cache = filled(empty, k, v, (3, 1, 20, 9, 10))
    held = [x[:, :43].astype(jnp.float32) for x in (cache.key, cache.value)]
    np.testing.assert_array_equal(held[0][:, 40:], k[:, 40:].astype(jnp.float32))  # still open
    out = jax.jit(KVCache.attend)(cache, q[:, 40:])
    options = {"is_causal": True, "causal_alignment": "bottom_right", "implementation": "reference"}
    wide = q[:, 40:].astype(jnp.float32)
    expected = dot_product_attention(wide, *held, **options)
    close = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}[dtype]
    assert np.abs(np.asarray(out, np.float32) - expected).max() < close * np.abs(expected).max()
    true = dot_product_attention(wide, *(x.astype(jnp.float32) for x in (k, v)), **options)
    assert (
        np.abs(np.asarray(out, np.float32) - true).max() < ERROR[name] * np.abs(true).max() + close
    )
    # One chunk or many: the pages are the same.
    at_once = filled(empty, k, v, (43,))
    for a, b in zip(*map(jax.tree.leaves, (cache.pages, at_once.pages)), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-6)


@pytest.mark.parametrize("bias", [0.0, 200.0])
def test_a_mean_taken_off_makes_int8_better_than_bfloat16(bias):
    q, k, v = arrays("float32", 64, bias)
    options = {"is_causal": True, "causal_alignment": "bottom_right", "implementation": "reference"}
    one = q[:, -1:]
    true = dot_product_attention(one, k, v, **options)

    def error(keys):
        out = dot_product_attention(one, keys.astype(jnp.float32), v, **options)
        return float(jnp.abs(out - true).max() / jnp.abs(true).max())

    packed = KVCache.empty(B, 64, K, D, "float32", value_head_dim=E, schedule=TILES, format="int8")
    of_int8 = error(filled(packed, k, v, (64,)).key)
    of_e4m3 = error(k.astype(jnp.float8_e4m3fn))
    assert of_int8 < of_e4m3 / 4
    if bias:
        assert of_int8 < error(k.astype(jnp.bfloat16)) / 3
        assert of_int8 < 0.03


def test_a_token_that_is_not_finite_spoils_what_sees_it():
    q, k, v = arrays("float32", 24)
    k = k.at[0, 5, 1, 2].set(jnp.inf)
    empty = KVCache.empty(B, 24, K, D, "float32", value_head_dim=E, schedule=TILES, format="int8")
    out = jax.jit(KVCache.attend)(filled(empty, k, v, (24,)), q)
    bad = np.isnan(np.asarray(out)).all(-1)
    expected = np.zeros(bad.shape, bool)
    expected[0, 5:, 2:] = True
    np.testing.assert_array_equal(bad, expected)


@pytest.mark.parametrize("layers", only([2], [1, 2]))
def test_sequences_share_packed_pages(layers):
    """A fork within a page and at its edge; layers have pages of their own."""
    empty = PagedCache.empty(
        *(3, 12, PAGE, 40, K, D, "float32"),
        value_head_dim=E,
        layers=layers,
        schedule=TILES,
        format="int8",
    )
    total = 24

    @jax.jit
    def step(cache, counts, q, k, v):
        cache, batch = cache.grown(counts, total=total)
        outs = []
        for layer in range(layers):
            cache = cache.write(batch, k * (layer + 1), v, layer=layer)
            outs.append(cache.attend(q, batch, layer=layer))
        return cache, outs

    rng = np.random.default_rng(2)
    held = [[np.zeros((0, *s)) for s in ((N, D), (K, D), (K, E))] for _ in range(3)]
    cache = empty

    def check(counts):
        nonlocal cache
        new = [rng.standard_normal((total, *s)) for s in ((N, D), (K, D), (K, E))]
        cache, outs = step(cache, jnp.asarray(counts), *(jnp.asarray(x, jnp.float32) for x in new))
        end = 0
        for b, count in enumerate(counts):
            part = [x[end : end + count] for x in new]
            held[b] = [np.concatenate(x) for x in zip(held[b], part, strict=True)]
            for layer, out in enumerate(outs):
                if count:
                    q, k, v = (jnp.asarray(x, jnp.float32) for x in held[b])
                    true = dot_product_attention(q, k * (layer + 1), v, is_causal=True)[-count:]
                    error = jnp.abs(out[end : end + count] - true).max()
                    assert error < 0.03 * jnp.abs(true).max(), (b, layer)
            end += count

    check((21, 0, 0))
    cache = jax.jit(PagedCache.forked)(cache, 0, 1)  # within the open page
    held[1] = held[0]
    cache = jax.jit(PagedCache.forked)(cache, 0, 2, length=jnp.int32(13))  # within a packed one
    held[2] = [x[:13] for x in held[0]]
    check((1, 2, 0))
    check((1, 3, 9))
    cache = cache.freed(jnp.asarray([True, False, False]))
    held[0] = [x[:0] for x in held[0]]
    check((17, 1, 1))
    cache = jax.jit(PagedCache.forked)(
        cache.freed(jnp.asarray([False, True, False])), 0, 1, length=16
    )
    held[1] = [x[:16] for x in held[0]]  # at the edge of a page
    check((1, 5, 1))


@pytest.mark.full
def test_what_a_format_would_cost_is_what_a_cache_gives_back():
    q, k, v = arrays("float32", 150, bias=5.0)
    empty = KVCache.empty(B, 192, K, D, "float32", value_head_dim=E, format="int8")
    cache = filled(empty, k, v, (150,))
    assert cache.pages.group == 64
    stored = as_stored("int8", k, v)
    for held, expected in zip((cache.key, cache.value), stored, strict=True):
        apart = np.abs(np.asarray(held)[:, :128] - expected[:, :128])
        assert np.mean(apart > 1e-5) < 1e-3  # a number between two codes may become either
    found = format_errors(q, k, v)
    options = {"is_causal": True, "implementation": "reference"}
    true = dot_product_attention(q, k, v, **options)
    error = np.abs(dot_product_attention(q, *stored, **options) - true).max((0, 1, 3))
    expected = error / np.abs(true).max((0, 1, 3))
    np.testing.assert_allclose(found["int8"], expected, rtol=1e-2)
    assert set(found) == {*FORMATS, "bfloat16", "float16"}
    with pytest.raises(ValueError, match="`format` must be one of"):
        as_stored("int4", k, v)


def test_wrong_format():
    with pytest.raises(ValueError, match="`format` must be one of"):
        KVCache.empty(1, 8, 1, 8, "float32", format="int4")
    with pytest.raises(ValueError, match="`format` must be one of"):
        PagedCache.empty(1, 8, 8, 8, 1, 8, "float32", format="fp8")
