"""`Mask`: which keys a query sees, and which tiles that leaves to compute."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pasa_jax.core.bits import pick, pick_heads, take
from pasa_jax.core.errors import check_choice
from pasa_jax.core.mods import Data, Mods
from pasa_jax.core.schedule import Schedule

Array = jax.Array
Index = int | Array
TileKind = Literal["skip", "partial", "full"]
ALIGNMENTS = ("top_left", "bottom_right")
_NO_DATA = Data()


class KeyRange(NamedTuple):
    """Key tiles for one query tile: partial in [lo, full_lo) and [full_hi, hi), full between.

    Of `Mask.query_range`: query tiles for one key tile.
    """

    lo: Index
    full_lo: Index
    full_hi: Index
    hi: Index


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Mask:
    """Which keys each query sees: every condition that is given must hold.

    Arguments:
      query_length, key_length: T and S.
      is_causal: query i sees keys up to i + shift of the alignment.
      causal_alignment: ``"top_left"``: query i stands at key i (jax.nn). ``"bottom_right"``: the
        last query stands at the last key (FlashAttention), counting valid ones if lengths are
        given. The window is aligned likewise.
      window: (left, right): keys from i − left to i + right.
      query_lengths, key_lengths: [B] int32 valid lengths, or [] for one head.
      query_segments, key_segments: [B, T], [B, S] int32 (one head: [T], [S]); a query sees the
        keys of its own segment.
      query_positions, key_positions: [B|1, T], [B|1, S] int32 (one head: [T], [S]), both or none.
        Causality and the window then compare these instead of places in the arrays.
      array: [B|1, N|1, T|1, S|1] bool (one head: [G|1, T|1, S|1]), True where the query sees.
      kinds: [B|1, N|1, rows, columns] int8 (one head: [G|1, rows, columns]), for each block of a
        block mask whether it is hidden (0), `Mods.block_mod` is asked (1), or it is seen (2).
      block_size: queries and keys of such a block.
      mods: the functions of the caller.
      dropout: [B|1, N|1, 2] uint32 (one head: [G|1, 2]), the seeds of which weights dropout keeps
        (`dropout.kept`). It hides no key: a dropped weight still counts in the softmax.
      place: of queries and keys that are a part of longer sequences: how many keys of the whole
        stand between the first key here and the one at which the first query stands.
      dropout_origin: [2] int32, the places of the first query and of the first key in the whole
        sequences, from which dropout counts; None: both are 0.
    """

    query_length: int = field(metadata={"static": True})
    key_length: int = field(metadata={"static": True})
    is_causal: bool = field(default=False, metadata={"static": True})
    causal_alignment: str = field(default="top_left", metadata={"static": True})
    window: tuple[int, int] | None = field(default=None, metadata={"static": True})
    query_lengths: Array | None = None
    key_lengths: Array | None = None
    query_segments: Array | None = None
    key_segments: Array | None = None
    query_positions: Array | None = None
    key_positions: Array | None = None
    array: Array | None = None
    kinds: Array | None = None
    block_size: tuple[int, int] = field(default=(1, 1), metadata={"static": True})
    mods: Mods | None = None
    dropout: Array | None = None
    place: int = field(default=0, metadata={"static": True})
    dropout_origin: Array | None = None

    def __post_init__(self) -> None:
        check_choice("causal_alignment", self.causal_alignment, ALIGNMENTS)

    # One head of the batch.

    def head(self, b: Index, h: Index, groups: int) -> Mask:
        """The mask of batch entry ``b`` and key head ``h`` with its ``groups`` query heads."""

        def of(x: Array | None) -> Array | None:
            return None if x is None else pick(x, b)

        def of_heads(x: Array | None) -> Array | None:
            return None if x is None else pick_heads(x, b, h, groups)

        return replace(
            self,
            query_lengths=of(self.query_lengths),
            key_lengths=of(self.key_lengths),
            query_segments=of(self.query_segments),
            key_segments=of(self.key_segments),
            query_positions=of(self.query_positions),
            key_positions=of(self.key_positions),
            array=of_heads(self.array),
            kinds=of_heads(self.kinds),
            mods=None if self.mods is None else self.mods.one_head(b, h, groups),
            dropout=of_heads(self.dropout),
        )

    # Which tiles.

    @property
    def data_dependent(self) -> bool:
        """Whether data or functions hide keys: no tile is full by its place alone."""
        return self.listed or self.tested

    @property
    def tested(self) -> bool:
        """Whether a function or an array is asked about every pair of a query and a key."""
        return self.array is not None or self.has_function

    @property
    def has_function(self) -> bool:
        """Whether the caller's ``mask_mod`` hides keys."""
        return self.mods is not None and self.mods.mask_mod is not None

    @property
    def listed(self) -> bool:
        """Whether data say of whole tiles that they are hidden, or seen (`core.visits`)."""
        data = (self.query_segments, self.query_positions, self.kinds)
        return any(x is not None for x in data)

    @property
    def interval_known(self) -> bool:
        """Whether a row's keys are an interval of places, cut by segments and an array at most."""
        return self.query_positions is None and self.kinds is None and not self.has_function

    def any_partial(self, block_kv: int) -> bool:
        """Whether some tile may need the mask."""
        return (
            self.data_dependent
            or self.is_causal
            or self.window is not None
            or self.key_lengths is not None
            or self.key_length % block_kv != 0
        )

    def key_range(self, start: Index, stop: Index, block_kv: int) -> KeyRange:
        """The key tiles that the queries [start, stop) see; of ints where start and stop are ints.

        Data and functions do not narrow it: a walker tests the mask of each such tile, or has lists
        of them (`core.visits`).
        """
        return self._range(start, stop, block_kv, by_data=self.data_dependent)

    def place_range(self, start: Index, stop: Index, block_kv: int) -> KeyRange:
        """`key_range` by lengths, causality and window alone."""
        return self._range(start, stop, block_kv, by_data=False)

    def _range(self, start: Index, stop: Index, block_kv: int, *, by_data: bool) -> KeyRange:
        """`place_range`; where data hide keys too (``by_data``), no tile of it is full."""
        keys = self.valid_keys()
        lo, hi, full_lo, full_hi = 0, keys, 0, keys
        left, right = self._reach()
        place = self.offset()
        if left is not None:
            lo = maximum(0, start + place - left)
            full_lo = maximum(0, stop - 1 + place - left)
        if right is not None:
            hi = minimum(keys, maximum(0, stop + place + right))
            full_hi = minimum(keys, maximum(0, start + 1 + place + right))
        if self.query_lengths is not None:  # rows of padding see nothing
            hi = where(start < self.query_lengths, hi, 0)
        lo, hi = div(lo, block_kv), div(hi + block_kv - 1, block_kv)
        lo = minimum(lo, hi)
        if by_data:
            return KeyRange(lo, lo, lo, hi)
        full_lo = minimum(maximum(div(full_lo + block_kv - 1, block_kv), lo), hi)
        full_hi = minimum(maximum(div(full_hi, block_kv), full_lo), hi)
        return KeyRange(lo, full_lo, full_hi, hi)

    def query_range(self, start: Index, stop: Index, block_q: int) -> KeyRange:
        """The query tiles that see the keys [start, stop); of ints where start and stop are ints.

        The mirror of `key_range`: a query tile is full where each of its rows sees each key. A
        tile that reaches beyond the last query, or keys beyond the last one, are partial.
        """
        keys = self.valid_keys()
        rows = self.valid_queries()
        lo, hi, full_lo, full_hi = 0, rows, 0, rows
        left, right = self._reach()
        place = self.offset()
        if right is not None:
            lo = minimum(rows, maximum(0, start - place - right))
            full_lo = minimum(rows, maximum(0, stop - 1 - place - right))
        if left is not None:
            hi = minimum(rows, maximum(0, minimum(stop, keys) - place + left))
            full_hi = minimum(rows, maximum(0, start - place + left + 1))
        hi = where((start < keys) & (lo < hi), hi, 0)
        full_hi = where(stop <= keys, full_hi, 0)
        lo, hi = div(lo, block_q), div(hi + block_q - 1, block_q)
        lo = minimum(lo, hi)
        if self.data_dependent:
            return KeyRange(lo, lo, lo, hi)
        full_lo = minimum(maximum(div(full_lo + block_q - 1, block_q), lo), hi)
        full_hi = minimum(maximum(div(full_hi, block_q), full_lo), hi)
        return KeyRange(lo, full_lo, full_hi, hi)

    def tile(self, i: int, j: int, schedule: Schedule) -> TileKind:
        """Whether tile (i, j) is skipped, needs the mask, or is seen in full.

        >>> mask = Mask(query_length=1024, key_length=1024, is_causal=True)
        >>> [mask.tile(0, 0, Schedule()), mask.tile(0, 1, Schedule()), mask.tile(1, 0, Schedule())]
        ['partial', 'skip', 'full']
        """
        start = i * schedule.block_q
        stop = min(start + schedule.block_q, self.query_length)
        r = self.key_range(start, stop, schedule.block_kv)
        if not r.lo <= j < r.hi:
            return "skip"
        return "full" if r.full_lo <= j < r.full_hi else "partial"

    # What a partial tile shows.

    def visible(self, rows: Array, columns: Array) -> Array:
        """Bool of lengths, causality and window, of a tile of ``columns.size`` keys.

        Arguments:
          rows, columns: positions, [R, 1] and [1, n] for [R, n], or [1, R] and [n, 1] for [n, R].
        """
        seen = jnp.ones((1, 1), bool)
        if self.key_lengths is not None or self.key_length % columns.size:
            seen = columns < self.valid_keys()
        left, right = self._reach()
        at = rows + self.offset()
        if left is not None:
            seen = seen & (columns >= at - left)
        if right is not None:
            seen = seen & (columns <= at + right)
        if self.query_lengths is not None:
            seen = seen & (rows < self.query_lengths)
        return jnp.broadcast_to(seen, jnp.broadcast_shapes(rows.shape, columns.shape))

    def tile_array(
        self,
        row_start: Index,
        rows: int,
        key_start: Index,
        keys: int,
        groups: int,
        data: Data = _NO_DATA,
    ) -> Array | None:
        """[groups·rows, keys] bool of data and functions for one tile of one head, or None.

        Arguments:
          data: the leaves of the functions' data that have a gradient.
        """
        at_rows, at_keys = (row_start, rows), (key_start, keys)
        conditions: list[Array] = []
        if self.query_segments is not None and self.key_segments is not None:
            q, k = take(self.query_segments, *at_rows), take(self.key_segments, *at_keys)
            conditions.append(q[:, None] == k[None, :])
        if self.query_positions is not None and self.key_positions is not None:
            q, k = take(self.query_positions, *at_rows), take(self.key_positions, *at_keys)
            conditions.append(self.by_position(q[:, None], k[None, :]))
        if self.array is not None:
            conditions.append(slice_tile(self.array, row_start, rows, key_start, keys))
        seen = None
        for x in conditions:
            seen = x if seen is None else seen & x
        if seen is not None:
            seen = jnp.broadcast_to(seen, (groups, rows, keys)).reshape(groups * rows, keys)
        by_mods = self._by_mods(at_rows, at_keys, groups, data)
        if by_mods is None or seen is None:
            return by_mods if seen is None else seen
        return seen & by_mods

    def _by_mods(
        self, rows: tuple[Index, int], keys: tuple[Index, int], groups: int, data: Data
    ) -> Array | None:
        """[groups·rows, keys] bool of block mask and functions for one tile of a head, or None."""
        mods, seen = self.mods, None
        if mods is None and self.kinds is None:
            return None
        shape = (groups, rows[1], keys[1])
        if mods is not None:
            place = mods.place(rows, keys, groups, transposed=False)
            data = mods.data.beside(data).tile(rows, keys, groups, transposed=False)
        if self.kinds is not None:
            kinds = take_blocks(self.kinds, rows, self.block_size[0], 1)
            kinds = take_blocks(kinds, keys, self.block_size[1], 2)
            kinds = jnp.broadcast_to(kinds, shape).reshape(-1, keys[1])
            seen = kinds != 0
            if mods is not None and mods.block_mod is not None:
                seen = (kinds == 2) | (seen & mods.shows(mods.block_mod, place, data))
        if mods is not None and mods.mask_mod is not None:
            shown = mods.shows(mods.mask_mod, place, data)
            seen = shown if seen is None else seen & shown
        if seen is None:
            return None
        return jnp.broadcast_to(seen, (groups * rows[1], keys[1]))

    def by_position(self, rows: Array, columns: Array) -> Array:
        """Bool of causality and window, of positions of queries and keys that broadcast."""
        left, right = self.reach()
        seen = jnp.ones((), bool)
        if left is not None:
            seen = columns >= rows - left
        if right is not None:
            seen = seen & (columns <= rows + right)
        return seen

    def visible_keys(self) -> Array:
        """[S] bool: False for keys that no query sees, by lengths, causality, window and array."""
        place, (left, right) = self.offset(), self._reach()
        index = jnp.arange(self.key_length, dtype=jnp.int32)
        seen = index < self.valid_keys()
        if right is not None:
            seen = seen & (index < self.query_length + place + right)
        if left is not None:
            seen = seen & (index >= place - left)
        if self.array is not None:
            seen = seen & jnp.any(self.array, axis=(0, 1))
        return seen

    def row_valid(self) -> Array | None:
        """[B, T] bool (one head: [T]) of the queries within ``query_lengths``, or None."""
        if self.query_lengths is None:
            return None
        index = jnp.arange(self.query_length, dtype=jnp.int32)
        return index < self.query_lengths[..., None]

    def key_interval(self, rows: Array) -> tuple[Array, Array]:
        """Of the shape of ``rows``: each row's keys [lo, hi) by lengths, causality and window."""
        left, right = self._reach()
        at = self.own_key(rows)
        lo = jnp.zeros_like(rows) if left is None else jnp.maximum(at - left, 0)
        hi = jnp.broadcast_to(jnp.asarray(self.valid_keys(), jnp.int32), rows.shape)
        if right is not None:
            hi = jnp.minimum(hi, at + right + 1)
        if self.query_lengths is not None:
            hi = jnp.where(rows < self.query_lengths, hi, 0)
        return lo, hi

    def own_key(self, rows: Array) -> Array:
        """Of the shape of ``rows``: the position among the keys at which each row stands."""
        return rows + self.offset()

    def valid_keys(self) -> Index:
        """How many keys there are, by the lengths."""
        return self.key_length if self.key_lengths is None else self.key_lengths

    def valid_queries(self) -> Index:
        """How many queries there are, by the lengths."""
        return self.query_length if self.query_lengths is None else self.query_lengths

    def offset(self) -> Index:
        """The key position of query 0."""
        if self.causal_alignment == "top_left":
            return self.place
        return self.valid_keys() - self.valid_queries()

    def reach(self) -> tuple[int | None, int | None]:
        """How far a query sees to the left and to the right of itself; None: without end."""
        left, right = self.window if self.window is not None else (None, None)
        return left, 0 if self.is_causal else right

    def _reach(self) -> tuple[int | None, int | None]:
        """`reach` in places, which positions replace."""
        return (None, None) if self.query_positions is not None else self.reach()


def slice_tile(x: Array, row: Index, rows: int, column: Index, columns: int) -> Array:
    """The tile of the last two axes at (row, column); axes of size 1 are kept to broadcast."""
    if x.shape[-2] > 1:
        x = lax.dynamic_slice_in_dim(x, row, rows, axis=-2)
    if x.shape[-1] > 1:
        x = lax.dynamic_slice_in_dim(x, column, columns, axis=-1)
    return x


def take_blocks(x: Array, at: tuple[Index, int], block: int, axis: int) -> Array:
    """Of x, which has one entry for each block along ``axis``: that of each place from at[0] on."""
    places = at[0] + jnp.arange(at[1], dtype=jnp.int32)
    return jnp.take(x, div(places, block), axis=axis)


# Arithmetic on indices: Python numbers give Python numbers.


def maximum(a: Index, b: Index) -> Index:
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.maximum(a, b)


def minimum(a: Index, b: Index) -> Index:
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.minimum(a, b)


def div(a: Index, b: int) -> Index:
    """⌊a/b⌋ for a ≥ 0, as a shift where b is a power of two.

    The TPU compiler's estimate of cycles can follow a loop bound through a shift.
    """
    if isinstance(a, int):
        return a // b
    if b & (b - 1) == 0:
        return lax.shift_right_arithmetic(a, jnp.int32(b.bit_length() - 1))
    return lax.div(a, jnp.int32(b))


def where(condition: bool | Array, a: Index, b: Index) -> Index:
    if isinstance(condition, bool):
        return a if condition else b
    return jnp.where(condition, jnp.asarray(a, jnp.int32), jnp.asarray(b, jnp.int32))
