"""Cycles of the TPU kernel by the TPU compiler's estimate, beside other kernels at their best.

    make cycles
    python benchmarks/tpu_cycles.py --chip tpu_v6e --case "2048 causal" --output out/tpu_cycles.json

No TPU is needed: libtpu compiles for chips that are not there and estimates each kernel's cycles,
the same from run to run. The peers are jax's stock flash attention, jax's splash attention and
tokamax's (`tpu_peers`), each at the best of the block sizes listed here, tokamax's with and without
the scheduler that it may ask for. B = 1, 8 query heads, bfloat16. Operands and output lie
[B, N, T, D], as the peers take them; in the cases "from [B, T, N, D]" they lie as `jax.nn` has
them, and every side pays for its transposes. Counted is the whole jitted call, and beside it the
kernel alone (splash multiplies the queries by 1/√D outside of it).

Known limits of the estimate. It is the compiler's model, not a time; where times were published, a
real chip took about 1.3 times as long (docs/tpu.md). It follows conditions that come from program
ids, and takes those that come from data for false; the peers' are rewritten for it. A loop that is
not unrolled is counted once; a call that holds one has no figure here, nor has one of whose kernel
it gives 0: where several query heads share a key head, a block of our queries is copied with
strides, and that is such a kernel. To follow the conditions of splash's windows and gradients takes
minutes and more than 10 GB. It is optimistic about
memory: beside it stands the time that reading and writing the operands once takes at the chip's
bandwidth, and the larger of the two is what counts. Of ours, the walk that repairs a call whose
result is not finite is left out, since it does not run; the test for it is counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pallas_kernels.aot import Compiler
from pallas_kernels.worker import Report
from pasa_jax import Schedule

HEADS = 8
# Clock and bandwidth of the chips: cycles a second, bytes a second (Google Cloud's documentation;
# the clock from the ideal cycles of a matrix product, see docs/tpu.md).
CHIPS = {"tpu_v5e": (1.5e9, 819e9), "tpu_v5p": (1.75e9, 2765e9), "tpu_v6e": (1.75e9, 1640e9)}


@dataclass(frozen=True)
class Case:
    """One call.

    Arguments:
      length: T = S.
      window: keys that a query sees before its own.
      kv_heads, size: K and D.
      gradient: the cotangents of queries, keys and values, the forward pass included.
      head_major: whether operands lie [B, N, T, D], else [B, T, N, D].
    """

    length: int
    causal: bool
    window: int | None = None
    kv_heads: int = HEADS
    size: int = 128
    gradient: bool = False
    head_major: bool = True

    @property
    def name(self) -> str:
        parts = [str(self.length), "causal" if self.causal else "full"]
        parts += [f"window {self.window}"] if self.window is not None else []
        parts += [f"{HEADS}:{self.kv_heads}"] if self.kv_heads != HEADS else []
        parts += [f"D = {self.size}"] if self.size != 128 else []
        parts += ["gradient"] if self.gradient else []
        parts += [] if self.head_major else ["from [B, T, N, D]"]
        return " ".join(parts)

    def bandwidth_cycles(self, chip: str) -> int:
        """Cycles in which a chip reads queries, keys and values and writes the output, once."""
        clock, bandwidth = CHIPS[chip]
        heads = 2 * HEADS + 2 * self.kv_heads
        return round(heads * self.length * self.size * 2 / bandwidth * clock)


CASES = (
    Case(2048, False),
    Case(2048, True),
    Case(4096, False),
    Case(4096, True),
    Case(8192, True),
    Case(8192, True, window=1024),
    Case(2048, True, kv_heads=1),
    Case(2048, True, size=64),
    Case(2048, True, head_major=False),
    Case(2048, True, gradient=True),
    Case(4096, True, gradient=True),
)

# Blocks of queries, of keys in memory, of keys in one step.
FLASH_BLOCKS = (
    (512, 512, 512),
    (1024, 1024, 512),
    (1024, 1024, 1024),
    (1024, 2048, 1024),
    (2048, 2048, 1024),
    (2048, 4096, 1024),
)
SPLASH_BLOCKS = (
    (512, 512, 512),
    (512, 1024, 512),
    (1024, 1024, 512),
    (1024, 1024, 1024),
    (1024, 2048, 1024),
)
SPLASH_GRADIENT_BLOCKS = ((512, 512, 512), (1024, 1024, 512))
TOKAMAX_BLOCKS = ((512, 1024, 512), (1024, 1024, 512), (1024, 2048, 512), (1024, 1024, 1024))

# Cycles over those of stock flash attention that were aimed for, D = 128 and [B, N, T, D].
TARGETS = {
    ("tpu_v6e", "2048 full"): 0.64,
    ("tpu_v6e", "2048 causal"): 0.56,
    ("tpu_v6e", "4096 full"): 0.64,
    ("tpu_v5e", "2048 full"): 0.87,
    ("tpu_v5e", "2048 causal"): 0.66,
}

Arguments = Iterator[dict[str, Any]]


@dataclass(frozen=True)
class Side:
    """One contender: how to compile it, and the arguments to choose the best of."""

    name: str
    function: str
    arguments: Callable[[str, Case], Arguments]


def _peer(case: Case, blocks: tuple[tuple[int, int, int], ...], **options: Any) -> Arguments:
    fields = asdict(case)
    for sizes in blocks:
        if max(sizes) <= case.length:
            yield {**fields, "blocks": sizes, **options}


def _flash(chip: str, case: Case) -> Arguments:
    if case.window is None and case.kv_heads == HEADS:
        yield from _peer(case, FLASH_BLOCKS)


def _splash(chip: str, case: Case) -> Arguments:
    yield from _peer(case, SPLASH_GRADIENT_BLOCKS if case.gradient else SPLASH_BLOCKS)


def _tokamax(chip: str, case: Case) -> Arguments:
    if not case.gradient:
        for lp_scheduler in (False, True):
            yield from _peer(case, TOKAMAX_BLOCKS, lp_scheduler=lp_scheduler)


def _ours(**options: Any) -> Callable[[str, Case], Arguments]:
    def arguments(chip: str, case: Case) -> Arguments:
        tuned = Schedule.for_target(
            chip,
            head_dim=case.size,
            dtype="bfloat16",
            length=case.length,
            is_causal=case.causal,
            window=case.window,
        )
        window = {} if case.window is None else {"local_window_size": [case.window, 0]}
        yield {
            "schedule": vars(tuned),
            "queries": case.length,
            "kv_heads": case.kv_heads,
            "head_dim": case.size,
            "is_causal": case.causal,
            "head_major": case.head_major,
            "gradient": case.gradient,
            "repair": False,
            **window,
            **options,
        }

    return arguments


def _in_8_bits(chip: str, case: Case) -> Arguments:
    """Products of 8 bits, with the tiles that are tuned for bfloat16 and with others."""
    for call in _ours(precision="int8")(chip, case):
        yield call
        others = {"block_q": 512, "tiles_per_program": 4, "block_kv": 1024}
        yield call | {"schedule": call["schedule"] | others}


FLASH = "jax flash attention"
OURS = "pallas_kernels.aot:attention"
SIDES = (
    Side(FLASH, "tpu_peers:flash", _flash),
    Side("jax splash attention", "tpu_peers:splash", _splash),
    Side("tokamax splash attention", "tpu_peers:tokamax", _tokamax),
    Side("ours, auto", OURS, _ours()),
    Side("ours, float32 scores", OURS, _ours(precision={"probabilities": "bfloat16"})),
    Side(
        "ours, reference, bfloat16 scores",
        OURS,
        _ours(precision="bfloat16", shift="reference"),
    ),
    Side("ours, mean, bfloat16 scores", OURS, _ours(precision="bfloat16", shift="mean")),
    Side("ours, products of 8 bits", OURS, _in_8_bits),
)


@dataclass(frozen=True)
class Best:
    """The report of a side's cheapest arguments.

    Arguments:
      errors: what the compiler said of the others that it refused.
    """

    report: Report
    arguments: dict[str, Any]
    errors: tuple[str, ...]

    @property
    def kernel(self) -> int:
        """Cycles of the Pallas kernels alone."""
        kernels = ("flash_attention", "splash", "pasa_tpu")
        return sum(n for name, n in self.report.cycles.items() if name.startswith(kernels))

    @property
    def blocks(self) -> str:
        sizes = self.arguments.get("blocks")
        if sizes is None:
            schedule = self.arguments["schedule"]
            return "{tiles_per_program} x {block_q}, {block_kv}".format(**schedule)
        scheduler = ", LP" if self.arguments.get("lp_scheduler") else ""
        return ", ".join(map(str, sizes)) + scheduler


def best(compiler: Compiler, side: Side, chip: str, case: Case) -> Best | None:
    """The side's cheapest arguments, or None where the compiler estimates none."""
    tried = [(compiler(side.function, chip, **x), x) for x in side.arguments(chip, case)]
    errors = tuple(report.error for report, _ in tried if report.error)
    counted = [x for x in tried if x[0].cycles and all(x[0].cycles.values())]
    if not counted:
        return None
    report, arguments = min(counted, key=lambda x: x[0].total_cycles)
    return Best(report, arguments, errors)


def main(
    chip: Annotated[list[str], typer.Option(help="Chips to compile for.")] = list(CHIPS),  # noqa: B006
    case: Annotated[
        list[str],
        typer.Option(help="Names of the cases to compile, as the table has them."),
    ] = [x.name for x in CASES],  # noqa: B006
    side: Annotated[
        list[str],
        typer.Option(help="Names of the kernels to compile; the peers take minutes each."),
    ] = [x.name for x in SIDES],  # noqa: B006
    output: Annotated[Path | None, typer.Option(help="Also write every figure there.")] = None,
) -> None:
    """Prints the table of estimated cycles."""
    columns = ("chip", "case", "kernel", "blocks", "cycles", "kernel alone", "/ flash", "/ best")
    table = Table(*columns, "target", "bandwidth", "bundles", "fills", "spills")
    rows = []
    console = Console(width=180)
    cases = [x for x in CASES if x.name in case]
    with Compiler(limit=900) as compiler:
        for c in chip:
            for x in cases:
                found = {s.name: best(compiler, s, c, x) for s in SIDES if s.name in side}
                rows += _rows(c, x, found)
                console.print(f"{c} {x.name} done", style="dim")
    for row in rows:
        table.add_row(*("" if row[k] is None else _text(row[k]) for k in _SHOWN))
    console.print(table)
    versions = {name: version(name) for name in ("jax", "jaxlib", "libtpu", "tokamax")}
    console.print(f"{versions}")
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        figures = {"date": datetime.now(UTC).date().isoformat(), "versions": versions, "rows": rows}
        output.write_text(json.dumps(figures, indent=1) + "\n")


_SHOWN = (
    *("chip", "case", "side", "blocks", "cycles", "kernel", "of_flash", "of_best", "target"),
    *("bandwidth", "bundles", "fills", "spills"),
)


def _text(x: Any) -> str:
    return f"{x:.2f}" if isinstance(x, float) else str(x)


def _rows(chip: str, case: Case, found: dict[str, Best | None]) -> list[dict[str, Any]]:
    """A row for each side that has a figure, with its ratios to the peers."""
    cycles = {name: x.report.total_cycles for name, x in found.items() if x is not None}
    peers = [n for name, n in cycles.items() if not name.startswith("ours")]
    rows = []
    for name, x in found.items():
        if x is None:
            continue
        report = x.report
        rows.append(
            {
                "chip": chip,
                "case": case.name,
                "side": name,
                "blocks": x.blocks,
                "cycles": report.total_cycles,
                "kernel": x.kernel,
                "of_flash": cycles[name] / cycles[FLASH] if FLASH in cycles else None,
                "of_best": cycles[name] / min(peers) if peers else None,
                "target": TARGETS.get((chip, case.name)) if name == "ours, auto" else None,
                "bandwidth": case.bandwidth_cycles(chip),
                "bundles": report.bundles or None,
                "fills": report.fills or None,
                "spills": report.spills or None,
                "parts": report.cycles,
                "refused": x.errors,
            }
        )
    return rows


if __name__ == "__main__":
    typer.run(main)
