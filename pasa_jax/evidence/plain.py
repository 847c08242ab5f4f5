"""Attention as it is written without this library: the baselines of the evidence."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

Array = jax.Array


def plain_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    scores: str,
    prescaled: bool,
    is_causal: bool = False,
    centre_keys: bool = False,
) -> Array:
    """softmax(Q·Kᵀ/√D)·V with the whole score matrix stored in ``scores``.

    Arguments:
      query, key, value: [B, T, N, D], [B, S, K, D], [B, S, K, E].
      scores: the type in which scores and probabilities are stored; products and softmax are
        accumulated in float32, which is the best case of the chips.
      prescaled: fold 1/√D into the query first (float16 then overflows at √D times larger
        products), or apply it to the stored scores, as eager model code does.
      is_causal: top-left causal mask.
      centre_keys: take the mean over the whole sequence off the keys (SageAttention's smoothing).
    """
    store = jnp.dtype(scores)
    scale = 1 / math.sqrt(query.shape[-1])
    if centre_keys:
        wide = key.astype(jnp.float32)
        key = (wide - jnp.mean(wide, axis=1, keepdims=True)).astype(key.dtype)
    if prescaled:
        query = (query.astype(jnp.float32) * scale).astype(query.dtype)
    grouped = query.reshape(*query.shape[:2], key.shape[2], -1, query.shape[-1])
    s = jnp.einsum("btkgd,bskd->bkgts", grouped, key, preferred_element_type=jnp.float32)
    s = s.astype(store).astype(jnp.float32)
    if not prescaled:
        s = (s * scale).astype(store).astype(jnp.float32)
    if is_causal:
        s = jnp.where(jnp.tril(jnp.ones(s.shape[-2:], bool)), s, float(jnp.finfo(store).min))
    p = jnp.exp(s - jnp.max(s, axis=-1, keepdims=True)).astype(store)
    total = jnp.sum(p.astype(jnp.float32), axis=-1)
    wide_value = value if p.dtype == value.dtype else value.astype(jnp.float32)
    out = jnp.einsum(
        "bkgts,bske->btkge",
        p.astype(wide_value.dtype),
        wide_value,
        preferred_element_type=jnp.float32,
    )
    out = out / jnp.moveaxis(total, 3, 1)[..., None]
    return out.reshape(*query.shape[:3], -1).astype(value.dtype)


def float64_attention(
    query: NDArray, key: NDArray, value: NDArray, *, is_causal: bool = False
) -> NDArray[np.float64]:
    """The same in float64 with NumPy, head by head; shapes as in `plain_attention`."""
    q, k, v = (np.asarray(x).astype(np.float64) for x in (query, key, value))
    groups = q.shape[2] // k.shape[2]
    out = np.empty((*q.shape[:3], v.shape[-1]))
    for b, n in np.ndindex(q.shape[0], q.shape[2]):
        s = q[b, :, n] @ k[b, :, n // groups].T / math.sqrt(q.shape[-1])
        if is_causal:
            s = np.where(np.tril(np.ones(s.shape, bool)), s, -np.inf)
        p = np.exp(s - s.max(axis=1, keepdims=True))
        out[b, :, n] = p @ v[b, :, n // groups] / p.sum(axis=1, keepdims=True)
    return out
