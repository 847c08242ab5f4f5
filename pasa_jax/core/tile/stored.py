"""The scores of a tile, as they are stored (docs/algorithm.md, eq. 4, 7, 9, 11)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pasa_jax.core.tile.arrays import Guard, beside, divided, dot, query_key, shown_by, tempered
from pasa_jax.core.tile.inputs import KeyTile, QueryTile
from pasa_jax.core.tile.numerics import Numerics, Storage, lowest
from pasa_jax.core.tile.state import State

if TYPE_CHECKING:
    from pasa_jax.core.shapes import BoolColumn, Column, Float, TileMask

Array = jax.Array


# What changes the scores [R, n] of a tile: a function of the caller, elementwise.
Modify = Callable[[Array], Array]


class Scores(NamedTuple):
    """The scores of one tile: S = (stored + base) + inva·offset, per row."""

    stored: Array  # [R, n] S' minus its base, masked entries far below; statistics dtype
    # [R, 1] the row maximum of the visible S' (or the running one), or lowest; the reference of
    # `Storage.BOUND`
    base: Array
    # [R, 1] what the shift took off (s̄' for `paper`, to be multiplied by inva), or None: 0
    offset: Array | None
    slope: Array | None = None  # [R, n] derivative of the soft cap and the function of the caller
    every: bool = False  # whether every row sees every key of the tile
    given: Array | None = None  # [R, n] what the function of the caller was given, or 0 if hidden

    def maximum(self, numerics: Numerics) -> Column:
        """[R, 1] base + inva·offset in the product's type: the row maximum of S, or the running
        one."""
        wide = numerics.product
        base = self.base.astype(wide)
        if self.offset is None:
            return base
        offset = self.offset.astype(wide)
        if numerics.storage is Storage.PAPER:
            offset = offset * wide.type(numerics.inva)
        return base + offset

    def seen(self, numerics: Numerics) -> BoolColumn | None:
        """[R, 1] bool: whether the row sees a key of the tile; None: every row sees every key."""
        return None if self.every else self.base != lowest(numerics.statistics)


def plain_scores(
    q: Float[Array, "R D"], k: Float[Array, "n D"], scale: Float[Array, ""], numerics: Numerics
) -> Float[Array, "R n"]:
    """S = q·k/α in the product's type, [R, n], neither shifted nor rounded."""
    return dot(q, k, (1, 1), numerics.product) * scale.astype(numerics.product)


def scores(
    query: QueryTile,
    key: KeyTile,
    state: State,
    mask: TileMask | None,
    bias: Float[Array, "R n"] | None,
    numerics: Numerics,
    *,
    modify: Modify | None = None,
    added: Float[Array, "R n"] | None = None,
    with_slope: bool = False,
) -> Scores:
    """The stored scores S' of one tile, masked, minus their row maximum (eq. 4, 7, 9).

    Arguments:
      mask: [R, n] or [R, 1] bool, True where the row sees the key; None: everywhere.
      bias: [R, n] added to the scores; −inf, or its type's lowest number, hides a key.
      state: its running maximum is the r of `Storage.LAGGING`, and may be the base.
      modify: the function of the caller that changes scores in natural units, after the soft cap.
        Where it returns −inf, or the type's lowest number, it hides the key.
      added: [R, n] added to the scores like a bias; it hides nothing.
      with_slope: also give the derivative of both, and what ``modify`` was given, for the gradient.
    """
    stat, store = numerics.statistics, jnp.dtype(numerics.precision.scores)
    if bias is not None:
        shown = shown_by(bias)
        mask = shown if mask is None else mask & shown
    if added is not None:
        bias = added.astype(stat) if bias is None else bias.astype(stat) + added.astype(stat)
    if bias is not None:
        bias = divided(bias.astype(stat) * stat.type(numerics.unit), query.guard)
    narrow = numerics.tile if bias is None and query.rest is None else stat
    product = _product(query, key, numerics)
    maximum = None
    if numerics.maximum_first and mask is None and bias is None:
        maximum = numerics.over_row(jnp.max, product) * query.gain
        # A compiler that computes maximum·gain − m with a single rounding is kept from it.
        maximum = jnp.maximum(maximum, jnp.full_like(maximum, lowest(maximum.dtype)))
    if query.codes_gain is None or key.scale is None:
        product = product * query.gain
    else:
        product = product * query.codes_gain * key.scale
    offset = None
    wide = numerics.storage in (Storage.BENEATH_MAXIMUM, Storage.BOUND) and not numerics.centred
    if wide:  # rounded below, or not at all
        z = product.astype(stat)
    elif numerics.storage is Storage.LAGGING:
        plain = bias is None and not numerics.needs_scores
        running = state.m if plain else None
        z, offset = _lagging_reference(query, key, product, running, mask, numerics)
    else:
        z = product.astype(store).astype(narrow)
        z = z if query.rest is None else z * query.rest.astype(stat)
        if key.weights is not None:  # s̄' over the columns that M mixed, before the mask
            offset = dot(z, key.weights, (1, 0), numerics.product).astype(stat)
            if key.usable is not None:
                z = jnp.where(key.usable, z, jnp.full_like(z, jnp.nan))
        elif key.kappa is not None:
            offset = _kappa_product(query, key, numerics)
    slope = given = None
    if numerics.needs_scores:  # add the offset back first
        z = z if offset is None else z + beside(offset) * stat.type(numerics.inva)
        z = _whole(z, query.capped)
        offset = None
    if numerics.logits_soft_cap is not None:
        z, slope = _soft_cap(z, numerics)
    if modify is not None:
        z, of_function, given = _modified(z, modify, numerics, with_slope)
        shown = shown_by(z)
        mask = shown if mask is None else mask & shown
        if of_function is not None:
            slope = of_function if slope is None else slope * of_function
    if bias is not None:
        z = z + bias
    if mask is not None:
        z = jnp.where(mask, z, jnp.full_like(z, lowest(z.dtype)))
        slope, given = (
            None if x is None else jnp.where(mask, x, jnp.zeros_like(x)) for x in (slope, given)
        )
    if numerics.storage is Storage.BOUND:
        assert query.reference is not None
        # The exponent is as large as the gap: it is formed in float32.
        rest = query.reference if offset is None else query.reference - offset
        stored = z - beside(rest)
        slope = slope if with_slope else None
        return Scores(stored, query.reference, None, slope, mask is None, given)
    base = numerics.over_row(jnp.max, z) if maximum is None else maximum.astype(z.dtype)
    if numerics.subtracts_running_maximum:
        if numerics.dialect.whole_maximum and store == stat:
            base = jnp.ceil(base)
        base = jnp.maximum(base, state.m)
    stored = z - beside(base)
    # Where product·gain − base is computed with a single rounding, the largest score may exceed or
    # miss its own maximum by that rounding; where scores are huge, every probability would vanish.
    if numerics.dialect.contracts:
        stored = jnp.where(z >= beside(base), jnp.zeros_like(stored), stored)
    if base.dtype != stat:
        narrow_base, base = base, base.astype(stat)
        if mask is not None:
            seen = narrow_base != lowest(narrow_base.dtype)
            base = jnp.where(seen, base, jnp.full_like(base, lowest(stat)))
    if numerics.storage is Storage.BENEATH_MAXIMUM and store != stat:
        if store == jnp.float16:  # what is below its range has no weight: clamp it
            stored = jnp.maximum(stored, jnp.full_like(stored, lowest(store)))
        stored = numerics.dialect.narrow(stored, store).astype(numerics.exponential or stat)
    slope = slope if with_slope else None
    return Scores(stored, base, offset, slope, mask is None, given)


def _kappa_product(query: QueryTile, key: KeyTile, numerics: Numerics) -> Column:
    """c = q·κ/α, [R, 1], the offset of `mean` (eq. 7), like one more column of the product."""
    assert key.kappa is not None
    product = query_key(query.q, key.kappa, numerics.product, numerics) * query.gain
    product = product if query.rest is None else product * query.rest
    if len(key.kappa) > 1:  # equal rows, see `key_tile`
        product = numerics.over_row(jnp.max, product)
    return product.astype(numerics.statistics)


def _product(query: QueryTile, key: KeyTile, numerics: Numerics) -> Float[Array, "R n"]:
    """q·k [R, n] in the product's type, before gains and scales."""
    wide = numerics.product
    if query.codes is not None:
        return query_key(query.codes, key.k, jnp.dtype(jnp.int32), numerics).astype(wide)
    product = query_key(query.q, key.k, numerics.accumulated, numerics).astype(wide)
    if key.means is not None:
        product = product + _means_product(query, key, numerics)
        if key.usable is not None:
            product = jnp.where(key.usable, product, jnp.full_like(product, jnp.nan))
    return product


def _means_product(query: QueryTile, key: KeyTile, numerics: Numerics) -> Float[Array, "R n"]:
    """q·κ of each key's group, κ what was taken off its keys when they were packed; [R, 1] where
    there is one group.
    """
    assert key.means is not None
    groups, q = len(key.means), query.q.astype(numerics.product)
    if groups == 1:  # a single column is no work for a matrix unit
        return jnp.sum(q * key.means, axis=1, keepdims=True)
    if query.q.dtype == jnp.bfloat16:  # one product of 16 bits, not one of 32
        parts = dot(query.q, jnp.concatenate(_parts(key.means)), (1, 1), numerics.product)
        each = parts[:, :groups] + parts[:, groups : 2 * groups] + parts[:, 2 * groups :]
    else:
        each = dot(q, key.means, (1, 1), numerics.product)
    shape = (len(q), len(key.k) // groups)
    columns = [jnp.broadcast_to(each[:, g : g + 1], shape) for g in range(groups)]
    return jnp.concatenate(columns, axis=1)


def _parts(x: Float[Array, "*shape"]) -> list[Float[Array, "*shape"]]:
    """Three numbers of bfloat16 whose sum is x in float32, by its bits: a compiler may leave out a
    rounding to 16 bits.
    """
    parts = []
    for _ in range(3):
        upper = lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-(1 << 16))
        part = lax.bitcast_convert_type(upper, jnp.float32)
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return parts


def _lagging_reference(
    query: QueryTile,
    key: KeyTile,
    shifted: Float[Array, "R n"],
    running: Column | None,
    mask: TileMask | None,
    numerics: Numerics,
) -> tuple[Float[Array, "R n"], Column]:
    """S' and r of `reference` with rounded products (eq. 11).

    r is the ``running`` maximum before this block [R, 1]. A row that has none yet takes the
    block's own maximum, computed as for `mean`. With a bias or a soft cap (``running`` None) every
    block does: the running maximum is then not a maximum of S. r enters the product q·k as two
    more columns, in two halves of q's type; the sum of those halves is added back.
    """
    assert key.raw is not None
    stat, store = numerics.statistics, jnp.dtype(numerics.precision.scores)
    z = shifted.astype(store).astype(stat)
    if mask is not None:
        z = jnp.where(mask, z, jnp.full_like(z, lowest(stat)))
    own = jnp.max(z, axis=1, keepdims=True)
    own = jnp.where(own > lowest(stat), own + _kappa_product(query, key, numerics), 0)
    r = own if running is None else jnp.where(running > lowest(stat), running, own)
    high = r.astype(query.q.dtype)
    low = (r - high.astype(stat)).astype(query.q.dtype)
    r = high.astype(stat) + low.astype(stat)
    product = dot(query.q, key.raw, (1, 1), numerics.accumulated).astype(numerics.product)
    product = product - r.astype(numerics.product)
    return product.astype(store).astype(stat), r


def _whole(s: Float[Array, "R n"], guard: Guard | None) -> Float[Array, "R n"]:
    """S of S/2^e; infinite where it is beyond its type."""
    if guard is None:
        return s
    return tempered(s, guard) * beside(guard.beyond).astype(s.dtype)


def _soft_cap(
    s: Float[Array, "R n"], numerics: Numerics
) -> tuple[Float[Array, "R n"], Float[Array, "R n"]]:
    """cap·tanh(S/cap) and its derivative 1 − tanh²; tanh of an infinite S is 1."""
    assert numerics.logits_soft_cap is not None
    cap = numerics.statistics.type(numerics.logits_soft_cap * numerics.unit)
    tanh = jnp.tanh(s / cap)
    return cap * tanh, 1 - tanh * tanh


def _modified(
    s: Float[Array, "R n"], modify: Modify, numerics: Numerics, with_slope: bool
) -> tuple[Float[Array, "R n"], Float[Array, "R n"] | None, Float[Array, "R n"]]:
    """What the caller's function makes of S, its derivative, and what it was given: S in natural
    units, cut where it is beyond its type.
    """
    unit = s.dtype.type(numerics.unit)
    given = s / unit if numerics.dialect.base_two else s
    if s.dtype.itemsize >= 4:
        most = float(jnp.finfo(s.dtype).max) / 4
        given = jnp.clip(given, -most, most)
    if with_slope:
        new, slope = jax.jvp(modify, (given,), (jnp.ones_like(given),))
    else:
        new, slope = modify(given), None
    return (new * unit if numerics.dialect.base_two else new), slope, given
