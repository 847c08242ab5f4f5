"""The tiles of one program on a GPU, loaded through Triton's pointers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pasa_jax.core import tile
from pasa_jax.core.mask import Index, div
from pasa_jax.core.operands import Operands
from pasa_jax.core.plan import Plan
from pasa_jax.core.walk import Walk

Array = jax.Array
Ref = Any


# Triton computes product·gain − maximum with a single rounding. Up to this score that is only more
# exact; beyond, a row's largest score may be far from its own maximum.
LARGEST_SCORE = 2.0**24


# Bound on a product that leaves float32 room for sums of it.
_LARGEST_PRODUCT = 2.0**126


def side(n: int) -> int:
    """The side of a tile that holds n. Triton's are powers of two, at least 16 in a product."""
    return max(16, pl.next_power_of_2(n))


@dataclass(frozen=True)
class Specs:
    """Grid and block sizes of one call, derived from its schedule.

    Arguments:
      block_q, block_kv: positions and keys of a tile.
      size, value_size: D and E, and `padded_size` and `padded_value` rounded up to powers of two,
        as Triton's tiles must be.
    """

    block_q: int
    block_kv: int
    query_tiles: int
    size: int
    value_size: int
    padded_size: int
    padded_value: int

    @staticmethod
    def of(o: Operands, plan: Plan) -> Specs:
        length = o.query.shape[1]
        block_q = plan.schedule.block_q
        return Specs(
            block_q,
            plan.schedule.block_kv,
            -(-length // block_q),
            size := o.query.shape[-1],
            value_size := o.value.shape[-1],
            side(size),
            side(value_size),
        )

    def padded(self, n: int, axis: str) -> int:
        """Length n of an axis, padded to whole tiles; "1" marks one that may be broadcast."""
        tiles = {
            "rows": self.block_q,
            "keys": self.block_kv,
            "size": self.padded_size,
            "value": self.padded_value,
        }
        unit = 1 if n == 1 and axis.endswith("1") else tiles.get(axis.removesuffix("1"), 1)
        return -(-n // unit) * unit


class Inputs(NamedTuple):
    """The kernel's inputs: arrays outside, refs of one program's batch entry and head inside."""

    query: Any  # [B, T, N, D]                                      inside: [T, D]
    key: Any  # [B, S, K, D], shifted                               [S, D]
    value: Any  # [B, S, K, E]                                      [S, E]
    scale: Any  # [1]                                               [1]
    largest_key: Any = None  # [B, K] of the keys as they are       []
    kappa: Any = None  # [B, tiles, K, D]                           [tiles, D]
    value_gain: Any = None  # [B, K, query tiles]                   [query tiles]
    guard: Any = None  # tile.Guard of [B, T, N]                    [T]
    bias: Any = None  # [B|1, N|1, T|1, S|1]                        [T|1, S|1]
    sinks: Any = None  # [N]                                        []
    array: Any = None  # [B|1, N|1, T|1, S|1] int8                  [T|1, S|1]
    query_segments: Any = None  # [B, T]                            [T]
    key_segments: Any = None  # [B, S]                              [S]
    query_lengths: Any = None  # [B]                                []
    key_lengths: Any = None  # [B]                                  []


def block_specs(x: Inputs, specs: Specs) -> Inputs:
    """The arrays of a program's batch entry and head, each as one block.

    In Triton a ref is a pointer. The arrays are padded to whole tiles, so that any tile may be
    sliced; loads and stores are masked.
    """
    groups = x.query.shape[2] // x.key.shape[2]

    def at(array: Array | None, *axes: str) -> Any:
        """``axes``: "b" batch, "n" or "k" heads, or one of the names in `Specs.padded`."""
        if array is None:
            return None
        block = tuple(
            None if axis in "bnk" else specs.padded(n, axis)
            for n, axis in zip(array.shape, axes, strict=True)
        )
        several = [n > 1 for n in array.shape]

        def index(i: Array, n: Array, b: Array) -> tuple[Any, ...]:
            del i
            place = {"b": b, "n": n, "k": lax.div(n, jnp.int32(groups))}
            return tuple(
                place.get(axis, 0) if many else 0 for axis, many in zip(axes, several, strict=True)
            )

        return pl.BlockSpec(block, index)

    tiled = ("b", "n", "rows1", "keys1")
    guard = None if x.guard is None else tile.Guard(*(at(y, "b", "rows", "n") for y in x.guard))
    return Inputs(
        query=at(x.query, "b", "rows", "n", "size"),
        key=at(x.key, "b", "keys", "k", "size"),
        value=at(x.value, "b", "keys", "k", "value"),
        scale=at(x.scale, "one"),
        largest_key=at(x.largest_key, "b", "k"),
        kappa=at(x.kappa, "b", "tiles", "k", "size"),
        value_gain=at(x.value_gain, "b", "k", "tiles"),
        guard=guard,
        bias=at(x.bias, *tiled),
        sinks=at(x.sinks, "n"),
        array=at(x.array, *tiled),
        query_segments=at(x.query_segments, "b", "rows"),
        key_segments=at(x.key_segments, "b", "keys"),
        query_lengths=at(x.query_lengths, "b"),
        key_lengths=at(x.key_lengths, "b"),
    )


@dataclass(frozen=True, kw_only=True)
class PointerWalk(Walk):
    """One program: its tiles are loaded through refs, with zeros outside the arrays."""

    refs: Inputs
    specs: Specs

    def load(self, ref: Ref, row: tuple[Index, int, int], column: tuple[Index, int, int]) -> Array:
        """A tile of ref [L|1, W|1]; zeros outside the array.

        Arguments:
          row, column: where it starts, its length, and the array's length.
        """
        slices, shape, inside = [], [], None
        for axis, (at, count, total) in enumerate((row, column)):
            if ref.shape[axis] == 1:
                at, count, total = 0, 1, 1
            slices.append(pl.ds(jnp.int32(at), count))  # of one type, under x64 too
            shape.append(count)
            if total % count:
                along = (count, 1) if axis == 0 else (1, count)
                within = at + lax.broadcasted_iota(jnp.int32, along, axis) < total
                inside = within if inside is None else inside & within
        view = ref.at[tuple(slices)]
        if inside is None:
            return plgpu.load(view)
        return plgpu.load(view, mask=jnp.broadcast_to(inside, shape), other=0)

    def column(self, ref: Ref, start: Index, count: int, total: int) -> Array:
        """[count] of ref [L] at ``start``; zeros outside the array's ``total``."""
        view = ref.at[pl.ds(start, count)]
        if total % count == 0:
            return plgpu.load(view)
        inside = start + lax.broadcasted_iota(jnp.int32, (count,), 0) < total
        return plgpu.load(view, mask=inside, other=0)

    def rows_at(self, start: Index) -> tuple[Index, int, int]:
        return start, self.block_q, self.mask.query_length

    def keys_at(self, j: Index) -> tuple[Index, int, int]:
        return self.key_start(j), self.block_kv, self.mask.key_length

    def key_start(self, j: Index) -> Index:
        return j * self.block_kv

    def query(self, start: Index) -> tile.QueryTile:
        size = (0, self.specs.padded_size, self.specs.size)
        q = self.load(self.refs.query, self.rows_at(start), size)
        if self.mask.query_lengths is not None:
            q = tile.zero_unusable(q, self.in_use(start))
        guard = None
        if self.refs.guard is not None:
            columns = tile.Guard(*(self.column(x, *self.rows_at(start)) for x in self.refs.guard))
            guard = columns._replace(
                down=columns.down[:, None], rest=columns.rest[:, None], gain=columns.gain[:, None]
            )
        scale = self.refs.scale[0].astype(self.numerics.product)
        query = tile.query_tile(q, scale, guard, self.numerics)
        if self.refs.value_gain is None:
            return query
        return query._replace(value_gain=self.refs.value_gain[div(start, self.block_q)])

    def key(self, j: Index, value_gain: Array | None = None) -> tile.KeyTile:
        specs, size = self.specs, (0, self.specs.padded_size, self.specs.size)
        k = self.load(self.refs.key, self.keys_at(j), size)
        v = self.load(self.refs.value, self.keys_at(j), (0, specs.padded_value, specs.value_size))
        if value_gain is not None:
            v = v * value_gain.astype(v.dtype)
        kappa = None
        if self.refs.kappa is not None:
            kappa = self.load(self.refs.kappa, (j, 1, 1), size)
            kappa = jnp.broadcast_to(kappa, (side(1), specs.padded_size))
        return tile.KeyTile(k, v, None, kappa)

    def bias(self, start: Index, j: Index) -> Array | None:
        return None if self.refs.bias is None else self._tile_of(self.refs.bias, start, j)

    def _tile_of(self, ref: Ref, start: Index, j: Index) -> Array:
        x = self.load(ref, self.rows_at(start), self.keys_at(j))
        return jnp.broadcast_to(x, (self.block_q, self.block_kv))

    def array(self, start: Index, j: Index) -> Array | None:
        seen = None
        if self.refs.query_segments is not None:
            q = self.column(self.refs.query_segments, *self.rows_at(start))
            k = self.column(self.refs.key_segments, *self.keys_at(j))
            seen = q[:, None] == k[None, :]
        if self.refs.array is not None:
            array = self._tile_of(self.refs.array, start, j).astype(jnp.int32) != 0
            seen = array if seen is None else seen & array
        return seen

    def sinks(self) -> Array | None:
        if self.refs.sinks is None:
            return None
        return jnp.full((self.block_q,), self.refs.sinks[...])

    def in_range(self, query: tile.QueryTile, m: Array, l: Array) -> Array:  # noqa: E741
        """[] bool: whether all products stay in float32 and all scores below `LARGEST_SCORE`."""
        fine = jnp.max(jnp.where(l > 0, jnp.abs(m), jnp.zeros_like(m))) < LARGEST_SCORE
        if self.refs.largest_key is None:
            return fine
        largest = jnp.max(jnp.abs(query.q.astype(jnp.float32))) * self.refs.largest_key[...]
        gain = jnp.maximum(jnp.abs(self.refs.scale[0]) * self.numerics.unit, 1)
        return fine & (largest * gain * query.q.shape[1] < _LARGEST_PRODUCT)
