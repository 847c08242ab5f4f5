"""The paper's biased random benchmark, every scheme side by side, against float64.

Section 7 of docs/algorithm.md says what the cases are and why V is drawn twice: with the mean of
K, as the paper draws it, an output is nearly constant and hides errors of the weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from pasa_jax import Precision, Schedule, dot_product_attention, optimal_beta
from pasa_jax.core.shifts import PAPER_STARTS
from pasa_jax.evidence.plain import float64_attention, plain_attention

Array = jax.Array
Record = dict[str, Any]
SEED = 2024724  # the paper's script
BASELINE = "q pre-scaled"
# The paper's tiles, on a CPU and on a target with rounded products.
TILES = Schedule(block_q=128, block_kv=128)
ROUNDED = Schedule(block_q=128, block_kv=128, target="ascend_910b")


@dataclass(frozen=True)
class Case:
    """One draw: Q and K around x0 with amplitude am, V like K or of mean zero."""

    kind: str
    x0: float
    am: float
    value: str = "same"

    @property
    def title(self) -> str:
        of_value = "" if self.value == "same" else f", {self.value}"
        return f"{self.kind} x0={self.x0:g}, Am={self.am:g}{of_value}"

    def draw(self, heads: int, seq: int, dim: int, dtype: str) -> tuple[NDArray, NDArray, NDArray]:
        """Q, K and V [1, seq, heads, dim], rounded to ``dtype``."""
        rng = np.random.default_rng(SEED)
        shape = (1, seq, heads, dim)

        def array(x0: float) -> NDArray:
            if self.kind == "uniform":
                x = (rng.random(shape) - 0.5) * 2 * self.am + x0
            else:
                spikes = rng.normal(0, math.sqrt(self.am), shape) * (rng.random(shape) < 0.001)
                x = rng.normal(x0, 1, shape) + spikes
            return x.astype(np.float32).astype(jnp.dtype(dtype))

        return array(self.x0), array(self.x0), array(self.x0 if self.value == "same" else 0)


@dataclass(frozen=True)
class HardCase:
    """A named draw that breaks one scheme or another; ``make`` gives float64 arrays [S, H, D]."""

    title: str
    make: Callable[[np.random.Generator, int, int, int], tuple[NDArray, NDArray, NDArray]]

    def draw(self, heads: int, seq: int, dim: int, dtype: str) -> tuple[NDArray, NDArray, NDArray]:
        """Q, K and V [1, S, heads, dim], rounded to ``dtype``."""
        q, k, v = self.make(np.random.default_rng(SEED), seq, heads, dim)
        q, k, v = (x[None].astype(np.float32).astype(jnp.dtype(dtype)) for x in (q, k, v))
        return q, k, v


def _resonance(amplitude: float) -> Any:
    """q and k are waves along the head channels, in phase or against it; K has mean zero."""

    def make(rng: np.random.Generator, seq: int, heads: int, dim: int) -> Any:
        wave = amplitude * np.sin(0.3 * np.arange(dim))
        sign = rng.choice([-1.0, 1.0], (seq, heads, 1))
        noise = 0.02 * amplitude * rng.standard_normal((2, seq, heads, dim))
        return wave + noise[0], wave * sign + noise[1], rng.standard_normal((seq, heads, dim))

    return make


def _alternating(rng: np.random.Generator, seq: int, heads: int, dim: int) -> Any:
    """Keys change sign from one to the next: |S'| > 65504 whatever mean is taken off."""
    q = 100 + rng.standard_normal((seq, heads, dim))
    k = (100 + rng.standard_normal((seq, heads, dim))) * (-1.0) ** np.arange(seq)[:, None, None]
    return q, k, rng.standard_normal((seq, heads, dim))


def _drifting(rng: np.random.Generator, seq: int, heads: int, dim: int) -> Any:
    """K's bias grows along the sequence, from −30 to 30."""
    drift = np.linspace(-30, 30, seq)[:, None, None]
    x = rng.standard_normal((3, seq, heads, dim))
    return 5 + x[0], drift + x[1], x[2]


def _equal_keys(rng: np.random.Generator, seq: int, heads: int, dim: int) -> Any:
    """100 000 keys of equal weight: a float16 row sum overflows at 65504."""
    del seq, heads
    q, k = np.full((8, 1, dim), 3.0), np.full((100_000, 1, dim), 3.0)
    return q, k, 5 + rng.standard_normal((100_000, 1, dim))


def _huge_values(rng: np.random.Generator, seq: int, heads: int, dim: int) -> Any:
    """V near ±65504: a block's P·V overflows float16."""
    x = rng.standard_normal((2, seq, heads, dim))
    return x[0], x[1], rng.uniform(60_000, 65_504, (seq, heads, dim))


HARD_CASES = (
    HardCase("resonance, |S| 4500", _resonance(28.0)),
    HardCase("resonance, |S| 100000", _resonance(133.0)),
    HardCase("alternating signs", _alternating),
    HardCase("drifting bias", _drifting),
    HardCase("100k equal keys", _equal_keys),
    HardCase("V near 65504", _huge_values),
)


def grid() -> Iterator[Case]:
    """The paper's cases."""
    for kind in ("uniform", "hybrid"):
        for x0 in (0, 10, 20, 30):
            for am in (0.5, 5, 10, 20):
                yield Case(kind, x0, am)


def zero_mean_grid() -> Iterator[Case]:
    """The cases that show errors of the weights."""
    for x0 in (0, 5, 10, 20, 30):
        for am in (0.5, 1, 5, 10, 20):
            yield Case("uniform", x0, am, "zero mean")


Scheme = Callable[[Array, Array, Array], Array]


def schemes(dtype: str) -> dict[str, Scheme]:
    """Every scheme by name, for inputs of ``dtype``."""
    ours = partial(dot_product_attention, implementation="lax")
    statistics = Precision(scores=dtype, probabilities=dtype)
    by_name: dict[str, Scheme] = {
        "float32 scores": partial(ours, shift="none", precision="float32", schedule=TILES),
        "unscaled": partial(plain_attention, scores=dtype, prescaled=False),
        BASELINE: partial(plain_attention, scores=dtype, prescaled=True),
        "global K mean": partial(plain_attention, scores=dtype, prescaled=True, centre_keys=True),
    }
    for start in PAPER_STARTS:
        beta = optimal_beta(128, start)
        paper = partial(ours, shift="paper", beta=beta, schedule=TILES)
        if dtype == "float16":
            by_name[f"paper {beta:.4f}"] = partial(paper, precision="paper")
        by_name[f"paper {beta:.4f}, float32 statistics"] = partial(paper, precision=statistics)
    for shift in ("none", "mean", "mean_past", "reference", "auto"):
        by_name[shift] = partial(ours, shift=shift, schedule=TILES)
    for shift in ("mean", "reference", "auto"):
        by_name[f"{shift}, rounded products"] = partial(ours, shift=shift, schedule=ROUNDED)
    return by_name


@cache
def _compiled(dtype: str) -> dict[str, Any]:
    """`schemes`, compiled once for each shape of the cases."""
    return {name: jax.jit(scheme) for name, scheme in schemes(dtype).items()}


@dataclass(frozen=True)
class Error:
    """Of one scheme in one case; nan where outputs are not finite."""

    plain: float  # RMSE / RMS of the float64 output
    centred: float  # the same without each column's mean
    non_finite: float  # share of the outputs


def measure(out: Array, exact: NDArray[np.float64]) -> Error:
    """The errors of ``out`` against ``exact``, both [B, T, N, E]."""
    wide = np.asarray(out).astype(np.float64)
    lost = float(np.mean(~np.isfinite(wide)))

    def relative(x: NDArray, y: NDArray) -> float:
        return float(np.sqrt(np.mean((x - y) ** 2) / np.mean(y**2))) if not lost else math.nan

    def centre(x: NDArray) -> NDArray:
        return x - x.mean(axis=1, keepdims=True)

    return Error(relative(wide, exact), relative(centre(wide), centre(exact)), lost)


def evaluate(
    cases: Iterable[Case | HardCase],
    dtype: str,
    *,
    heads: int,
    seq: int,
    dim: int = 128,
    names: tuple[str, ...] | None = None,
    progress: Callable[[], None] = lambda: None,
) -> list[Record]:
    """One record a case: its title and, by scheme, its `Error`."""
    chosen = {k: f for k, f in _compiled(dtype).items() if names is None or k in names}
    records: list[Record] = []
    for case in cases:
        q, k, v = case.draw(heads, seq, dim, dtype)
        exact = float64_attention(q, k, v)
        errors = {name: asdict(measure(f(q, k, v), exact)) for name, f in chosen.items()}
        records.append({"case": case.title, "dtype": dtype, "errors": errors})
        progress()
    return records


def ratios(records: list[Record], over: str = BASELINE) -> dict[str, dict[str, float]]:
    """Per scheme, its error over that of ``over``: geometric mean and worst case."""
    summaries = {}
    for name in records[0]["errors"]:
        quotients = [r["errors"][name]["plain"] / r["errors"][over]["plain"] for r in records]
        mean = float(np.exp(np.mean(np.log(quotients))))
        worst = max(quotients, key=lambda x: math.inf if math.isnan(x) else x)
        summaries[name] = {"geometric mean": mean, "worst": worst}
    return summaries


def worst_rows(heads: int = 4, seq: int = 1280) -> list[dict[str, Any]]:
    """The rows of the benchmark where plain float16 does worst: "case" and error by scheme."""
    cases = [Case("uniform", 20, 20), Case("uniform", 30, 20), Case("hybrid", 30, 20)]
    cases += [replace(case, value="zero mean") for case in cases[:2]]
    names = ("float32 scores", "unscaled", BASELINE, "paper 0.9845", "mean", "reference", "auto")
    records = evaluate(cases, "float16", heads=heads, seq=seq, names=names)
    return [
        {"case": r["case"], **{name: e["plain"] for name, e in r["errors"].items()}}
        for r in records
    ]


# The report.


def run(
    *, heads: int, seq: int, quick: bool, progress: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Every part of the benchmark: {"paper", "zero mean", "hard"} -> dtype -> records."""
    step = 5 if quick else 1
    parts: dict[str, Sequence[Case | HardCase]] = {
        "paper": list(grid())[::step],
        "zero mean": list(zero_mean_grid())[::step],
        "hard": list(HARD_CASES),
    }
    report: dict[str, Any] = {"seed": SEED, "heads": heads, "seq": seq}
    for part, cases in parts.items():
        report[part] = {
            dtype: evaluate(cases, dtype, heads=heads, seq=seq, progress=progress)
            for dtype in ("float16", "bfloat16")
        }
    report["ratios"] = {dtype: ratios(r) for dtype, r in report["zero mean"].items()}
    return report


def main(output: Path, heads: int = 8, seq: int = 1280, quick: bool = False) -> dict[str, Any]:
    """Runs the benchmark, prints its tables, and writes accuracy.json and accuracy.png.

    Arguments:
      output: folder for the two files, made if it is missing.
      heads, seq: shape of each case, [1, seq, heads, 128].
      quick: every fifth case.
    """
    console = Console(width=160)
    with Progress(console=console, transient=True) as bar:
        step = 5 if quick else 1
        total = 2 * (-(-32 // step) + -(-25 // step) + len(HARD_CASES))
        task = bar.add_task("accuracy", total=total)
        report = run(heads=heads, seq=seq, quick=quick, progress=lambda: bar.advance(task))
    for table in tables(report):
        console.print(table)
    output.mkdir(parents=True, exist_ok=True)
    (output / "accuracy.json").write_text(json.dumps(report, indent=1))
    plot(report, output / "accuracy.png")
    console.print(f"written: {output / 'accuracy.json'}, {output / 'accuracy.png'}")
    return report


def tables(report: dict[str, Any]) -> Iterator[Table]:
    """The tables of ``report``, for rich to print."""
    for part in ("paper", "zero mean", "hard"):
        for dtype, records in report[part].items():
            for kind in ("plain", "centred"):
                if kind == "centred" and part != "paper":
                    continue
                yield _error_table(f"{part}, {dtype}: {kind} relative RMSE", records, kind)
    for dtype, by_scheme in report["ratios"].items():
        yield _ratio_table(dtype, by_scheme)


def _error_table(title: str, records: list[Record], kind: str) -> Table:
    table = Table("scheme", title=title)
    for record in records:
        table.add_column(record["case"].replace(", ", "\n"), justify="right")
    for name in records[0]["errors"]:
        cells = []
        for record in records:
            error = record["errors"][name]
            lost = error["non_finite"]
            cells.append(f"[red]{lost:.0%} nan" if lost else f"{error[kind]:.1e}")
        table.add_row(name, *cells)
    return table


def _ratio_table(dtype: str, by_scheme: dict[str, dict[str, float]]) -> Table:
    table = Table("scheme", title=f"zero mean, {dtype}: error over that of {BASELINE!r}")
    for column in ("geometric mean", "worst"):
        table.add_column(column, justify="right")
    for name, ratio in by_scheme.items():
        table.add_row(name, f"{ratio['geometric mean']:.3g}", f"{ratio['worst']:.3g}")
    return table


def plot(report: dict[str, Any], path: Path) -> None:
    """Error against float64 of every scheme over the zero-mean cases, float16, as a picture."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    records = report["zero mean"]["float16"]
    shown = (
        "float32 scores",
        BASELINE,
        "paper 0.9845",
        "mean",
        "reference",
        "auto, rounded products",
    )
    figure, axis = plt.subplots(figsize=(11, 5), layout="constrained")
    for name in shown:
        axis.plot([r["errors"][name]["plain"] for r in records], marker="o", label=name)
    axis.set_yscale("log")
    axis.set_ylabel("relative RMSE against float64")
    axis.set_title("float16 attention on biased Q and K, V of mean zero: 25 cases")
    titles = [r["case"].removeprefix("uniform ").removesuffix(", zero mean") for r in records]
    axis.set_xticks(range(len(records)), titles, rotation=60, ha="right")
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
