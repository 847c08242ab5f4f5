"""The blocks of a causal T × S mask, and choices of some of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from numpy.typing import NDArray

from pasa_jax import BlockMask
from pasa_jax.sparse import _checks

Array = jax.Array


@dataclass(frozen=True)
class Grid:
    """The blocks of T queries and S keys, the last query at the last key.

    Arguments:
      length, keys: T and S, T ≤ S.
      block_size: queries of a block, and keys.
    """

    length: int
    keys: int
    block_size: int

    @staticmethod
    def of(q: Array, k: Array, block_size: int) -> Grid:
        """That of q [B, T, N, D] and k [B, S, K, D]."""
        return Grid(q.shape[1], k.shape[1], _checks.size("block_size", block_size))

    @property
    def offset(self) -> int:
        """The position of query 0 among the keys."""
        return self.keys - self.length

    @property
    def rows(self) -> int:
        return -(-self.length // self.block_size)

    @property
    def columns(self) -> int:
        return -(-self.keys // self.block_size)

    @property
    def query_ends(self) -> tuple[NDArray, NDArray]:
        """[rows, 1] int32: the positions of the first and the last query of each row of blocks."""
        first = np.arange(self.rows, dtype=np.int32)[:, None] * self.block_size
        last = np.minimum(first + self.block_size, self.length) - 1
        return first + self.offset, last + self.offset

    @property
    def key_ends(self) -> tuple[NDArray, NDArray]:
        """[1, columns] int32: the first and the last key of each column of blocks."""
        first = np.arange(self.columns, dtype=np.int32)[None] * self.block_size
        return first, np.minimum(first + self.block_size, self.keys) - 1

    @property
    def causal(self) -> NDArray:
        """[rows, columns] bool: a query of the block sees a key of it."""
        return self.key_ends[0] <= self.query_ends[1]

    @property
    def forced(self) -> NDArray:
        """[rows, columns] bool: block 0 and the blocks of the diagonal, which all choosers keep."""
        diagonal = self.causal & (self.key_ends[1] >= self.query_ends[0])
        return diagonal | (self.key_ends[0] == 0)

    def mask(self, kept: Array) -> BlockMask:
        """The mask that shows the blocks ``kept`` [B|1, N|1, rows, columns] bool, causal ones."""
        kinds = jnp.where(kept & self.causal, jnp.int8(2), jnp.int8(0))
        return BlockMask.from_kinds(kinds, (self.length, self.keys), self.block_size)

    def cover(self, mass: Array, threshold: ArrayLike) -> Array:
        """The fewest blocks of each row that hold ``threshold`` of its mass, the forced ones first.

        Arguments:
          mass: [..., rows, columns] float32, not negative.

        Returns:
          bool of its shape.
        """
        forced = jnp.broadcast_to(jnp.asarray(self.forced), mass.shape)
        mass = jnp.where(self.causal, mass, jnp.zeros_like(mass))
        order = jnp.argsort(jnp.where(forced, -jnp.inf, -mass), axis=-1, stable=True)
        largest = jnp.take_along_axis(mass, order, axis=-1)
        reached = jnp.cumsum(largest, axis=-1)
        before = jnp.pad(reached[..., :-1], [(0, 0)] * (mass.ndim - 1) + [(1, 0)])
        needed = (before < threshold * reached[..., -1:]) & (largest > 0)
        back = jnp.argsort(order, axis=-1)
        return forced | jnp.take_along_axis(needed, back, axis=-1)


def by_head(program: Callable[[Array, Array], Any], q: Array, k: Array) -> Any:
    """``program(q [T, D], k [S, D])`` in float32 of each query head, one after another.

    Returns:
      What it returns, leaves [B, N, ...].
    """
    batch, _, heads, _ = q.shape
    groups = heads // k.shape[2]

    def one(index: Array) -> Any:
        b, h = index // heads, index % heads
        return program(_head(q, b, h), _head(k, b, h // groups))

    out = lax.map(one, jnp.arange(batch * heads, dtype=jnp.int32))
    return jax.tree.map(lambda x: x.reshape(batch, heads, *x.shape[1:]), out)


def _head(x: Array, b: Array, h: Array) -> Array:
    """Head h of batch entry b of x [B, L, N, D], float32 [L, D]."""
    entry = lax.dynamic_index_in_dim(x, b, 0, keepdims=False)
    return lax.dynamic_index_in_dim(entry, h, 1, keepdims=False).astype(jnp.float32)
