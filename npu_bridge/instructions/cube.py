"""Instructions of the cube unit: L1 to L0A and L0B, the product, L0C to global memory.

Matrices lie in fractals of 512 bytes: 16 lines of one block. L0A holds rows of fractals; L0B too,
each fractal stored by columns; L0C holds columns of 16 float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from npu_bridge.dtypes import ITEMSIZE, NUMPY
from npu_bridge.facts import FACTS
from npu_bridge.instructions.operations import check_written
from npu_bridge.ir import Expr, Instruction, Machine, Slice
from npu_bridge.rates import Rates

FRACTAL = 512  # bytes
LINES = 16  # of a fractal
_HALVES = ("half", "bfloat16_t")
# How L0C is rounded on its way out.
_MODES = {"half": "F322F16", "bfloat16_t": "F322BF16", "float": "NoQuant"}


@dataclass(eq=False)
class LoadData(Instruction):
    """Loads ``count`` fractals that begin ``stride`` fractals apart.

    Arguments:
      transposed: whether each fractal's lines and columns are exchanged.
    """

    to: Slice
    source: Slice
    count: int
    stride: int
    transposed: bool = False
    pipe: ClassVar[str] = "MTE1"
    sources: ClassVar[tuple[str, ...]] = ("source",)

    def __post_init__(self) -> None:
        FACTS.call("LoadData").require(self.to.dtype, self.source.dtype)
        check_written("LoadData", self.to.dtype, _HALVES)
        FACTS.fields["LoadData2DParams"].require(repeatTimes=self.count, srcStride=self.stride)

    @property
    def text(self) -> str:
        transposed = "true" if self.transposed else "false"
        params = f"LoadData2DParams{{0, {self.count}, {self.stride}, 0, 0, {transposed}, 0}}"
        return f"LoadData({self.to}, {self.source}, {params})"

    @property
    def work(self) -> Expr:
        return self.count * FRACTAL

    def cycles(self, work: float, rates: Rates) -> float:
        left = self.to.buffer.memory == "L0A"
        return work / (rates.to_l0a if left else rates.to_l0b)

    def run(self, machine: Machine) -> None:
        each = FRACTAL // ITEMSIZE[self.to.dtype]
        places = np.arange(self.count)[:, None] * self.stride * each + np.arange(each)
        fractals = machine.array(self.source)[places]
        if self.transposed:
            fractals = fractals.reshape(-1, LINES, LINES).transpose(0, 2, 1)
        machine.array(self.to)[: fractals.size] = fractals.reshape(-1)


@dataclass(eq=False)
class Mmad(Instruction):
    """to = a·b where ``first`` is true, else to + a·b, in float32: [rows, n] = [rows, k]·[k, n].

    Arguments:
      rows, n, k: multiples of 16.
    """

    to: Slice
    a: Slice
    b: Slice
    rows: int
    n: int
    k: int
    first: str
    pipe: ClassVar[str] = "M"
    sources: ClassVar[tuple[str, ...]] = ("a", "b", "to")

    def __post_init__(self) -> None:
        FACTS.call("Mmad").require(self.to.dtype, self.a.dtype, self.b.dtype)
        check_written("Mmad", self.a.dtype, _HALVES)
        FACTS.fields["MmadParams"].require(m=self.rows, n=self.n, k=self.k)

    @property
    def text(self) -> str:
        params = f"MmadParams{{{self.rows}, {self.n}, {self.k}, 0, false, {self.first}}}"
        return f"Mmad({self.to}, {self.a}, {self.b}, {params})"

    @property
    def work(self) -> Expr:
        return self.rows * self.n * self.k

    def cycles(self, work: float, rates: Rates) -> float:
        return rates.head + work / rates.multiply

    def run(self, machine: Machine) -> None:
        rows, n, k = self.rows, self.n, self.k
        left = machine.array(self.a)[: rows * k].reshape(-1, k // LINES, LINES, LINES)
        left = left.transpose(0, 2, 1, 3).reshape(rows, k).astype(np.float32)
        right = machine.array(self.b)[: n * k].reshape(k // LINES, n // LINES, LINES, LINES)
        right = right.transpose(1, 2, 0, 3).reshape(n, k).astype(np.float32)
        place = machine.array(self.to)[: rows * n]
        sums = np.zeros((rows, n), np.float32)
        if not machine.number(self.first):
            sums += place.reshape(n // LINES, rows, LINES).transpose(1, 0, 2).reshape(rows, n)
        for i in range(k):  # one product after another, as the emulator adds them
            sums += left[:, i, None] * right[None, :, i]
        place[:] = sums.reshape(rows, n // LINES, LINES).transpose(1, 0, 2).reshape(-1)


@dataclass(eq=False)
class Fixpipe(Instruction):
    """A product, [rows, n], written to global memory row by row, rounded to the type there.

    Arguments:
      stride: elements of global memory from row to row.
    """

    to: Slice
    source: Slice
    rows: int
    n: int
    stride: int
    pipe: ClassVar[str] = "FIX"
    sources: ClassVar[tuple[str, ...]] = ("source",)

    def __post_init__(self) -> None:
        check_written("Fixpipe", self.to.dtype, tuple(_MODES))
        mode = _MODES[self.to.dtype]
        FACTS.call("Fixpipe").require(self.to.dtype, self.source.dtype, mode=mode)
        FACTS.fields["FixpipeParamsV220"].require(
            nSize=self.n, mSize=self.rows, srcStride=self.rows, dstStride=self.stride
        )

    @property
    def text(self) -> str:
        dtype, rows = self.to.dtype, self.rows
        return (
            f"Fixpipe<{dtype}, float, CFG_ROW_MAJOR>({self.to}, {self.source}, "
            f"FixpipeParamsV220{{{self.n}, {rows}, {rows}, {self.stride}, false, "
            f"QuantMode_t::{_MODES[dtype]}, 0, 1, 0, 0, 0}})"
        )

    @property
    def work(self) -> Expr:
        return self.rows * self.n * ITEMSIZE[self.to.dtype]

    def cycles(self, work: float, rates: Rates) -> float:
        return rates.copy_head + work / rates.fixpipe

    def run(self, machine: Machine) -> None:
        rows, n = self.rows, self.n
        c = machine.array(self.source)[: rows * n].reshape(n // LINES, rows, LINES)
        c = c.transpose(1, 0, 2).reshape(rows, n)
        places = np.arange(rows)[:, None] * self.stride + np.arange(n)
        machine.array(self.to)[places] = c.astype(NUMPY[self.to.dtype])
