"""Values as integers of 8 or 4 bits and a scale, the largest size over 127 or 7."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
LARGEST = {8: 127, 4: 7}


def scales(bits: int, heads: int) -> int:
    """Scales of a token: 8 bits do with one; 4 bits need one for each head."""
    return 1 if bits == 8 else heads


def packed(value: Array, bits: int) -> tuple[Array, Array]:
    """Integers and scales of values [B, T, K, E].

    Returns:
      [B, T, K, E] int8 or, of 4 bits, [B, T, K, E/2] uint8: channel i + E/2 in the upper half of
      byte i, both raised by 8. And [B, T, 1 or K] uint16: bfloat16 scales, NaN where a value is
      not finite.
    """
    wide = value.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=(2, 3) if bits == 8 else 3)
    largest = largest.reshape(*value.shape[:2], -1)
    scale = (largest / LARGEST[bits]).astype(jnp.bfloat16)
    divisor = scale.astype(jnp.float32)
    finite = jnp.isfinite(divisor)
    divisor = jnp.where(finite & (divisor > 0), divisor, jnp.ones_like(divisor))[..., None]
    whole = jnp.clip(jnp.round(wide / divisor), -LARGEST[bits], LARGEST[bits])
    whole = jnp.where(finite[..., None], whole, jnp.zeros_like(whole))
    scale = jnp.where(finite, scale, jnp.full_like(scale, jnp.nan))
    scale = lax.bitcast_convert_type(scale, jnp.uint16)
    if bits == 8:
        return whole.astype(jnp.int8), scale
    low, high = jnp.split((whole + 8).astype(jnp.uint8), 2, axis=-1)
    return low | (high << 4), scale


def unpacked(whole: Array, scale: Array, bits: int) -> Array:
    """The values [..., K, E] float32 of what `packed` gave."""
    scale = lax.bitcast_convert_type(scale, jnp.bfloat16).astype(jnp.float32)
    if bits == 4:
        whole = jnp.concatenate([whole & 15, whole >> 4], axis=-1).astype(jnp.int8) - 8
    return whole.astype(jnp.float32) * scale[..., None]
