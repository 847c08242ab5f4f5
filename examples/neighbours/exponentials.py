"""Cheap exponentials: 2^f by a polynomial, the power of the whole part put together from bits.

    python -m examples.neighbours.exponentials --output out

FlashAttention-4 computes a share of its exponentials so, beside the units for exponentials, of
which its chip has too few; others (arXiv 2510.06834) build hardware on the same split. Here all
exponentials of a tile are computed so, which `Precision(exponential="cubic")` asks for, and stand
beside the exact ones: the error of 2^x, the error of attention against float64, and the time on
this machine. `benchmarks/exponentials.py` has cycles of TPUs and instructions of GPUs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer

from examples.neighbours._keys import of_smollm2, rms_error, synthetic, true_output
from examples.neighbours._shared import picture, save, show
from pasa_jax import Precision, dot_product_attention
from pasa_jax.core.tile.exponentials import COEFFICIENTS, polynomial_exp2

EXACT = "exact"
KINDS = (EXACT, "cubic", "quadratic")
PROBABILITIES = ("float32", "float16", "bfloat16")
TIMED = ("float32", "bfloat16")
DATA = ("bias 0", "bias 50", "heavy-tailed (Student's t, 2)", "SmolLM2")
CALL: dict[str, Any] = {"is_causal": True, "shift": "mean", "implementation": "lax"}
Results = dict[str, dict[str, float]]


def exponential(kind: str) -> str | None:
    """What `Precision.exponential` calls it."""
    return None if kind == EXACT else kind


def error_of_powers(kind: str) -> float:
    """The largest relative error of 2^x, x in [-20, 0], computed in float32."""
    x = np.linspace(-20, 0, 200_001, dtype=np.float32)
    found = jnp.exp2(x) if kind == EXACT else polynomial_exp2(jnp.asarray(x), kind)
    true = np.exp2(x.astype(np.float64))
    return float(np.abs(np.asarray(found, np.float64) / true - 1).max())


def errors(tokens: int, every: int) -> Results:
    """By type of the probabilities and kind: the mean error of causal attention on each data,
    scores in float32 and the shift `mean`.
    """
    heads = [x._replace(is_causal=True) for x in synthetic(tokens, 64) if x.name in DATA]
    heads += of_smollm2(tokens, every)
    true = [true_output(head) for head in heads]
    arrays = [
        jnp.asarray(np.stack(x, axis=1)[None], jnp.float32)  # [1, T, N, D]
        for x in zip(*(head[1:4] for head in heads), strict=True)
    ]
    found = {}
    for stored, kind in product(PROBABILITIES, KINDS):
        precision = Precision(probabilities=stored, exponential=exponential(kind))
        attend = jax.jit(partial(dot_product_attention, **CALL, precision=precision))
        out = np.moveaxis(np.asarray(attend(*arrays)[0], np.float64), 1, 0)
        of_kind: dict[str, list[float]] = {}
        for head, x, y in zip(heads, out, true, strict=True):
            of_kind.setdefault(head.name, []).append(rms_error(x, y))
        found[f"{stored}, {kind}"] = {name: float(np.mean(x)) for name, x in of_kind.items()}
    return found


def least_seconds(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The shortest time of each call; calls take turns, in an order that changes."""
    least = dict.fromkeys(calls, np.inf)
    for call in calls.values():
        jax.block_until_ready(call())
    for r in range(rounds):
        names = list(calls)
        for name in names[r % len(names) :] + names[: r % len(names)]:
            start = time.perf_counter()
            jax.block_until_ready(calls[name]())
            least[name] = min(least[name], time.perf_counter() - start)
    return least


def timed_calls(length: int) -> Iterator[tuple[str, dict[str, Callable[[], Any]]]]:
    """2^x alone of length² numbers, and attention of 4 heads, D = 64, in each type."""
    x = -20 * jax.random.uniform(jax.random.key(0), (length, length), jnp.float32)
    powers = {EXACT: jax.jit(jnp.exp2)}
    powers |= {k: jax.jit(partial(polynomial_exp2, degree=k)) for k in COEFFICIENTS}
    yield "2^x alone", {name: partial(f, x) for name, f in powers.items()}
    for dtype in TIMED:
        shape = (1, length, 4, 64)
        operands = [
            jax.random.normal(y, shape, dtype) for y in jax.random.split(jax.random.key(1), 3)
        ]
        calls = {}
        for kind in KINDS:
            precision = Precision(probabilities=dtype, exponential=exponential(kind))
            attend = partial(dot_product_attention, precision=precision, implementation="lax")
            calls[kind] = partial(jax.jit(attend), *operands)
        yield f"attention, {dtype}", calls


def main(
    tokens: Annotated[int, typer.Option(help="Of the errors.")] = 512,
    every: Annotated[int, typer.Option(help="Of SmolLM2 each so many layers; 0: none.")] = 6,
    length: Annotated[int, typer.Option(help="S = T of the times.")] = 1024,
    rounds: Annotated[int, typer.Option(help="Calls of each.")] = 15,
    output: Annotated[Path, typer.Option(help="Folder of the picture.")] = Path("out"),
) -> Results:
    """Prints the tables, saves the picture, returns errors, and times over those of the exact."""
    of_powers = {kind: error_of_powers(kind) for kind in KINDS}
    show("largest relative error of 2^x", KINDS, [list(of_powers.values())])
    found = errors(tokens, every)
    data = list(next(iter(found.values())))
    rows = [[*name.split(", "), *x.values()] for name, x in found.items()]
    show("errors of outputs", ["P stored as", "exponential", *data], rows)
    ratios = {}
    for name, calls in timed_calls(length):
        least = least_seconds(calls, rounds)
        ratios[name] = {kind: least[kind] / least[EXACT] for kind in KINDS}
    rows = [[name, *x.values()] for name, x in ratios.items()]
    show(f"time over that of the exact one, CPU, S = {length}", ["", *KINDS], rows)
    draw(found, output)
    return {"2^x": of_powers, **found, **{f"time of {name}": x for name, x in ratios.items()}}


def draw(found: Results, output: Path) -> None:
    figure, axes = picture(2)
    x = np.linspace(-3, 0, 3001, dtype=np.float32)
    for kind in COEFFICIENTS:
        y = np.asarray(polynomial_exp2(jnp.asarray(x), kind)) / np.exp2(x.astype(np.float64)) - 1
        axes[0, 0].semilogy(x, np.abs(y), label=kind)
    for name in PROBABILITIES:
        values = [np.mean(list(found[f"{name}, {kind}"].values())) for kind in KINDS]
        axes[0, 1].semilogy(KINDS, values, "o-", label=f"P in {name}")
    axes[0, 0].set(title="relative error of 2^x", xlabel="x", ylim=(1e-8, 1e-2))
    axes[0, 1].set(title="error of attention, mean over the data")
    for ax in axes[0]:
        ax.legend()
        ax.grid(alpha=0.3)
    save(figure, output, "exponentials")


if __name__ == "__main__":
    typer.run(main)
