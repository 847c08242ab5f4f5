"""The fastest block of keys, predicted, and tables of predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from npu_bridge.functions import Functions
from npu_bridge.program import build
from npu_bridge.specification import Kernel
from npu_bridge.timing import Cost, cost
from pasa_jax.core.errors import PlanError
from pasa_jax.core.precision import Precision
from pasa_jax.core.schedule import Schedule


def tuned(kernel: Kernel, *, queries: int = 4096) -> Schedule:
    """The schedule whose predicted time is the least, of those that fit."""
    best: tuple[float, Schedule] | None = None
    failed: PlanError | None = None
    for block_kv in (1024, 768, 512, 384, 256, 128):
        schedule = replace(kernel.schedule, block_kv=block_kv)
        try:
            program = build(replace(kernel, schedule=schedule), careful=False)
        except PlanError as error:
            failed = error
            continue
        seconds = cost(program, queries=queries).seconds
        if best is None or seconds < best[0]:
            best = (seconds, schedule)
    if best is None:
        assert failed is not None
        raise failed
    return best[1]


def _plain(
    shift: str,
    precision: Precision,
    head_dim: int,
    is_causal: bool,
    dtype: str = "float16",
    functions: Functions | None = None,
) -> Kernel:
    """A kernel without further options; `tuned` chooses its block."""
    return Kernel(
        head_dim=head_dim,
        value_head_dim=head_dim,
        dtype=dtype,
        shift=shift,
        precision=precision,
        schedule=Schedule(block_q=128, block_kv=512, target="ascend_910b"),
        is_causal=is_causal,
        functions=functions,
    )


def tuned_table(date: str) -> dict[str, object]:
    """The table that `Schedule.for_target` reads: the fastest block of each head size, type and
    mask at 4096 keys, predicted.
    """
    entries = []
    for head_dim in (64, 128, 192, 256):
        for dtype in ("float16", "bfloat16"):
            for is_causal in (False, True):
                plain = Precision(scores=dtype, probabilities=dtype)
                precision = _TILES if dtype == "float16" else plain
                kernel = _plain("mean", precision, head_dim, is_causal, dtype)
                mask = "causal" if is_causal else "full"
                schedule = tuned(kernel)
                prediction = cost(build(replace(kernel, schedule=schedule), careful=False))
                entries.append(
                    {
                        "shape": f"{dtype}, D={head_dim}, S=4096, {mask}",
                        "length": 4096,
                        "head_dim": head_dim,
                        "dtype": dtype,
                        "is_causal": is_causal,
                        "cost": round(prediction.seconds * 1e6),
                        "schedule": vars(schedule),
                    }
                )
    return {
        "target": "ascend_910b",
        "cost": "microseconds of one forward pass, B = 1, 24 heads, predicted for 910B1",
        "date": date,
        "versions": {"msopmodeling (rates)": "1.0.9"},
        "schedules": entries,
    }


_TILES = Precision(scores="float16", probabilities="float16", exponential="float16")
_BOUND = Precision(scores="float16", probabilities="bfloat16")
NAMED = {
    "mean, float16 tiles": ("mean", _TILES),
    "none, float16 tiles": ("none", _TILES),
    "auto, float16 tiles": ("auto", _TILES),
    "mean": ("mean", Precision(scores="float16", probabilities="float16")),
    "reference, float16 tiles": ("reference", _TILES),
    "none": ("none", Precision(scores="float16", probabilities="float16")),
    "paper, all float16": ("paper", Precision.named("paper")),
    "paper, float32 statistics": ("paper", Precision(scores="float16", probabilities="float16")),
    "mean, float32 hand-over": ("mean", Precision(probabilities="float16")),
    "none, float32 hand-over": ("none", Precision(probabilities="float16")),
    "bound, bfloat16": ("bound", _BOUND),
    "mean, bfloat16, float16 scores": ("mean", _BOUND),
}


def table(
    queries: Sequence[int],
    *,
    heads: int = 24,
    head_dim: int = 128,
    is_causal: bool = False,
    functions: Functions | None = None,
) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: each of `NAMED` at its best block, beside the same with float32 hand-over
    (`paper`, which has none, beside `none`).

    Arguments:
      functions: that all kernels have; `bound`, which has none, is then left out.
    """
    columns = ["T = S", "kernel", "keys a tile", "microseconds", "TFLOP/s"]
    columns += ["faster than float32", "busiest pipe"]
    rows = []
    for length in queries:
        costs: dict[str, tuple[int, Cost]] = {}
        for name, (shift, precision) in NAMED.items():
            if shift == "bound" and functions is not None:
                continue
            dtype = precision.probabilities or "float16"
            kernel = _plain(shift, precision, head_dim, is_causal, dtype, functions)
            schedule = tuned(kernel, queries=length)
            program = build(replace(kernel, schedule=schedule), careful=False)
            costs[name] = (schedule.block_kv, cost(program, queries=length, heads=heads))
        for name, (block, c) in costs.items():
            same = "mean" if name.startswith("mean") else "none"  # paper's is none's
            slow = costs[f"{same}, float32 hand-over"][1].seconds
            pipe = max(c.busy, key=lambda x: c.busy[x])
            share = c.busy[pipe] / c.cycles
            time, rate = f"{c.seconds * 1e6:.0f}", f"{c.tflops:.0f}"
            faster, busiest = f"{slow / c.seconds:.2f}", f"{pipe} {share:.0%}"
            rows.append([str(length), name, str(block), time, rate, faster, busiest])
    return columns, rows
