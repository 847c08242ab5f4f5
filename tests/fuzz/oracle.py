"""What `dot_product_attention` must give, in NumPy, from the words of docs/api.md alone.

float64 throughout, and NumPy's long double for float64 inputs. Heads stand before positions:
[B, N, T, S]. Nothing of the implementation is imported.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from tests.fuzz.calls import Call
from tests.fuzz.functions import FUNCTIONS, dilated

LOWEST = float(np.finfo(np.float32).min)


@dataclass(frozen=True)
class Seen:
    """Which keys each query sees, [B, N, T, S] bool, by groups of conditions."""

    reach: np.ndarray  # causality, window and the keys' lengths, as if no query were padding
    by_place: np.ndarray  # and no padding
    by_mask: np.ndarray
    by_rest: np.ndarray  # segments, positions, blocks, functions, and bias that hides
    rows: np.ndarray  # [B, 1, T, 1] queries that are no padding

    @property
    def all(self) -> np.ndarray:
        return self.by_place & self.by_mask & self.by_rest


@dataclass(frozen=True)
class Truth:
    """The exact results, and what bounds are made of."""

    seen: np.ndarray  # [B, N, T, S]
    parts: Seen
    q: np.ndarray  # [B, N, T, D] padding zeroed
    k: np.ndarray  # [B, N, S, D] one for each query head; what is not finite zeroed
    v: np.ndarray  # [B, N, S, E]
    scale: float
    product: np.ndarray  # [B, N, T, S] q·k
    bias: np.ndarray  # [B, N, T, S] 0 where hidden
    terms: np.ndarray  # [B, N, T, S] sum of the magnitudes that a bias of low rank is the sum of
    slope: np.ndarray  # [B, N, T, S] of the soft cap
    scores: np.ndarray  # [B, N, T, S] after soft cap and bias
    p: np.ndarray  # [B, N, T, S] weights, 0 where hidden
    sink: np.ndarray  # [B, N, T] weight of the sink
    out: np.ndarray  # [B, N, T, E]
    lse: np.ndarray  # [B, N, T]
    bad: np.ndarray  # [B, N, T] rows that must be NaN
    finite: np.ndarray  # [B, N, S] keys and values that are


def conditions(call: Call) -> Seen:
    """What each query sees, condition by condition, by comparing positions."""
    x, arrays = call.signature, call.arrays
    shape = x.full
    i, j = np.arange(x.t)[:, None], np.arange(x.s)[None, :]
    q_len = _length(arrays.get("query_seq_lengths"), x.t, x.b)
    k_len = _length(arrays.get("key_value_seq_lengths"), x.s, x.b)
    rows = np.broadcast_to(i < q_len, (x.b, 1, x.t, 1))
    place = np.broadcast_to(j < k_len, (x.b, 1, x.t, x.s))
    rest = np.ones(shape, bool)
    by_position = "q_positions" in arrays
    stands = i + (k_len - q_len if x.static.get("causal_alignment") == "bottom_right" else 0)
    if by_position:
        stands = arrays["q_positions"].astype(np.int64)[:, None, :, None]
        j = arrays["kv_positions"].astype(np.int64)[:, None, None, :]
    reached = np.ones(shape, bool)
    if x.static.get("is_causal"):
        reached = reached & (j <= stands)
    window = x.static.get("local_window_size")
    if window is not None:
        left, right = window if isinstance(window, tuple) else (window, window)
        reached = reached & (j >= stands - left) & (j <= stands + right)
    if by_position:
        rest = rest & reached
    else:
        place = place & reached
    rest = rest & _by_functions(call)
    by_mask = np.broadcast_to(arrays.get("mask", np.True_), shape)
    if "query_segments" in arrays:
        rest = rest & (
            arrays["query_segments"][:, None, :, None] == arrays["key_segments"][:, None, None, :]
        )
    bias = arrays.get("bias")
    if bias is not None and bias.dtype != np.int32:
        wide = np.asarray(bias, np.float64)
        rest = rest & ~(wide <= float(jnp.finfo(bias.dtype).min))
    reach = np.broadcast_to(place, shape)
    return Seen(reach, reach & rows, by_mask, rest, rows)


def _by_functions(call: Call) -> np.ndarray:
    """[B, N, T, S] bool by a block mask, whose function is `dilated`, and by a ``mask_mod``."""
    x, seen = call.signature, np.ones(call.signature.full, bool)
    place = np.ogrid[tuple(slice(n) for n in x.full)]
    if "mask_mod" in x.static:
        seen = seen & FUNCTIONS[x.static["mask_mod"]](*place)
    if "kinds" in call.arrays:
        (rows, columns), kinds = x.static["block"], call.arrays["kinds"]
        kinds = np.repeat(np.repeat(kinds, rows, axis=2), columns, axis=3)[:, :, : x.t, : x.s]
        seen = seen & ((kinds == 2) | ((kinds == 1) & dilated(*place)))
    return seen


def _length(lengths: np.ndarray | None, full: int, batch: int) -> np.ndarray:
    """[B, 1, 1, 1] lengths clipped to [0, full]."""
    if lengths is None:
        return np.full((batch, 1, 1, 1), full)
    return np.asarray([min(max(int(n), 0), full) for n in lengths]).reshape(batch, 1, 1, 1)


def truth(call: Call) -> Truth:
    """The exact output and log-sum-exp of a call."""
    x = call.signature
    wide = np.longdouble if x.dtype == "float64" else np.float64
    arrays = {name: np.asarray(a).astype(wide) for name, a in call.arrays.items() if name in FLOATS}
    parts = conditions(call)
    seen = parts.all
    q = np.where(parts.rows, arrays["query"].swapaxes(1, 2), 0)
    k, v = (np.repeat(arrays[n].swapaxes(1, 2), x.n // x.k, axis=1) for n in ("key", "value"))
    finite = np.isfinite(k).all(-1) & np.isfinite(v).all(-1)
    k, v = (np.where(finite[..., None], y, 0) for y in (k, v))
    scale = wide(arrays.get("scale", x.static.get("scale", 1 / np.sqrt(wide(x.d)))))
    product = q @ k.swapaxes(-1, -2)
    scores, slope = product * scale, np.ones_like(product)
    cap = x.static.get("logits_soft_cap")
    if cap is not None:
        tanh = np.tanh(scores / cap)
        scores, slope = cap * tanh, 1 / np.cosh(np.clip(scores / cap, -300, 300)) ** 2
    bias, terms = np.broadcast_to(arrays.get("bias", wide(0)), x.full), np.zeros(x.full, wide)
    if "q_factors" in arrays:
        f, g = arrays["q_factors"], arrays["k_factors"].swapaxes(-1, -2)
        bias, terms = (np.broadcast_to(y, x.full) for y in (f @ g, np.abs(f) @ np.abs(g)))
    bad = np.any(seen & (~finite[:, :, None, :] | np.isnan(bias)), axis=-1)
    bias = np.where(seen & ~np.isnan(bias), bias, 0)
    scores = scores + bias
    p, sink, lse = _softmax(np.where(seen, scores, -np.inf), arrays.get("sinks"))
    sink, lse = np.where(parts.rows[..., 0], sink, 0), np.where(parts.rows[..., 0], lse, -np.inf)
    lse = np.where(np.isfinite(lse), lse, LOWEST if x.dtype != "float64" else np.finfo("d").min)
    return Truth(
        seen, parts, q, k, v, scale, product, bias, terms, slope, scores, p, sink, p @ v, lse, bad,
        finite,
    )  # fmt: skip


FLOATS = ("query", "key", "value", "bias", "sinks", "scale", "q_factors", "k_factors")


def _softmax(
    scores: np.ndarray, sinks: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights of the keys and of the sink, and the log-sum-exp, −inf where there is nothing."""
    top = scores.max(-1)
    if sinks is not None:
        top = np.maximum(top, sinks[None, :, None])
    base = np.where(np.isfinite(top), top, 0)
    p = np.exp(scores - base[..., None])
    sink = np.zeros_like(base) if sinks is None else np.exp(sinks[None, :, None] - base)
    total = p.sum(-1) + sink
    some = np.where(total > 0, total, 1)
    with np.errstate(divide="ignore"):
        return p / some[..., None], sink / some, base + np.log(total)


@dataclass(frozen=True)
class Backward:
    """The exact gradients by name, and what their bounds are made of."""

    grads: dict[str, np.ndarray]
    d_out: np.ndarray  # [B, N, T, E]
    d_p: np.ndarray  # [B, N, T, S] d_out·v
    delta: np.ndarray  # [B, N, T] d_out·out − d_lse
    d_s: np.ndarray  # [B, N, T, S]


def backward(call: Call, found: Truth, d_out: np.ndarray, d_lse: np.ndarray) -> Backward:
    """Gradients for the cotangents [B, T, N, E] and [B, T, N] (eq. 15 of docs/algorithm.md)."""
    d_out = np.asarray(d_out, found.q.dtype).swapaxes(1, 2)
    d_lse = np.asarray(d_lse, found.q.dtype).swapaxes(1, 2)
    d_p = d_out @ found.v.swapaxes(-1, -2)
    delta = (d_out * found.out).sum(-1) - d_lse
    d_s = found.p * (d_p - delta[..., None])
    raw = d_s * found.slope
    grads = {
        "query": (found.scale * (raw @ found.k)).swapaxes(1, 2),
        "key": over_groups(call, found.scale * (raw.swapaxes(-1, -2) @ found.q)),
        "value": over_groups(call, found.p.swapaxes(-1, -2) @ d_out),
        "bias": to_shape(d_s, call.arrays["bias"].shape) if "bias" in call.arrays else None,
        "sinks": -(found.sink * delta).sum((0, 2)),
        "scale": (raw * found.product).sum(),
    }
    return Backward(grads, d_out, d_p, delta, d_s)


def over_groups(call: Call, x: np.ndarray) -> np.ndarray:
    """[B, N, S, …] -> [B, S, K, …], summed over the query heads that share a key head."""
    b, _, s, size = x.shape
    return x.reshape(b, call.signature.k, -1, s, size).sum(2).swapaxes(1, 2)


def to_shape(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """[B, N, T, S] summed to a shape that broadcasts to it."""
    whole = (1,) * (4 - len(shape)) + tuple(shape)
    axes = tuple(a for a in range(4) if whole[a] == 1)
    return x.sum(axes, keepdims=True).reshape(shape)
