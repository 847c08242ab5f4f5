"""Cycles of the TPU kernel, as the TPU's compiler estimates them, beside jax's own kernels.

    make cycles
    python benchmarks/tpu_cycles.py --chip tpu_v6e --length 2048 --output out/tpu_cycles.json

No TPU is needed: libtpu compiles for chips that are not there and estimates each kernel's cycles,
the same from run to run. All sides are given B = 1, 8 heads, D = 128, bfloat16, laid out
[B, N, T, D] as jax's kernels take them (ours is then called between two transposes that XLA
cancels), and what is counted is the whole jitted call. Each side runs at its own best blocks.

Known limits of the estimate. It is the compiler's model, not a time. It follows loop bounds that
come from program ids; those that come from data it takes for none, so splash attention, whose mask
is such data, is far too low and shown for completeness only. It is optimistic about memory: beside
it stands the time that reading and writing the operands once takes at the chip's bandwidth, and
the larger of the two is what counts. Of ours, the walk that repairs a call whose result is not
finite is left out, since it does not run; the test for it is counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from rich.console import Console
from rich.table import Table

from pallas_kernels.aot import Compiler
from pallas_kernels.worker import Report
from pasa_jax import Schedule

HEADS, SIZE = 8, 128
# Clock and bandwidth of the chips: cycles a second, bytes a second (Google Cloud's documentation;
# the clock from the ideal cycles of a matrix product, see docs/tpu.md).
CHIPS = {"tpu_v5e": (1.5e9, 819e9), "tpu_v5p": (1.75e9, 2765e9), "tpu_v6e": (1.75e9, 1640e9)}
# The last takes the compiler minutes and 20 GB for 4096 keys.
BLOCKS = ((512, 512), (512, 1024), (1024, 512), (1024, 1024), (2048, 1024))
# Cycles over those of stock flash attention that were aimed for.
TARGETS = {
    ("ours, float32 scores", "tpu_v5e"): 0.82,
    ("ours, float32 scores", "tpu_v6e"): 0.82,
    ("ours, reference, bfloat16 scores", "tpu_v6e"): 0.72,
}


def flash(array: Any, *, length: int, causal: bool, block_q: int, block_kv: int) -> Any:
    """jax's stock TPU flash attention."""
    from jax.experimental.pallas.ops.tpu import flash_attention as stock

    sizes = stock.BlockSizes(block_q=block_q, block_k_major=block_kv, block_k=block_kv, block_b=1)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return stock.flash_attention(q, k, v, causal=causal, sm_scale=SIZE**-0.5, block_sizes=sizes)

    x = array((1, HEADS, length, SIZE), "bfloat16")
    return attend, (x, x, x)


def splash(array: Any, *, length: int, causal: bool, block_q: int, block_kv: int) -> Any:
    """jax's splash attention."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    shape = (length, length)
    mask = masks.CausalMask(shape) if causal else masks.FullMask(shape)
    call = kernel.make_splash_mha(
        masks.MultiHeadMask([mask] * HEADS),
        block_sizes=kernel.BlockSizes(
            block_q=block_q, block_kv=block_kv, block_kv_compute=block_kv
        ),
        head_shards=1,
        q_seq_shards=1,
    )

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        scaled = (q.astype(jnp.float32) * SIZE**-0.5).astype(q.dtype)
        return jax.vmap(call)(scaled, k, v)

    x = array((1, HEADS, length, SIZE), "bfloat16")
    return attend, (x, x, x)


@dataclass(frozen=True)
class Side:
    """One contender: how to compile it, and the blocks to choose from."""

    name: str
    function: str
    arguments: Callable[[str, int, bool], Iterator[dict[str, Any]]]


def _stock(chip: str, length: int, causal: bool) -> Iterator[dict[str, Any]]:
    del chip
    for block_q, block_kv in BLOCKS:
        if max(block_q, block_kv) <= length:
            yield {"length": length, "causal": causal, "block_q": block_q, "block_kv": block_kv}


def _ours(**options: Any) -> Callable[[str, int, bool], Iterator[dict[str, Any]]]:
    def arguments(chip: str, length: int, causal: bool) -> Iterator[dict[str, Any]]:
        tuned = Schedule.for_target(chip, dtype="bfloat16", length=length, is_causal=causal)
        fixed = {"queries": length, "is_causal": causal, "head_major": True, "repair": False}
        yield {"schedule": vars(tuned), **fixed, **options}

    return arguments


HERE = "tpu_cycles"
FLASH = "jax flash attention"
SIDES = (
    Side(FLASH, f"{HERE}:flash", _stock),
    Side("jax splash attention", f"{HERE}:splash", _stock),
    Side(
        "ours, float32 scores",
        "pallas_kernels.aot:attention",
        _ours(precision={"probabilities": "bfloat16"}),
    ),
    Side(
        "ours, reference, bfloat16 scores",
        "pallas_kernels.aot:attention",
        _ours(precision="bfloat16", shift="reference"),
    ),
    Side(
        "ours, mean, bfloat16 scores",
        "pallas_kernels.aot:attention",
        _ours(precision="bfloat16", shift="mean"),
    ),
)


def bandwidth_cycles(chip: str, length: int) -> int:
    """Cycles in which a chip reads queries, keys and values and writes the output, once."""
    clock, bandwidth = CHIPS[chip]
    return round(4 * HEADS * length * SIZE * 2 / bandwidth * clock)


def best(compiler: Compiler, side: Side, chip: str, length: int, causal: bool) -> Report | None:
    """The report of the side's cheapest blocks, or None where the compiler estimates none."""
    found = [compiler(side.function, chip, **x) for x in side.arguments(chip, length, causal)]
    return min((r for r in found if r.total_cycles), key=lambda r: r.total_cycles, default=None)


def main(
    chip: Annotated[list[str], typer.Option(help="Chips to compile for.")] = list(CHIPS),  # noqa: B006
    length: Annotated[list[int], typer.Option(help="S = T.")] = [2048, 4096],  # noqa: B006
    output: Annotated[Path | None, typer.Option(help="Also write every figure there.")] = None,
) -> None:
    """Prints the table of estimated cycles."""
    table = Table(
        "chip", "S", "mask", "kernel", "cycles", "/ flash", "target", "bandwidth", "bundles"
    )
    table.add_column("fills")
    table.add_column("spills")
    rows = []
    console = Console(width=160)
    with Compiler(limit=900) as compiler:
        for c in chip:
            for n in length:
                for causal in (False, True):
                    reports = {side.name: best(compiler, side, c, n, causal) for side in SIDES}
                    flash_report = reports[FLASH]
                    for name, report in reports.items():
                        row = {"chip": c, "length": n, "causal": causal, "kernel": name}
                        if report is None:
                            table.add_row(c, str(n), "causal" if causal else "full", name, "none")
                            continue
                        ratio = None
                        if flash_report is not None:
                            ratio = report.total_cycles / flash_report.total_cycles
                        target = TARGETS.get((name, c))
                        rows.append({**row, "ratio": ratio, "aim": target, **asdict(report)})
                        table.add_row(
                            c,
                            str(n),
                            "causal" if causal else "full",
                            name,
                            str(report.total_cycles),
                            "" if ratio is None else f"{ratio:.2f}",
                            "" if target is None else f"{target:.2f}",
                            str(bandwidth_cycles(c, n)),
                            *(str(x or "") for x in (report.bundles, report.fills, report.spills)),
                        )
                    console.print(f"{c} {n} {'causal' if causal else 'full'} done", style="dim")
    console.print(table)
    versions = {name: version(name) for name in ("jax", "jaxlib", "libtpu")}
    console.print(f"{versions}")
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        found = {"date": datetime.now(UTC).date().isoformat(), "versions": versions, "rows": rows}
        output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
