"""A report as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from pasa_jax.diagnostics._call import Call
from pasa_jax.diagnostics._forms import ATTENTIONS, DTYPES, FORMATS
from pasa_jax.diagnostics._measure import ROUNDED
from pasa_jax.diagnostics._verdict import Calls, advice, heads_of, overflowing, verdict


def tables(calls: Calls, rows: int) -> list[RenderableType]:
    """The verdict, the ``rows`` loudest calls, the errors to expect, the advice."""
    colour = "red" if overflowing(calls) else "green"
    parts: list[RenderableType] = [f"[{colour}]{escape(verdict(calls))}[/{colour}]"]
    parts.append(_call_table(calls, rows))
    if any(call.errors for call in calls):
        parts += [_cast_table(calls), _added_table(calls), _format_table(calls)]
    return [*parts, _auto_line(calls), *(f"[bold]{escape(line)}[/bold]" for line in advice(calls))]


def _call_table(calls: Calls, rows: int) -> Table:
    order = sorted(range(len(calls)), key=lambda i: -calls[i].max_product.max())
    title = "attention calls" if rows >= len(order) else f"the {rows} loudest of {len(order)} calls"
    table = Table(title=f"{title}, and their largest head", box=box.SIMPLE_HEAD)
    table.add_column("call", overflow="fold")
    table.add_column("query", no_wrap=True)
    for name in ("|q·k|", "|score|", "overflow", "bias ÷\nspread"):
        table.add_column(name, justify="right", no_wrap=True)
    for i in sorted(order[:rows]):
        table.add_row(f"{i} {escape(calls[i].name)}", *_call_cells(calls[i]))
    return table


def _call_cells(call: Call) -> Iterator[str]:
    top, lost = call.max_product.max(), int(call.overflows.sum())
    yield "×".join(map(str, call.shapes[0]))
    yield f"[red]{top:,.0f}[/red]" if lost else f"{top:,.0f}"
    yield f"{call.max_score.max():,.0f}"
    yield f"[red]{lost} of {call.heads}[/red]" if lost else f"0 of {call.heads}"
    spread = np.maximum(call.key_deviation, np.finfo(np.float32).tiny)
    yield f"{(call.key_bias / spread).max():.2g}"


def _cast_table(calls: Calls) -> Table:
    title = "relative error by the cast of query, key and value alone"
    table = Table("type", "worst head", "median head", title=title, box=box.SIMPLE_HEAD)
    for dtype in DTYPES:
        errors = np.concatenate([call.cast_cost(dtype) for call in calls if call.errors])
        table.add_row(dtype, *(_number(x, ".1e") for x in _worst_and_median(errors)))
    return table


def _added_table(calls: Calls) -> Table:
    title = "what attention adds: error ÷ that of the cast alone"
    table = Table("form", title=title, box=box.SIMPLE_HEAD)
    for dtype in DTYPES:
        table.add_column(f"{dtype}: worst", justify="right")
        table.add_column("median", justify="right")
    for form in ATTENTIONS:
        cells: list[str] = []
        for dtype in DTYPES:
            cells += [_number(x, ",.2f") for x in _worst_and_median(added(calls, dtype, form))]
        table.add_row(form, *cells)
    return table


def _format_table(calls: Calls) -> Table:
    title = "relative error by the format of a cache alone"
    table = Table("format", "worst head", "median head", title=title, box=box.SIMPLE_HEAD)
    for format in FORMATS:
        errors = of_format(calls, format)
        table.add_row(format, *(_number(x, ".1e") for x in _worst_and_median(errors)))
    return table


def of_format(calls: Calls, format: str) -> NDArray:
    """The error of a cache's format in every head, smallest first, NaN last."""
    return np.sort(np.concatenate([call.formats[format] for call in calls if call.formats]))


def added(calls: Calls, dtype: str, form: str) -> NDArray:
    """`Call.added` of every head of the calls that have the form, smallest first, NaN last."""
    heads = [call.added(dtype, form) for call in calls if form in call.errors.get(dtype, {})]
    return np.sort(np.concatenate(heads)) if heads else np.zeros(0)


def _worst_and_median(x: NDArray) -> tuple[float | None, float | None]:
    """None of no heads. NaN counts as larger than any number."""
    return (float(np.sort(x)[-1]), float(np.sort(x)[len(x) // 2])) if len(x) else (None, None)


def _number(x: float | None, form: str) -> str:
    if x is None:
        return "–"
    return "[red]NaN[/red]" if np.isnan(x) else f"{x:{form}}"


def _auto_line(calls: Calls) -> str:
    here = ", ".join(dict.fromkeys(call.float16_shift for call in calls))
    shifted = sum(int(call.shifts_if_rounded.sum()) for call in calls)
    return (
        f"In float16, auto takes {here} here. On {ROUNDED}, which rounds products, it takes mean "
        f"in {shifted} heads and none in {heads_of(calls) - shifted}."
    )
