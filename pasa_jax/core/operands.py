"""The arrays that an implementation is given, and the arrays that it returns."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pasa_jax.core.bits import pick, pick_heads, take
from pasa_jax.core.mask import Index
from pasa_jax.core.mods import Data

Array = jax.Array
# Which parts of a result are wanted: the output, its log-sum-exp too, or all that a gradient needs.
Wanted = Literal["out", "lse", "residuals"]


class Factors(NamedTuple):
    """A bias of low rank: scale · qᵀ·k, in float32 (float64 for float64 inputs).

    The rank is not the last axis, so that the numbers of a tile lie side by side. Of a tile q and k
    may be tuples of one array for each r.
    """

    q: Any  # [B|1, N|1, R, T]  one head: [G|1, R, T]
    k: Any  # [B|1, N|1, R, S]  one head: [G|1, R, S]
    scale: Any  # [B|1, N|1]      one head: [G|1]


class Operands(NamedTuple):
    """The differentiable arrays of one call, in one layout. For one head, without B, N and K."""

    query: Array  # [B, T, N, D]                one head: [T, G, D]
    key: Array  # [B, S, K, D]                  one head: [S, D]
    value: Array  # [B, S, K, E]                one head: [S, E]
    bias: Array | None  # [B|1, N|1, T|1, S|1]  one head: [G|1, T|1, S|1]
    sinks: Array | None  # [N]                  one head: [G]
    scale: Array  # []
    factors: Factors | None = None
    data: Data = Data()  # what the functions of the caller are given, as far as it is floating

    def head(self, b: Index, h: Index) -> Operands:
        """The operands of batch entry ``b`` and key head ``h``."""
        groups = self.query.shape[2] // self.key.shape[2]

        def of(x: Array) -> Array:
            return pick_heads(x, b, h, groups)

        sinks = self.sinks
        if sinks is not None:
            sinks = lax.dynamic_slice_in_dim(sinks, h * groups, groups)
        return Operands(
            query=heads_of(self.query, b, h, groups),
            key=heads_of(self.key, b, h, 1)[:, 0],
            value=heads_of(self.value, b, h, 1)[:, 0],
            bias=None if self.bias is None else of(self.bias),
            sinks=sinks,
            scale=self.scale,
            factors=jax.tree.map(of, self.factors),
            data=self.data.one_head(b, h, groups),
        )


def heads_of(x: Array, b: Index, h: Index, groups: int) -> Array:
    """[B, L, H, …] -> [L, groups, …]: the heads that belong to key head ``h``."""
    return take(pick(x, b), h * groups, groups, 1)


def fold_heads(x: Array, like: Array) -> Array:
    """[B, K, G|1, …] -> the shape of ``like`` [B|1, N|1, …], summed where it is broadcast."""
    full = x.reshape(x.shape[0], -1, *x.shape[3:])
    axes = tuple(a for a in (0, 1) if like.shape[a] == 1)
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
    # [B, T, N] m without a unit, where a result is of more keys than those of the call whose
    # gradient is asked for: then the lax walk puts it into the units of its own guard.
    whole: Any = None

    def only(self, wanted: Wanted) -> Result:
        """The parts that are ``wanted``."""
        if wanted == "residuals":
            return self
        return Result(self.out, self.lse if wanted == "lse" else None)
