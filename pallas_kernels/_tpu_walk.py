"""The tiles of one program on a TPU, read out of refs to VMEM."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels._float16 import from_bits
from pallas_kernels._tpu_inputs import LANES, padded
from pallas_kernels._tpu_lists import TileList
from pallas_kernels._tpu_tiles import TileWalk
from pasa_jax.core import tile
from pasa_jax.core.mask import Index, KeyRange, Mask, div, maximum, minimum
from pasa_jax.core.operands import Operands
from pasa_jax.core.plan import Plan
from pasa_jax.core.target import find_target

Array = jax.Array
Ref = Any

# Rows of a matrix operand that holds a single row: no vector of 16-bit numbers is shorter.
MATRIX_ROWS = 16


# The share of VMEM that a program may use. XLA has arrays of its own in the rest. The compiler is
# given no more than the call needs, and some for registers that do not fit.
_VMEM_SHARE = 0.75


# So many key tiles of a head are gone through without a list.
_FEW_TILES = 4


# How many scores the straight-line bodies of one kernel may compute: they cost compile time.
STRAIGHT_SCORES = 12 * 1024 * 1024


# Products below this stay in float32 even for a key that its block's mean was taken off.
_LARGEST_PRODUCT = 2.0**126


@dataclass(frozen=True)
class Specs:
    """Grid, blocks and memory of one call, derived from its schedule.

    Arguments:
      heads, groups: K and G.
      block_q: positions of a query tile: the whole of T, or a multiple of 128, the lanes in which
        row statistics leave the kernel.
      tiles: query tiles of one program.
      programs: of one head.
      block_kv, key_tiles: keys of a tile, and how many tiles a head has.
      chunk_tiles: key tiles that lie in VMEM at once: all of a head, if they fit.
      listed: whether the fourth axis of the grid goes through lists of key tiles, one at a time,
        instead of through all chunks of the keys.
      transposed: whether rows lie along lanes. The rows of each query head must then fill whole
        vectors, or be the only ones, and more than one: Mosaic refuses a product with one column.
    """

    heads: int
    groups: int
    block_q: int
    block_kv: int
    tiles: int
    programs: int
    key_tiles: int
    chunk_tiles: int
    listed: bool
    transposed: bool
    bytes: int

    @staticmethod
    def of(o: Operands, mask: Mask, plan: Plan) -> Specs:
        (_, length, heads, _), kv_heads = o.query.shape, o.key.shape[2]
        groups = heads // kv_heads
        block_q = -(-max(1, plan.schedule.block_q // groups) // LANES) * LANES
        block_q = length if length <= block_q else block_q
        # On chips with the narrower matrix unit the two products cost more in this orientation.
        wide_matrix = find_target(plan.schedule.target).matrix_columns > LANES
        tiles = min(plan.schedule.tiles_per_program, -(-length // block_q))
        block_kv = plan.schedule.block_kv
        key_tiles = chunk_tiles = -(-mask.key_length // block_kv)
        bytes_of = partial(_bytes, o, mask, plan, groups * block_q)
        listed = mask.listed and (mask.kinds is not None or key_tiles > _FEW_TILES)
        if listed:
            tiles = chunk_tiles = 1
        if bytes_of(tiles, chunk_tiles) > vmem(plan):
            tiles = 1
        while bytes_of(tiles, chunk_tiles) > vmem(plan) and chunk_tiles > 1:
            chunk_tiles = -(-chunk_tiles // 2)
        return Specs(
            kv_heads,
            groups,
            block_q,
            block_kv,
            tiles,
            -(-length // (block_q * tiles)),
            key_tiles,
            chunk_tiles,
            listed,
            wide_matrix and (block_q % LANES == 0 or groups == 1 < block_q),
            bytes_of(tiles, chunk_tiles),
        )

    @property
    def rows(self) -> int:
        """Positions of one program."""
        return self.block_q * self.tiles

    @property
    def chunks(self) -> int:
        """Of a head's keys."""
        return -(-self.key_tiles // self.chunk_tiles)

    @property
    def in_parts(self) -> bool:
        """Whether the keys of a head come one part after another: in chunks, or by lists."""
        return self.listed or self.chunks > 1

    @property
    def query_tiles(self) -> int:
        """Of one head; the last program's may begin beyond T."""
        return self.programs * self.tiles


def vmem(plan: Plan) -> int:
    """Bytes of VMEM that a program may use."""
    return int(find_target(plan.schedule.target).memories["VMEM"] * _VMEM_SHARE)


def _bytes(
    o: Operands, mask: Mask, plan: Plan, tile_rows: int, tiles: int, chunk_tiles: int
) -> int:
    """Bytes of VMEM that a program wants.

    Arguments:
      tile_rows: of a query tile, all G query heads.
    """
    size, e = o.query.shape[3], o.value.shape[3]
    rows, keys = tile_rows * tiles, chunk_tiles * plan.schedule.block_kv
    item = o.query.dtype.itemsize
    wide = [padded(rows, size) * item, padded(keys, size) * item, padded(keys, e) * item]
    wide += [padded(rows, e) * 4]
    for x in (o.bias, mask.array):
        if x is not None:
            r = rows if x.shape[2] > 1 else o.query.shape[2] // o.key.shape[2]
            wide.append(padded(r, keys if x.shape[3] > 1 else 1) * x.dtype.itemsize)
    if plan.precision.eight_bits:
        wide += [padded(keys, size), padded(keys, 1) * 4]
    scores = plan.schedule.unroll * padded(tile_rows, plan.schedule.block_kv) * (4 + 4)
    state = 3 * padded(tile_rows, e) * 4 + 4 * padded(tile_rows, 1) * 4
    return 2 * sum(wide) + scores + state  # blocks are double-buffered


def places_of(specs: Specs, mask: Mask, list_shape: Any) -> dict[str, Any]:
    """Which blocks a program of the grid (batch, key head, query tiles, part of the keys) reads.

    Arguments:
      list_shape: of the `TileList` whose numbers an index map is given as its last argument, if
        there is one.
    """

    def keys(b: Array, h: Array, i: Array, c: Array, *numbers: Ref) -> Any:
        """The chunk that a program reads: of those that its mask skips by position, the nearest
        that it does not skip, which is there already; or the next in its list.
        """
        if specs.listed:
            return TileList(numbers[0], list_shape).tile(b, h, i, c)
        if specs.chunks == 1:
            return 0
        by_position = replace(mask, query_lengths=None, key_lengths=None)
        if mask.causal_alignment == "bottom_right":  # where lengths move the diagonal
            return c
        start = i * specs.block_q
        seen = by_position.key_range(start, start + specs.block_q, specs.block_kv)
        last = div(maximum(seen.hi - 1, 0), specs.chunk_tiles)
        return minimum(maximum(c, div(seen.lo, specs.chunk_tiles)), last)

    return {
        "b": lambda b, *_: b,
        "k": lambda b, h, *_: h,
        "rows": lambda b, h, i, *_: i,
        "keys": keys,
    }


@dataclass(frozen=True, kw_only=True)
class RefWalk(TileWalk):
    """One query tile of a program.

    The last key tile may reach beyond the keys, and the last query tile beyond the queries.

    Arguments:
      offset: where the query tile starts in the program's block, if that holds several.
      largest_key: ref [1, D], the largest magnitude in each channel of the keys that `key` gave;
        None where nobody asks for it.
      kappa: ref [blocks, D] float32, κ of every key tile, or None.
      codes: the keys less κ in 8 bits, where products have 8 bits: refs [S, D] int8 and [1, S]
        float32 ([S, 1] where tiles are transposed).
      chunk, chunk_tiles: which chunk of keys the refs hold, and of how many tiles.
    """

    offset: int | None
    largest_key: Ref | None
    kappa: Ref | None
    codes: tile.Codes | None = None
    chunk: Index = 0
    chunk_tiles: int = 0

    def keys_at(self, j: Index) -> Any:
        """The slice of tile j in the refs; a Python slice where they hold only one tile."""
        if self.chunk_tiles == 1:
            return slice(None)
        return pl.ds((j - self.chunk * self.chunk_tiles) * self.block_kv, self.block_kv)

    def key_range(self, start: Index) -> KeyRange:
        """The key tiles of the chunk that the rows at ``start`` see."""
        whole = super().key_range(start)
        if isinstance(self.chunk, int):  # there is only one
            return whole
        lo = self.chunk * self.chunk_tiles
        return KeyRange(*(minimum(maximum(x, lo), lo + self.chunk_tiles) for x in whole))

    def static_starts(self) -> list[int] | None:
        """Where each query tile starts, if each gets code of its own, with its key tiles static.

        None: all programs share their code, because query tiles visit the same key tiles, or
        because so much code would take too long to compile.
        """
        starts = list(range(0, self.mask.query_length, self.block_q))
        ranges = [self.key_range(start) for start in starts]
        if not all(isinstance(x, int) for r in ranges for x in r) or len(set(ranges)) == 1:
            return None
        scores = sum(r.hi - r.lo for r in ranges) * self.groups * self.block_q * self.block_kv
        return starts if scores <= STRAIGHT_SCORES else None

    def absorb_tile(
        self,
        start: Index,
        j: Index,
        asks: Array | None,
        query: tile.QueryTile,
        carry: tuple[tile.State, Array],
    ) -> tuple[tile.State, Array]:
        """``carry`` after key tile j, for the rows at ``start``.

        Arguments:
          asks: as in `Listed`; None: the tile is seen whole.
        """
        fold = partial(self.fold, start, query)
        if asks is None:
            return fold(j, None, carry)
        return self.masked_step(j, partial(self.seen, start, asks=asks), fold, carry)

    def query(self, start: Index) -> tile.QueryTile:
        q = from_bits(self.refs.query[0, 0, :, self.own_rows])
        q = q.reshape(-1, q.shape[-1])
        beyond = self.mask.query_length % self.block_q != 0
        if beyond or self.mask.query_lengths is not None:
            row = self.position_column(start)
            q = tile.zero_unusable(q, row < self.mask.valid_queries())
        scale = self.refs.scale[0].astype(self.numerics.product)
        return tile.query_tile(q, scale, None, self.numerics)

    def rows_at(self, start: Index) -> Any:
        return self.own_rows

    @property
    def own_rows(self) -> slice:
        """The rows of the query tile in the program's block."""
        if self.offset is None:
            return slice(None)
        return slice(self.offset, self.offset + self.block_q)

    def key(self, j: Index, value_gain: Array | None = None) -> tile.KeyTile:
        assert value_gain is None  # the lax walk repairs calls that would need one
        k, v = self.raw_keys(j)
        kappa = None
        if self.numerics.storage.uses_kappa or self.numerics.centred:
            assert self.kappa is not None
            rows = (MATRIX_ROWS, k.shape[1])
            kappa = jnp.broadcast_to(self.kappa[pl.ds(j, 1)].astype(self.query_type), rows)
        usable = self.usable(j)
        if self.largest_key is not None:
            in_use = k if usable is None else tile.zero_unusable(k, usable)
            self.largest_key[...] = jnp.maximum(self.largest_key[...], self.largest(in_use))
        if self.codes is None:
            return tile.key_tile(k, v, usable, self.numerics, kappa=kappa)
        (codes, scale), at = self.codes, self.keys_at(j)
        scale = scale[at] if self.transposed else scale[:, at]
        return tile.key_tile(codes[at], v, usable, self.numerics, kappa=kappa, scale=scale)

    @property
    def query_type(self) -> jnp.dtype:
        """Of the rows, as `query` has them."""
        dtype = jnp.dtype(self.refs.query.dtype)
        return jnp.dtype(jnp.float32) if dtype == jnp.uint16 else dtype

    def raw_keys(self, j: Index) -> tuple[Array, Array]:
        """[n, D] and [n, E] keys and values of tile j as they are."""
        at = self.keys_at(j)
        return from_bits(self.refs.key[0, 0, at]), from_bits(self.refs.value[0, 0, at])

    def largest(self, x: Array) -> Array:
        """[1, D] the largest magnitude in each channel of x [L, D]."""
        if str(x.dtype) not in find_target(self.plan.schedule.target).vector_types:
            x = x.astype(jnp.float32)
        most, least = (f(x, axis=0, keepdims=True) for f in (jnp.max, jnp.min))
        return jnp.maximum(most.astype(jnp.float32), -least.astype(jnp.float32))

    def in_range(self, query: tile.QueryTile) -> Array:
        """[1, 1] bool: whether no product with the keys seen so far, shifted or not, and no sum in
        it can have left float32.
        """
        assert self.largest_key is not None
        products = self.largest(query.q) * self.largest_key[...]
        bound = jnp.sum(products * jnp.maximum(jnp.abs(query.gain), 1), axis=1, keepdims=True)
        return bound < _LARGEST_PRODUCT

    def sinks(self) -> Array | None:
        if self.refs.sinks is None:
            return None
        first = self.head * self.groups
        return self.per_head([self.refs.sinks[first + g] for g in self._heads])
