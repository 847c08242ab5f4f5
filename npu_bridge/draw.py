"""Draws what each pipe does when."""

from __future__ import annotations

from pathlib import Path

from npu_bridge.timing import Cost

_COLOURS = {
    "Scores": "#3b6fb6",
    "Offsets": "#7ba7d9",
    "Softmax": "#c8553d",
    "SoftmaxMasked": "#e08e45",
    "Statistics": "#e9c46a",
    "Values": "#2a9d8f",
    "Accumulate": "#8e6bbf",
    "Close": "#7f7f7f",
    "Begin": "#bfbfbf",
    "PrepareQuery": "#6d4c41",
}


def pipeline(cost: Cost, path: Path, *, span: tuple[float, float] = (0.35, 0.6)) -> None:
    """Draws what each pipe of a block does over a part of its predicted time.

    Arguments:
      span: the part that is drawn, as fractions of the whole time.

    Raises:
      ImportError: matplotlib is not installed (pip install 'pasa-jax[npu]').
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = [r for r in cost.timeline.stretches if r.startswith(("AIC", "AIV0"))]
    end = max(s[1] for r in rows for s in cost.timeline.stretches[r])
    lo, hi = (x * end for x in span)
    figure = Figure(figsize=(11, 4))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    seen = set()
    for y, row in enumerate(rows):
        for start, stop, part in cost.timeline.stretches[row]:
            if stop > lo and start < hi and part in _COLOURS:
                axes.barh(y, stop - start, left=start, height=0.8, color=_COLOURS[part])
                seen.add(part)
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.set_xlim(lo, hi)
    axes.set_xlabel("cycles, predicted")
    patches = [Patch(color=c, label=name) for name, c in _COLOURS.items() if name in seen]
    axes.legend(handles=patches, ncols=6, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
