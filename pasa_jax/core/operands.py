"""The arrays that an implementation is given, and the arrays that it returns."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pasa_jax.core.bits import take
from pasa_jax.core.mask import Index, pick

Array = jax.Array
# Which parts of a result are wanted: the output, its log-sum-exp too, or all that a gradient needs.
Wanted = Literal["out", "lse", "residuals"]


class Operands(NamedTuple):
    """The differentiable arrays of one call, in one layout. For one head, without B, N and K."""

    query: Array  # [B, T, N, D]                one head: [T, G, D]
    key: Array  # [B, S, K, D]                  one head: [S, D]
    value: Array  # [B, S, K, E]                one head: [S, E]
    bias: Array | None  # [B|1, N|1, T|1, S|1]  one head: [G|1, T|1, S|1]
    sinks: Array | None  # [N]                  one head: [G]
    scale: Array  # []

    def head(self, b: Index, h: Index) -> Operands:
        """The operands of batch entry ``b`` and key head ``h``."""
        groups = self.query.shape[2] // self.key.shape[2]
        bias = None
        if self.bias is not None:
            bias = pick(self.bias, b)
            if bias.shape[0] > 1:
                bias = lax.dynamic_slice_in_dim(bias, h * groups, groups)
        sinks = self.sinks
        if sinks is not None:
            sinks = lax.dynamic_slice_in_dim(sinks, h * groups, groups)
        return Operands(
            query=heads_of(self.query, b, h, groups),
            key=heads_of(self.key, b, h, 1)[:, 0],
            value=heads_of(self.value, b, h, 1)[:, 0],
            bias=bias,
            sinks=sinks,
            scale=self.scale,
        )


def heads_of(x: Array, b: Index, h: Index, groups: int) -> Array:
    """[B, L, H, …] -> [L, groups, …]: the heads that belong to key head ``h``."""
    return take(pick(x, b), h * groups, groups, 1)


def fold_bias(d_bias: Array, bias: Array | None) -> Array:
    """[B, K, G|1, T|1, S|1] -> the bias's own shape, summed where it is broadcast."""
    assert bias is not None
    full = d_bias.reshape(d_bias.shape[0], -1, *d_bias.shape[3:])
    axes = tuple(a for a in (0, 1) if bias.shape[a] == 1)
    return jnp.sum(full, axis=axes, keepdims=True)


class Result(NamedTuple):
    """What a forward pass returns, None where it is not wanted. For one head: [T, G, …]."""

    out: Array  # [B, T, N, E] in the inputs' type
    lse: Any = None  # [B, T, N] log-sum-exp, float32 (float64 for float64 inputs)
    # For the gradient: the two parts of the log-sum-exp (where scores are large, their sum has lost
    # the digits that matter), and the rounding error of the output, in the output's type.
    m: Any = None  # [B, T, N] in units of the guard
    l: Any = None  # noqa: E741  [B, T, N]
    remainder: Any = None  # [B, T, N, E]
    # [] bool: whether the lax walk computed it, in place of a kernel or after one; None on lax.
    by_lax: Any = None

    def only(self, wanted: Wanted) -> Result:
        """The parts that are ``wanted``."""
        if wanted == "residuals":
            return self
        return Result(self.out, self.lse if wanted == "lse" else None)
