"""The GPU's backward kernels, through the interpreter: against float64 and against lax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gpu
from pasa_jax import Precision, Schedule, dot_product_attention
from pasa_jax.call.api import canonical
from pasa_jax.implementations import lax as by_lax
from tests.cases import CASES, Case
from tests.pallas_kernels.test_aot import lowered
from tests.pasa_jax.test_gradients import NAMES, float64_gradients, loss_of
from tests.thin import only

TILES = Schedule(block_q=32, block_kv=16, target="h100")
OURS = {"implementation": "pallas_gpu", "interpret": True, "schedule": TILES}
LAX = {"implementation": "lax", "schedule": TILES}
HALF = Precision(scores="float16", probabilities="float16", products="float16")
OF_SUMS = {"float32": 2e-5, "float16": 1e-2, "bfloat16": 6e-2}  # as lax's in test_gradients
FLOOR = {"float32": 2**-24, "float16": 2**-12, "bfloat16": 2**-9}


def gradients(case, arrays, **options):
    loss, operands = loss_of(case, arrays, **options)
    return jax.jit(jax.grad(loss))(operands)


def error(found, true):
    """Relative, of the whole array."""
    found, true = (np.asarray(x).astype(np.float64) for x in (found, true))
    return np.linalg.norm(found - true) / max(np.linalg.norm(true), 1e-3)


def check(case, dtype, **options):
    """Errors are at most 1.2 times those of lax, and a floor; sums over a whole array, whose errors
    are chance, at most what lax's may be."""
    arrays = case.arrays(dtype)
    true = float64_gradients(case, arrays)
    ours, theirs = (gradients(case, arrays, **x, **options) for x in (OURS, LAX))
    for name, exact in true.items():
        found = error(ours[name], exact)
        if name in ("scale", "sinks"):
            assert found < OF_SUMS[dtype], name
        else:
            assert found <= 1.2 * error(theirs[name], exact) + FLOOR[dtype], name


CALLS = [
    *((name, "bfloat16", "auto") for name in NAMES if "bias" not in name),
    *((name, "float32", "auto") for name in ("causal, more keys", "sinks", "window", "one key")),
    *(("biased", dtype, "auto") for dtype in ("float32", "float16", "bfloat16")),
    *(
        ("lengths, bottom right", dtype, shift)
        for dtype in ("float16", "bfloat16", "float32")
        for shift in ("none", "mean", "mean_past", "reference")
    ),
]
CHOSEN = [("segments, causal", "bfloat16", "auto")]


@pytest.mark.parametrize("call", only(CHOSEN, CALLS), ids=str)
def test_against_float64_and_lax(call):
    name, dtype, shift = call
    check(CASES[name], dtype, shift=shift)


@pytest.mark.full
@pytest.mark.parametrize("name", ["biased", "lengths, bottom right"])
def test_float16_products(name):
    """With guards and gains of values."""
    case = CASES[name]
    arrays = case.arrays("float16")
    true = float64_gradients(case, arrays)
    found = gradients(case, arrays, **OURS, precision=HALF, shift="mean")
    for argument in ("query", "key", "value"):
        assert error(found[argument], true[argument]) < 1e-2, argument


@pytest.mark.full
@pytest.mark.parametrize("d", [80, 192])
def test_head_sizes(d):
    check(Case(t=40, s=50, n=2, k=1, d=d, e=d, keywords={"is_causal": True}), "bfloat16")


def of_masked_key(name, place, value):
    """Gradients of ours and of lax where a key that no query sees holds ``value``."""
    arrays = CASES["full"].arrays("float32")
    arrays[name] = arrays[name].at[:, place:].set(value)

    def loss(q, k, v, options):
        lengths = jnp.asarray([place, place])
        out = dot_product_attention(q, k, v, key_value_seq_lengths=lengths, **options)
        return jnp.sum(jnp.sin(out))

    return [
        jax.jit(jax.grad(lambda *x: loss(*x, options), (0, 1, 2)))(*arrays.values())  # noqa: B023
        for options in (OURS, LAX)
    ]


@pytest.mark.full
@pytest.mark.parametrize(("name", "value"), [("value", np.nan), ("key", np.inf)])
def test_what_is_not_finite_is_computed_by_lax(name, value):
    for found, expected in zip(*of_masked_key(name, 30, value), strict=True):
        assert np.all(np.isfinite(expected))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.full
def test_a_result_of_lax_has_the_gradients_of_lax():
    """Its statistics are the kernel's in no unit: they must not be used."""
    arrays = CASES["causal"].arrays("float32")
    call = canonical(*arrays.values(), is_causal=True, **OURS)
    plan = gpu.adapt(call.plan)
    result = by_lax.forward(call.operands, call.mask, plan, wanted="residuals")
    result = result._replace(m=result.m * 2, by_lax=jnp.bool_(True))
    expected, found, own = (
        jax.jit(lambda o, r: f(o, call.mask, plan, r, r.out, None))(call.operands, result)  # noqa: B023
        for f in (by_lax.backward, gpu.backward, gpu.backward_kernel)
    )
    np.testing.assert_allclose(found.query, expected.query, rtol=1e-4, atol=1e-6)
    assert not np.allclose(own.query, expected.query, rtol=1e-2)


@pytest.mark.full
def test_the_gradient_of_a_bias_is_left_to_lax():
    case = CASES["bias, broadcast"]
    arrays = case.arrays("float32")
    call = canonical(*(arrays[x] for x in ("query", "key", "value")), bias=arrays["bias"], **OURS)
    assert gpu.no_backward(call.operands, call.mask, call.plan) == "it has no gradient of a bias"
    for name, true in float64_gradients(case, arrays).items():
        assert error(gradients(case, arrays, **OURS)[name], true) < 2e-5, name


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True, "local_window_size": 64},
        {"segment_ids": np.zeros((2, 256), np.int32)},
        {"mask": np.ones((1, 1, 256, 256), bool), "sinks": np.zeros(2, np.float32)},
        {"key_value_seq_lengths": np.asarray([3, 256]), "shift": "mean"},
        {"logits_soft_cap": 30.0},
    ],
)
def test_both_kernels_are_lowered(options):
    schedule = Schedule.for_target("h100", dtype="bfloat16", length=256)

    def total(q, k, v):
        options_ = {"schedule": schedule, "implementation": "pallas_gpu", **options}
        return jnp.sum(dot_product_attention(q, k, v, **options_).astype(jnp.float32))

    text = lowered(jax.grad(total, (0, 1, 2)), "cuda")
    assert "pasa_gpu_dq" in text
    assert "pasa_gpu_dkv" in text
