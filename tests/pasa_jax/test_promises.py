"""Finite inputs give finite outputs; what a query does not see never reaches it."""

from dataclasses import replace
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax import Schedule, dot_product_attention
from pasa_jax.evidence.accuracy import HARD_CASES, measure
from pasa_jax.evidence.plain import float64_attention, plain_attention
from tests.cases import CASES, TILES, exact, visible
from tests.thin import some, some_tuples

pytestmark = pytest.mark.usefixtures("optimized")
GUARDED = ("auto", "mean", "mean_past", "reference", "paper")
BEHIND = replace(TILES, target="ascend_910b")


def extremes(dtype, kind, seed=0):
    """Arrays at the edge of ``dtype``."""
    rng = np.random.default_rng(seed)
    top = float(jnp.finfo(dtype).max)
    shape = (1, 40, 2, 8)

    def array(i):
        if kind == "all largest":
            return np.full(shape, top)
        if kind == "signs":
            return top * rng.choice([-1.0, 1.0], shape)
        if kind == "alternating keys":
            return top * (-1.0) ** np.arange(40)[None, :, None, None] * np.ones(shape)
        if kind == "one spike":
            x = rng.standard_normal(shape)
            x[0, 7 + i, :, 3] = -top
            return x
        return top * 2.0 ** rng.uniform(-60, 0, shape) * rng.choice([-1, 1], shape)

    return [jnp.asarray(array(i), dtype) for i in range(3)]


@pytest.mark.parametrize("schedule", [TILES, BEHIND])
@pytest.mark.parametrize(
    ("dtype", "shift"), some_tuples(product(["float16", "bfloat16", "float32"], GUARDED))
)
def test_finite_in_finite_out(dtype, shift, schedule):
    attend = jax.jit(
        lambda q, k, v: dot_product_attention(
            q, k, v, shift=shift, schedule=schedule, return_residual=True
        )
    )
    for kind in ("all largest", "signs", "alternating keys", "one spike", "any size"):
        q, k, v = extremes(dtype, kind)
        out, lse = attend(q, k, v)
        assert np.all(np.isfinite(np.asarray(out, np.float64))), kind
        assert np.all(np.isfinite(np.asarray(lse))), kind
        top = np.abs(np.asarray(v, np.float64)).max()
        assert np.abs(np.asarray(out, np.float64)).max() <= top * 1.01, kind
        if kind == "all largest":
            np.testing.assert_allclose(np.asarray(out, np.float64), top, rtol=1e-2)


def test_plain_storage_fails_where_ours_does_not():
    """The promise is not vacuous: the same inputs break the formula as it is usually written."""
    q, k, v = extremes("float16", "signs")
    plain = plain_attention(q, k, v, scores="float16", prescaled=True)
    none = dot_product_attention(q, k, v, shift="none", schedule=TILES)
    assert not np.all(np.isfinite(plain))
    assert not np.all(np.isfinite(none))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", HARD_CASES, ids=lambda c: c.title)
def test_hard_cases_within_three_times_float32_scores(case, dtype):
    q, k, v = case.draw(2, 384, 64, dtype)
    true = float64_attention(q, k, v)
    schedule = Schedule(block_q=128, block_kv=128)
    wide = dot_product_attention(q, k, v, precision="float32", shift="none", schedule=schedule)
    ours = dot_product_attention(q, k, v, schedule=schedule)
    found, reference = measure(ours, true), measure(wide, true)
    assert found.non_finite == 0
    assert found.plain <= 3 * reference.plain


@pytest.mark.parametrize("dtype", some(["float16", "bfloat16"]))
@pytest.mark.parametrize("offset", some([20.0, 0.0]))
def test_accuracy_rule(dtype, offset):
    """Error ≤ 2 × that of the plain formula in the same type, whatever the bias of K and V."""
    rng = np.random.default_rng(1)
    q, k, v = (
        jnp.asarray(offset * (i < 2) + rng.standard_normal((1, 300, 4, 64)), dtype)
        for i in range(3)
    )
    true = float64_attention(q, k, v)
    plain = measure(plain_attention(q, k, v, scores=dtype, prescaled=True), true).plain
    wide = measure(dot_product_attention(q, k, v, precision="float32", shift="none"), true).plain
    for schedule in (TILES, BEHIND):
        ours = measure(dot_product_attention(q, k, v, schedule=schedule), true).plain
        assert ours <= 1.2 * plain
    # Rounding the probabilities to 16 bits is what is left of the difference.
    assert measure(dot_product_attention(q, k, v), true).plain <= 2.2 * wide


# Hidden keys.

HIDING = {
    "key lengths": {"key_value_seq_lengths": np.asarray([20, 33], np.int32)},
    "causal": {"is_causal": True},
    "causal from the end": {"is_causal": True, "causal_alignment": "bottom_right"},
    "mask of keys": {"mask": np.arange(50)[None, None, None] % 3 > 0},
    "mask of pairs": {"mask": np.random.default_rng(5).random((2, 1, 40, 50)) > 0.6},
}


def spoil(x, hidden, rubbish):
    """x [B, S, K, D] with ``rubbish`` where hidden [B, S]."""
    return jnp.where(hidden[:, :, None, None], jnp.asarray(rubbish, x.dtype), x)


@pytest.mark.parametrize(
    ("implementation", "shift"),
    some_tuples(
        [
            ("lax", "auto"),
            ("reference", "auto"),
            *(("lax", s) for s in ("mean", "mean_past", "paper")),
        ],
        2,
    ),
)
@pytest.mark.parametrize("name", some(["key lengths", "mask of keys"]))
def test_keys_hidden_from_all_never_matter(name, implementation, shift):
    """Bitwise, in outputs and gradients, whatever stands there."""
    arrays = CASES["full"].arrays("float16")
    keywords = {k: jnp.asarray(v) for k, v in HIDING[name].items()}
    hidden = np.broadcast_to(~visible(2, 40, 50, keywords, keywords).any(axis=(1, 2)), (2, 50))
    options = {"schedule": TILES, "shift": shift, "implementation": implementation}

    @jax.jit
    def call(arrays):
        def loss(arrays):
            out = dot_product_attention(**arrays, **keywords, **options)
            return jnp.sum(out.astype(jnp.float32)), out

        (_, out), grads = jax.value_and_grad(loss, has_aux=True)(arrays)
        return out, grads

    clean = jax.tree.leaves(call(arrays))
    for rubbish in (np.nan, np.inf, -np.inf, 6e4):
        spoilt = {
            "query": arrays["query"],
            "key": spoil(arrays["key"], hidden, rubbish),
            "value": spoil(arrays["value"], hidden, rubbish),
        }
        for a, b in zip(clean, jax.tree.leaves(call(spoilt)), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("rubbish", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["key", "value"])
@pytest.mark.parametrize("implementation", ["lax", "reference"])
@pytest.mark.parametrize("name", ["causal", "causal from the end", "mask of pairs"])
def test_rows_that_do_not_see_a_bad_key_are_untouched(name, implementation, where, rubbish):
    """And the rows that do see it are NaN, on every implementation the same."""
    arrays = CASES["full"].arrays("float16")
    keywords = {k: jnp.asarray(v) if k == "mask" else v for k, v in HIDING[name].items()}
    bad = 17
    spoilt = dict(arrays)
    spoilt[where] = arrays[where].at[:, bad].set(rubbish)
    options = {"implementation": implementation}
    if implementation == "lax":
        options["schedule"] = TILES
    clean = dot_product_attention(**arrays, **keywords, **options)
    found = dot_product_attention(**spoilt, **keywords, **options)
    sees = np.broadcast_to(visible(2, 40, 50, keywords, keywords), (2, 4, 40, 50))[..., bad]
    sees = np.swapaxes(sees, 1, 2)
    assert 0 < sees.mean() < 1
    np.testing.assert_array_equal(np.asarray(found)[~sees], np.asarray(clean)[~sees])
    assert np.all(np.isnan(np.asarray(found)[sees]))


def test_padding_queries_never_matter():
    arrays = CASES["full"].arrays("float16")
    lengths = jnp.asarray([10, 40], jnp.int32)
    padding = np.arange(40)[None] >= np.asarray(lengths)[:, None]
    spoilt = {**arrays, "query": spoil(arrays["query"], padding, np.nan)}

    def loss(arrays):
        out = dot_product_attention(**arrays, query_seq_lengths=lengths, schedule=TILES)
        return jnp.sum(out.astype(jnp.float32))

    for name in ("key", "value"):
        np.testing.assert_array_equal(jax.grad(loss)(arrays)[name], jax.grad(loss)(spoilt)[name])


@pytest.mark.parametrize("shift", ["auto", "reference", "mean_past"])
def test_past_outputs_do_not_depend_on_future_keys(shift):
    """Bitwise, though the future keys are a hundred times larger (docs/algorithm.md, eq. 8)."""
    arrays = CASES["biased"].arrays("float16")
    cut = 23
    later = np.arange(50) >= cut
    changed = dict(arrays)
    for name in ("key", "value"):
        x = arrays[name]
        changed[name] = jnp.where(later[None, :, None, None], x * jnp.float16(100), x)

    def call(arrays):
        return dot_product_attention(**arrays, is_causal=True, shift=shift, schedule=TILES)

    before, after = np.asarray(call(arrays)), np.asarray(call(changed))
    np.testing.assert_array_equal(before[:, :cut], after[:, :cut])
    assert not np.array_equal(before[:, cut:], after[:, cut:])


@pytest.mark.full
def test_a_row_of_padding_has_zero_output_in_every_shift():
    case = CASES["no key at all"]
    for shift in GUARDED:
        out = dot_product_attention(
            **case.arrays("float16"), **case.keywords, shift=shift, schedule=TILES
        )
        assert np.all(np.asarray(out[0]) == 0)
        true, _ = exact(case.arrays("float16"), case.keywords)
        np.testing.assert_allclose(np.asarray(out[1], np.float64), true[1], atol=2e-2)
