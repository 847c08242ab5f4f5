"""Two operands of different shapes: the strides of the instruction lay one along the other."""

from __future__ import annotations

import math
from typing import Any

from npu_bridge.dtypes import BLOCK, ITEMSIZE, REPEAT
from npu_bridge.expressions import Expr, Scalar
from npu_bridge.facts import FACTS
from npu_bridge.instructions import Binary, BinaryStrided, Strided
from npu_bridge.ir import For
from npu_bridge.lower.emitter import Emitter
from npu_bridge.lower.values import Value, Vector
from pasa_jax.core.errors import LoweringError, PlanError

_COMMUTATIVE = ("Add", "Mul", "Max", "Min")
_MOST_ROWS = 248  # of one instruction, whose repeat count is 255 at most


def number(to: Emitter, name: str, a: Value, b: Value, hint: str) -> Any:
    """Add, Sub, Mul, Div, Max or Min of vectors and scalars."""
    if isinstance(a, Scalar) and isinstance(b, Scalar):
        raise LoweringError(f"{name} of two numbers that only the kernel knows")
    if isinstance(b, Scalar):
        assert isinstance(a, Vector)
        return _by_scalar(to, name, a, b, hint)
    assert isinstance(b, Vector)
    if isinstance(a, Scalar):
        return _of_scalar(to, name, a, b, hint)
    assert isinstance(a, Vector)
    return binary(to, name, a, b, hint)


def _by_scalar(to: Emitter, name: str, a: Vector, b: Scalar, hint: str) -> Vector:
    """``name`` of a vector and a number."""
    if name == "Sub":
        return to.with_scalar("Adds", a, Scalar(-b.value if b.known else f"(-({b.value}))"), hint)
    if name in _COMMUTATIVE:
        return to.with_scalar(f"{name}s", a, b, hint)
    if b.known and math.frexp(b.value)[0] == 0.5:  # a power of two: its inverse is exact
        return to.with_scalar("Muls", a, Scalar(1 / b.value), hint)
    return binary(to, name, a, to.filled(b, a.rows, a.width, a.dtype, "number"), hint)


def _of_scalar(to: Emitter, name: str, a: Scalar, b: Vector, hint: str) -> Vector:
    """``name`` of a number and a vector."""
    if name in _COMMUTATIVE:
        return to.with_scalar(f"{name}s", b, a, hint)
    if name == "Sub":
        return to.with_scalar("Adds", to.with_scalar("Muls", b, Scalar(-1.0), hint), a, hint)
    return binary(to, name, to.filled(a, b.rows, b.width, b.dtype, "number"), b, hint)


def full(
    to: Emitter, x: Vector | Scalar, rows: int, width: int, dtype: str = "", hint: str = "full"
) -> Vector:
    """x as [rows, width] numbers in memory, for instructions that cannot broadcast."""
    if isinstance(x, Scalar):
        return to.filled(x, rows, width, dtype, "number")
    if (x.rows, x.width) == (rows, width):
        return x
    zero = to.filled(Scalar(0), x.rows, x.width, x.dtype, "zero")
    return binary(to, "Add", x, zero, hint, rows, width)


def binary(
    to: Emitter, name: str, a: Vector, b: Vector, hint: str, rows: int = 1, width: int = 1
) -> Vector:
    """``name`` of two vectors, whichever of them is broadcast, [rows, width] at least."""
    rows, width = max(a.rows, b.rows, rows), max(a.width, b.width, width)
    if a.dtype != b.dtype:
        raise LoweringError(f"{name} of {a.dtype} and {b.dtype}")
    out = to.new(hint, a.dtype, rows, width)
    if (a.rows, a.width) == (b.rows, b.width) == (rows, width):
        to.emit(Binary(name, out.place, a.place, b.place, out.size))
        return out
    whole_blocks(Vector(out.place, rows, width))
    sides = _laid(to, a, out), _laid(to, b, out)
    for start in range(0, rows, _MOST_ROWS):
        _by_lanes(to, name, out, sides, start, min(start + _MOST_ROWS, rows))
    return out


def whole_blocks(x: Vector) -> None:
    """Raises where a row of x is not whole blocks."""
    if x.width * ITEMSIZE[x.dtype] % BLOCK:
        raise LoweringError(f"a row of {x.width} {x.dtype} is not whole blocks of {BLOCK} bytes")


def _laid(to: Emitter, x: Vector, out: Vector) -> Strided:
    """How an operand is walked, a row of ``out`` after the other."""
    if x.width == 1 and out.width > 1:
        if x.rows == 1:
            raise LoweringError("one number in memory is not broadcast")
        place = to.spread(x)
        return Strided(place, place, 0, 1)
    step = 0 if x.rows == 1 and out.rows > 1 else x.width * ITEMSIZE[x.dtype] // BLOCK
    return Strided(x.place, x.place, 1, step)


def _row_blocks(x: Vector) -> int:
    """How many blocks a row is long, which is the step from repeat to repeat."""
    blocks = x.width * ITEMSIZE[x.dtype] // BLOCK
    _, most = FACTS.fields["BinaryRepeatParams"].limits["repeatStride"]
    if blocks > most:
        raise PlanError(
            f"rows of {x.width} {x.dtype} are longer than {most} blocks, a repeat stride"
        )
    return blocks


def _by_lanes(
    to: Emitter, name: str, out: Vector, sides: tuple[Strided, Strided], start: int, stop: int
) -> None:
    """``name`` of rows [start, stop): an instruction for each repeat that a row is long."""
    item = ITEMSIZE[out.dtype]
    each = min(out.width, REPEAT // item)
    row_blocks = _row_blocks(out)

    def walked(side: Strided, lane: Expr) -> Strided:
        first = side.first.at(start * side.repeat * BLOCK // item)
        # Where one number of each row serves, it does so for all lanes.
        return Strided(first.at(lane) if side.block else first, side.whole, side.block, side.repeat)

    def instruction(lane: Expr) -> BinaryStrided:
        dst = Strided(out.place, out.place, 1, row_blocks)
        a, b = (walked(side, lane) for side in sides)
        return BinaryStrided(name, walked(dst, lane), a, b, each, stop - start)

    if out.width == each:
        to.emit(instruction(0))
        return
    if out.width % each:
        raise LoweringError(f"{out.width} columns are no multiple of {each}")
    if stop - start < out.width // each:
        to.body.append(_by_rows(name, out, sides, start, stop))
    else:
        to.body.append(For("lane", 0, out.width, [instruction("lane")], each))


def _by_rows(name: str, out: Vector, sides: tuple[Strided, Strided], start: int, stop: int) -> For:
    """The same, an instruction for each row: where there are fewer rows than repeats in one."""
    item, step = ITEMSIZE[out.dtype], REPEAT // BLOCK

    def walked(side: Strided) -> Strided:
        first = side.first
        if side.repeat:
            first = first.at(f"line * {side.repeat * BLOCK // item}")
        return Strided(first, side.whole, side.block, step if side.block else 0)

    dst = Strided(out.place, out.place, 1, _row_blocks(out))
    a, b = (walked(side) for side in sides)
    repeats = out.width * item // REPEAT
    one = BinaryStrided(name, walked(dst), a, b, REPEAT // item, repeats)
    return For("line", start, stop, [one])


_AT_ONCE = 4  # stretches that become one, if there are more than that


def fold(to: Emitter, name: str, x: Vector, width: int) -> Vector:
    """[rows, width]: ``name`` of all stretches of ``width`` columns of x."""
    if x.width % width:
        raise LoweringError(f"{x.width} columns are no multiple of {width}")
    while x.width > width:
        stretches = x.width // width
        divisors = (_AT_ONCE, *range(2, stretches + 1))
        at_once = next(x for x in divisors if stretches % x == 0)
        x = _folded(to, name, x, width, at_once)
    return x


def _folded(to: Emitter, name: str, x: Vector, width: int, at_once: int) -> Vector:
    """Of every ``at_once`` stretches of ``width`` columns, which follow each other, one."""
    repeats = x.size // (width * at_once)
    if repeats > 255:
        raise LoweringError(f"{repeats} stretches are not folded: at most 255 repeats are")
    part = to.new("lanes", x.dtype, x.rows, x.width // at_once)
    step = width * ITEMSIZE[x.dtype] // BLOCK
    dst = Strided(part.place, part.place, 1, step)

    def stretch(at: Expr) -> Strided:
        return Strided(x.place.at(at), x.place, 1, step * at_once)

    to.emit(BinaryStrided(name, dst, stretch(0), stretch(width), width, repeats))
    for lane in range(2 * width, at_once * width, width):
        to.emit(BinaryStrided(name, dst, dst, stretch(lane), width, repeats))
    return part
