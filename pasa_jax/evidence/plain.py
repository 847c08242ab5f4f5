"""Attention written without this library, which results are compared with."""

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


def numpy_attention(
    query: NDArray,
    key: NDArray,
    value: NDArray,
    *,
    scale: float | None = None,
    bias: NDArray | None = None,
    visible: NDArray | None = None,
    logits_soft_cap: float | None = None,
    sinks: NDArray | None = None,
    store: np.dtype | None = None,
) -> NDArray:
    """softmax(scale · Q·Kᵀ + bias)·V in NumPy, head by head: what results are compared with.

    Arguments:
      query, key, value: of one batch entry, [T, N, D], [S, K, D], [S, K, E].
      scale: default 1/√D.
      bias, visible: broadcastable to [N, T, S]; a row that sees no key gives 0.
      logits_soft_cap, sinks: as in `pasa_jax.dot_product_attention`.
      store: None: all is in float64. A type: products, scores and weights are rounded to it on the
        way, as eager model code does, and all else is in float32.

    Returns:
      [T, N, E] in float64, or float32.
    """
    wide = np.float64 if store is None else np.float32
    q, k, v = (np.asarray(x).astype(wide) for x in (query, key, value))
    shape = (q.shape[1], len(q), len(k))
    factor = wide(1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    biases = None if bias is None else np.broadcast_to(np.asarray(bias).astype(wide), shape)
    shown = np.broadcast_to(True if visible is None else visible, shape)

    def stored(x: NDArray) -> NDArray:
        return x if store is None else x.astype(store).astype(wide)

    out = np.empty((*q.shape[:2], v.shape[-1]), wide)
    with np.errstate(all="ignore"):  # what overflows is infinite or NaN, as in eager code
        for n in range(q.shape[1]):
            of_key = n * k.shape[1] // q.shape[1]
            s = stored(stored(q[:, n] @ k[:, of_key].T) * factor)
            if logits_soft_cap is not None:
                s = stored(logits_soft_cap * np.tanh(s / logits_soft_cap))
            if biases is not None:
                s = stored(s + biases[n])
            s = np.where(shown[n], s, -np.inf)
            sink = -np.inf if sinks is None else float(sinks[n])
            top = np.maximum(s.max(axis=1, keepdims=True), sink)
            p = np.exp(s - np.where(top > -np.inf, top, 0))
            total = p.sum(axis=1, keepdims=True) + np.exp(sink - top)
            total = np.where(top > -np.inf, total, 1)
            out[:, n] = stored(p / total) @ v[:, of_key]
    return out


def float64_attention(
    query: NDArray, key: NDArray, value: NDArray, *, is_causal: bool = False
) -> NDArray[np.float64]:
    """`numpy_attention` in float64 of each batch entry; shapes as in `plain_attention`."""
    visible = np.tril(np.ones((query.shape[1], key.shape[1]), bool)) if is_causal else None
    entries = zip(*(np.asarray(x) for x in (query, key, value)), strict=True)
    return np.stack([numpy_attention(*entry, visible=visible) for entry in entries])
