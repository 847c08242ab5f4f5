"""How long a kernel takes, predicted: its program is executed on a model of the pipes.

Every instruction occupies its pipe for as long as its work takes at the pipe's rate; flags,
barriers and cross-core flags make pipes wait for one another as they do on the chip. Nothing else
is known here: no cache (everything passes at the speed of L2, where queries, keys and the workspace
stay), no contention between cores, no scalar unit. One block (a cube core and two vector cores) is
followed through some of its items; the others do the same work at the same time.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from npu_bridge.cores.context import Core
from npu_bridge.execution import Block, CoreRun, Names, run_together
from npu_bridge.expressions import evaluate
from npu_bridge.ir import For, Function, Instruction, SetFlag, WaitFlag
from npu_bridge.layout import VECTOR_CORES
from npu_bridge.numbers import tiling, values_of
from npu_bridge.program import Program
from npu_bridge.rates import Rates

_PIPES = ("S", "V", "M", "MTE1", "MTE2", "MTE3", "FIX")


@dataclass
class Timeline:
    """What each pipe did: (start, end, name of the function) of each stretch."""

    stretches: dict[str, list[tuple[float, float, str]]] = field(
        default_factory=lambda: defaultdict(list)
    )

    def add(self, pipe: str, start: float, end: float, part: str) -> None:
        """Adds a stretch, to the last one if it follows that without a pause."""
        rows = self.stretches[pipe]
        if rows and rows[-1][2] == part and start - rows[-1][1] < 1:
            rows[-1] = (rows[-1][0], end, part)
        else:
            rows.append((start, end, part))


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


class _TimedRun(CoreRun):
    """A core's pipes and their times.

    Arguments:
      items: that are followed.
    """

    def __init__(
        self, core: Core, name: str, members: dict[str, Any], rates: Rates, items: range
    ) -> None:
        super().__init__(core, members)
        self.name, self.rates, self.items = name, rates, items
        self.now: dict[str, float] = dict.fromkeys(_PIPES, 0.0)
        self.busy: dict[str, float] = defaultdict(float)
        self.events: dict[tuple[str, str, int], deque[float]] = defaultdict(deque)
        self.timeline = Timeline()
        self.parts = ["Run"]  # the functions that are being executed

    def execute(self, node: Instruction, names: Names) -> None:
        pipe = node.pipe
        cycles = node.cycles(evaluate(node.work, names), self.rates)
        start = self.now[pipe]
        self.now[pipe] = start + cycles
        self.busy[pipe] += cycles
        self.timeline.add(f"{self.name} {pipe}", start, start + cycles, self.parts[-1])

    def set_flag(self, node: SetFlag, id: int) -> None:
        self.events[node.source, node.to, id].append(self.now[node.source])

    def wait_flag(self, node: WaitFlag, id: int) -> None:
        event = self.events[node.source, node.to, id].popleft()
        if node.to == "S":  # which issues all that follows
            self.hold(event)
        self.now[node.to] = max(self.now[node.to], event)

    def barrier(self, pipe: str) -> None:
        if pipe == "ALL":
            self.hold(self.now_at("all"))
        elif pipe == "V":
            self.now["V"] += self.rates.drain
            self.busy["V"] += self.rates.drain

    def now_at(self, pipe: str) -> float:
        return self.now[pipe] if pipe in self.now else max(self.now.values())

    def hold(self, until: float) -> None:
        self.now = {pipe: max(t, until) for pipe, t in self.now.items()}

    def turns(self, node: For, values: range) -> Iterable[int]:
        return self.items if node.var == "item" else values

    def enter(self, function: Function) -> None:
        self.parts.append(function.name)

    def leave(self) -> None:
        self.parts.pop()


class _Number:
    """Stands for an array that the scalar unit reads: numbers ``step`` apart."""

    def __init__(self, number: int, step: int = 0) -> None:
        self.number, self.step = number, step

    def GetValue(self, index: int) -> int:
        return self.number + index * self.step


class _Lists:
    """Stands for the lists of a block mask: each query tile visits ``share`` of the key tiles, of
    which it sees all but the last one whole.
    """

    def __init__(self, tiles: int, share: float) -> None:
        self.tiles, self.count = tiles, max(1, round(share * tiles))

    def GetValue(self, index: int) -> int:
        at = index % (self.tiles + 1)
        return self.count if at == 0 else 2 * (at - 1) + (at < self.count)


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
    visited: float = 1.0,
) -> Cost:
    """The predicted time of a call.

    Arguments:
      items: how many query tiles of a core are followed at most (2 or more), evenly spread; beyond
        them the time goes on as it went in the second half of them. None: all.
      visited: of a kernel with a block mask, the share of the key tiles that a query tile visits.
    """
    rates = rates or Rates()
    keys = queries if keys is None else keys
    kv_heads = heads if kv_heads is None else kv_heads
    k = program.kernel
    together = batch if k.packed else 1  # sequences, all of one length
    given = tiling(
        k, batch=batch, heads=heads, kv_heads=kv_heads, queries=queries * together,
        keys=keys * together,
        cores=rates.blocks,
    )  # fmt: skip
    # Every entry is as long as it may be; other numbers do not change the time.
    read = {name: _Number(keys if name == "lengths" else 0) for name in program.globals}
    read |= {"queryOffsets": _Number(0, queries), "keyOffsets": _Number(0, keys)}
    lists = _Lists(-(-keys // k.schedule.block_kv), visited)
    numbers = {**values_of(k, given), **read, "visits": lists}
    tiles, there = numbers["queryTiles"], numbers["items"]
    if k.packed and items is not None:
        # Those of the first sequence, which come first: the others are as long. Behind each may be
        # an item without queries, which takes no time.
        tiles = -(-queries // k.schedule.block_q)
        there, items = batch * heads * tiles, min(items, tiles)
    rounds = -(-there // rates.blocks)
    followed = rounds if items is None else min(rounds, items)
    cycles, block = _followed(program, rates, numbers, tiles, followed)
    busy = _busy(block)
    if followed < rounds:  # as in the second half of what was followed
        half = max(1, followed // 2)
        before, other = _followed(program, rates, numbers, tiles, half)
        times = (rounds - followed) / (followed - half)
        cycles += times * (cycles - before)
        less = _busy(other)
        busy = {pipe: t + times * (t - less[pipe]) for pipe, t in busy.items()}
    timeline = Timeline()
    for run in block:
        timeline.stretches |= run.timeline.stretches
    seconds = cycles / rates.clock
    operations = 2.0 * batch * heads * queries * keys * (k.head_dim + k.value_head_dim)
    if k.is_causal:
        operations /= 2
    return Cost(cycles, busy, seconds, operations / seconds / 1e12, timeline)


def _busy(block: list[_TimedRun]) -> dict[str, float]:
    """Cycles per pipe of the cube core and of one vector core."""
    return {f"{r.core.kind} {pipe}": t for r in block[:2] for pipe, t in r.busy.items()}


def _followed(
    program: Program, rates: Rates, numbers: dict[str, Any], tiles: int, rounds: int
) -> tuple[float, list[_TimedRun]]:
    """Follows one block through ``rounds`` items, spread over the ``tiles`` of an entry, of which a
    causal mask leaves more and more to do: cycles, and the cube core and its vector cores.
    """
    stride = max(1, tiles // rounds)
    items = range(stride // 2, min(numbers["items"], stride * rounds), stride)
    numbers = {**numbers, "core": 0}
    half = program.kernel.schedule.block_q // VECTOR_CORES
    cube = _TimedRun(program.cube, "AIC", numbers, rates, items)
    vectors = [
        _TimedRun(
            program.vector,
            f"AIV{i}",
            {
                **numbers,
                "vectorCore": i,
                "vectorCores": VECTOR_CORES * rates.blocks,
                "cores": items.step,  # from one followed item to the next
                "items": items.stop,
                "firstRow": i * half,
            },
            rates,
            items,
        )
        for i in range(VECTOR_CORES)
    ]
    run_together([Block(cube, vectors)])
    block = [cube, *vectors]
    return max(run.now_at("all") for run in block), block
