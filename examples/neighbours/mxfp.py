"""Q·Kᵀ in MXFP8 near the diagonal and in MXFP4 elsewhere, with and without means of key blocks.

    python -m examples.neighbours.mxfp --output out

Diagonal-tiled mixed-precision attention (DMA) forms the tiles of Q·Kᵀ near the diagonal in MXFP8
(e4m3) and all others in MXFP4 (e2m1). In the microscaling formats of the Open Compute Project 32
numbers along D share a scale 2^(floor(log2 amax) − emax). Both are emulated; P and V stay in
float32, so that only Q·Kᵀ counts. What is not in the paper: PASA's mean of each block of keys is
taken off before the keys are rounded, and q·k̄ is added back in float32; or it is taken off those
keys alone that become shorter by it, which the key of an attention sink does not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import ml_dtypes
import numpy as np
import typer
from numpy.typing import NDArray

from examples.neighbours._keys import (
    MEDIAN,
    WORST,
    Doubles,
    Scheme,
    errors,
    mean_of_blocks,
    mean_where_shorter,
    of_smollm2,
    synthetic,
)
from examples.neighbours._shared import picture, save, show

BLOCK = 32  # numbers along D that share a scale
TILE = 64  # queries and keys of a tile; keys of a block that shares a mean


class Element(NamedTuple):
    """A type of the elements: its largest exponent and its largest number."""

    dtype: type
    emax: int
    largest: float


ELEMENTS = {
    "e4m3": Element(ml_dtypes.float8_e4m3fn, 8, 448.0),
    "e5m2": Element(ml_dtypes.float8_e5m2, 15, 57344.0),
    "e2m1": Element(ml_dtypes.float4_e2m1fn, 2, 6.0),
}
TARGETS = (0.05, 0.1, 0.15, 0.2)
Results = dict[str, dict[str, float]]


OFF, CENTRED, SHORTER = "nothing off", "block means off", "off where shorter"
# What is taken off the keys [S, D].
MEANS: dict[str, Callable[[Doubles], Doubles]] = {
    OFF: np.zeros_like,
    CENTRED: partial(mean_of_blocks, rows=TILE),
    SHORTER: partial(mean_where_shorter, rows=TILE),
}
# Tiles [T/64, S/64], bool: which of them are in 8 bits.
Choice = Callable[[int], NDArray[np.bool_]]


def scales(amax: NDArray, emax: int) -> NDArray[np.float32]:
    """2^(floor(log2 amax) − emax), as E8M0 holds it; 1 where amax is 0."""
    _, exponent = np.frexp(amax)  # amax = m·2^exponent, 1/2 <= m < 1
    found = np.where(amax > 0, np.ldexp(1.0, np.clip(exponent - 1 - emax, -127, 127)), 1.0)
    return found.astype(ml_dtypes.float8_e8m0fnu).astype(np.float32)


def mx(x: NDArray, element: Element) -> NDArray[np.float32]:
    """x [T, D] as its MX codes and scales stand for it."""
    grouped = x.astype(np.float32).reshape(len(x), -1, BLOCK)
    scale = scales(np.abs(grouped).max(axis=-1, keepdims=True), element.emax)
    codes = np.clip(grouped / scale, -element.largest, element.largest).astype(element.dtype)
    return (codes.astype(np.float32) * scale).reshape(x.shape)


def near(width: int, tiles: int) -> NDArray[np.bool_]:
    """Fewer than ``width`` tiles from the diagonal."""
    return np.abs(np.subtract.outer(np.arange(tiles), np.arange(tiles))) < width


def near_or_first(width: int, tiles: int) -> NDArray[np.bool_]:
    """Those of `near`, and the first tile of each row, where models keep what they do not need."""
    return near(width, tiles) | (np.arange(tiles) == 0)


def scores(choice: Choice, high: str, mean: str, q: Doubles, k: Doubles) -> NDArray:
    """Scores [T, S] in float32: the chosen tiles in MXFP8 of ``high``, the others in MXFP4."""
    off = MEANS[mean](k)
    wide, narrow = (
        mx(q, ELEMENTS[name]) @ mx(k - off, ELEMENTS[name]).T for name in (high, "e2m1")
    )
    chosen = np.kron(choice(len(k) // TILE), np.ones((TILE, TILE), bool))
    return np.where(chosen, wide, narrow) + (q @ off.T).astype(np.float32)


def share_in_4_bits(choice: Choice, tiles: int) -> float:
    """Of the tiles that a causal mask leaves."""
    return 1 - float(choice(tiles)[np.tri(tiles, dtype=bool)].mean())


def choices(tiles: int) -> dict[str, Choice]:
    """The bands by name, from all tiles in 4 bits to all in 8."""
    widths = [0, *(2**n for n in range(tiles.bit_length()) if 2**n < tiles), tiles]
    bands = {f"band {w}": partial(near, w) for w in widths}
    return bands | {f"band {w} and first": partial(near_or_first, w) for w in widths[1:-1]}


def schemes(tiles: int) -> dict[str, Scheme]:
    """Each band, and e5m2 in all tiles; with and without means."""
    named = {name: (choice, "e4m3") for name, choice in choices(tiles).items()}
    named["e5m2 everywhere"] = (partial(near, tiles), "e5m2")
    return {
        f"{name}, {mean}": partial(scores, choice, high, mean)
        for name, (choice, high) in named.items()
        for mean in MEANS
    }


def allowed(found: Results, tiles: int, data: str) -> dict[str, list[float]]:
    """By mean: the largest share of tiles in 4 bits whose error is within each target; NaN: none,
    all tiles in 8 bits are beyond it too.
    """
    shares = {name: share_in_4_bits(choice, tiles) for name, choice in choices(tiles).items()}
    return {
        mean: [
            max(
                (x for name, x in shares.items() if found[f"{name}, {mean}"][data] <= target),
                default=np.nan,
            )
            for target in TARGETS
        ]
        for mean in MEANS
    }


def main(
    tokens: Annotated[int, typer.Option(help="A multiple of 64.")] = 1024,
    size: Annotated[int, typer.Option(help="Head size of the synthetic heads.")] = 64,
    every: Annotated[int, typer.Option(help="Of SmolLM2 each so many layers; 0: none.")] = 5,
    output: Annotated[Path, typer.Option(help="Folder of the picture.")] = Path("out"),
) -> Results:
    """Prints the tables, saves the picture, returns errors by scheme and data."""
    tiles = tokens // TILE
    heads = [x._replace(is_causal=True) for x in synthetic(tokens, size) if "bias" in x.name]
    heads = [x for x in heads if "queries" not in x.name and "fast" not in x.name]
    heads += of_smollm2(tokens, every)
    found = errors(schemes(tiles), heads)
    shares = {name: f"{share_in_4_bits(x, tiles):.0%}" for name, x in choices(tiles).items()}
    data = list(next(iter(found.values())))
    rows = [
        [name, mean, shares.get(name, "0%"), *found[f"{name}, {mean}"].values()]
        for name in (*shares, "e5m2 everywhere")
        for mean in MEANS
    ]
    show("errors of outputs", ["tiles in 8 bits", "means", "4 bits", *data], rows)
    for name in (MEDIAN, WORST, "bias 50"):
        if name in data:
            columns = ["means", *(f"error <= {x:.0%}" for x in TARGETS)]
            rows = [
                [mean, *("none" if np.isnan(y) else f"{y:.0%}" for y in x)]
                for mean, x in allowed(found, tiles, name).items()
            ]
            show(f"largest share of tiles in 4 bits, {name}", columns, rows)
    draw(found, tiles, data, output)
    return found


def draw(found: Results, tiles: int, data: list[str], output: Path) -> None:
    figure, axes = picture(len(data))
    figure.set_size_inches(2.6 * len(data), 3.6)
    for ax, name in zip(axes[0], data, strict=True):
        for color, mean in zip(("C0", "C2", "C1"), MEANS, strict=True):
            for end, mark in {" and first": "s", "": "o"}.items():
                of_kind = [x for x in choices(tiles) if x.endswith("first") == bool(end)]
                x = [share_in_4_bits(choices(tiles)[c], tiles) for c in of_kind]
                y = [found[f"{c}, {mean}"][name] for c in of_kind]
                ax.plot(x, y, mark + "-", color=color, alpha=0.7, label=f"band{end}, {mean}")
        ax.set(yscale="log", title=name, xlabel="tiles in 4 bits")
        ax.grid(alpha=0.3)
    axes[0, 0].set_ylabel("error of the output")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    save(figure, output, "mxfp")


if __name__ == "__main__":
    typer.run(main)
