"""The demo: 16-bit attention on a real language model, and on the paper's biased data.

SmolLM2-135M reads a file of Python's standard library under every scheme of attention; then the
same with a constant added to every key of a few heads, which softmax does not see in exact
arithmetic, while plain float16 does.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from pasa_jax import Schedule, dot_product_attention, explain, models
from pasa_jax.evidence.accuracy import worst_rows
from pasa_jax.evidence.plain import plain_attention
from pasa_jax.models import Decoder, metrics
from pasa_jax.models.decoder import AttentionFn, Look

Array = jax.Array
TEXT = "argparse"  # a module of the standard library
LARGEST = 65504.0  # float16's
PAPER_TILES = Schedule(block_q=128, block_kv=128)
# One query in ten of a biased head gets unscaled scores beyond float16's range.
SHARE, BEYOND = 0.1, 1.05
BIASED_HEADS = 3


@dataclass(frozen=True)
class Scheme:
    """One way to compute attention: ``attention(query, key, value)`` on inputs of ``dtype``."""

    name: str
    dtype: str
    attention: Callable[[Array, Array, Array], Array]


def schemes() -> Iterator[Scheme]:
    """The rows of the table, float32 first."""
    ours = partial(dot_product_attention, is_causal=True)
    yield Scheme("float32", "float32", partial(ours, shift="none"))
    for dtype in ("float16", "bfloat16"):
        wide = partial(ours, shift="none", precision="float32")
        plain = partial(plain_attention, scores=dtype, is_causal=True)
        yield Scheme(f"{dtype} inputs, float32 scores", dtype, wide)
        yield Scheme(f"plain {dtype}, unscaled", dtype, partial(plain, prescaled=False))
        yield Scheme(f"plain {dtype}, q pre-scaled", dtype, partial(plain, prescaled=True))
        if dtype == "float16":
            paper = partial(ours, shift="paper", schedule=PAPER_TILES, precision="paper")
            yield Scheme("paper, all float16", dtype, paper)
        for shift in ("paper", "mean", "reference", "auto"):
            chosen = {"schedule": PAPER_TILES} if shift == "paper" else {}
            yield Scheme(f"{shift} {dtype}", dtype, partial(ours, shift=shift, **chosen))


def in_model(scheme: Scheme, bias: Array | None) -> AttentionFn:
    """The model's attention: ``bias`` [L, K, D] added to the keys, then the cast."""

    def attention(q: Array, k: Array, v: Array, layer: Array) -> Array:
        if bias is not None:
            k = k + bias[layer]
        return scheme.attention(*(x.astype(scheme.dtype) for x in (q, k, v))).astype(jnp.float32)

    return attention


@partial(jax.jit, static_argnums=2)
def log_probabilities(model: Decoder, tokens: Array, attention: AttentionFn) -> Array:
    """[1, T, V] of the next token."""
    return metrics.log_probabilities(model(tokens, attention=attention))


@partial(jax.jit, static_argnums=2)
def observe(model: Decoder, tokens: Array, look: Look) -> Any:
    """What ``look`` sees in each layer of the float32 model."""
    return model.observe(tokens, look, attention=in_model(next(schemes()), None))


def choose_bias(model: Decoder, tokens: Array) -> tuple[Array, list[dict[str, Any]]]:
    """Constants for a few key heads, [L, K, D], and which heads they are.

    Along a head's mean query the least constant gives the largest scores, so the keys keep the
    most digits; the heads whose queries agree most are taken, one in a layer.
    """
    heads = model.config.kv_heads

    def look(q: Array, k: Array, v: Array, layer: Array) -> tuple[Array, Array]:
        grouped = q.reshape(q.shape[1], heads, -1, q.shape[-1])
        mean = jnp.mean(grouped, axis=(0, 2))
        direction = mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)
        along = jnp.einsum("tkgd,kd->ktg", grouped, direction)
        return direction, jnp.quantile(along.reshape(heads, -1), 1 - SHARE, axis=-1)

    direction, along = (np.asarray(x) for x in observe(model, tokens, look))
    bias = np.zeros(direction.shape, np.float32)
    chosen = []
    for layer in np.argsort(-along.max(axis=1))[:BIASED_HEADS]:
        head = int(np.argmax(along[layer]))
        size = BEYOND * LARGEST / along[layer, head]
        bias[layer, head] = size * direction[layer, head]
        chosen.append({"layer": int(layer), "key head": head, "norm added": float(size)})
    return jnp.asarray(bias), chosen


def compare(
    model: Decoder, tokens: Array, bias: Array | None, progress: Callable[[], None]
) -> list[dict[str, Any]]:
    """Perplexity and divergence from float32 of every scheme."""
    rows, true = [], None
    for scheme in schemes():
        log_p = log_probabilities(model, tokens, in_model(scheme, bias))
        true = log_p if true is None else true
        rows.append(
            {
                "scheme": scheme.name,
                "perplexity": metrics.perplexity(log_p, tokens),
                "divergence": metrics.divergence(true, log_p),
            }
        )
        progress()
    return rows


def statistics(model: Decoder, tokens: Array, bias: Array | None) -> dict[str, np.ndarray]:
    """max |q·k| unscaled, max |S'| as stored, and what plain storage loses; each [layers, N]."""

    def look(q: Array, k: Array, v: Array, layer: Array) -> Any:
        if bias is not None:
            k = k + bias[layer]
        half = (x.astype(jnp.float16) for x in (q, k, v))
        _, statistics = dot_product_attention(*half, is_causal=True, return_statistics=True)
        return statistics

    by_layer = jax.tree.map(lambda x: x[:, 0], observe(model, tokens, look))  # of the one text
    unscaled = np.asarray(by_layer.max_score) * math.sqrt(model.config.head_dim)
    return {"unscaled": unscaled, "stored": np.asarray(by_layer.max_stored)}


def run(
    tokens: int = 1024, output: Path = Path("out"), progress: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Everything the demo shows, as numbers; the picture and demo.json go to ``output``."""
    model, tokenizer = models.load("smollm2")
    text = inspect.getsource(importlib.import_module(TEXT))
    ids = jnp.asarray(tokenizer.encode(text).ids[:tokens])[None]
    bias, heads = choose_bias(model, ids)
    report: dict[str, Any] = {"text": TEXT, "tokens": ids.size, "biased heads": heads}
    report["as trained"] = compare(model, ids, None, progress)
    report["biased"] = compare(model, ids, bias, progress)
    before, biased = statistics(model, ids, None), statistics(model, ids, bias)
    for name, scores in (("as trained", before), ("biased", biased)):
        report[f"largest scores, {name}"] = {k: float(x.max()) for k, x in scores.items()}
    progress()
    report["benchmark"] = worst_rows()
    progress()
    x = jax.ShapeDtypeStruct((ids.size, 9, 64), jnp.float16)
    report["default"] = str(explain(x, x, x, is_causal=True))
    report["ratio"] = {
        part: _row(report[part], "auto float16")
        / _row(report[part], "float16 inputs, float32 scores")
        for part in ("as trained", "biased")
    }
    output.mkdir(parents=True, exist_ok=True)
    plot(before, biased, output / "scores.png")
    (output / "demo.json").write_text(json.dumps(report, indent=1))
    return report


def _row(rows: list[dict[str, Any]], scheme: str) -> float:
    return next(row["divergence"] for row in rows if row["scheme"] == scheme)


def main(tokens: int = 1024, output: Path = Path("out")) -> dict[str, Any]:
    """Runs the demo with a progress bar and prints its tables."""
    console = Console()
    steps = 2 * len(list(schemes())) + 2
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(f"SmolLM2-135M reads {TEXT}.py", total=steps)
        report = run(tokens, output, lambda: bar.advance(task))
    for table in tables(report):
        console.print(table)
    for heads in report["biased heads"]:
        console.print(f"biased: {heads}")
    for name in ("as trained", "biased"):
        largest = report[f"largest scores, {name}"]
        console.print(
            f"{name}: largest |q·k| {largest['unscaled']:,.0f} (float16 ends at {LARGEST:,.0f}); "
            f"largest score that auto stores: {largest['stored']:,.1f}"
        )
        console.print(
            f"{name}: divergence of auto float16 over float16 inputs with float32 scores: "
            f"{report['ratio'][name]:.2f} (target 1.5)"
        )
    console.print("\n[bold]what the default does here[/bold]\n" + report["default"])
    console.print(f"\nwritten: {output / 'demo.json'}, {output / 'scores.png'}")
    return report


def tables(report: dict[str, Any]) -> Iterator[Table]:
    """The tables of ``report``, for rich to print."""
    titles = {
        "as trained": f"SmolLM2-135M on {report['tokens']} tokens of {report['text']}.py",
        "biased": "the same with a constant on every key of three heads (softmax cannot see it)",
    }
    for part, title in titles.items():
        table = Table("attention", title=title)
        table.add_column("perplexity", justify="right")
        table.add_column("KL(float32 ‖ it)", justify="right")
        for row in report[part]:
            values = (f"{row['perplexity']:.4f}", f"{row['divergence']:.2e}")
            table.add_row(row["scheme"], *(x if "nan" not in x else "[red]nan" for x in values))
        yield table
    rows = report["benchmark"]
    table = Table("attention", title="the biased benchmark's worst rows: relative RMSE, float16")
    for row in rows:
        table.add_column(row["case"].replace(", ", "\n"), justify="right")
    for name in rows[0]:
        if name != "case":
            cells = (row[name] for row in rows)
            table.add_row(name, *("[red]nan" if math.isnan(x) else f"{x:.1e}" for x in cells))
    yield table


def plot(before: dict[str, np.ndarray], biased: dict[str, np.ndarray], path: Path) -> None:
    """Largest score of each layer and head, before and after the shift, with float16's limit."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    figure, axes = plt.subplots(2, 3, figsize=(15, 7), layout="constrained")
    norm = LogNorm(0.1, 2 * LARGEST)
    for row, (scores, title) in zip(
        axes, ((before, "as trained"), (biased, "three heads biased")), strict=True
    ):
        for axis, name, what in (
            (row[0], "unscaled", "max |q·k|, plain storage"),
            (row[1], "stored", "largest score stored after the shift"),
        ):
            image = axis.imshow(np.clip(scores[name].T, 0.1, None), norm=norm, aspect="auto")
            axis.set(title=f"{title}: {what}", xlabel="layer", ylabel="query head")
        figure.colorbar(image, ax=list(row[:2]))
        for name, label in (("unscaled", "before"), ("stored", "after")):
            row[2].plot(np.maximum(scores[name].max(axis=1), 0.1), marker="o", label=label)
        row[2].axhline(LARGEST, color="red", linestyle="--", label="65504, float16's largest")
        row[2].set(title=f"{title}: largest of each layer", xlabel="layer", yscale="log")
        row[2].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
