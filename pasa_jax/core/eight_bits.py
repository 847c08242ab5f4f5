"""Queries and keys of one head in 8 bits, for products of integers (docs/algorithm.md, section 12).

A query has a scale of its own, and so has a key, which first loses the mean κ of its block: what
PASA takes off the scores is also what 8 bits could not hold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from pasa_jax.core.blocks import spread
from pasa_jax.core.packed import FORMATS, pack_values
from pasa_jax.core.tile import Codes, wide_type

if TYPE_CHECKING:
    from pasa_jax.core.shapes import Bool, Float

Array = jax.Array


class EightBits(NamedTuple):
    """Codes with a scale for each query and key."""

    query: Codes  # [T, G, D] and [T, G]
    key: Codes  # [S, D] and [S], of keys less the mean of their block


def eight_bits(
    q: Float[Array, "T G D"],
    k: Float[Array, "S D"],
    usable: Bool[Array, " S"],
    kappa: Float[Array, "blocks D"],
    n: int,
) -> EightBits:
    """The codes of a head's queries and keys.

    Arguments:
      usable: which keys may be looked at; the others have the scale NaN.
      kappa: the mean of each block of n keys.
    """
    wide = wide_type(k.dtype)
    shifted = k.astype(wide) - spread(kappa.astype(wide), n, len(k))
    shifted = jnp.where(usable[:, None], shifted, jnp.full_like(shifted, jnp.nan))
    return EightBits(_codes(q), _codes(shifted))


def _codes(x: Float[Array, "*rows D"]) -> Codes:
    sound = jnp.all(jnp.isfinite(x), axis=-1)
    codes, scale = pack_values(jnp.where(sound[..., None], x, jnp.zeros_like(x)), FORMATS["int8"])
    return Codes(codes, jnp.where(sound, scale, jnp.full_like(scale, jnp.nan)))
