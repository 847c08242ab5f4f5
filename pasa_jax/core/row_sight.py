"""What each row of one head sees of each block of keys, and of the key at which it stands."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from pasa_jax.core.blocks import over_blocks, per_block
from pasa_jax.core.mask import Mask, div
from pasa_jax.core.mods import Data, MaskMod, Place
from pasa_jax.core.tile import Sight

if TYPE_CHECKING:
    from pasa_jax.core.shapes import Bool, Int

Array = jax.Array


def row_sight(mask: Mask, usable: Bool[Array, " S"], n: int) -> Sight:
    """[T, G|1, blocks] by all conditions of the mask, for blocks of n keys."""
    sight = _by_place(mask, usable, n)
    if mask.query_positions is not None and mask.key_positions is not None:
        q, (least, most) = mask.query_positions, _ends(mask.key_positions, usable, n)
        left, right = mask.reach()
        some, whole = (jnp.ones((len(q), 1, len(least)), bool) for _ in range(2))
        q = q[:, None, None]
        if left is not None:
            some, whole = some & (most >= q - left), whole & (least >= q - left)
        if right is not None:
            some, whole = some & (least <= q + right), whole & (most <= q + right)
        sight = sight.beside(Sight(some, whole, whole))
    if mask.query_segments is not None and mask.key_segments is not None:
        own, (least, most) = mask.query_segments[:, None, None], _ends(mask.key_segments, usable, n)
        all_own = (least == own) & (most == own)
        sight = sight.beside(Sight((least <= own) & (own <= most), all_own, all_own))
    if mask.array is not None:
        sight = sight.beside(sight_of_keys(by_row(mask.array, mask.key_length), usable, n))
    if mask.kinds is not None:
        sight = sight.beside(_by_kind(mask, n))
    if mask.has_function:
        no = jnp.zeros_like(sight.some)
        sight = sight.beside(Sight(~no, no, no))
    return sight


def sight_of_keys(shown: Bool[Array, "#T #G S"], usable: Bool[Array, " S"], n: int) -> Sight:
    """[T|1, G|1, blocks] by ``shown``, of each key."""
    some = over_blocks(shown & usable, n, jnp.any)
    return Sight(some, some, some & over_blocks(shown | ~usable, n, jnp.all))


def own_keys(mask: Mask) -> tuple[Int[Array, " T"], ...]:
    """Keys of which a row probably sees one, by each rule: the key at its place, and the nearest
    one whose position is no larger than its own.
    """
    rows, last = jnp.arange(mask.query_length, dtype=jnp.int32), mask.key_length - 1
    own = (jnp.clip(mask.own_key(rows), 0, last),)
    if mask.query_positions is None or mask.key_positions is None:
        return own
    order = jnp.argsort(mask.key_positions).astype(jnp.int32)
    place = jnp.searchsorted(mask.key_positions[order], mask.query_positions, side="right")
    return (*own, order[jnp.clip(place - 1, 0, last)])


def sees(mask: Mask, usable: Bool[Array, " S"], data: Data, own: Int[Array, " T"]) -> Array:
    """[T, G|1] bool: whether each row sees its key ``own``.

    Arguments:
      data: the leaves of the functions' data that have a gradient, of this head.
    """
    rows = jnp.arange(mask.query_length, dtype=jnp.int32)
    lo, hi = mask.key_interval(rows)
    seen = ((own >= lo) & (own < hi) & usable[own])[:, None]
    if mask.query_positions is not None and mask.key_positions is not None:
        by_position = mask.by_position(mask.query_positions, mask.key_positions[own])
        seen = seen & jnp.broadcast_to(by_position, rows.shape)[:, None]
    if mask.query_segments is not None and mask.key_segments is not None:
        seen = seen & (mask.query_segments == mask.key_segments[own])[:, None]
    if mask.array is not None:
        seen = seen & at_keys(by_row(mask.array, mask.key_length), own)
    by_mods = _seen_by_mods(mask, data, rows, own)
    return seen if by_mods is None else seen & by_mods


def _seen_by_mods(mask: Mask, data: Data, rows: Array, own: Array) -> Array | None:
    """`sees` by block mask and functions alone; None: there are none."""
    mods, seen = mask.mods, None

    def shown(mod: MaskMod) -> Array:
        assert mods is not None
        assert mods.entries is not None
        assert mods.heads is not None
        every = mods.data.beside(data)
        given = Data(
            tuple(None if x is None else x.T for x in every.query),
            tuple(None if x is None else x[:, own].T for x in every.key),
            tuple(None if x is None else x[None] for x in every.head),
        )
        place = Place(mods.entries.reshape(1, 1), mods.heads[None], rows[:, None], own[:, None])
        return mods.shows(mod, place, given)

    if mask.kinds is not None:
        row, column = mask.block_size
        kinds = mask.kinds[:, div(rows, row), div(own, column)].T
        seen = kinds != 0
        if mods is not None and mods.block_mod is not None:
            seen = (kinds == 2) | (seen & shown(mods.block_mod))
    if mods is not None and mods.mask_mod is not None:
        by_function = shown(mods.mask_mod)
        seen = by_function if seen is None else seen & by_function
    return seen


def by_row(x: Array, keys: int) -> Array:
    """[T|1, G|1, S] of x [G|1, T|1, S|1], a mask or a bias of S = ``keys``."""
    return jnp.moveaxis(jnp.broadcast_to(x, (*x.shape[:2], keys)), 1, 0)


def at_keys(x: Array, own: Int[Array, " T"]) -> Array:
    """[T, G|1] of x [T|1, G|1, S]: the entry of each row's key ``own``."""
    x = jnp.broadcast_to(x, (len(own), *x.shape[1:]))
    return jnp.take_along_axis(x, own[:, None, None], axis=2)[..., 0]


def _by_place(mask: Mask, usable: Array, n: int) -> Sight:
    """By lengths, causality and window."""
    rows = jnp.arange(mask.query_length, dtype=jnp.int32)[:, None, None]
    keys = jnp.arange(mask.key_length, dtype=jnp.int32)
    first = per_block(jnp.where(usable, keys, mask.key_length), n, jnp.min)
    last = per_block(jnp.where(usable, keys, -1), n, jnp.max)
    lo, hi = mask.key_interval(rows)
    before = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(usable, dtype=jnp.int32)])
    start = jnp.arange(len(first), dtype=jnp.int32) * n
    stop = jnp.minimum(start + n, mask.key_length)
    counted = before[jnp.clip(hi, start, stop)] - before[jnp.clip(lo, start, stop)]
    some = counted > 0
    return Sight(some, some, some & (lo <= first) & (hi > last))


def _ends(x: Array, usable: Array, n: int) -> tuple[Array, Array]:
    """[blocks] the least and the largest of x [S] among the usable keys of each block."""
    info = jnp.iinfo(x.dtype)
    least = per_block(jnp.where(usable, x, info.max), n, jnp.min)
    return least, per_block(jnp.where(usable, x, info.min), n, jnp.max)


def _by_kind(mask: Mask, n: int) -> Sight:
    """By the blocks of a block mask that lie in a block of keys."""
    assert mask.kinds is not None
    (row, column), kinds = mask.block_size, mask.kinds
    start = jnp.arange(-(-mask.key_length // n), dtype=jnp.int32) * n
    first, last = div(start, column), div(jnp.minimum(start + n, mask.key_length) - 1, column)

    def count(of: Array) -> Array:  # [G|1, rows, columns] -> [T, G|1, blocks]
        total = jnp.pad(jnp.cumsum(of, axis=2, dtype=jnp.int32), ((0, 0), (0, 0), (1, 0)))
        each = jnp.moveaxis(total[:, :, last + 1] - total[:, :, first], 0, 1)
        return each[div(jnp.arange(mask.query_length, dtype=jnp.int32), row)]

    whole = count(kinds != 2) == 0
    return Sight(count(kinds != 0) > 0, whole, whole)
