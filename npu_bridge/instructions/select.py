"""Instructions of the vector unit that compare, and that select by the bits of a comparison."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from npu_bridge.dtypes import ITEMSIZE, REPEAT
from npu_bridge.expressions import Scalar
from npu_bridge.facts import FACTS
from npu_bridge.instructions.vector import VectorInstruction
from npu_bridge.ir import Expr, Machine, Slice
from pasa_jax.core.errors import LoweringError

_MODES = {
    "EQ": operator.eq,
    "NE": operator.ne,
    "GE": operator.ge,
    "GT": operator.gt,
    "LE": operator.le,
    "LT": operator.lt,
}


def _side(machine: Machine, side: Slice | Scalar, count: int, dtype: np.dtype) -> Any:
    """The numbers of an operand that is a slice, or one number for all."""
    if isinstance(side, Scalar):
        return dtype.type(machine.number(side))
    return machine.array(side)[:count]


@dataclass(eq=False)
class Compare(VectorInstruction):
    """Bit i of ``to`` says whether x[i] and y[i], or one number y, compare as ``mode`` says.

    Arguments:
      mode: "EQ", "NE", "GE", "GT", "LE" or "LT".
      to: of uint16_t.
      count: whole repeats.
    """

    mode: str
    to: Slice
    x: Slice
    y: Slice | Scalar
    count: int
    sources: ClassVar[tuple[str, ...]] = ("x", "y")

    def __post_init__(self) -> None:
        sides = [s.dtype for s in self.reads]
        FACTS.call(self.name).require("uint8_t", *sides, mode=self.mode)
        if self.count * ITEMSIZE[self.x.dtype] % REPEAT:
            raise LoweringError(
                f"{self.name} takes whole repeats of {REPEAT} bytes, not {self.count} of "
                f"{self.x.dtype}: the rest is left out ({FACTS.call(self.name).source})"
            )

    @property
    def name(self) -> str:
        return "CompareScalar" if isinstance(self.y, Scalar) else "Compare"

    @property
    def repeat_cycles(self) -> int:
        return 2

    @property
    def text(self) -> str:
        y = self.y.text(self.x.dtype) if isinstance(self.y, Scalar) else str(self.y)
        to = self.to.of_type("uint8_t")
        return f"{self.name}({to}, {self.x}, {y}, CMPMODE::{self.mode}, {self.count})"

    @property
    def work(self) -> Expr:
        return self.count * ITEMSIZE[self.x.dtype]

    def run(self, machine: Machine) -> None:
        x = machine.array(self.x)[: self.count]
        true = _MODES[self.mode](x, _side(machine, self.y, self.count, x.dtype))
        bits = np.packbits(true, bitorder="little")
        machine.array(self.to.of_type("uint8_t"))[: bits.size] = bits


@dataclass(eq=False)
class Select(VectorInstruction):
    """to[i] = yes[i] where bit i of ``mask`` is set, else no[i], or one number ``no``.

    Arguments:
      mask: of uint16_t.
    """

    to: Slice
    mask: Slice
    yes: Slice
    no: Slice | Scalar
    count: int
    in_place: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = ("mask", "yes", "no")

    def __post_init__(self) -> None:
        sides = [s.dtype for s in (self.yes, self.no) if isinstance(s, Slice)]
        FACTS.call("Select").require(self.to.dtype, "uint8_t", *sides)
        FACTS.fields["Vector"].require(count=self.count)

    @property
    def repeat_cycles(self) -> int:
        return 2

    @property
    def text(self) -> str:
        scalar = isinstance(self.no, Scalar)
        no = self.no.text(self.yes.dtype) if isinstance(self.no, Scalar) else str(self.no)
        mode = f"SELMODE::VSEL_TENSOR_{'SCALAR' if scalar else 'TENSOR'}_MODE"
        mask = self.mask.of_type("uint8_t")
        return f"Select({self.to}, {mask}, {self.yes}, {no}, {mode}, {self.count})"

    @property
    def work(self) -> Expr:
        return self.count * ITEMSIZE[self.yes.dtype]

    def run(self, machine: Machine) -> None:
        to = machine.array(self.to)
        bits = machine.array(self.mask.of_type("uint8_t"))[: -(-self.count // 8)]
        mask = np.unpackbits(bits, count=self.count, bitorder="little").astype(bool)
        yes = machine.array(self.yes)[: self.count]
        to[: self.count] = np.where(mask, yes, _side(machine, self.no, self.count, yes.dtype))
