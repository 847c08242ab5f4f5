"""Conditions as bits, and what selects by them."""

from __future__ import annotations

from dataclasses import replace

from npu_bridge.dtypes import ITEMSIZE, REPEAT
from npu_bridge.expressions import Scalar
from npu_bridge.instructions import Binary, Compare, Select, Unary
from npu_bridge.ir import If, Slice
from npu_bridge.lower.arithmetic import full, number
from npu_bridge.lower.emitter import Emitter
from npu_bridge.lower.values import Bits, Margin, Value, Vector
from pasa_jax.core.errors import LoweringError

_COMPARED_AS = {"bfloat16_t": "float", "uint8_t": "half"}
_SELECTED_AS = {"bfloat16_t": "half", "int32_t": "float"}  # by their bits


def bits(to: Emitter, x: Value, rows: int, width: int) -> Bits:
    """A condition as bits of all ``rows`` × ``width`` numbers."""
    if isinstance(x, Bits):
        if (x.rows, x.width) == (rows, width):
            return x
        few = x
        return to.bits_of(few, rows, width, lambda: _of_few(to, few, rows, width))
    if not isinstance(x, Margin):
        raise LoweringError(f"{x} is no condition")
    return to.bits_of(x, rows, width, lambda: _of_margin(to, x, rows, width))


def _of_few(to: Emitter, x: Bits, rows: int, width: int) -> Bits:
    zero = to.filled(Scalar(0), x.rows, x.width, "float", "zero")
    return _of_margin(to, Margin(selected(to, x, zero, Scalar(-1.0), "margin")), rows, width)


def _of_margin(to: Emitter, x: Margin, rows: int, width: int) -> Bits:
    value = x.value
    if isinstance(value, Scalar):
        value = to.filled(value, rows, width, "float", "margin")
    return compared(to, "GE", full(to, value, rows, width, hint="margin"), Scalar(0.0))


def compared(to: Emitter, mode: str, x: Vector, y: Vector | Scalar) -> Bits:
    """Bits of whole repeats: beyond a short column stand zeros. What the unit does not compare is
    compared in another type.
    """
    if x.dtype in _COMPARED_AS:
        wide = _COMPARED_AS[x.dtype]
        other = to.cast(y, wide, "wide") if isinstance(y, Vector) else y
        return compared(to, mode, to.cast(x, wide, "wide"), other)
    if isinstance(y, Vector):
        shape = max(x.rows, y.rows), max(x.width, y.width)
        x, y = full(to, x, *shape), full(to, y, *shape)
    rows, width = x.rows, x.width
    each = REPEAT // ITEMSIZE[x.dtype]
    size = -(-x.size // each) * each
    x = to.padded(x, size)
    place = to.new("bits", "uint16_t", 1, size // 16).place
    other = y if isinstance(y, Scalar) else to.padded(y, size).place
    to.emit(Compare(mode, place, x.place, other, size))
    return Bits(place, rows, width)


def combined(to: Emitter, name: str, a: Margin | Bits, b: Margin | Bits) -> Margin | Bits:
    """ "And" or "Or" of two conditions."""
    if isinstance(a, Margin) and isinstance(b, Margin):
        extreme = {"And": "Min", "Or": "Max"}[name]
        if isinstance(a.value, Scalar) and isinstance(b.value, Scalar):
            return Margin(_of_scalars(extreme, a.value, b.value))
        return Margin(number(to, extreme, a.value, b.value, "margin"))
    sides = [x.value if isinstance(x, Margin) else x for x in (a, b)]
    shapes = [(x.rows, x.width) for x in sides if not isinstance(x, Scalar)]
    shape = max(rows for rows, _ in shapes), max(width for _, width in shapes)
    a, b = (bits(to, x, *shape) for x in (a, b))
    words = int(min(a.place.count, b.place.count))
    out = to.new("bits", "uint16_t", 1, words).place
    to.emit(Binary(name, out, a.place, b.place, words))
    return Bits(out, a.rows, a.width)


def _of_scalars(extreme: str, a: Scalar, b: Scalar) -> Scalar:
    if a.known and b.known:
        return Scalar({"Min": min, "Max": max}[extreme](a.value, b.value))
    return Scalar(f"{extreme}({a.value}, {b.value})")


def negated(to: Emitter, x: Margin | Bits) -> Margin | Bits:
    """Where a condition is not true. Of a margin, what is below 0 is above −1 with its sign
    changed.
    """
    if isinstance(x, Bits):
        words = int(x.place.count)
        out = to.new("bits", "uint16_t", 1, words).place
        to.emit(Unary("Not", out, x.place, words))
        return Bits(out, x.rows, x.width)
    value = x.value
    if isinstance(value, Scalar):
        return Margin(Scalar(-value.value - 1 if value.known else f"(-({value.value}) - 1)"))
    return Margin(number(to, "Sub", Scalar(-1.0), value, "margin"))


def apart(to: Emitter, a: Margin | Bits, b: Margin | Bits) -> Margin | Bits:
    """Where one of two conditions is true and the other is not."""
    return combined(to, "And", combined(to, "Or", a, b), negated(to, combined(to, "And", a, b)))


def chosen(
    to: Emitter, mask: Margin | Bits, yes: Margin | Bits, no: Margin | Bits
) -> Margin | Bits:
    """``yes`` where the mask is true, ``no`` elsewhere, of conditions."""
    return combined(
        to, "Or", combined(to, "And", mask, yes), combined(to, "And", negated(to, mask), no)
    )


def selected(to: Emitter, mask: Bits, yes: Vector, no: Vector | Scalar, hint: str) -> Vector:
    """``yes`` where the mask is true, ``no`` elsewhere."""
    out = to.new(hint, yes.dtype, yes.rows, yes.width)
    bits = _SELECTED_AS.get(yes.dtype)
    if bits and isinstance(no, Scalar) and no.value != 0:
        no = to.filled(no, yes.rows, yes.width, yes.dtype, "number")
    other = no if isinstance(no, Scalar) else no.place
    places = [out.place, yes.place, other]
    if bits:
        places = [replace(x, read_as=bits) if isinstance(x, Slice) else x for x in places]
    to.emit(Select(places[0], mask.place, places[1], places[2], yes.size))
    return out


def branched(to: Emitter, condition: Scalar, yes: Vector, no: Vector, hint: str) -> Vector:
    """One of two vectors, by a number that the whole tile shares: no + (yes − no) would round."""
    out = to.new(hint, yes.dtype, yes.rows, yes.width)
    branches = [to.branch(lambda side=side: to.copied(side, out.place)) for side in (yes, no)]
    to.body.append(If(str(condition.value), *branches))
    return out


def tanh(to: Emitter, x: Vector, hint: str) -> Vector:
    """tanh x = ±(1 − t)/(1 + t) with t = exp(−2|x|)."""
    size = to.unary("Abs", x, "size")
    t = to.unary("Exp", to.with_scalar("Muls", size, Scalar(-2.0), "twice"), "power")
    less = to.with_scalar("Muls", t, Scalar(-1.0), "less")
    over = to.with_scalar("Adds", less, Scalar(1.0), "over")
    under = to.with_scalar("Adds", t, Scalar(1.0), "under")
    positive = number(to, "Div", over, under, "tanh")
    negative = to.with_scalar("Muls", positive, Scalar(-1.0), "negative")
    return selected(to, compared(to, "GE", x, Scalar(0.0)), positive, negative, hint)
