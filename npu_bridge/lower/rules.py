"""The rule of each primitive: (context, equation, values of the inputs) -> value of the output."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from npu_bridge.dtypes import C_TYPES
from npu_bridge.expressions import Scalar, times
from npu_bridge.lower import conditions, reductions
from npu_bridge.lower.arithmetic import full, number
from npu_bridge.lower.emitter import Emitter
from npu_bridge.lower.values import (
    Bits,
    Equation,
    Margin,
    Value,
    Vector,
    no_condition,
    shape_of,
    vector,
)
from pasa_jax.core.errors import LoweringError


@dataclass(frozen=True)
class Context:
    """What a rule works with.

    Arguments:
      to: takes the instructions.
      hint: how the value is called in the emitted source.
    """

    to: Emitter
    hint: str


Rule = Callable[[Context, Equation, list[Any]], Value]


def _arithmetic(name: str) -> Rule:
    def rule(at: Context, eqn: Equation, x: list[Value]) -> Value:
        a, b = (no_condition(eqn, value) for value in x)
        return number(at.to, name, a, b, at.hint)

    return rule


def _unary(name: str) -> Rule:
    return lambda at, eqn, x: at.to.unary(name, vector(eqn, x[0]), at.hint)


def _neg(at: Context, eqn: Equation, x: list[Any]) -> Value:
    value = vector(eqn, x[0])
    # The unit does not multiply bfloat16.
    wide = at.to.cast(value, "float", "wide") if value.dtype == "bfloat16_t" else value
    return at.to.cast(at.to.with_scalar("Muls", wide, Scalar(-1.0), at.hint), value.dtype, at.hint)


def _tanh(at: Context, eqn: Equation, x: list[Any]) -> Value:
    return conditions.tanh(at.to, vector(eqn, x[0]), at.hint)


def _convert(at: Context, eqn: Equation, x: list[Value]) -> Value:
    value, to = x[0], str(eqn.output.aval.dtype)
    if isinstance(value, Scalar):
        if value.known:
            return Scalar(float(value.value) if "float" in to else int(value.value))
        return Scalar(f"static_cast<float>({value.value})") if "float" in to else value
    if isinstance(value, Vector):
        if to == "int32":  # whole numbers stay float32
            if not eqn.of_whole_numbers:
                raise LoweringError("numbers are not cut to whole ones")
            return value
        return at.to.cast(value, C_TYPES[to], at.hint)
    raise LoweringError("a condition is not converted to a number")


_SWAPPED = {"GE": "LE", "LE": "GE", "GT": "LT", "LT": "GT"}


def _compare(mode: str) -> Rule:
    def rule(at: Context, eqn: Equation, x: list[Value]) -> Value:
        a, b = (no_condition(eqn, value) for value in x)
        if eqn.of_whole_numbers and mode in _SWAPPED:
            if mode in ("LE", "LT"):
                a, b = b, a
            margin = number(at.to, "Sub", a, b, "margin")
            if mode in ("GT", "LT"):
                margin = number(at.to, "Sub", margin, Scalar(1), "margin")
            return Margin(margin)
        if isinstance(a, Scalar):
            assert isinstance(b, Vector)
            return conditions.compared(at.to, _SWAPPED.get(mode, mode), b, a)
        if isinstance(b, Vector) and "int32_t" in (a.dtype, b.dtype):
            # A difference of 32 bits is 0 in float32 only if it is 0.
            apart = at.to.cast(number(at.to, "Sub", a, b, "apart"), "float", "apart")
            return conditions.compared(at.to, mode, apart, Scalar(0.0))
        return conditions.compared(at.to, mode, a, b)

    return rule


def _logical(name: str) -> Rule:
    def rule(at: Context, eqn: Equation, x: list[Value]) -> Value:
        for a, b in (x, x[::-1]):
            if isinstance(a, Scalar) and a.known:
                neutral = (name == "And") == bool(a.value)
                return b if neutral else a
        a, b = (
            Margin(Scalar(f"Pick({v.value}, 0, -1)")) if isinstance(v, Scalar) else v for v in x
        )
        return conditions.combined(at.to, name, a, b)

    return rule


def _select(at: Context, eqn: Equation, x: list[Value]) -> Value:
    mask, no, yes = x[0], *(no_condition(eqn, value) for value in x[1:])
    if isinstance(mask, Scalar):
        if mask.known:
            return yes if mask.value else no
        shapes = [(v.rows, v.width) for v in (no, yes) if isinstance(v, Vector)]
        shape = max(rows for rows, _ in shapes), max(width for _, width in shapes)
        whole_no = full(at.to, no, *shape, _type(eqn, yes))
        whole_yes = full(at.to, yes, *shape, _type(eqn, no))
        return conditions.branched(at.to, mask, whole_yes, whole_no, at.hint)
    rows, width = shape_of(eqn.output)
    bits = conditions.bits(at.to, mask, rows, width)
    yes = full(at.to, yes, rows, width, _type(eqn, no))
    if isinstance(no, Vector):
        no = full(at.to, no, rows, width)
    return conditions.selected(at.to, bits, yes, no, at.hint)


def _type(eqn: Equation, other: Value) -> str:
    """The C++ type of a number beside ``other``; whole numbers are float32."""
    return other.dtype if isinstance(other, Vector) else C_TYPES[str(eqn.output.aval.dtype)]


def _broadcast(at: Context, eqn: Equation, x: list[Value]) -> Value:
    value = x[0].value if isinstance(x[0], Margin) else x[0]
    if not isinstance(value, Scalar):
        shape = eqn.params["shape"]
        lying = [1] * len(shape)
        for axis in eqn.params["broadcast_dimensions"]:
            lying[axis] = shape[axis]
        lying = [n for n, whole in zip(lying, shape, strict=True) if len(shape) <= 2 or whole != 1]
        rows, width = (lying[0], 1) if len(lying) == 1 and value.width == 1 else (1, *lying)[-2:]
        if value.rows not in (1, rows) or value.width not in (1, width):
            raise LoweringError(f"{value.rows} × {value.width} numbers laid along another axis")
    return x[0]  # the instructions that read it broadcast


def _reshape(at: Context, eqn: Equation, x: list[Value]) -> Value:
    value = x[0]
    if not isinstance(value, (Vector, Bits)):
        return value
    rows, width = shape_of(eqn.output)
    if (value.rows, value.width) == (rows, width) or rows * width == value.rows * value.width == 1:
        return value
    raise LoweringError(f"{value.rows} × {value.width} numbers as {rows} × {width}")


def _transpose(at: Context, eqn: Equation, x: list[Value]) -> Value:
    value = vector(eqn, x[0])
    if 1 not in (value.rows, value.width):
        raise LoweringError("only rows and columns are transposed, which lie in memory alike")
    return Vector(value.place, value.width, value.rows)


def _reduce(name: str) -> Rule:
    def rule(at: Context, eqn: Equation, x: list[Value]) -> Value:
        axes, shape = tuple(eqn.params["axes"]), eqn.inputs[0].aval.shape
        if len(shape) != 2 or len(axes) != 1:
            raise LoweringError(f"axes {axes} of {shape} at once")
        value = full(at.to, vector(eqn, x[0]), *shape)  # what is broadcast counts as often
        reduce = reductions.reduce_rows if axes == (0,) else reductions.reduce_columns
        return reduce(at.to, name, value, at.hint)

    return rule


def _iota(at: Context, eqn: Equation, x: list[Value]) -> Value:
    shape, dimension = eqn.params["shape"], eqn.params["dimension"]
    size = shape[dimension]
    if size == 1:
        return Scalar(0)
    along_rows = math.prod(shape[dimension + 1 :]) == 1 and math.prod(shape) == size
    rows, width = (size, 1) if along_rows and shape[-1] == 1 else (1, size)
    if math.prod(shape) != size:
        raise LoweringError(f"an index over {shape} along axis {dimension}")
    return Vector(at.to.ramp(size), rows, width)


def _slice(at: Context, eqn: Equation, x: list[Value]) -> Value:
    value = vector(eqn, x[0])
    start, limit = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,)
    if len(start) != 2 or set(strides) != {1}:
        raise LoweringError(f"a slice with strides {strides} of {len(start)} axes")
    value = full(at.to, value, *eqn.inputs[0].aval.shape)
    (r0, c0), (r1, c1) = start, limit
    if (c0, c1) != (0, value.width):
        raise LoweringError("only whole rows are sliced")
    place = value.place.at(times(r0, value.width), (r1 - r0) * value.width)
    return Vector(place, r1 - r0, value.width)


def _dot(at: Context, eqn: Equation, x: list[Value]) -> Value:
    """A product with one column, which the vector unit computes."""
    a, b = (vector(eqn, value) for value in x)
    column = b.width == 1 and (a.width, 1) == eqn.inputs[1].aval.shape == (b.rows, 1)
    if eqn.params["dimension_numbers"][0] != ((1,), (0,)) or not column:
        raise LoweringError("the vector unit multiplies a tile by one column only")
    dtype = C_TYPES[str(eqn.output.aval.dtype)]
    return reductions.times_column(at.to, a, b, dtype, at.hint)


def _shift(at: Context, eqn: Equation, x: list[Value]) -> Value:
    a, b = x
    if isinstance(a, Scalar) and isinstance(b, Scalar) and b.known:
        if a.known:
            return Scalar(a.value >> b.value)
        return Scalar(f"Div({a.value}, {1 << b.value})")
    raise LoweringError("only indices are shifted")


def _divide(at: Context, eqn: Equation, x: list[Value]) -> Value:
    a, b = x
    if isinstance(a, Scalar) and isinstance(b, Scalar):
        if eqn.kind == "f":
            return Scalar(f"({a.text('float')} / {b.text('float')})")
        return Scalar(f"Div({a.value}, {b.value})")
    if eqn.of_whole_numbers:
        raise LoweringError("whole numbers are divided only if the tile shares them")
    return _arithmetic("Div")(at, eqn, x)


def _clamp(at: Context, eqn: Equation, x: list[Value]) -> Value:
    lo, value, hi = x
    return number(at.to, "Min", number(at.to, "Max", value, lo, "clamped"), hi, at.hint)


RULES: dict[str, Rule] = {
    "abs": _unary("Abs"),
    "add": _arithmetic("Add"),
    "and": _logical("And"),
    "broadcast_in_dim": _broadcast,
    "clamp": _clamp,
    "convert_element_type": _convert,
    "div": _divide,
    "dot_general": _dot,
    "eq": _compare("EQ"),
    "exp": _unary("Exp"),
    "ge": _compare("GE"),
    "gt": _compare("GT"),
    "iota": _iota,
    "le": _compare("LE"),
    "log": _unary("Ln"),
    "lt": _compare("LT"),
    "max": _arithmetic("Max"),
    "min": _arithmetic("Min"),
    "mul": _arithmetic("Mul"),
    "ne": _compare("NE"),
    "neg": _neg,
    "or": _logical("Or"),
    "reduce_max": _reduce("Max"),
    "reduce_sum": _reduce("Add"),
    "reshape": _reshape,
    "select_n": _select,
    "shift_right_arithmetic": _shift,
    "slice": _slice,
    "sqrt": _unary("Sqrt"),
    "square": lambda at, eqn, x: number(at.to, "Mul", x[0], x[0], at.hint),
    "squeeze": _reshape,
    "sub": _arithmetic("Sub"),
    "tanh": _tanh,
    "transpose": _transpose,
}
# How values are called in the emitted source, by the primitive that makes them.
NAMES = {
    "reduce_max": "row_max",
    "reduce_sum": "row_sum",
    "exp": "exponential",
    "log": "logarithm",
    "convert_element_type": "cast",
    "select_n": "chosen",
    "dot_general": "dot",
    "max": "larger",
    "min": "smaller",
    "div": "quotient",
}


def unknown(primitive: str, source: str) -> LoweringError:
    """What is raised for a primitive without a rule."""
    return LoweringError(
        f"the primitive {primitive!r} has no instruction; it comes from {source}. "
        f"Known are {', '.join(sorted(RULES))}."
    )
