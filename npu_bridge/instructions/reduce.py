"""Instructions of the vector unit that make one number of several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from npu_bridge.dtypes import BLOCK, ITEMSIZE, REPEAT
from npu_bridge.facts import FACTS
from npu_bridge.instructions.operations import check_written
from npu_bridge.instructions.vector import VectorInstruction, check_repeats
from npu_bridge.ir import Expr, Machine, Slice


def reduced(kind: str, x: np.ndarray) -> np.ndarray:
    """The "Max", "Min" or "Sum" of each row: of equal numbers the first; sums by pairs, each
    rounded.
    """
    if kind != "Sum":
        chosen = np.argmax(x, axis=1) if kind == "Max" else np.argmin(x, axis=1)
        return np.take_along_axis(x, chosen[:, None], axis=1)[:, 0]
    while x.shape[1] > 1:
        x = (x[:, ::2].astype(np.float64) + x[:, 1::2]).astype(x.dtype)
    return x[:, 0]


@dataclass(eq=False)
class WholeReduce(VectorInstruction):
    """One number of each of ``rows`` rows of ``width`` numbers, a repeat at most.

    Arguments:
      kind: "Max", "Min" or "Sum".
    """

    kind: str
    to: Slice
    x: Slice
    width: int
    rows: int
    sources: ClassVar[tuple[str, ...]] = ("x",)

    def __post_init__(self) -> None:
        FACTS.call(f"WholeReduce{self.kind}").require(self.to.dtype, self.x.dtype)
        check_repeats(self.x.dtype, self.rows, self.width)

    @property
    def repeat_cycles(self) -> int:
        return 7

    @property
    def text(self) -> str:
        dtype = self.x.dtype
        order = "" if self.kind == "Sum" else ", ReduceOrder::ORDER_ONLY_VALUE"
        blocks = self.width * ITEMSIZE[dtype] // BLOCK
        return (
            f"WholeReduce{self.kind}<{dtype}>({self.to}, {self.x}, {self.width}, {self.rows}, "
            f"1, 1, {blocks}{order})"
        )

    @property
    def work(self) -> Expr:
        return self.rows * REPEAT

    def run(self, machine: Machine) -> None:
        x = machine.array(self.x)[: self.rows * self.width].reshape(self.rows, self.width)
        if self.kind == "Sum":  # the lanes beyond the row count as zeros
            lanes = REPEAT // x.dtype.itemsize
            x = np.pad(x, ((0, 0), (0, lanes - self.width)))
        machine.array(self.to)[: self.rows] = reduced(self.kind, x)


@dataclass(eq=False)
class BlockReduce(VectorInstruction):
    """One number of each block of 8 float32, for ``repeats`` repeats of 64.

    Arguments:
      kind: "Max", "Min" or "Sum".
    """

    kind: str
    to: Slice
    x: Slice
    repeats: int
    sources: ClassVar[tuple[str, ...]] = ("x",)

    def __post_init__(self) -> None:
        FACTS.call(f"BlockReduce{self.kind}").require(self.to.dtype, self.x.dtype)
        check_written(f"BlockReduce{self.kind}", self.x.dtype, ("float",))
        check_repeats(self.x.dtype, self.repeats)

    @property
    def text(self) -> str:
        return f"BlockReduce{self.kind}<float>({self.to}, {self.x}, {self.repeats}, 64, 1, 1, 8)"

    @property
    def work(self) -> Expr:
        return self.repeats * REPEAT

    def run(self, machine: Machine) -> None:
        x = machine.array(self.x)[: self.repeats * 64].reshape(-1, 8)
        machine.array(self.to)[: len(x)] = reduced(self.kind, x)
