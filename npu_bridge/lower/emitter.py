"""Makes instructions of values: one method for each form, the buffer of the result included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from npu_bridge.dtypes import BLOCK, ITEMSIZE
from npu_bridge.expressions import Scalar
from npu_bridge.instructions import Brcb, Cast, Duplicate, Unary, WithScalar
from npu_bridge.ir import Buffer, Instruction, Node, Slice
from npu_bridge.lower.values import Bits, Margin, Vector
from pasa_jax.core.errors import LoweringError

Allocate = Callable[[str, str, int], Buffer]


class Emitter:
    """The instructions so far.

    Arguments:
      allocate: makes a buffer in UB of a name, a C++ type and a number of elements.
      ramp: the numbers 0, 1, 2, … in UB, float32; None: there are none.
    """

    def __init__(self, allocate: Allocate, ramp: Buffer | None = None) -> None:
        self.body: list[Node] = []
        self._ramp = ramp
        self._allocate = allocate
        # What was made once and is used again.
        self._spread: dict[tuple[Slice, str], Slice] = {}
        self._padded: dict[Slice, Vector] = {}
        self._bits: dict[tuple[Margin | Bits, int, int], Bits] = {}

    def emit(self, instruction: Instruction) -> None:
        self.body.append(instruction)

    def branch(self, emit: Callable[[], None]) -> list[Node]:
        """What ``emit`` emits, as a body of its own."""
        outer, self.body = self.body, []
        emit()
        inner, self.body = self.body, outer
        return inner

    def new(self, hint: str, dtype: str, rows: int, width: int) -> Vector:
        """A buffer for ``rows`` × ``width`` numbers, whole blocks."""
        padded = -(-rows * width * ITEMSIZE[dtype] // BLOCK) * BLOCK // ITEMSIZE[dtype]
        return Vector(self._allocate(hint, dtype, padded).at(0, rows * width), rows, width)

    def ramp(self, size: int) -> Slice:
        """The numbers 0 to ``size`` − 1."""
        longest = 0 if self._ramp is None else self._ramp.count
        if self._ramp is None or size > longest:
            raise LoweringError(f"an index over {size} numbers; here they are counted to {longest}")
        return self._ramp.at(0, size)

    def unary(self, name: str, x: Vector, hint: str) -> Vector:
        out = self.new(hint, x.dtype, x.rows, x.width)
        self.emit(Unary(name, out.place, x.place, x.size))
        return out

    def with_scalar(self, name: str, x: Vector, number: Scalar, hint: str) -> Vector:
        out = self.new(hint, x.dtype, x.rows, x.width)
        self.emit(WithScalar(name, out.place, x.place, number, x.size))
        return out

    def filled(self, number: Scalar, rows: int, width: int, dtype: str, hint: str) -> Vector:
        out = self.new(hint, dtype, rows, width)
        self.emit(Duplicate(out.place, number, rows * width))
        return out

    def cast(self, x: Vector, dtype: str, hint: str) -> Vector:
        """x as ``dtype``; between 16-bit types by way of float32."""
        if x.dtype == dtype:
            return x
        if {x.dtype, dtype} == {"half", "bfloat16_t"}:
            x = self.cast(x, "float", hint)
        out = self.new(hint, dtype, x.rows, x.width)
        self.emit(Cast(out.place, x.place, x.size))
        return out

    def copied(self, x: Vector, to: Slice) -> None:
        """Leaves x in ``to``."""
        self.emit(WithScalar("Adds", replace(to, count=x.size), x.place, Scalar(0), x.size))

    def spread(self, x: Vector) -> Slice:
        """A column as one block a row, all of whose numbers are the row's."""
        key = (x.place, x.dtype)
        if key not in self._spread:
            out = self.new("rows", x.dtype, x.rows, BLOCK // ITEMSIZE[x.dtype])
            if x.rows % 8:
                raise LoweringError(f"a column of {x.rows} rows cannot be spread: 8 at a time are")
            self.emit(Brcb(out.place, x.place, x.rows))
            self._spread[key] = out.place
        return self._spread[key]

    def bits_of(self, x: Margin | Bits, rows: int, width: int, make: Callable[[], Bits]) -> Bits:
        """A condition as bits of ``rows`` × ``width`` numbers, made once."""
        key = (x, rows, width)
        if key not in self._bits:
            self._bits[key] = make()
        return self._bits[key]

    def padded(self, x: Vector, size: int) -> Vector:
        """x, filled up with zeros to ``size`` numbers."""
        if size == x.size:
            return x
        if x.place not in self._padded:
            out = self.filled(Scalar(0), size, 1, x.dtype, "padded")
            self.copied(x, replace(out.place, count=x.size))
            self._padded[x.place] = out
        return self._padded[x.place]
