"""Float8 with incoherent processing, as FlashAttention-3 has it, beside means that are taken off.

    python -m examples.neighbours.incoherent --output out

FlashAttention-3 (arXiv 2407.08608) multiplies queries and keys by one random orthogonal matrix
before they are rounded to float8 (QuIP's incoherent processing): Q·Kᵀ stays what it was, and an
outlier of one channel is spread over all. Its matrix is diag(±1)·H, H a Hadamard matrix. It also
has a scale for each block instead of one for the tensor. Here both stand beside the means of keys
that `sage` takes off, on the same data. P and V stay in float32, so that only Q·Kᵀ counts.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from examples.neighbours._keys import Doubles, Scheme, errors, of_smollm2, synthetic
from examples.neighbours._shared import picture, save, show
from examples.neighbours.sage import KEYS, QUERIES, SMOOTHINGS, Smoothing, in_few_bits

# Types, and the rows of queries and of keys that share a scale; None: all of them.
FORMS: dict[str, tuple[str, int | None, int | None]] = {
    "e4m3, a scale": ("e4m3", None, None),
    "e4m3, of blocks": ("e4m3", QUERIES, KEYS),
    "int8, of blocks": ("int8", QUERIES, KEYS),
    "int4, of blocks": ("int4", QUERIES, KEYS),
}
MEANS = {"nothing": "nothing", "all tokens": "K, all tokens (Sage)", "blocks": "K, blocks (PASA)"}
Results = dict[str, dict[str, float]]


def hadamard(size: int) -> NDArray[np.float64]:
    """[D, D] ±1, orthogonal rows; D is a power of two (Sylvester's)."""
    if size & (size - 1):
        raise ValueError(f"size must be a power of two; got {size}. Pad the heads with zeros.")
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def rotation(size: int) -> NDArray[np.float64]:
    """[D, D] orthogonal: random signs, then a Hadamard matrix."""
    signs = np.random.default_rng(2).choice([-1.0, 1.0], size)
    return signs[:, None] * hadamard(size) / np.sqrt(size)


def scores(form: str, smoothing: Smoothing, rotated: bool, q: Doubles, k: Doubles) -> NDArray:
    """Scores [T, S] in float32: means off, then the rotation, then few bits."""
    name, queries, keys = FORMS[form]
    off_q, off_k, added = smoothing(q, k)
    if rotated:
        turn = rotation(q.shape[-1])
        off_q, off_k = off_q @ turn, off_k @ turn
    low_q = in_few_bits(off_q, name, queries or len(q))
    low_k = in_few_bits(off_k, name, keys or len(k))
    return low_q @ low_k.T + np.asarray(added, np.float32)


def label(form: str, mean: str, rotated: bool) -> str:
    return f"{form}, {mean}{', rotated' if rotated else ''}"


def schemes() -> dict[str, Scheme]:
    """Each form with each mean, with and without the rotation."""
    return {
        label(form, mean, rotated): partial(scores, form, SMOOTHINGS[name], rotated)
        for form in FORMS
        for mean, name in MEANS.items()
        for rotated in (False, True)
    }


def main(
    tokens: Annotated[int, typer.Option(help="A multiple of 128.")] = 512,
    size: Annotated[int, typer.Option(help="Head size of the synthetic heads.")] = 64,
    every: Annotated[int, typer.Option(help="Of SmolLM2 each so many layers; 0: none.")] = 3,
    output: Annotated[Path, typer.Option(help="Folder of the picture.")] = Path("out"),
) -> Results:
    """Prints the table, saves the picture, returns errors by scheme and data."""
    found = errors(schemes(), [*synthetic(tokens, size), *of_smollm2(tokens, every)])
    data = list(next(iter(found.values())))
    columns = [(mean, rotated) for mean in MEANS for rotated in (False, True)]
    names = [f"{mean} off{', rotated' if rotated else ''}" for mean, rotated in columns]
    rows = [
        [form, of_data, *(found[label(form, *column)][of_data] for column in columns)]
        for form in FORMS
        for of_data in data
    ]
    show("errors of outputs", ["Q·Kᵀ", "data", *names], rows)
    draw(found, data, output)
    return found


def draw(found: Results, data: list[str], output: Path) -> None:
    figure, axes = picture(len(FORMS))
    figure.set_size_inches(3 * len(FORMS) + 2, 5.5)
    places = np.arange(len(data))
    for ax, form in zip(axes[0], FORMS, strict=True):
        for mean, color in zip(MEANS, ("C0", "C1", "C2"), strict=True):
            for rotated, mark in ((False, "o"), (True, "*")):
                of_scheme = found[label(form, mean, rotated)]
                name = f"{mean} off{', rotated' if rotated else ''}"
                x = [of_scheme[of_data] for of_data in data]
                ax.plot(x, places, mark, color=color, alpha=0.7, label=name)
        ax.set(xscale="log", title=form, xlabel="error of the output")
        ax.tick_params(axis="x", which="minor", labelbottom=False)
        ax.set_yticks(places, data if ax is axes[0, 0] else [""] * len(data))
        ax.invert_yaxis()
        ax.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    save(figure, output, "incoherent")


if __name__ == "__main__":
    typer.run(main)
