"""How long a kernel takes, predicted: its program is executed on a model of the pipes.

Every instruction occupies its pipe for as long as its work takes at the pipe's rate; flags,
barriers and cross-core flags make pipes wait for one another as they do on the chip. Nothing else
is known here: no cache (everything passes at the speed of L2, where queries, keys and the workspace
stay), no contention between cores, no scalar unit. One block (a cube core and two vector cores) is
followed through some of its items; the others do the same work at the same time.

Rates: the configuration of Huawei's own performance model for 910B1 (PyPI msopmodeling 1.0.9,
core/config/arc_config/910B1: bandwidths per core, vector cycles per repeat), 16 × 16 × 16
multiplications per cycle of the cube unit (AscendC documentation).
"""

from __future__ import annotations

import re
from collections import ChainMap, defaultdict, deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from npu_bridge.ir import (
    Advance,
    Barrier,
    Call,
    CrossSet,
    CrossWait,
    For,
    If,
    Instruction,
    Let,
    Node,
    SetFlag,
    SyncAll,
    WaitFlag,
    evaluate,
)
from npu_bridge.program import Core, Program, build
from npu_bridge.stages import Kernel
from pasa_jax.core.precision import Precision
from pasa_jax.core.schedule import Schedule

_PIPES = ("S", "V", "M", "MTE1", "MTE2", "MTE3", "FIX")


@dataclass(frozen=True)
class Rates:
    """What one core does in a cycle.

    Arguments:
      clock: cycles a second.
      blocks: cube cores of the chip.
      multiply: multiplications of float16 and bfloat16.
      to_l1, to_ub, from_ub, fixpipe: bytes from L2 to L1, from L2 to UB and back, from L0C to L2.
      to_l0a, to_l0b: bytes from L1.
      head: cycles before a vector instruction's first repeat, or a product.
      drain: cycles that a barrier of the vector pipe costs.
      copy_head: cycles before a copy's first byte.
    """

    clock: float = 1.85e9
    blocks: int = 24
    multiply: float = 16**3
    to_l1: float = 221 / 1.85
    to_ub: float = 137 / 1.85
    from_ub: float = 93 / 1.85
    fixpipe: float = 70 / 1.85
    to_l0a: float = 441 / 1.85
    to_l0b: float = 220.5 / 1.85
    head: float = 14
    drain: float = 18
    copy_head: float = 30


# Cycles per repeat of 256 bytes where they are not 1.
_CYCLES = {
    "Exp": {"half": 4, "float": 2},
    "Div": {"half": 4, "float": 2},
    "Ln": {"half": 4, "float": 2},
    "Sqrt": {"half": 2, "float": 2},
    "Select": {"half": 2, "float": 2},
    "Compare": {"half": 2, "float": 2},
    "CompareScalar": {"half": 2, "float": 2},
    "WholeReduceMax": {"half": 7, "float": 7},
    "WholeReduceMin": {"half": 7, "float": 7},
    "WholeReduceSum": {"half": 7, "float": 7},
}


@dataclass
class Timeline:
    """What a pipe did: (start, end, name of the function) of each stretch."""

    stretches: dict[str, list[tuple[float, float, str]]] = field(
        default_factory=lambda: defaultdict(list)
    )


@dataclass(frozen=True)
class Cost:
    """A prediction.

    Arguments:
      cycles: until the last core is done.
      busy: cycles per pipe, as "AIC M" and so on, of one block.
      seconds, tflops: of the whole chip; operations counted as 4·B·N·T·S·(D + E)/2 (half of it
        where the mask is causal).
      timeline: what each pipe did.
    """

    cycles: float
    busy: dict[str, float]
    seconds: float
    tflops: float
    timeline: Timeline = field(repr=False, default_factory=Timeline)


class _CoreRun:
    """One core on its way through its program: the times of its pipes and flags."""

    def __init__(
        self, core: Core, name: str, numbers: dict[str, Any], rates: Rates, items: range
    ) -> None:
        self.core, self.name, self.rates, self.items = core, name, rates, items
        self.members: dict[str, Any] = {**numbers, **dict.fromkeys(core.counters, 0)}
        self.now: dict[str, float] = dict.fromkeys(_PIPES, 0.0)
        self.busy: dict[str, float] = defaultdict(float)
        self.events: dict[tuple[str, str, int], deque[float]] = defaultdict(deque)
        self.sets: dict[int, deque[float]] = defaultdict(deque)  # cross-core, seen by the others
        self.timeline = Timeline()
        self.part = "Run"

    def steps(self, nodes: list[Node], env: ChainMap[str, Any]) -> Generator[Node]:
        """Executes ``nodes``; yields where another core must be heard first."""
        for node in nodes:
            match node:
                case Instruction():
                    self._execute(node, env)
                case SetFlag():
                    key = (node.source, node.to, evaluate(node.id, env))
                    self.events[key].append(self.now[node.source])
                case WaitFlag():
                    key = (node.source, node.to, evaluate(node.id, env))
                    self.now[node.to] = max(self.now[node.to], self.events[key].popleft())
                case Barrier():
                    self._barrier(node.pipe)
                case CrossSet():
                    self.sets[node.flag].append(self.now[node.pipe])
                case CrossWait() | SyncAll():
                    yield node
                case Let():
                    env[node.name] = evaluate(node.value, env)
                case Advance():
                    self.members[node.name] += evaluate(node.by, env)
                case For():
                    inner = env.new_child()
                    values = range(*(evaluate(x, env) for x in (node.lo, node.hi, node.step)))
                    for value in self.items if node.var == "item" else values:
                        inner[node.var] = value
                        yield from self.steps(node.body, inner)
                case If():
                    body = node.body if evaluate(node.condition, env) else node.otherwise
                    yield from self.steps(body, env.new_child())
                case Call():
                    f = node.function
                    values = [evaluate(x, env) for x in node.arguments]
                    outer, self.part = self.part, f.name
                    arguments = dict(zip(f.parameters, values, strict=True))
                    yield from self.steps(f.body, ChainMap(arguments, self.members))
                    self.part = outer

    def _execute(self, node: Instruction, env: ChainMap[str, Any]) -> None:
        cycles = _cycles(node, evaluate(node.work, env), self.rates)
        start = self.now[node.pipe]
        self.now[node.pipe] = start + cycles
        self.busy[node.pipe] += cycles
        rows = self.timeline.stretches[f"{self.name} {node.pipe}"]
        if rows and rows[-1][2] == self.part and start - rows[-1][1] < 1:
            rows[-1] = (rows[-1][0], start + cycles, self.part)
        else:
            rows.append((start, start + cycles, self.part))

    def _barrier(self, pipe: str) -> None:
        if pipe == "ALL":
            self.hold(max(self.now.values()))
        elif pipe == "V":
            self.now["V"] += self.rates.drain

    def hold(self, until: float) -> None:
        """Nothing of this core goes on before ``until``."""
        self.now = {pipe: max(t, until) for pipe, t in self.now.items()}


def _cycles(node: Instruction, work: float, r: Rates) -> float:
    name = re.match(r"\w+", node.text)
    assert name is not None
    match node.pipe:
        case "V":
            dtype = "half" if "half" in str(node.writes[0].buffer.dtype) else "float"
            each = _CYCLES.get(name[0], {}).get(dtype, 1)
            return r.head + -(-work // 256) * each
        case "M":
            return r.head + work / r.multiply
        case "MTE1":
            rate = r.to_l0a if node.writes[0].buffer.memory == "L0A" else r.to_l0b
            return work / rate
        case "MTE2":
            l1 = node.writes[0].buffer.memory == "L1"
            return r.copy_head + work / (r.to_l1 if l1 else r.to_ub)
        case "MTE3":
            return r.copy_head + work / r.from_ub
        case "FIX":
            return r.copy_head + work / r.fixpipe
    return 1.0


class _Lengths:
    """Stands for the array of lengths: every entry is as long as it may be."""

    def __init__(self, keys: int) -> None:
        self.keys = keys

    def GetValue(self, entry: int) -> int:
        return self.keys


def cost(
    program: Program,
    *,
    batch: int = 1,
    heads: int = 24,
    kv_heads: int | None = None,
    queries: int = 4096,
    keys: int | None = None,
    rates: Rates | None = None,
    items: int | None = 4,
) -> Cost:
    """The predicted time of a call.

    Arguments:
      items: how many query tiles of a core are followed at most (2 or more), evenly spread; beyond
        them the time goes on as it went in the second half of them. None: all.
    """
    rates = rates or Rates()
    keys = queries if keys is None else keys
    kv_heads = heads if kv_heads is None else kv_heads
    k = program.kernel
    numbers = _numbers(program, rates.blocks, batch, heads, kv_heads, queries, keys)
    rounds = -(-batch * numbers["heads"] * numbers["queryTiles"] * numbers["parts"] // rates.blocks)
    followed = rounds if items is None else min(rounds, items)
    cycles, runs = _block(program, rates, numbers, followed)
    busy = _busy(runs)
    if followed < rounds:  # as in the second half of what was followed
        half = max(1, followed // 2)
        before, others = _block(program, rates, numbers, half)
        times = (rounds - followed) / (followed - half)
        cycles += times * (cycles - before)
        less = _busy(others)
        busy = {pipe: t + times * (t - less[pipe]) for pipe, t in busy.items()}
    timeline = Timeline()
    for run in runs:
        timeline.stretches |= run.timeline.stretches
    seconds = cycles / rates.clock
    operations = 2.0 * batch * heads * queries * keys * (k.head_dim + k.value_head_dim)
    if k.is_causal:
        operations /= 2
    return Cost(cycles, busy, seconds, operations / seconds / 1e12, timeline)


def _numbers(
    program: Program, blocks: int, batch: int, heads: int, kv_heads: int, queries: int, keys: int
) -> dict[str, Any]:
    """The numbers of a call as the kernel's `Problem` holds them (templates/kernel.cpp.j2)."""
    k, s = program.kernel, program.kernel.schedule
    key_blocks, parts, of_mask = -(-keys // s.block_kv), 1, queries
    if k.decode:
        parts = min(key_blocks, -(-blocks // (batch * kv_heads)))
        heads, queries = kv_heads, heads // kv_heads
    return {
        "batch": batch,
        "heads": heads,
        "kvHeads": kv_heads,
        "groups": heads // kv_heads,
        "queryLength": queries,
        "keyLength": keys,
        "queryTiles": -(-queries // s.block_q),
        "keyBlocks": key_blocks,
        "parts": parts,
        "queries": of_mask,
        "rowStride": 1 if k.decode else heads,
        "headStride": queries if k.decode else 1,
        "scale": k.head_dim**-0.5,
        "lengths": _Lengths(keys),
    }


def _busy(runs: list[_CoreRun]) -> dict[str, float]:
    """Cycles per pipe of the cube core and of one vector core."""
    return {f"{r.core.kind} {pipe}": t for r in runs[:2] for pipe, t in r.busy.items()}


def _block(
    program: Program, rates: Rates, numbers: dict[str, Any], rounds: int
) -> tuple[float, list[_CoreRun]]:
    """Follows one block through ``rounds`` items, spread over the tiles, of which a causal mask
    leaves more and more to do.
    """
    blocks, tiles = rates.blocks, numbers["queryTiles"]
    stride = max(1, tiles // rounds)
    total = numbers["batch"] * numbers["heads"] * tiles * numbers["parts"]
    items = range(stride // 2, min(total, stride * rounds), stride)
    numbers = {**numbers, "cores": blocks, "items": total, "core": 0}
    cube = _CoreRun(program.cube, "AIC", numbers, rates, items)
    half = program.kernel.schedule.block_q // 2
    vectors = [
        _CoreRun(
            program.vector,
            f"AIV{i}",
            {**numbers, "vectorCore": i, "vectorCores": 2 * blocks, "firstRow": i * half},
            rates,
            items,
        )
        for i in range(2)
    ]
    runs = [cube, *vectors]
    _together(runs)
    return max(max(run.now.values()) for run in runs), runs


def _together(runs: list[_CoreRun]) -> None:
    """Runs the cores of a block until all have ended."""
    cube, *vectors = runs
    programs = [run.steps(run.core.body, ChainMap({}, run.members)) for run in runs]
    waiting: list[Node | None] = [next(p, None) for p in programs]
    while any(w is not None for w in waiting):
        moved = False
        if all(isinstance(w, SyncAll) for w in waiting):
            latest = max(max(run.now.values()) for run in runs)
            for run in runs:
                run.hold(latest)
            waiting = [next(p, None) for p in programs]
            continue
        for i, (run, node) in enumerate(zip(runs, waiting, strict=True)):
            if not isinstance(node, CrossWait):
                continue
            until = _heard(run, node.flag, cube, vectors)
            if until is not None:
                run.hold(until)
                waiting[i] = next(programs[i], None)
                moved = True
        if not moved:
            raise RuntimeError(f"the cores wait for one another: {waiting}")


def _heard(run: _CoreRun, flag: int, cube: _CoreRun, vectors: list[_CoreRun]) -> float | None:
    """When the flag that ``run`` waits for was set; None: not yet. A vector core hears the cube
    core, which hears both vector cores.
    """
    if run is cube:
        if not all(v.sets[flag] for v in vectors):
            return None
        return max(v.sets[flag].popleft() for v in vectors)
    heard = cube.sets[flag]
    index = run.members.setdefault(f"heard{flag}", 0)
    if index >= len(heard):
        return None
    run.members[f"heard{flag}"] += 1
    return heard[index]


def tuned(kernel: Kernel, *, queries: int = 4096) -> Schedule:
    """The schedule whose predicted time is the least, of those that fit."""
    from pasa_jax.core.errors import PlanError

    best: tuple[float, Schedule] | None = None
    failed: PlanError | None = None
    for block_kv in (512, 384, 256, 128):
        schedule = replace(kernel.schedule, block_kv=block_kv)
        try:
            program = build(replace(kernel, schedule=schedule))
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
    shift: str, precision: Precision, head_dim: int, is_causal: bool, dtype: str = "float16"
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
                found = cost(build(replace(kernel, schedule=schedule)))
                entries.append(
                    {
                        "shape": f"{dtype}, D={head_dim}, S=4096, {mask}",
                        "length": 4096,
                        "head_dim": head_dim,
                        "dtype": dtype,
                        "is_causal": is_causal,
                        "cost": round(found.seconds * 1e6),
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
NAMED = {
    "mean, float16 tiles": ("mean", _TILES),
    "none, float16 tiles": ("none", _TILES),
    "mean": ("mean", Precision(scores="float16", probabilities="float16")),
    "reference, float16 tiles": ("reference", _TILES),
    "none": ("none", Precision(scores="float16", probabilities="float16")),
    "paper, all float16": ("paper", Precision.named("paper")),
    "paper, float32 statistics": ("paper", Precision(scores="float16", probabilities="float16")),
    "mean, float32 hand-over": ("mean", Precision(probabilities="float16")),
    "none, float32 hand-over": ("none", Precision(probabilities="float16")),
}


def table(
    queries: Sequence[int], *, heads: int = 24, head_dim: int = 128, is_causal: bool = False
) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: each of `NAMED` at its best block, beside the same with float32 hand-over
    (`paper`, which has none, beside `none`).
    """
    columns = ["T = S", "kernel", "keys a tile", "microseconds", "TFLOP/s"]
    columns += ["faster than float32", "busiest pipe"]
    rows = []
    for length in queries:
        found: dict[str, tuple[int, Cost]] = {}
        for name, (shift, precision) in NAMED.items():
            kernel = _plain(shift, precision, head_dim, is_causal)
            schedule = tuned(kernel, queries=length)
            program = build(replace(kernel, schedule=schedule))
            found[name] = (schedule.block_kv, cost(program, queries=length, heads=heads))
        for name, (block, c) in found.items():
            same = "mean" if name.startswith("mean") else "none"  # paper's is none's
            slow = found[f"{same}, float32 hand-over"][1].seconds
            pipe = max(c.busy, key=lambda x: c.busy[x])
            share = c.busy[pipe] / c.cycles
            time, rate = f"{c.seconds * 1e6:.0f}", f"{c.tflops:.0f}"
            faster, busiest = f"{slow / c.seconds:.2f}", f"{pipe} {share:.0%}"
            rows.append([str(length), name, str(block), time, rate, faster, busiest])
    return columns, rows
