"""Powers of two by a polynomial, for chips whose exponentials are the narrow place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.polynomial import Polynomial

if TYPE_CHECKING:
    from pasa_jax.core.shapes import Float32

Array = jax.Array

# 2^f on [0, 1], of the least relative error that its degree allows: 1.73e-3 and 7.48e-5. (The cubic
# is that of FlashAttention-4.)
COEFFICIENTS = {
    "quadratic": (1.00172476, 0.65763628, 0.33718943),
    "cubic": (0.99992523, 0.6958335, 0.22606718, 0.07802454),
}
# 2^f on [-1/2, 1/2], with the same relative errors: p(f + 1/2)/√2.
_CENTRED = {
    name: (Polynomial(p)(Polynomial((0.5, 1))) / np.sqrt(2)).coef.tolist()
    for name, p in COEFFICIENTS.items()
}
_BIAS, _MANTISSA = 127, 23  # of float32
# A float32 number of this size is whole: adding x to it rounds x, and leaves ⌊x + 1/2⌋ + 127, which
# is the exponent field of the power, in the last bits. No instruction that converts is needed, of
# which GPUs have as few as of exponentials.
_WHOLE = 1.5 * 2**_MANTISSA + _BIAS


def polynomial_exp2(x: Float32[Array, "*shape"], degree: str) -> Float32[Array, "*shape"]:
    """2^x as 2^i·p(x − i), i the whole number nearest to x: that power is put together from bits.

    0 up to -126.5, infinite from 127.5 on, NaN where x is.

    Arguments:
      degree: a name of `COEFFICIENTS`.
    """
    whole = jnp.float32(_WHOLE)
    x = jnp.maximum(x, jnp.float32(-_BIAS))
    # The minimum also keeps XLA from taking (x + whole) - whole for x.
    shifted = jnp.minimum(x + whole, whole + jnp.float32(_BIAS + 1))
    fraction = x - (shifted - whole)
    *rest, last = _CENTRED[degree]
    found = jnp.full_like(x, last)
    for coefficient in reversed(rest):
        found = found * fraction + jnp.float32(coefficient)
    bits = lax.bitcast_convert_type(shifted, jnp.int32)
    bits = lax.shift_left(bits, jnp.full_like(bits, _MANTISSA))
    return found * lax.bitcast_convert_type(bits, jnp.float32)
