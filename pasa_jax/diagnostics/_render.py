"""A `Report` as tables for the terminal and as one HTML page."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pasa_jax.diagnostics._forms import DTYPES, FORMS
from pasa_jax.diagnostics._measure import BEHIND, LARGEST, PHASES
from pasa_jax.diagnostics.report import Call, Report

# The terminal.


def tables(report: Report, rows: int) -> list[Any]:
    """What rich prints: the verdict, the loudest calls, the errors to expect, the advice."""
    colour = "red" if report.overflowing else "green"
    advice = [f"[bold]{_escaped(line)}[/bold]" for line in report.advice]
    parts = [f"[{colour}]{_escaped(report.verdict)}[/{colour}]", _call_table(report, rows)]
    if any(call.errors for call in report.calls):
        parts.append(_error_table(report))
    return [*parts, _auto_line(report), *advice]


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _call_table(report: Report, rows: int) -> Any:
    from rich import box
    from rich.table import Table

    order = sorted(range(len(report.calls)), key=lambda i: -report.calls[i].max_product.max())
    title = "attention calls" if rows >= len(order) else f"the {rows} loudest of {len(order)} calls"
    table = Table(title=f"{title}, and their largest head", box=box.SIMPLE_HEAD)
    table.add_column("call", no_wrap=True)
    table.add_column("query", no_wrap=True)
    for name in ("|q·k|", "|score|", "overflow", "bias/spread"):
        table.add_column(name, justify="right", no_wrap=True)
    for i in sorted(order[:rows]):
        table.add_row(f"{i} {_escaped(report.calls[i].name)}", *_call_cells(report.calls[i]))
    return table


def _call_cells(call: Call) -> Iterator[str]:
    top, lost = call.max_product.max(), int(call.overflows.sum())
    yield "×".join(map(str, call.shapes[0]))
    yield f"[red]{top:,.0f}[/red]" if lost else f"{top:,.0f}"
    yield f"{call.max_score.max():,.0f}"
    yield f"[red]{lost} of {call.heads}[/red]" if lost else f"0 of {call.heads}"
    yield f"{_ratio(call.key_bias, call.key_deviation).max():.2g}"


def _auto_line(report: Report) -> str:
    here = ", ".join(dict.fromkeys(call.float16_shift for call in report.calls))
    shifted = sum(int(call.shifts_behind.sum()) for call in report.calls)
    return (
        f"auto in float16: {here} here; on {BEHIND}, mean in {shifted} heads and none in "
        f"{report.heads - shifted}"
    )


def _ratio(a: NDArray, b: NDArray) -> NDArray:
    return a / np.maximum(b, np.finfo(np.float32).tiny)


def _error_table(report: Report) -> Any:
    from rich import box
    from rich.table import Table

    title = "relative error to expect: worst head, and the median one"
    table = Table("form", title=title, box=box.SIMPLE_HEAD)
    for dtype in DTYPES:
        table.add_column(f"{dtype}: worst", justify="right")
        table.add_column("median", justify="right")
    for form in FORMS:
        cells = []
        for dtype in DTYPES:
            found = _errors(report, dtype, form)
            cells += [_number(_worst(found)), _number(_median(found))]
        table.add_row(form, *cells)
    return table


def _errors(report: Report, dtype: str, form: str) -> NDArray:
    """Of all heads of all calls that have them."""
    found = [
        call.errors[dtype][form] for call in report.calls if form in call.errors.get(dtype, {})
    ]
    return np.concatenate(found) if found else np.zeros(0)


def _worst(x: NDArray) -> float | None:
    return None if not len(x) else float(np.max(x))  # NaN, if there is one


def _median(x: NDArray) -> float | None:
    """NaN counts as larger than any number."""
    return None if not len(x) else float(np.sort(x)[len(x) // 2])


def _number(x: float | None) -> str:
    if x is None:
        return "–"
    return f"{x:.1e}" if np.isfinite(x) else "[red]NaN[/red]"


# The page.

_BELOW = ("#f7fbff", "#deebf7", "#c6dbef", "#9ecae1", "#6baed6", "#3182bd")
_BEYOND = ("#fdae6b", "#e6550d", "#a50f15", "#67000d")
_EDGES = (0, 10, 100, 1e3, 1e4, 3e4, LARGEST, 3e5, 1e6, 1e7, 1e9)
RED, GREY, BLUE = "#c0392b", "#7f8c8d", "#2471a3"


def page(report: Report) -> str:
    """The HTML page, which needs no other file."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pasa_jax.diagnostics", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    measured = any(call.errors for call in report.calls)
    figures = [
        (title, note, _image(draw, report, size))
        for title, note, draw, size in _FIGURES
        if measured or draw is not _draw_errors
    ]
    return environment.get_template("report.html.j2").render(
        report=report, figures=figures, rows=_head_rows(report), behind=BEHIND
    )


def _head_rows(report: Report) -> list[dict[str, Any]]:
    """A row per head, the loudest first."""
    rows = []
    for i, call in enumerate(report.calls):
        for n in range(call.heads):
            rows.append(
                {
                    "call": i,
                    "name": call.name,
                    "head": n,
                    "query": "×".join(map(str, call.shapes[0])),
                    "keys": call.shapes[1][1],
                    "product": float(call.max_product[n]),
                    "score": float(call.max_score[n]),
                    "stored": float(call.max_stored[n]),
                    "share": float(call.product_share[n]),
                    "margin": float(call.margin[n]),
                    "bias": float(call.key_bias[n]),
                    "spread": float(call.key_deviation[n]),
                    "resonance": float(call.resonance[n]),
                    "shift": call.float16_shift,
                    "behind": "mean" if call.shifts_behind[n] else "none",
                    "overflows": bool(call.overflows[n]),
                }
            )
    return sorted(rows, key=lambda row: -row["product"])


def _image(draw: Callable[[Any, Report], None], report: Report, size: tuple[float, float]) -> str:
    """A figure as a data URL."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # Without pyplot nothing global is touched; a fixed salt gives the same file each time.
    with mpl.rc_context({"svg.hashsalt": "pasa", "font.size": 10}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure, report)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _grid(report: Report, field: str) -> NDArray:
    """[heads, calls] of a field; NaN where a call has fewer heads."""
    grid = np.full((max(call.heads for call in report.calls), len(report.calls)), np.nan)
    for i, call in enumerate(report.calls):
        grid[: call.heads, i] = getattr(call, field)
    return grid


def _draw_heat(figure: Any, report: Report) -> None:
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.ticker import MaxNLocator

    colours = ListedColormap([*_BELOW, *_BEYOND], name="scores")
    norm = BoundaryNorm(_EDGES, len(_BELOW) + len(_BEYOND))
    axes = figure.subplots(1, 2, sharey=True)
    titles = ("before: max |q·k|", "after: largest score stored")
    for axis, field, title in zip(axes, ("max_product", "max_stored"), titles, strict=True):
        grid = _grid(report, field)
        image = axis.imshow(
            np.minimum(grid, 0.9 * _EDGES[-1]),
            norm=norm,
            cmap=colours,
            aspect="auto",
            interpolation="nearest",
        )
        head, call = np.nonzero(grid > LARGEST)
        axis.plot(call, head, "x", color="white", markersize=5)
        axis.set(title=title, xlabel="call")
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_ylabel("query head")
    bar = figure.colorbar(image, ax=axes, ticks=_EDGES[:-1], format="{x:,.0f}")
    bar.ax.axhline(LARGEST, color="black", linewidth=2)


def _draw_calls(figure: Any, report: Report) -> None:
    axis = figure.subplots()
    fields = (("max_product", "|q·k|", RED), ("max_score", "|scale · q·k|", GREY))
    for field, label, colour in (*fields, ("max_stored", "stored after the shift", BLUE)):
        tops = [max(float(getattr(call, field).max()), 0.1) for call in report.calls]
        axis.plot(tops, marker="o", label=label, color=colour)
    axis.axhline(LARGEST, color="black", linestyle="--", label="65504, float16's largest")
    axis.set(xlabel="call", yscale="log", title="largest of each call")
    axis.legend()


def _draw_bias(figure: Any, report: Report) -> None:
    axis = figure.subplots()
    bias, spread, lost = (
        np.concatenate([getattr(call, field) for call in report.calls])
        for field in ("key_bias", "key_deviation", "overflows")
    )
    bias, spread = np.maximum(bias, 1e-3), np.maximum(spread, 1e-3)
    for shown, label, colour in ((~lost, "fits", BLUE), (lost, "overflows", RED)):
        axis.scatter(spread[shown], bias[shown], s=18, color=colour, label=label, alpha=0.7)
    ends = [min(bias.min(), spread.min()), max(bias.max(), spread.max())]
    axis.plot(ends, ends, color=GREY, linestyle="--", label="bias = spread")
    axis.set(xscale="log", yscale="log", xlabel="spread around the mean", ylabel="norm of the mean")
    axis.set_title("keys of each head", fontsize=10)
    axis.legend()


def _loudest(report: Report) -> tuple[int, int]:
    tops = [float(call.max_product.max()) for call in report.calls]
    i = int(np.argmax(tops))
    return i, int(np.argmax(report.calls[i].max_product))


def _draw_phases(figure: Any, report: Report) -> None:
    axis = figure.subplots()
    i, n = _loudest(report)
    every = np.concatenate([call.phases for call in report.calls]).mean(axis=0)
    width = np.diff(PHASES)
    axis.bar(PHASES[:-1], every, width, align="edge", color=GREY, alpha=0.6, label="all heads")
    loudest = report.calls[i].phases[n]
    label = f"the loudest: call {i}, head {n}"
    axis.step(PHASES, np.append(loudest, loudest[-1]), where="post", color=RED, label=label)
    axis.set(xticks=PHASES[::3], xlabel="phase between q and k [°]", ylabel="share of the pairs")
    axis.set_title("resonance: pairs near 0° or 180°", fontsize=10)
    axis.legend()


def _draw_channels(figure: Any, report: Report) -> None:
    i, n = _loudest(report)
    call, axis = report.calls[i], figure.subplots()
    mean, spread = call.key_mean[n], call.key_spread[n]
    channel = np.arange(len(mean))
    axis.fill_between(channel, mean - spread, mean + spread, color=RED, alpha=0.2)
    axis.plot(channel, mean, color=RED, label="keys: mean and spread over the sequence")
    axis.plot(channel, call.query_mean[n], color=BLUE, label="queries: mean")
    axis.axhline(0, color="black", linewidth=0.5)
    axis.set(xlabel="head channel", title=f"the loudest head by channel: call {i}, head {n}")
    axis.legend()


def _draw_errors(figure: Any, report: Report) -> None:
    axes = figure.subplots(1, len(DTYPES), sharey=True)
    for axis, dtype in zip(axes, DTYPES, strict=True):
        worst = [_worst(_errors(report, dtype, form)) for form in FORMS]
        values = np.array([np.nan if x is None else x for x in worst])
        axis.bar(range(len(FORMS)), np.where(np.isfinite(values), np.maximum(values, 1e-6), 0))
        for at, (value, found) in enumerate(zip(values, worst, strict=True)):
            if not np.isfinite(value):
                text = "NaN" if found is not None else "–"
                axis.annotate(text, (at, 1e-5), color=RED, ha="center", weight="bold")
        axis.set(yscale="log", ylim=(1e-6, 10), title=f"{dtype}: worst head")
        axis.set_xticks(range(len(FORMS)), FORMS, rotation=30, ha="right")
    axes[0].set_ylabel("relative error of the output")


_FIGURES: tuple[tuple[str, str, Callable[[Any, Report], None], tuple[float, float]], ...] = (
    (
        "Which heads overflow",
        "Blue fits float16; orange and red, crossed, is beyond 65504, where plain storage is "
        "infinite and softmax NaN. Right: the same after the default's shift.",
        _draw_heat,
        (11, 4.2),
    ),
    (
        "Layer by layer",
        "Code that scales after the product stores q·k; code that scales the query first stores "
        "the scaled score. Both lose digits long before the line.",
        _draw_calls,
        (11, 3.6),
    ),
    (
        "What each way would cost",
        "Measured on some queries of each call, against float64; inputs are cast to the type. "
        "“eager” stores unscaled scores, as model code does; “float32 scores” is the best that "
        "16-bit inputs allow.",
        _draw_errors,
        (11, 3.6),
    ),
    (
        "Why: bias",
        "Above the line, what makes scores large is a mean that all keys share, which softmax "
        "cannot see. The shift mean takes it off.",
        _draw_bias,
        (5.4, 4),
    ),
    (
        "Why: resonance",
        "Where q and k run in phase (0°) or against it (180°) along the head channels, scores are "
        "as large as their norms allow, without any bias. The shift reference is for these.",
        _draw_phases,
        (5.4, 4),
    ),
    ("Channels of the loudest head", "", _draw_channels, (11, 3.2)),
)
