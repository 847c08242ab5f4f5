"""What these examples have in common: a real model's heads, tables and pictures."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from pasa_jax import models

if TYPE_CHECKING:
    from matplotlib.figure import Figure

console = Console(width=120)


@cache
def smollm2() -> tuple[models.Decoder, Any]:
    """SmolLM2-135M and its tokenizer."""
    return models.load("smollm2")


def text(tokens: int) -> NDArray[np.int32]:
    """[1, T] the first tokens of a module of the standard library."""
    _, tokenizer = smollm2()
    return np.asarray([tokenizer.encode(inspect.getsource(argparse)).ids[:tokens]], np.int32)


def smollm2_heads(tokens: int) -> tuple[NDArray, NDArray, NDArray]:
    """Queries [L, N, T, D], keys and values [L, K, T, D] of every layer, in float32, rotated."""
    model, _ = smollm2()

    @jax.jit
    def observed(model: models.Decoder, tokens: jax.Array) -> Any:
        return model.observe(tokens, lambda q, k, v, layer: (q[0], k[0], v[0]))

    found = observed(model, jnp.asarray(text(tokens)))
    q, k, v = (np.swapaxes(np.asarray(x), 1, 2) for x in found)
    return q, k, v


def relative_error(found: NDArray, true: NDArray) -> float:
    """The largest error over the largest magnitude."""
    return float(np.abs(np.asarray(found, np.float64) - true).max() / np.abs(true).max())


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Prints a table; numbers that are not strings have three digits."""
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*(x if isinstance(x, str) else f"{x:.3g}" for x in row))
    console.print(table)


def picture(columns: int = 1, rows: int = 1) -> tuple[Figure, NDArray[Any]]:
    """A figure and its axes [rows, columns], without a window."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * columns, 3.6 * rows), layout="constrained")
    axes: NDArray[Any] = figure.subplots(rows, columns, squeeze=False)
    return figure, axes


def save(figure: Figure, output: Path, name: str) -> Path:
    """Writes ``name``.png."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{name}.png"
    figure.savefig(path, dpi=120)
    console.print(f"written: {path}")
    return path
