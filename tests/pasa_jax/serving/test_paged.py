"""The paged cache against one call a sequence, with NaN in every slot that was not written."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax import Precision, Schedule, dot_product_attention
from pasa_jax.serving import PagedCache
from tests.thin import some, some_tuples

B, P, PAGE, LONGEST, TOTAL = 4, 24, 4, 40, 32
N, K, D, E = 4, 2, 16, 12
TILES = Schedule(block_q=16, block_kv=8)
ASCEND = Schedule(block_q=16, block_kv=8, target="ascend_910b")
BOUND = {"float32": 3e-6, "float16": 4e-3, "bfloat16": 3e-2}


def empty(dtype="float32", schedule=TILES, layers=1, page=PAGE):
    """A cache whose pages hold NaN."""
    cache = PagedCache.empty(
        B, P, page, LONGEST, K, D, dtype, layers=layers, value_head_dim=E, schedule=schedule
    )
    nan = jnp.full((), jnp.nan, dtype)
    bits = nan.view(cache.pages.key.dtype)
    pages = replace(
        cache.pages,
        key=jnp.full_like(cache.pages.key, bits),
        value=jnp.full_like(cache.pages.value, bits),
    )
    return replace(cache, pages=pages)


@partial(jax.jit, static_argnames=("options", "layer"))
def step(cache, counts, q, k, v, options=(), layer=0):
    cache, batch = cache.grown(counts, total=TOTAL)
    cache = cache.write(batch, k, v, layer=layer)
    return cache, *cache.attend(q, batch, layer=layer, return_residual=True, **dict(options))


class Plain:
    """What each sequence holds, in plain arrays."""

    def __init__(self, dtype="float32", bias=0.0, size=1.0, seed=0):
        self.rng, self.dtype, self.bias, self.size = np.random.default_rng(seed), dtype, bias, size
        self.held = [[np.zeros((0, heads, d)) for heads, d in SHAPES] for _ in range(B)]

    def tokens(self):
        """TOTAL tokens, of which a step uses the first ones; the others are NaN."""
        new = [self.rng.standard_normal((TOTAL, heads, d)) * self.size for heads, d in SHAPES]
        new[1] += self.bias
        return [jnp.asarray(x, self.dtype) for x in new]

    def append(self, counts, new):
        ends = np.cumsum(counts)
        for b, (end, count) in enumerate(zip(ends, counts, strict=True)):
            part = [np.asarray(x[end - count : end], np.float64) for x in new]
            self.held[b] = [np.concatenate(x) for x in zip(self.held[b], part, strict=True)]

    def expected(self, counts, options):
        """Outputs and log-sum-exps of the last ``counts`` tokens of each sequence."""
        outs, lses = [np.zeros((0, N, E))], [np.zeros((0, N))]
        for (q, k, v), count in zip(self.held, counts, strict=True):
            if count:
                found = of_one(q, k, v, options)
                outs.append(np.asarray(found[0])[-count:])
                lses.append(np.asarray(found[1])[-count:])
        return np.concatenate(outs), np.concatenate(lses)


SHAPES = ((N, D), (K, D), (K, E))


def of_one(q, k, v, options):
    keywords = {x: y for x, y in options if x not in ("shift", "precision")}
    pad = LONGEST - len(q)  # one shape is compiled once
    q, k, v = (jnp.asarray(np.pad(x, ((0, pad), (0, 0), (0, 0))), jnp.float32) for x in (q, k, v))
    out, lse = dot_product_attention(
        q, k, v, is_causal=True, implementation="reference", return_residual=True, **keywords
    )
    return out[: LONGEST - pad], lse[: LONGEST - pad]


STEPS = [(7, 0, 12, 1), (1, 5, 1, 1), (1, 1, 9, 0), (0, 1, 1, 20), (1, 1, 1, 1)]


def close(found, expected, dtype, times=1):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert np.abs(found - expected).max() <= times * BOUND[dtype] * np.abs(expected).max()


SINKS = np.asarray([0.5, -1.0, 2.0, 0.0], np.float32)


@pytest.mark.parametrize(
    ("dtype", "schedule", "bias", "options"),
    some_tuples(
        [
            ("float32", TILES, 0.0, {"local_window_size": (9, 0), "logits_soft_cap": 3.0}),
            ("bfloat16", TILES, 0.0, {}),
            ("float16", TILES, 2.0, {"shift": "mean"}),
            ("float16", TILES, 2.0, {"shift": "paper"}),
            ("float16", TILES, 2.0, {"shift": "mean_past", "local_window_size": (6, 0)}),
            ("float32", TILES, 0.0, {"shift": "none", "scale": 0.3}),
            ("float16", ASCEND, 3.0, {}),
            ("float16", ASCEND, 3.0, {"shift": "reference"}),
            ("float16", TILES, 0.0, {"precision": Precision(scores="float16", products="float16")}),
        ],
        3,
    ),
)
def test_chunks_and_single_tokens_in_one_row(dtype, schedule, bias, options):
    times = 3 if options.get("shift") == "paper" else 1  # its M is rounded, in blocks of 8
    options = tuple(options.items())
    plain, cache = Plain(dtype, bias), empty(dtype, schedule)
    for counts in STEPS:
        new = plain.tokens()
        plain.append(counts, new)
        used = sum(counts)
        new = [x.at[used:].set(jnp.nan) for x in new]  # padding may be anything
        cache, out, lse = step(cache, jnp.asarray(counts), *new, options=options)
        expected = plain.expected(counts, options)
        assert out.dtype == jnp.dtype(dtype)
        close(out[:used], expected[0], dtype, times)
        close(lse[:used], expected[1], dtype, times)
        assert not np.any(np.asarray(out[used:], np.float32))


def test_sinks_and_layers():
    plain, cache = Plain(), empty(layers=2)
    other = Plain(seed=1)

    @jax.jit
    def both(cache, counts, new, others):
        cache, batch = cache.grown(counts, total=TOTAL)
        outs = []
        for layer, (q, k, v) in enumerate((new, others)):
            cache = cache.write(batch, k, v, layer=layer)
            outs.append(cache.attend(q, batch, layer=jnp.int32(layer), sinks=SINKS))
        return cache, outs

    for counts in STEPS:
        arrays = [x.tokens() for x in (plain, other)]
        cache, outs = both(cache, jnp.asarray(counts), *arrays)
        for x, new, out in zip((plain, other), arrays, outs, strict=True):
            x.append(counts, new)
            expected, _ = x.expected(counts, (("sinks", SINKS),))
            close(out[: sum(counts)], expected, "float32")


@pytest.mark.parametrize("dtype", some(["bfloat16", "float32", "float16"]))
def test_pages_in_any_order_give_the_same_bits(dtype):
    ordered = empty(dtype)
    shuffled = np.random.default_rng(3).permutation(P).astype(np.int32)
    mixed = replace(ordered, table=replace(ordered.table, free=jnp.asarray(shuffled)))
    plain, caches = Plain(dtype), [ordered, mixed]
    for counts in STEPS:
        new = plain.tokens()
        found = [step(cache, jnp.asarray(counts), *new) for cache in caches]
        caches = [x[0] for x in found]
        for a, b in zip(found[0][1:], found[1][1:], strict=True):
            np.testing.assert_array_equal(a, b)
    assert np.any(np.asarray(caches[0].table.pages) != np.asarray(caches[1].table.pages))


def test_a_page_that_begins_again_forgets_what_it_held():
    cache, plain = empty(), Plain()
    q, k, v = plain.tokens()
    cache, *_ = step(cache, jnp.asarray((9, 0, 0, 0)), q, 1e6 * k, 1e6 * v)
    cache = cache.freed(jnp.asarray([True, False, False, False]))
    cache, *_ = step(cache, jnp.asarray((0, 9, 0, 0)), q, k, v)
    pages = cache.table.pages[1, :3]
    assert set(pages.tolist()) == {0, 1, 2}  # the same
    facts = jax.tree.map(lambda x: x[pages], cache.pages.facts)
    np.testing.assert_array_equal(facts.count.sum(0), [9, 9])
    np.testing.assert_allclose(facts.total.sum(0), k[:9].sum(0), rtol=1e-5, atol=1e-5)
    assert float(facts.key_top.max()) == float(jnp.abs(k[:9]).max())
    assert float(facts.value_top.max()) == float(jnp.abs(v[:9]).max())


@pytest.mark.full
def test_a_missing_page_spoils_its_own_sequence():
    plain, cache = Plain(), empty()
    first, then = (9, 6, 7, 5), (1, 1, 2, 1)
    new = plain.tokens()
    plain.append(first, new)
    cache, *_ = step(cache, jnp.asarray(first), *new)
    table = cache.table
    sick = {
        "out of range": replace(table, pages=table.pages.at[1, 0].set(P + 7)),
        "none": replace(table, pages=table.pages.at[1, 0].set(-1)),
        "free": replace(table, references=table.references.at[table.pages[1, 0]].set(0)),
        "lost": replace(table, lost=table.lost.at[1].set(True)),
    }
    new = plain.tokens()
    plain.append(then, new)
    expected, _ = plain.expected(then, ())
    for name, broken in sick.items():
        _, out, lse = step(replace(cache, table=broken), jnp.asarray(then), *new)
        bad = np.isnan(np.asarray(out)).all((1, 2))
        assert bad.tolist() == [False, True, False, False, False] + [False] * (TOTAL - 5), name
        assert np.isnan(np.asarray(lse[1])).all()
        keep = [0, 2, 3, 4]
        close(out[jnp.asarray(keep)], expected[keep], "float32")
    # A window that begins behind the page does not need it.
    options = (("local_window_size", (2, 0)),)
    _, out, _ = step(replace(cache, table=sick["none"]), jnp.asarray(then), *new, options=options)
    close(out[:5], plain.expected(then, options)[0], "float32")


def test_a_key_that_is_not_finite_spoils_the_queries_that_see_it():
    cache, plain = empty(), Plain()
    q, k, v = plain.tokens()
    cache, out, _ = step(cache, jnp.asarray((6, 5, 0, 0)), q, k.at[8, 0, 3].set(jnp.inf), v)
    bad = np.isnan(np.asarray(out)).any((1, 2))
    assert np.flatnonzero(bad).tolist() == [8, 9, 10]
    assert np.isnan(np.asarray(out[8, :2])).all()
    assert np.isfinite(np.asarray(out[8, 2:])).all()  # of another key head
    _, out, _ = step(cache, jnp.asarray((1, 1, 1, 0)), q, k, v)
    assert np.isnan(np.asarray(out)).any((1, 2))[:3].tolist() == [False, True, False]


@pytest.mark.full
@pytest.mark.parametrize(("dtype", "size"), some_tuples([("bfloat16", 3e19), ("float32", 1e30)], 2))
def test_huge_numbers_stay_finite(dtype, size):
    cache, plain = empty(dtype), Plain(dtype, size=size)
    for counts in STEPS[:3]:
        cache, out, _ = step(cache, jnp.asarray(counts), *plain.tokens())
        assert np.isfinite(np.asarray(out, np.float32)).all()


def test_shared_beginnings_are_copied_when_written():
    plain, cache = Plain(), empty()
    new = plain.tokens()
    plain.append((10, 0, 0, 0), new)
    cache, *_ = step(cache, jnp.asarray((10, 0, 0, 0)), *new)
    for target in (1, 2):
        cache = cache.forked(0, target)
        plain.held[target] = plain.held[0]
    cache = cache.forked(0, 3, length=8)
    plain.held[3] = [x[:8] for x in plain.held[0]]
    used = int(jnp.sum(cache.table.references > 0))
    assert used == 3
    for counts in [(1, 2, 0, 3), (2, 1, 1, 1)]:
        new = plain.tokens()
        plain.append(counts, new)
        cache, out, _ = step(cache, jnp.asarray(counts), *new)
        close(out[: sum(counts)], plain.expected(counts, ())[0], "float32")
    cache = cache.freed(jnp.asarray([True, False, False, True]))
    new = plain.tokens()
    plain.held[0] = [x[:0] for x in plain.held[0]]
    plain.append((4, 1, 1, 0), new)
    cache, out, _ = step(cache, jnp.asarray((4, 1, 1, 0)), *new)
    close(out[:6], plain.expected((4, 1, 1, 0), ())[0], "float32")


@pytest.mark.parametrize("operations", [60, pytest.param(10_000, marks=pytest.mark.full)])
def test_random_operations(operations):
    """Appends, forks and frees; every output is what the sequence alone would give."""
    rng, plain, cache = np.random.default_rng(5), Plain(seed=7), empty()
    fork, free = jax.jit(PagedCache.forked), jax.jit(PagedCache.freed)
    for _ in range(operations):
        lengths = [len(x[0]) for x in plain.held]
        kind = rng.choice(["append", "append", "append", "fork", "free"])
        filled = [b for b in range(B) if lengths[b]]
        vacant = [b for b in range(B) if not lengths[b]]
        if kind == "fork" and filled and vacant:
            source, target = rng.choice(filled), rng.choice(vacant)
            length = int(rng.integers(1, lengths[source] + 1))
            cache = fork(cache, jnp.int32(source), jnp.int32(target), length=jnp.int32(length))
            plain.held[target] = [x[:length] for x in plain.held[source]]
        elif kind == "free" or max(lengths) > LONGEST - 8:
            which = rng.random(B) < 0.5
            cache = free(cache, jnp.asarray(which))
            for b in np.flatnonzero(which):
                plain.held[b] = [x[:0] for x in plain.held[b]]
        else:
            counts = rng.integers(0, 8, B) * (rng.random(B) < 0.7)
            counts = np.where(np.asarray(lengths) + counts > LONGEST, 0, counts)
            if not bool(cache.table.fits(jnp.asarray(counts)).all()):
                continue
            new = plain.tokens()
            plain.append(counts, new)
            cache, out, _ = step(cache, jnp.asarray(counts), *new)
            if counts.sum():
                close(out[: counts.sum()], plain.expected(counts, ())[0], "float32")
        assert cache.length.tolist() == [len(x[0]) for x in plain.held]
        in_use = int(jnp.sum(cache.table.references > 0))
        assert in_use + int(cache.table.count) == P


X, V = jnp.zeros((TOTAL, K, D)), jnp.zeros((TOTAL, K, E))
Q = jnp.zeros((TOTAL, N, D))
WRONG = {
    "key": (
        lambda c, b: c.write(b, X[:3], V),
        "`key` must be [T, K, …] = [32, 2, 16]; got (3, 2, 16).",
    ),
    "type": (
        lambda c, b: c.write(b, X.astype(jnp.bfloat16), V),
        "`key` must be of the cache's type float32; got bfloat16. Cast it.",
    ),
    "query": (
        lambda c, b: c.attend(Q[:4], b),
        "`query` must be [T, N, D] with T = 32; got (4, 4, 16).",
    ),
    "heads": (
        lambda c, b: c.attend(Q[:, :3], b),
        "`query` must be [tokens, N, 16] with N a multiple of the cache's 2 key heads; "
        "got (32, 3, 16).",
    ),
    "bound": (
        lambda c, b: c.attend(Q, b, shift="bound"),
        "`shift` must be another than 'bound' in a cache; got 'bound'. Its bounds would be read "
        "from all keys at every step.",
    ),
    "option": (
        lambda c, b: c.attend(Q, b, mask=None),
        "`options` must be among scale, local_window_size, logits_soft_cap, sinks, shift, beta, "
        "precision, implementation, interpret; got mask.",
    ),
    "size": (
        lambda c, b: PagedCache.empty(1, 1, 1, 1, 0, 1, "float32"),
        "`kv_heads` must be a positive int; got 0.",
    ),
    "dtype": (
        lambda c, b: PagedCache.empty(1, 1, 1, 1, 1, 1, "int8"),
        "`dtype` must be one of float16, bfloat16, float32, float64; got int8.",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name):
    call, message = WRONG[name]
    cache, batch = empty().grown(jnp.asarray((3, 0, 1, 0)), total=TOTAL)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call(cache, batch)
    assert str(error.value) == message
