"""Compiles the Pallas kernels for real chips, on a machine that has none: `make test-aot`.

A row is one way of calling `pasa_jax.dot_product_attention`, a column a chip and a type. Fails
where a compiler refuses (too much on-chip memory among the reasons), where anything is computed in
float64 under x64, where more registers are spilt than is stated below, and where a GPU kernel does
not use the matrix instructions that it is for.
"""

from __future__ import annotations

import importlib.metadata
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pallas_kernels.aot import Compiler
from pallas_kernels.worker import COMPILED, Report
from pasa_jax import Schedule
from pasa_jax.core.target import find_target

# Spills that pass: on a TPU per instruction word of the kernel (whole tiles stream through the
# registers, to which VMEM is near), on a GPU bytes per thread.
TPU_SPILLS_PER_BUNDLE = 1.5
GPU_SPILL_BYTES = 256
GPU_GRADIENT_SPILL_BYTES = 512  # of a kernel of the backward pass, which holds two accumulators
_LENGTHS = {"query_seq_lengths": ((1,), "int32"), "key_value_seq_lengths": ((1,), "int32")}
CALLS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"is_causal": True},
    "bottom right, odd lengths": {
        "queries": 1000,
        "keys": 1500,
        "is_causal": True,
        "causal_alignment": "bottom_right",
    },
    "window": {"local_window_size": 100},
    "lengths": {"arrays": _LENGTHS},
    "segments": {"arrays": {"segment_ids": ((1, 1024), "int32")}},
    "bias": {"arrays": {"bias": ((1, 8, 1024, 1024), "float32")}},
    "bias, broadcast": {"arrays": {"bias": ((1, 8, 1, 1024), "float32")}},
    "bias of float16": {"arrays": {"bias": ((1, 8, 1024, 1024), "float16")}},
    "mask": {"arrays": {"mask": ((1, 1, 1024, 1024), "bool")}},
    "soft cap": {"logits_soft_cap": 30.0},
    "sinks": {"arrays": {"sinks": ((8,), "float32")}},
    # Whose queries are copied with strides: the estimator takes minutes, and gives 0.
    "8 query heads a key head": {
        "heads": 32,
        "kv_heads": 4,
        "is_causal": True,
        "estimates": False,
    },
    "decode": {"queries": 1, "keys": 4096, "heads": 32, "kv_heads": 8},
    "decode, a key head each": {"queries": 1, "keys": 4096},
    "short": {"queries": 5, "keys": 7},
    # Whose estimate takes ten minutes: keys come in chunks, and conditions are followed.
    "131072 keys": {"queries": 131072, "is_causal": True, "estimates": False},
    "log-sum-exp": {"return_residual": True, "repair": True},
    "gradient": {"gradient": True, "is_causal": True, "repair": True},
    "gradient, full": {"gradient": True},
    "gradient, causal": {"gradient": True, "is_causal": True},
    "gradient, window": {"gradient": True, "local_window_size": 100},
    "gradient, lengths": {"gradient": True, "arrays": _LENGTHS},
    "gradient, segments": {"gradient": True, "arrays": {"segment_ids": ((1, 1024), "int32")}},
    "gradient, mask": {"gradient": True, "arrays": {"mask": ((1, 1, 1024, 1024), "bool")}},
    "gradient, sinks": {"gradient": True, "arrays": {"sinks": ((8,), "float32")}},
    "gradient, bias": {"gradient": True, "arrays": {"bias": ((1, 8, 1024, 1024), "float32")}},
    "gradient, bias of keys": {"gradient": True, "arrays": {"bias": ((1, 8, 1, 1024), "float32")}},
    "gradient, bias of rows": {"gradient": True, "arrays": {"bias": ((1, 8, 1024, 1), "float32")}},
    "gradient, odd lengths": {
        "gradient": True,
        "queries": 1000,
        "keys": 1500,
        "is_causal": True,
        "causal_alignment": "bottom_right",
    },
    "gradient, 4 query heads a key head": {"gradient": True, "kv_heads": 2, "is_causal": True},
    "under x64": {"x64": True, "is_causal": True, "repair": True},
    "whole call, bias": {"arrays": {"bias": ((1, 8, 1024, 1024), "float32")}, "repair": True},
    **{f"head size {d}": {"head_dim": d, "is_causal": True} for d in (64, 80, 96, 192, 256)},
    **{f"shift {s}": {"shift": s} for s in ("none", "mean", "mean_past", "reference")},
    "int8 products": {"precision": "int8", "is_causal": True},
}
_HALF = {"scores": "float16", "probabilities": "float16", "products": "float16"}
_KERNELS: dict[str, Any] = {"gradient": True, "repair": False}
GPU_CALLS: dict[str, dict[str, Any]] = {
    "kernels of the gradient": _KERNELS,
    "kernels of the gradient, causal": {**_KERNELS, "is_causal": True},
    **{
        f"kernels of the gradient, {name}": {**_KERNELS, **CALLS[name]}
        for name in (
            "window",
            "lengths",
            "segments",
            "mask",
            "soft cap",
            "sinks",
            "8 query heads a key head",
            "head size 64",
            "shift mean",
        )
    },
    "float16 products, mean": {"precision": _HALF, "shift": "mean", "is_causal": True},
    "float16 products, auto": {"precision": _HALF},
    "float16 exponentials": {
        "precision": {"probabilities": "float16", "exponential": "float16"},
        "is_causal": True,
    },
}
TYPES = {"tpu": ("bfloat16", "float32", "float16"), "gpu": ("float16", "bfloat16")}
# These chips compile every call in every type. The others differ little from them: they compile
# the first type, and the calls that change the size or the arithmetic of a tile.
THOROUGH = ("tpu_v6e", "h100")
EVERYWHERE = (
    "full",
    "causal",
    "head size",
    "shift",
    "float16",
    "int8",
    "under x64",
    "gradient",
    "131072",
)
QUICK = ("causal", "head size 64", "shift mean")
# What must stand in the PTX of a call, by architecture's matrix instruction.
HALF_PRODUCTS = ("f16.f16.f16.f16", "m64n64k16.f16.f16.f16", "m64n128k16.f16.f16.f16", "kind::f16")


def compiled(compiler: Compiler, call: dict[str, Any], dtype: str, target: str) -> Report:
    """One cell of the matrix."""
    call = {"queries": 1024, "repair": False, **call}
    sizes = {
        "head_dim": call.get("head_dim", 128),
        "length": call.get("keys", call["queries"]),
        "is_causal": call.get("is_causal", False),
    }
    schedule = Schedule.for_target(target, dtype=dtype, **sizes)
    return compiler(
        "pallas_kernels.aot:attention", target, dtype=dtype, schedule=vars(schedule), **call
    )


def complaint(name: str, report: Report) -> str:
    """Why a cell fails, or ""."""
    if report.error:
        return report.error
    if report.float64 and name == "under x64":
        return "something is computed in float64"
    if find_target(report.target).kind == "tpu":
        bound = TPU_SPILLS_PER_BUNDLE * max(report.bundles, 1)
        return f"{report.spills} spills" if report.spills > bound else ""
    if name.startswith("float16 products"):
        counted = " ".join(report.instructions)
        if not any(x in counted for x in HALF_PRODUCTS):
            return f"no float16 accumulation among {counted}"
    if name == "int8 products" and ".s8.s8" not in " ".join(report.instructions):
        return "no product of integers of 8 bits"
    if name == "float16 exponentials" and "ex2.approx.f16x2" not in report.instructions:
        return "no exponential of two halves at once"
    bound = GPU_GRADIENT_SPILL_BYTES if "gradient" in name else GPU_SPILL_BYTES
    return f"{report.spills} bytes spilt" if report.spills > bound else ""


def cell(report: Report, why: str) -> str:
    if why:
        return "FAILED"
    if find_target(report.target).kind == "gpu":
        return "; ".join(
            f"{name.removeprefix('pasa_gpu').removeprefix('_') or 'forward'}: "
            f"{x['registers']} / {x['spills']} / {x['shared'] // 1024}"
            for name, x in sorted(report.kernels.items())
        ).removeprefix("forward: ")
    return f"{report.total_cycles or 'ok'}"


def main(
    target: Annotated[list[str] | None, typer.Option(help="Chips; default all.")] = None,
    call: Annotated[list[str] | None, typer.Option(help="Rows; default all.")] = None,
    quick: Annotated[bool, typer.Option(help="A few calls only.")] = False,
    everything: Annotated[bool, typer.Option(help="Every call and type on every chip.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write the figures there as JSON.")] = None,
) -> None:
    """Compiles every call for every chip and type, and prints what came of it."""
    console = Console(width=240)
    failures, records = [], []
    with Compiler(limit=900) as compiler:
        for kind in ("tpu", "gpu"):
            known = [t for t in COMPILED if find_target(t).kind == kind]
            columns = [
                (t, d)
                for t in known
                if target is None or t in target
                for d in (TYPES[kind] if t in THOROUGH or everything else TYPES[kind][:1])
            ]
            calls = {**CALLS, **(GPU_CALLS if kind == "gpu" else {})}
            table = Table("call", *(f"{t} {d}" for t, d in columns))
            for name, options in calls.items() if columns else ():
                if (quick and name not in QUICK) or (call is not None and name not in call):
                    continue
                cells = []
                for t, dtype in columns:
                    needed = everything or t in THOROUGH or name.startswith(EVERYWHERE)
                    if not needed or ("float16" in name and dtype != "float16"):
                        cells.append("")
                        continue
                    report = compiled(compiler, options, dtype, t)
                    why = complaint(name, report)
                    cells.append(cell(report, why))
                    records.append({"call": name, "dtype": dtype, **vars(report), "why": why})
                    if why:
                        failures.append(f"{name}, {dtype}, {t}: {why}")
                        console.print(failures[-1], style="red")
                table.add_row(name, *cells)
                console.print(f"{kind}: {name}: {cells}", style="dim", highlight=False)
            if columns:
                title = (
                    "estimated cycles" if kind == "tpu" else "registers / bytes spilt / KiB shared"
                )
                console.print(f"{kind}, {title}")
                console.print(table)
    versions = {
        name: importlib.metadata.version(name)
        for name in ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin")
    }
    console.print(f"{versions}: {len(failures)} of {len(records)} failed")
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        date = datetime.now(UTC).date().isoformat()
        output.write_text(
            json.dumps({"date": date, "versions": versions, "cells": records}, indent=1)
        )
    if failures:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
