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


def key_codes(
    k: Float[Array, "S D"], usable: Bool[Array, " S"], kappa: Float[Array, "blocks D"], n: int
) -> Codes:
    """Codes [S, D] and scales [S, 1] of a head's keys less the mean of their block.

    Arguments:
      usable: which keys may be looked at; the others have the scale NaN.
      kappa: the mean of each block of n keys.
    """
    wide = wide_type(k.dtype)
    clean = jnp.where(usable[:, None], k.astype(wide) - spread(kappa.astype(wide), n, len(k)), 0)
    codes, scale = codes_of(clean)
    return Codes(codes, jnp.where(usable[:, None], scale, jnp.full_like(scale, jnp.nan)))
