"""The kernels over pages of 8 bits against float64, on what the codes say; and the lax walk."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import gpu_pages
from pasa_jax import Schedule
from pasa_jax.core.errors import BackendUnsupported
from pasa_jax.core.packed import PackedPages
from pasa_jax.core.pages import PageFacts
from pasa_jax.implementations.page_walk import Call, Queries, Sequences
from pasa_jax.serving import PagedCache
from tests.pallas_kernels.test_aot import named
from tests.pallas_kernels.test_pages import (
    CALLS,
    COUNTS,
    PLATFORMS,
    SCALE,
    TARGETS,
    computed,
    plan_of,
    walked,
)
from tests.thin import only, some_tuples

# The largest code, and its type.
CODES: dict[str, tuple[int, Any]] = {
    "int8": (127, None),
    "float8_e4m3": (448, ml_dtypes.float8_e4m3fn),
    "float8_e5m2": (57344, ml_dtypes.float8_e5m2),
}
# Of queries and keys; the last group of each is open, or, of 64 tokens, none.
LENGTHS, ROWS = (70, 0, 13, 64), (3, 1, 4, 0)
# What 16 bits cost: keys less their mean, and weights.
BOUND = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1e-2}


def coded(x, scale, format):
    """Codes of x, as bits and as float64, by NumPy and ml_dtypes."""
    largest, dtype = CODES[format]
    codes = np.clip(x / scale, -largest, largest).astype(np.float32)
    codes = np.round(codes).astype(np.int8) if dtype is None else codes.astype(dtype)
    return codes.view(np.int8), codes.astype(np.float64) * scale


def scales(x, axis, format):
    return (np.abs(x).max(axis, keepdims=True) / CODES[format][0]).astype(np.float32)


class Filled:
    """Pages with NaN, or its bits, in every slot but those that are written.

    ``pages`` are for the kernels; ``held`` are the keys and values of each sequence in float64,
    [length, K, …].
    """

    def __init__(self, sequences, format, dtype, *, n, g):
        self.format, self.dtype, self.n, self.g = format, dtype, n, g
        self.held = []
        heads, size, value_size = *sequences[0][0].shape[1:], sequences[0][1].shape[2]
        blocks = -(-max(len(k) for k, _ in sequences) // n) + 1
        count = len(sequences) * blocks + 3
        pages = PackedPages.empty(count, 6, g, heads, n, size, value_size, dtype, format)
        names = [x for x in vars(pages) if x not in ("facts", "dtype", "format")]
        self.arrays = {x: self._nan(getattr(pages, x)) for x in names}
        self.facts = PageFacts._make(np.array(x) for x in pages.facts)
        self.table = np.full((len(sequences), blocks), -1, np.int32)
        order = np.random.default_rng(0).permutation(count)
        for b, (k, v) in enumerate(sequences):
            used = -(-len(k) // n)
            self.table[b, :used] = order[b * blocks : b * blocks + used]
            self._write(b, k, v)
        arrays = {x: jnp.asarray(y) for x, y in self.arrays.items()}
        facts = PageFacts(*map(jnp.asarray, self.facts))
        self.pages = replace(pages, **arrays, facts=facts)

    def _nan(self, x):
        if x.dtype == jnp.int8:  # NaN in float8
            return np.full(x.shape, -1, np.int8)
        if x.dtype == jnp.uint16:
            return np.full(x.shape, np.asarray(np.nan, self.dtype).view(np.uint16))
        return np.full(x.shape, np.nan, x.dtype)

    def _write(self, b, k, v):
        held_k, held_v = k.astype(np.float64), v.astype(np.float64)
        for at in range(0, len(k), self.g):
            place = slice(at, at + self.g)
            page, slot = self.table[b, at // self.n], at % self.n
            own_k, own_v = (np.moveaxis(x[place], 1, 0) for x in (held_k, held_v))  # [K, g, …]
            bad = np.isnan(own_k[..., :1])
            self._note(page, own_k, own_v, bad)
            own_v = np.where(bad, 0, own_v)
            if own_k.shape[1] < self.g:
                for name, x in (("open_key", own_k), ("open_value", own_v)):
                    x = x.astype(self.dtype)
                    array = self.arrays[name]
                    array[ROWS[b], :, : x.shape[1]] = x.view(array.dtype)
                continue
            zero_k = np.where(bad, 0, own_k)
            mean = (zero_k.sum(1, keepdims=True) / (~bad).sum(1, keepdims=True)).astype(np.float32)
            off = np.where(bad, 0, own_k - mean)
            scale, of_value = scales(off, 1, self.format), scales(own_v, 2, self.format)
            of_value = np.where(bad, 1, of_value)
            (codes, off), (values, new_v) = (
                coded(x, y, self.format) for x, y in ((off, scale), (own_v, of_value))
            )
            inside, group = slice(slot, slot + self.g), slot // self.g
            self.arrays["key"][page, :, inside] = codes
            self.arrays["value"][page, :, inside] = values
            self.arrays["key_scale"][page, :, group] = scale[:, 0]
            self.arrays["key_mean"][page, :, group] = mean[:, 0]
            self.arrays["value_scale"][page, :, inside] = np.where(bad, np.nan, of_value)[..., 0]
            held_k[place] = np.moveaxis(np.where(bad, np.nan, off + mean), 1, 0)
            held_v[place] = np.moveaxis(new_v, 1, 0)
        self.held.append((held_k, held_v))

    def _note(self, page, k, v, bad):
        """What is known of a page, with more keys and values [K, g, …]."""
        k, v = np.where(bad, 0, k), np.where(bad, 0, v)
        facts = self.facts
        facts.total[page] += k.sum(1)
        facts.count[page] += (~bad).sum((1, 2))
        top, norm = np.abs(k).max((1, 2)), np.log2(np.sqrt((k**2).sum(2)).max(1))
        facts.key_norm[page] = np.maximum(facts.key_norm[page], norm)
        facts.key_top[page] = np.maximum(facts.key_top[page], top)
        facts.value_top[page] = np.maximum(facts.value_top[page], np.abs(v).max((1, 2)))


def call_of(
    dtype="bfloat16",
    format="int8",
    *,
    n=32,
    g=16,
    kv_heads=2,
    groups=1,
    size=32,
    value_size=24,
    bias=0.0,
    window=None,
    sinks=False,
    counts=COUNTS,
    lengths=LENGTHS,
    bad=None,
):
    """A call, and the pages that it reads.

    Arguments:
      bias: the size of the mean of each channel of the keys.
      bad: the sequence and the token of a key that is NaN, in every head.
    """
    rng = np.random.default_rng(1)
    mean = bias * np.sign(rng.standard_normal((kv_heads, size)))

    def rounded(x):
        return np.asarray(x, np.float32).astype(dtype)

    sequences = []
    for length in lengths:
        k = rng.standard_normal((length, kv_heads, size)) + mean
        v = rng.standard_normal((length, kv_heads, value_size)) * rng.lognormal(
            0, 2, (length, 1, 1)
        )
        sequences.append((rounded(k), rounded(v)))
    if bad is not None:
        sequences[bad[0]][0][bad[1]] = np.nan
    filled = Filled(sequences, format, dtype, n=n, g=g)
    tokens, heads = sum(counts) + 2, kv_heads * groups
    q = np.full((tokens, heads, size), np.nan)
    q[:-2] = rng.standard_normal((tokens - 2, heads, size))
    first = np.cumsum(counts) - counts
    found = (first, counts, lengths, filled.table, ROWS)
    of_sinks = jnp.asarray(rng.standard_normal(heads), jnp.float32) if sinks else None
    queries = Queries(jnp.asarray(rounded(q)), of_sinks, jnp.float32(SCALE))
    of_call = Sequences(*(jnp.asarray(x, jnp.int32) for x in found))
    return Call(filled.pages, queries, of_call, max(counts), window), filled


def truth(call, filled, cap=None):
    """Output and log-sum-exp in float64, of what the pages hold."""
    q = np.asarray(call.queries.query, np.float64)
    e = filled.held[0][1].shape[2]
    out, lse = np.zeros((*q.shape[:2], e)), np.full(q.shape[:2], -np.inf)
    columns = zip(*(np.asarray(x) for x in call.sequences[:3]), filled.held, strict=True)
    for first, count, length, (k, v) in columns:
        for t, h in np.ndindex(count, q.shape[1]):
            place = length - count + t
            lo = 0 if call.window is None else max(0, place - call.window[0])
            own = (slice(lo, place + 1), h // call.groups)
            s = k[own] @ q[first + t, h] * SCALE
            s = s if cap is None else cap * np.tanh(s / cap)
            sink = -np.inf if call.queries.sinks is None else float(call.queries.sinks[h])
            top = max(s.max(), sink)
            p = np.exp(s - top)
            total = p.sum() + np.exp(sink - top)
            out[first + t, h], lse[first + t, h] = p @ v[own] / total, top + np.log(total)
    return out, lse


def error(found, true):
    """The largest error over the largest number; both are NaN in the same places."""
    found = np.asarray(found, np.float64)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(true))
    seen = np.isfinite(true)
    return np.abs(found - true)[seen].max() / np.abs(true[seen]).max()


def check(kind, call, filled, plan, bound=None):
    found, true = computed(kind, call, plan), truth(call, filled, plan.logits_soft_cap)
    assert not np.any(np.asarray(found.out)[-2:])  # padding
    for a, b in zip(found, true, strict=True):
        assert error(a, b) <= (bound or BOUND[call.pages.dtype])


WINDOW = {"window": (20, 0), "sinks": True}
CASES = [
    ("bfloat16", "int8", {"bias": 200.0, "groups": 4, **WINDOW}, {}),
    ("float32", "float8_e4m3", {"g": 32, "groups": 8}, {"block_kv": 64, "cap": 3.0}),
    ("bfloat16", "float8_e5m2", {"bias": 3.0}, {"shift": "mean"}),
    ("float16", "int8", {"bias": 3.0, "value_size": 40}, {"shift": "mean_past", "cap": 2.0}),
    ("float16", "float8_e4m3", {"groups": 2, "kv_heads": 3, **WINDOW}, {}),
    ("float32", "int8", {"n": 64, "g": 64, "lengths": (200, 0, 90, 64)}, {"block_kv": 128}),
    ("float16", "float8_e5m2", {"n": 64, "g": 32, "groups": 4}, {"shift": "mean"}),
    ("float32", "int8", {"window": (0, 0)}, {"block_kv": 32, "shift": "none"}),
]


@pytest.fixture
def kind(kernel):
    return kernel.removeprefix("pallas_")


@pytest.mark.parametrize(("dtype", "format", "given", "options"), some_tuples(CASES, len(CASES)))
def test_attention_is_that_of_what_the_pages_hold(kind, dtype, format, given, options):
    call, filled = call_of(dtype, format, **given)
    check(kind, call, filled, plan_of(kind, dtype, **options))


@pytest.mark.full
@pytest.mark.parametrize(("dtype", "format", "given", "options"), CASES)
def test_the_lax_walk_gives_the_same(kind, dtype, format, given, options):
    call, _ = call_of(dtype, format, **given)
    plan = plan_of(kind, dtype, **options)
    lowest = np.finfo(np.float32).min
    for a, b in zip(computed(kind, call, plan), walked(*call, plan), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_array_equal(a == lowest, b == lowest)
        assert error(a, np.where(b == lowest, -np.inf, b)) <= BOUND[dtype]


@pytest.mark.full
@pytest.mark.parametrize("format", CODES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_bias_costs_no_digits(kind, dtype, format):
    """Keys in bfloat16 around 200 would cost 0.3 of the output."""
    call, filled = call_of(dtype, format, bias=200.0, groups=4, lengths=(70, 0, 13, 64))
    check(kind, call, filled, plan_of(kind, dtype))


@pytest.mark.full
def test_a_token_that_is_not_finite_spoils_what_sees_it(kind):
    for token in (5, 66):  # in a page, and in the open group
        call, filled = call_of(bad=(0, token), counts=(5, 0, 3, 1))
        check(kind, call, filled, plan_of(kind, "bfloat16"))


@pytest.mark.full
def test_keys_that_leave_float16_without_their_mean_are_for_the_lax_walk():
    call, filled = call_of("float16", size=16, counts=(1, 0, 1, 1))
    huge = filled.pages.facts.key_top.at[0].set(4e4)
    pages = replace(filled.pages, facts=filled.pages.facts._replace(key_top=huge))
    call = call._replace(pages=pages)
    plan = plan_of("gpu", "float16")
    for a, b in zip(gpu_pages.attend(call, plan), walked(*call, plan), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


class TestChoice:
    query = jnp.ones((4, 4, 32), "bfloat16")

    def cache(self, target, page=32, block_kv=32, format="int8"):
        schedule = Schedule(block_q=16, block_kv=block_kv, target=target)
        sizes = (2, 8, page, 4 * page, 2, 32, "bfloat16")
        cache = PagedCache.empty(*sizes, schedule=schedule, format=format)
        return cache.grown(jnp.asarray((3, 1)), total=4)

    @pytest.mark.parametrize("kind", only(["tpu"], TARGETS))
    def test_none_takes_the_kernel(self, kind):
        cache, batch = self.cache(TARGETS[kind])
        platform = PLATFORMS[kind]
        with named(platform):
            traced = jax.jit(lambda q: cache.attend(q, batch)).trace(self.query)
            assert CALLS[kind] in traced.lower(lowering_platforms=(platform,)).as_text()

    @pytest.mark.parametrize(
        ("kind", "given", "reason"),
        [
            ("tpu", {"page": 16}, "a page of 8 bits must have a multiple of 32 tokens, and has 16"),
            ("tpu", {"block_kv": 8}, "packed at once must be a multiple of 16 tokens, and have 8"),
            ("gpu", {"page": 24}, "must be a power of two of at least 16 tokens, and have 8"),
        ],
    )
    def test_what_they_cannot_do(self, kind, given, reason):
        cache, batch = self.cache(TARGETS[kind], **given)
        with pytest.raises(BackendUnsupported, match=reason):
            cache.attend(self.query, batch, implementation=f"pallas_{kind}")
