"""Inline attention of a Qwen- or Gemma-style model, and the one call that replaces it.

    python examples/flax_inline_einsum.py

Open model code in JAX (MaxText, tunix, bonsai) multiplies its scores out in the type of its
activations. `EinsumAttention` is that code in short: grouped heads, rotary positions, a causal
window. `PasaAttention` overrides the one method that does it. Keys get the bias that
Qwen's models have; the errors are against float32 arithmetic on the same 16-bit arrays.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pasa_jax import dot_product_attention


def rotary(x: jax.Array) -> jax.Array:
    """Rotary positions of [B, T, N, H]."""
    size = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None] / 10_000 ** (jnp.arange(size) / size)
    sin, cos = (f(angle)[None, :, None].astype(x.dtype) for f in (jnp.sin, jnp.cos))
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class EinsumAttention(nnx.Module):
    """The usual code."""

    def __init__(self, width: int, heads: int, kv_heads: int, size: int, *, rngs: nnx.Rngs):
        def linear(count: int) -> nnx.LinearGeneral:
            return nnx.LinearGeneral(width, (count, size), rngs=rngs)

        self.q, self.k, self.v = linear(heads), linear(kv_heads), linear(kv_heads)
        self.out = nnx.LinearGeneral((heads, size), width, axis=(-2, -1), rngs=rngs)
        self.window = 256

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(self.attention(rotary(self.q(x)), rotary(self.k(x)), self.v(x)))

    def attention(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        batch, length, heads, size = q.shape
        q = q.reshape(batch, length, k.shape[2], -1, size)
        scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k) * size**-0.5
        at = jnp.arange(length)
        seen = (at[None] <= at[:, None]) & (at[None] > at[:, None] - self.window)
        scores = jnp.where(seen, scores, jnp.finfo(scores.dtype).min)
        weights = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(q.dtype)
        out = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v)
        return out.reshape(batch, length, heads, size)


class PasaAttention(EinsumAttention):
    """The same in one call: no repeated heads, no [T, S] mask, no score that overflows."""

    def attention(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return dot_product_attention(
            q,
            k,
            v,
            is_causal=True,
            local_window_size=(self.window - 1, 0),  # Gemma: and logits_soft_cap=50.0
        )


def main(length: int = 512, width: int = 128, bias: float = 110.0) -> dict[str, float]:
    """Prints and returns the error of each attention, relative to the largest output."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, length, width)), jnp.float32)
    errors = {}
    for kind in (EinsumAttention, PasaAttention):
        block = kind(width, 4, 2, 64, rngs=nnx.Rngs(0))
        for projection in (block.q, block.k):  # alike, as in a head that resonates
            assert projection.bias is not None
            projection.bias[...] = projection.bias[...].at[..., -8:].set(bias)
        for dtype in (jnp.float16, jnp.bfloat16):
            arrays = rotary(block.q(x)), rotary(block.k(x)), block.v(x)
            narrow = [array.astype(dtype) for array in arrays]
            exact = EinsumAttention.attention(
                block, *(array.astype(jnp.float32) for array in narrow)
            )
            out = jax.jit(block.attention)(*narrow).astype(jnp.float32)
            name = f"{kind.__name__} {jnp.dtype(dtype).name}"
            errors[name] = float(np.abs(out - exact).max() / np.abs(exact).max())
            print(f"{name:24} {errors[name]:.1e}")
    return errors


if __name__ == "__main__":
    main()
