"""Which tokens to attend: those to which the heads together would give most weight."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def lifted(query: Array, directions: Array, scale: float) -> Array:
    """Queries in the space of stored keys, times ``scale``: [B, T, N, r] float32.

    Arguments:
      query: [B, T, N, D].
      directions: [r, K, D] float32.
    """
    batch, tokens, heads, size = query.shape
    grouped = query.reshape(batch, tokens, directions.shape[1], -1, size).astype(jnp.float32)
    product = jnp.einsum("btkgd,rkd->btkgr", grouped, directions, precision=lax.Precision.HIGHEST)
    return scale * product.reshape(batch, tokens, heads, -1)


def chosen(query: Array, latents: Array, far: Array, count: int) -> tuple[Array, Array]:
    """The tokens of most weight, and that weight.

    The weight of a token is the sum over heads of a softmax over the tokens ``far``, of the scores
    of ``query`` and ``latents``, without rotary positions. One choice serves all heads.

    Arguments:
      query: [B, T, N, r] float32.
      latents: [B, r, S] floats.
      far: [B, S] bool, the tokens to choose from.
      count: at most S.

    Returns:
      [B, T, count] int32 and float32; the weight is −1 where there was no token left to choose, and
      NaN where a score was.
    """
    weights = jnp.where(far[:, None], _weights(query, latents, far), jnp.float32(-1))
    weight, place = lax.top_k(weights, count)
    return place, weight


def _weights(query: Array, latents: Array, far: Array) -> Array:
    """[B, T, S] float32."""
    batch, tokens, heads, _ = query.shape
    rows = query.reshape(batch, tokens * heads, -1).astype(latents.dtype)
    scores = jnp.einsum("bnr,brs->bns", rows, latents, preferred_element_type=jnp.float32)
    scores = jnp.where(far[:, None], scores, -jnp.inf)
    largest = jnp.max(scores, axis=-1, keepdims=True)
    raised = jnp.exp(scores - jnp.maximum(largest, jnp.finfo(jnp.float32).min))
    share = 1 / jnp.maximum(jnp.sum(raised, axis=-1), jnp.finfo(jnp.float32).tiny)
    raised, share = raised.reshape(*query.shape[:3], -1), share.reshape(*query.shape[:3], 1)
    # As a sum of rows: XLA for CPUs is slow at reducing an axis before the last one.
    each = (share[:, :, h] * raised[:, :, h] for h in range(1, heads))
    return sum(each, share[:, :, 0] * raised[:, :, 0])
