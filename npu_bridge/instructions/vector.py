"""Instructions of the vector unit that compute number by number, on UB."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from npu_bridge.dtypes import BLOCK, ITEMSIZE, NUMPY, REPEAT
from npu_bridge.expressions import Scalar
from npu_bridge.facts import FACTS
from npu_bridge.instructions.operations import BINARY, UNARY, WITH_SCALAR, Operation
from npu_bridge.ir import Expr, Instruction, Machine, Slice
from npu_bridge.rates import Rates

_VECTOR = FACTS.fields["Vector"]


def check_repeats(dtype: str, repeats: int, lanes: int = 1) -> None:
    """Raises where an instruction has too many repeats, or lanes in one.

    Raises:
      LoweringError: the sentence says how many there may be.
    """
    _VECTOR.require(repeat=repeats, **{f"lanesOf{ITEMSIZE[dtype]}": lanes})


class VectorInstruction(Instruction):
    """Computes 256 bytes at a time, a repeat; ``work`` is in bytes."""

    pipe: ClassVar[str] = "V"

    @property
    def repeat_cycles(self) -> int:
        """Cycles of a repeat."""
        return 1

    def cycles(self, work: float, rates: Rates) -> float:
        return rates.head + -(-work // REPEAT) * self.repeat_cycles


class Computed(VectorInstruction):
    """Applies an `Operation`."""

    operations: ClassVar[dict[str, Operation]]
    name: str

    def __post_init__(self) -> None:
        FACTS.call(self.name).require(self.to.dtype, *(s.dtype for s in self.reads))

    @property
    def operation(self) -> Operation:
        return self.operations[self.name]

    @property
    def in_place(self) -> bool:  # type: ignore[override]
        return self.operation.in_place

    @property
    def repeat_cycles(self) -> int:
        return self.operation.repeat_cycles.get(self.to.dtype, 1)


class Counted(Computed):
    """Applies an `Operation` to the first ``count`` numbers."""

    count: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _VECTOR.require(count=self.count)

    @property
    def work(self) -> Expr:
        return self.count * ITEMSIZE[self.to.dtype]


@dataclass(eq=False)
class Unary(Counted):
    """to[i] = name(x[i]) for i < count."""

    name: str
    to: Slice
    x: Slice
    count: int
    sources: ClassVar[tuple[str, ...]] = ("x",)
    operations: ClassVar[dict[str, Operation]] = UNARY

    @property
    def text(self) -> str:
        return f"{self.name}({self.to}, {self.x}, {self.count})"

    def run(self, machine: Machine) -> None:
        to, x = machine.array(self.to), machine.array(self.x)
        to[: self.count] = self.operation(to.dtype, x[: self.count])


@dataclass(eq=False)
class WithScalar(Counted):
    """to[i] = name(x[i], number) for i < count."""

    name: str
    to: Slice
    x: Slice
    number: Scalar
    count: int
    sources: ClassVar[tuple[str, ...]] = ("x",)
    operations: ClassVar[dict[str, Operation]] = WITH_SCALAR

    @property
    def text(self) -> str:
        number = self.number.text(self.x.dtype)
        return f"{self.name}({self.to}, {self.x}, {number}, {self.count})"

    def run(self, machine: Machine) -> None:
        to, x = machine.array(self.to), machine.array(self.x)
        number = x.dtype.type(machine.number(self.number))
        to[: self.count] = self.operation(to.dtype, x[: self.count], number)


@dataclass(eq=False)
class Binary(Counted):
    """to[i] = name(x[i], y[i]) for i < count."""

    name: str
    to: Slice
    x: Slice
    y: Slice
    count: int
    sources: ClassVar[tuple[str, ...]] = ("x", "y")
    operations: ClassVar[dict[str, Operation]] = BINARY

    @property
    def text(self) -> str:
        return f"{self.name}({self.to}, {self.x}, {self.y}, {self.count})"

    def run(self, machine: Machine) -> None:
        to, x, y = (machine.array(s) for s in (self.to, self.x, self.y))
        to[: self.count] = self.operation(to.dtype, x[: self.count], y[: self.count])


@dataclass(frozen=True)
class Strided:
    """An operand that an instruction walks in steps.

    Arguments:
      first: where this call begins.
      whole: what all calls of the same loop touch.
      block, repeat: steps from block to block of a repeat, and from repeat to repeat, in blocks.
    """

    first: Slice
    whole: Slice
    block: int
    repeat: int

    def places(self, lanes: int, repeats: int) -> np.ndarray:
        """[repeats, lanes]: which elements from ``first`` on they are."""
        each = BLOCK // ITEMSIZE[self.first.dtype]
        lane = np.arange(lanes)
        start = np.arange(repeats)[:, None] * self.repeat + lane // each * self.block
        return start * each + lane % each


@dataclass(eq=False)
class BinaryStrided(Computed):
    """name(x, y) of the first ``lanes`` numbers of each repeat, whose operands are walked in
    steps: 0 from repeat to repeat where one row serves all, 0 from block to block where one number
    of each row does.
    """

    name: str
    dst: Strided
    x: Strided
    y: Strided
    lanes: int
    repeats: int
    operations: ClassVar[dict[str, Operation]] = BINARY

    def __post_init__(self) -> None:
        super().__post_init__()
        check_repeats(self.to.dtype, self.repeats, self.lanes)
        for side in (self.dst, self.x, self.y):
            FACTS.fields["BinaryRepeatParams"].require(
                blockStride=side.block, repeatStride=side.repeat
            )

    @property
    def to(self) -> Slice:  # type: ignore[override]
        return self.dst.whole

    @property
    def text(self) -> str:
        sides = (self.dst, self.x, self.y)
        places = ", ".join(str(s.first) for s in sides)
        strides = ", ".join(str(s.block) for s in sides), ", ".join(str(s.repeat) for s in sides)
        return f"{self.name}({places}, {self.lanes}, {self.repeats}, {{{', '.join(strides)}}})"

    @property
    def reads(self) -> tuple[Slice, ...]:
        return (self.x.whole, self.y.whole)

    @property
    def work(self) -> Expr:
        return self.repeats * REPEAT

    def run(self, machine: Machine) -> None:
        shape = self.lanes, self.repeats
        sides = (self.x, self.y)
        to = machine.array(self.dst.first)
        x, y = (machine.array(s.first)[s.places(*shape)] for s in sides)
        to[self.dst.places(*shape)] = self.operation(to.dtype, x, y)


@dataclass(eq=False)
class Duplicate(VectorInstruction):
    """to[i] = number for i < count.

    Arguments:
      spelled: whether the type is written around a float32 too.
    """

    to: Slice
    number: Scalar
    count: int
    spelled: bool = False

    def __post_init__(self) -> None:
        FACTS.call("Duplicate").require(self.to.dtype)
        _VECTOR.require(count=self.count)

    @property
    def text(self) -> str:
        dtype = self.to.dtype
        number = self.number.text(dtype)
        if self.spelled and dtype == "float":
            number = f"{dtype}({number})"
        return f"Duplicate({self.to}, {number}, {self.count})"

    @property
    def work(self) -> Expr:
        return self.count * ITEMSIZE[self.to.dtype]

    def run(self, machine: Machine) -> None:
        machine.array(self.to)[: self.count] = machine.number(self.number)


@dataclass(eq=False)
class SetValue(Instruction):
    """to[0] = number, written by the scalar unit: the vector unit must wait for it by a flag."""

    to: Slice
    number: Scalar
    pipe: ClassVar[str] = "S"

    def __post_init__(self) -> None:
        FACTS.call("SetValue").require()

    @property
    def text(self) -> str:
        b = self.to.buffer
        return f"{b.name}.SetValue({self.to.offset}, {self.number.text(self.to.dtype)})"

    @property
    def work(self) -> Expr:
        return ITEMSIZE[self.to.dtype]

    def cycles(self, work: float, rates: Rates) -> float:
        return rates.head

    def run(self, machine: Machine) -> None:
        machine.array(self.to)[:1] = machine.number(self.number)


@dataclass(eq=False)
class Brcb(VectorInstruction):
    """Each of ``rows`` numbers of x (a multiple of 8) fills a block of ``to``."""

    to: Slice
    x: Slice
    rows: int
    sources: ClassVar[tuple[str, ...]] = ("x",)

    def __post_init__(self) -> None:
        FACTS.call("Brcb").require(self.to.dtype, self.x.dtype)
        check_repeats(self.to.dtype, self.rows // 8)

    @property
    def text(self) -> str:
        return f"Brcb({self.to}, {self.x}, {self.rows // 8}, {{1, 8}})"

    @property
    def work(self) -> Expr:
        return self.rows * BLOCK

    def run(self, machine: Machine) -> None:
        each = BLOCK // ITEMSIZE[self.to.dtype]
        x = np.repeat(machine.array(self.x)[: self.rows], each)
        machine.array(self.to)[: x.size] = x


_ROUNDED = {"FLOOR": np.floor, "CEIL": np.ceil, "TRUNC": np.trunc, "RINT": np.rint}


@dataclass(eq=False)
class Cast(VectorInstruction):
    """x in another type, for i < count.

    Arguments:
      rounding: to a whole number, "FLOOR", "CEIL", "TRUNC" or "RINT"; None: to nearest even.
    """

    to: Slice
    x: Slice
    count: int
    rounding: str | None = None
    sources: ClassVar[tuple[str, ...]] = ("x",)

    def __post_init__(self) -> None:
        FACTS.call("Cast").require(self.to.dtype, self.x.dtype, mode=self.mode)
        _VECTOR.require(count=self.count)

    @property
    def mode(self) -> str:
        """From a narrower type nothing is rounded."""
        if self.rounding is not None:
            return self.rounding
        return "NONE" if ITEMSIZE[self.x.dtype] < ITEMSIZE[self.to.dtype] else "RINT"

    @property
    def text(self) -> str:
        return f"Cast({self.to}, {self.x}, RoundMode::CAST_{self.mode}, {self.count})"

    @property
    def work(self) -> Expr:
        return self.count * max(ITEMSIZE[self.to.dtype], ITEMSIZE[self.x.dtype])

    def run(self, machine: Machine) -> None:
        x = machine.array(self.x)[: self.count]
        dtype = NUMPY[self.to.dtype]
        if self.rounding is not None:
            x = _ROUNDED[self.rounding](x)
        if dtype.kind == "i" and x.dtype.kind == "f":
            limits = np.iinfo(dtype)
            x = np.clip(np.rint(x.astype(np.float64)), limits.min, limits.max)
        machine.array(self.to)[: self.count] = x.astype(dtype)
