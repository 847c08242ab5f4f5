"""One step of the online softmax (eq. 10)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from pasa_jax.core.tile.arrays import beside, dot, tempered, undropped, weigh
from pasa_jax.core.tile.inputs import KeyTile, QueryTile
from pasa_jax.core.tile.numerics import Numerics, Storage, lowest
from pasa_jax.core.tile.state import State
from pasa_jax.core.tile.stored import Scores

if TYPE_CHECKING:
    from pasa_jax.core.shapes import Bool, BoolColumn, Column, Float

Array = jax.Array


_LANES = 128  # of a vector, and columns of the narrowest matrix unit


def probabilities(s: Scores, query: QueryTile, numerics: Numerics) -> Float[Array, "R n"]:
    """P = exp(S' − max S') in the stored type, [R, n]: at most 1, its row maximum exactly 1 (more
    than 1/2 where the dialect rounds the maximum up), but for the error of a polynomial.

    Of `Storage.BOUND` the reference takes the maximum's place, and P may be large or small.
    """
    exponent = s.stored
    if query.guard is not None:  # the tile's own type may not hold 2^e
        exponent = tempered(exponent.astype(numerics.statistics), query.guard)
    if numerics.exponential is not None:
        exponent = exponent.astype(numerics.exponential)
    p = numerics.exp_of_tile(exponent)
    return numerics.dialect.narrow(p, jnp.dtype(numerics.precision.probabilities))


def update(
    state: State,
    s: Scores,
    query: QueryTile,
    key: KeyTile,
    count: Float[Array, ""] | float,
    numerics: Numerics,
    kept: Bool[Array, "R n"] | None = None,
) -> State:
    """The state after one more tile, the paper's mean F recovered globally (eq. 10).

    Arguments:
      count: how many blocks have been seen, this one included (for F).
      kept: [R, n] bool, the weights that dropout keeps; None: all. Dropped ones count in l too.
    """
    stat, acc = numerics.statistics, jnp.dtype(numerics.precision.accumulator)
    wide = numerics.product
    p = probabilities(s, query, numerics)
    l_loc, pv = _sum_and_product(p, key, numerics, kept)
    pv = pv.astype(acc)
    if numerics.storage is Storage.BOUND:  # partial results add
        return State(s.base, state.l + l_loc, state.o + pv, state.f)
    if numerics.subtracts_running_maximum:  # a row without keys so far has the factor 0
        old = numerics.exp(tempered(state.m - s.base, query.guard))
        return State(s.base, old * state.l + l_loc, beside(old.astype(acc)) * state.o + pv, state.f)
    f = state.f
    # What is stored has the statistics' type; a sum of two stored numbers is used unrounded.
    # The offset is added before m is subtracted, so that in float32 no exponent is positive.
    if numerics.storage is Storage.PAPER and s.offset is not None:
        previous, current = state.m.astype(wide), s.base.astype(wide)
        count, inva = jnp.asarray(count, stat), stat.type(numerics.inva)
        before = jnp.where(count > 1, state.f, s.offset)
        f = before + (s.offset - before) / count
        moved = previous + (inva * (before - f)).astype(wide)
        if stat == jnp.float16 and numerics.dialect.narrow_sums:
            moved = jnp.where(previous == lowest(stat), previous, moved)
        previous = moved
        current = current + (inva * (s.offset - f)).astype(wide)
    else:
        previous, current = state.m.astype(wide), s.maximum(numerics)
    seen = s.seen(numerics)
    m, current = _larger(previous, current, seen, stat)
    old = numerics.exp(tempered(previous - m.astype(wide), query.guard)).astype(stat)
    new = numerics.exp(tempered(current - m.astype(wide), query.guard)).astype(stat)
    if seen is not None:
        new = jnp.where(seen, new, jnp.zeros_like(new))
        # The sum of values that a row does not see may be infinite, and 0·∞ is NaN; values of
        # float16, and those with a gain, have finite sums in float32.
        infinite = acc == jnp.float16 or (query.value_gain is None and key.v.dtype != jnp.float16)
        if infinite and numerics.dialect.narrow_sums:
            pv = jnp.where(beside(seen), pv, jnp.zeros_like(pv))
    return State(
        m=m,
        l=old * state.l + new * l_loc,
        o=beside(old.astype(acc)) * state.o + beside(new.astype(acc)) * pv,
        f=f,
    )


def _larger(
    previous: Column, current: Column, seen: BoolColumn | None, stat: jnp.dtype
) -> tuple[Column, Column]:
    """The new maximum of each row, and the tile's: `lowest` for a row that sees none of its keys,
    whatever the offset.
    """
    if seen is not None:
        current = jnp.where(seen, current, jnp.full_like(current, lowest(stat)))
    return jnp.maximum(previous, current).astype(stat), current


def running_maximum(m: Column, s: Scores, numerics: Numerics) -> Column:
    """What `update` makes of the running maximum m [R, 1]: for `Storage.LAGGING` the next r."""
    previous, current = m.astype(numerics.product), s.maximum(numerics)
    return _larger(previous, current, s.seen(numerics), numerics.statistics)[0]


def _sum_and_product(
    p: Float[Array, "R n"],
    key: KeyTile,
    numerics: Numerics,
    kept: Bool[Array, "R n"] | None,
) -> tuple[Column, Float[Array, "R E"]]:
    """P's row sums [R, 1], and P·V [R, E] of the weights that dropout keeps."""
    v = key.v
    if key.value_scale is not None:
        l_loc = numerics.over_row(jnp.sum, p.astype(numerics.statistics))
        weights = undropped(p, kept).astype(numerics.statistics) * key.value_scale
        return l_loc, weigh(weights.astype(p.dtype), v, numerics.accumulated, numerics)
    if numerics.dialect.sum_columns:
        ones = jnp.ones((v.shape[0], numerics.dialect.sum_columns), p.dtype)
        l_loc = numerics.over_row(jnp.max, dot(p, ones, (1, 0), numerics.product))  # all equal
        l_loc = l_loc.astype(numerics.statistics)
        return l_loc, weigh(undropped(p, kept), v, numerics.accumulated, numerics)
    size = v.shape[1]
    if numerics.dialect.transposed and numerics.dialect.matrix_columns:
        ones = jnp.ones((v.shape[0], 16), v.dtype)
        both = weigh(p, jnp.concatenate([v, ones], axis=1), numerics.product, numerics)
        return both[size : size + 1].astype(numerics.statistics), both[:size]
    idle = -size % numerics.dialect.matrix_columns if numerics.dialect.matrix_columns else 0
    if idle == 0 or kept is not None:
        l_loc = numerics.over_row(jnp.sum, p.astype(numerics.statistics))
        return l_loc, weigh(undropped(p, kept), v, numerics.accumulated, numerics)
    # As few columns of ones as fill whole vectors.
    ones = jnp.ones((v.shape[0], -size % _LANES or _LANES), v.dtype)
    both = dot(p, jnp.concatenate([v, ones], axis=1), (1, 0), numerics.product)
    return both[:, size : size + 1].astype(numerics.statistics), both[:, :size]
