"""A bound on every row's scores of one head, known before the tiles are walked (eq. 21, 22).

A softmax needs any reference that keeps its exponentials in range, not the maximum. The largest
upper bound over the blocks that a row sees (`tile.row_bounds`) is its reference m; the distance
from there down to the largest lower bound is its gap, and a head is proved to be safe where no gap
is too wide for float32. Then nothing has to be rescaled: sums of different tiles, devices or pages
simply add.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from pasa_jax.core import tile
from pasa_jax.core.blocks import per_block
from pasa_jax.core.mask import Mask
from pasa_jax.core.plan import Plan
from pasa_jax.core.tile import RowBounds, Sight, shown_by

if TYPE_CHECKING:
    from pasa_jax.core.shapes import Bool, Float

Array = jax.Array


class Bound(NamedTuple):
    """What is proved of one key head and its G query heads."""

    reference: Array  # [T, G] m − C·ln 2, in natural units; 0 for a row that sees nothing
    gap: Array  # [G] log2 of how far the largest weight of a row may lie below 2^C
    proved: Array  # [] bool: whether every row of every query head stays in range


def _sight_of_keys(shown: Array, usable: Array, n: int) -> Sight:
    """By ``shown`` [T|1, G|1, S]."""
    some = _over_blocks(shown & usable, n, jnp.any)
    return Sight(some, some, some & _over_blocks(shown | ~usable, n, jnp.all))


def bound_of(
    q: Float[Array, "T G D"],
    k: Float[Array, "S D"],
    v: Float[Array, "S E"],
    usable: Bool[Array, " S"],
    bias: Float[Array, "#G #T #S"] | None,
    scale: Float[Array, ""],
    mask: Mask,
    plan: Plan,
    kappa: Float[Array, "blocks D"] | None = None,
) -> Bound:
    """The bounds of one key head, from its block means: O(T·blocks·D) work.

    Arguments:
      kappa: what was taken off the keys, whose scores less that are stored in float16, where q is
        as it is multiplied and ``scale`` 1; None: scores are not rounded.
    """
    n, valid = plan.schedule.block_kv, mask.row_valid()
    if valid is not None:  # padding may hold anything
        q = jnp.where(valid[:, None, None], q, jnp.zeros_like(q))
    own = jnp.clip(mask.own_key(jnp.arange(len(q), dtype=jnp.int32)), 0, len(k) - 1)
    rows, of_own, largest = _of_products(q, k, usable, own, scale, n, kappa)
    if plan.logits_soft_cap is not None:
        cap = of_own.dtype.type(plan.logits_soft_cap)
        rows = rows.mapped(lambda x: cap * jnp.tanh(x / cap))
        of_own = cap * jnp.tanh(of_own / cap)
    sight, sees_own = _sight(mask, usable, n), _sees_own(mask, usable, own)
    if bias is not None:
        bias = jnp.moveaxis(jnp.broadcast_to(bias, (*bias.shape[:2], len(k))), 1, 0)
        shown = shown_by(bias)  # [T|1, G|1, S]
        sight = sight.beside(_sight_of_keys(shown, usable, n))
        sees_own = sees_own & _at(shown, own)
        bias = bias.astype(of_own.dtype)
        rows, of_own = _with_bias(rows, bias, shown & usable, n), of_own + _at(bias, own)
    of_own = jnp.where(sees_own, of_own, -jnp.inf)
    reference, gap = tile.reference(rows, sight, of_own, _over_last_axis, math.log(2))
    gap = jnp.max(gap, axis=0, initial=0)
    top = jnp.max(jnp.where(usable[:, None], jnp.abs(v), jnp.zeros_like(v)), initial=0)
    proved = jnp.all(tile.in_range(gap, top, len(v))) & (largest < tile.LARGEST_PRODUCT)
    return Bound(reference, gap, proved & jnp.all(jnp.isfinite(reference)))


def _over_last_axis(reduce: Callable[..., Array], x: Array) -> Array:
    return reduce(x, axis=-1)


def _of_products(
    q: Array,
    k: Array,
    usable: Array,
    own: Array,
    scale: Array,
    n: int,
    centre_of: Array | None,
) -> tuple[RowBounds, Array, Array]:
    """The bounds on q·k/α [T, G, blocks], a lower one for the own key [T, G], and [] a bound on
    every product and score, infinite where a stored score may leave float16.

    Arguments:
      centre_of: the blocks' κ, where scores less q·κ/α are stored; None: the blocks' means.
    """
    wide, dtype = tile.wide_type(q.dtype), k.dtype
    q, scale = q.astype(wide), scale.astype(wide)
    k = jnp.where(usable[:, None], k, jnp.zeros_like(k)).astype(wide)
    kappa, radius, off = _balls(k, usable, n, centre_of)
    # Sums of D products have errors of up to D roundings: these, twice.
    error = 2 * (q.shape[-1] + 4) * float(jnp.finfo(wide).eps)
    length = _norm(q)[..., None]  # [T, G, 1]
    reach = _norm(kappa) + radius
    largest = jnp.max(length * reach, initial=0) * jnp.maximum(jnp.abs(scale), 1)
    length = length * jnp.abs(scale)
    centre = jnp.einsum("tgd,bd->tgb", q, kappa, precision="highest") * scale
    of_own = jnp.einsum("tgd,td->tg", q, k[own], precision="highest") * scale
    of_own = of_own - length[..., 0] * error * _norm(k[own])[:, None]
    stored = None
    if off is not None:
        stored = tile.stored_error(radius, off, dtype)
        of_own = of_own - length[..., 0] * jnp.max(stored)
        fits = jnp.max(tile.overreach(length, radius, reach), initial=0) < 1
        largest = jnp.where(fits, largest, jnp.inf)
    return tile.row_bounds(centre, length, radius, reach, error, stored), of_own, largest


def _with_bias(rows: RowBounds, bias: Array, counts: Array, n: int) -> RowBounds:
    """The bounds after ``bias`` [T|1, G|1, S], of the keys that ``counts`` [T|1, G|1, S] names."""
    most = _over_blocks(jnp.where(counts, bias, -jnp.inf), n, jnp.max)
    least = _over_blocks(jnp.where(counts, bias, jnp.inf), n, jnp.min)
    return RowBounds(rows.upper + most, rows.mean + least, rows.lower + least)


def _balls(
    k: Array, usable: Array, n: int, centre_of: Array | None
) -> tuple[Array, Array, Array | None]:
    """The mean [blocks, D] of each block's usable keys, and the largest distance from it; or
    another centre, and also how far that is from the mean.
    """
    count = per_block(usable[:, None], n, lambda x, axis: jnp.sum(x, axis, dtype=k.dtype))
    kappa, off = per_block(k, n, jnp.sum) / jnp.maximum(count, 1), None
    if centre_of is not None:
        mean, kappa = kappa, centre_of.astype(k.dtype)
        off = _norm(mean - kappa)
    nearest = jnp.repeat(kappa, n, axis=0, total_repeat_length=len(kappa) * n)[: len(k)]
    distance = jnp.where(usable, _norm(k - nearest), jnp.zeros((), k.dtype))
    return kappa, per_block(distance, n, jnp.max), off


def _norm(x: Array) -> Array:
    """The Euclidean norm over the last axis, which no square leads out of its type."""
    top = jnp.max(jnp.abs(x), axis=-1)
    # The inverse of a larger unit may be flushed to zero.
    largest = jnp.full_like(top, 2.0 ** (jnp.finfo(x.dtype).maxexp - 28))
    unit = jnp.where(top > 0, jnp.minimum(top, largest), jnp.ones_like(top))
    return unit * jnp.sqrt(jnp.sum(jnp.square(x / unit[..., None]), axis=-1))


def _sight(mask: Mask, usable: Array, n: int) -> Sight:
    """By lengths, causality, window, segments and array."""
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
    sight = Sight(some, some, some & (lo <= first) & (hi > last))
    if mask.query_segments is not None and mask.key_segments is not None:
        own = mask.query_segments[:, None, None]
        info = jnp.iinfo(own.dtype)
        least = per_block(jnp.where(usable, mask.key_segments, info.max), n, jnp.min)
        most = per_block(jnp.where(usable, mask.key_segments, info.min), n, jnp.max)
        all_own = (least == own) & (most == own)
        sight = sight.beside(Sight((least <= own) & (own <= most), all_own, all_own))
    if mask.array is not None:
        array = jnp.broadcast_to(mask.array, (*mask.array.shape[:2], mask.key_length))
        sight = sight.beside(_sight_of_keys(jnp.moveaxis(array, 1, 0), usable, n))
    return sight


def _sees_own(mask: Mask, usable: Array, own: Array) -> Array:
    """[T, G or 1] bool: whether a row sees the key at which it stands."""
    rows = jnp.arange(mask.query_length, dtype=jnp.int32)
    lo, hi = mask.key_interval(rows)
    place = mask.own_key(rows)
    sees = ((place >= lo) & (place < hi) & usable[own])[:, None]
    if mask.query_segments is not None and mask.key_segments is not None:
        sees = sees & (mask.query_segments == mask.key_segments[own])[:, None]
    if mask.array is not None:
        array = jnp.broadcast_to(mask.array, (*mask.array.shape[:2], mask.key_length))
        sees = sees & _at(jnp.moveaxis(array, 1, 0), own)
    return sees


def _at(x: Array, own: Array) -> Array:
    """[T, G|1] of x [T|1, G|1, S]: the entry of each row's own key."""
    x = jnp.broadcast_to(x, (len(own), *x.shape[1:]))
    return jnp.take_along_axis(x, own[:, None, None], axis=2)[..., 0]


def _over_blocks(x: Array, n: int, reduce: Callable[[Array, int], Array]) -> Array:
    """[T|1, G|1, S] -> [T|1, G|1, blocks]."""
    return jnp.moveaxis(per_block(jnp.moveaxis(x, -1, 0), n, reduce), 0, -1)
