"""The kernels over pages against the lax walk: ragged chunks and single tokens in one row."""

import importlib
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import tpu_pages
from pallas_kernels._pages import Sight
from pasa_jax import Schedule
from pasa_jax.call import checks
from pasa_jax.call.page_backends import BACKENDS
from pasa_jax.core.errors import BackendUnsupported
from pasa_jax.core.pages import Pages
from pasa_jax.core.plan import Plan
from pasa_jax.implementations import page_walk
from pasa_jax.implementations.page_walk import Call, Queries, Sequences
from pasa_jax.plugins.cache import KVCache
from pasa_jax.serving import PagedCache
from tests.pallas_kernels.test_aot import named
from tests.thin import some_tuples

TARGETS = {"tpu": "tpu_v6e", "gpu": "h100"}
CALLS = {"tpu": "tpu_custom_call", "gpu": "__gpu$xla.gpu.triton"}
PLATFORMS = {"tpu": "tpu", "gpu": "cuda"}
SCALE = 0.125
# Queries and keys of each sequence: a token, nothing, a chunk, a whole prompt.
COUNTS, LENGTHS = (1, 0, 11, 5), (70, 0, 41, 5)
BOUND = {"float32": 2e-6, "float16": 4e-3, "bfloat16": 2e-2}


@partial(jax.jit, static_argnums=4)
def filled(page, slot, k, v, sizes):
    """Pages with NaN in every slot but these."""
    (count, n, dtype), nan = sizes, jnp.full((), jnp.nan, sizes[2])
    pages = Pages.empty(count, k.shape[1], n, k.shape[2], v.shape[2], dtype)
    nan = nan.view(pages.key.dtype)
    pages = replace(pages, key=jnp.full_like(pages.key, nan), value=jnp.full_like(pages.value, nan))
    return pages.written(page, slot, k.astype(dtype), v.astype(dtype))


def call_of(
    dtype="float32",
    *,
    n=16,
    kv_heads=2,
    groups=1,
    size=32,
    value_size=24,
    counts=COUNTS,
    lengths=LENGTHS,
    most=None,
    window=None,
    sinks=False,
    order=0,
    huge=1.0,
):
    """A call over pages that hold NaN wherever nothing was written.

    Arguments:
      order: the seed of the order of the pages; their keys are the same.
      huge: what queries and keys are multiplied by.
    """
    rng, blocks = np.random.default_rng(1), -(-max(lengths) // n) + 1
    count = len(counts) * blocks + 3
    shuffled = np.random.default_rng(order).permutation(count).astype(np.int32)
    table = np.full((len(counts), blocks), -1, np.int32)
    for b, length in enumerate(lengths):
        used = -(-length // n)
        table[b, :used] = shuffled[b * blocks : b * blocks + used]
    at = np.concatenate([np.arange(x) for x in lengths])
    page = table[np.repeat(np.arange(len(counts)), lengths), at // n]
    k, v = (
        rng.standard_normal((len(at), kv_heads, x)) * y for x, y in ((size, huge), (value_size, 1))
    )
    pages = filled(page, at % n, k.astype(np.float32), v.astype(np.float32), (count, n, dtype))
    tokens, heads = sum(counts) + 2, kv_heads * groups
    q = np.full((tokens, heads, size), np.nan)
    q[:-2] = rng.standard_normal((tokens - 2, heads, size)) * huge
    first = np.cumsum(counts) - counts
    sequences = Sequences(*(jnp.asarray(x, jnp.int32) for x in (first, counts, lengths, table)))
    of_sinks = jnp.asarray(rng.standard_normal(heads), jnp.float32) if sinks else None
    queries = Queries(jnp.asarray(q, dtype), of_sinks, jnp.float32(SCALE))
    return Call(pages, queries, sequences, most or tokens, window)


def plan_of(kind, dtype="float32", *, block_kv=32, shift="auto", cap=None, interpret=True):
    schedule = Schedule(block_q=16, block_kv=block_kv, target=TARGETS[kind])
    plan = Plan(
        shift=shift,
        precision=checks.precision(None, dtype, shift, schedule.target),
        logits_soft_cap=cap,
        schedule=schedule,
        scale=SCALE,
        interpret=interpret,
    )
    return BACKENDS[f"pallas_{kind}"].adapt(plan)


@partial(jax.jit, static_argnums=(3, 4, 5))
def walked(pages, queries, sequences, most, window, plan):
    return page_walk.attend(pages, queries, sequences, most, window, plan)


@partial(jax.jit, static_argnums=(0, 4, 5, 6))
def by_kernel(kind, pages, queries, sequences, most, window, plan):
    module = importlib.import_module(f"pallas_kernels.{kind}_pages")
    return module.kernel(Call(pages, queries, sequences, most, window), plan)


def computed(kind, call, plan):
    """What the kernel alone gives."""
    assert BACKENDS[f"pallas_{kind}"].supports(call, plan) is None
    return by_kernel(kind, *call, plan)


def compare(kind, call, plan):
    found, true = computed(kind, call, plan), walked(*call, plan)
    for a, b in zip(found, true, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        seen = b > np.finfo(np.float32).min
        np.testing.assert_array_equal(a > np.finfo(np.float32).min, seen)
        bound = BOUND[call.pages.dtype] * np.abs(b[seen]).max()
        assert np.abs(a - b)[seen].max() <= bound
    assert not np.any(np.asarray(found.out)[-2:])  # padding


WINDOW = {"window": (20, 0)}
CASES = [
    ("bfloat16", {"groups": 4, "sinks": True, **WINDOW}, {}),
    ("float32", {"groups": 8, "n": 64, "lengths": (130, 0, 90, 5)}, {"block_kv": 128, "cap": 3.0}),
    ("float16", {}, {"shift": "mean"}),
    ("bfloat16", {}, {}),
    ("float16", {"groups": 4, **WINDOW}, {"cap": 2.0}),
    ("float32", {"sinks": True, "value_size": 40}, {"shift": "none"}),
    ("bfloat16", {"kv_heads": 3, "groups": 2}, {"shift": "mean_past"}),
    ("bfloat16", {"n": 64, "lengths": (200, 0, 90, 5), **WINDOW}, {"shift": "mean"}),
    ("float32", {"window": (0, 0)}, {"block_kv": 16}),
    ("float32", {"kv_heads": 16, "size": 16}, {"block_kv": 64}),
]


@pytest.mark.usefixtures("tpu_interpreter")
class TestTpu:
    @pytest.mark.parametrize(("dtype", "given", "options"), some_tuples(CASES, len(CASES)))
    def test_chunks_and_single_tokens(self, dtype, given, options):
        compare("tpu", call_of(dtype, **given), plan_of("tpu", dtype, **options))

    def test_decode_in_any_order_of_pages_gives_the_same_bits(self):
        given = {"counts": (1, 1, 0), "lengths": (50, 33, 0), "most": 1, "sinks": True}
        calls = [call_of("bfloat16", order=x, **given) for x in (0, 1)]
        plan = plan_of("tpu", "bfloat16")
        compare("tpu", calls[0], plan)
        found = [computed("tpu", call, plan) for call in calls]
        for a, b in zip(*found, strict=True):
            np.testing.assert_array_equal(a, b)


class TestGpu:
    @pytest.mark.parametrize(("dtype", "given", "options"), some_tuples(CASES, len(CASES)))
    def test_chunks_and_single_tokens(self, dtype, given, options):
        compare("gpu", call_of(dtype, **given), plan_of("gpu", dtype, **options))

    @pytest.mark.full
    def test_any_order_of_pages_gives_the_same_bits(self):
        calls, plan = [call_of("float16", order=x) for x in (0, 1)], plan_of("gpu", "float16")
        found = [computed("gpu", call, plan) for call in calls]
        for a, b in zip(*found, strict=True):
            np.testing.assert_array_equal(a, b)

    @pytest.mark.full
    @pytest.mark.parametrize("n", [4, 24, 64])
    def test_pages_of_any_size(self, n):
        compare("gpu", call_of(n=n, groups=3), plan_of("gpu"))


@pytest.mark.full
def test_huge_numbers_are_computed_by_the_lax_walk(kernel):
    call, plan = call_of(huge=1e19), plan_of(kernel.removeprefix("pallas_"))
    found = BACKENDS[kernel].run(call, plan, anywhere=False)
    for a, b in zip(found, walked(*call, plan), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert np.isfinite(np.asarray(found.out)).all()


@pytest.mark.full
def test_tokens_that_did_not_fit_spoil_their_own_sequence(kernel):
    schedule = Schedule(block_q=16, block_kv=16, target=TARGETS[kernel.removeprefix("pallas_")])
    cache = KVCache.empty(2, 32, 2, 16, "float32", schedule=schedule)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 40, 2, 16)), jnp.float32)

    @partial(jax.jit, static_argnames=("implementation", "interpret"))
    def step(cache, x, lengths, **options):
        cache = cache.append(x, x, lengths=lengths)
        return cache, cache.attend(x, lengths=lengths, **options)

    cache, _ = step(cache, x[:, :30], jnp.asarray([30, 7]), implementation="lax")
    _, out = step(cache, x[:, 30:], jnp.asarray([10, 10]), implementation="lax")
    _, found = partial(step, implementation=kernel, interpret=True)(
        cache, x[:, 30:], jnp.asarray([10, 10])
    )
    assert np.isnan(np.asarray(found[0])).all()
    np.testing.assert_allclose(found[1], out[1], atol=1e-5)


@pytest.mark.full
def test_a_page_that_is_not_seen_is_not_fetched():
    """Every block stays where it is until a page that is seen comes."""
    rng, (tiles, steps, pages) = np.random.default_rng(0), (5, 3, 4)
    specs = tpu_pages.Specs(1, 1, 1, pages, 1, steps, 1, 0)
    choose = jax.jit(partial(tpu_pages.fetched, specs=specs))
    for _ in range(50):
        first = rng.integers(0, steps * pages, tiles)
        last = np.maximum(first, rng.integers(0, steps * pages + 1, tiles))
        lo, hi = first // pages, np.where(last > first, -(-last // pages), first // pages)
        table = rng.integers(0, 1000, (tiles, steps, pages)).astype(np.int32)
        none = np.zeros(tiles, np.int32)
        sight = [jnp.asarray(x) for x in (none, none, none, lo, none, none, hi, first, last)]
        found = np.asarray(choose(jnp.asarray(table), Sight(*sight)))
        for p in range(pages):
            held = None
            for i, t in np.ndindex(tiles, steps):
                block = (lo[i] + t) * pages + p
                if first[i] <= block < last[i]:
                    held = table[i].reshape(-1)[block]
                if held is not None:
                    assert found[i, t, p] == held


class TestChoice:
    def cache(self, target="tpu_v6e", page=16, dtype="bfloat16"):
        schedule = Schedule(block_q=16, block_kv=32, target=target)
        cache = PagedCache.empty(2, 8, page, 4 * page, 2, 32, dtype, schedule=schedule)
        return cache.grown(jnp.asarray((3, 1)), total=4)

    def query(self, dtype="bfloat16"):
        return jnp.ones((4, 4, 32), dtype)

    def lowered(self, platform, target="tpu_v6e", **options):
        cache, batch = self.cache(target)
        with named(platform):
            traced = jax.jit(lambda q: cache.attend(q, batch, **options)).trace(self.query())
            return traced.lower(lowering_platforms=(platform,)).as_text()

    @pytest.mark.parametrize("kind", TARGETS)
    @pytest.mark.parametrize("platform", ["tpu", "cuda", "cpu"])
    def test_none_takes_the_kernel_where_the_program_is_for_its_chip(self, kind, platform):
        text = self.lowered(platform, TARGETS[kind])
        assert (CALLS[kind] in text) == (platform == PLATFORMS[kind])

    @pytest.mark.parametrize(
        "options",
        [
            {"local_window_size": (8, 0), "sinks": np.zeros(4, np.float32)},
            {"shift": "mean", "logits_soft_cap": 3.0},
        ],
    )
    @pytest.mark.parametrize("kind", TARGETS)
    def test_options_are_lowered(self, kind, options):
        options = {"implementation": f"pallas_{kind}", **options}
        assert CALLS[kind] in self.lowered(PLATFORMS[kind], TARGETS[kind], **options)

    def test_lax_by_name(self):
        assert "tpu_custom_call" not in self.lowered("tpu", implementation="lax")

    @pytest.mark.parametrize(
        ("given", "options", "reason"),
        [
            ({"target": "cpu"}, {}, "its schedule would have to be for a TPU, and is for cpu"),
            ({"page": 8}, {}, "a page of bfloat16 must have a multiple of 16 tokens, and has 8"),
            ({}, {"precision": "float16"}, "Mosaic has no float16"),
            ({}, {"shift": "paper"}, "it does not mix keys by the matrix of 'paper'"),
        ],
    )
    def test_what_it_cannot_do(self, given, options, reason):
        cache, batch = self.cache(**given)
        with pytest.raises(BackendUnsupported, match=reason):
            cache.attend(self.query(), batch, implementation="pallas_tpu", **options)

    def test_interpret_is_for_kernels(self):
        cache, batch = self.cache()
        with pytest.raises(ValueError, match="`interpret` must be False unless"):
            cache.attend(self.query(), batch, implementation="lax", interpret=True)
        with pytest.raises(ValueError, match="`implementation` must be one of"):
            cache.attend(self.query(), batch, implementation="xla")
