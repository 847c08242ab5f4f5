"""The differentiable core: any implementation's forward pass, the tile-by-tile backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax

from pasa_jax.core.mask import Mask
from pasa_jax.core.operands import Keep, Operands, Result
from pasa_jax.core.prepare import Plan
from pasa_jax.implementations import lax as _lax

Array = jax.Array


class Forward(Protocol):
    """A forward pass, which gives the parts of a result that ``keep`` names."""

    def __call__(self, operands: Operands, mask: Mask, plan: Plan, *, keep: Keep) -> Result: ...


@dataclass(frozen=True)
class Core:
    """The static part of the call: which forward pass, with which plan, and whether with lse."""

    forward: Forward
    plan: Plan
    lse: bool


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(core: Core, operands: Operands, mask: Mask) -> tuple[Array, Array | None]:
    """Output [B, T, N, E] and log-sum-exp [B, T, N], both differentiable in reverse mode.

    The backward pass recomputes the scores from O(T + S) residuals, whatever computed the
    forward pass.
    """
    result = run(core.forward, core.plan, "lse" if core.lse else "out", operands, mask)
    return result.out, result.lse


def run(forward: Any, plan: Plan, keep: Keep, operands: Operands, mask: Mask, *rest: Any) -> Result:
    """A forward pass as one operation: outside of jit it is compiled once for each shape, not at
    each call, and jit is not off inside for who debugs without it."""
    with jax.disable_jit(False):
        return _compiled_forward(forward, plan, keep, operands, mask, *rest)


@partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _compiled_forward(
    forward: Any, plan: Plan, keep: Keep, operands: Operands, mask: Mask, *rest: Any
) -> Result:
    return forward(operands, mask, plan, *rest, keep=keep)


def _forward(core: Core, operands: Operands, mask: Mask) -> tuple[Any, Any]:
    result = run(core.forward, core.plan, "residuals", operands, mask)
    return (result.out, result.lse if core.lse else None), (operands, mask, result)


def _backward(
    core: Core, residuals: Any, cotangents: tuple[Array, Array | None]
) -> tuple[Operands, None]:
    operands, mask, result = residuals
    with jax.disable_jit(False):  # as in `run`
        found = _compiled_backward(core.plan, operands, mask, result, *cotangents)
    return jax.tree.map(_reduced, found, operands), None


@partial(jax.jit, static_argnums=0, inline=True)
def _compiled_backward(plan: Plan, operands: Operands, mask: Mask, *rest: Any) -> Operands:
    return _lax.backward(operands, mask, plan, *rest)


def _reduced(cotangent: Array, operand: Array) -> Array:
    """Summed over the manual mesh axes (`shard_map`) over which the operand is replicated."""
    varying, kept = (jax.typeof(x).manual_axis_type.varying for x in (cotangent, operand))
    axes = tuple(varying - kept)
    return jax.lax.psum(cotangent, axes) if axes else cotangent


attend.defvjp(_forward, _backward)
