"""Kernels with functions of the caller, and their masks and biases as dense arrays of NumPy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

import npu_bridge
from npu_bridge import emulation
from npu_bridge.functions import inputs_of
from pasa_jax import Schedule, alibi_slopes, and_masks, or_masks
from tests import gallery

FAR = 2**29  # where float32 holds every 64th whole number


@dataclass(frozen=True, kw_only=True)
class Sizes:
    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    queries: int = 100
    keys: int = 300

    def places(self) -> tuple[np.ndarray, ...]:
        """b, h, q and kv, which broadcast to [B, N, T, S]."""
        shape = (self.batch, self.heads, self.queries, self.keys)
        return tuple(np.ogrid[tuple(slice(n) for n in shape)])


@dataclass(frozen=True, kw_only=True)
class Case:
    """A kernel, and what it must compute.

    Arguments:
      options: of the kernel, its functions too.
      data: sizes -> q_data, kv_data and head_data, those that are given.
      seen, bias: (b, h, q, kv, data) -> as dense arrays; None: all is seen, nothing is added.
      cap: of the soft cap before the bias.
    """

    options: dict[str, Any]
    sizes: Sizes = field(default_factory=Sizes)
    data: Callable[[Sizes], dict[str, Any]] = lambda sizes: {}
    seen: Callable[..., np.ndarray] | None = None
    bias: Callable[..., np.ndarray] | None = None
    cap: float | None = None

    def kernel(self, *, block_kv: int = 128, **more: Any) -> npu_bridge.Kernel:
        schedule = Schedule(block_q=128, block_kv=block_kv, target="ascend_910b")
        options = {"repair": False, "schedule": schedule, **self.data(self.sizes), **self.options}
        return npu_bridge.kernel(**{**options, **more})

    def inputs(self, kernel: npu_bridge.Kernel, **more: Any) -> dict[str, Any]:
        """Random inputs, and the data."""
        drawn = emulation.problem(kernel, **vars(self.sizes), **more)
        return drawn | inputs_of(**self.data(self.sizes))


def scores(case: Case, inputs: dict[str, Any]) -> np.ndarray:
    """[B, N, T, S] the scores of the plain formula, −∞ where a key is hidden, in float64."""
    q, k = (np.asarray(inputs[n]).astype(np.float64) for n in ("query", "key"))
    k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
    s = np.einsum("btnd,bsnd->bnts", q, k) * q.shape[3] ** -0.5
    if case.cap is not None:
        s = case.cap * np.tanh(s / case.cap)
    place, data = case.sizes.places(), case.data(case.sizes)
    if case.bias is not None:
        s = s + case.bias(*place, data)
    seen = True if case.seen is None else case.seen(*place, data)
    return np.where(seen, s, -np.inf)


def plain(case: Case, inputs: dict[str, Any]) -> np.ndarray:
    """[B, T, N, E] by the formula of attention, in float64."""
    s, v = scores(case, inputs), np.asarray(inputs["value"]).astype(np.float64)
    v = np.repeat(v, s.shape[1] // v.shape[2], axis=2)
    top = np.max(s, axis=-1, keepdims=True)
    p = np.exp(s - np.where(np.isfinite(top), top, 0))
    total = p.sum(-1, keepdims=True)
    return np.einsum("bnts,bsne->btne", p / np.where(total == 0, 1, total), v)


def of_queries(x: np.ndarray) -> np.ndarray:
    """[B, T] or [B, N, T] so that it broadcasts to [B, N, T, S]."""
    return (x if x.ndim == 3 else x[:, None])[..., None]


def of_keys(x: np.ndarray) -> np.ndarray:
    """[S], [B, S] or [B, N, S] likewise."""
    return (x if x.ndim != 2 else x[:, None])[..., None, :]


def of_heads(x: np.ndarray) -> np.ndarray:
    """[N] or [B, N] likewise."""
    return x[..., None, None]


MANY = Sizes(batch=2, heads=4, kv_heads=2, queries=70, keys=201)
RNG = np.random.default_rng(3)


def _documents(sizes: Sizes) -> dict[str, Any]:
    """Segments with borders within and at the ends of tiles, far beyond what float32 holds."""

    def ids(length: int) -> np.ndarray:
        at = np.arange(length)
        cuts = np.asarray([[20, 30, 31], [1, 128, 150]])[: sizes.batch, :, None]
        return (np.sum(at >= cuts, axis=1) + FAR).astype(np.int32)

    return {
        "q_data": {"document": ids(sizes.queries)},
        "kv_data": {"document": ids(sizes.keys)},
    }


def _same_document(b: Any, h: Any, q: Any, kv: Any, data: dict[str, Any]) -> np.ndarray:
    own, other = (data[n]["document"].astype(np.int64) for n in ("q_data", "kv_data"))
    return of_queries(own) == of_keys(other)


def _slopes(sizes: Sizes) -> dict[str, Any]:
    return {"head_data": {"slope": np.asarray(alibi_slopes(sizes.heads))}}


def _alibi(b: Any, h: Any, q: Any, kv: Any, data: dict[str, Any]) -> np.ndarray:
    slopes = 2.0 ** (-8 / h.size * (np.arange(h.size) + 1))
    return -of_heads(slopes) * np.abs(q - kv)


def _lengths(sizes: Sizes) -> dict[str, Any]:
    return {"head_data": {"length": np.asarray([[61], [130]], np.int32)}}


def _prefixes(sizes: Sizes) -> dict[str, Any]:
    return {"head_data": {"prefix": np.asarray([[5], [133]], np.int32)}}


def _table(sizes: Sizes) -> dict[str, Any]:
    table = np.random.default_rng(1).standard_normal((8, sizes.heads))
    return {"head_data": list(table.astype(np.float32))}


def _buckets(b: Any, h: Any, q: Any, kv: Any, data: dict[str, Any]) -> np.ndarray:
    """T5's table by its formula, not by thresholds."""
    distance = np.maximum(q - kv, 0)
    log = 4 + np.floor(np.log2(np.maximum(distance, 1) / 4) * 2 + 1e-9).astype(int)
    bucket = np.where(distance < 4, distance, np.minimum(log, 7))
    rows = [table[bucket[0, 0]] for table in np.stack(data["head_data"]).T]
    return np.stack(rows)[None]


def _tokens(sizes: Sizes) -> dict[str, Any]:
    rng = np.random.default_rng(2)
    q = rng.standard_normal((sizes.batch, sizes.heads, sizes.queries)).astype(np.float32)
    k = rng.standard_normal((sizes.batch, 1, sizes.keys)).astype(np.float32)
    return {"q_data": {"own": q}, "kv_data": {"own": k}}


def _products(b: Any, h: Any, q: Any, kv: Any, data: dict[str, Any]) -> np.ndarray:
    q_own, k_own = (data[n]["own"].astype(np.float64) for n in ("q_data", "kv_data"))
    return of_queries(q_own) * of_keys(k_own)


def _places(sizes: Sizes) -> dict[str, Any]:
    """Tokens in any order, far from 0, and keys that are padding."""
    rng = np.random.default_rng(4)
    q = np.stack([rng.permutation(sizes.queries) for _ in range(sizes.batch)]) + FAR
    k = np.stack([rng.permutation(sizes.keys) for _ in range(sizes.batch)]) + FAR - 40
    return {
        "q_data": q.astype(np.int32),
        "kv_data": (k.astype(np.int32), rng.random(sizes.keys) < 0.8),
    }


def positions_mod(b, h, q, kv, q_data, kv_data):
    place, valid = kv_data
    return (place <= q_data) & (q_data - place < 64) & valid


def _positions(b: Any, h: Any, q: Any, kv: Any, data: dict[str, Any]) -> np.ndarray:
    far = of_queries(data["q_data"].astype(int)) - of_keys(data["kv_data"][0].astype(int))
    return (far >= 0) & (far < 64) & of_keys(data["kv_data"][1])


def mixed_mod(b, h, q, kv):
    """Conditions of every kind: of numbers, rows, columns and tiles."""
    even = (h % 2 == 0) ^ (kv & 1 == 0)
    inside = jnp.where(b == 1, kv // 5 <= q // 3 + 20, ~(kv < q - 3) | (q >> 4 == kv >> 4))
    return inside & (even | (kv - 2 * q > 17))


def _mixed(b: Any, h: Any, q: Any, kv: Any, data: dict[str, Any]) -> np.ndarray:
    even = (h % 2 == 0) ^ (kv % 2 == 0)
    inside = np.where(b == 1, kv // 5 <= q // 3 + 20, (kv >= q - 3) | (q // 16 == kv // 16))
    return inside & (even | (kv - 2 * q > 17))


def curved_mod(score, b, h, q, kv):
    """Primitives of numbers that are not whole."""
    far = jnp.abs(q - kv).astype(score.dtype)
    decay = jnp.exp2(-far / 16) + 1 / (1 + far) ** 2 + jnp.sqrt(far) * jnp.log(1 + far) / 64
    return score * jnp.where(h == 0, 1, 0.5) + decay - (kv > 40).astype(score.dtype)


def _curved(b: Any, h: Any, q: Any, kv: Any, data: dict[str, Any]) -> np.ndarray:
    far = np.abs(q - kv).astype(float)
    decay = 2 ** (-far / 16) + 1 / (1 + far) ** 2 + np.sqrt(far) * np.log(1 + far) / 64
    return decay - (kv > 40)


CASES: dict[str, Case] = {
    "causal": Case(
        options={"mask_mod": gallery.causal_mod, "return_lse": True},
        seen=lambda b, h, q, kv, data: kv <= q,
    ),
    "window": Case(
        options={"mask_mod": gallery.window_mod},
        seen=lambda b, h, q, kv, data: (kv > q - 20) & (kv < q + 4),
    ),
    "prefix": Case(
        options={"mask_mod": or_masks(gallery.causal_mod, gallery.prefix_mod)},
        sizes=MANY,
        data=_prefixes,
        seen=lambda b, h, q, kv, data: (kv <= q) | (kv < of_heads(data["head_data"]["prefix"])),
    ),
    "documents": Case(
        options={"mask_mod": and_masks(gallery.causal_mod, gallery.document_mod)},
        sizes=MANY,
        data=_documents,
        seen=lambda *x: (x[3] <= x[2]) & _same_document(*x),
    ),
    "dilated": Case(
        options={"mask_mod": gallery.dilated_mod},
        seen=lambda b, h, q, kv, data: (np.abs(q - kv) <= 24) & (np.mod(q - kv, 3) == 0),
    ),
    "neighbourhood": Case(
        options={"mask_mod": gallery.neighbour_mod},
        sizes=Sizes(queries=180, keys=180),
        seen=lambda b, h, q, kv, data: (
            (np.abs(q // 9 - kv // 9) <= 2) & (np.abs(q % 9 - kv % 9) <= 2)
        ),
    ),
    "jagged": Case(
        options={"mask_mod": gallery.jagged_mod},
        sizes=MANY,
        data=_lengths,
        seen=lambda b, h, q, kv, data: (
            (q < of_heads(data["head_data"]["length"]))
            & (kv < of_heads(data["head_data"]["length"]))
        ),
    ),
    "positions": Case(
        options={"mask_mod": positions_mod}, sizes=MANY, data=_places, seen=_positions
    ),
    "mixed": Case(options={"mask_mod": mixed_mod}, sizes=MANY, seen=_mixed),
    "ALiBi": Case(options={"score_mod": gallery.alibi_mod}, sizes=MANY, data=_slopes, bias=_alibi),
    "T5": Case(
        options={"mask_mod": gallery.causal_mod, "score_mod": gallery.t5_mod},
        sizes=Sizes(batch=2, heads=4, kv_heads=4, queries=70, keys=70),
        data=_table,
        seen=lambda b, h, q, kv, data: kv <= q,
        bias=_buckets,
    ),
    "soft cap": Case(options={"score_mod": gallery.cap_mod}, cap=1.5),
    "hidden by score": Case(
        options={"score_mod": gallery.hides_mod},
        seen=lambda b, h, q, kv, data: kv <= q + 2,
    ),
    "tokens": Case(
        options={"score_mod": gallery.relative_mod}, sizes=MANY, data=_tokens, bias=_products
    ),
    "curved": Case(
        options={"score_mod": curved_mod}, sizes=Sizes(heads=1, kv_heads=1), bias=_curved
    ),
    "ALiBi in documents": Case(
        options={
            "mask_mod": gallery.document_mod,
            "score_mod": gallery.alibi_mod,
            "is_causal": True,
            "return_lse": True,
        },
        sizes=MANY,
        data=lambda sizes: _documents(sizes) | _slopes(sizes),
        seen=lambda *x: (x[3] <= x[2]) & _same_document(*x),
        bias=_alibi,
    ),
}
