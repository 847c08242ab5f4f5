"""The gradients of what heads may share on a GPU: of factors, and of the functions' data.

A kernel leaves them for each query head, as rows or as keys; XLA sums them where heads share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels._common import floating
from pallas_kernels._gpu_inputs import Specs
from pasa_jax.core.mask import Mask
from pasa_jax.core.mods import Data
from pasa_jax.core.operands import Factors, Operands

Array = jax.Array


class Shared(NamedTuple):
    """Float32, None where there is none: of arrays [B, N, …]; of one tile without B and N.

    Arguments:
      factors: of [R, T], [R, S], and of the number [T], to be summed.
      data: of the floating leaves, queries' [T], keys' [S], and heads' [T], to be summed.
    """

    factors: Any = None
    data: Any = None

    @property
    def of_rows(self) -> Shared:
        """What belongs to rows."""
        factors, data = self.factors, self.data
        return Shared(
            None if factors is None else factors._replace(k=None),
            None if data is None else data._replace(key=_nothing(data.key)),
        )

    @property
    def of_keys(self) -> Shared:
        """What belongs to keys."""
        factors, data = self.factors, self.data
        return Shared(
            None if factors is None else Factors(None, factors.k, None),
            None if data is None else Data(_nothing(data.query), data.key, _nothing(data.head)),
        )

    @staticmethod
    def joined(rows: Shared, keys: Shared) -> Shared:
        """The two parts as one."""
        factors, data = rows.factors, rows.data
        return Shared(
            None if factors is None else factors._replace(k=keys.factors.k),
            None if data is None else data._replace(key=keys.data.key),
        )

    @staticmethod
    def shapes(o: Operands, mask: Mask, shape: Callable[..., Any]) -> Shared:
        """The shapes of the arrays, each made by ``shape``.

        Arguments:
          mask: of `without_arrays`.
        """
        (b, t, n, _), s, factors, data = o.query.shape, o.key.shape[1], None, None

        def each(leaves: Any, length: int) -> Any:
            return tuple(shape((b, n, length), jnp.float32) for _ in leaves)

        if o.factors is not None:
            r = o.factors.q.shape[2]
            lengths = ((r, t), (r, s), (t,))
            factors = Factors(*(shape((b, n, *x), jnp.float32) for x in lengths))
        if mask.mods is not None and mask.mods.score_mod is not None:
            of = mask.mods.data
            data = floating(Data(each(of.query, t), each(of.key, s), each(of.head, t)), of)
        return Shared(factors, data)

    def blocks(self, specs: Specs, *, groups: int | None = None) -> Shared:
        """The blocks of arrays of these shapes: of a query head, or of the ``groups`` of a key
        head.
        """

        def block(x: Any, axis: str) -> pl.BlockSpec:
            sides = (None, groups, *(specs.padded(n, "rank") for n in x.shape[2:-1]))
            sides = (*sides, specs.padded(x.shape[-1], axis))
            return pl.BlockSpec(sides, lambda i, h, b: (b, h, 0, 0)[: len(sides)])

        rows, keys = (
            jax.tree.map(lambda x: block(x, axis), part)  # noqa: B023
            for part, axis in ((self.of_rows, "rows"), (self.of_keys, "keys"))
        )
        return Shared.joined(rows, keys)

    def operands(self, like: Operands) -> tuple[Factors | None, Data]:
        """As the user lays them out."""

        def summed(x: Array, y: Array) -> Array:
            x = jnp.sum(x, axis=tuple(range(y.ndim, x.ndim)))
            axes = tuple(a for a in (0, 1) if y.shape[a] == 1)
            return jnp.sum(x, axis=axes, keepdims=True).astype(y.dtype)

        factors = None
        if like.factors is not None:
            factors = jax.tree.map(summed, self.factors, like.factors)
        if self.data is None:  # a mask's: nothing depends on them
            return factors, jax.tree.map(jnp.zeros_like, like.data)
        return factors, jax.tree.map(summed, self.data, like.data)


def _nothing(part: tuple[Any, ...]) -> tuple[None, ...]:
    return tuple(None for _ in part)
