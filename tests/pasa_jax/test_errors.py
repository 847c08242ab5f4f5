"""Wrong calls: the argument, what is allowed, what was seen, the way out; at trace time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax import BackendUnsupported, Precision, Schedule, dot_product_attention, explain


def zeros(*shape, dtype="float32"):
    return jnp.zeros(shape, dtype)


Q, K, V = zeros(2, 6, 4, 8), zeros(2, 5, 2, 8), zeros(2, 5, 2, 8)
IMPLEMENTATIONS = "'pallas_tpu', 'pallas_gpu', 'lax', 'reference', 'xla', 'cudnn'"

WRONG = {
    "rank": (
        (zeros(6, 8), K, V),
        {},
        "`query` must have the layout [B, T, N, D] or [T, N, D], as `query` has; got (6, 8).",
    ),
    "mixed layouts": (
        (Q, K[0], V),
        {},
        "`key` must have the layout [B, S, K, D] or [S, K, D], as `query` has; got (5, 2, 8).",
    ),
    "integer": (
        (Q, K.astype(jnp.int32), V),
        {},
        "`key` must be of type float16, bfloat16, float32, float64; got int32.",
    ),
    "mixed types": (
        (Q, K, V.astype(jnp.float16)),
        {},
        "`value` must have query's type; got float16 beside float32. Cast one of them.",
    ),
    "head size": (
        (Q, zeros(2, 5, 2, 9), V),
        {},
        "`key` must be [2, S, K, 8], the batch and head size of query's (2, 6, 4, 8); "
        "got (2, 5, 2, 9).",
    ),
    "value length": (
        (Q, K, zeros(2, 4, 2, 8)),
        {},
        "`value` must be [2, 5, 2, E], as key's (2, 5, 2, 8); got (2, 4, 2, 8).",
    ),
    "heads": (
        (Q, zeros(2, 5, 3, 8), zeros(2, 5, 3, 8)),
        {},
        "`key` must have a number of heads that divides query's 4; got 3.",
    ),
    "no head size": (
        (zeros(2, 6, 4, 0), zeros(2, 5, 2, 0), V),
        {},
        "`query` must have a head size of at least 1; got 0.",
    ),
    "bias shape": (
        (Q, K, V, zeros(2, 3, 6, 5)),
        {},
        "`bias` must broadcast to [B, N, T, S] = [2, 4, 6, 5]; got (2, 3, 6, 5).",
    ),
    "bias of bool": (
        (Q, K, V, zeros(1, 1, 6, 5).astype(bool)),
        {},
        "`bias` must be of a floating or an integer type; got bool. A bool array is a `mask`.",
    ),
    "mask of float": (
        (Q, K, V, None, zeros(1, 1, 6, 5)),
        {},
        "`mask` must be of type bool; got float32. An additive mask is a `bias`.",
    ),
    "scale": ((Q, K, V), {"scale": np.inf}, "`scale` must be finite in float32; got inf."),
    "scale array": (
        (Q, K, V),
        {"scale": zeros(2)},
        "`scale` must be a number or a scalar array; got shape (2,).",
    ),
    "lengths": (
        (Q, K, V),
        {"key_value_seq_lengths": jnp.zeros(3, jnp.int32)},
        "`key_value_seq_lengths` must be integers of shape [B] = [2]; got int32[3].",
    ),
    "lengths of float": (
        (Q, K, V),
        {"query_seq_lengths": zeros(2)},
        "`query_seq_lengths` must be integers of shape [B] = [2]; got float32[2].",
    ),
    "window": (
        (Q, K, V),
        {"local_window_size": (-1, 2)},
        "`local_window_size` must be a non-negative int or a pair of them; got (-1, 2).",
    ),
    "causal": ((Q, K, V), {"is_causal": "yes"}, "`is_causal` must be True or False; got 'yes'."),
    "alignment": (
        (Q, K, V),
        {"causal_alignment": "top"},
        "`causal_alignment` must be one of 'top_left', 'bottom_right'; got 'top'.",
    ),
    "segments": (
        (Q, K, V),
        {"segment_ids": jnp.zeros((2, 6), jnp.int32)},
        "`segment_ids` must be integers, [2, 6] for query and [2, 5] for key; got int32[2, 6].",
    ),
    "soft cap": (
        (Q, K, V),
        {"logits_soft_cap": 0},
        "`logits_soft_cap` must be a positive, finite number; got 0.",
    ),
    "sinks": (
        (Q, K, V),
        {"sinks": zeros(2)},
        "`sinks` must be floating, of shape [N] = [4]; got float32[2].",
    ),
    "shift": (
        (Q, K, V),
        {"shift": "pasa"},
        "`shift` must be one of 'auto', 'none', 'paper', 'mean', 'mean_past', 'reference', "
        "'bound'; got 'pasa'.",
    ),
    "beta without paper": (
        (Q, K, V),
        {"beta": 0.9},
        "`beta` must be None unless shift='paper'; got 0.9.",
    ),
    "beta": (
        (Q, K, V),
        {"shift": "paper", "beta": 1.0},
        "`beta` must lie strictly between 0 and 1; got 1.0.",
    ),
    "paper's scale": (
        (Q, K, V),
        {"shift": "paper", "scale": jnp.float32(0.1)},
        "`scale` must be a Python number for shift='paper'; got an array. "
        "Fold the array into query, or use another shift.",
    ),
    "precision": (
        (Q, K, V),
        {"precision": "half"},
        "`precision` must be one of 'float16', 'bfloat16', 'float32', 'float64', 'paper', "
        "'int8'; "
        "got 'half'.",
    ),
    "schedule": (
        (Q, K, V),
        {"schedule": 128},
        "`schedule` must be a pasa_jax.Schedule or None; got 128.",
    ),
    "implementation": (
        (Q, K, V),
        {"implementation": "mosaic"},
        f"`implementation` must be one of {IMPLEMENTATIONS}; got 'mosaic'.",
    ),
    "implementation in a sequence": (
        (Q, K, V),
        {"implementation": ("lax", "triton")},
        f"`implementation` must be one of {IMPLEMENTATIONS}; got 'triton'.",
    ),
    "unsupported": (
        (Q, K, V),
        {"implementation": "reference", "shift": "mean"},
        "`implementation` cannot run this call. 'reference': it computes the plain formula, "
        "without the shift 'mean'. 'lax' can, or None.",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_whole_sentence(name):
    arguments, keywords, sentence = WRONG[name]
    arrays = [x for x in arguments if x is not None]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        jax.eval_shape(lambda *_: dot_product_attention(*arguments, **keywords), *arrays)
    assert str(error.value) == sentence
    with pytest.raises(type(error.value)):
        explain(*arguments, **keywords)


def test_float64_precision_is_for_float64_inputs():
    with pytest.raises(ValueError, match="`precision` must be float64 for float64 inputs and only"):
        dot_product_attention(Q, K, V, precision="float64")


NO_KERNEL = {
    f"pallas_{kind}": f"its schedule would have to be for a {kind.upper()}, and is for cpu "
    f"(schedule=Schedule.for_target({example!r}))"
    for kind, example in (("tpu", "tpu_v6e"), ("gpu", "h100"))
}


def test_implementation_as_in_tokamax():
    assert explain(Q, K, V).implementation == "lax"
    assert explain(Q, K, V, implementation=("reference", "lax")).implementation == "reference"
    mean = explain(Q, K, V, implementation=("reference", "lax"), shift="mean")
    assert mean.implementation == "lax"
    assert mean.why_not == {
        **NO_KERNEL,
        "reference": "it computes the plain formula, without the shift 'mean'",
    }
    with pytest.raises(BackendUnsupported):
        dot_product_attention(Q, K, V, implementation=["reference"], precision="float16")


def test_explain_says_what_would_run():
    x = jax.ShapeDtypeStruct((1, 100, 4, 64), jnp.float16)
    told = explain(x, x, x, is_causal=True)
    assert (told.implementation, told.shift, told.guarded) == ("lax", "reference", True)
    assert told.schedule.block_kv == 100  # the whole sequence, shorter than the default block
    assert told.precision == Precision.named("float16")
    assert told.why_not == {**NO_KERNEL, "reference": "'lax' comes before it"}
    behind = explain(x, x, x, schedule=Schedule.for_target("ascend_910b", head_dim=64))
    assert behind.shift == "none or mean"
    assert "ascend_910b rounds the product to float16 first" in behind.reason
    plain = explain(x, x, x, shift="none")
    assert not plain.guarded
    assert "not promised" in str(plain)
    wide = jax.ShapeDtypeStruct((1, 100, 4, 64), jnp.float32)
    assert explain(wide, wide, wide).shift == "none"


EMPTY = [
    ((2, 0, 4, 8), (2, 5, 2, 8), (2, 5, 2, 3)),
    ((2, 6, 4, 8), (2, 0, 2, 8), (2, 0, 2, 3)),
    ((0, 6, 4, 8), (0, 5, 2, 8), (0, 5, 2, 3)),
    ((2, 6, 4, 8), (2, 5, 2, 8), (2, 5, 2, 0)),
    ((0, 4, 8), (5, 2, 8), (5, 2, 3)),
]


@pytest.mark.parametrize("implementation", ["lax", "reference"])
@pytest.mark.parametrize("shapes", EMPTY)
def test_empty_sequences_give_zeros(shapes, implementation):
    q, k, v = (jnp.ones(s, jnp.float16) for s in shapes)
    out, lse = dot_product_attention(q, k, v, return_residual=True, implementation=implementation)
    assert out.shape == (*shapes[0][:-1], shapes[2][-1])
    assert lse.shape == shapes[0][:-1]
    assert np.all(np.asarray(out) == 0)
    grad = jax.grad(
        lambda q: (
            dot_product_attention(q, k, v, implementation=implementation).astype(jnp.float32).sum()
        )
    )(q)
    assert np.all(np.asarray(grad) == 0)


def test_empty_keys_with_sinks():
    q, k = jnp.ones((1, 3, 2, 4)), jnp.ones((1, 0, 2, 4))
    _, lse = dot_product_attention(q, k, k, sinks=jnp.asarray([1.0, 2.0]), return_residual=True)
    np.testing.assert_array_equal(lse[0], [[1, 2]] * 3)
