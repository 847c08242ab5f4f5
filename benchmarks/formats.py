"""What 8-bit keys and values cost: errors of outputs on keys of several kinds, and of two models.

    python benchmarks/formats.py
    python benchmarks/formats.py --models     # SmolLM2 and a random Qwen2 with biases, 1,024 tokens

Errors are against float64, over the largest number of the output. Groups of 64 tokens share means
and scales; a query sees its own group packed, which in a cache it sees in the model's type.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from pasa_jax import Schedule, dot_product_attention, models
from pasa_jax.core.packed import FORMATS, GROUP, Format, pack_values
from pasa_jax.evidence.keys import kinds
from pasa_jax.models import metrics
from pasa_jax.serving import as_stored

Array = jax.Array
# (keys, values), each [..., S, D] float32 -> what a cache gives back of them.
Stored = Callable[[Array, Array], tuple[Array, Array]]


def in_groups(x: Array) -> Array:
    return x.reshape(*x.shape[:-2], -1, GROUP, x.shape[-1])


def packed(name: str, k: Array, v: Array) -> tuple[Array, Array]:
    """As a cache stores them, which has heads behind tokens."""
    heads = [jnp.moveaxis(x.reshape(1, -1, *x.shape[-2:]), 1, 2) for x in (k, v)]
    k_held, v_held = (jnp.moveaxis(x, 2, 1) for x in as_stored(name, *heads))
    return k_held.reshape(k.shape), v_held.reshape(v.shape)


def of_tokens(format: Format, v: Array) -> Array:
    codes, scale = pack_values(v, format)
    return format.read(codes) * scale[..., None]


def int8_scaled(axes: tuple[int, ...], k: Array, v: Array) -> tuple[Array, Array]:
    """int8 with a scale for each group, or for each channel of it, and no mean taken off."""
    x = in_groups(k)
    scale = jnp.max(jnp.abs(x), axis=axes, keepdims=True) / 127
    return (jnp.round(x / scale) * scale).reshape(k.shape), of_tokens(FORMATS["int8"], v)


def cast(dtype: str, k: Array, v: Array) -> tuple[Array, Array]:
    return k.astype(dtype).astype(jnp.float32), v.astype(dtype).astype(jnp.float32)


SCHEMES: dict[str, Stored] = {
    "bfloat16": partial(cast, "bfloat16"),
    "float8_e4m3, cast": partial(cast, "float8_e4m3fn"),
    "float8_e5m2, cast": partial(cast, "float8_e5m2"),
    "int8, a scale a group": partial(int8_scaled, (-2, -1)),
    "int8, a scale a channel": partial(int8_scaled, (-2,)),
    **{f"format {name!r}": partial(packed, name) for name in FORMATS},
}
# Not a way to store: queries, and keys less the mean of 64, are rounded for their product alone.
PREFILL = "precision='int8'"


def error(stored: Stored, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> float:
    """Of the outputs of all queries over all keys, in float64 but for what is stored."""
    held = stored(jnp.asarray(k, jnp.float32), jnp.asarray(v, jnp.float32))
    return beside(output(q, *(np.asarray(x, np.float64) for x in held)), output(q, k, v))


def error_of_prefill(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> float:
    """The same, of products of 8 bits: all else is in float32."""
    arrays = (jnp.asarray(x[None, :, None], jnp.float32) for x in (q, k, v))
    found = dot_product_attention(*arrays, precision="int8", schedule=Schedule(block_kv=GROUP))
    return beside(np.asarray(found[0, :, 0], np.float64), output(q, k, v))


def output(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    s = q @ k.T / np.sqrt(q.shape[-1])
    p = np.exp(s - s.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True) @ v


def beside(found: np.ndarray, true: np.ndarray) -> float:
    return float(np.abs(found - true).max() / np.abs(true).max())


def errors(tokens: int, size: int) -> Table:
    every = list(kinds(tokens, size))
    v = np.random.default_rng(1).standard_normal((tokens, size))
    table = Table("stored as", *(kind.name for kind in every), title="errors of outputs")
    for name, stored in SCHEMES.items():
        table.add_row(name, *(f"{error(stored, q, k, v):.3f}" for _, q, k in every))
    table.add_row(PREFILL, *(f"{error_of_prefill(q, k, v):.3f}" for _, q, k in every))
    return table


@partial(jax.jit, static_argnums=(2, 3))
def log_probabilities(
    model: models.Decoder, tokens: Array, stored: Stored | None, precision: str | None = None
) -> Array:
    """[1, T, V], with keys and values stored so; None: as they are."""

    def attention(q: Array, k: Array, v: Array, layer: Array) -> Array:
        if stored is not None:
            heads_first = (jnp.swapaxes(x.astype(jnp.float32), 1, 2) for x in (k, v))
            k, v = (jnp.swapaxes(x, 1, 2) for x in stored(*heads_first))
        return dot_product_attention(q, k, v, is_causal=True, precision=precision)

    return metrics.log_probabilities(model(tokens, attention=attention))


def of_model(name: str, model: models.Decoder, tokens: np.ndarray) -> Table:
    ids = jnp.asarray(tokens)[None]
    true = log_probabilities(model, ids, None)
    title = (
        f"{name}, {len(tokens)} tokens; perplexity in float32 {metrics.perplexity(true, ids):.3f}"
    )
    table = Table("stored as", "perplexity", "KL from float32", title=title)
    calls: dict[str, tuple[Stored | None, str | None]] = {PREFILL: (None, "int8")}
    calls = {name: (stored, None) for name, stored in SCHEMES.items()} | calls
    for scheme, call in calls.items():
        found = log_probabilities(model, ids, *call)
        figures = metrics.perplexity(found, ids), metrics.divergence(true, found)
        table.add_row(scheme, f"{figures[0]:.3f}", f"{figures[1]:.2e}")
    return table


def smollm2(count: int) -> tuple[models.Decoder, np.ndarray]:
    """The model and the first tokens of a module of the standard library."""
    import argparse

    model, tokenizer = models.load("smollm2")
    return model, np.asarray(tokenizer.encode(inspect.getsource(argparse)).ids[:count])


def biased_qwen2(count: int) -> tuple[models.Decoder, np.ndarray]:
    """A random Qwen2 whose keys have biases as large as published ones, and random tokens."""
    from examples.qwen2_in_float16 import random_qwen2

    with tempfile.TemporaryDirectory() as directory:
        random_qwen2(6, 512).save_pretrained(directory)
        model = models.load(Path(directory)).model
    return model, np.random.default_rng(0).integers(0, 512, count)


def main(
    tokens: Annotated[int, typer.Option(help="Keys, a multiple of 64.")] = 1024,
    size: Annotated[int, typer.Option(help="Head size.")] = 64,
    with_models: Annotated[bool, typer.Option("--models", help="The two models too.")] = False,
) -> None:
    """Prints tables."""
    console = Console(width=150)
    console.print(errors(tokens, size))
    of_16, of_8 = 2 * size * 2, 2 * size + (2 * size * 4 + GROUP * 4) / GROUP
    console.print(
        f"bytes a token and head: {of_16} in 16 bits, {of_8:.0f} in 8: {of_16 / of_8:.2f}"
    )
    if with_models:
        makers: dict[str, Callable[[int], Any]] = {
            "SmolLM2-135M": smollm2,
            "a random Qwen2 with biases": biased_qwen2,
        }
        for name, make in makers.items():
            console.print(of_model(name, *make(tokens)))


if __name__ == "__main__":
    typer.run(main)
