"""Instructions that copy between global memory (GM), UB and L1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from npu_bridge.dtypes import BLOCK, ITEMSIZE, REPEAT
from npu_bridge.expressions import times
from npu_bridge.facts import FACTS
from npu_bridge.ir import Expr, Instruction, Machine, Slice
from npu_bridge.rates import Rates
from pasa_jax.core.errors import LoweringError


class CopyInstruction(Instruction):
    """Moves bytes; its pipe follows from where they go."""

    to: Slice
    source: Slice
    sources: ClassVar[tuple[str, ...]] = ("source",)
    call: ClassVar[str] = "DataCopy"

    def __post_init__(self) -> None:
        FACTS.call(self.call).require(self.to.dtype, self.source.dtype)

    @property
    def pipe(self) -> str:
        if self.source.buffer.memory == "GM":
            return "MTE2"
        return "MTE3" if self.to.buffer.memory == "GM" else "V"

    @property
    def item(self) -> int:
        """Bytes of an element."""
        return ITEMSIZE[self.to.dtype]

    def cycles(self, work: float, rates: Rates) -> float:
        if self.pipe == "V":
            return rates.head + -(-work // REPEAT)
        if self.pipe == "MTE3":
            return rates.copy_head + work / rates.from_ub
        l1 = self.to.buffer.memory == "L1"
        return rates.copy_head + work / (rates.to_l1 if l1 else rates.to_ub)


def _rows(machine: Machine, count: Expr, width: int, step: int) -> np.ndarray:
    """[rows, width]: which elements the rows are that begin ``step`` elements apart."""
    return np.arange(machine.number(count))[:, None] * step + np.arange(width)


@dataclass(eq=False)
class DataCopy(CopyInstruction):
    """``count`` elements in one piece."""

    to: Slice
    source: Slice
    count: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.work % BLOCK:
            raise LoweringError(
                f"DataCopy takes whole blocks of {BLOCK} bytes, not {self.work} bytes: the rest "
                f"is left out ({FACTS.call('DataCopy').source})"
            )
        FACTS.fields["DataCopyParams"].require(blockLen=self.work // BLOCK)

    @property
    def text(self) -> str:
        return f"DataCopy({self.to}, {self.source}, {self.count})"

    @property
    def work(self) -> int:
        return self.count * self.item

    def run(self, machine: Machine) -> None:
        machine.array(self.to)[: self.count] = machine.array(self.source)[: self.count]


@dataclass(eq=False)
class FirstBlocks(CopyInstruction):
    """One block of each of ``rows`` rows, of ``row_blocks`` blocks each."""

    to: Slice
    source: Slice
    rows: int
    row_blocks: int

    def __post_init__(self) -> None:
        super().__post_init__()
        FACTS.fields["DataCopyParams"].require(blockCount=self.rows, srcGap=self.row_blocks - 1)

    @property
    def text(self) -> str:
        params = f"DataCopyParams{{{self.rows}, 1, {self.row_blocks - 1}, 0}}"
        return f"DataCopy({self.to}, {self.source}, {params})"

    @property
    def work(self) -> Expr:
        return self.rows * 64  # the least that is fetched

    def run(self, machine: Machine) -> None:
        each = BLOCK // self.item
        places = _rows(machine, self.rows, each, self.row_blocks * each)
        machine.array(self.to)[: places.size] = machine.array(self.source)[places].reshape(-1)


@dataclass(eq=False)
class RowsIn(CopyInstruction):
    """``rows`` rows of ``width`` elements from GM to UB.

    Arguments:
      width: a number, or the name of one.
      gap: elements of GM from the end of a row to the next.
      pitch: elements from row to row in UB; None: the rows follow each other.
    """

    to: Slice
    source: Slice
    rows: Expr
    width: Expr
    gap: Expr
    pitch: int | None = None
    call: ClassVar[str] = "DataCopyPad"

    def __post_init__(self) -> None:
        super().__post_init__()
        size = times(self.width, self.item)
        FACTS.fields["DataCopyExtParams"].require(blockCount=self.rows, blockLen=size)

    @property
    def text(self) -> str:
        item = self.item
        size = f"{times(self.width, item)}"
        apart = "0"
        if self.pitch is not None:
            bytes_ = f"{self.width} * {item}"
            size = f"static_cast<uint32_t>({bytes_})"
            blocks = f"{self.pitch * item // BLOCK} - CeilDiv({bytes_}, {BLOCK})"
            apart = f"static_cast<uint32_t>({blocks})"
        return (
            f"DataCopyPad({self.to}, {self.source}, DataCopyExtParams{{"
            f"static_cast<uint16_t>({self.rows}), {size}, "
            f"static_cast<uint32_t>(({self.gap}) * {item}), {apart}, 0}}, "
            f"DataCopyPadExtParams<{self.to.dtype}>())"
        )

    @property
    def work(self) -> Expr:
        if isinstance(self.width, int):
            return times(self.rows, self.width * self.item)
        return f"({self.rows}) * ({self.width}) * {self.item}"

    def run(self, machine: Machine) -> None:
        each = BLOCK // self.item
        width = machine.number(self.width)
        whole = -(-width // each) * each  # the last block is filled with the row's first element
        source = machine.array(self.source)
        rows = source[_rows(machine, self.rows, width, width + machine.number(self.gap))]
        filled = np.concatenate([rows, np.repeat(rows[:, :1], whole - width, axis=1)], axis=1)
        to = _rows(machine, self.rows, whole, whole if self.pitch is None else self.pitch)
        machine.array(self.to)[to] = filled


@dataclass(eq=False)
class RowsOut(CopyInstruction):
    """``rows`` rows of ``width`` elements from UB, where each begins a block, to GM.

    Arguments:
      gap: elements of GM from the end of a row to the next.
    """

    to: Slice
    source: Slice
    rows: Expr
    width: int
    gap: Expr
    call: ClassVar[str] = "DataCopyPad"

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.width * self.item
        FACTS.fields["DataCopyExtParams"].require(blockCount=self.rows, blockLen=size)

    @property
    def text(self) -> str:
        item = self.item
        return (
            f"DataCopyPad({self.to}, {self.source}, DataCopyExtParams{{"
            f"static_cast<uint16_t>({self.rows}), {self.width * item}, 0, "
            f"static_cast<uint32_t>(({self.gap}) * {item}), 0}})"
        )

    @property
    def work(self) -> Expr:
        return times(self.rows, self.width * self.item)

    def run(self, machine: Machine) -> None:
        each = BLOCK // self.item
        whole = -(-self.width // each) * each
        source = _rows(machine, self.rows, self.width, whole)
        to = _rows(machine, self.rows, self.width, self.width + machine.number(self.gap))
        machine.array(self.to)[to] = machine.array(self.source)[source]


@dataclass(eq=False)
class MatrixIn(CopyInstruction):
    """A matrix that lies row by row in GM, to L1 as Nz: columns of blocks, each with all rows.

    Arguments:
      stride: elements of GM from row to row.
    """

    to: Slice
    source: Slice
    rows: int
    columns: int
    stride: Expr
    call: ClassVar[str] = "Nd2Nz"

    def __post_init__(self) -> None:
        super().__post_init__()
        FACTS.fields["Nd2NzParams"].require(
            nValue=self.rows,
            dValue=self.columns,
            srcDValue=self.stride,
            dstNzC0Stride=self.rows,
        )

    @property
    def text(self) -> str:
        return (
            f"DataCopy({self.to}, {self.source}, Nd2NzParams{{1, {self.rows}, {self.columns}, 0, "
            f"static_cast<uint16_t>({self.stride}), {self.rows}, 1, 0}})"
        )

    @property
    def work(self) -> Expr:
        return self.rows * self.columns * self.item

    def run(self, machine: Machine) -> None:
        each = BLOCK // self.item
        places = _rows(machine, self.rows, self.columns, machine.number(self.stride))
        matrix = machine.array(self.source)[places]
        strips = matrix.reshape(self.rows, self.columns // each, each).transpose(1, 0, 2)
        machine.array(self.to)[: matrix.size] = strips.reshape(-1)
