"""What both passes on a TPU read for one tile, out of refs to VMEM and SMEM."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._common import as_given
from pallas_kernels._tpu_inputs import Inputs
from pasa_jax.core import tile
from pasa_jax.core.mask import Index
from pasa_jax.core.mods import Data, Place
from pasa_jax.core.operands import Factors
from pasa_jax.core.walk import Walk

Array = jax.Array
Ref = Any


@dataclass(frozen=True, kw_only=True)
class TileWalk(Walk):
    """A walk whose tiles are read out of refs.

    Arguments:
      entry, head: the batch entry and the key head.
    """

    refs: Inputs
    entry: Index
    head: Index

    @abstractmethod
    def rows_at(self, start: Index) -> Any:
        """The rows of the query tile at ``start`` in the refs."""

    @abstractmethod
    def keys_at(self, j: Index) -> Any:
        """The keys of tile j in the refs."""

    def key_start(self, j: Index) -> Index:
        return j * self.block_kv

    def usable(self, j: Index) -> Array | None:
        """[n, 1] bool: False beyond the last key; None where no tile reaches beyond it."""
        if self.mask.key_length % self.block_kv == 0:
            return None
        row = self.key_start(j) + lax.broadcasted_iota(jnp.int32, (self.block_kv, 1), 0)
        return row < self.mask.key_length

    # What a mask shows.

    def array(self, start: Index, j: Index, asks: Array | None = None) -> Array | None:
        conditions: list[Array] = []
        if self.refs.query_segments is not None:
            q, k = self._sides(self.refs.query_segments, self.refs.key_segments, start, j)
            conditions.append(self._for_groups(q == k))
        if self.refs.query_positions is not None:
            q, k = self._sides(self.refs.query_positions, self.refs.key_positions, start, j)
            conditions.append(self._for_groups(self.mask.by_position(q, k)))
        if self.refs.array is not None:
            conditions.append(self._tile_of(self.refs.array, start, j) != 0)
        mods = self.mask.mods
        if mods is not None and mods.mask_mod is not None:
            place, data = self._place(start, j), self._data(start, j)
            conditions.append(mods.shows(mods.mask_mod, place, data))
        if mods is not None and mods.block_mod is not None and asks is not None:
            place, data = self._place(start, j), self._data(start, j)
            conditions.append(mods.shows(mods.block_mod, place, data) | ~asks)
        seen = None
        for x in conditions:
            seen = x if seen is None else seen & x
        return seen

    def _sides(self, query: Ref, key: Ref, start: Index, j: Index) -> tuple[Array, Array]:
        """What belongs to the rows and to the keys of a tile, of numbers of the batch entry; they
        broadcast to [G, block_q, n], or to [n, block_q] where tiles are transposed.
        """
        if self.transposed:
            return query[0, :, self.rows_at(start)], key[0, self.keys_at(j)]
        return query[0, self.rows_at(start)], key[0, :, self.keys_at(j)]

    def _for_groups(self, x: Array) -> Array:
        """[R, n] of x [block_q, n], which all query heads share; or [n, R] of [n, block_q]."""
        if self.transposed:
            x = jnp.broadcast_to(x, (self.block_kv, self.block_q))
            return x if self.groups == 1 else jnp.tile(x, (1, self.groups))
        return self._stacked(jnp.broadcast_to(x[None], self._shape))

    # What the functions of the caller are asked.

    def modified(self, start: Index, j: Index) -> tile.Modify | None:
        mods = self.mask.mods
        if mods is None or mods.score_mod is None:
            return None
        place, data = self._place(start, j), self._data(start, j)
        return lambda score: mods.scored(score, place, data)

    def _place(self, start: Index, j: Index) -> Place:
        """Where the elements of a tile stand."""
        shape, axis = ((self.block_kv, 1), 0) if self.transposed else ((1, self.block_kv), 1)
        column = self.key_start(j) + lax.broadcasted_iota(jnp.int32, shape, axis)
        b = jnp.full((1, 1), self.refs.entries[self.entry])
        h = self.per_head([self.refs.heads[self.head * self.groups + g] for g in self._heads])
        return Place(b, h, self.positions(start), column)

    def _data(self, start: Index, j: Index) -> Data:
        """What the functions are given at a tile."""
        assert self.mask.mods is not None
        data = Data(
            tuple(self._of_rows(x, start) for x in self.refs.query_data),
            tuple(self._of_keys(x, j) for x in self.refs.key_data),
            tuple(self.per_head(self._head_numbers(x)) for x in self.refs.head_data),
        )
        return as_given(self.mask.mods, data)

    @property
    def _heads(self) -> range:
        return range(self.groups)

    def _head_numbers(self, ref: Ref) -> list[Array]:
        """The numbers of the query heads, of a ref [B|1, N|1] in SMEM."""
        b = self.entry if ref.shape[0] > 1 else 0
        first = self.head * self.groups
        return [ref[b, first + g if ref.shape[1] > 1 else 0] for g in self._heads]

    def per_head(self, numbers: list[Array]) -> Array:
        """[R, 1], or [1, R], of one number for each query head."""
        shape, axis = ((1, self.block_q), 1) if self.transposed else ((self.block_q, 1), 0)
        columns = [jnp.full(shape, x) for x in numbers]
        return jnp.concatenate(columns, axis=axis) if len(columns) > 1 else columns[0]

    def _of_rows(self, ref: Ref, start: Index) -> Array:
        """[R, 1], or [1, R], of a block [1, 1, G|1, rows, 1], or [1, 1, G|1, 1, rows]."""
        axis, rows = int(self.transposed), self.rows_at(start)
        at = (slice(None), rows) if self.transposed else (rows, slice(None))
        columns = [ref[(0, 0, g if ref.shape[2] > 1 else 0, *at)] for g in self._heads]
        return jnp.concatenate(columns, axis=axis) if len(columns) > 1 else columns[0]

    def _of_keys(self, ref: Ref, j: Index) -> Array:
        """[1, n], or [n, 1], of a block [1, 1, G|1, 1, keys], or [1, 1, G|1, keys, 1]; with R in
        the place of 1 where query heads differ.
        """
        keys = self.keys_at(j)
        at = (keys, slice(None)) if self.transposed else (slice(None), keys)
        columns = [ref[(0, 0, g, *at)] for g in range(ref.shape[2])]
        if len(columns) == 1:
            return columns[0]
        wide = (self.block_kv, self.block_q) if self.transposed else (self.block_q, self.block_kv)
        return jnp.concatenate(
            [jnp.broadcast_to(x, wide) for x in columns], axis=1 if self.transposed else 0
        )

    # What is added to the scores.

    def bias(self, start: Index, j: Index) -> Array | None:
        return None if self.refs.bias is None else self._tile_of(self.refs.bias, start, j)

    def low_rank(self, start: Index, j: Index) -> Array | None:
        if self.refs.factors is None:
            return None
        of = self.factors(start, j)
        products = [self.outer(of.q, of.k, g) * scale for g, scale in enumerate(of.scale)]
        axis = 1 if self.transposed else 0
        return jnp.concatenate(products, axis=axis) if len(products) > 1 else products[0]

    def factors(self, start: Index, j: Index) -> Factors:
        """The factors of a tile: [R, block_q] and [R, n] of each query head, or of all together,
        and the number of each.
        """
        factors = self.refs.factors
        q, k = (
            [x[0, 0, g, :, at] for g in range(x.shape[2])]
            for x, at in ((factors.q, self.rows_at(start)), (factors.k, self.keys_at(j)))
        )
        return Factors(q, k, self._head_numbers(factors.scale))

    def outer(self, q: list[Array], k: list[Array], g: int) -> Array:
        """[block_q, n], or [n, block_q], the product of the factors of query head g."""
        of_q, of_k = (x[min(g, len(x) - 1)] for x in (q, k))
        rows, keys = ([x[r : r + 1] for r in range(len(x))] for x in (of_q, of_k))
        return tile.outer(rows, keys, self.numerics)

    @property
    def _shape(self) -> tuple[int, int, int]:
        return self.groups, self.block_q, self.block_kv

    def _tile_of(self, ref: Ref, start: Index, j: Index) -> Array:
        """[R, n], or [n, R], of a block [1, 1, G|1, rows|1, keys|1]; integers as int32."""
        rows = self.rows_at(start) if ref.shape[3] > 1 else slice(None)
        x = ref[0, 0, :, rows, self.keys_at(j) if ref.shape[4] > 1 else slice(None)]
        if not jnp.issubdtype(x.dtype, jnp.floating):
            x = x.astype(jnp.int32)
        found = self._stacked(jnp.broadcast_to(x, self._shape))
        return found.T if self.transposed else found

    def _stacked(self, x: Array) -> Array:
        """[R, …] of [G, block_q, …]."""
        return x.reshape(-1, x.shape[-1])
