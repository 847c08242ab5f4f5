"""The gallery: named masks and biases as functions, each beside its plain formula in NumPy.

The dense mask and bias of an example are written without the library. The plain formula of output,
log-sum-exp and gradients is in float64. Every implementation that takes functions can be tested
against it: `check` takes the keywords of `dot_product_attention`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pasa_jax import (
    LowRankBias,
    alibi_slopes,
    and_masks,
    create_block_mask,
    dot_product_attention,
    or_masks,
)
from tests.cases import TILES

T = 70  # of all examples but two: no multiple of a tile
WIDTH = 9  # of the image whose pixels are the tokens
RNG = np.random.default_rng(5)
# Compiling takes nearly all of a test's time; the numbers stay within the same bounds.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@dataclass(frozen=True, kw_only=True)
class Example:
    """One call with functions, and the same mask and bias as dense arrays.

    Arguments:
      keywords: of `dot_product_attention`.
      seen: bool, broadcasts to [B, N, T, S]: where the query sees the key.
      bias: float64, broadcasts to [B, N, T, S]: added to the scores.
      cap: c of c·tanh(s/c), before the bias, or None.
      learned: the keyword whose floating leaves are differentiated too, or None.
      fold: [B, N, T, S] the gradient of the scores after soft cap and bias -> that of ``learned``.
    """

    keywords: dict[str, Any]
    seen: np.ndarray | bool = True
    bias: np.ndarray | float = 0.0
    cap: float | None = None
    learned: str | None = None
    fold: Callable[[np.ndarray], Any] | None = None
    t: int = T
    s: int = T
    b: int = 2
    n: int = 4
    k: int = 2
    d: int = 16
    e: int = 12
    offset: float = field(default=0.0)  # added to every key

    def arrays(self, dtype: str, seed: int = 0) -> dict[str, jax.Array]:
        """query, key and value, rounded to ``dtype``."""
        rng = np.random.default_rng(seed)

        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape)

        q, k, v = (
            normal(self.b, self.t, self.n, self.d),
            normal(self.b, self.s, self.k, self.d) + self.offset,
            normal(self.b, self.s, self.k, self.e),
        )
        return {
            name: jnp.asarray(x, dtype)
            for name, x in zip(("query", "key", "value"), (q, k, v), strict=True)
        }

    def weights(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the loss Σ weights·output + Σ weights·log-sum-exp: [B, T, N, E] and [B, T, N]."""
        rng = np.random.default_rng(3)
        shape = (self.b, self.t, self.n)
        return rng.standard_normal((*shape, self.e)), rng.standard_normal(shape)


@dataclass(frozen=True)
class Plain:
    """What the plain formula gives in float64; of rows that see nothing 0 and −inf."""

    out: np.ndarray  # [B, T, N, E]
    lse: np.ndarray  # [B, T, N]
    gradients: dict[str, Any]  # of query, key, value and what is learned


def plain(example: Example, arrays: dict[str, Any]) -> Plain:
    """Output, log-sum-exp and gradients of `Example.weights`' loss, in float64 with NumPy."""
    q, k, v = (np.asarray(arrays[x]).astype(np.float64) for x in ("query", "key", "value"))
    groups, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5
    k, v = (np.repeat(x, groups, axis=2) for x in (k, v))
    s, slope = scale * np.einsum("btnd,bsnd->bnts", q, k), np.float64(1)
    if example.cap is not None:
        tanh = np.tanh(s / example.cap)
        s, slope = example.cap * tanh, 1 - tanh**2
    seen = np.broadcast_to(example.seen, s.shape)
    s = np.where(seen, s + example.bias, -np.inf)
    top = np.max(s, axis=-1, keepdims=True)
    p = np.exp(s - np.where(np.isfinite(top), top, 0))
    total = np.sum(p, axis=-1, keepdims=True)
    p = p / np.where(total == 0, 1, total)
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0].swapaxes(1, 2)
    of_out, of_lse = example.weights()
    d_p = np.einsum("btne,bsne->bnts", of_out, v)
    mean = np.sum(p * d_p, axis=-1, keepdims=True)
    d_s = p * (d_p - mean + of_lse.swapaxes(1, 2)[..., None])
    d_product = scale * slope * d_s

    def of_key_heads(x: np.ndarray) -> np.ndarray:
        return x.reshape(*x.shape[:2], -1, groups, x.shape[3]).sum(3)

    gradients = {
        "query": np.einsum("bnts,bsnd->btnd", d_product, k),
        "key": of_key_heads(np.einsum("bnts,btnd->bsnd", d_product, q)),
        "value": of_key_heads(np.einsum("bnts,btne->bsne", p, of_out)),
    }
    if example.fold is not None:
        gradients["learned"] = example.fold(d_s)
    return Plain(np.einsum("bnts,bsne->btne", p, v), lse, gradients)


def found(
    example: Example, arrays: dict[str, Any], *, gradients: bool = True, **options: Any
) -> tuple[Any, Any, Any]:
    """Output, log-sum-exp and gradients (or None), as `plain` gives them, by the library."""
    of_out, of_lse = (jnp.asarray(x, jnp.float32) for x in example.weights())
    keywords = dict(example.keywords)
    operands = dict(arrays)
    if example.learned is not None:
        operands["learned"] = keywords.pop(example.learned)

    def loss(operands: dict[str, Any]) -> tuple[Any, Any]:
        learned = operands.get("learned")
        given = {} if example.learned is None else {example.learned: learned}
        out, lse = dot_product_attention(
            *(operands[x] for x in ("query", "key", "value")),
            **keywords,
            **given,
            **options,
            return_residual=True,
        )
        of_rows = jnp.where(lse > -1e30, lse, jnp.zeros_like(lse))
        total = jnp.sum(out.astype(jnp.float32) * of_out) + jnp.sum(of_rows * of_lse)
        return total, (out, lse)

    if not gradients:
        return *jax.jit(loss, compiler_options=QUICKLY)(operands)[1], None
    both = jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICKLY)
    found, (out, lse) = both(operands)
    return out, lse, found


def relative(x: Any, true: Any) -> float:
    """The largest error, relative to the largest number."""
    x, true = np.asarray(x, np.float64), np.asarray(true, np.float64)
    return float(np.abs(x - true).max() / max(np.abs(true).max(), 1e-3))


def check(
    example: Example, dtype: str, bound: float, of_gradients: float | None, **options: Any
) -> None:
    """Asserts that a call is within bounds of the plain formula.

    Arguments:
      bound: the error of output and log-sum-exp, relative to their size.
      of_gradients: the error of each gradient, relative to its largest number; None: none is asked
        for.
    """
    arrays = example.arrays(dtype)
    true = plain(example, arrays)
    asked = of_gradients is not None
    out, lse, gradients = found(example, arrays, gradients=asked, **options)
    assert out.dtype == dtype
    assert lse.dtype == jnp.float32
    size = max(1.0, float(np.abs(true.out).max()))
    np.testing.assert_allclose(np.asarray(out, np.float64), true.out, atol=bound * size, rtol=0)
    none_seen = ~np.isfinite(true.lse)
    assert np.all(np.asarray(lse)[none_seen] == np.finfo(np.float32).min)
    assert not np.any(np.asarray(out)[none_seen])
    size = np.maximum(1, np.abs(true.lse[~none_seen]))
    error = np.abs(np.asarray(lse)[~none_seen] - true.lse[~none_seen]) / size
    assert error.max() < 2 * bound
    if not asked:
        return
    assert set(gradients) == set(true.gradients)
    pairs = jax.tree.map(
        lambda x, y: (relative(x, y), x.shape == y.shape), gradients, true.gradients
    )
    for path, (error, same) in jax.tree_util.tree_leaves_with_path(pairs, is_leaf=_is_pair):
        assert same, path
        assert error < of_gradients, (jax.tree_util.keystr(path), error)


def _is_pair(x: Any) -> bool:
    return isinstance(x, tuple) and len(x) == 2 and isinstance(x[1], bool)


# The functions. Index arithmetic alone: they hold no arrays.


def causal_mod(b, h, q, kv):
    return kv <= q


def window_mod(b, h, q, kv):
    return (q - kv < 20) & (kv - q <= 3)


def prefix_mod(b, h, q, kv, head_data):
    return kv < head_data["prefix"]


def document_mod(b, h, q, kv, q_data, kv_data):
    return q_data["document"] == kv_data["document"]


def dilated_mod(b, h, q, kv):
    return (jnp.abs(q - kv) <= 24) & ((q - kv) % 3 == 0)


def neighbour_mod(b, h, q, kv):
    rows, columns = q // WIDTH - kv // WIDTH, q % WIDTH - kv % WIDTH
    return (jnp.abs(rows) <= 2) & (jnp.abs(columns) <= 2)


def jagged_mod(b, h, q, kv, head_data):
    return (q < head_data["length"]) & (kv < head_data["length"])


def alibi_mod(score, b, h, q, kv, head_data):
    return score - head_data["slope"] * jnp.abs(q - kv).astype(score.dtype)


THRESHOLDS = (1, 2, 3, 4, 6, 8, 12)  # the distances at which T5's buckets of 8 begin, to 16


def t5_mod(score, b, h, q, kv, head_data):
    distance, bias = jnp.maximum(q - kv, 0), head_data[0]
    for start, column in zip(THRESHOLDS, head_data[1:], strict=True):
        bias = jnp.where(distance >= start, column, bias)
    return score + bias


def cap_mod(score, b, h, q, kv):
    return 1.5 * jnp.tanh(score / 1.5)


def hides_mod(score, b, h, q, kv):
    return jnp.where(kv <= q + 2, score, -jnp.inf)


def relative_mod(score, b, h, q, kv, q_data, kv_data):
    """A bias of learned numbers of each query and of each key."""
    return score + q_data["own"] * kv_data["own"]


def same(score, b, h, q, kv):
    return score


# The examples.


def _places(t: int = T, s: int = T) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(t)[:, None], np.arange(s)[None]


def causal() -> Example:
    i, j = _places()
    return Example(keywords={"mask_mod": causal_mod}, seen=j <= i)


def sliding_window() -> Example:
    i, j = _places(50, 83)
    return Example(t=50, s=83, keywords={"mask_mod": window_mod}, seen=(j > i - 20) & (j < i + 4))


def prefix_lm() -> Example:
    i, j = _places()
    prefix = np.asarray([[5], [40]], np.int32)
    return Example(
        keywords={
            "mask_mod": or_masks(causal_mod, prefix_mod),
            "head_data": {"prefix": prefix},
        },
        seen=(j <= i) | (j < prefix[:, :, None, None]),
    )


DOCUMENTS = np.stack([np.repeat([0, 1, 2], [20, 9, 41]), np.repeat([0, 3, 2], [1, 64, 5])])


def document() -> Example:
    ids = {"document": DOCUMENTS.astype(np.int32)}
    return Example(
        keywords={
            "mask_mod": and_masks(causal_mod, document_mod),
            "q_data": ids,
            "kv_data": ids,
        },
        seen=(DOCUMENTS[:, None, :, None] == DOCUMENTS[:, None, None]) & np.tri(T, dtype=bool),
    )


def dilated() -> Example:
    i, j = _places(50, 83)
    seen = (np.abs(i - j) <= 24) & (np.mod(i - j, 3) == 0)
    return Example(t=50, s=83, keywords={"mask_mod": dilated_mod}, seen=seen)


def neighbourhood() -> Example:
    pixels = np.stack(np.unravel_index(np.arange(T), (8, WIDTH)))
    far = np.abs(pixels[:, :, None] - pixels[:, None]).max(0)
    return Example(keywords={"mask_mod": neighbour_mod}, seen=far <= 2)


def alibi() -> Example:
    i, j = _places()
    far = np.abs(i - j)
    slopes = np.asarray([2.0 ** (-2 * (h + 1)) for h in range(4)])  # 2^(−8/4), its powers
    return Example(
        keywords={"score_mod": alibi_mod, "head_data": {"slope": alibi_slopes(4)}},
        bias=-slopes[:, None, None] * far,
        learned="head_data",
        fold=lambda d: {"slope": -np.sum(d * far, axis=(0, 2, 3))},
    )


def t5() -> Example:
    """T5's relative bias of a decoder: 8 buckets, the largest distance 16."""
    i, j = _places()
    distance = np.maximum(i - j, 0)
    log = np.log(np.maximum(distance, 1) / 4) / math.log(16 / 4) * 4
    bucket = np.where(distance < 4, distance, np.minimum(4 + (log + 1e-9).astype(int), 7))
    table = RNG.standard_normal((8, 4)).astype(np.float32)
    return Example(
        keywords={"mask_mod": causal_mod, "score_mod": t5_mod, "head_data": list(table)},
        seen=j <= i,
        bias=np.moveaxis(table.astype(np.float64)[bucket], -1, 0),
        learned="head_data",
        fold=lambda d: [np.sum(d * (bucket == x), axis=(0, 2, 3)) for x in range(8)],
    )


def soft_cap() -> Example:
    return Example(t=50, s=83, offset=2.0, keywords={"score_mod": cap_mod}, cap=1.5)


def hidden_by_score() -> Example:
    i, j = _places(83, 50)
    return Example(t=83, s=50, keywords={"score_mod": hides_mod}, seen=j <= i + 2)


def jagged() -> Example:
    i, j = _places()
    lengths = np.asarray([[33], [64]], np.int32)
    own = lengths[:, :, None, None]
    return Example(
        keywords={"mask_mod": jagged_mod, "head_data": {"length": lengths}},
        seen=(i < own) & (j < own),
    )


def learned_of_tokens() -> Example:
    q = RNG.standard_normal((2, 4, 50)).astype(np.float32)
    k = RNG.standard_normal((2, 1, 83)).astype(np.float32)
    return Example(
        t=50,
        s=83,
        keywords={
            "score_mod": relative_mod,
            "q_data": {"own": q},
            "kv_data": {"own": k},
        },
        bias=q[..., None].astype(np.float64) * k[:, :, None],
        learned="q_data",
        fold=lambda d: {"own": np.sum(d * k[:, :, None], axis=3)},
    )


def positions() -> Example:
    """Tokens in any order, which see the 30 before them and themselves."""
    q = np.stack([RNG.permutation(T), RNG.permutation(T) + 1000]).astype(np.int32)
    far = q[:, None, :, None] - q[:, None, None]
    return Example(
        keywords={
            "is_causal": True,
            "local_window_size": (30, 0),
            "q_positions": q,
            "kv_positions": q,
        },
        seen=(far >= 0) & (far <= 30),
    )


def blocks_of_segments() -> Example:
    """Documents by a block mask, whose blocks are no tiles."""
    ids = {"document": DOCUMENTS.astype(np.int32)}
    data = {"q_data": ids, "kv_data": ids}
    return Example(
        keywords={
            "block_mask": create_block_mask(document_mod, 2, None, T, T, (24, 10), **data),
            **data,
        },
        seen=DOCUMENTS[:, None, :, None] == DOCUMENTS[:, None, None],
    )


def low_rank_alibi() -> Example:
    i, j = _places()
    slopes = np.asarray([2.0 ** (-2 * (h + 1)) for h in range(4)])

    def fold(d: np.ndarray) -> LowRankBias:
        scaled = np.sum(d * slopes[:, None, None], axis=(0, 1))
        q, k = np.stack([np.ones(T), -np.arange(T)], 1), np.stack([np.arange(T), np.ones(T)], 1)
        return LowRankBias(scaled @ k, scaled.T @ q, np.sum(d * (j - i), axis=(0, 2, 3)))

    return Example(
        keywords={"is_causal": True, "bias": LowRankBias.alibi(alibi_slopes(4), T)},
        seen=j <= i,
        bias=slopes[:, None, None] * (j - i),
        learned="bias",
        fold=fold,
    )


def low_rank() -> Example:
    """Factors of each head, of keys that all batch entries share."""
    q = RNG.standard_normal((2, 4, 50, 3)).astype(np.float32)
    k = RNG.standard_normal((4, 83, 3)).astype(np.float32)
    scale = RNG.standard_normal((2, 1)).astype(np.float32)
    product = np.einsum("bntr,nsr->bnts", q.astype(np.float64), k)

    def fold(d: np.ndarray) -> LowRankBias:
        scaled = d * scale[:, :, None, None]
        of_scale = np.sum(d * product, axis=(1, 2, 3))[:, None]
        of_q = np.einsum("bnts,nsr->bntr", scaled, k)
        return LowRankBias(of_q, np.einsum("bnts,bntr->nsr", scaled, q), of_scale)

    return Example(
        t=50,
        s=83,
        keywords={"bias": LowRankBias(*map(jnp.asarray, (q, k, scale)))},
        bias=product * scale[:, :, None, None],
        learned="bias",
        fold=fold,
    )


_EXAMPLES = (
    causal,
    sliding_window,
    prefix_lm,
    document,
    dilated,
    neighbourhood,
    alibi,
    t5,
    soft_cap,
    hidden_by_score,
    jagged,
    learned_of_tokens,
    positions,
    blocks_of_segments,
    low_rank_alibi,
    low_rank,
)
# By name; made when asked for, once.
GALLERY: dict[str, Callable[[], Example]] = {
    f.__name__.replace("_", " "): cache(f) for f in _EXAMPLES
}
# How far from the plain formula: output and log-sum-exp, gradients.
BOUNDS = {"float32": (4e-6, 3e-5), "float16": (3e-3, 1e-2), "bfloat16": (2.5e-2, 8e-2)}


def check_by_name(name: str, dtype: str, *, gradients: bool = True, **options: Any) -> None:
    """`check` of an example of the gallery, by its type's bounds, in small tiles."""
    options = {"schedule": TILES, **options}
    bound, of_gradients = BOUNDS[dtype]
    check(GALLERY[name](), dtype, bound, of_gradients if gradients else None, **options)
