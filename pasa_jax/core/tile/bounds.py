"""Bounds on a row's scores that are known before its tiles are walked (eq. 21, 22).

For a block of keys with mean κ, no key of which is further from κ than r, each score lies below
q·κ/α + ‖q‖·r/α, and their maximum is at least their mean, q·κ/α. The arrays are [rows, blocks] or
[blocks, rows], or broadcast to it: the walker says along which axis the blocks lie.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pasa_jax.core.tile.numerics import Numerics

Array = jax.Array

# C of eq. 22: every weight is multiplied by 2^60, so that float32's range above 1 is used as well.
RAISED_LOG2 = 60
# A row's sum of weights may be as small as 2^-100: what float32 drops is below 2^-26 of it.
_LEAST_LOG2 = -100
_MOST_LOG2 = 126  # of a sum
LARGEST_PRODUCT = 2.0**120  # of a query and a key, and of a score
LARGEST_STORED = 2.0**15  # of a score that is stored in float16


class RowBounds(NamedTuple):
    """Bounds on the scores of each row in each block."""

    upper: Array  # no score of the block is above it
    mean: Array  # the mean of the block's scores is not below it
    lower: Array  # no score of the block is below it

    def mapped(self, f: Callable[[Array], Array]) -> RowBounds:
        """The bounds after an increasing function of the scores."""
        return RowBounds(*map(f, self))


class Sight(NamedTuple):
    """Which blocks a row sees, by one condition or by several; bool."""

    some: Array  # False where it surely sees no key of the block
    surely: Array  # True where it surely sees a usable key
    whole: Array  # True where it surely sees every usable key of a block that has one

    def beside(self, other: Sight) -> Sight:
        """Where both conditions must hold."""
        surely = (self.surely & other.whole) | (self.whole & other.surely)
        return Sight(self.some & other.some, surely, self.whole & other.whole)


def row_bounds(
    centre: Array,
    length: Array,
    radius: Array,
    reach: Array,
    error: float,
    stored: Array | None = None,
) -> RowBounds:
    """The bounds of rows of ``length`` ‖q‖/α whose products with the means are ``centre``, q·κ/α.

    Arguments:
      radius, reach: of each block: no key is further from its mean, and none is longer.
      error: of ``centre`` and of the scores, relative to length·reach.
      stored: what `stored_error` says, where scores are stored in 16 bits; None: they are not.
    """
    slack = error * reach
    if stored is not None:
        slack = slack + stored
    return RowBounds(
        upper=centre + length * (radius + slack),
        mean=centre - length * slack,
        lower=centre - length * (radius + slack),
    )


def stored_error(radius: Array, off: Array, dtype: jnp.dtype) -> Array:
    """The error of scores around a centre that are rounded to float16, of keys less the centre that
    are rounded to ``dtype``, relative to ‖q‖/α; twice, like other errors.

    Arguments:
      radius: no key is further from the centre.
      off: how far the centre lies from the mean of its keys.
    """
    rounding = float(jnp.finfo(dtype).eps) + float(jnp.finfo(jnp.float16).eps)
    return off + radius * radius.dtype.type(rounding)


def overreach(length: Array, radius: Array, reach: Array) -> Array:
    """At least 1 where a score that is stored in float16, or a product, may be too large."""
    stored = radius * radius.dtype.type(1 / LARGEST_STORED)
    product = reach * reach.dtype.type(1 / LARGEST_PRODUCT)
    return length * jnp.maximum(stored, product)


def place_sight(lo: Array, hi: Array, start: Array, stop: Array) -> Sight:
    """What rows that see the keys [lo, hi) see of the keys [start, stop), if all are usable."""
    some = jnp.minimum(hi, stop) > jnp.maximum(lo, start)
    return Sight(some, some, some & (lo <= start) & (hi >= stop))


def reference(
    bounds: RowBounds,
    sight: Sight,
    own: Array,
    over_blocks: Callable[..., Array],
    ln_2: float,
) -> tuple[Array, Array]:
    """What is taken off each row's scores, 0 for a row that sees nothing; and its gap.

    The gap is the logarithm to base 2 of how far the row's largest weight may lie below 2^C; NaN
    where a bound is.

    Arguments:
      own: no larger than the score of the key at which the row stands, −∞ where the row does not
        see it.
      over_blocks: (jnp.max, x) -> the largest of each row.
      ln_2: ln 2 in the unit of the scores.
    """
    m, least = extremes(bounds, sight, over_blocks)
    return settled_reference(m, jnp.maximum(least, own), ln_2)


def extremes(
    bounds: RowBounds, sight: Sight, over_blocks: Callable[..., Array]
) -> tuple[Array, Array]:
    """Of each row's scores in some blocks: an upper bound on the largest, and a lower one; −∞ where
    it sees none of them.
    """
    m = over_blocks(jnp.max, jnp.where(sight.some, bounds.upper, -jnp.inf))
    partly = jnp.where(sight.surely, bounds.lower, -jnp.inf)
    return m, over_blocks(jnp.max, jnp.where(sight.whole, bounds.mean, partly))


def settled_reference(m: Array, least: Array, ln_2: float) -> tuple[Array, Array]:
    """`reference` from an upper bound on the largest score of each row and from a lower one."""
    some = m != -jnp.inf
    zero = jnp.zeros_like(m)
    gap = jnp.where(some, (m - least) * m.dtype.type(1 / ln_2), zero)
    return jnp.where(some, m - m.dtype.type(RAISED_LOG2 * ln_2), zero), gap


def in_range(gap: Array, largest_value: Array, keys: int) -> Array:
    """Bool: whether weights down to the gap, and their sums with values, stay in float32.

    Arguments:
      largest_value: the largest magnitude in the values.
      keys: S.
    """
    positive = jnp.where(largest_value > 0, largest_value, jnp.ones_like(largest_value))
    log2 = jnp.log2(positive.astype(gap.dtype))
    small = gap <= RAISED_LOG2 - _LEAST_LOG2 + jnp.minimum(log2, 0)
    return small & (jnp.maximum(log2, 0) + RAISED_LOG2 + math.log2(max(1, keys)) <= _MOST_LOG2)


# A reference without a proof lies this far above a mean of the row's scores, as a power of two.
_ABOVE_MEAN_LOG2 = 40
# A row's sum may be as small as this: weights that float32 drops are then below 2^-46 of it.
_LEAST_SUM = 2.0**-80


def fixed_reference(centre: Array, seen: Array, numerics: Numerics) -> Array:
    """A reference for each row, without a proof; 0 for a row that sees nothing (eq. 23).

    Arguments:
      centre: the products with the blocks' means, a tile [R, blocks] as the dialect has it.
      seen: bool, of its shape: whether the row sees a key of the block, by positions.
    """
    m = numerics.over_row(jnp.max, jnp.where(seen, centre, -jnp.inf))
    above = m.dtype.type(_ABOVE_MEAN_LOG2 * math.log(2) * numerics.unit)
    return jnp.where(m == -jnp.inf, jnp.zeros_like(m), m + above)


def in_range_by_sum(l: Array, largest_value: Array) -> Array:  # noqa: E741
    """Bool: whether a row's sum of weights says that none left its range (eq. 23).

    Arguments:
      largest_value: the largest magnitude in the values, or 0.
    """
    small = jnp.where(largest_value > 0, jnp.minimum(largest_value, 1), 1)
    return (l * small >= _LEAST_SUM) & (l < jnp.inf)


def power_above(x: Array) -> Array:
    """A power of two that is at least x and below 4·x; 1 where x is at most 1. x must be below
    2^126.
    """
    power, rest = jnp.ones_like(x), x
    for log2 in (64, 32, 16, 8, 4, 2, 1):
        more = rest > 2.0**log2
        power = jnp.where(more, power * 2.0**log2, power)
        rest = jnp.where(more, rest * 2.0**-log2, rest)
    return jnp.where(x > 1, power * 2, power)


def guard_by_size(
    rows: Array, top: Array, bound: Array, dtype: str, stored: str
) -> tuple[Array, Array]:
    """Query rows of ``dtype`` that are divided by a guard so that their scores fit ``stored``, and
    the guard [R, 1], at most 2^126 (eq. 12 with magnitudes for norms).

    Arguments:
      rows: [R, D] float32, every factor of the scores in them.
      top: [R, 1] their largest magnitudes.
      bound: no number of the keys that they are multiplied by is larger.
    """
    if "float16" in (dtype, stored):
        # A score must fit float16, and so must the row.
        reach = bound * (float(rows.shape[1]) * 2.0**-14)
        excess = jnp.maximum(top * reach, top * 2.0**-15)
        guard = power_above(jnp.minimum(excess, 2.0**120))
        return (rows * (1 / guard)).astype(dtype), guard
    of_rows = power_above(top * 2.0**-60)
    of_keys = power_above(bound * (float(rows.shape[1]) * 2.0**-60))
    scaled = rows * (1 / of_rows) * (1 / of_keys)
    return scaled.astype(dtype), jnp.minimum(of_rows, 2.0**63) * jnp.minimum(of_keys, 2.0**63)
