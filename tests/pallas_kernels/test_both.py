"""What every Pallas kernel must do, through the interpreters, and where it is hard."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax import Schedule, dot_product_attention
from tests.cases import CASES
from tests.pasa_jax.test_contract import BOUND, check
from tests.thin import only, some

TARGETS = {"pallas_tpu": "tpu_v6e", "pallas_gpu": "h100"}


def tiles(kernel, case=None):
    """Small tiles. For TPUs, biases, arrays and segments are cut along lanes: 128 keys a tile."""
    schedule = Schedule(block_q=32, block_kv=16, target=TARGETS[kernel])
    by_lanes = case is not None and (case.bias or case.mask or "segment_ids" in case.keywords)
    if by_lanes and kernel == "pallas_tpu":
        return dataclasses.replace(schedule, block_kv=128)
    return schedule


CHOSEN = ("window", "bias of rows", "segments")


@pytest.mark.parametrize("name", only(CHOSEN, CASES))
def test_contract(kernel, name):
    case = CASES[name]
    options = {"implementation": kernel, "interpret": True, "schedule": tiles(kernel, case)}
    check(case, "float32", BOUND["float32"], **options)


@pytest.mark.parametrize("dtype", only(["bfloat16"], ["float16", "bfloat16"]))
@pytest.mark.parametrize(
    "name", some(["lengths, bottom right", "bias", "soft cap, causal, biased"])
)
def test_contract_in_16_bits(kernel, name, dtype):
    case = CASES[name]
    options = {"implementation": kernel, "interpret": True, "schedule": tiles(kernel, case)}
    check(case, dtype, BOUND[dtype], **options)


@pytest.mark.parametrize(
    "shift", only(["mean_past", "reference"], ["none", "mean", "mean_past", "reference"])
)
def test_every_shift(kernel, shift):
    dtype = "bfloat16" if kernel == "pallas_tpu" else "float16"
    options = {
        "implementation": kernel,
        "interpret": True,
        "schedule": tiles(kernel),
        "precision": dtype,
    }
    check(CASES["causal, fewer keys"], dtype, BOUND[dtype], shift=shift, **options)


def pair(kernel, arrays, **options):
    """Results of the kernel and of lax, from the same schedule, in float32 scores."""
    options = {"precision": "float32", "schedule": tiles(kernel)} | options
    return [
        np.asarray(
            dot_product_attention(
                **arrays, **options, implementation=name, interpret=name != "lax"
            ).astype(jnp.float32)
        )
        for name in (kernel, "lax")
    ]


@pytest.mark.full
@pytest.mark.parametrize("dtype", some(["bfloat16", "float32"]))
def test_equals_lax_within_one_rounding_of_the_output(kernel, dtype):
    """Not bit for bit: kernels take powers of two, and subtract the running maximum."""
    found, by_lax = pair(kernel, CASES["causal"].arrays(dtype), is_causal=True)
    ulp = float(jnp.finfo(dtype).eps) * max(1, np.abs(by_lax).max())
    np.testing.assert_allclose(found, by_lax, atol=ulp if dtype == "bfloat16" else 8 * ulp)


@pytest.mark.parametrize("value", some([np.nan, 3e38]))
def test_what_a_masked_key_holds_does_not_matter(kernel, value):
    arrays = CASES["full"].arrays("bfloat16")
    options = {"key_value_seq_lengths": jnp.asarray([30, 50])}
    clean, _ = pair(kernel, arrays, **options)
    for name in ("key", "value"):
        arrays[name] = arrays[name].at[0, 30:].set(value)
    found, by_lax = pair(kernel, arrays, **options)
    np.testing.assert_allclose(found, clean, atol=1e-2)
    np.testing.assert_allclose(found, by_lax, atol=1e-2)


@pytest.mark.parametrize("dtype", some(["float16", "bfloat16"]))
def test_finite_inputs_give_finite_outputs_whatever_their_size(kernel, dtype):
    factor = jnp.asarray(1e4 if dtype == "float16" else 5e37, dtype)
    arrays = {k: v * factor for k, v in CASES["full"].arrays(dtype).items()}
    found, by_lax = pair(kernel, arrays)
    assert np.all(np.isfinite(found))
    np.testing.assert_allclose(found, by_lax, rtol=1e-2, atol=1e-2 * np.abs(by_lax).max())


def test_a_row_that_sees_nan_says_so(kernel):
    arrays = CASES["causal"].arrays("float32")
    arrays["key"] = arrays["key"].at[0, 20, 0].set(jnp.nan)
    found, by_lax = pair(kernel, arrays, is_causal=True)
    np.testing.assert_allclose(found, by_lax, atol=2e-6)
    assert np.all(np.isnan(found[0, 20:, :2]))
    assert np.all(np.isfinite(found[0, :20]))


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_gradients(kernel, dtype):
    arrays = CASES["causal"].arrays(dtype)

    def loss(q, k, v, name):
        out, lse = dot_product_attention(
            q,
            k,
            v,
            is_causal=True,
            implementation=name,
            interpret=name != "lax",
            schedule=tiles(kernel),
            return_residual=True,
        )
        return jnp.sum(out.astype(jnp.float32) ** 2) + jnp.sum(jnp.sin(lse))

    ours, by_lax = (
        jax.jit(jax.grad(lambda *x: loss(*x, name), (0, 1, 2)))(*arrays.values())  # noqa: B023
        for name in (kernel, "lax")
    )
    for a, b in zip(ours, by_lax, strict=True):
        np.testing.assert_allclose(a, b, rtol=4e-6, atol=2e-5 if dtype == "float32" else 2e-2)


@pytest.mark.full
def test_under_x64(kernel, x64):
    options = {"implementation": kernel, "interpret": True, "schedule": tiles(kernel)}
    check(CASES["causal"], "float32", 4e-6, **options)
