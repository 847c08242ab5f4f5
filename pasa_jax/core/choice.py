"""`auto`'s choice where it depends on the data: for one key head, with rounded products."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from pasa_jax.core.blocks import spread
from pasa_jax.core.tile import wide_type

if TYPE_CHECKING:
    from pasa_jax.core.shapes import Bool, Float

Array = jax.Array


# A row's largest score stands about so many standard deviations above their mean.
_TOP = 3.0


def shifting_helps(
    q: Float[Array, "T G D"],
    k: Float[Array, "S D"],
    usable: Bool[Array, " S"],
    kappa: Float[Array, "blocks D"],
    n: int,
    scale: Float[Array, ""],
) -> Bool[Array, ""]:
    """[] bool: whether `auto` shifts this head, with rounded products (section 6).

    Rounding errors are proportional to the size of the scores, and only those near a row's maximum
    matter. With o = q·κ/α and σ the standard deviation of q·(k − κ)/α these are about o + 3σ
    unshifted and 3σ shifted; rounding k − κ costs about another σ. So shifting pays where
    (o + 3σ)² > (3σ)² + σ². Where keys are biased against the queries (o < 0) it often does not.
    o and σ are estimated from the mean and the variance of each channel.
    """
    wide = wide_type(k.dtype)
    rows = q.reshape(-1, q.shape[-1]).astype(wide)
    rows = jnp.where(jnp.isfinite(rows), rows, jnp.zeros_like(rows))
    q_mean = jnp.mean(rows, axis=0)
    q_var = jnp.mean(jnp.square(rows - q_mean), axis=0)
    centre = kappa.astype(wide)
    offset, square = of_block(centre, q_mean, q_var)
    weights = usable.astype(wide) / jnp.maximum(jnp.sum(usable, dtype=wide), 1)
    deviation = jnp.where(usable[:, None], k.astype(wide) - spread(centre, n, k.shape[0]), 0)
    around = jnp.sum(weights * (jnp.square(deviation) @ (jnp.square(q_mean) + q_var)))
    towards = jnp.sign(scale).astype(wide) * jnp.mean(offset)
    return pays(jnp.mean(square), around, towards)


def of_block(
    kappa: Float[Array, "*blocks D"], q_mean: Float[Array, " D"], q_var: Float[Array, " D"]
) -> tuple[Array, Array]:
    """[*blocks] the mean of q·κ, and of its square, over the queries."""
    offset = kappa @ q_mean
    return offset, jnp.square(offset) + jnp.square(kappa) @ q_var


def pays(square: Array, around: Array, towards: Array) -> Array:
    """Bool: (o + 3σ)² > (3σ)² + σ², from the means of o², σ², and o with the scale's sign."""
    return square + 2 * _TOP * jnp.sqrt(around) * towards > around
