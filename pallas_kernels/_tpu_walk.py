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

from pallas_kernels._common import Lists, as_given, narrowed
from pallas_kernels._float16 import from_bits
from pasa_jax.core import tile
from pasa_jax.core.mask import Index, KeyRange, Mask, div, maximum, minimum
from pasa_jax.core.mods import Data, Place
from pasa_jax.core.operands import Factors, Operands
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
    query_positions: Any = None  # as segments
    key_positions: Any = None
    factors: Any = None  # Factors of [B|1, K|1, G|1, R, T], [B|1, K|1, G|1, R, S], [B|1, N|1]
    # Of the functions of the caller: the numbers of batch entries and heads, and `Data`.
    entries: Any = None  # [B]
    heads: Any = None  # [N]
    query_data: Any = None  # each [B|1, K|1, G|1, T, 1]; transposed [B|1, K|1, G|1, 1, T]
    key_data: Any = None  # each [B|1, K|1, G|1, 1, S]; transposed [B|1, K|1, G|1, S, 1]
    head_data: Any = None  # each [B|1, N|1]
    query_lengths: Any = None  # [B]
    key_lengths: Any = None  # [B]
    todo: Any = None  # [B, K, query tiles] int32, 0 for tiles that are left out; None: all are done


class TileList(NamedTuple):
    """`Lists` as one array of SMEM: for each query tile how many of its key tiles need a mask, how
    many it visits, and which: 2·tile + whether a block mask's function is asked.

    Arguments:
      numbers: [B|1 · K|1 · query tiles · (2 + key tiles)] int32.
      shape: (B|1, K|1, query tiles, key tiles)
    """

    numbers: Any
    shape: tuple[int, int, int, int]

    @staticmethod
    def of(lists: Lists) -> TileList:
        order = 2 * lists.order if lists.asks is None else 2 * lists.order + lists.asks
        parts = [lists.partial[..., None], lists.count[..., None], order]
        return TileList(jnp.concatenate(parts, axis=-1).reshape(-1), lists.order.shape)

    def row(self, b: Index, h: Index, i: Index) -> Index:
        """Where the numbers of a query tile start."""
        batch, heads, rows, columns = self.shape
        place = (b if batch > 1 else 0) * heads + (h if heads > 1 else 0)
        return (place * rows + i) * (2 + columns)

    def tile(self, b: Index, h: Index, i: Index, t: Index) -> Index:
        """The t-th key tile that a query tile visits; beyond, the last one."""
        return div(self.numbers[self.row(b, h, i) + 2 + t], 2)


def block_specs(x: Inputs, specs: Specs, mask: Mask, list_shape: Any) -> Inputs:
    """The blocks of one program.

    Arguments:
      list_shape: of the `TileList` that index maps are given as their last argument, if there is
        one.
    """
    keys = specs.chunk_tiles * specs.block_kv

    def chunk(b: Array, h: Array, i: Array, c: Array, *numbers: Ref) -> Any:
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

    def block(x: Array | None, *axes: str) -> pl.BlockSpec | None:
        """A block of x, by what its axes are: "b", "k" with the grid, "rows", "keys" in pieces, and
        others whole; an axis of size 1 is shared.
        """
        if x is None:
            return None
        sides = {"b": 1, "k": 1, "rows": specs.rows, "keys": keys}
        shape = tuple(
            1 if n == 1 and a in ("rows", "keys") else sides.get(a, n)
            for n, a in zip(x.shape, axes, strict=True)
        )

        def index(b: Array, h: Array, i: Array, c: Array, *numbers: Ref) -> tuple[Any, ...]:
            place = {"b": b, "k": h, "rows": i}
            if "keys" in axes:
                place["keys"] = chunk(b, h, i, c, *numbers)
            return tuple(
                place.get(a, 0) if n > 1 else 0 for n, a in zip(x.shape, axes, strict=True)
            )

        return pl.BlockSpec(shape, index)

    def scalars(x: Any) -> Any:
        return jax.tree.map(lambda _: pl.BlockSpec(memory_space=pltpu.SMEM), x)

    def each(x: Any, *axes: str) -> Any:
        return jax.tree.map(lambda leaf: block(leaf, *axes), x)

    of_rows, of_keys = ("rows", "one"), ("one", "keys")
    if specs.transposed:
        of_rows, of_keys = ("one", "rows"), ("keys", "one")
    lead = ("b", "k", "g")
    factors = None
    if x.factors is not None:
        factors = Factors(
            block(x.factors.q, *lead, "r", "rows"),
            block(x.factors.k, *lead, "r", "keys"),
            scalars(x.factors.scale),
        )
    return Inputs(
        query=block(x.query, *lead, "rows", "d"),
        key=block(x.key, "b", "k", "keys", "d"),
        value=block(x.value, "b", "k", "keys", "e"),
        scale=scalars(x.scale),
        bias=block(x.bias, *lead, "rows", "keys"),
        sinks=scalars(x.sinks),
        array=block(x.array, *lead, "rows", "keys"),
        query_segments=block(x.query_segments, "b", *of_rows),
        key_segments=block(x.key_segments, "b", *of_keys),
        query_positions=block(x.query_positions, "b", *of_rows),
        key_positions=block(x.key_positions, "b", *of_keys),
        factors=factors,
        entries=scalars(x.entries),
        heads=scalars(x.heads),
        query_data=each(x.query_data, *lead, *of_rows),
        key_data=each(x.key_data, *lead, *of_keys),
        head_data=scalars(x.head_data),
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
    entry: Index
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
        conditions: list[Array] = []
        if self.refs.query_segments is not None:
            q, k = self._sides(self.refs.query_segments, self.refs.key_segments, j)
            conditions.append(self._for_groups(q == k))
        if self.refs.query_positions is not None:
            q, k = self._sides(self.refs.query_positions, self.refs.key_positions, j)
            conditions.append(self._for_groups(self.mask.by_position(q, k)))
        if self.refs.array is not None:
            conditions.append(self._tile_of(self.refs.array, j) != 0)
        mods = self.mask.mods
        if mods is not None and mods.mask_mod is not None:
            conditions.append(mods.shows(mods.mask_mod, self._place(start, j), self._data(j)))
        if mods is not None and mods.block_mod is not None and asks is not None:
            shown = mods.shows(mods.block_mod, self._place(start, j), self._data(j))
            conditions.append(shown | ~asks)
        seen = None
        for x in conditions:
            seen = x if seen is None else seen & x
        return seen

    def _sides(self, query: Ref, key: Ref, j: Index) -> tuple[Array, Array]:
        """What belongs to the rows and to the keys of a tile, of numbers of the batch entry; they
        broadcast to [G, block_q, n], or to [n, block_q] where tiles are transposed.
        """
        if self.transposed:
            return query[0, :, self.rows_at], key[0, self.keys_at(j)]
        return query[0, self.rows_at], key[0, :, self.keys_at(j)]

    def _for_groups(self, x: Array) -> Array:
        """[R, n] of x [block_q, n], which all query heads share; or [n, R] of [n, block_q]."""
        if self.transposed:
            x = jnp.broadcast_to(x, (self.block_kv, self.block_q))
            return x if self.groups == 1 else jnp.tile(x, (1, self.groups))
        return self._rows(jnp.broadcast_to(x[None], self._shape))

    def modified(self, start: Index, j: Index) -> tile.Modify | None:
        mods = self.mask.mods
        if mods is None or mods.score_mod is None:
            return None
        place, data = self._place(start, j), self._data(j)
        return lambda score: mods.scored(score, place, data)

    def _place(self, start: Index, j: Index) -> Place:
        """Where the elements of a tile stand."""
        shape, axis = ((self.block_kv, 1), 0) if self.transposed else ((1, self.block_kv), 1)
        column = self.key_start(j) + lax.broadcasted_iota(jnp.int32, shape, axis)
        b = jnp.full((1, 1), self.refs.entries[self.entry])
        h = self._per_head([self.refs.heads[self.head * self.groups + g] for g in self._heads])
        return Place(b, h, self.positions(start), column)

    def _data(self, j: Index) -> Data:
        """What the functions are given at a tile."""
        assert self.mask.mods is not None
        data = Data(
            tuple(map(self._of_rows, self.refs.query_data)),
            tuple(self._of_keys(x, j) for x in self.refs.key_data),
            tuple(self._per_head(self._head_numbers(x)) for x in self.refs.head_data),
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

    def _per_head(self, numbers: list[Array]) -> Array:
        """[R, 1], or [1, R], of one number for each query head."""
        shape, axis = ((1, self.block_q), 1) if self.transposed else ((self.block_q, 1), 0)
        columns = [jnp.full(shape, x) for x in numbers]
        return jnp.concatenate(columns, axis=axis) if len(columns) > 1 else columns[0]

    def _of_rows(self, ref: Ref) -> Array:
        """[R, 1], or [1, R], of a block [1, 1, G|1, rows, 1], or [1, 1, G|1, 1, rows]."""
        axis = 1 if self.transposed else 0
        at = (slice(None), self.rows_at) if self.transposed else (self.rows_at, slice(None))
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

    def low_rank(self, start: Index, j: Index) -> Array | None:
        factors = self.refs.factors
        if factors is None:
            return None
        of_heads = []
        for g, scale in zip(self._heads, self._head_numbers(factors.scale), strict=True):
            q, k = (
                x[0, 0, g if x.shape[2] > 1 else 0, :, at]
                for x, at in ((factors.q, self.rows_at), (factors.k, self.keys_at(j)))
            )
            of_q, of_k = ([x[r : r + 1] for r in range(len(q))] for x in (q, k))
            of_heads.append(tile.outer(of_q, of_k, self.numerics) * scale)
        axis = 1 if self.transposed else 0
        return jnp.concatenate(of_heads, axis=axis) if len(of_heads) > 1 else of_heads[0]

    def sinks(self) -> Array | None:
        if self.refs.sinks is None:
            return None
        first = self.head * self.groups
        return self._per_head([self.refs.sinks[first + g] for g in self._heads])

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
