"""The rows and the keys of a tile, made ready for the product q·k."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pasa_jax.core.tile.arrays import Guard, dot, zero_unusable
from pasa_jax.core.tile.numerics import Numerics, Storage, wide_type

if TYPE_CHECKING:
    from pasa_jax.core.shapes import Bool, Float, Float32, Shaped

Array = jax.Array


class Codes(NamedTuple):
    """Rows or keys in 8 bits: codes times a scale, which is NaN for one that is not finite."""

    codes: Array  # [L, D] int8
    scale: Array  # [L, 1] float32


class QueryTile(NamedTuple):
    """The rows of a tile, made by `query_tile`."""

    q: Array  # [R, D]
    gain: Array  # [R|1, 1] factor of the product, applied before rounding
    guard: Guard | None  # what the stored scores are divided by; None: 1
    rest: Array | None = None  # [1, 1] factor applied after rounding, or None: 1
    value_gain: Array | None = None  # [] factor of the values these rows see, or None: 1
    # What the scores are divided by until a soft cap or a function of the caller, which need the
    # scores themselves; ``guard`` is then None. None: 1.
    capped: Guard | None = None
    reference: Array | None = None  # [R, 1] what `Storage.BOUND` takes off the scores
    # What is multiplied with keys of 8 bits, while ``q`` is with their mean.
    codes: Array | None = None  # [R, D] int8
    codes_gain: Array | None = None  # [R, 1] ``gain`` times the scale of the codes


class KeyTile(NamedTuple):
    """The keys of a tile, made by `key_tile`."""

    k: Array  # [n, D] without what the shift takes off: K'; or codes of 8 bits of it
    v: Array  # [n, E] with unusable rows zeroed
    usable: Array | None  # [1, n] bool: False where key or value must not be looked at
    kappa: Array | None = None  # [1, D] what `mean` took off every key (or rows, all equal)
    weights: Array | None = None  # [n, 1] 1/n for the columns that the paper's M mixed, else 0
    raw: Array | None = None  # [n, D] the keys as they are, for `Storage.LAGGING`
    scale: Array | None = None  # [1, n] of codes; [n, 1] where tiles are transposed
    means: Array | None = None  # [m, D] what was taken off m groups of keys when packed, less κ
    value_scale: Array | None = None  # [1, n] factors of the rows of v, or None: 1


def query_tile(
    q: Float[Array, "R D"],
    scale: Float[Array, ""],
    guard: Guard | None,
    numerics: Numerics,
) -> QueryTile:
    """Query rows with 1/α and the guard's 2^-e placed where they lose nothing (eq. 12).

    Arguments:
      q: [R, D].
      scale: [] 1/α in the product's type; 1 for `paper`, whose M carries it.
      guard: None where the scores cannot leave their range.
    """
    dtype = numerics.product
    gain = jnp.full((1, 1), scale.astype(dtype) * dtype.type(numerics.unit))
    rest = None
    if numerics.rounds_products and numerics.dialect.base_two:
        power = _power_of_two(gain)  # log2 e comes after the product, or it would round q
        gain, rest = power, gain / power
    if guard is not None:
        gain = gain * guard.gain
        if q.dtype == jnp.float16:  # products of float16 fit float32: divide those
            gain = gain * guard.down * guard.rest
        else:  # the product itself could overflow: divide q, which is exact
            q = q * guard.down.astype(q.dtype) * guard.rest.astype(q.dtype)
    if numerics.rounds_products:  # nothing can be multiplied with the product itself
        q = (q.astype(dtype) * gain).astype(q.dtype)
        gain = jnp.ones_like(gain)
    if numerics.maximum_first:  # a factor that is not negative keeps the order of products
        q, gain = jnp.where(gain < 0, -q, q), jnp.abs(gain)
    codes = codes_of(q) if numerics.precision.eight_bits else None
    query = QueryTile(q, gain, guard, rest)
    if numerics.needs_scores:
        query = query._replace(guard=None, capped=guard)
    if codes is None:
        return query
    scale = codes.scale.reshape(numerics.beside_tile(len(q)))
    return query._replace(codes=codes.codes, codes_gain=gain * scale)


def key_tile(
    k: Shaped[Array, "n D"],
    v: Float[Array, "n E"],
    usable: Bool[Array, "n 1"] | None,
    numerics: Numerics,
    *,
    scale: Float32[Array, "rows columns"] | None = None,
    kappa: Float[Array, "rows D"] | None = None,
    matrix: Float[Array, "n n"] | None = None,
    weights: Float[Array, "n 1"] | None = None,
    value_gain: Float[Array, ""] | None = None,
    means: Float[Array, "m D"] | None = None,
    value_scale: Float[Array, "1 n"] | None = None,
) -> KeyTile:
    """Keys without what the shift takes off them (eq. 4, 7), and values fit for the product.

    A key that is not usable (not finite, or padding) is zeroed before keys are mixed, so that it
    cannot reach rows that do not see it, neither through the block's mean nor as 0·NaN. Then its
    column is made NaN, so that the rows that see it become NaN.

    Arguments:
      k, v: [n, D], [n, E].
      scale: None; or k are codes of keys less κ, with this scale, as in `KeyTile`.
      usable: [n, 1] bool, or None: all are.
      kappa: [1, D] of k's type, for `mean` (any vector is valid, since the same is added back); or
        several equal rows, for a matrix unit that cannot multiply by a single one.
      matrix, weights: M [n, n] and the share of each column in the row mean [n, 1], for `paper`.
      value_gain: [] the power of two that keeps P·V in range, or None.
      means: [m, D] float32 what was taken off m groups of keys before, or None; κ is then taken off
        the means.
      value_scale: [1, n] float32 factors of the values, or None: 1.
    """
    if usable is not None:
        k, v = zero_unusable(k, usable), zero_unusable(v, usable)
    if value_gain is not None:
        v = v * value_gain.astype(v.dtype)
    row = None if usable is None else usable.reshape(1, -1)
    if scale is not None:
        return KeyTile(k, v, row, kappa, scale=scale)
    shifted, raw, wide = k, None, numerics.product
    if kappa is not None and means is not None:
        means = means - kappa[:1].astype(wide)
    elif kappa is not None:
        shifted = (k.astype(wide) - kappa[:1].astype(wide)).astype(k.dtype)
        raw = _nan_unusable(k, usable) if numerics.storage is Storage.LAGGING else None
    if matrix is not None:  # the row mean needs every column: `scores` makes them NaN later
        shifted = dot(matrix, k, (1, 0), numerics.product).astype(k.dtype)
    else:
        shifted = _nan_unusable(shifted, usable)
    return KeyTile(shifted, v, row, kappa, weights, raw, means=means, value_scale=value_scale)


_LEAST_SCALED = 2.0**-100  # smaller numbers become codes of 0


def codes_of(x: Float[Array, "L D"]) -> Codes:
    """x in 8 bits."""
    x = x.astype(wide_type(x.dtype))
    largest = jnp.max(jnp.abs(x), axis=1, keepdims=True)
    scale = jnp.where(largest <= _LEAST_SCALED, jnp.ones_like(largest), largest / 127)
    nearest = jnp.floor(x / scale + 0.5)  # Triton has no rounding to the nearest
    return Codes(nearest.astype(jnp.int32).astype(jnp.int8), scale)


def mean_key(
    total: Float[Array, "*blocks D"],
    count: Float[Array, "*#blocks 1"] | Float[Array, ""],
    dtype: jnp.dtype,
) -> Float[Array, "blocks D"]:
    """κ of a block (eq. 7) from the sum and the number of its usable keys, in the keys' type."""
    return (total * (1 / jnp.maximum(count, 1))).astype(dtype)


def _power_of_two(x: Float32[Array, "1 1"]) -> Float32[Array, "1 1"]:
    """The largest power of two in x (float32), with its sign; 1 for 0."""
    bits = lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-(1 << 23))
    power = lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(power == 0, jnp.ones_like(power), power)


def _nan_unusable(x: Float[Array, "n D"], usable: Bool[Array, "n 1"] | None) -> Float[Array, "n D"]:
    """Rows of x where ``usable`` [n, 1], NaN elsewhere."""
    if usable is None:
        return x
    return jnp.where(usable, x, jnp.full_like(x, jnp.nan))
