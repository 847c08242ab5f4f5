"""Calls that every scheme must answer as one device does, with their gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from pasa_jax import (
    LowRankBias,
    Schedule,
    alibi_slopes,
    create_block_mask,
    dot_product_attention,
    parallel,
)
from tests.gallery import QUICKLY, relative

TILES = Schedule(block_q=16, block_kv=8)
# Relative to the largest number: of outputs and log-sum-exps, of gradients.
BOUNDS = {"float32": (1e-5, 4e-5), "bfloat16": (2e-2, 4e-2), "float16": (4e-3, 8e-3)}


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One call.

    Arguments:
      static: keywords that are no arrays.
      arrays: keywords that are arrays, or trees of them; floating leaves are differentiated.
    """

    b: int = 2
    t: int = 40
    s: int = 40
    n: int = 4
    k: int = 2
    d: int = 8
    e: int = 8
    static: dict[str, Any] = field(default_factory=dict)
    arrays: Callable[[Trial, np.random.Generator], dict[str, Any]] = lambda trial, rng: {}

    def operands(self, dtype: str) -> dict[str, Any]:
        rng = np.random.default_rng(1)
        shapes = {
            "query": (self.b, self.t, self.n, self.d),
            "key": (self.b, self.s, self.k, self.d),
            "value": (self.b, self.s, self.k, self.e),
        }
        normal = {x: jnp.asarray(rng.normal(1, 1, y), dtype) for x, y in shapes.items()}
        return normal | jax.tree.map(jnp.asarray, self.arrays(self, rng))


CAUSAL = {"is_causal": True}
WINDOW = {"is_causal": True, "local_window_size": (11, 0)}


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def _bias(*shape: int) -> Callable[[Trial, np.random.Generator], dict[str, Any]]:
    return lambda trial, rng: {"bias": _normal(rng, *shape)}


def _mask(*shape: int) -> Callable[[Trial, np.random.Generator], dict[str, Any]]:
    return lambda trial, rng: {"mask": rng.random(shape) > 0.4}


def _lengths(trial: Trial, rng: np.random.Generator) -> dict[str, Any]:
    given = {"query_seq_lengths": [13, trial.t], "key_value_seq_lengths": [trial.s, 21]}
    return {name: np.asarray(x, np.int32) for name, x in given.items()}


def _sinks(trial: Trial, rng: np.random.Generator) -> dict[str, Any]:
    return {"sinks": np.linspace(-1, 4, trial.n).astype(np.float32)}


def _segments(trial: Trial, rng: np.random.Generator) -> dict[str, Any]:
    return {"segment_ids": np.sort(rng.integers(0, 4, (trial.b, trial.t)), 1).astype(np.int32)}


def _permuted(order: Callable[..., Any], trial: Trial, rng: np.random.Generator) -> dict[str, Any]:
    positions = order(np.arange(trial.t, dtype=np.int32), 4, axis=0)
    ids = order(_segments(trial, rng)["segment_ids"], 4)
    return {"q_positions": positions, "kv_positions": positions, "segment_ids": ids}


def _low_rank(trial: Trial, rng: np.random.Generator) -> dict[str, Any]:
    q, k = _normal(rng, trial.n, trial.t, 3), _normal(rng, trial.b, 1, trial.s, 3)
    return {"bias": LowRankBias(q, k, _normal(rng, trial.n))}


def _alibi(trial: Trial, rng: np.random.Generator) -> dict[str, Any]:
    return {"bias": LowRankBias.alibi(alibi_slopes(trial.n), trial.t, trial.s)}


def learned_mod(score, b, h, q, kv, q_data, kv_data, head_data):
    far = jnp.abs(q - kv).astype(score.dtype)
    return score + q_data["own"] * kv_data["own"] - head_data * far


def prefix_mod(b, h, q, kv, head_data, kv_data):
    return (kv <= q + h) & ((kv < head_data["prefix"]) | (kv_data % 3 != b))


def _learned(trial: Trial, rng: np.random.Generator) -> dict[str, Any]:
    return {
        "q_data": {"own": _normal(rng, trial.b, trial.n, trial.t)},
        "kv_data": {"own": _normal(rng, trial.b, trial.s)},
        "head_data": np.abs(_normal(rng, trial.n)),
    }


def _prefix(trial: Trial, rng: np.random.Generator) -> dict[str, Any]:
    return {
        "head_data": {"prefix": np.asarray([[7], [30]], np.int32)},
        "kv_data": np.arange(trial.s, dtype=np.int32),
    }


def ahead_mod(b, h, q, kv):
    return kv <= q + 3


def _blocks(trial: Trial, rng: np.random.Generator) -> dict[str, Any]:
    return {"block_mask": create_block_mask(ahead_mod, None, None, trial.t, trial.s, (8, 4))}


def _keys_of_one(trial: Trial, rng: np.random.Generator) -> dict[str, Any]:
    return {"key_value_seq_lengths": np.asarray([trial.s, 7], np.int32)}


def _all(trial: Trial, rng: np.random.Generator) -> dict[str, Any]:
    """What works together, together."""
    parts = (_segments, _lengths, _sinks, _bias(1, trial.n, trial.t, trial.s))
    parts += (_mask(trial.b, 1, trial.t, trial.s),)
    return {name: x for part in parts for name, x in part(trial, rng).items()}


def _all_functions(trial: Trial, rng: np.random.Generator) -> dict[str, Any]:
    return _learned(trial, rng) | _low_rank(trial, rng) | _segments(trial, rng)


DROPS = {"dropout_rate": 0.3, "dropout_key": 7}
TRIALS: dict[str, Trial] = {
    "full": Trial(),
    "causal": Trial(static=CAUSAL),
    "whole blocks": Trial(t=32, s=32, static=CAUSAL),  # of 8 keys, over 4 devices
    "causal, odd": Trial(t=37, s=37, static=CAUSAL),
    "causal, fewer keys": Trial(t=40, s=24, static=CAUSAL),
    "causal, more keys, odd": Trial(t=23, s=41, static=CAUSAL),
    "bottom right": Trial(t=24, static={**CAUSAL, "causal_alignment": "bottom_right"}),
    "window": Trial(static={"local_window_size": (5, 9)}),
    "window, causal": Trial(static=WINDOW),
    "lengths": Trial(arrays=_lengths),
    "lengths, bottom right, odd": Trial(
        s=43, static={**CAUSAL, "causal_alignment": "bottom_right"}, arrays=_lengths
    ),
    "segments": Trial(arrays=_segments),
    "segments, causal, odd": Trial(t=39, s=39, static=CAUSAL, arrays=_segments),
    "zigzag, packed": Trial(static=CAUSAL, arrays=partial(_permuted, parallel.zigzag)),
    "striped, packed": Trial(static=WINDOW, arrays=partial(_permuted, parallel.striped)),
    "mask": Trial(arrays=_mask(2, 4, 40, 40)),
    "mask of keys": Trial(static=CAUSAL, arrays=_mask(2, 1, 1, 40)),
    "mask of rows, odd": Trial(t=37, arrays=_mask(1, 1, 37, 1)),
    "bias": Trial(arrays=_bias(2, 4, 40, 40)),
    "bias, one row": Trial(static=CAUSAL, arrays=_bias(1, 4, 1, 40)),
    "bias, one column, odd": Trial(t=37, s=39, arrays=_bias(2, 1, 37, 1)),
    "bias, odd": Trial(t=37, s=39, arrays=_bias(1, 4, 37, 39)),
    "soft cap": Trial(static={**CAUSAL, "logits_soft_cap": 1.5}),
    "sinks": Trial(static=CAUSAL, arrays=_sinks),
    "scale": Trial(static=CAUSAL, arrays=lambda trial, rng: {"scale": np.float32(-0.2)}),
    "low rank": Trial(arrays=_low_rank),
    "ALiBi, odd": Trial(t=37, s=37, static=CAUSAL, arrays=_alibi),
    "score function": Trial(static={"score_mod": learned_mod}, arrays=_learned),
    "mask function": Trial(static={"mask_mod": prefix_mod}, arrays=_prefix),
    "block mask": Trial(arrays=_blocks),
    "block mask, odd": Trial(t=37, s=39, arrays=_blocks),
    "dropout": Trial(static={**CAUSAL, **DROPS}),
    "one key head": Trial(k=1, static=CAUSAL),
    "heads equal": Trial(n=4, k=4, e=4, static=CAUSAL),
    "one query": Trial(t=1, arrays=_keys_of_one),
    "one batch entry": Trial(b=1, static=CAUSAL),
    "all": Trial(t=37, s=37, static={**WINDOW, "logits_soft_cap": 3.0, **DROPS}, arrays=_all),
    "all functions": Trial(static={**CAUSAL, "score_mod": learned_mod}, arrays=_all_functions),
}


@cache
def mesh(names: tuple[str, ...], shape: tuple[int, ...], explicit: bool = False) -> Mesh:
    kind = AxisType.Explicit if explicit else AxisType.Auto
    devices = np.asarray(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, names, axis_types=(kind,) * len(names))


def answers(
    attend: Callable[..., Any], trial: Trial, dtype: str, **options: Any
) -> tuple[Any, Any, Any]:
    """Output, log-sum-exp, and gradients of all that is floating, of one function."""
    static = dict(trial.static)
    if "dropout_key" in static:
        static["dropout_key"] = jax.random.key(static["dropout_key"])
    operands = trial.operands(dtype)
    leaves, tree = jax.tree.flatten(operands)
    learned = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating)]
    rng = np.random.default_rng(2)
    weights = jnp.asarray(rng.standard_normal((trial.b, trial.t, trial.n, trial.e)), jnp.float32)

    def loss(given: list[Any]) -> tuple[Any, Any]:
        now = list(leaves)
        for i, x in zip(learned, given, strict=True):
            now[i] = x
        call = jax.tree.unflatten(tree, now)
        out, lse = attend(**call, **static, **options, return_residual=True)
        rows = jnp.where(lse > -1e30, jnp.sin(lse), jnp.zeros_like(lse))
        total = jnp.sum(out.astype(jnp.float32) * weights) + jnp.sum(rows * weights[..., 0])
        return total, (out, lse)

    run = jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICKLY)
    gradients, (out, lse) = run([leaves[i] for i in learned])
    paths = [jax.tree_util.keystr(x) for x, _ in jax.tree_util.tree_leaves_with_path(operands)]
    return out, lse, {paths[i]: g for i, g in zip(learned, gradients, strict=True)}


@cache
def on_one_device(name: str, dtype: str, shift: str = "auto") -> tuple[Any, Any, Any]:
    """The answers of one device, by the plain formula where that has the shift."""
    if shift != "auto":
        options = {"implementation": "lax", "shift": shift, "schedule": TILES}
        return answers(dot_product_attention, TRIALS[name], dtype, **options)
    return answers(dot_product_attention, TRIALS[name], dtype, implementation="reference")


def compare(
    attend: Callable[..., Any], name: str, dtype: str = "float32", shift: str = "auto", **options
) -> None:
    """Asserts that a function answers as one device does."""
    options = {"implementation": "lax", "schedule": TILES, "shift": shift, **options}
    out, lse, gradients = answers(attend, TRIALS[name], dtype, **options)
    true_out, true_lse, true_gradients = on_one_device(name, dtype, shift)
    of_output, of_gradients = BOUNDS[dtype]
    assert out.dtype == true_out.dtype
    assert out.shape == true_out.shape
    assert relative(out.astype(jnp.float32), true_out.astype(jnp.float32)) < of_output
    nothing = np.asarray(true_lse) < -1e30
    np.testing.assert_array_equal(np.asarray(lse) < -1e30, nothing)
    assert relative(np.where(nothing, 0, lse), np.where(nothing, 0, true_lse)) < of_output
    assert set(gradients) == set(true_gradients)
    for path, true in true_gradients.items():
        found = gradients[path]
        assert (found.shape, found.dtype) == (true.shape, true.dtype), path
        error = relative(found.astype(jnp.float32), true.astype(jnp.float32))
        assert error < of_gradients, (path, error)
