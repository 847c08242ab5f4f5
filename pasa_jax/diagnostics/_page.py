"""A report as one HTML page, which needs no other file. Needs the extra ``diagnostics``."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np
from markupsafe import Markup, escape
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator
from numpy.typing import NDArray

from pasa_jax.diagnostics._forms import ATTENTIONS, DTYPES, FORMATS
from pasa_jax.diagnostics._measure import LARGEST, PHASES, ROUNDED
from pasa_jax.diagnostics._tables import added, of_format
from pasa_jax.diagnostics._verdict import Calls, advice, heads_of, overflowing, verdict

_BELOW = ("#f7fbff", "#deebf7", "#c6dbef", "#9ecae1", "#6baed6", "#3182bd")
_BEYOND = ("#fdae6b", "#e6550d", "#a50f15", "#67000d")
_EDGES = (0, 10, 100, 1e3, 1e4, 3e4, LARGEST, 3e5, 1e6, 1e7, 1e9)
RED, GREY, BLUE = "#c0392b", "#7f8c8d", "#2471a3"


def page(calls: Calls) -> str:
    """The HTML page."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pasa_jax.diagnostics", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    measured = any(call.errors for call in calls)
    figures = [
        (title, note, _image(draw, calls, size))
        for title, note, draw, size in _FIGURES
        if measured or draw not in (_draw_costs, _draw_formats)
    ]
    return environment.get_template("report.html.j2").render(
        heads=heads_of(calls),
        overflowing=len(overflowing(calls)),
        verdict=verdict(calls),
        advice=[_with_code(line) for line in advice(calls)],
        figures=figures,
        rows=_head_rows(calls),
        rounded=ROUNDED,
    )


def _with_code(sentence: str) -> Markup:
    """As HTML, what stands between backticks as code."""
    return Markup(re.sub("`(.+?)`", r"<code>\1</code>", str(escape(sentence))))


def _head_rows(calls: Calls) -> list[dict[str, Any]]:
    """A row per head, the loudest first."""
    rows = []
    for i, call in enumerate(calls):
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
                    "if_rounded": "mean" if call.shifts_if_rounded[n] else "none",
                    "overflows": bool(call.overflows[n]),
                }
            )
    return sorted(rows, key=lambda row: -row["product"])


def _image(draw: Callable[[Any, Calls], None], calls: Calls, size: tuple[float, float]) -> str:
    """A figure as a data URL."""
    # Without pyplot no global state changes; a fixed salt gives the same file each time.
    with mpl.rc_context({"svg.hashsalt": "pasa", "font.size": 10}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure, calls)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _grid(calls: Calls, field: str) -> NDArray:
    """[heads, calls] of a field; NaN where a call has fewer heads."""
    grid = np.full((max(call.heads for call in calls), len(calls)), np.nan)
    for i, call in enumerate(calls):
        grid[: call.heads, i] = getattr(call, field)
    return grid


def _draw_heat(figure: Any, calls: Calls) -> None:
    colours = ListedColormap([*_BELOW, *_BEYOND], name="scores")
    norm = BoundaryNorm(_EDGES, len(_BELOW) + len(_BEYOND))
    axes = figure.subplots(1, 2, sharey=True)
    titles = ("before: max |q·k|", "after: largest score stored")
    for axis, field, title in zip(axes, ("max_product", "max_stored"), titles, strict=True):
        grid = _grid(calls, field)
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


def _draw_calls(figure: Any, calls: Calls) -> None:
    axis = figure.subplots()
    fields = (("max_product", "|q·k|", RED), ("max_score", "|scale · q·k|", GREY))
    for field, label, colour in (*fields, ("max_stored", "stored after the shift", BLUE)):
        tops = [max(float(getattr(call, field).max()), 0.1) for call in calls]
        axis.plot(tops, marker="o", label=label, color=colour)
    axis.axhline(LARGEST, color="black", linestyle="--", label="65504, float16's largest")
    axis.set(xlabel="call", yscale="log", title="largest of each call")
    axis.legend()


def _draw_bias(figure: Any, calls: Calls) -> None:
    axis = figure.subplots()
    bias, spread, lost = (
        np.concatenate([getattr(call, field) for call in calls])
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


def _loudest(calls: Calls) -> tuple[int, int]:
    tops = [float(call.max_product.max()) for call in calls]
    i = int(np.argmax(tops))
    return i, int(np.argmax(calls[i].max_product))


def _draw_phases(figure: Any, calls: Calls) -> None:
    axis = figure.subplots()
    i, n = _loudest(calls)
    every = np.concatenate([call.phases for call in calls]).mean(axis=0)
    width = np.diff(PHASES)
    axis.bar(PHASES[:-1], every, width, align="edge", color=GREY, alpha=0.6, label="all heads")
    loudest = calls[i].phases[n]
    label = f"the loudest: call {i}, head {n}"
    axis.step(PHASES, np.append(loudest, loudest[-1]), where="post", color=RED, label=label)
    axis.set(xticks=PHASES[::3], xlabel="phase between q and k [°]", ylabel="share of the pairs")
    axis.set_title("resonance: pairs near 0° or 180°", fontsize=10)
    axis.legend()


def _draw_channels(figure: Any, calls: Calls) -> None:
    i, n = _loudest(calls)
    call, axis = calls[i], figure.subplots()
    mean, spread = call.key_mean[n], call.key_spread[n]
    channel = np.arange(len(mean))
    axis.fill_between(channel, mean - spread, mean + spread, color=RED, alpha=0.2)
    axis.plot(channel, mean, color=RED, label="keys: mean and spread over the sequence")
    axis.plot(channel, call.query_mean[n], color=BLUE, label="queries: mean")
    axis.axhline(0, color="black", linewidth=0.5)
    axis.set(xlabel="head channel", title=f"the loudest head by channel: call {i}, head {n}")
    axis.legend()


def _draw_costs(figure: Any, calls: Calls) -> None:
    axes = figure.subplots(1, len(DTYPES) + 1, width_ratios=[*(1 for _ in DTYPES), 0.8])
    for axis, dtype in zip(axes, DTYPES, strict=False):
        for form in ATTENTIONS:
            _draw_sorted(axis, added(calls, dtype, form), form)
        axis.axhline(1, color="black", linestyle="--", linewidth=1)
        axis.yaxis.set_major_formatter(LogFormatter())
        axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        axis.set_title(f"{dtype}: what attention adds", fontsize=10)
        axis.set_xlabel("heads, sorted for each form")
        axis.legend(fontsize=8)
    axes[0].set_ylabel("error ÷ that of the cast alone")
    for dtype in DTYPES:
        errors = [call.cast_cost(dtype) for call in calls if call.errors]
        _draw_sorted(axes[-1], np.sort(np.concatenate(errors)), dtype)
    axes[-1].set_title("what the cast alone costs", fontsize=10)
    axes[-1].set(xlabel="heads, sorted for each type", ylabel="relative error of the output")
    axes[-1].legend(fontsize=8)


def _draw_formats(figure: Any, calls: Calls) -> None:
    axis = figure.subplots()
    for format in FORMATS:
        _draw_sorted(axis, of_format(calls, format), format)
    axis.set(xlabel="heads, sorted for each format", ylabel="relative error of the output")
    axis.legend(fontsize=8)


def _draw_sorted(axis: Any, values: NDArray, label: str) -> None:
    """A line through the sorted values; how many are NaN stands in its label."""
    lost = int((~np.isfinite(values)).sum())
    shown = values[: len(values) - lost]
    if lost:
        label = f"{label}: NaN in {lost}"
    axis.plot(np.arange(1, len(shown) + 1), shown, marker=".", markersize=4, label=label)
    axis.set(xlim=(0.5, len(values) + 0.5), yscale="log")
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))


_FIGURES: tuple[tuple[str, str, Callable[[Any, Calls], None], tuple[float, float]], ...] = (
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
        "Measured on some queries of each call, against float64. Right: the error that the cast of "
        "query, key and value to the type causes by itself, measured with scores in float32; no "
        "attention gives it back. Left: the whole error of each form divided by that, so 1 is as "
        "good as float32 scores. “eager” stores unscaled scores, as model code does.",
        _draw_costs,
        (11, 3.6),
    ),
    (
        "What a cache in 8 bits would cost",
        "The error that each format of KVCache and PagedCache causes alone: keys and values are "
        "what the cache gives back, all else is exact. The formats of 8 bits take the mean of each "
        "64 keys off first, so a bias costs nothing.",
        _draw_formats,
        (11, 3.2),
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
