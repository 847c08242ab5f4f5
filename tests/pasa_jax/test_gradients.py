"""Reverse mode by recomputation, against float64 and finite differences; forward mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from pasa_jax import Schedule, dot_product_attention
from tests.cases import CASES, TILES, Case
from tests.thin import only, some

DIFFERENTIABLE = ("query", "key", "value", "bias")
NAMES = (
    "full",
    "multi-query",
    "biased",
    "causal, more keys",
    "bottom right, fewer keys",
    "window",
    "lengths, bottom right",
    "no key at all",
    "mask",
    "bias",
    "bias, broadcast",
    "bias of rows",
    "segments, causal",
    "soft cap, causal, biased",
    "sinks",
)


def loss_of(case: Case, arrays, **options):
    """A loss that uses output and log-sum-exp, as a function of every differentiable operand."""
    rng = np.random.default_rng(3)
    shape = (case.b, case.t, case.n)
    weights = jnp.asarray(rng.standard_normal((*shape, case.e)), jnp.float32)
    of_lse = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    fixed = {k: v for k, v in arrays.items() if k not in DIFFERENTIABLE}
    keywords = {k: v for k, v in case.keywords.items() if k != "sinks"}

    def loss(operands):
        out, lse = dot_product_attention(
            **operands, **fixed, **keywords, **options, return_residual=True
        )
        dtype = lse.dtype
        seen = jnp.where(lse > -1e30, lse, jnp.zeros_like(lse))
        of_out = jnp.sum(out.astype(dtype) * weights.astype(dtype))
        return of_out + jnp.sum(seen * of_lse.astype(dtype))

    operands = {k: v for k, v in arrays.items() if k in DIFFERENTIABLE}
    if "sinks" in case.keywords:
        operands["sinks"] = jnp.asarray(case.keywords["sinks"])
    if options.get("shift") != "paper":  # which folds a Python number into M
        operands["scale"] = jnp.float32(case.keywords.get("scale", case.d**-0.5))
    keywords.pop("scale", None)
    return loss, operands


def relative(found, true):
    found, true = np.asarray(found, np.float64), np.asarray(true, np.float64)
    return np.abs(found - true).max() / max(np.abs(true).max(), 1e-3)


def float64_gradients(case, arrays):
    """Autodiff of the plain formula in float64."""
    with jax.enable_x64(True):
        wide = {
            k: v.astype(jnp.float64) if k in ("query", "key", "value") else v
            for k, v in arrays.items()
        }
        loss, operands = loss_of(case, wide, implementation="reference")
        return jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(operands))


@pytest.mark.parametrize("name", only(("bias", "window", "soft cap, causal, biased"), NAMES))
def test_float32_against_float64(name):
    case = CASES[name]
    arrays = case.arrays("float32")
    loss, operands = loss_of(case, arrays, implementation="lax", schedule=TILES)
    found = jax.jit(jax.grad(loss))(operands)
    for argument, true in float64_gradients(case, arrays).items():
        assert relative(found[argument], true) < 2e-5, argument


@pytest.mark.parametrize(
    "shift", only(["mean", "reference"], ["none", "mean", "reference", "paper"])
)
@pytest.mark.parametrize("dtype", some(["float16", "bfloat16"]))
def test_sixteen_bits_against_float64(dtype, shift):
    case = CASES["soft cap, causal, biased"] if shift != "paper" else CASES["causal"]
    arrays = case.arrays(dtype)
    loss, operands = loss_of(case, arrays, implementation="lax", schedule=TILES, shift=shift)
    found = jax.jit(jax.grad(loss))(operands)
    bound = {"float16": 1e-2, "bfloat16": 6e-2}[dtype] * (4 if shift == "paper" else 1)
    true = float64_gradients(case, arrays)
    for argument in found:
        assert relative(found[argument], true[argument]) < bound, argument


@pytest.mark.full
def test_heads_at_once():
    from dataclasses import replace

    case = CASES["bias, broadcast"]
    arrays = case.arrays("float32")
    grads = []
    for batch in (False, True):
        schedule = replace(TILES, batch_heads=batch)
        loss, operands = loss_of(case, arrays, implementation="lax", schedule=schedule)
        grads.append(jax.jit(jax.grad(loss))(operands))
    for name, true in float64_gradients(case, arrays).items():
        for found in grads:  # sums in another order, and no worse
            assert relative(found[name], true) < 2e-5, name


def test_finite_differences(x64):
    case = Case(b=1, t=7, s=9, n=2, k=1, d=4, e=3)
    arrays = case.arrays("float64")

    def attend(q, k, v):
        return dot_product_attention(
            q, k, v, is_causal=True, implementation="lax", schedule=Schedule(block_q=4, block_kv=4)
        )

    check_grads(attend, (arrays["query"], arrays["key"], arrays["value"]), 1, modes=["rev"])


@pytest.mark.full
def test_float16_gradient_is_as_accurate_as_float32_scores():
    """On biased keys: against the plain formula in float32 on the same float16 inputs."""
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(10 + rng.standard_normal((1, 256, 2, 64)), jnp.float16) for _ in range(3)
    )
    weights = jnp.asarray(rng.standard_normal((1, 256, 2, 64)), jnp.float32)

    def grad(**options):
        def loss(q, k, v):
            out = dot_product_attention(q, k, v, is_causal=True, **options)
            return jnp.sum(out.astype(jnp.float32) * weights)

        return jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)

    with jax.enable_x64(True):
        wide = [x.astype(jnp.float64) for x in (q, k, v)]
        true = jax.grad(
            lambda *x: jnp.sum(
                dot_product_attention(*x, is_causal=True, implementation="reference")
                * weights.astype(jnp.float64)
            ),
            (0, 1, 2),
        )(*wide)
        true = [np.asarray(x) for x in true]
    plain = grad(implementation="reference")
    ours = grad(implementation="lax", shift="auto")
    for a, b, exact in zip(ours, plain, true, strict=True):
        assert relative(a, exact) < 2 * relative(b, exact) + 1e-3


class TestForwardMode:
    """`jax.jvp` works on "reference" alone, `jax.hessian` on both (docs/api.md)."""

    case = Case(b=1, t=5, s=6, n=2, k=1, d=4, e=3)

    def attend(self, q, implementation):
        arrays = self.case.arrays("float32")
        return dot_product_attention(
            q, arrays["key"], arrays["value"], is_causal=True, implementation=implementation
        )

    @pytest.mark.full
    def test_jvp_and_hessian(self):
        q = self.case.arrays("float32")["query"]
        tangent = jnp.ones_like(q)
        _, found = jax.jvp(lambda q: self.attend(q, "reference"), (q,), (tangent,))
        step = 1e-2
        ahead, behind = (self.attend(q + s * tangent, "reference") for s in (step, -step))
        np.testing.assert_allclose(found, (ahead - behind) / (2 * step), atol=2e-3)
        hessian = jax.hessian(lambda q: jnp.sum(self.attend(q, "reference")))(q)
        flat = np.asarray(hessian).reshape(q.size, q.size)
        np.testing.assert_allclose(flat, flat.T, atol=1e-5)
        assert np.abs(flat).max() > 1e-3
        found = jax.hessian(lambda q: jnp.sum(self.attend(q, "lax")))(q)
        np.testing.assert_allclose(found, hessian, atol=1e-5)

    def test_jvp_on_lax_is_an_error(self):
        q = self.case.arrays("float32")["query"]
        with pytest.raises(TypeError, match="custom_vjp"):
            jax.jvp(lambda q: self.attend(q, "lax"), (q,), (q,))
