"""Arithmetic on tiles and columns that the tile functions share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pasa_jax.core.tile.numerics import Numerics, lowest

if TYPE_CHECKING:
    from pasa_jax.core.shapes import Bool, BoolColumn, Column, Float, Shaped

Array = jax.Array


class Guard(NamedTuple):
    """Powers of two that keep the scores of a row in range (eq. 12); all 1 in ordinary data.

    2^e and 2^-e may leave float32, so each comes as a product of factors that do not.
    """

    down: Array  # [R, 1] down·rest·gain = 2^-e: the first two are for q
    rest: Array  # [R, 1]
    gain: Array  # [R, 1] for the factor of the product, where that is large
    temper: Array  # [R, 1] temper·beyond = 2^e; `temper` is at most 2^126 (float64: 2^1022)
    beyond: Array  # [R, 1]


def tempered(x: Float[Array, "*shape"], guard: Guard | None) -> Float[Array, "*shape"]:
    """x·2^e for an exponent, x a column or a tile.

    2^e is cut at 2^126. What that leaves out would change a weight only between scores that differ
    by less than 2^-119 of their bound.
    """
    if guard is None:
        return x
    return x * (beside(guard.temper) if x.ndim == 2 else guard.temper).astype(x.dtype)


def divided(x: Float[Array, "*shape"], guard: Guard | None) -> Float[Array, "*shape"]:
    """x/2^e, for a column or a tile x."""
    if guard is None:
        return x
    for factor in (guard.down, guard.rest, guard.gain):
        x = x * (factor if x.ndim == 2 else factor.reshape(x.shape)).astype(x.dtype)
    return x


def beside(column: Column | BoolColumn) -> Shaped[Array, "R 1"]:
    """A column as [R, 1], to stand beside a tile."""
    return column if column.ndim == 2 else column[:, None]


def dot(
    a: Float[Array, "i j"],
    b: Float[Array, "k l"],
    contract: tuple[int, int],
    dtype: jnp.dtype,
    of_wide: lax.Precision | lax.DotAlgorithmPreset = lax.Precision.HIGHEST,
) -> Float[Array, "m p"]:
    """A matrix product with accumulator ``dtype``; operands of unlike types are widened first.

    Arguments:
      of_wide: the precision where operands have 32 bits or more. By default they are multiplied as
        they are; some chips would use fewer bits.
    """
    if a.dtype != b.dtype:
        a, b = a.astype(dtype), b.astype(dtype)
    dims = (((contract[0],), (contract[1],)), ((), ()))
    precision = of_wide if a.dtype.itemsize >= 4 else None
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=dtype)


def query_key(
    q: Float[Array, "R D"], k: Float[Array, "n D"], dtype: jnp.dtype, numerics: Numerics
) -> Float[Array, "rows columns"]:
    """q·k [R, n] with accumulator ``dtype``; [n, R] where tiles are transposed."""
    pair = (k, q) if numerics.dialect.transposed else (q, k)
    return dot(*pair, (1, 1), dtype)


# Up to this rank a product of thin factors is a sum of outer products, without a matrix unit.
_OUTER_RANK = 4


def outer(
    q: Sequence[Float[Array, " R"]], k: Sequence[Float[Array, " n"]], numerics: Numerics
) -> Float[Array, "rows columns"]:
    """Σ q_r·k_rᵀ [R, n] of thin factors, in their own type; [n, R] where tiles are transposed.

    Arguments:
      q, k: one array for each r, of like shapes: [R] and [n], or [1, R] and [1, n].
    """
    rows, columns = (k, q) if numerics.dialect.transposed else (q, k)
    if len(q) > _OUTER_RANK:
        of_rows, of_columns = (jnp.stack([x.reshape(-1) for x in y]) for y in (rows, columns))
        return dot(of_rows, of_columns, (0, 0), of_rows.dtype)
    products = [x.reshape(-1, 1) * y.reshape(1, -1) for x, y in zip(rows, columns, strict=True)]
    return sum(products[1:], products[0])


def low_rank(
    q: Sequence[Float[Array, "#G rows"]],
    k: Sequence[Float[Array, "#G n"]],
    scale: Float[Array, "#G"],
    groups: int,
    numerics: Numerics,
) -> Float[Array, "R n"]:
    """scale·Σ q_r·k_rᵀ of a tile whose query heads are stacked."""

    def of_head(x: Array, g: int) -> Array:
        return x[min(g, len(x) - 1)]

    def one(g: int) -> Array:
        of_q, of_k = ([of_head(x, g) for x in y] for y in (q, k))
        return outer(of_q, of_k, numerics) * of_head(scale, g)

    return one(0) if groups == 1 else jnp.concatenate([one(g) for g in range(groups)])


def weigh(
    p: Float[Array, "rows columns"], v: Float[Array, "n E"], dtype: jnp.dtype, numerics: Numerics
) -> Float[Array, "m p"]:
    """P·V [R, E] with accumulator ``dtype``; [E, R] where tiles are transposed."""
    if numerics.dialect.transposed:
        return dot(v, p, (0, 0), dtype)
    return dot(p, v, (1, 0), dtype)


def zero_unusable(x: Shaped[Array, "n d"], usable: Bool[Array, "n 1"]) -> Shaped[Array, "n d"]:
    """Rows of x where ``usable`` [n, 1], zeros elsewhere."""
    return jnp.where(usable, x, jnp.zeros_like(x))


def is_finite(x: Float[Array, "*shape"]) -> Bool[Array, "*shape"]:
    """Whether each number is finite; those of 16 bits by their bits, which XLA need not widen."""
    if x.dtype.itemsize != 2:
        return jnp.isfinite(x)
    exponent = jnp.uint16(0x7C00 if x.dtype == jnp.float16 else 0x7F80)
    return (lax.bitcast_convert_type(x, jnp.uint16) & exponent) != exponent


def undropped(x: Float[Array, "R n"], kept: Bool[Array, "R n"] | None) -> Float[Array, "R n"]:
    """x [R, n] where dropout keeps it, zeros elsewhere."""
    return x if kept is None else jnp.where(kept, x, jnp.zeros_like(x))


def shown_by(bias: Float[Array, "*shape"]) -> Bool[Array, "*shape"]:
    """[…] bool: False where a bias hides its key.

    −∞ hides a key, and so does the lowest finite number of the bias's type, which many models use
    as −∞. NaN hides nothing: the key is seen, and the row becomes NaN.
    """
    floor = jnp.asarray(lowest(bias.dtype), bias.dtype)
    return (bias > floor) | (bias != bias)
