"""`python -m pasa_jax inspect`: a model directory and a text to a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from pasa_jax import models
from pasa_jax.core.errors import wrong
from pasa_jax.diagnostics._collect import inspect
from pasa_jax.diagnostics.report import Report


def main(
    source: str, text: Path, *, tokens: int, dtype: str, error_rows: int, rows: int, output: Path
) -> Report:
    """Prints the tables of a model that reads a text, with a progress bar, and writes the page."""
    console = Console()
    with console.status(f"loading {source}"):
        model, tokenizer = models.load(source, dtype=dtype)
        ids = _ids(model, tokenizer, text, tokens)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(f"{source} reads {len(ids)} tokens", total=model.config.layers)
        report = inspect(
            model,
            jnp.asarray([ids]),
            error_rows=error_rows,
            progress=lambda call: bar.advance(task),
        )
    console.print(f"{source} in {dtype} on {len(ids)} tokens of {text}")
    report.print(rows=rows)
    for path in report.save(output):
        console.print(f"written: {path}")
    return report


def _ids(model: Any, tokenizer: Any, text: Path, tokens: int) -> list[int]:
    """The first ``tokens`` ids of the text."""
    if tokenizer is None:
        raise wrong("source", "hold a tokenizer.json, to read a text with", "none")
    ids = tokenizer.encode(text.read_text(encoding="utf-8")).ids
    if not ids:
        raise wrong("text", "hold at least one token", f"the empty {text}")
    longest = model.config.max_length
    if min(len(ids), tokens) > longest:
        raise wrong("tokens", f"be at most the model's {longest}", tokens)
    return ids[:tokens]
