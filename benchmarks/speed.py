"""CPU speed of `pasa_jax.dot_product_attention` beside jax.nn's and torch's.

    python benchmarks/speed.py --torch-python ~/envs/torch/bin/python --output out/speed.json
    python benchmarks/speed.py --quick

A shared machine drifts by a factor of two within minutes, so a time means little and a ratio of
times taken minutes apart means nothing. Every round here runs each contender once, in an order
that changes from round to round; what counts is the ratio of two medians over the same rounds.
The first round warms up and is left out of the medians. Prints numbers and asserts nothing.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import IO, Annotated, Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

import pasa_jax

Repetition = Callable[[], float]

WORKER = Path(__file__).with_name("torch_worker.py")
PAUSE = 0.01  # seconds between two repetitions, for the threads of the last one to fall asleep

AUTO, NONE, JAX_NN, TORCH = "ours auto", "ours none", "jax.nn", "torch"
RATIOS = {"ours/jax.nn": (AUTO, JAX_NN), "ours/torch": (AUTO, TORCH), "auto/none": (AUTO, NONE)}


# What is measured.


class DType(StrEnum):
    """The types of the inputs."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@dataclass(frozen=True)
class Case:
    """One self-attention; ``backward`` adds the gradients of sum(out · cotangent)."""

    seq: int
    dtype: str
    causal: bool
    backward: bool
    batch: int = 1
    heads: int = 8
    head_dim: int = 128

    def __str__(self) -> str:
        mask = "causal" if self.causal else "full"
        return f"{self.seq} {self.dtype} {mask} {'fwd+bwd' if self.backward else 'fwd'}"


@dataclass(frozen=True)
class Target:
    """The largest ratio aimed for in the cases that it names; None stands for any."""

    ratio: str
    limit: float
    dtypes: tuple[str, ...] = tuple(DType)
    seq: int | None = None
    causal: bool | None = None

    def covers(self, ratio: str, case: Case) -> bool:
        return (
            self.ratio == ratio
            and case.dtype in self.dtypes
            and self.seq in (None, case.seq)
            and self.causal in (None, case.causal)
        )


TARGETS = (
    Target("ours/jax.nn", 0.6, ("float32",), seq=2048, causal=False),
    Target("ours/jax.nn", 0.4, ("float32",), seq=2048, causal=True),
    Target("ours/jax.nn", 0.35, ("float32",), seq=4096, causal=True),
    Target("ours/torch", 1.7, ("float32", "float16")),
    Target("ours/torch", 3.5, ("bfloat16",)),
    Target("auto/none", 1.25),
)


def target_of(ratio: str, case: Case) -> float | None:
    """The limit of the first target that covers ``case``, if any does."""
    return next((t.limit for t in TARGETS if t.covers(ratio, case)), None)


@dataclass
class Result:
    """Seconds of one contender, the warm-up round first; or the first line of its error."""

    seconds: list[float]
    fails: str | None = None

    @property
    def median(self) -> float | None:
        """Median seconds without the warm-up; None of a contender that fails."""
        return statistics.median(self.seconds[1:]) if len(self.seconds) > 1 else None


@dataclass(frozen=True)
class Record:
    """What one case gave, by contender."""

    case: Case
    shift: str  # what "auto" stands for here
    results: dict[str, Result]

    def ratio(self, name: str) -> float | None:
        """Quotient of two medians; None unless both contenders ran."""
        ours, theirs = (self.results.get(c, Result([])).median for c in RATIOS[name])
        return None if ours is None or theirs is None else ours / theirs

    def as_json(self) -> dict[str, Any]:
        contenders = {
            name: {
                "median_ms": None if r.median is None else 1e3 * r.median,
                "warm_up_ms": [1e3 * x for x in r.seconds[:1]],
                "samples_ms": [1e3 * x for x in r.seconds[1:]],
                "fails": r.fails,
            }
            for name, r in self.results.items()
        }
        ratios = {
            name: {"value": self.ratio(name), "target": target_of(name, self.case)}
            for name in RATIOS
        }
        case = {**asdict(self.case), "shift": self.shift}
        return {"case": case, "contenders": contenders, "ratios": ratios}


# The contenders in JAX.


def attention(contender: str, causal: bool) -> Callable[..., Any]:
    """(q, k, v) -> out of one of the contenders that run here."""
    if contender == JAX_NN:
        return lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=causal)
    shift = contender.removeprefix("ours ")
    return lambda q, k, v: pasa_jax.dot_product_attention(q, k, v, is_causal=causal, shift=shift)


def inputs(case: Case) -> list[jax.Array]:
    """Query, key, value and cotangent, [B, S, H, D], standard normal."""
    shape = (case.batch, case.seq, case.heads, case.head_dim)
    random = np.random.default_rng(0)
    return [
        jnp.asarray(random.standard_normal(shape, np.float32), jnp.dtype(case.dtype))
        for _ in range(4)
    ]


def compiled(contender: str, case: Case, arrays: Sequence[jax.Array]) -> Repetition:
    """A compiled repetition that returns its seconds."""
    call = attention(contender, case.causal)

    def total(q: jax.Array, k: jax.Array, v: jax.Array, cotangent: jax.Array) -> jax.Array:
        return jnp.sum(call(q, k, v) * cotangent)

    def forward(q: jax.Array, k: jax.Array, v: jax.Array, cotangent: jax.Array) -> jax.Array:
        del cotangent
        return call(q, k, v)

    function = jax.grad(total, argnums=(0, 1, 2)) if case.backward else forward
    run = jax.jit(function).lower(*arrays).compile()

    def repetition() -> float:
        start = time.perf_counter()
        jax.block_until_ready(run(*arrays))
        return time.perf_counter() - start

    return repetition


# The contender in torch.


class TorchWorker:
    """A process in torch's own environment, asked over JSON lines (see `torch_worker.py`)."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._requests = cast(IO[str], process.stdin)
        self._answers = cast(IO[str], process.stdout)
        self.about = self.ask("hello")

    @staticmethod
    @contextmanager
    def started(python: Path, script: Path = WORKER) -> Iterator[TorchWorker]:
        """Runs ``script`` by the interpreter ``python`` until the block ends."""
        pipe = subprocess.PIPE
        command = [str(python), str(script)]
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
            yield TorchWorker(process)

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """The answer to one request.

        Raises:
          RuntimeError: the worker answered with an error, or has died.
        """
        self._requests.write(json.dumps({"op": op, **fields}) + "\n")
        self._requests.flush()
        line = self._answers.readline()
        answer = json.loads(line) if line else {"error": "the torch worker ended; see its stderr"}
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def prepared(self, case: Case) -> Repetition:
        """A repetition of ``case``, on inputs that the worker has made by now."""
        self.ask("case", **asdict(case))
        return lambda: self.ask("run")["seconds"]


# One case.


def measure(case: Case, rounds: int, torch: TorchWorker | None = None) -> Record:
    """Times every contender in ``rounds`` rounds, of which the first is the warm-up."""
    arrays = inputs(case)
    makers: dict[str, Callable[[], Repetition]] = {
        name: partial(compiled, name, case, arrays) for name in (AUTO, NONE, JAX_NN)
    }
    if torch is not None:
        makers[TORCH] = partial(torch.prepared, case)
    results = {name: Result([]) for name in makers}
    ready: dict[str, Repetition] = {}
    for name, make in makers.items():
        try:
            ready[name] = make()
        except Exception as error:  # jax.nn in float16
            if name in (AUTO, NONE):
                raise
            results[name].fails = next(iter(str(error).splitlines()), repr(error))
    for name, seconds in interleaved(ready, rounds):
        results[name].seconds.append(seconds)
    q, k, v, _ = arrays
    return Record(case, pasa_jax.explain(q, k, v, is_causal=case.causal).shift, results)


def interleaved(ready: dict[str, Repetition], rounds: int) -> Iterator[tuple[str, float]]:
    """Runs every contender once a round."""
    for r in range(rounds):
        for name in order_of(list(ready), r):
            time.sleep(PAUSE)
            yield name, ready[name]()


def order_of(names: Sequence[str], r: int) -> list[str]:
    """The order of round r: a Williams square, so that all follow each other equally often.

    In plain rotation a contender always runs behind the same other one, and whatever that one
    leaves behind (cold caches, released memory) would be charged to it in every round.
    """
    n = len(names)
    zigzag = [i // 2 + 1 if i % 2 else n - i // 2 for i in range(n)]  # 0, 1, −1, 2, −2, …
    turned = [names[(x + r) % n] for x in zigzag]
    return turned[::-1] if r // n % 2 else turned


# What is shown and kept.


def cpu_model() -> str:
    """The processor's name as Linux gives it, or else as Python does."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def environment(torch: TorchWorker | None) -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    packages = ("pasa-jax", "jax", "jaxlib", "numpy")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "platform": platform.platform(),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        "torch": None if torch is None else torch.about,
    }


def written(record: Record, contender: str) -> str:
    """A median in milliseconds, "fails", or a dash."""
    result = record.results.get(contender, Result([]))
    if result.fails is not None:
        return "[red]fails[/]"
    return "–" if result.median is None else f"{1e3 * result.median:.1f}"


def judged(record: Record, name: str) -> str:
    """A ratio and its target, green where it keeps it."""
    value, limit = record.ratio(name), target_of(name, record.case)
    if value is None:
        return "–"
    if limit is None:
        return f"{value:.2f}"
    return f"[{'green' if value <= limit else 'red'}]{value:.2f}[/] (≤ {limit:g})"


def table(records: Sequence[Record], title: str) -> Table:
    """One row a case: medians, ratios, targets."""
    result = Table(title=title)
    for column in ("seq", "dtype", "mask", "pass", "auto is"):
        result.add_column(column)
    for column in (*(f"{c} ms" for c in (AUTO, NONE, JAX_NN, TORCH)), *RATIOS):
        result.add_column(column, justify="right", no_wrap=True)
    for r in records:
        times = [written(r, contender) for contender in (AUTO, NONE, JAX_NN, TORCH)]
        ratios = [judged(r, name) for name in RATIOS]
        result.add_row(*str(r.case).split(), r.shift, *times, *ratios)
    return result


def show(console: Console, records: Sequence[Record], rounds: int) -> None:
    """One table for each pass, and below them the errors."""
    for backward in sorted({r.case.backward for r in records}):
        rows = [r for r in records if r.case.backward == backward]
        title = "forward and backward" if backward else "forward"
        console.print(table(rows, f"{title}: medians of {rounds - 1} interleaved rounds"))
    failures = {
        (name, r.case.dtype, result.fails)
        for r in records
        for name, result in r.results.items()
        if result.fails is not None
    }
    for name, dtype, message in sorted(failures):
        console.print(f"{name} fails in {dtype}: {message}", markup=False)


# The command line.


def spread(words: Sequence[str], options: Sequence[str]) -> list[str]:
    """``--seq 2048 4096`` as ``--seq 2048 --seq 4096``, which is what click understands."""
    result: list[str] = []
    option = None  # the one of ``options`` that the words now belong to
    for word in words:
        if word.startswith("-"):
            option = word if word in options else None
        elif option is not None and result[-1] != option:
            result.append(option)
        result.append(word)
    return result


def main(
    seq: Annotated[list[int] | None, typer.Option(help="Lengths; else 2048 4096.")] = None,
    dtype: Annotated[list[DType] | None, typer.Option(help="Types; else all.")] = None,
    rounds: Annotated[int | None, typer.Option(min=2, help="With the warm-up; else 9.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Length 512, 3 rounds.")] = False,
    torch_python: Annotated[
        Path | None, typer.Option(help="Interpreter that has torch.", exists=True, dir_okay=False)
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """CPU speed beside jax.nn and torch, as ratios of interleaved medians."""
    console = Console()
    if not console.is_terminal:
        console.width = 150
    lengths = seq or ([512] if quick else [2048, 4096])
    count = rounds or (3 if quick else 9)
    axes = product((False, True), lengths, dtype or DType, (False, True))
    cases = [Case(n, str(name), causal, backward) for backward, n, name, causal in axes]
    if torch_python is None:
        console.print("torch is left out: name its interpreter by --torch-python.")
        run(console, cases, count, None, output)
    else:
        with TorchWorker.started(torch_python) as torch:
            run(console, cases, count, torch, output)


def run(
    console: Console,
    cases: Sequence[Case],
    rounds: int,
    torch: TorchWorker | None,
    output: Path | None,
) -> None:
    """Measures the cases, keeps the records after each, and shows them at the end."""
    about = {**environment(torch), "rounds": rounds}
    records: list[Record] = []
    for i, case in enumerate(cases):
        with console.status(f"{i + 1}/{len(cases)}: {case}"):
            records.append(measure(case, rounds, torch))
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            report = {**about, "records": [r.as_json() for r in records]}
            output.write_text(json.dumps(report, indent=1) + "\n")
    show(console, records, rounds)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(main)
    app(args=spread(sys.argv[1:], ("--seq", "--dtype")))
