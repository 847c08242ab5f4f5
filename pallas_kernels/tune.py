"""Finds the fastest schedules of a chip and writes them down, for `Schedule.for_target` to read.

On a machine that has the chip, by time; elsewhere, for TPUs, by the compiler's estimate of cycles.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import aot
from pasa_jax import Schedule, dot_product_attention
from pasa_jax.core.errors import ScheduleError, wrong
from pasa_jax.core.schedule import TUNED, Tuned
from pasa_jax.core.target import find_target, target_of_device

HEADS = 8
_BLOCKS = {
    "tpu": ((2048, 1024), (2048, 512), (1024, 1024), (1024, 512), (512, 1024), (512, 512)),
    "gpu": ((128, 128), (128, 64), (64, 128), (64, 64), (128, 32), (64, 32)),
}
# Those that tokamax found fastest on an H100 are among them: 128 × 128, 8 warps and 3 stages for
# D = 128, 64 × 128 with 4 warps and 3 stages for D = 64.
_WARPS = ((4, 2), (4, 3), (8, 2), (8, 3))  # and stages
_ROUNDS = 20
_SPELT_OUT = 8 * 1024 * 1024  # scores of the tiles of one step: more takes minutes to compile
_PROGRAM_ROWS = 2048  # of several query tiles


@dataclass(frozen=True)
class Shape:
    """A named problem: B = 1, 8 heads, S = T; a window is causal."""

    name: str
    length: int
    head_dim: int
    dtype: str
    is_causal: bool
    window: int | None = None

    @property
    def mask(self) -> dict[str, Any]:
        """Its keywords of the public function."""
        if self.window is None:
            return {"is_causal": self.is_causal}
        return {"is_causal": self.is_causal, "local_window_size": (self.window, 0)}


def shapes(kind: str) -> tuple[Shape, ...]:
    """The problems that a chip of ``kind`` is tuned for."""
    types = ("bfloat16", "float32") if kind == "tpu" else ("float16", "bfloat16")
    sizes = [(types[0], 128, n) for n in (1024, 2048, 4096)]
    sizes += [(types[0], 64, 2048), (types[1], 128, 2048)]
    plain = tuple(
        Shape(f"{dtype}, D={d}, S={n}, {'causal' if causal else 'full'}", n, d, dtype, causal)
        for dtype, d, n in sizes
        for causal in (False, True)
    )
    windows = (Shape(f"{types[0]}, D=128, S=8192, window 1024", 8192, 128, types[0], True, 1024),)
    return plain + windows if kind == "tpu" else plain


def candidates(target: str, shape: Shape) -> Iterator[Schedule]:
    """The schedules worth trying."""
    kind = find_target(target).kind
    if kind not in _BLOCKS:
        raise wrong("target", "be a TPU or a GPU", target)
    seen = set()
    for block_q, block_kv in _BLOCKS[kind]:
        one = Schedule(
            block_q=min(block_q, shape.length),
            block_kv=min(block_kv, shape.length),
            batch_heads=True,
            target=target,
        )
        if kind == "tpu":
            unroll = _SPELT_OUT // (one.block_q * one.block_kv)
            one = replace(one, unroll=max(1, min(unroll, shape.length // one.block_kv)))
            several = [one]
            tiles = min(_PROGRAM_ROWS, shape.length) // one.block_q
            if tiles > 1:
                several.append(replace(one, tiles_per_program=tiles))
        else:
            several = [replace(one, warps=warps, stages=stages) for warps, stages in _WARPS]
        for schedule in several:
            try:
                schedule.check(head_dim=shape.head_dim, dtype=shape.dtype)
            except ScheduleError:
                continue
            if schedule not in seen:
                seen.add(schedule)
                yield schedule


class Estimate:
    """The cost of a schedule by the TPU compiler: cycles."""

    unit = "cycles"

    def __init__(self, target: str) -> None:
        if find_target(target).topology is None:
            raise wrong("target", "be a TPU, or the chip of this machine", target)
        self.target = target
        self.source = f"estimated by libtpu {importlib.metadata.version('libtpu')}"
        self._compiler = aot.Compiler()

    def __call__(self, shape: Shape, schedule: Schedule) -> float:
        report = self._compiler(
            "pallas_kernels.aot:attention",
            self.target,
            queries=shape.length,
            head_dim=shape.head_dim,
            dtype=shape.dtype,
            schedule=vars(schedule),
            head_major=True,
            repair=False,
            **shape.mask,
        )
        return report.total_cycles or math.inf

    def close(self) -> None:
        self._compiler.__exit__()


class Time:
    """The cost of a schedule by the clock: microseconds, the median of many calls."""

    unit = "microseconds"

    def __init__(self, target: str) -> None:
        self.target = target
        self.source = f"measured on {jax.devices()[0].device_kind}"

    def __call__(self, shape: Shape, schedule: Schedule) -> float:
        kind = find_target(self.target).kind
        x = jax.random.normal(jax.random.key(0), (1, shape.length, HEADS, shape.head_dim))
        x = x.astype(jnp.dtype(shape.dtype))

        def forward(x: jax.Array) -> jax.Array:
            return dot_product_attention(
                x,
                x,
                x,
                schedule=schedule,
                implementation=f"pallas_{kind}",
                **shape.mask,
            )

        call = jax.jit(forward)
        try:
            call(x).block_until_ready()
        except jax.errors.JaxRuntimeError:  # more shared memory or registers than there are
            return math.inf
        seconds = []
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            call(x).block_until_ready()
            seconds.append(time.perf_counter() - start)
        return 1e6 * statistics.median(seconds)

    def close(self) -> None:
        pass


def meter(target: str) -> Estimate | Time:
    """The clock if this machine has the chip, else the compiler's estimate."""
    here = jax.devices()[0]
    if target_of_device(here.platform, here.device_kind).name == target:
        return Time(target)
    return Estimate(target)


def tune(target: str, output: Path = TUNED, only: str = "", say: Any = print) -> Path:
    """Measures every candidate for every shape and writes ``output``/<target>.json.

    Arguments:
      target: name of a chip.
      only: a part of the names of the shapes to measure; others keep what the file has.
      say: called with a line per candidate.

    Raises:
      ValueError: the chip is not a TPU and this machine does not have it.
    """
    cost = meter(target)
    path = output / f"{target}.json"
    known = (
        {x["shape"]: x for x in json.loads(path.read_text())["schedules"]} if path.exists() else {}
    )
    for shape in shapes(find_target(target).kind):
        if only not in shape.name:
            continue
        costs = {}
        for schedule in candidates(target, shape):
            costs[schedule] = cost(shape, schedule)
            say(f"{shape.name}: {schedule}: {costs[schedule]:.0f} {cost.unit}")
        best = min(costs, key=lambda schedule: costs[schedule])
        if math.isinf(costs[best]):
            say(f"{shape.name}: no schedule compiles")
            continue
        tuned = Tuned(
            shape=shape.name,
            length=shape.length,
            head_dim=shape.head_dim,
            dtype=shape.dtype,
            is_causal=shape.is_causal,
            cost=round(costs[best]),
            schedule=vars(best),
            window=shape.window,
        )
        known[shape.name] = vars(tuned)
    cost.close()
    table = {
        "target": target,
        "cost": f"{cost.unit} of one forward pass, B = 1, {HEADS} heads, {cost.source}",
        "date": datetime.date.today().isoformat(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
        "schedules": list(known.values()),
    }
    output.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n")
    return path
