"""Keys of one head in 8 bits, for products of integers (docs/algorithm.md, section 12).

Keys first lose the mean κ of their block: what PASA takes off the scores is also what 8 bits could
not hold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from pasa_jax.core.blocks import spread
from pasa_jax.core.tile import Codes, codes_of, wide_type

if TYPE_CHECKING:
    from pasa_jax.core.shapes import Bool, Float

Array = jax.Array

_GROUP = 128  # keys that share a scale


def group_count(n: int) -> int:
    """How many groups with a scale of their own a block of n keys has."""
    return n // _GROUP if n % _GROUP == 0 else 1


def key_codes(
    k: Float[Array, "S D"], usable: Bool[Array, " S"], kappa: Float[Array, "blocks D"], n: int
) -> Codes:
    """Codes [S, D] and scales [S] of a head's keys less the mean of their block.

    Arguments:
      usable: which keys may be looked at; the others have the scale NaN.
      kappa: the mean of each block of n keys.
    """
    wide = wide_type(k.dtype)
    clean = jnp.where(usable[:, None], k.astype(wide) - spread(kappa.astype(wide), n, len(k)), 0)
    group = n // group_count(n)
    groups = jnp.pad(clean, ((0, -len(k) % group), (0, 0))).reshape(-1, group, k.shape[1])
    codes, scale = codes_of(groups, (1, 2))
    scale = spread(scale[:, 0, 0], group, len(k))
    codes = codes.reshape(-1, k.shape[1])[: len(k)]
    return Codes(codes, jnp.where(usable, scale, jnp.full_like(scale, jnp.nan)))
