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
from functools import reduce
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from pasa_jax.core import tile
from pasa_jax.core.blocks import over_blocks, per_block, spread
from pasa_jax.core.mask import Mask
from pasa_jax.core.operands import Factors, Operands
from pasa_jax.core.plan import Plan
from pasa_jax.core.row_sight import at_keys, by_row, own_keys, row_sight, sees, sight_of_keys
from pasa_jax.core.tile import RowBounds, shown_by

if TYPE_CHECKING:
    from pasa_jax.core.shapes import Bool, Float

Array = jax.Array
# [T] int32 a key of each row -> [T, G] no more than its score.
Least = Callable[[Array], Array]


class Bound(NamedTuple):
    """What is proved of one key head and its G query heads."""

    reference: Array  # [T, G] m − C·ln 2, in natural units; 0 for a row that sees nothing
    gap: Array  # [G] log2 of how far the largest weight of a row may lie below 2^C
    proved: Array  # [] bool: whether every row of every query head stays in range


def bound_of(
    head: Operands,
    usable: Bool[Array, " S"],
    mask: Mask,
    plan: Plan,
    kappa: Float[Array, "blocks D"] | None = None,
) -> Bound:
    """The bounds of one key head, from its block means: O(T·blocks·D) work.

    Arguments:
      head: its operands; with ``kappa`` the queries as they are multiplied, and the scale 1.
      kappa: what was taken off the keys, whose scores less that are stored in float16; None: scores
        are not rounded.
    """
    q, k, v = head.query, head.key, head.value
    n, valid = plan.schedule.block_kv, mask.row_valid()
    if valid is not None:  # padding may hold anything
        q = jnp.where(valid[:, None, None], q, jnp.zeros_like(q))
    rows, least, largest = _of_products(q, k, usable, head.scale, n, kappa)
    sight = row_sight(mask, usable, n)
    if plan.logits_soft_cap is not None:
        rows, least = _capped(rows, least, plan.logits_soft_cap)
    if head.factors is not None:
        rows, least = _with_factors(rows, least, head.factors, usable, n)
    shown = None  # [T|1, G|1, S] by a bias
    if head.bias is not None:
        bias = by_row(head.bias, len(k))
        shown = shown_by(bias)
        sight = sight.beside(sight_of_keys(shown, usable, n))
        rows, least = _with_bias(rows, least, bias, shown & usable, n)

    def of_own(own: Array) -> Array:
        seen = sees(mask, usable, head.data, own)
        if shown is not None:
            seen = seen & at_keys(shown, own)
        return jnp.where(seen, least(own), -jnp.inf)

    best = reduce(jnp.maximum, map(of_own, own_keys(mask)))
    reference, gap = tile.reference(rows, sight, best, _over_last_axis, math.log(2))
    gap = jnp.max(gap, axis=0, initial=0)
    top = jnp.max(jnp.where(usable[:, None], jnp.abs(v), jnp.zeros_like(v)), initial=0)
    proved = jnp.all(tile.in_range(gap, top, len(v))) & (largest < tile.LARGEST_PRODUCT)
    return Bound(reference, gap, proved & jnp.all(jnp.isfinite(reference)))


def _over_last_axis(reduce: Callable[..., Array], x: Array) -> Array:
    return reduce(x, axis=-1)


def _of_products(
    q: Array, k: Array, usable: Array, scale: Array, n: int, centre_of: Array | None
) -> tuple[RowBounds, Least, Array]:
    """The bounds on q·k/α [T, G, blocks], `Least` of it, and [] a bound on every product and score,
    infinite where a stored score may leave float16.

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
    stored = None
    if off is not None:
        stored = tile.stored_error(radius, off, dtype)
        fits = jnp.max(tile.overreach(length, radius, reach), initial=0) < 1
        largest = jnp.where(fits, largest, jnp.inf)

    def least(own: Array) -> Array:
        score = jnp.einsum("tgd,td->tg", q, k[own], precision="highest") * scale
        score = score - length[..., 0] * error * _norm(k[own])[:, None]
        return score if stored is None else score - length[..., 0] * jnp.max(stored)

    return tile.row_bounds(centre, length, radius, reach, error, stored), least, largest


def _capped(rows: RowBounds, least: Least, cap: float) -> tuple[RowBounds, Least]:
    """The bounds after a soft cap."""

    def capped(x: Array) -> Array:
        c = x.dtype.type(cap)
        return c * jnp.tanh(x / c)

    return rows.mapped(capped), lambda own: capped(least(own))


def _with_factors(
    rows: RowBounds, least: Least, factors: Factors, usable: Array, n: int
) -> tuple[RowBounds, Least]:
    """The bounds after a bias of low rank: no factor of a block lies further from its mean than the
    furthest does.
    """
    q, k, scale = (jnp.moveaxis(x, -1, 0).astype(rows.mean.dtype) for x in factors)
    k = jnp.where(usable[:, None, None], k, jnp.zeros_like(k))  # [S, G|1, R]
    keys = jnp.maximum(per_block(usable.astype(k.dtype), n, jnp.sum), 1)
    mean = per_block(k, n, jnp.sum) / keys[:, None, None]
    off = jnp.abs(k - spread(mean, n, len(k)))
    off = per_block(jnp.where(usable[:, None, None], off, jnp.zeros_like(off)), n, jnp.max)
    error = 2 * (q.shape[-1] + 4) * float(jnp.finfo(q.dtype).eps)

    def product(a: Array, b: Array) -> Array:  # [T, G|1, R], [blocks, G|1, R]
        return jnp.sum(jnp.moveaxis(a[:, None] * b, 2, 1), axis=-1) * scale[:, None]

    centre, magnitude = product(q, mean), jnp.abs(q)
    reach = product(magnitude, jnp.abs(mean) + off)
    slack, width = (jnp.abs(x) for x in (error * reach, product(magnitude, off)))
    added = RowBounds(centre + width + slack, centre - slack, centre - width - slack)

    def least_added(own: Array) -> Array:
        terms = q * k[own] * scale[:, None]
        return jnp.sum(terms, axis=-1) - error * jnp.sum(jnp.abs(terms), axis=-1)

    rows = RowBounds(*(a + b for a, b in zip(rows, added, strict=True)))
    return rows, lambda own: least(own) + least_added(own)


def _with_bias(
    rows: RowBounds, least: Least, bias: Array, counts: Array, n: int
) -> tuple[RowBounds, Least]:
    """The bounds after ``bias`` [T|1, G|1, S], of the keys that ``counts`` [T|1, G|1, S] names."""
    bias = bias.astype(rows.mean.dtype)
    most = over_blocks(jnp.where(counts, bias, -jnp.inf), n, jnp.max)
    lowest = over_blocks(jnp.where(counts, bias, jnp.inf), n, jnp.min)
    rows = RowBounds(rows.upper + most, rows.mean + lowest, rows.lower + lowest)
    return rows, lambda own: least(own) + at_keys(bias, own)


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
    distance = jnp.where(usable, _norm(k - spread(kappa, n, len(k))), jnp.zeros((), k.dtype))
    return kappa, per_block(distance, n, jnp.max), off


def _norm(x: Array) -> Array:
    """The Euclidean norm over the last axis, which no square leads out of its type."""
    top = jnp.max(jnp.abs(x), axis=-1)
    # The inverse of a larger unit may be flushed to zero.
    largest = jnp.full_like(top, 2.0 ** (jnp.finfo(x.dtype).maxexp - 28))
    unit = jnp.where(top > 0, jnp.minimum(top, largest), jnp.ones_like(top))
    return unit * jnp.sqrt(jnp.sum(jnp.square(x / unit[..., None]), axis=-1))
