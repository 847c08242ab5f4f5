"""What exponentials by a polynomial cost chips that are not here, beside their own exponentials.

    .venv-aot/bin/python benchmarks/exponentials.py

For TPUs the compiler's estimate of the kernel's cycles (see `tpu_cycles` for its limits), for GPUs
how often the instructions in question stand in the kernel's PTX: one loop body over the keys and
what comes before and after it. B = 1, 8 heads of 128 channels, bfloat16, scores in float32.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pallas_kernels.aot import Compiler
from pallas_kernels.worker import Report
from pasa_jax import Schedule
from pasa_jax.core.target import find_target

KINDS = (None, "cubic", "quadratic")
# A multiprocessor's results a clock, compute capability 8.0 to 12.0 (CUDA C++ Programming Guide,
# arithmetic instructions): of float32 additions and products, and of exponentials.
ADDITIONS, EXPONENTIALS = 128, 16


def compiled(
    compiler: Compiler, chip: str, kind: str | None, length: int, is_causal: bool
) -> Report:
    """The kernel with these exponentials; None: the chip's own."""
    sizes: dict[str, Any] = {"length": length, "is_causal": is_causal, "head_dim": 128}
    schedule = Schedule.for_target(chip, dtype="bfloat16", **sizes)
    on_tpu = find_target(chip).kind == "tpu"
    precision = {"probabilities": "bfloat16"} | ({} if kind is None else {"exponential": kind})
    return compiler(
        "pallas_kernels.aot:attention",
        chip,
        queries=length,
        is_causal=is_causal,
        schedule=vars(schedule),
        precision=precision,
        head_major=on_tpu,
        repair=False,
        shift="bound" if on_tpu else "auto",
    )


def arithmetic(report: Report) -> int:
    """Float32 instructions, of which a chip computes `ADDITIONS` a clock."""
    return sum(n for name, n in report.instructions.items() if not name.startswith(_OTHERS))


def exponentials(report: Report) -> int:
    return sum(n for name, n in report.instructions.items() if name.startswith("ex2"))


_OTHERS = ("wgmma", "mma", "tcgen05", "ex2", "cvt")


def main(
    tpu: Annotated[list[str], typer.Option(help="TPUs.")] = ["tpu_v5e", "tpu_v6e"],  # noqa: B006
    gpu: Annotated[list[str], typer.Option(help="GPUs.")] = ["h100"],  # noqa: B006
    length: Annotated[int, typer.Option(help="S = T.")] = 2048,
) -> None:
    """Prints two tables."""
    of_tpus = Table("chip", "mask", "exponentials", "cycles", "/ own", "bundles", title="TPUs")
    of_gpus = Table(
        *("chip", "mask", "exponentials", "ex2", "float32 arithmetic", "registers"),
        f"clocks of a multiprocessor: ex2 at {EXPONENTIALS}, arithmetic at {ADDITIONS}",
        title="instructions of GPUs",
    )
    with Compiler(limit=560) as compiler:
        for chip in (*tpu, *gpu):
            for is_causal in (True, False):
                own = 0
                for kind in KINDS:
                    report = compiled(compiler, chip, kind, length, is_causal)
                    named = chip, "causal" if is_causal else "full", kind or "its own"
                    print(*named, report.error, flush=True)
                    kernel = max(report.cycles.values(), default=0)
                    own = own or kernel
                    if chip in tpu:
                        ratio = f"{kernel / own:.2f}" if own else ""
                        of_tpus.add_row(*named, str(kernel), ratio, str(report.bundles))
                        continue
                    counts = exponentials(report), arithmetic(report)
                    clocks = counts[0] * 32 / EXPONENTIALS, counts[1] * 32 / ADDITIONS
                    of_gpus.add_row(
                        *named,
                        *map(str, counts),
                        str(report.registers),
                        f"{clocks[0]:.0f} + {clocks[1]:.0f}",
                    )
    console = Console(width=120)
    for table in (of_tpus, of_gpus):
        if table.row_count:
            console.print(table)


if __name__ == "__main__":
    typer.run(main)
