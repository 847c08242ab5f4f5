"""SageAttention's smoothing of keys and queries beside PASA's, in five types of Q·Kᵀ.

    python -m examples.neighbours.sage --output out

SageAttention (arXiv 2410.02367) takes the mean over all tokens off the keys before Q·Kᵀ is formed
in int8; a softmax does not see what is lost. Its second version (2411.10958) takes the mean of a
block of queries off as well, and adds q̄·Kᵀ back. PASA takes off the mean of each block of keys and
adds q·k̄ back; here also of those keys alone that are shorter without it. Each is combined with each
type. P and V stay in float32, so that only the type of Q·Kᵀ counts. Integers have a scale for 128
queries and one for 64 keys, as in Sage's first version; e4m3 likewise. What is added back is in
float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import typer
from numpy.typing import NDArray

from examples.neighbours._keys import (
    Doubles,
    Scheme,
    blocks,
    errors,
    mean_of_blocks,
    mean_where_shorter,
    of_smollm2,
    rms_error,
    synthetic,
    true_output,
)
from examples.neighbours._shared import picture, save, show
from pasa_jax import Precision, Schedule, dot_product_attention

QUERIES, KEYS = 128, 64  # rows that share a mean and a scale
LARGEST = {"int8": 127, "int4": 7, "e4m3": 448}
TYPES = (*LARGEST, "float16", "bfloat16")
FLOATS = {"e4m3": ml_dtypes.float8_e4m3fn, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
# (queries, keys) -> queries and keys to multiply in few bits, and what is added to the product.
Smoothing = Callable[[Doubles, Doubles], tuple[NDArray, NDArray, NDArray | float]]
Results = dict[str, dict[str, float]]


def nothing(q: Doubles, k: Doubles) -> tuple[NDArray, NDArray, float]:
    return q, k, 0.0


def global_mean(q: Doubles, k: Doubles) -> tuple[NDArray, NDArray, float]:
    """q·k̄ is the same for all keys: softmax does not need it back."""
    return q, k - k.mean(axis=0), 0.0


def block_mean(
    means: Callable[[NDArray, int], NDArray], q: Doubles, k: Doubles
) -> tuple[NDArray, NDArray, NDArray]:
    of_block = means(k, KEYS)
    return q, k - of_block, q @ of_block.T


def with_queries(keys: Smoothing, q: Doubles, k: Doubles) -> tuple[NDArray, NDArray, NDArray]:
    """The keys' smoothing, and the mean of each block of queries off the queries."""
    _, off, added = keys(q, k)
    of_block = mean_of_blocks(q, QUERIES)
    return q - of_block, off, added + of_block @ off.T


SMOOTHINGS: dict[str, Smoothing] = {
    "nothing": nothing,
    "K, all tokens (Sage)": global_mean,
    "K, blocks (PASA)": partial(block_mean, mean_of_blocks),
    "K, blocks, if shorter": partial(block_mean, mean_where_shorter),
    "K, all tokens; Q (Sage 2)": partial(with_queries, global_mean),
    "K, blocks; Q (both)": partial(with_queries, partial(block_mean, mean_of_blocks)),
}


def in_few_bits(x: NDArray, name: str, rows: int) -> NDArray:
    """x [T, D] as its codes stand for it, in float32; 16-bit types have no scale."""
    if name not in LARGEST:
        with np.errstate(over="ignore"):  # an infinite number is a result
            return x.astype(FLOATS[name]).astype(np.float32)
    whole = blocks(x, rows)
    scale = np.abs(whole).max(axis=(1, 2), keepdims=True) / LARGEST[name]
    scale = np.where(scale > 0, scale, 1)
    codes = whole / scale
    codes = codes.astype(FLOATS[name]).astype(np.float32) if name in FLOATS else np.rint(codes)
    return (codes * scale).reshape(x.shape).astype(np.float32)


def scores(name: str, smoothing: Smoothing, q: Doubles, k: Doubles) -> NDArray:
    """Scores [T, S] in float32. Products of 8 bits are used as they are summed, in float32; those
    of 16 bits are stored in 16 bits, as on chips that round products.
    """
    off_q, off_k, added = smoothing(q, k)
    with np.errstate(over="ignore", invalid="ignore"):
        s = in_few_bits(off_q, name, QUERIES) @ in_few_bits(off_k, name, KEYS).T
        if name not in LARGEST:
            s = s.astype(FLOATS[name]).astype(np.float32)
        return s + np.asarray(added, np.float32)


def schemes() -> dict[str, Scheme]:
    """Each type with each smoothing."""
    return {
        f"{name}, {how}": partial(scores, name, smoothing)
        for name in TYPES
        for how, smoothing in SMOOTHINGS.items()
    }


def library(shift: str, tokens: int, size: int) -> dict[str, float]:
    """Errors of `pasa_jax.dot_product_attention` with scores and output in float16, in blocks as
    above, on the synthetic heads.
    """
    heads = list(synthetic(tokens, size))
    arrays = (
        jnp.asarray(np.stack(x, axis=1)[None], jnp.float16)  # [1, T, N, D]
        for x in zip(*(head[1:4] for head in heads), strict=True)
    )
    precision, schedule = Precision(scores="float16"), Schedule(block_q=QUERIES, block_kv=KEYS)
    out = dot_product_attention(*arrays, shift=shift, precision=precision, schedule=schedule)
    found: dict[str, list[float]] = {}
    for head, x in zip(heads, np.moveaxis(np.asarray(out[0], np.float64), 1, 0), strict=True):
        found.setdefault(head.name, []).append(rms_error(x, true_output(head)))
    return {name: float(np.mean(x)) for name, x in found.items()}


def main(
    tokens: Annotated[int, typer.Option(help="A multiple of 128.")] = 512,
    size: Annotated[int, typer.Option(help="Head size of the synthetic heads.")] = 64,
    every: Annotated[int, typer.Option(help="Of SmolLM2 each so many layers; 0: none.")] = 3,
    output: Annotated[Path, typer.Option(help="Folder of the picture.")] = Path("out"),
) -> Results:
    """Prints the tables, saves the picture, returns errors by scheme and data."""
    found = errors(schemes(), [*synthetic(tokens, size), *of_smollm2(tokens, every)])
    data = list(next(iter(found.values())))
    rows = [
        [name, of_data, *(found[f"{name}, {how}"][of_data] for how in SMOOTHINGS)]
        for name in TYPES
        for of_data in data
    ]
    show("errors of outputs, by what is taken off", ["Q·Kᵀ", "data", *SMOOTHINGS], rows)
    ours = {shift: library(shift, tokens, size) for shift in ("none", "mean")}
    rows = [[x, *(of_shift[x] for of_shift in ours.values())] for x in ours["none"]]
    show("pasa_jax, float16", ["data", *(f"shift={x!r}" for x in ours)], rows)
    draw(found, data, output)
    return found | {f"pasa_jax, {shift}": x for shift, x in ours.items()}


def draw(found: Results, data: list[str], output: Path) -> None:
    figure, axes = picture(len(TYPES))
    figure.set_size_inches(3 * len(TYPES) + 2, 5.5)
    places = np.arange(len(data))
    for ax, name in zip(axes[0], TYPES, strict=True):
        for how, mark in zip(SMOOTHINGS, "o^sDv*", strict=True):
            of_scheme = found[f"{name}, {how}"]
            ax.plot([of_scheme[x] for x in data], places, mark, alpha=0.7, label=how)
        ax.set(xscale="log", title=name, xlabel="error of the output")
        ax.set_yticks(places, data if name == TYPES[0] else [""] * len(data))
        ax.invert_yaxis()
        ax.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    save(figure, output, "sage")


if __name__ == "__main__":
    typer.run(main)
