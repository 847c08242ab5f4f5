"""Any shape, type, mask, schedule, shift and value up to ±65504: finite, exact within a bound,
and independent of what stands in masked slots."""

import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pasa_jax import Schedule, dot_product_attention
from tests.cases import visible

UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}

# A compile is what an example costs, so the static part is drawn from a table of this many.
SHAPES = [
    # T, S, N, K, D, E
    (1, 1, 1, 1, 1, 1),
    (1, 37, 4, 2, 8, 8),
    (19, 19, 2, 1, 16, 4),
    (33, 21, 3, 3, 5, 7),
    (20, 64, 2, 2, 32, 32),
]
MASKS = [
    {},
    {"is_causal": True},
    {"is_causal": True, "causal_alignment": "bottom_right"},
    {"local_window_size": (5, 2)},
    {"lengths": True},
    {"array": True},
]
SCHEDULES = [
    Schedule(block_q=8, block_kv=16),
    Schedule(block_q=16, block_kv=7, target="ascend_910b"),
]
SHIFTS = ["auto", "mean", "reference"]


@cache
def compiled(mask_index, schedule_index, shift):
    static = {k: v for k, v in MASKS[mask_index].items() if k not in ("lengths", "array")}

    @jax.jit
    def call(q, k, v, dynamic):
        return dot_product_attention(
            q,
            k,
            v,
            **static,
            **dynamic,
            shift=shift,
            schedule=SCHEDULES[schedule_index],
            implementation="lax",
        )

    return call


def draw_values(rng, shape, kind, dtype):
    """Values of one of the kinds that break attention somewhere."""
    normal = rng.standard_normal(shape)
    values = {
        "normal": normal,
        "biased": 30 + normal,
        "large": 65504 * np.sign(normal),
        "one spike": np.where(rng.random(shape) < 0.02, 65504, normal),
        "any size": 65504 * np.exp2(-rng.uniform(0, 30, shape)) * np.sign(normal),
        "zero": 0 * normal,
        "equal": np.full(shape, 3.0),
    }[kind]
    return jnp.asarray(np.clip(values, -65504, 65504), dtype)


def bound(q, k, seen, scale, dtype, shift, behind):
    """What storage may cost: relative errors of the weights, from errors of the scores.

    Scores are stored relative to the row's maximum or to a block's mean; either way the error of
    one is at most a few units of its type of the row's largest |score| (of the spread, for
    float32), and the accumulator's own rounding of ‖q‖·‖k‖ comes on top. A block's mean holds
    keys that other rows see, so there the largest |score| is over those too.
    """
    size = np.einsum("btnd,bsnd->bnts", np.abs(q), np.abs(k)) * scale
    if shift == "mean" or behind:
        seen = seen.any(axis=(1, 2), keepdims=True)
    largest = np.where(seen, size, 0).max(-1)
    unit = UNIT[dtype]
    stored = (4 if behind else 2) * unit
    return np.swapaxes(stored * largest, 1, 2) + q.shape[-1] * 2.0**-24 * np.swapaxes(largest, 1, 2)


KINDS = ["normal", "biased", "large", "one spike", "any size", "zero", "equal"]


EXAMPLES = {
    "shape": st.integers(0, len(SHAPES) - 1),
    "mask": st.integers(0, len(MASKS) - 1),
    "schedule": st.integers(0, len(SCHEDULES) - 1),
    "shift": st.sampled_from(SHIFTS),
    "dtype": st.sampled_from(list(UNIT)),
    "kinds": st.tuples(*[st.sampled_from(KINDS)] * 3),
    "rubbish": st.sampled_from([math.nan, math.inf, -math.inf, 65504.0]),
    "seed": st.integers(0, 2**20),
}


def examples(count):
    """The same ones every time, so that a failure is the change's doing; for others set
    derandomize=False.
    """
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@examples(8)
@given(**EXAMPLES)
def test_attention(**example):
    holds(**example)


@pytest.mark.full
@examples(160)
@given(**EXAMPLES)
def test_attention_on_more(**example):
    holds(**example)


def holds(shape, mask, schedule, shift, dtype, kinds, rubbish, seed):
    t, s, n, kv, d, e = SHAPES[shape]
    rng = np.random.default_rng(seed)
    shapes = ((2, t, n, d), (2, s, kv, d), (2, s, kv, e))
    q, k, v = (draw_values(rng, x, kind, dtype) for x, kind in zip(shapes, kinds, strict=True))
    keywords, dynamic = dict(MASKS[mask]), {}
    if keywords.pop("lengths", False):
        for name, length in (("query_seq_lengths", t), ("key_value_seq_lengths", s)):
            dynamic[name] = jnp.asarray(rng.integers(0, length + 1, 2), jnp.int32)
    if keywords.pop("array", False):
        dynamic["mask"] = jnp.asarray(rng.random((2, 1, t, s)) > 0.5)
    call = compiled(mask, schedule, shift)
    out = np.asarray(call(q, k, v, dynamic), np.float64)

    assert np.all(np.isfinite(out))

    seen = np.broadcast_to(visible(2, t, s, dynamic, {**keywords, **dynamic}), (2, n, t, s))
    hidden = ~seen.any(axis=(1, 2))
    spoil = jnp.asarray(hidden)[:, :, None, None]
    spoilt = (jnp.where(spoil, jnp.asarray(rubbish, dtype), x) for x in (k, v))
    np.testing.assert_array_equal(out, np.asarray(call(q, *spoilt, dynamic), np.float64))

    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, n // kv, axis=2) for x in (k, v))
    scores = np.where(seen, np.einsum("btnd,bsnd->bnts", q, k) * d**-0.5, -np.inf)
    top = scores.max(-1, keepdims=True)
    p = np.exp(scores - np.where(np.isfinite(top), top, 0))
    total = p.sum(-1, keepdims=True)
    p = p / np.where(total == 0, 1, total)
    exact = np.einsum("bnts,bsne->btne", p, v)
    error = np.abs(out - exact).max(-1)
    # Weights off by the factor e^±δ move a mean by at most (e^2δ − 1) times the values' range.
    behind = SCHEDULES[schedule].target != "cpu"
    delta = bound(q, k, seen, d**-0.5, dtype, shift, behind)
    largest = np.abs(v).max() if v.size else 0.0
    allowed = np.minimum(np.expm1(np.minimum(2 * delta, 50)), 2) + 8 * UNIT[dtype]
    assert np.all(error <= allowed * largest + 1e-6), (error - allowed * largest).max()
