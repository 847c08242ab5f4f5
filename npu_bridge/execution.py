"""Executes a program's loops, branches, calls and flags; what an instruction does is left open.

`npu_bridge.timing` gives instructions times, `npu_bridge.interpreter` their meaning.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import ChainMap, defaultdict
from collections.abc import Generator, Iterable, Sequence
from typing import Any

from npu_bridge.cores.context import Core
from npu_bridge.expressions import Expr, evaluate
from npu_bridge.ir import (
    Advance,
    Assign,
    Barrier,
    Call,
    CrossSet,
    CrossWait,
    For,
    Function,
    If,
    InitSocState,
    Instruction,
    Invalidate,
    Let,
    Node,
    SetFlag,
    SyncAll,
    WaitFlag,
)

Names = ChainMap[str, Any]  # the numbers in scope


class CoreRun(ABC):
    """One core on its way through its program.

    Arguments:
      members: the numbers that the core has from the start.
    """

    def __init__(self, core: Core, members: dict[str, Any]) -> None:
        self.core = core
        self.members: dict[str, Any] = {**members, **dict.fromkeys(core.counters, 0)}
        self.sets: dict[int, list[float]] = defaultdict(list)  # when cross-core flags were set
        self.heard: dict[int, int] = defaultdict(int)  # how many of the others' were waited for

    @abstractmethod
    def execute(self, node: Instruction, names: Names) -> None:
        """Executes an instruction."""

    # What flags, barriers and functions do: nothing, where pipes have no time.

    def set_flag(self, node: SetFlag, id: int) -> None:  # noqa: B027
        """Takes note of a flag between pipes."""

    def wait_flag(self, node: WaitFlag, id: int) -> None:  # noqa: B027
        """Waits for a flag between pipes."""

    def barrier(self, pipe: str) -> None:  # noqa: B027
        """Waits for a pipe."""

    def now_at(self, pipe: str) -> float:
        """When a pipe has done all so far."""
        return 0.0

    def hold(self, until: float) -> None:  # noqa: B027
        """Nothing of this core goes on before ``until``."""

    def turns(self, node: For, values: range) -> Iterable[int]:
        """The values of a loop's variable."""
        return values

    def enter(self, function: Function) -> None:  # noqa: B027
        """A function begins."""

    def leave(self) -> None:  # noqa: B027
        """The function ends."""

    def program(self) -> Generator[Node]:
        """Executes the whole program; yields where another core must be heard first."""
        return self._steps(self.core.body, ChainMap({}, self.members))

    def _steps(self, nodes: list[Node], names: Names) -> Generator[Node]:
        for node in nodes:
            match node:
                case Instruction():
                    self.execute(node, names)
                case InitSocState() | Invalidate():
                    pass
                case SetFlag():
                    self.set_flag(node, evaluate(node.id, names))
                case WaitFlag():
                    self.wait_flag(node, evaluate(node.id, names))
                case Barrier():
                    self.barrier(node.pipe)
                case CrossSet():
                    self.sets[node.flag].append(self.now_at(node.pipe))
                case CrossWait() | SyncAll():
                    yield node
                case Let():
                    names[node.name] = evaluate(node.value, names)
                case Advance():
                    self.members[node.name] += evaluate(node.by, names)
                case Assign():
                    self.members[node.name] = evaluate(node.value, names)
                case For():
                    inner = names.new_child()
                    bounds = (evaluate(x, names) for x in (node.lo, node.hi, node.step))
                    for value in self.turns(node, range(*bounds)):
                        inner[node.var] = value
                        yield from self._steps(node.body, inner)
                case If():
                    body = node.body if evaluate(node.condition, names) else node.otherwise
                    yield from self._steps(body, names.new_child())
                case Call():
                    yield from self._called(node.function, node.arguments, names)

    def _called(
        self, function: Function, arguments: Sequence[Expr], names: Names
    ) -> Generator[Node]:
        values = [evaluate(x, names) for x in arguments]
        self.enter(function)
        inner = dict(zip(function.parameters, values, strict=True))
        yield from self._steps(function.body, ChainMap(inner, self.members))
        self.leave()


class Block:
    """A cube core and its vector cores."""

    def __init__(self, cube: CoreRun, vectors: Sequence[CoreRun]) -> None:
        self.cube, self.vectors = cube, tuple(vectors)

    @property
    def runs(self) -> tuple[CoreRun, ...]:
        return (self.cube, *self.vectors)

    def hear(self, run: CoreRun, flag: int) -> bool:
        """Lets ``run`` go on if the flag that it waits for was set: a vector core hears the cube
        core, which hears all vector cores.
        """
        others = self.vectors if run is self.cube else (self.cube,)
        turn = run.heard[flag]
        if any(len(other.sets[flag]) <= turn for other in others):
            return False
        run.heard[flag] += 1
        run.hold(max(other.sets[flag][turn] for other in others))
        return True


def run_together(blocks: Sequence[Block]) -> None:
    """Runs all cores until each has ended.

    Raises:
      RuntimeError: they wait for one another.
    """
    cores = [(block, run) for block in blocks for run in block.runs]
    programs = [run.program() for _, run in cores]
    waiting: list[Node | None] = [next(p, None) for p in programs]
    while any(node is not None for node in waiting):
        moved = False
        if all(isinstance(node, SyncAll) for node in waiting):
            latest = max(run.now_at("all") for _, run in cores)
            for _, run in cores:
                run.hold(latest)
            waiting = [next(p, None) for p in programs]
            continue
        for i, ((block, run), node) in enumerate(zip(cores, waiting, strict=True)):
            if isinstance(node, CrossWait) and block.hear(run, node.flag):
                waiting[i] = next(programs[i], None)
                moved = True
        if not moved:
            raise RuntimeError(f"the cores wait for one another: {waiting}")
