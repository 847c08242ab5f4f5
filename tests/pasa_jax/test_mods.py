"""Functions, positions, block masks and biases of low rank, on the lax walk and the reference."""

from dataclasses import replace
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax import (
    LowRankBias,
    Schedule,
    alibi_slopes,
    and_masks,
    create_block_mask,
    dot_product_attention,
    explain,
    merge,
    or_masks,
    partial_attention,
)
from tests import gallery
from tests.cases import TILES
from tests.gallery import BOUNDS, GALLERY, QUICKLY, Example, check, check_by_name
from tests.thin import only, some, some_tuples

jitted = partial(jax.jit, compiler_options=QUICKLY)
OFTEN = ("t5", "blocks of segments", "low rank")  # of which the gradients are looked at
LIKE = (
    "causal",
    "sliding window",
    "dilated",
    "soft cap",
    "alibi",
    "jagged",
)  # others of the gallery do the same


@pytest.mark.parametrize("name", only([x for x in GALLERY if x not in (*OFTEN, *LIKE)], GALLERY))
def test_lax(name):
    check_by_name(name, "float32", gradients=False, implementation="lax")


@pytest.mark.parametrize("name", only(OFTEN, GALLERY))
def test_gradients_on_lax(name):
    check_by_name(name, "float32", implementation="lax")


@pytest.mark.parametrize("name", some(GALLERY, 5, 3))
def test_reference(name):
    check_by_name(name, "float32", implementation="reference")


@pytest.mark.parametrize(
    ("name", "dtype"), some_tuples(product(GALLERY, ["float16", "bfloat16"]), 32, 12)
)
def test_in_16_bits(name, dtype):
    check_by_name(name, dtype, implementation="lax")


# Beside other arguments.


def conditions() -> Example:
    """All that hide keys at once; windows of the image of which rows are padding."""
    plain = GALLERY["neighbourhood"]()
    t = plain.t
    i, j = np.arange(t)[:, None], np.arange(t)[None]
    queries, keys = np.asarray([55, 70], np.int32), np.asarray([70, 61], np.int32)
    ids = np.repeat([[0, 1], [4, 3]], [31, 39], axis=1).astype(np.int32)
    array = np.random.default_rng(0).random((2, 1, t, t)) > 0.2
    seen = np.asarray(plain.seen) & (j <= i) & array
    seen = seen & (i < queries[:, None, None, None]) & (j < keys[:, None, None, None])
    return replace(
        plain,
        keywords={
            "mask_mod": gallery.neighbour_mod,
            "is_causal": True,
            "query_seq_lengths": queries,
            "key_value_seq_lengths": keys,
            "segment_ids": ids,
            "mask": jnp.asarray(array),
        },
        seen=seen & (ids[:, None, :, None] == ids[:, None, None]),
    )


def scores() -> Example:
    """All that change scores at once."""
    alibi = GALLERY["alibi"]()
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((alibi.t, 3)), jnp.float32) for _ in range(2))
    dense = np.asarray(q, np.float64) @ np.asarray(k, np.float64).T
    return replace(
        alibi,
        keywords={**alibi.keywords, "logits_soft_cap": 2.0, "bias": LowRankBias(q, k)},
        bias=alibi.bias + dense,
        cap=2.0,
    )


def biased_scores() -> Example:
    """A dense bias beside a function that hides keys; keys that are biased."""
    hides = GALLERY["hidden by score"]()
    bias = np.random.default_rng(0).standard_normal((1, 4, hides.t, 1)).astype(np.float32)
    keywords = {**hides.keywords, "bias": jnp.asarray(bias)}
    return replace(hides, keywords=keywords, bias=bias.astype(np.float64), offset=4.0)


COMBINED = {x.__name__: x for x in (conditions, scores, biased_scores)}


@pytest.mark.parametrize("name", only(["conditions"], COMBINED))
def test_beside_other_arguments(name):
    bound, of_gradients = BOUNDS["float32"]
    check(COMBINED[name](), "float32", bound, of_gradients, implementation="reference")
    options = {"implementation": "lax", "schedule": TILES}
    check(COMBINED[name](), "float32", bound, None, **options)


@pytest.mark.full
@pytest.mark.parametrize("name", COMBINED)
def test_gradients_beside_other_arguments(name):
    options = {"implementation": "lax", "schedule": TILES}
    check(COMBINED[name](), "float32", *BOUNDS["float32"], **options)


@pytest.mark.full
@pytest.mark.parametrize("heads", [(4, 1), (2, 2)])
def test_heads_that_share_keys(heads):
    n, k = heads
    plain = GALLERY["document"]()
    check(replace(plain, n=n, k=k), "float32", *BOUNDS["float32"], schedule=TILES)


@pytest.mark.full
@pytest.mark.parametrize("name", ["t5", "low rank", "blocks of segments", "learned of tokens"])
def test_heads_at_once(name):
    check_by_name(name, "float32", schedule=replace(TILES, batch_heads=True))


@pytest.mark.full
def test_sinks_and_dropout():
    """As the reference, in output and in every gradient."""
    alibi = GALLERY["alibi"]()
    arrays = alibi.arrays("float32")
    arrays["sinks"] = jnp.asarray([0.5, -1, 2, 8], jnp.float32)
    options = {"dropout_rate": 0.4, "dropout_key": jax.random.key(0), "schedule": TILES}
    options |= {"mask_mod": gallery.causal_mod, "score_mod": gallery.alibi_mod}

    def loss(arrays, slope, implementation):
        data = {"head_data": {"slope": slope}}
        out = dot_product_attention(**arrays, **data, **options, implementation=implementation)
        return jnp.sum(out**2), out

    both = [
        jitted(jax.value_and_grad(loss, (0, 1), has_aux=True), static_argnums=2)(
            arrays, alibi_slopes(4), name
        )
        for name in ("lax", "reference")
    ]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4, rtol=2e-4), *both)


SMALL = Schedule(block_q=8, block_kv=8)


def small(batch=(), t=20, n=2, d=8):
    rng = np.random.default_rng(1)
    return [jnp.asarray(rng.standard_normal((*batch, 1, t, n, d)), jnp.float32) for _ in range(3)]


def shared_loss(q, k, v, slope, implementation="lax"):
    out = dot_product_attention(
        q,
        k,
        v,
        score_mod=gallery.alibi_mod,
        mask_mod=gallery.causal_mod,
        head_data={"slope": slope},
        schedule=SMALL,
        implementation=implementation,
    )
    return jnp.sum(jnp.sin(out))


@pytest.mark.full
def test_vmap_of_gradients_under_checkpoint():
    arrays = small(batch=(3,))
    slopes = jnp.asarray([[0.1, 0.2], [0.3, 1.0], [0.0, 2.0]])
    grad = jax.grad(partial(shared_loss, implementation="reference"), (0, 1, 2, 3))
    together = jitted(jax.vmap(jax.grad(jax.checkpoint(shared_loss), (0, 1, 2, 3))))
    alone = jitted(grad)
    found = together(*arrays, slopes)
    for i in range(3):
        true = alone(*(x[i] for x in arrays), slopes[i])
        for x, y in zip(found, true, strict=True):
            np.testing.assert_allclose(x[i], y, atol=2e-5)
    assert all(np.abs(x).max() > 1e-2 for x in found)


# Shifts.


@pytest.mark.parametrize(
    ("shift", "name"),
    some_tuples(
        product(
            ["none", "mean", "mean_past", "reference", "paper"],
            ["neighbourhood", "alibi", "positions", "blocks of segments", "low rank"],
        ),
        13,
        8,
    ),
)
def test_every_shift_on_biased_keys(shift, name):
    example = replace(GALLERY[name](), offset=4.0)
    bounds = (2e-2, 8e-2) if shift == "paper" else (6e-3, 5e-2)
    check(example, "float16", bounds[0], None, shift=shift, schedule=TILES)


# The finite promise.


@pytest.mark.parametrize("shift", some(["auto", "mean", "reference"]))
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_huge_scores_stay_finite_beside_a_function(dtype, shift):
    """Products of 10^60 with a function that changes nothing; each row sees equal scores."""
    top = {"bfloat16": 1e30, "float16": 6e4}[dtype]
    x = jnp.full((1, 40, 2, 16), top, dtype)
    value = jnp.broadcast_to(jnp.arange(40.0)[:, None, None], (1, 40, 2, 1)).astype(dtype)
    options = {"score_mod": gallery.same, "mask_mod": gallery.causal_mod, "shift": shift}
    attend = partial(dot_product_attention, **options, schedule=SMALL, return_residual=True)
    out, lse = jitted(attend)(x, x, value)
    assert np.all(np.isfinite(lse))
    np.testing.assert_allclose(np.asarray(out, np.float64)[0, :, 0, 0], np.arange(40) / 2, atol=0.2)


def scaled_mod(score, b, h, q, kv, head_data):
    return score * head_data


def seen_before_30(b, h, q, kv):
    return kv < 30


def scaled_before_30(score, b, h, q, kv, head_data):
    return jnp.where(kv < 30, score * head_data, -jnp.inf)


def _hidden_keys() -> dict:
    """Keywords by which no query sees a key from 30 on, of 40."""
    blocks = create_block_mask(seen_before_30, None, None, 40, 40, 8)
    assert np.asarray(blocks.kinds)[0, 0].tolist() == [[2, 2, 2, 1, 0]] * 5
    return {
        "mask_mod": {"mask_mod": seen_before_30},
        "score_mod": {"score_mod": scaled_before_30},
        "block_mask": {"block_mask": blocks},
        "positions": {
            "is_causal": True,
            "q_positions": jnp.full(40, 29, jnp.int32),
            "kv_positions": jnp.arange(40, dtype=jnp.int32),
        },
    }


@pytest.mark.parametrize(
    "name", only(["score_mod"], ["mask_mod", "score_mod", "block_mask", "positions"])
)
@pytest.mark.parametrize("implementation", only(["lax"], ["lax", "reference"]))
def test_what_stands_in_hidden_keys_reaches_nothing(name, implementation):
    """NaN in keys, values and factors that no query sees: output and every gradient unchanged."""
    q, k, v = small(t=40)
    rng = np.random.default_rng(2)
    factors = [jnp.asarray(rng.standard_normal((40, 2)), jnp.float32) for _ in range(2)]
    options = {"score_mod": scaled_mod, **_hidden_keys()[name]}

    def loss(q, k, v, slope, k_factors):
        out = dot_product_attention(
            q,
            k,
            v,
            head_data=slope,
            bias=LowRankBias(factors[0], k_factors),
            implementation=implementation,
            schedule=SMALL,
            **options,
        )
        return jnp.sum(jnp.sin(out)), out

    both = jitted(jax.value_and_grad(loss, (0, 1, 2, 3, 4), has_aux=True))
    slope = jnp.asarray([0.5, 1.5])
    clean = both(q, k, v, slope, factors[1])
    fouled = both(
        q,
        k.at[:, 30:].set(jnp.nan),
        v.at[:, 31:].set(jnp.nan),
        slope,
        factors[1].at[32:].set(jnp.nan),
    )
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(clean))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), clean, fouled)


def test_rows_that_do_not_see_a_tile_do_not_see_its_nan():
    """In a causal block mask; the rows that see NaN are NaN."""
    q, k, v = small(t=40)
    mask = create_block_mask(gallery.causal_mod, None, None, 40, 40, 8)
    call = jitted(lambda k, v: dot_product_attention(q, k, v, block_mask=mask, schedule=SMALL))
    clean, fouled = call(k, v), call(k.at[:, 19].set(jnp.nan), v.at[:, 35].set(jnp.inf))
    np.testing.assert_array_equal(fouled[:, :19], clean[:, :19])
    assert np.all(np.isnan(fouled[:, 19:]))
    assert np.all(np.isfinite(clean))


def test_the_default_schedule_fits_the_blocks():
    q, k, v = small(t=40)
    mask = create_block_mask(gallery.causal_mod, None, None, 40, 40, 8)
    found = explain(q, k, v, block_mask=mask)
    assert (found.implementation, found.schedule.block_kv) == ("lax", 8)
    assert found.schedule.block_q <= 8


def test_positions_alone_hide_nothing():
    """Without causality and window there is nothing that compares them."""
    q, k, v = small()
    attend = partial(dot_product_attention, q, k, v, implementation="reference")
    positions = jnp.arange(20, dtype=jnp.int32)[::-1]
    np.testing.assert_array_equal(attend(q_positions=positions), attend())
    assert np.any(attend(q_positions=positions, is_causal=True) != attend(is_causal=True))


@pytest.mark.parametrize(
    "name", only(["document"], ["document", "positions", "blocks of segments"])
)
def test_statistics_are_of_what_is_seen(name):
    example = GALLERY[name]()
    arrays = example.arrays("float16")
    options = {**example.keywords, "schedule": TILES, "return_statistics": True}
    _, found = jitted(partial(dot_product_attention, **options))(*arrays.values())
    q, k = (np.asarray(arrays[x], np.float64) for x in ("query", "key"))
    scores = np.einsum("btnd,bsnd->bnts", q, np.repeat(k, 2, axis=2)) / 4
    seen = np.broadcast_to(example.seen, scores.shape)
    true = np.max(np.abs(np.where(seen, scores, 0)), axis=(2, 3))
    np.testing.assert_allclose(found.max_score, true, rtol=1e-5)
    assert np.any(true < np.max(np.abs(scores), axis=(2, 3)))


@pytest.mark.full
def test_parts_of_the_keys_add_up():
    """Of each part the function counts its own keys; what belongs to keys goes along as data."""
    q, k, v = small(t=40)
    places = jnp.arange(40, dtype=jnp.int32)

    def near(b, h, q, kv, q_data, kv_data):
        return jnp.abs(q_data - kv_data) <= 12

    def parts(cut):
        return [
            partial_attention(q, k[:, x], v[:, x], mask_mod=near, q_data=places, kv_data=places[x])
            for x in (slice(0, cut), slice(cut, 40))
        ]

    out, lse = merge(*parts(23)).output()
    data = {"q_data": places, "kv_data": places}
    options = {"mask_mod": near, "implementation": "reference", "return_residual": True}
    true_out, true_lse = dot_product_attention(q, k, v, **data, **options)
    np.testing.assert_allclose(out, true_out, atol=3e-6)
    np.testing.assert_allclose(lse, true_lse, atol=3e-6)


# What goes wrong.

Q = jnp.zeros((2, 6, 4, 8))
K = jnp.zeros((2, 5, 2, 8))
TABLE = jnp.arange(6.0)
MASK = create_block_mask(gallery.causal_mod, None, None, 6, 5, 2)
WAY_OUT = (
    "Pass what belongs to queries, keys or heads as q_data, kv_data or head_data, which the "
    "function is given by name; a number may be a Python number."
)


def holds(score, b, h, q, kv):
    return score + TABLE[q].astype(score.dtype)


def sums(score, b, h, q, kv):
    return jnp.max(score, axis=1)


def of_integers(score, b, h, q, kv):
    return q + kv


def of_floats(b, h, q, kv):
    return (q - kv).astype(jnp.float32)


WRONG = {
    "an array of its own": (
        {"score_mod": holds},
        "`score_mod` must hold no arrays of its own; got one that holds float32[6]. " + WAY_OUT,
    ),
    "no elementwise function": (
        {"score_mod": sums},
        "`score_mod` must be elementwise: its result must broadcast as its arguments do; "
        "got (2,) for indices [2, 1] and [1, 3].",
    ),
    "a mask of floats": (
        {"mask_mod": of_floats},
        "`mask_mod` must be a function mask_mod(b, h, q, kv) -> bool; "
        "got a result of type float32.",
    ),
    "scores of integers": (
        {"score_mod": of_integers},
        "`score_mod` must be a function score_mod(score, b, h, q, kv) -> score; "
        "got a result of type int32.",
    ),
    "no function": (
        {"mask_mod": 3},
        "`mask_mod` must be a function mask_mod(b, h, q, kv) -> bool; got 3.",
    ),
    "data without a function": (
        {"kv_data": jnp.zeros(5)},
        "`kv_data` must be None without a mask_mod, a score_mod or a block mask that has one; "
        "got something else.",
    ),
    "data of another length": (
        {"score_mod": gallery.same, "q_data": {"x": jnp.zeros(5)}},
        "`q_data` must have leaves [T], [B, T] or [B, N, T], T = 6, with B = 2 or 1 and "
        "N = 4 or 1; got (5,).",
    ),
    "data of other heads": (
        {"score_mod": gallery.same, "head_data": jnp.zeros(3)},
        "`head_data` must have leaves [N] or [B, N] with B = 2 or 1 and N = 4 or 1; got (3,).",
    ),
    "data of no numbers": (
        {"score_mod": gallery.same, "head_data": jax.random.split(jax.random.key(0), 4)},
        "`head_data` must hold numbers; got key<fry>.",
    ),
    "bound": (
        {"score_mod": gallery.same, "shift": "bound"},
        "`shift` must be another than 'bound' beside a score_mod; got 'bound'. A function may "
        "return anything, so nothing bounds its scores. Use 'auto'.",
    ),
    "alignment beside positions": (
        {
            "is_causal": True,
            "causal_alignment": "bottom_right",
            "q_positions": jnp.arange(6),
        },
        "`causal_alignment` must be 'top_left' beside positions; got 'bottom_right'. Positions "
        "say where queries stand; shift q_positions instead.",
    ),
    "positions of another length": (
        {"is_causal": True, "kv_positions": jnp.arange(6)},
        "`kv_positions` must be integers, [B, 5] or [5]; got int32[1, 6].",
    ),
    "positions that are floats": (
        {"is_causal": True, "q_positions": jnp.arange(6.0)},
        "`q_positions` must be integers, [B, 6] or [6]; got float32[1, 6].",
    ),
    "a block mask of another call": (
        {"block_mask": create_block_mask(gallery.causal_mod, None, None, 6, 6, 2)},
        "`block_mask` must be of B = 2 or 1, N = 4 or 1, T = 6, S = 5; got (1, 1, 6, 6).",
    ),
    "a block mask of another type": (
        {"block_mask": jnp.ones((6, 5), bool)},
        "`block_mask` must be a BlockMask; got",
    ),
    "factors of another length": (
        {"bias": LowRankBias(jnp.zeros((6, 2)), jnp.zeros((6, 2)))},
        "`bias.k_factors` must have numbers [B, N, 5, R], with B = 2 or 1 and N = 4 or 1; "
        "got float32[1, 1, 6, 2].",
    ),
    "factors of two ranks": (
        {"bias": LowRankBias(jnp.zeros((6, 2)), jnp.zeros((5, 3)))},
        "`bias.k_factors` must have the rank of q_factors, 2, at least 1; got 3.",
    ),
    "a scale of other heads": (
        {"bias": LowRankBias(jnp.zeros((6, 2)), jnp.zeros((5, 2)), jnp.zeros(3))},
        "`bias.scale` must be a number, [N] or [B, N], with B = 2 or 1 and N = 4 or 1; "
        "got float32[1, 3].",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name):
    keywords, message = WRONG[name]
    with pytest.raises(ValueError) as found:  # noqa: PT011 - the message is compared below
        dot_product_attention(Q, K, K, **keywords)
    assert str(found.value).startswith(message)


@pytest.mark.parametrize("join", [and_masks, or_masks])
def test_masks_are_joined_functions_only(join):
    with pytest.raises(ValueError, match="`mask_mods` must be functions; got True"):
        join(gallery.causal_mod, True)


def test_joined_masks():
    index = [jnp.zeros(1, jnp.int32)] * 2 + [jnp.arange(9)[:, None], jnp.arange(9)[None]]
    i, j = np.arange(9)[:, None], np.arange(9)[None]
    data = {"head_data": {"prefix": jnp.asarray(3)}}
    both = and_masks(gallery.causal_mod, gallery.prefix_mod)(*index, **data)
    either = or_masks(gallery.causal_mod, gallery.prefix_mod)(*index, **data)
    np.testing.assert_array_equal(both, (j <= i) & (j < 3))
    np.testing.assert_array_equal(either, (j <= i) | (j < 3))
    assert bool(and_masks()(*index))
    assert not bool(or_masks()(*index))
