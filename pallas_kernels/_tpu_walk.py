"""The tiles of one program on a TPU, read out of refs to VMEM."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._common import narrowed
from pallas_kernels._float16 import from_bits
from pasa_jax.core import tile
from pasa_jax.core.mask import Index, KeyRange, Mask, div, maximum, minimum
from pasa_jax.core.operands import Operands
from pasa_jax.core.plan import Plan
from pasa_jax.core.target import find_target
from pasa_jax.core.walk import Walk

Array = jax.Array
Ref = Any

LANES = 128
# Rows of a matrix operand that holds a single row: no vector of 16-bit numbers is shorter.
MATRIX_ROWS = 16


# The share of VMEM that a program may use. XLA has arrays of its own in the rest. The compiler is
# given no more than the call needs, and some for registers that do not fit.
_VMEM_SHARE = 0.75


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
    scores = plan.schedule.unroll * padded(tile_rows, plan.schedule.block_kv) * (4 + 4)
    state = 3 * padded(tile_rows, e) * 4 + 4 * padded(tile_rows, 1) * 4
    return 2 * sum(wide) + scores + state  # blocks are double-buffered


def padded(rows: int, columns: int) -> int:
    """How many numbers of 32 bits whole vectors hold, of a matrix that lies in them."""
    return -(-rows // 8) * 8 * -(-columns // LANES) * LANES


def grouped(x: Array, heads: int) -> Array:
    """[B, T, N, …] -> [B, K, G, T, …]."""
    x = jnp.swapaxes(x, 1, 2)
    return x.reshape(x.shape[0], heads, -1, *x.shape[2:])


def bias_per_head(bias: Array | None, heads: int) -> Array | None:
    """[B|1, K|1, G|1, T|1, S|1]; float16, which Mosaic refuses, as float32.

    The lowest number of float16 hides a key, and so must what it becomes.
    """
    bias = narrowed(bias)
    if bias is not None and bias.dtype == jnp.float16:
        hides = ~tile.shown_by(bias)
        bias = jnp.where(hides, jnp.float32(tile.lowest(jnp.float32)), bias.astype(jnp.float32))
    return per_head(bias, heads)


def per_head(x: Array | None, heads: int) -> Array | None:
    """[B|1, N|1, T|1, S|1] -> [B|1, K|1, G|1, T|1, S|1]."""
    if x is None:
        return None
    split = (1, 1) if x.shape[1] == 1 else (heads, -1)
    return x.reshape(x.shape[0], *split, *x.shape[2:])


class Inputs(NamedTuple):
    """The kernel's inputs: arrays [B, K, …] outside, refs of one program's blocks inside."""

    query: Any  # [B, K, G, T, D]
    key: Any  # [B, K, S, D]
    value: Any  # [B, K, S, E]
    scale: Any  # [1]
    bias: Any = None  # [B|1, K|1, G|1, T|1, S|1]
    sinks: Any = None  # [N]
    array: Any = None  # [B|1, K|1, G|1, T|1, S|1] int8
    query_segments: Any = None  # [B, T, 1]; transposed [B, 1, T]
    key_segments: Any = None  # [B, 1, S]; transposed [B, S, 1]
    query_lengths: Any = None  # [B]
    key_lengths: Any = None  # [B]
    todo: Any = None  # [B, K, query tiles] int32, 0 for tiles that are left out; None: all are done


def block_specs(x: Inputs, specs: Specs, mask: Mask) -> Inputs:
    keys = specs.chunk_tiles * specs.block_kv

    def chunk(i: Array, c: Array) -> Any:
        """The chunk that a program reads: of those that its mask skips by position, the nearest
        that it does not skip, which is there already.
        """
        if specs.chunks == 1:
            return 0
        by_position = replace(mask, query_lengths=None, key_lengths=None)
        if mask.causal_alignment == "bottom_right":  # where lengths move the diagonal
            return c
        start = i * specs.block_q
        seen = by_position.key_range(start, start + specs.block_q, specs.block_kv)
        last = div(maximum(seen.hi - 1, 0), specs.chunk_tiles)
        return minimum(maximum(c, div(seen.lo, specs.chunk_tiles)), last)

    def broadcast(x: Array | None) -> pl.BlockSpec | None:
        if x is None:
            return None
        block = (1, 1, x.shape[2])
        block += (specs.rows if x.shape[3] > 1 else 1, keys if x.shape[4] > 1 else 1)
        several = [int(n > 1) for n in x.shape]
        return pl.BlockSpec(
            block,
            lambda b, h, i, c: (
                b * several[0],
                h * several[1],
                0,
                i * several[3],
                chunk(i, c) * several[4],
            ),
        )

    def only(x: Array | None, spec: pl.BlockSpec) -> pl.BlockSpec | None:
        return None if x is None else spec

    def of_keys(x: Array) -> pl.BlockSpec:
        block = (1, 1, keys, x.shape[-1])
        return pl.BlockSpec(block, lambda b, h, i, c: (b, h, chunk(i, c), 0))

    if specs.transposed:
        query_segments = pl.BlockSpec((1, 1, specs.rows), lambda b, h, i, c: (b, 0, i))
        key_segments = pl.BlockSpec((1, keys, 1), lambda b, h, i, c: (b, chunk(i, c), 0))
    else:
        query_segments = pl.BlockSpec((1, specs.rows, 1), lambda b, h, i, c: (b, i, 0))
        key_segments = pl.BlockSpec((1, 1, keys), lambda b, h, i, c: (b, 0, chunk(i, c)))
    scalars = partial(only, spec=pl.BlockSpec(memory_space=pltpu.SMEM))

    return Inputs(
        query=pl.BlockSpec(
            (1, 1, specs.groups, specs.rows, x.query.shape[-1]), lambda b, h, i, c: (b, h, 0, i, 0)
        ),
        key=of_keys(x.key),
        value=of_keys(x.value),
        scale=scalars(x.scale),
        bias=broadcast(x.bias),
        sinks=scalars(x.sinks),
        array=broadcast(x.array),
        query_segments=only(x.query_segments, query_segments),
        key_segments=only(x.key_segments, key_segments),
        query_lengths=scalars(x.query_lengths),
        key_lengths=scalars(x.key_lengths),
        todo=scalars(x.todo),
    )


@dataclass(frozen=True, kw_only=True)
class RefWalk(Walk):
    """One query tile of a program: its tiles are read out of refs.

    The last key tile may reach beyond the keys, and the last query tile beyond the queries.

    Arguments:
      offset: where the query tile starts in the program's block, if that holds several.
      largest_key: ref [1, D], the largest magnitude in each channel of the keys that `key` gave;
        None where nobody asks for it.
      kappa: ref [blocks, D] float32, κ of every key tile, or None.
      chunk, chunk_tiles: which chunk of keys the refs hold, and of how many tiles.
    """

    refs: Inputs
    head: Index
    offset: int | None
    largest_key: Ref | None
    kappa: Ref | None
    chunk: Index = 0
    chunk_tiles: int = 0

    def key_start(self, j: Index) -> Index:
        return j * self.block_kv

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

    def query(self, start: Index) -> tile.QueryTile:
        q = from_bits(self.refs.query[0, 0, :, self.rows_at])
        q = q.reshape(-1, q.shape[-1])
        beyond = self.mask.query_length % self.block_q != 0
        if beyond or self.mask.query_lengths is not None:
            row = self.position_column(start)
            q = tile.zero_unusable(q, row < self.mask.valid_queries())
        scale = self.refs.scale[0].astype(self.numerics.product)
        return tile.query_tile(q, scale, None, self.numerics)

    @property
    def rows_at(self) -> slice:
        """The rows of the query tile in the program's block."""
        if self.offset is None:
            return slice(None)
        return slice(self.offset, self.offset + self.block_q)

    def key(self, j: Index, value_gain: Array | None = None) -> tile.KeyTile:
        assert value_gain is None  # the lax walk repairs calls that would need one
        k, v = self.raw_keys(j)
        kappa = None
        if self.numerics.storage.uses_kappa:
            assert self.kappa is not None
            rows = (MATRIX_ROWS, k.shape[1])
            kappa = jnp.broadcast_to(self.kappa[pl.ds(j, 1)].astype(k.dtype), rows)
        usable = self._usable(j)
        if self.largest_key is not None:
            in_use = k if usable is None else tile.zero_unusable(k, usable)
            self.largest_key[...] = jnp.maximum(self.largest_key[...], self.largest(in_use))
        return tile.key_tile(k, v, usable, self.numerics, kappa=kappa)

    def raw_keys(self, j: Index) -> tuple[Array, Array]:
        """[n, D] and [n, E] keys and values of tile j as they are."""
        at = self.keys_at(j)
        return from_bits(self.refs.key[0, 0, at]), from_bits(self.refs.value[0, 0, at])

    def _usable(self, j: Index) -> Array | None:
        """[n, 1] bool: False beyond the last key; None where no tile reaches beyond it."""
        if self.mask.key_length % self.block_kv == 0:
            return None
        row = self.key_start(j) + lax.broadcasted_iota(jnp.int32, (self.block_kv, 1), 0)
        return row < self.mask.key_length

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

    def bias(self, start: Index, j: Index) -> Array | None:
        return None if self.refs.bias is None else self._tile_of(self.refs.bias, j)

    def array(self, start: Index, j: Index, asks: Array | None = None) -> Array | None:
        seen = None
        if self.refs.query_segments is not None:
            seen = self._same_segment(j)
        if self.refs.array is not None:
            array = self._tile_of(self.refs.array, j) != 0
            seen = array if seen is None else seen & array
        return seen

    def _same_segment(self, j: Index) -> Array:
        if self.transposed:
            q = self.refs.query_segments[0, :, self.rows_at]
            seen = self.refs.key_segments[0, self.keys_at(j)] == q
            return seen if self.groups == 1 else jnp.tile(seen, (1, self.groups))
        q = self.refs.query_segments[0, self.rows_at]
        k = self.refs.key_segments[0, :, self.keys_at(j)]
        return self._rows(jnp.broadcast_to((q == k)[None], self._shape))

    def sinks(self) -> Array | None:
        if self.refs.sinks is None:
            return None
        first = self.head * self.groups
        shape, axis = ((1, self.block_q), 1) if self.transposed else ((self.block_q, 1), 0)
        columns = [jnp.full(shape, self.refs.sinks[first + g]) for g in range(self.groups)]
        return jnp.concatenate(columns, axis=axis) if len(columns) > 1 else columns[0]

    @property
    def _shape(self) -> tuple[int, int, int]:
        return self.groups, self.block_q, self.block_kv

    def _tile_of(self, ref: Ref, j: Index) -> Array:
        """[R, n], or [n, R], of a block [1, 1, G|1, block_q|1, S|1]; integers as int32."""
        rows = self.rows_at if ref.shape[3] > 1 else slice(None)
        x = ref[0, 0, :, rows, self.keys_at(j) if ref.shape[4] > 1 else slice(None)]
        if not jnp.issubdtype(x.dtype, jnp.floating):
            x = x.astype(jnp.int32)
        tile = self._rows(jnp.broadcast_to(x, self._shape))
        return tile.T if self.transposed else tile

    def _rows(self, x: Array) -> Array:
        return x.reshape(-1, x.shape[-1])
