"""The differentiable core: an implementation's forward pass and its backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax

from pasa_jax.core.errors import wrong
from pasa_jax.core.heads import varying
from pasa_jax.core.mask import Mask
from pasa_jax.core.operands import Operands, Result, Wanted
from pasa_jax.core.plan import Plan

Array = jax.Array


class Forward(Protocol):
    """A forward pass, which returns the parts of a result that are ``wanted``."""

    def __call__(self, operands: Operands, mask: Mask, plan: Plan, *, wanted: Wanted) -> Result: ...


class Backward(Protocol):
    """A backward pass: the cotangents of the operands, from those of a result's out and lse."""

    def __call__(
        self,
        operands: Operands,
        mask: Mask,
        plan: Plan,
        result: Result,
        d_out: Array,
        d_lse: Array | None,
    ) -> Operands: ...


@dataclass(frozen=True)
class Core:
    """The static part of a differentiable call.

    Arguments:
      forward, backward: the implementation's passes.
      plan: adapted to that implementation.
      lse: whether the log-sum-exp is returned too.
    """

    forward: Forward
    backward: Backward
    plan: Plan
    lse: bool


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def differentiable_attention(
    core: Core, operands: Operands, mask: Mask
) -> tuple[Array, Array | None]:
    """Output [B, T, N, E] and log-sum-exp [B, T, N], both differentiable in reverse mode.

    The backward pass recomputes the scores from O(T + S) residuals.
    """
    result = run(core.forward, core.plan, "lse" if core.lse else "out", operands, mask)
    return result.out, result.lse


def run(
    forward: Any, plan: Plan, wanted: Wanted, operands: Operands, mask: Mask, *rest: Any
) -> Result:
    """A forward pass as one compiled operation.

    Outside of `jax.jit` it is compiled once for each shape, not at each call. It is compiled even
    where the user has switched jit off to debug (`jax.disable_jit`): run operation by operation it
    would take minutes.
    """
    with jax.disable_jit(False):
        return _compiled_forward(forward, plan, wanted, operands, mask, *rest)


@partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _compiled_forward(
    forward: Any, plan: Plan, wanted: Wanted, operands: Operands, mask: Mask, *rest: Any
) -> Result:
    return forward(operands, mask, plan, *rest, wanted=wanted)


def _forward(core: Core, operands: Operands, mask: Mask) -> tuple[Any, Any]:
    if core.plan.precision.eight_bits:
        allowed = "have products of another type than int8 where gradients are asked for"
        raise wrong("precision", allowed, "'int8'", "Leave `precision` out for training.")
    result = run(core.forward, core.plan, "residuals", operands, mask)
    return (result.out, result.lse if core.lse else None), (operands, mask, result)


def _backward(
    core: Core, residuals: Any, cotangents: tuple[Array, Array | None]
) -> tuple[Operands, None]:
    operands, mask, result = residuals
    # Otherwise what is replicated would be summed over devices within the loops over tiles.
    given = varying(operands, residuals)
    with jax.disable_jit(False):  # as in `run`
        gradients = _compiled_backward(core, given, mask, result, *cotangents)
    return jax.tree.map(reduced, gradients, operands), None


@partial(jax.jit, static_argnums=0, inline=True)
def _compiled_backward(core: Core, operands: Operands, mask: Mask, *rest: Any) -> Operands:
    return core.backward(operands, mask, core.plan, *rest)


def reduced(cotangent: Array, operand: Array) -> Array:
    """Summed over the manual mesh axes (`shard_map`) over which the operand is replicated."""
    varying, own = (jax.typeof(x).manual_axis_type.varying for x in (cotangent, operand))
    axes = tuple(varying - own)
    return jax.lax.psum(cotangent, axes) if axes else cotangent


differentiable_attention.defvjp(_forward, _backward)
