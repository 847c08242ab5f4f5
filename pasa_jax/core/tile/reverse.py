"""The reverse of a tile (eq. 15)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pasa_jax.core.tile.arrays import beside, dot, tempered, undropped
from pasa_jax.core.tile.inputs import KeyTile, QueryTile
from pasa_jax.core.tile.numerics import Numerics, Storage, lowest
from pasa_jax.core.tile.softmax import probabilities
from pasa_jax.core.tile.stored import Scores

if TYPE_CHECKING:
    from pasa_jax.core.shapes import Bool, Float

Array = jax.Array


class TileGradients(NamedTuple):
    """What one tile adds to the gradients; the query's and key's still lack the factor 1/α."""

    q: Array  # [R, D]
    k: Array  # [n, D]
    v: Array  # [n, E]
    scores: Array  # [R, n] of S after bias, hence of the bias


def gradients(
    s: Scores,
    query: QueryTile,
    key: KeyTile,
    q: Float[Array, "R D"],
    k: Float[Array, "n D"],
    m: Float[Array, "R 1"],
    l: Float[Array, "R 1"],  # noqa: E741
    d_out: Float[Array, "R E"],
    delta: Float[Array, "R 1"],
    numerics: Numerics,
    kept: Bool[Array, "R n"] | None = None,
) -> TileGradients:
    """The reverse of one tile, from the row statistics of the forward pass (eq. 15).

    The scores are the forward pass's own, bit for bit, so their probabilities sum to one.

    Arguments:
      q, k: [R, D], [n, D] as the user gave them, unusable rows zeroed.
      m, l: [R, 1] of the finished state, sinks included.
      d_out: [R, E] cotangent of the output, in the product's type, or in the values' own.
      delta: [R, 1] Σ d_out·out minus the cotangent of the log-sum-exp.
      kept: as in `update`.
    """
    wide = numerics.product
    p = probabilities(s, query, numerics).astype(wide)
    top = s.maximum(numerics)
    seen = s.base != lowest(numerics.statistics)
    gap = jnp.where(seen, top - m, jnp.full_like(m, lowest(wide)))
    share = numerics.exp(tempered(gap, query.guard)) / jnp.where(l != 0, l, jnp.ones_like(l))
    if numerics.storage is not Storage.BOUND:
        # The probability of the tile's largest score, at most 1. Where `paper` has moved m by far
        # larger offsets, rounding may give more. (Where the maximum was rounded up, P's is > 1/2.)
        largest = 2 if numerics.dialect.whole_maximum else 1
        share = jnp.minimum(share, jnp.full_like(share, largest))
    p = p * beside(jnp.where(seen, share, jnp.zeros_like(share)))
    return reverse(p, s, key, q, k, d_out, delta, numerics, kept)


def reverse(
    p: Float[Array, "R n"],
    s: Scores,
    key: KeyTile,
    q: Float[Array, "R D"],
    k: Float[Array, "n D"],
    d_out: Float[Array, "R E"],
    delta: Float[Array, "R 1"],
    numerics: Numerics,
    kept: Bool[Array, "R n"] | None = None,
) -> TileGradients:
    """The reverse of one tile from its probabilities p [R, n], which sum to one over all tiles.

    Arguments:
      p: in the product's type.
      q, k, d_out, delta, kept: as in `gradients`.
    """
    wide = numerics.product
    # float16 may not hold the gradients, whose range depends on the loss: they stay in float32.
    operand = wide if q.dtype == jnp.float16 else q.dtype
    of_wide = (
        numerics.dialect.float16_gradients if q.dtype == jnp.float16 else lax.Precision.HIGHEST
    )
    product = partial(dot, dtype=wide, of_wide=of_wide)
    if kept is not None:
        d_out = d_out * wide.type(1 / numerics.kept_share)
    if d_out.dtype != key.v.dtype:  # like types need no widening: their products are exact
        d_out = d_out.astype(operand)
    d_p = undropped(product(d_out, key.v.astype(d_out.dtype), (1, 1)), kept)
    d_s = p * (d_p - beside(delta))
    d_raw = (d_s if s.slope is None else d_s * s.slope.astype(wide)).astype(operand)
    return TileGradients(
        q=product(d_raw, k.astype(operand), (1, 0)),
        k=product(d_raw, q.astype(operand), (0, 0)),
        v=product(undropped(p, kept).astype(operand), d_out.astype(operand), (0, 0)),
        scores=d_s,
    )
