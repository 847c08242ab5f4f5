"""The shift "bound": what is proved of the scores, and what follows from it."""

from dataclasses import replace
from functools import cache, partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax import REASONS, SHIFTS, Precision, Schedule, dot_product_attention, explain
from pasa_jax.call.api import canonical
from pasa_jax.core.bound import bound_of
from pasa_jax.core.errors import BackendUnsupported
from pasa_jax.core.heads import heads_at_once
from pasa_jax.evidence.accuracy import HARD_CASES, measure
from pasa_jax.evidence.plain import float64_attention
from pasa_jax.implementations.head_walk import HeadWalk
from pasa_jax.plugins import KVCache
from tests.cases import CASES, TILES, visible
from tests.gallery import GALLERY, check_by_name
from tests.pasa_jax.test_contract import BOUND, check
from tests.pasa_jax.test_gradients import float64_gradients, loss_of, relative
from tests.pasa_jax.test_promises import extremes
from tests.thin import only, some, some_tuples

RAISED = 60  # C of docs/algorithm.md, eq. 22


@pytest.mark.parametrize("name", some(CASES, 15, 4))
def test_in_float32(name):
    check(CASES[name], "float32", BOUND["float32"], shift="bound", schedule=TILES)


@pytest.mark.parametrize(
    ("name", "dtype"), some_tuples(product(CASES, ["float16", "bfloat16"]), 27, 13)
)
def test_in_16_bits(name, dtype):
    check(CASES[name], dtype, BOUND[dtype], shift="bound", schedule=TILES)


@cache
def of_head(name):
    """The bound of one head of a case, as a compiled function of its operands and mask."""
    plan = canonical(**CASES[name].arrays("float32"), shift="bound", schedule=TILES).plan
    plan = replace(plan, logits_soft_cap=CASES[name].keywords.get("logits_soft_cap"))
    return jax.jit(lambda operands, mask: HeadWalk.of(operands, mask, plan).facts.bound)


def bounds(name, arrays):
    """m [B, T, N] and gap [B, N] of every head."""
    case = CASES[name]
    call = canonical(**arrays, **case.keywords, schedule=TILES, shift="bound")
    groups = case.n // case.k
    heads = [
        [
            of_head(name)(call.operands.head(b, h), call.mask.head(b, h, groups))
            for h in range(case.k)
        ]
        for b in range(case.b)
    ]
    m = np.stack([np.concatenate([x.reference for x in row], axis=1) for row in heads])
    gap = np.stack([np.concatenate([x.gap for x in row]) for row in heads])
    return np.asarray(m, np.float64) + RAISED * np.log(2), gap


def true_scores(case, arrays):
    """[B, N, T, S] in float64, −∞ where a query does not see."""
    q, k = (np.asarray(arrays[x], np.float64) for x in ("query", "key"))
    k = np.repeat(k, case.n // case.k, axis=2)
    scale = case.keywords.get("scale", case.d**-0.5)
    s = np.einsum("btnd,bsnd->bnts", q, k) * scale
    cap = case.keywords.get("logits_soft_cap")
    s = s if cap is None else cap * np.tanh(s / cap)
    s = s + np.asarray(arrays.get("bias", 0.0), np.float64)
    seen = visible(case.b, case.t, case.s, arrays, {**case.keywords, **arrays})
    return np.where(np.broadcast_to(seen, s.shape), s, -np.inf)


KINDS = {
    "plain": lambda x, rng: x,
    "far from zero": lambda x, rng: x + 300.0,
    "one far key": lambda x, rng: np.where(np.arange(x.shape[1])[:, None, None] == 7, 50.0 * x, x),
    "equal": lambda x, rng: np.broadcast_to(x[:, :1], x.shape),
    "two heaps": lambda x, rng: x * 0.1 + 20.0 * rng.choice([-1, 1], x.shape[:3])[..., None],
    "zeros": lambda x, rng: 0.0 * x,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name",
    only(
        ("mask", "segments, causal"),
        [
            *("causal, more keys", "mask", "bias of rows", "segments, causal", "full", "window"),
            *("soft cap, causal, biased", "negative scale", "no key at all"),
        ],
    ),
)
def test_the_maximum_of_a_row_lies_between_its_bounds(name, kind):
    case, rng = CASES[name], np.random.default_rng(2)
    arrays = case.arrays("float32")
    arrays["key"] = jnp.asarray(KINDS[kind](np.asarray(arrays["key"]), rng), jnp.float32)
    m, gap = bounds(name, arrays)
    top = np.swapaxes(true_scores(case, arrays).max(-1), 1, 2)  # [B, T, N]
    some_seen = np.isfinite(top)
    rounding = 1e-6 * (RAISED + np.abs(top[some_seen]))  # of the reference as it is stored
    assert np.all(m[some_seen] >= top[some_seen] - rounding)
    above = np.where(some_seen, m - top, 0).max(axis=1) / np.log(2)
    assert np.all(gap >= above - 1e-3)


BY_DATA = ("positions", "blocks of segments", "low rank", "document", "prefix lm", "jagged")


@pytest.mark.parametrize("name", only(("low rank",), BY_DATA))
def test_the_bounds_know_positions_blocks_functions_and_factors(name):
    example = GALLERY[name]()
    arrays = example.arrays("float32")
    call = canonical(**arrays, **example.keywords, schedule=TILES, shift="bound")
    m, gap, proved = jax.jit(partial(of_call, call.plan))(call.operands, call.mask)
    q, k = (np.asarray(arrays[x], np.float64) for x in ("query", "key"))
    k = np.repeat(k, example.n // example.k, axis=2)
    s = np.einsum("btnd,bsnd->bnts", q, k) * example.d**-0.5 + example.bias
    top = np.where(np.broadcast_to(example.seen, s.shape), s, -np.inf).max(-1)
    top, some_seen = np.swapaxes(top, 1, 2), np.isfinite(top).swapaxes(1, 2)
    rounding = 1e-6 * (RAISED + np.abs(top[some_seen]))
    assert np.all(m[some_seen] >= top[some_seen] - rounding)
    above = np.where(some_seen, m - np.where(some_seen, top, 0), 0).max(axis=1) / np.log(2)
    assert np.all(gap >= above - 1e-3)
    # Nothing says of a row of `jagged` beyond its length that it sees nothing.
    assert np.all(proved) == (name != "jagged")
    check_by_name(name, "float32", shift="bound", schedule=TILES, implementation="lax")


def of_call(plan, operands, mask):
    """m [B, T, N] without C, gap [B, N] and proved [B, K] of a call."""
    batch, _, heads, _ = operands.query.shape
    groups = heads // operands.key.shape[2]

    def of_head(b, h):
        return HeadWalk.of(operands.head(b, h), mask.head(b, h, groups), plan).facts.bound

    each = heads_at_once(of_head, batch, operands.key.shape[2])
    m = jnp.moveaxis(each.reference, 1, 2).reshape(batch, -1, heads)
    return m + RAISED * jnp.log(2), each.gap.reshape(batch, heads), each.proved


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_finite_in_finite_out(dtype):
    call = jax.jit(
        lambda q, k, v: dot_product_attention(
            q, k, v, shift="bound", schedule=TILES, return_residual=True
        )
    )
    for kind in ("all largest", "signs", "alternating keys", "one spike", "any size"):
        out, lse = call(*extremes(dtype, kind))
        assert np.all(np.isfinite(np.asarray(out, np.float64))), kind
        assert np.all(np.isfinite(lse)), kind


def test_padding_and_hidden_keys_do_not_matter():
    """Bitwise, whatever stands there."""
    arrays = CASES["full"].arrays("float16")
    lengths = {"query": [10, 40], "key": [20, 33], "value": [20, 33]}

    @jax.jit
    def call(arrays):
        return dot_product_attention(
            **arrays,
            query_seq_lengths=jnp.asarray(lengths["query"]),
            key_value_seq_lengths=jnp.asarray(lengths["key"]),
            shift="bound",
            schedule=TILES,
        )

    spoilt = {}
    for name, length in lengths.items():
        beyond = np.arange(arrays[name].shape[1]) >= np.asarray(length)[:, None]
        spoilt[name] = jnp.where(beyond[..., None, None], jnp.float16(np.nan), arrays[name])
    np.testing.assert_array_equal(call(arrays), call(spoilt))


def test_queries_and_keys_whose_squares_leave_float32():
    q, k, v = (np.random.default_rng(i).standard_normal((1, 24, 1, 8)) for i in range(3))
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (1e-30 * q, 1e30 * k, v))
    out, seen = dot_product_attention(
        q, k, v, shift="bound", schedule=TILES, return_statistics=True
    )
    assert SHIFTS[int(seen.shift[0, 0])] == "bound"
    np.testing.assert_allclose(out, float64_attention(q, k, v), atol=1e-6)


@pytest.mark.parametrize(
    "name", some(["mask", "sinks", "soft cap, causal, biased", "window"], 4, 2)
)
def test_gradients(name):
    case = CASES[name]
    arrays = case.arrays("float32")
    loss, operands = loss_of(case, arrays, implementation="lax", schedule=TILES, shift="bound")
    gradients = jax.jit(jax.grad(loss))(operands)
    for argument, true in float64_gradients(case, arrays).items():
        assert relative(gradients[argument], true) < 2e-5, argument


def test_weights_as_small_as_the_proof_allows_keep_their_digits():
    """Two heaps of keys in one block: the row's maximum lies 150 powers of two below its bound."""
    rng = np.random.default_rng(0)
    q = np.zeros((1, 4, 1, 8))
    q[..., 0], q[..., 1] = 1.0, rng.standard_normal((1, 4, 1))
    k = 0.1 * rng.standard_normal((1, 16, 1, 8))
    k[..., 2] = 240.0 * np.where(np.arange(16) % 2, 1, -1)[None, :, None]
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (q, k, rng.standard_normal((1, 16, 1, 8))))
    out, seen = dot_product_attention(
        q,
        k,
        v,
        shift="bound",
        schedule=Schedule(block_q=16, block_kv=16),
        return_statistics=True,
    )
    assert 120 < float(seen.gap[0, 0]) < 160
    assert SHIFTS[int(seen.shift[0, 0])] == "bound"
    true = float64_attention(q, k, v)
    np.testing.assert_allclose(out, true, atol=1e-6)


def test_each_key_head_is_decided_by_itself():
    q, k, v = (np.random.default_rng(i).standard_normal((1, 40, 2, 8)) for i in range(3))
    k[0, 20, 1] *= 4000  # a block of 16 keys with a radius of thousands
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
    out, seen = dot_product_attention(
        q, k, v, shift="bound", schedule=TILES, return_statistics=True
    )
    assert [SHIFTS[i] for i in np.asarray(seen.shift)[0]] == ["bound", "none"]
    reasons = [REASONS[i] for i in np.asarray(seen.reason)[0]]
    assert reasons == [
        "the bound on its scores is proved to be safe",
        "the bound on its scores is too wide",
    ]
    assert float(seen.gap[0, 0]) < 30 < 160 < float(seen.gap[0, 1])
    np.testing.assert_allclose(out, float64_attention(q, k, v), atol=1e-5)
    schedule = replace(TILES, batch_heads=True)
    again = dot_product_attention(q, k, v, shift="bound", schedule=schedule)
    np.testing.assert_allclose(again, out, atol=2e-6)
    told = explain(q, k, v, shift="bound")
    assert (told.shift, told.implementation) == ("bound or none", "lax")
    assert "proved" in told.reason


@pytest.mark.parametrize("case", some(HARD_CASES, 8, 1), ids=lambda c: c.title)
def test_hard_cases_are_as_exact_as_with_a_running_maximum(case):
    """The rounded output's error in bfloat16, over that of `reference`."""
    q, k, v = case.draw(2, 384, 64, "bfloat16")
    true = float64_attention(q, k, v)
    schedule = Schedule(block_q=128, block_kv=128)
    ours, reference = (
        measure(dot_product_attention(q, k, v, shift=shift, schedule=schedule), true)
        for shift in ("bound", "reference")
    )
    assert ours.non_finite == 0
    assert ours.plain <= 1.15 * reference.plain


X = jnp.ones((1, 8, 2, 16), jnp.float16)
REFUSED = {
    "scores": ({"precision": "float16"}, "store all but the probabilities in float32"),
    "weights": ({"precision": Precision(probabilities="float16")}, "those not in float16"),
    "exponential": ({"precision": Precision(exponential="float16")}, "far from 1"),
    "target": (
        {"schedule": replace(TILES, target="ascend_910b")},
        "be another than 'bound' where products are rounded",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_do(name):
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        dot_product_attention(X, X, X, shift="bound", **options)


def test_kernels_and_caches_say_that_they_have_none():
    schedule = Schedule.for_target("h100", dtype="float16", head_dim=16)
    options = {"shift": "bound", "implementation": "pallas_gpu", "schedule": schedule}
    with pytest.raises(BackendUnsupported, match="'bound' is on 'lax' and 'pallas_tpu' alone"):
        dot_product_attention(X, X, X, **options)
    cache = KVCache.empty(1, 8, 2, 16, "float16").append(X, X)
    with pytest.raises(ValueError, match="be another than 'bound' in a cache"):
        cache.attend(X, shift="bound")


def test_no_bound_is_claimed_where_a_number_is_not_one():
    x = jnp.ones((4, 1, 8))
    key = jnp.ones((16, 8))
    options = {"scale": 1.0, "shift": "bound", "schedule": TILES}
    call = canonical(x[None], key[None, :, None], key[None, :, None], **options)
    head, mask = call.operands.head(0, 0), call.mask.head(0, 0, 1)
    usable = jnp.ones(16, bool)

    @jax.jit
    def proved(q, k):
        return bound_of(head._replace(query=q, key=k), usable, mask, call.plan).proved

    assert bool(proved(x, key))
    assert not bool(proved(x * jnp.nan, key))
    assert not bool(proved(x * 1e30, key * 1e30))
    assert not bool(proved(x * 3.4e38, key))  # the inverse of which float32 flushes to zero


class TestScoresThatAreRounded:
    """On a target that rounds products S' is stored before the bound is taken off."""

    @staticmethod
    def attend(shift, mean=0.0, amplitude=1.0, **options):
        rng = np.random.default_rng(0)
        q, k, v = (
            jnp.asarray(rng.uniform(-1, 1, (1, n, heads, 64)) * a + m, jnp.bfloat16)
            for n, heads, m, a in (
                (100, 2, mean, amplitude),
                (300, 1, mean, amplitude),
                (300, 1, 0, 1),
            )
        )
        precision = Precision(scores="float16", probabilities="bfloat16")
        schedule = Schedule(block_q=128, block_kv=128, target="ascend_910b")
        if shift == "none":
            q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
            precision, schedule = Precision(), Schedule()
        return np.asarray(
            dot_product_attention(
                q, k, v, shift=shift, precision=precision, schedule=schedule,
                implementation="lax", **options,
            ),
            np.float64,
        )  # fmt: skip

    @pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=["full", "causal"])
    def test_it_is_as_accurate_as_a_maximum(self, options):
        exact, bound, mean = (self.attend(s, 1.0, **options) for s in ("none", "bound", "mean"))
        assert not np.array_equal(bound, mean)
        errors = [np.sqrt(np.mean((x - exact) ** 2)) for x in (bound, mean)]
        assert errors[0] <= 1.3 * errors[1]

    @pytest.mark.parametrize(("mean", "amplitude"), [(30.0, 3.0), (0.0, 40.0)])
    def test_without_a_proof_it_is_mean(self, mean, amplitude):
        """Where a gap is too wide, or S' may leave float16."""
        bound, by_mean = (self.attend(s, mean, amplitude) for s in ("bound", "mean"))
        np.testing.assert_array_equal(bound, by_mean)
