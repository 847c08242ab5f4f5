"""A kernel as a program: instructions, and the loops, branches, flags and functions around them.

`Instruction` is what all instructions have in common; they are in `npu_bridge.instructions`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np

from npu_bridge.dtypes import BLOCK, ITEMSIZE
from npu_bridge.expressions import Expr, Scalar, plus, times
from npu_bridge.facts import FACTS
from npu_bridge.rates import Rates
from pasa_jax.core.errors import LoweringError


@dataclass(eq=False)
class Buffer:
    """Memory of one kind: on the chip at a byte address, which `npu_bridge.memory` fills in, or in
    global memory (GM).

    Arguments:
      memory: "UB", "L1", "L0A", "L0B", "L0C" or "GM".
      count: elements of ``dtype`` (the C++ type); of GM buffers unknown here, 0.
      slots: how many copies of ``count`` lie behind one another, for double buffering.
      note: what it holds, for the buffer map.
      alias: memory of another buffer that this one is a name for.
    """

    name: str
    memory: str
    dtype: str
    count: int
    slots: int = 1
    note: str = ""
    address: int | None = None
    alias: Slice | None = None

    @property
    def bytes(self) -> int:
        return -(-self.count * self.slots * ITEMSIZE[self.dtype] // BLOCK) * BLOCK

    def at(self, offset: Expr = 0, count: Expr | None = None) -> Slice:
        return Slice(self, offset, self.count if count is None else count)

    def slot(self, slot: Expr) -> Slice:
        return Slice(self, times(slot, self.count), self.count)


@dataclass(frozen=True)
class Slice:
    """``count`` elements of a buffer from element ``offset`` on.

    Arguments:
      read_as: another C++ type of the same size or less as which the bytes are read.
    """

    buffer: Buffer
    offset: Expr
    count: Expr
    read_as: str | None = None

    @property
    def dtype(self) -> str:
        return self.read_as or self.buffer.dtype

    def __str__(self) -> str:
        name = self.buffer.name
        if self.read_as is not None:
            name = f"{name}.ReinterpretCast<{self.read_as}>()"
        return name if self.offset == 0 else f"{name}[{self.offset}]"

    def at(self, offset: Expr, count: Expr | None = None) -> Slice:
        count = self.count if count is None else count
        return Slice(self.buffer, plus(self.offset, offset), count, self.read_as)

    def of_type(self, dtype: str) -> Slice:
        """The same bytes, read as ``dtype``."""
        assert self.offset == 0
        assert isinstance(self.count, int)
        return Slice(self.buffer, 0, self.count * ITEMSIZE[self.dtype] // ITEMSIZE[dtype], dtype)


class Machine(Protocol):
    """What executes instructions: memories, and the numbers of the moment."""

    def array(self, place: Slice) -> np.ndarray:
        """The elements from a slice's first to its buffer's last, to be read and written."""
        ...

    def number(self, x: Expr | Scalar) -> Any:
        """The value of a number."""
        ...


class Instruction(ABC):
    """One call of the AscendC API: text, pipe, memory, time and meaning."""

    in_place: ClassVar[bool] = False  # may write where it reads: number by number, the same place
    sources: ClassVar[tuple[str, ...]] = ()  # the fields that it reads: slices, or single numbers
    to: Slice  # what it writes

    @property
    @abstractmethod
    def text(self) -> str:
        """The C++ call, without semicolon."""

    @property
    @abstractmethod
    def pipe(self) -> str:
        """Which pipe executes it: "S", "V", "M", "MTE1", "MTE2", "MTE3" or "FIX"."""

    @property
    def writes(self) -> tuple[Slice, ...]:
        return (self.to,)

    @property
    def reads(self) -> tuple[Slice, ...]:
        operands = (getattr(self, name) for name in self.sources)
        return tuple(x for x in operands if isinstance(x, Slice))

    @property
    @abstractmethod
    def work(self) -> Expr:
        """In the unit in which its pipe is slow: bytes moved, bytes of vectors, multiplications."""

    @abstractmethod
    def cycles(self, work: float, rates: Rates) -> float:
        """How long it occupies its pipe.

        Arguments:
          work: the value of ``self.work``.
        """

    @abstractmethod
    def run(self, machine: Machine) -> None:
        """What it does, in NumPy."""


@dataclass(eq=False)
class InitSocState:
    """Sets the core's registers to what a kernel may rely on: atomics off, every lane of the vector
    unit on. An earlier kernel may have left them otherwise.
    """


@dataclass(eq=False)
class Flag:
    """A flag from one pipe to another of the same core; ids 0 to 5 per pair of pipes."""

    source: str
    to: str
    id: Expr

    def __post_init__(self) -> None:
        FACTS.call(type(self).__name__).require(choice=f"{self.source}_{self.to}")
        FACTS.fields["Event"].require(id=self.id)


class SetFlag(Flag):
    """Tells pipe ``to`` that pipe ``source`` has come so far."""


class WaitFlag(Flag):
    """Pipe ``to`` waits until the flag was set."""


@dataclass(eq=False)
class CrossFlag:
    """A flag between the cores of a block, of which each core counts the sets."""

    pipe: str
    flag: int
    name: str
    call: ClassVar[str]

    def __post_init__(self) -> None:
        FACTS.call(self.call).require(choice=f"PIPE_{self.pipe}")
        FACTS.fields["CrossCore"].require(flag=self.flag)
        if self.flag in FACTS.taken_flags:
            taken = FACTS.call("SyncAll")
            raise LoweringError(
                f"the cross-core flag {self.flag} is one of SyncAll's {taken.flags} "
                f"({taken.source})"
            )


class CrossSet(CrossFlag):
    """Tells the other cores of the block that ``pipe`` has come so far."""

    call: ClassVar[str] = "CrossCoreSetFlag"


class CrossWait(CrossFlag):
    """This core waits until the others have set the flag."""

    call: ClassVar[str] = "CrossCoreWaitFlag"


@dataclass(eq=False)
class Barrier:
    """What ``pipe`` has begun ends before it begins the next instruction."""

    pipe: str

    def __post_init__(self) -> None:
        FACTS.call("PipeBarrier").require(choice=f"PIPE_{self.pipe}")


@dataclass(eq=False)
class SyncAll:
    """Every core of the chip waits for every other."""


@dataclass(eq=False)
class Invalidate:
    """Drops what the scalar unit's cache holds, before it reads what other units have written.

    Arguments:
      name: of an array in global memory.
    """

    name: str
    dtype: str


@dataclass(eq=False)
class Let:
    """A named number."""

    name: str
    value: Expr
    ctype: str = "int32_t"


@dataclass(eq=False)
class Advance:
    """A counter of the core goes up: it says which slot of a double buffer is next."""

    name: str
    by: Expr = 1


@dataclass(eq=False)
class Assign:
    """A number that the core keeps takes another value."""

    name: str
    value: Expr


@dataclass(eq=False)
class Alias:
    """A name for memory of another buffer."""

    buffer: Buffer


@dataclass(eq=False)
class Comment:
    """A line for readers of the emitted source."""

    text: str


@dataclass(eq=False)
class For:
    """``for (var = lo; var < hi; var += step)``."""

    var: str
    lo: Expr
    hi: Expr
    body: list[Any]
    step: Expr = 1


@dataclass(eq=False)
class If:
    """``if (condition) body else otherwise``."""

    condition: str
    body: list[Any]
    otherwise: list[Any] = field(default_factory=list)


@dataclass(eq=False)
class Call:
    """Calls a `Function` of the program."""

    function: Function
    arguments: tuple[Expr, ...]


@dataclass(eq=False)
class Function:
    """A named part of a core's program.

    Arguments:
      buffers: that it has for itself.
    """

    name: str
    parameters: tuple[str, ...]
    body: list[Any]
    comment: str = ""
    buffers: list[Buffer] = field(default_factory=list)


Node = Any


def walk(nodes: Iterable[Node]) -> Iterator[Node]:
    """Every node, those inside loops, branches and called functions included, once per text."""
    for node in nodes:
        yield node
        if isinstance(node, For):
            yield from walk(node.body)
        elif isinstance(node, If):
            yield from walk(node.body)
            yield from walk(node.otherwise)
        elif isinstance(node, Call):
            yield from walk(node.function.body)


def instructions(nodes: Iterable[Node]) -> Iterator[Instruction]:
    """Every instruction, as `walk` meets them."""
    return (x for x in walk(nodes) if isinstance(x, Instruction))


def render(nodes: Iterable[Node], indent: int = 1) -> list[str]:
    """The C++ lines of a body."""
    lines: list[str] = []
    for node in nodes:
        lines += [("    " * indent + line) if line else "" for line in _lines(node)]
    return lines


def _lines(node: Node) -> list[str]:
    match node:
        case Instruction():
            return [f"{node.text};"]
        case InitSocState():
            return ["InitSocState();"]
        case Flag():
            return [f"{type(node).__name__}<HardEvent::{node.source}_{node.to}>({node.id});"]
        case CrossFlag():
            return [f"{node.call}<2, PIPE_{node.pipe}>({node.name});"]
        case Barrier():
            return [f"PipeBarrier<PIPE_{node.pipe}>();"]
        case SyncAll():
            return ["SyncAll<false>();"]
        case Invalidate():
            places = "CacheLine::ENTIRE_DATA_CACHE, DcciDst::CACHELINE_OUT"
            return [f"DataCacheCleanAndInvalid<{node.dtype}, {places}>({node.name});"]
        case Let():
            return [f"const {node.ctype} {node.name} = {node.value};"]
        case Alias():
            b = node.buffer
            return [f"LocalTensor<{b.dtype}> {b.name} = {b.alias};"]
        case Advance():
            return [f"++{node.name};" if node.by == 1 else f"{node.name} += {node.by};"]
        case Assign():
            return [f"{node.name} = {node.value};"]
        case Comment():
            return [f"// {line}" for line in node.text.splitlines()]
        case For():
            step = f"++{node.var}" if node.step == 1 else f"{node.var} += {node.step}"
            head = f"for (int32_t {node.var} = {node.lo}; {node.var} < {node.hi}; {step}) {{"
            return [head, *render(node.body), "}"]
        case If():
            middle = ["} else {", *render(node.otherwise)] if node.otherwise else []
            return [f"if ({node.condition}) {{", *render(node.body), *middle, "}"]
        case Call():
            return [f"{node.function.name}({', '.join(str(x) for x in node.arguments)});"]
    raise TypeError(node)
