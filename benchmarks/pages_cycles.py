"""A step of decoding over pages on TPUs that are not there, against the time to read its pages.

    python benchmarks/pages_cycles.py --chip tpu_v6e --output out/pages_cycles.json
    python benchmarks/pages_cycles.py --format int8

16 sequences of 8192 tokens with one query each, 8 key heads, D = E = 128, bfloat16, or, with
``--format``, 8 bits with what they are multiplied by (the scales and means of pages). The limit is
the time in which a core reads the pages at its share of the chip's bandwidth, in cycles; both of
what the compiler says should be below it:

- its estimate of the kernel's cycles. It knows no conditions from data: here tiles, lengths and
  pages come from program ids. (On v5e, v5p and 7x the estimator of libtpu 0.0.42 dies of the
  kernel; the column is empty.)
- bundles: the instruction words of the whole kernel but its body for partly seen tiles, times the
  steps. A step executes fewer: it does not begin and finish its query tile.

It is the compiler's model, not a time. For a GPU it says registers and bytes spilt.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import jax
import jax.numpy as jnp
import typer
from rich.console import Console
from rich.table import Table

from pallas_kernels import _tpu_pages_program as program
from pallas_kernels import gpu_pages, tpu_pages
from pallas_kernels._pages import Numbers, Sight
from pallas_kernels.aot import Compiler, MakeArray
from pallas_kernels.worker import Report
from pasa_jax import Schedule
from pasa_jax.call import checks
from pasa_jax.core.packed import FORMATS, PackedPages, Store, empty_store
from pasa_jax.core.plan import Plan
from pasa_jax.core.target import find_target
from pasa_jax.implementations.page_walk import Call, Queries, Sequences

SEQUENCES, KV_HEADS, SIZE, LENGTH, DTYPE = 16, 8, 128, 8192, "bfloat16"
# Cycles a second, bytes a second of one core (tpu_cycles.CHIPS; v5p and 7x have two cores; the
# clock of 7x is that at which it would have its peak with v6e's products a cycle).
CORES = {
    "tpu_v5e": (1.5e9, 819e9),
    "tpu_v5p": (1.75e9, 2765e9 / 2),
    "tpu_v6e": (1.75e9, 1640e9),
    "tpu_7x": (2.2e9, 7400e9 / 2),
}
GROUPS, PAGES = (1, 4, 8, 16), (64, 128)


@dataclass(frozen=True)
class Step:
    """A step of decoding.

    Arguments:
      groups: query heads of a key head.
      page: tokens of a page.
      format: a name of `FORMATS`, or None: keys and values in their own type.
    """

    chip: str
    groups: int
    page: int
    format: str | None = None

    @property
    def blocks(self) -> int:
        """Pages of a sequence."""
        return LENGTH // self.page

    def plan(self) -> Plan:
        schedule = Schedule.for_target(
            self.chip, head_dim=SIZE, dtype=DTYPE, length=LENGTH, is_causal=True
        )
        precision = checks.precision(None, DTYPE, "auto", self.chip)
        plan = Plan(shift="auto", precision=precision, schedule=schedule, scale=SIZE**-0.5)
        return self.module.adapt(plan)

    def call(self, array: Callable[[Any, str], Any]) -> Call:
        """The call, of arrays that ``array`` makes."""
        pages = self.pages()
        query = array((SEQUENCES, KV_HEADS * self.groups, SIZE), DTYPE)
        column = array((SEQUENCES,), "int32")
        return Call(
            pages=jax.tree.map(lambda x: array(x.shape, str(x.dtype)), pages),
            queries=Queries(query, None, array((), "float32")),
            sequences=Sequences(
                *[column] * 3, table=array((SEQUENCES, self.blocks), "int32"), row=column
            ),
            most=1,
            window=None,
        )

    def pages(self) -> Store:
        """Shapes and types of the pages, one row for each sequence."""
        sizes = (self.plan().schedule.block_kv, KV_HEADS, self.page, SIZE, SIZE, DTYPE)
        count = SEQUENCES * self.blocks
        return jax.eval_shape(lambda: empty_store(count, SEQUENCES, *sizes, self.format))

    @property
    def bytes(self) -> int:
        """What a step must read: keys and values, and of 8 bits their scales and means."""
        pages = self.pages()
        names = ["key", "value"]
        if isinstance(pages, PackedPages):
            names += ["key_scale", "key_mean", "value_scale"]
        return sum(x.size * x.dtype.itemsize for x in (getattr(pages, name) for name in names))

    @property
    def module(self) -> Any:
        return tpu_pages if find_target(self.chip).kind == "tpu" else gpu_pages

    def specs(self) -> program.Specs:
        call, plan = self.call(lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype)), self.plan()
        few, *_ = tpu_pages._tile_sizes(call, plan)
        return program.Specs.of(call, plan, few)

    @property
    def limit(self) -> int:
        """Cycles in which a core reads the pages."""
        clock, bandwidth = CORES[self.chip]
        return round(self.bytes / bandwidth * clock)

    def bundles(self, report: Report) -> int:
        """Instruction words that all steps execute, at most."""
        return report.bundles * SEQUENCES * self.specs().steps


def decode(
    array: MakeArray, *, chip: str, groups: int, page: int, format: str | None
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The kernel's step, and its arguments."""
    step = Step(chip, groups, page, format)
    call, plan = step.call(array), step.plan()

    def function(*arrays: Any) -> Any:
        with ExitStack() as stack:
            if step.module is tpu_pages:
                _know_everything(step, stack)
            return step.module.kernel(call.beside(*arrays), plan)

    return function, call.arrays


def _know_everything(step: Step, stack: ExitStack) -> None:
    """Puts program ids in the place of what a TPU kernel reads in SMEM."""
    specs, over = step.specs(), program.over_heads

    def numbers_at(ref: Any, i: jax.Array) -> Numbers:
        of_tile = (1, LENGTH, 0, 0, 0, specs.steps, specs.steps, 0, step.blocks)
        return Numbers(i, i, Sight(*map(jnp.int32, of_tile)))

    def page_at(shown: Any, specs: Any, i: jax.Array, t: jax.Array, place: int) -> jax.Array:
        return (i * specs.steps + t) * specs.pages + place

    def over_heads(specs: Any, body: Any) -> None:
        if not (isinstance(body, partial) and body.args == (True,)):  # of partly seen tiles
            over(specs, body)

    known: dict[str, Any] = {
        "tpu_pages.grid_of": lambda *_: (SEQUENCES, specs.steps),
        "tpu_pages.page_at": page_at,
        "tpu_pages.numbers_at": numbers_at,
        "_tpu_pages_program.numbers_at": numbers_at,
        "_tpu_pages_program.over_heads": over_heads,
    }
    for name, function in known.items():
        stack.enter_context(mock.patch(f"pallas_kernels.{name}", function))


def row(step: Step, report: Report) -> dict[str, Any]:
    """The figures of one step."""
    figures: dict[str, Any] = {**vars(step), "error": report.error}
    if step.module is gpu_pages:
        return {**figures, "registers": report.registers, "spills": report.spills}
    cycles = sum(n for name, n in report.cycles.items() if name.startswith("pasa_tpu"))
    figures |= {"estimate": cycles or None, "bundles": step.bundles(report), "limit": step.limit}
    return {**figures, "ratio": max(cycles, figures["bundles"] * (not cycles)) / step.limit}


def main(
    chip: Annotated[list[str], typer.Option(help="Chips to compile for.")] = [*CORES, "h100"],  # noqa: B006
    groups: Annotated[list[int], typer.Option(help="Query heads a key head.")] = list(GROUPS),  # noqa: B006
    page: Annotated[list[int], typer.Option(help="Tokens of a page.")] = list(PAGES),  # noqa: B006
    format: Annotated[str | None, typer.Option(help=f"One of {', '.join(FORMATS)}.")] = None,
    output: Annotated[Path | None, typer.Option(help="Also write every figure there.")] = None,
) -> None:
    """Prints what the compilers say of each step."""
    columns = ("chip", "page", "heads a key head", "estimate", "bundles", "limit", "ratio")
    table, rows = Table(*columns, "registers", "spills", "error"), []
    with Compiler() as compiler:
        for step in (Step(c, g, p, format) for c in chip for p in page for g in groups):
            estimates = step.chip == "tpu_v6e"
            report = compiler("pages_cycles:decode", step.chip, estimates=estimates, **vars(step))
            rows.append(row(step, report))
            ratio = rows[-1].get("ratio")
            found = {**rows[-1], "ratio": ratio and f"{ratio:.2f}"}
            names = ("chip", "page", "groups", *columns[3:], "registers", "spills", "error")
            table.add_row(*(str(found.get(name) or "") for name in names))
    Console(width=140).print(table)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    typer.run(main)
