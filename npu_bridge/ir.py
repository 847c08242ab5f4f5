"""A kernel as a program: instructions of the pipes, and the loops, branches and flags around them.

An instruction is one object: the C++ text that is emitted, the pipe that executes it, the bytes it
reads and writes, and how much work that is. Everything else is derived from it: where barriers
stand, what the memories hold, how long the program takes.

Numbers that are known only when the kernel runs are expressions, one text that is valid both in
C++ and in Python: + - * and comparisons of ints, and the functions below.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import CodeType
from typing import Any

ITEMSIZE = {"half": 2, "bfloat16_t": 2, "float": 4, "int32_t": 4, "uint16_t": 2, "uint8_t": 1}
C_TYPES = {
    "float16": "half",
    "bfloat16": "bfloat16_t",
    "float32": "float",
    "int32": "int32_t",
    "uint8": "uint8_t",
}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "Min": min,
    "Max": max,
    "Div": lambda a, b: a // b,
    "Mod": lambda a, b: a % b,
    "CeilDiv": lambda a, b: -(-a // b),
    "Pick": lambda c, a, b: a if c else b,
    "MinFloat": min,
    "MaxFloat": max,
    "PickFloat": lambda c, a, b: a if c else b,
    "int64_t": int,
}
# The same functions in C++.
PRELUDE = """\
__aicore__ inline int32_t Min(int32_t a, int32_t b) { return a < b ? a : b; }
__aicore__ inline int32_t Max(int32_t a, int32_t b) { return a > b ? a : b; }
__aicore__ inline int32_t Div(int32_t a, int32_t b) { return a / b; }  // of numbers >= 0
__aicore__ inline int32_t Mod(int32_t a, int32_t b) { return a % b; }
__aicore__ inline int32_t CeilDiv(int32_t a, int32_t b) { return (a + b - 1) / b; }
__aicore__ inline int32_t Pick(bool c, int32_t a, int32_t b) { return c ? a : b; }
__aicore__ inline float MinFloat(float a, float b) { return a < b ? a : b; }
__aicore__ inline float MaxFloat(float a, float b) { return a > b ? a : b; }
__aicore__ inline float PickFloat(bool c, float a, float b) { return c ? a : b; }
"""

Expr = int | str


def evaluate(x: Expr, env: Mapping[str, Any]) -> Any:
    """The value of an expression."""
    return x if isinstance(x, int) else eval(_python(x), dict(FUNCTIONS), env)


@cache
def _python(text: str) -> CodeType:
    text = re.sub(r"static_cast<\w+>", "", text)
    return compile(re.sub(r"(\d\.\d*(?:e[+-]?\d+)?)f\b", r"\1", text), "<expression>", "eval")


def times(a: Expr, b: int) -> Expr:
    """a·b, folded where a is known."""
    if isinstance(a, int):
        return a * b
    return 0 if b == 0 else a if b == 1 else f"({a}) * {b}"


def plus(a: Expr, b: Expr) -> Expr:
    """a + b, folded where both are known."""
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    return b if a == 0 else a if b == 0 else f"{a} + {b}"


@dataclass(eq=False)
class Buffer:
    """Memory of one kind: on the chip at a byte address, which the plan fills in, or in GM.

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
        return -(-self.count * self.slots * ITEMSIZE[self.dtype] // 32) * 32

    def at(self, offset: Expr = 0, count: Expr | None = None) -> Slice:
        return Slice(self, offset, self.count if count is None else count)

    def slot(self, slot: Expr) -> Slice:
        return Slice(self, times(slot, self.count), self.count)


@dataclass(frozen=True)
class Slice:
    """``count`` elements of a buffer from element ``offset`` on."""

    buffer: Buffer
    offset: Expr
    count: Expr
    dtype: str | None = None  # read as another type of the same size or less

    def __str__(self) -> str:
        name = self.buffer.name
        if self.dtype is not None and self.dtype != self.buffer.dtype:
            name = f"{name}.ReinterpretCast<{self.dtype}>()"
        return name if self.offset == 0 else f"{name}[{self.offset}]"

    def at(self, offset: Expr, count: Expr | None = None) -> Slice:
        count = self.count if count is None else count
        return Slice(self.buffer, plus(self.offset, offset), count, self.dtype)

    def of_type(self, dtype: str) -> Slice:
        ratio = ITEMSIZE[self.dtype or self.buffer.dtype] / ITEMSIZE[dtype]
        assert self.offset == 0
        assert isinstance(self.count, int)
        return Slice(self.buffer, 0, int(self.count * ratio), dtype)


@dataclass(eq=False)
class Instruction:
    """One call of the AscendC API.

    Arguments:
      text: the C++ call, without semicolon.
      pipe: "V", "M", "MTE1", "MTE2", "MTE3", "FIX" or "S".
      work: in the unit in which the pipe is slow: bytes moved, bytes of vector, multiplications.
    """

    text: str
    pipe: str
    writes: tuple[Slice, ...] = ()
    reads: tuple[Slice, ...] = ()
    work: Expr = 0
    comment: str = ""


@dataclass(eq=False)
class SetFlag:
    """Says to pipe ``to`` that pipe ``source`` has come so far; ids 0 to 5 per pair."""

    source: str
    to: str
    id: Expr


@dataclass(eq=False)
class WaitFlag:
    source: str
    to: str
    id: Expr


@dataclass(eq=False)
class CrossSet:
    """Says to the other cores of the block that ``pipe`` has come so far."""

    pipe: str
    flag: int
    name: str


@dataclass(eq=False)
class CrossWait:
    pipe: str
    flag: int
    name: str


@dataclass(eq=False)
class Barrier:
    pipe: str


@dataclass(eq=False)
class SyncAll:
    """Every core of the chip waits for every other."""


@dataclass(eq=False)
class Let:
    """A named number."""

    name: str
    value: Expr
    ctype: str = "int32_t"


@dataclass(eq=False)
class Advance:
    """A number of the core goes up: which turn of a double buffer it is."""

    name: str
    by: Expr = 1


@dataclass(eq=False)
class Alias:
    """A name for memory of another buffer."""

    buffer: Buffer


@dataclass(eq=False)
class Comment:
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
    """A named part of a core's program."""

    name: str
    parameters: tuple[str, ...]
    body: list[Any]
    comment: str = ""


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


def render(nodes: Iterable[Node], indent: int = 1) -> list[str]:
    """The C++ lines of a body."""
    lines: list[str] = []
    for node in nodes:
        lines += [("    " * indent + line) if line else "" for line in _lines(node)]
    return lines


def _lines(node: Node) -> list[str]:
    match node:
        case Instruction():
            text = f"{node.text};"
            return [f"{text}  // {node.comment}" if node.comment else text]
        case SetFlag() | WaitFlag():
            return [f"{type(node).__name__}<HardEvent::{node.source}_{node.to}>({node.id});"]
        case CrossSet():
            return [f"CrossCoreSetFlag<2, PIPE_{node.pipe}>({node.name});"]
        case CrossWait():
            return [f"CrossCoreWaitFlag<2, PIPE_{node.pipe}>({node.name});"]
        case Barrier():
            return [f"PipeBarrier<PIPE_{node.pipe}>();"]
        case SyncAll():
            return ["SyncAll<false>();"]
        case Let():
            return [f"const {node.ctype} {node.name} = {node.value};"]
        case Alias():
            b = node.buffer
            return [f"LocalTensor<{b.dtype}> {b.name} = {b.alias};"]
        case Advance():
            return [f"++{node.name};" if node.by == 1 else f"{node.name} += {node.by};"]
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


def with_barriers(nodes: list[Node]) -> list[Node]:
    """The straight-line program with a barrier before each vector instruction that depends on an
    earlier one since the last barrier, through a value or through memory that is used again.
    """
    found: list[Node] = []
    written: list[tuple[str, int, int]] = []
    read: list[tuple[str, int, int]] = []
    for node in nodes:
        inside = [x for x in walk([node]) if isinstance(x, Instruction) and x.pipe == "V"]
        writes = [_range(s) for x in inside for s in x.writes]
        reads = [_range(s) for x in inside for s in x.reads]
        if _overlap(writes, written) or _overlap(writes, read) or _overlap(reads, written):
            found.append(Barrier("V"))
            written, read = [], []
        found.append(node)
        written += writes
        read += reads
    return found


def _range(s: Slice) -> tuple[str, int, int]:
    """The bytes that a slice may touch: the whole buffer where its offset is not known."""
    b = s.buffer
    if b.alias is not None:
        return _range(b.alias)
    assert b.address is not None, b.name
    if isinstance(s.offset, int) and isinstance(s.count, int):
        size = ITEMSIZE[s.dtype or b.dtype]
        return b.memory, b.address + s.offset * size, b.address + (s.offset + s.count) * size
    return b.memory, b.address, b.address + b.bytes


def _overlap(a: list[tuple[str, int, int]], b: list[tuple[str, int, int]]) -> bool:
    return any(m == n and lo < top and bottom < hi for m, lo, hi in a for n, bottom, top in b)
