"""Which tiles of one head are visited, where only data say so: on the device.

Positions, segments and a block mask narrow what a tile of queries sees. From their least and their
largest number in each tile follows which tiles may be seen, and which are seen whole: O(tiles) time
and memory. Walkers go through the lists of them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pasa_jax.core.mask import Mask

Array = jax.Array


class Visits(NamedTuple):
    """The key tiles of each query tile; or the query tiles of each key tile.

    Arguments:
      order: [query tiles, key tiles] int32: the tiles that need a mask, in ascending order, then
        those that are seen whole. What follows repeats the last one.
      partial, count: [query tiles] int32: how many need a mask, and how many are visited.
    """

    order: Array
    partial: Array
    count: Array

    def asks(self, kinds: Array) -> Array:
        """int32, of the shape of ``order``: whether the block mask's function is asked there.

        Arguments:
          kinds: of each tile, see `tile_kinds`.
        """
        return jnp.take_along_axis((kinds == 1).astype(jnp.int32), self.order, axis=1)

    @staticmethod
    def of(sight: TileSight) -> Visits:
        """The lists of the tiles that are seen."""
        partial, whole = sight.some & ~sight.whole, sight.some & sight.whole
        before, before_whole = (jnp.cumsum(x, axis=1, dtype=jnp.int32) for x in (partial, whole))
        partials = before[:, -1]
        count = partials + before_whole[:, -1]
        place = jnp.where(partial, before, partials[:, None] + before_whole) - 1
        place = jnp.where(sight.some, place, place.shape[1])  # out of bounds: dropped
        rows = jnp.arange(len(place), dtype=jnp.int32)[:, None]
        columns = jnp.broadcast_to(jnp.arange(place.shape[1], dtype=jnp.int32), place.shape)
        order = jnp.zeros_like(columns).at[rows, place].set(columns, mode="drop")
        last = jnp.take_along_axis(order, jnp.maximum(count - 1, 0)[:, None], axis=1)
        return Visits(jnp.where(columns < count[:, None], order, last), partials, count)


class TileSight(NamedTuple):
    """Of each query tile and key tile, bool [query tiles, key tiles]."""

    some: Array  # False where surely no query sees a key
    whole: Array  # True where surely every query sees every key

    def beside(self, other: TileSight) -> TileSight:
        """Where both conditions must hold."""
        return TileSight(self.some & other.some, self.whole & other.whole)

    @property
    def transposed(self) -> TileSight:
        return TileSight(self.some.T, self.whole.T)


def visits(mask: Mask, block_q: int, block_kv: int) -> Visits:
    """The lists of one head, whose query heads share their tiles, as `HeadWalk` has them."""
    return Visits.of(tile_sight(mask, block_q, block_kv, overlap=True))


def tile_kinds(mask: Mask, block_q: int, block_kv: int) -> Array:
    """[query tiles, key tiles] int8 the kind of the block in which each tile lies, for tiles no
    side of which is longer than a block's or crosses its border.
    """
    assert mask.kinds is not None
    i, j = (
        jnp.arange(-(-length // block), dtype=jnp.int32) * block // size
        for length, block, size in zip(
            (mask.query_length, mask.key_length),
            (block_q, block_kv),
            mask.block_size,
            strict=True,
        )
    )
    return mask.kinds[0][i][:, j]


def tile_sight(mask: Mask, block_q: int, block_kv: int, *, overlap: bool = False) -> TileSight:
    """What the tiles of one head see of each other.

    A tile that reaches beyond the last key is never whole.

    Arguments:
      overlap: the last query tile starts early enough to be as long as the others, as `HeadWalk`
        has it.
    """
    queries = _tiles(mask.query_length, block_q, overlap=overlap)
    keys = _tiles(mask.key_length, block_kv, overlap=False)
    starts = queries[:, 0]
    r = jax.vmap(lambda start: mask.place_range(start, start + block_q, block_kv))(starts)
    lo, full_lo, full_hi, hi = (jnp.broadcast_to(x, starts.shape)[:, None] for x in r)
    j = jnp.arange(len(keys), dtype=jnp.int32)
    sight = TileSight((j >= lo) & (j < hi), (j >= full_lo) & (j < full_hi))
    if mask.query_positions is not None and mask.key_positions is not None:
        q, k = _ends(mask.query_positions, queries), _ends(mask.key_positions, keys)
        sight = sight.beside(_by_position(mask, q, k))
    if mask.query_segments is not None and mask.key_segments is not None:
        q, k = _ends(mask.query_segments, queries), _ends(mask.key_segments, keys)
        sight = sight.beside(_by_segment(q, k))
    if mask.kinds is not None:
        sight = sight.beside(_by_block(mask, queries, keys))
    if mask.tested:
        sight = sight._replace(whole=jnp.zeros_like(sight.whole))
    return sight


def _tiles(length: int, block: int, *, overlap: bool) -> Array:
    """[tiles, block] int32: the places that each tile of a sequence holds.

    Arguments:
      overlap: the last tile starts early enough to be as long as the others; else it repeats the
        last place.
    """
    starts = jnp.arange(-(-length // block), dtype=jnp.int32) * block
    if overlap:
        starts = jnp.minimum(starts, max(0, length - block))
    return jnp.minimum(starts[:, None] + jnp.arange(block, dtype=jnp.int32), length - 1)


def _ends(x: Array, tiles: Array) -> tuple[Array, Array]:
    """[tiles] the least and the largest of x [L] in each tile."""
    tiled = x[tiles]
    return jnp.min(tiled, axis=1), jnp.max(tiled, axis=1)


def _by_position(mask: Mask, q: tuple[Array, Array], k: tuple[Array, Array]) -> TileSight:
    """By causality and window."""
    left, right = mask.reach()
    (q_least, q_most), (k_least, k_most) = ((x[:, None] for x in q), k)
    some = jnp.ones((len(q[0]), len(k[0])), bool)
    whole = some
    if left is not None:
        some, whole = some & (k_most >= q_least - left), whole & (k_least >= q_most - left)
    if right is not None:
        some, whole = some & (k_least <= q_most + right), whole & (k_most <= q_least + right)
    return TileSight(some, whole)


def _by_segment(q: tuple[Array, Array], k: tuple[Array, Array]) -> TileSight:
    """A query sees the keys of its own segment."""
    (q_least, q_most), (k_least, k_most) = ((x[:, None] for x in q), k)
    some = (q_least <= k_most) & (k_least <= q_most)
    whole = (q_least == q_most) & (k_least == k_most) & (q_least == k_least)
    return TileSight(some, whole)


def _by_block(mask: Mask, queries: Array, keys: Array) -> TileSight:
    """By the blocks of a block mask that lie in a tile, from sums over them."""
    assert mask.kinds is not None
    (rows, columns), kinds = mask.block_size, mask.kinds

    def count(of: Array) -> Array:
        """How many of the blocks [G|1, rows, columns] that a tile touches are marked."""
        total = jnp.cumsum(jnp.cumsum(of, axis=0, dtype=jnp.int32), axis=1)
        total = jnp.pad(total, ((1, 0), (1, 0)))
        top, bottom = queries[:, 0] // rows, queries[:, -1] // rows + 1
        left, right = keys[:, 0] // columns, keys[:, -1] // columns + 1
        high, low = total[bottom], total[top]
        return (high - low)[:, right] - (high - low)[:, left]

    seen = jnp.any(kinds != 0, axis=0)
    full = jnp.all(kinds == 2, axis=0)
    return TileSight(count(seen) > 0, count(~full) == 0)
