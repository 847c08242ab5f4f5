"""The table of named cases that every implementation must pass, and the exact formula in NumPy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

from pasa_jax import Schedule

# Small tiles, so that small cases have full, partial and skipped tiles and a tail.
TILES = Schedule(block_q=32, block_kv=16)


@dataclass(frozen=True)
class Case:
    """Shapes by letter and the keywords of `dot_product_attention`; arrays are named by a str."""

    t: int = 40
    s: int = 50
    n: int = 4
    k: int = 2
    d: int = 16
    e: int = 12
    b: int = 2
    bias: tuple[int, ...] | None = None
    mask: tuple[int, ...] | None = None
    offset: float = 0.0  # added to every key
    keywords: dict[str, Any] = field(default_factory=dict)

    def arrays(self, dtype: str, seed: int = 0) -> dict[str, Any]:
        """The positional arguments by name, rounded to ``dtype``."""
        rng = np.random.default_rng(seed)

        def normal(*shape: int) -> Any:
            return jnp.asarray(rng.standard_normal(shape), dtype)

        found = {
            "query": normal(self.b, self.t, self.n, self.d),
            "key": normal(self.b, self.s, self.k, self.d) + jnp.asarray(self.offset, dtype),
            "value": normal(self.b, self.s, self.k, self.e) + jnp.asarray(self.offset, dtype),
        }
        if self.bias is not None:
            found["bias"] = jnp.asarray(rng.standard_normal(self.bias), jnp.float32)
        if self.mask is not None:
            found["mask"] = jnp.asarray(rng.random(self.mask) > 0.5)
        return found


def _int32(*x: Any) -> np.ndarray:
    return np.asarray(x, np.int32)


_SEGMENTS = (np.repeat([[0, 1, 2], [3, 3, 4]], [10, 10, 20], axis=1).astype(np.int32),)

CASES: dict[str, Case] = {
    "full": Case(),
    "one tile": Case(t=8, s=16),
    "one query": Case(t=1, s=50),
    "one key": Case(t=5, s=1),
    "multi-query": Case(n=4, k=1),
    "heads equal": Case(n=2, k=2, d=24, e=24),
    "biased": Case(offset=8.0),
    "causal": Case(t=50, keywords={"is_causal": True}),
    "causal, fewer keys": Case(t=50, s=30, keywords={"is_causal": True}),
    "causal, more keys": Case(t=20, s=50, keywords={"is_causal": True}),
    "bottom right": Case(t=20, keywords={"is_causal": True, "causal_alignment": "bottom_right"}),
    "bottom right, fewer keys": Case(
        t=50, s=30, keywords={"is_causal": True, "causal_alignment": "bottom_right"}
    ),
    "window": Case(t=50, keywords={"local_window_size": (7, 3)}),
    "window, causal": Case(t=50, keywords={"local_window_size": 20, "is_causal": True}),
    "lengths": Case(
        keywords={
            "query_seq_lengths": _int32(13, 40),
            "key_value_seq_lengths": _int32(50, 21),
        }
    ),
    "lengths, bottom right": Case(
        keywords={
            "query_seq_lengths": _int32(13, 40),
            "key_value_seq_lengths": _int32(20, 45),
            "is_causal": True,
            "causal_alignment": "bottom_right",
        }
    ),
    "no key at all": Case(keywords={"key_value_seq_lengths": _int32(0, 50)}),
    "mask": Case(mask=(2, 4, 40, 50)),
    "mask, broadcast": Case(mask=(1, 1, 1, 50), keywords={"is_causal": True}),
    "mask of keys": Case(mask=(2, 1, 1, 50)),
    "bias": Case(bias=(2, 4, 40, 50)),
    "bias, broadcast": Case(bias=(1, 4, 1, 50)),
    "bias of rows": Case(bias=(2, 1, 40, 1), mask=(1, 4, 40, 50)),
    "segments": Case(s=40, keywords={"segment_ids": _SEGMENTS[0]}),
    "segments, causal": Case(s=40, keywords={"segment_ids": _SEGMENTS[0], "is_causal": True}),
    "soft cap": Case(keywords={"logits_soft_cap": 1.5}),
    "soft cap, causal, biased": Case(
        t=50, offset=4.0, keywords={"logits_soft_cap": 5.0, "is_causal": True}
    ),
    "sinks": Case(keywords={"sinks": np.asarray([0.5, -1, 2, 30], np.float32)}),
    "scale": Case(keywords={"scale": 0.7}),
    "negative scale": Case(keywords={"scale": -0.2, "is_causal": True}),
}


def exact(arrays: dict[str, Any], keywords: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Output and log-sum-exp in float64 with NumPy; rows that see nothing: 0 and −inf."""
    q, k, v = (np.asarray(arrays[x]).astype(np.float64) for x in ("query", "key", "value"))
    (b, t, n, d), s = q.shape, k.shape[1]
    k, v = (np.repeat(x, n // x.shape[2], axis=2) for x in (k, v))
    scale = keywords.get("scale", d**-0.5)
    scores = np.einsum("btnd,bsnd->bnts", q, k) * float(scale)
    cap = keywords.get("logits_soft_cap")
    if cap is not None:
        scores = cap * np.tanh(scores / cap)
    if "bias" in arrays:
        scores = scores + np.asarray(arrays["bias"], np.float64)
    seen = np.broadcast_to(visible(b, t, s, arrays, keywords), scores.shape)
    scores = np.where(seen, scores, -np.inf)
    sinks = keywords.get("sinks")
    if sinks is not None:
        extra = np.broadcast_to(np.asarray(sinks, np.float64)[None, :, None, None], (b, n, t, 1))
        scores = np.concatenate([scores, extra], axis=-1)
    top = np.max(scores, axis=-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0)
    p = np.exp(scores - top)
    total = p.sum(-1, keepdims=True)
    out = np.einsum("bnts,bsne->btne", (p / np.where(total == 0, 1, total))[..., :s], v)
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0].swapaxes(1, 2)
    lengths = keywords.get("query_seq_lengths")
    if lengths is not None:
        padding = np.arange(t)[None] >= np.asarray(lengths)[:, None]
        out[padding], lse[padding] = 0, -np.inf
    return out, lse


def visible(b: int, t: int, s: int, arrays: dict[str, Any], kw: dict[str, Any]) -> np.ndarray:
    """[B, 1|N, T, S] bool, written as the arguments' documentation reads."""
    q_len = np.asarray(kw.get("query_seq_lengths", np.full(b, t)))[:, None, None, None]
    k_len = np.asarray(kw.get("key_value_seq_lengths", np.full(b, s)))[:, None, None, None]
    i, j = np.arange(t)[:, None], np.arange(s)[None]
    seen = (j < k_len) & (i < q_len)
    at = i + (k_len - q_len if kw.get("causal_alignment") == "bottom_right" else 0)
    if kw.get("is_causal"):
        seen = seen & (j <= at)
    window = kw.get("local_window_size")
    if window is not None:
        left, right = (window, window) if isinstance(window, int) else window
        seen = seen & (j >= at - left) & (j <= at + right)
    ids = kw.get("segment_ids")
    if ids is not None:
        seen = seen & (ids[:, None, :, None] == ids[:, None, None, :])
    if "mask" in arrays:
        seen = seen & np.asarray(arrays["mask"])
    return seen
