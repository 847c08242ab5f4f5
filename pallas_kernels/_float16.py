"""float16 for a compiler that has none: its bits travel as uint16 and are widened with integers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def to_bits(x: Array) -> Array:
    """float16 as uint16, bit by bit; other types as they are."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.float16 else x


def from_bits(x: Array) -> Array:
    """The float32 numbers whose float16 bits ``x`` holds; exact, subnormal numbers included."""
    if x.dtype != jnp.uint16:
        return x
    bits = x.astype(jnp.int32)
    magnitude = bits & 0x7FFF
    # The exponent is put where float32 has it, 112 too small; the sum corrects that.
    value = lax.bitcast_convert_type((magnitude << 13) + (112 << 23), jnp.float32)
    subnormal = magnitude.astype(jnp.float32) * jnp.float32(2.0**-24)
    value = jnp.where(magnitude < 0x400, subnormal, value)
    value = jnp.where(magnitude == 0x7C00, jnp.float32(jnp.inf), value)
    value = jnp.where(magnitude > 0x7C00, jnp.float32(jnp.nan), value)
    return jnp.where(bits & 0x8000 != 0, -value, value)
