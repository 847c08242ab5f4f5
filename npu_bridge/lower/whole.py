"""Whole numbers: indices, held as float32, and int32_t, which data are and large numbers become."""

from __future__ import annotations

from npu_bridge.expressions import Scalar
from npu_bridge.instructions import Cast
from npu_bridge.lower import conditions
from npu_bridge.lower.arithmetic import number
from npu_bridge.lower.emitter import Emitter
from npu_bridge.lower.ranges import EXACT, EXACT_DIVISIONS, divisible, divisor
from npu_bridge.lower.values import Equation, Margin, Value, Vector
from pasa_jax.core.errors import LoweringError

_INT = "int32_t"
_SWAPPED = {"GE": "LE", "LE": "GE", "GT": "LT", "LT": "GT"}


def of_one_type(to: Emitter, eqn: Equation, *x: Vector | Scalar) -> tuple[Vector | Scalar, ...]:
    """Operands as int32_t where one of them is, or where float32 may not hold the result."""
    large = bool(eqn.spans) and eqn.spans[-1] is None
    if not large and not any(_is_int(v) for v in x):
        return x
    return tuple(to.cast(v, _INT, "whole") if isinstance(v, Vector) else v for v in x)


def _is_int(x: Vector | Scalar) -> bool:
    return isinstance(x, Vector) and x.dtype == _INT


def _any_size(x: Vector | Scalar) -> bool:
    """Whether x may be a number that float32 does not hold."""
    if isinstance(x, Scalar):
        return not x.known or abs(x.value) > EXACT
    return _is_int(x)


def compared(to: Emitter, mode: str, a: Vector | Scalar, b: Vector | Scalar) -> Value:
    """Whether two whole numbers compare as ``mode`` says.

    Beside an index any int32 may be rounded to float32: that changes no comparison.
    """
    ints = (_is_int(a) and _any_size(b)) or (_is_int(b) and _any_size(a))
    if ints and mode in _SWAPPED:
        return _of_ints(to, mode, a, b)
    if ints and "uint8_t" not in (x.dtype for x in (a, b) if isinstance(x, Vector)):
        # A difference of 32 bits is 0 in float32 only if it is 0.
        apart = to.cast(number(to, "Sub", a, b, "apart"), "float", "apart")
        return conditions.compared(to, mode, apart, Scalar(0.0))
    a, b = (to.cast(x, "float", "wide") if _is_int(x) else x for x in (a, b))  # type: ignore[arg-type]
    if mode in _SWAPPED:
        if mode in ("LE", "LT"):
            a, b = b, a
        margin = number(to, "Sub", a, b, "margin")
        if mode in ("GT", "LT"):
            margin = number(to, "Sub", margin, Scalar(1), "margin")
        return Margin(margin)
    if isinstance(a, Scalar):
        assert isinstance(b, Vector)
        return conditions.compared(to, mode, b, a)
    return conditions.compared(to, mode, a, b)


def _of_ints(to: Emitter, mode: str, a: Vector | Scalar, b: Vector | Scalar) -> Value:
    """a ≤ b where the larger of both is b; a difference of any two int32 may not fit."""
    if mode in ("GE", "GT"):
        mode, a, b = _SWAPPED[mode], b, a
    top = number(to, "Max", a, b, "larger")
    apart = number(to, "Sub", top, b if mode == "LE" else a, "apart")
    wide = to.cast(apart, "float", "apart")
    return conditions.compared(to, "EQ" if mode == "LE" else "NE", wide, Scalar(0.0))


def absolute(to: Emitter, x: Vector, hint: str) -> Vector:
    """|x|; of int32_t there is no instruction for it."""
    if x.dtype != _INT:
        return to.unary("Abs", x, hint)
    return number(to, "Max", x, to.with_scalar("Muls", x, Scalar(-1), "negative"), hint)


def divided(to: Emitter, eqn: Equation, x: Vector, hint: str) -> Vector:
    """The quotient of whole numbers by one that is known, or what is left of it.

    Raises:
      LoweringError: it is not exact in float32.
    """
    by = divisor(eqn)
    if by is None or not divisible(eqn):
        raise LoweringError(f"{eqn.primitive} of whole numbers: {EXACT_DIVISIONS}")
    span = eqn.spans[0]
    assert span is not None
    x = to.cast(x, "float", "wide")
    cut = eqn.primitive in ("div", "rem") and span[0] < 0  # towards zero
    quotient = _towards_zero(to, x, by) if cut else _floor(to, x, by)
    if eqn.primitive in ("rem", "remainder", "and"):
        times = to.with_scalar("Muls", quotient, Scalar(float(by)), "multiple")
        return number(to, "Sub", x, times, hint)
    return quotient


def _floor(to: Emitter, x: Vector, by: int) -> Vector:
    """⌊x/by⌋. Half a step more keeps the rounding of 1/by from the next whole number."""
    if by & (by - 1):
        x = to.with_scalar("Adds", x, Scalar(0.5), "middle")
    return rounded(to, to.with_scalar("Muls", x, Scalar(1 / by), "quotient"), "FLOOR", "quotient")


def _towards_zero(to: Emitter, x: Vector, by: int) -> Vector:
    positive = _floor(to, to.unary("Abs", x, "size"), by)
    negative = to.with_scalar("Muls", positive, Scalar(-1.0), "negative")
    above = conditions.compared(to, "GE", x, Scalar(0.0))
    return conditions.selected(to, above, positive, negative, "quotient")


def rounded(to: Emitter, x: Vector, mode: str, hint: str, dtype: str = "float") -> Vector:
    """x as a whole number: "FLOOR", "CEIL", "RINT" or "TRUNC"."""
    narrow = x.dtype
    x = to.cast(x, "float", "wide")
    out = to.new(hint, dtype, x.rows, x.width)
    to.emit(Cast(out.place, x.place, x.size, mode))
    return out if dtype == _INT else to.cast(out, narrow, hint)
