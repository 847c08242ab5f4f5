"""The rule of each primitive: (context, equation, values of the inputs) -> value of the output."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from npu_bridge.dtypes import C_TYPES
from npu_bridge.expressions import Scalar, times
from npu_bridge.lower import conditions, reductions, whole
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
        a, b = _numbers(at, eqn, x)
        return number(at.to, name, a, b, at.hint)

    return rule


def _numbers(at: Context, eqn: Equation, x: list[Value]) -> tuple[Vector | Scalar, ...]:
    """The operands, of one type where they are whole numbers."""
    values = tuple(no_condition(eqn, value) for value in x)
    return whole.of_one_type(at.to, eqn, *values) if eqn.kind == "i" else values


def _unary(name: str) -> Rule:
    return lambda at, eqn, x: at.to.unary(name, vector(eqn, x[0]), at.hint)


def _neg(at: Context, eqn: Equation, x: list[Any]) -> Value:
    value = vector(eqn, _numbers(at, eqn, x)[0])
    # The unit does not multiply bfloat16.
    wide = at.to.cast(value, "float", "wide") if value.dtype == "bfloat16_t" else value
    return at.to.cast(at.to.with_scalar("Muls", wide, Scalar(-1.0), at.hint), value.dtype, at.hint)


def _tanh(at: Context, eqn: Equation, x: list[Any]) -> Value:
    return conditions.tanh(at.to, vector(eqn, x[0]), at.hint)


def _convert(at: Context, eqn: Equation, x: list[Value]) -> Value:
    value, to = x[0], str(eqn.output.aval.dtype)
    if to not in ("float32", "float16", "bfloat16", "int32", "bool"):
        raise LoweringError(f"numbers of type {to} have no instructions here")
    if to == "bool":
        return _truth(at, eqn, value)
    if isinstance(value, Scalar):
        if value.known:
            return Scalar(float(value.value) if "float" in to else int(value.value))
        return Scalar(f"static_cast<float>({value.value})") if "float" in to else value
    if isinstance(value, Vector):
        if to != "int32":
            return at.to.cast(value, C_TYPES[to], at.hint)
        if eqn.of_whole_numbers:  # they stay what they are
            return value
        return whole.rounded(at.to, value, "TRUNC", at.hint, "int32_t")
    return _one_or_zero(at, eqn, value, "float" if to == "int32" else C_TYPES[to])


def _truth(at: Context, eqn: Equation, value: Value) -> Value:
    """Whether a number is not 0."""
    if not isinstance(value, (Scalar, Vector)):
        return value
    if isinstance(value, Scalar):
        return Scalar(value.value != 0 if value.known else f"({value.value} != 0)")
    if eqn.of_whole_numbers:
        return whole.compared(at.to, "NE", value, Scalar(0))
    return conditions.compared(at.to, "NE", value, Scalar(0.0))


def _one_or_zero(at: Context, eqn: Equation, value: Margin | Bits, dtype: str) -> Vector:
    shape = shape_of(eqn.output)
    bits = conditions.bits(at.to, value, *shape)
    wide = "float" if dtype == "bfloat16_t" else dtype
    ones = at.to.filled(Scalar(1.0), *shape, wide, "one")
    found = conditions.selected(at.to, bits, ones, Scalar(0.0), at.hint)
    return at.to.cast(found, dtype, at.hint)


_SWAPPED = {"GE": "LE", "LE": "GE", "GT": "LT", "LT": "GT"}


def _compare(mode: str) -> Rule:
    def rule(at: Context, eqn: Equation, x: list[Value]) -> Value:
        if _of_conditions(eqn, x):
            if mode not in ("EQ", "NE"):
                raise LoweringError(f"{eqn.primitive} of conditions")
            apart = conditions.apart(at.to, *map(_condition, x))
            return apart if mode == "NE" else conditions.negated(at.to, apart)
        a, b = (no_condition(eqn, value) for value in x)
        if eqn.of_whole_numbers:
            return whole.compared(at.to, mode, a, b)
        if isinstance(a, Scalar):
            assert isinstance(b, Vector)
            return conditions.compared(at.to, _SWAPPED.get(mode, mode), b, a)
        return conditions.compared(at.to, mode, a, b)

    return rule


def _of_conditions(eqn: Equation, x: list[Value]) -> bool:
    return any(isinstance(value, (Margin, Bits)) for value in x)


def _condition(x: Value) -> Margin | Bits:
    """A condition; one of the whole tile as a margin."""
    if not isinstance(x, Scalar):
        assert isinstance(x, (Margin, Bits))
        return x
    if x.known:
        return Margin(Scalar(0 if x.value else -1))
    return Margin(Scalar(f"Pick({x.value}, 0, -1)"))


def _logical(name: str) -> Rule:
    def rule(at: Context, eqn: Equation, x: list[Value]) -> Value:
        for a, b in (x, x[::-1]):
            if isinstance(a, Scalar) and a.known and eqn.kind == "b":
                neutral = (name == "And") == bool(a.value)
                return b if neutral else a
        if eqn.kind != "b":
            if name == "And":
                return _of_known(at, eqn, x)
            raise LoweringError(f"the bits of whole numbers have no {eqn.primitive} here")
        return conditions.combined(at.to, name, *map(_condition, x))

    return rule


def _not(at: Context, eqn: Equation, x: list[Value]) -> Value:
    if eqn.kind != "b":
        raise LoweringError("the bits of whole numbers have no not here")
    return conditions.negated(at.to, _condition(x[0]))


def _xor(at: Context, eqn: Equation, x: list[Value]) -> Value:
    if eqn.kind != "b":
        raise LoweringError("the bits of whole numbers have no xor here")
    return conditions.apart(at.to, *map(_condition, x))


def _select(at: Context, eqn: Equation, x: list[Value]) -> Value:
    mask = x[0]
    if isinstance(mask, Scalar) and mask.known:
        return x[2] if mask.value else x[1]
    if len(x) != 3 or eqn.inputs[0].aval.dtype != bool:
        raise LoweringError("one of two is selected by a condition only")
    if eqn.kind == "b":
        return conditions.chosen(at.to, *map(_condition, (mask, x[2], x[1])))
    no, yes = (no_condition(eqn, value) for value in x[1:])
    if eqn.kind == "i":
        no, yes = whole.of_one_type(at.to, eqn, no, yes)
    if isinstance(mask, Scalar):
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
    if isinstance(other, Vector):
        return other.dtype
    return "float" if eqn.kind == "i" else C_TYPES[str(eqn.output.aval.dtype)]


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
    lines = 1 in (rows, width) and 1 in (value.rows, value.width)
    if lines and rows * width == value.rows * value.width:  # rows and columns lie alike
        return type(value)(value.place, rows, width)
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
    return _of_known(at, eqn, x)


def _shift_left(at: Context, eqn: Equation, x: list[Value]) -> Value:
    a, b = x
    if not isinstance(b, Scalar) or not b.known:
        raise LoweringError("whole numbers are shifted by a known number only")
    if isinstance(a, Scalar):
        return Scalar(a.value << b.value if a.known else f"({a.value} * {1 << b.value})")
    value = vector(eqn, whole.of_one_type(at.to, eqn, no_condition(eqn, a))[0])
    return at.to.with_scalar("Muls", value, Scalar(1 << b.value), at.hint)


def _divide(at: Context, eqn: Equation, x: list[Value]) -> Value:
    a, b = x
    if isinstance(a, Scalar) and isinstance(b, Scalar):
        if eqn.kind == "f":
            return Scalar(f"({a.text('float')} / {b.text('float')})")
        return Scalar(f"Div({a.value}, {b.value})")
    if eqn.of_whole_numbers:
        return _of_known(at, eqn, x)
    return _arithmetic("Div")(at, eqn, x)


def _of_known(at: Context, eqn: Equation, x: list[Value]) -> Value:
    """A quotient of whole numbers by a known one, or what is left."""
    if isinstance(x[0], Scalar) and eqn.primitive == "and" and isinstance(x[1], Vector):
        x, eqn = x[::-1], replace(eqn, inputs=eqn.inputs[::-1], spans=_turned(eqn.spans))
    a = no_condition(eqn, x[0])
    if isinstance(a, Scalar):
        return _of_scalars(eqn, a, no_condition(eqn, x[1]))
    return whole.divided(at.to, eqn, a, at.hint)


def _turned(spans: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*spans[1::-1], *spans[2:])


def _of_scalars(eqn: Equation, a: Scalar, b: Vector | Scalar) -> Scalar:
    """The same of numbers that the whole tile shares."""
    if not isinstance(b, Scalar):
        raise LoweringError(f"{eqn.primitive} of whole numbers by others than a known one")
    if eqn.primitive == "rem":
        return Scalar(f"Mod({a.value}, {b.value})")
    if eqn.primitive == "and":
        return Scalar(f"({a.value} & {b.value})")
    # Below 0 too: of C++, the remainder has the sign of what is divided.
    rest = f"Mod(Mod({a.value}, {b.value}) + {b.value}, {b.value})"
    return Scalar(rest if eqn.primitive == "remainder" else f"Div({a.value} - {rest}, {b.value})")


def _sign(at: Context, eqn: Equation, x: list[Value]) -> Value:
    value = vector(eqn, x[0])
    if eqn.kind == "i":
        above = at.to.with_scalar("Maxs", value, Scalar(-1), "above")
        return at.to.with_scalar("Mins", above, Scalar(1), at.hint)
    shape, dtype = (value.rows, value.width), value.dtype
    wide = at.to.cast(value, "float", "wide") if dtype == "bfloat16_t" else value
    for mode, one in (("GT", 1.0), ("LT", -1.0)):  # 0 and NaN stay
        bits = conditions.compared(at.to, mode, value, Scalar(0.0))
        ones = at.to.filled(Scalar(one), *shape, wide.dtype, "one")
        wide = conditions.selected(at.to, bits, ones, wide, at.hint)
    return at.to.cast(wide, dtype, at.hint)


def _rounded(mode: str) -> Rule:
    def rule(at: Context, eqn: Equation, x: list[Value]) -> Value:
        method = eqn.params.get("rounding_method")
        if method is not None and int(method) != 1:
            raise LoweringError("numbers are rounded to even only: use jnp.round")
        return whole.rounded(at.to, vector(eqn, x[0]), mode, at.hint)

    return rule


def _exp2(at: Context, eqn: Equation, x: list[Value]) -> Value:
    value = vector(eqn, x[0])
    scaled = at.to.with_scalar("Muls", value, Scalar(math.log(2)), "natural")
    return at.to.unary("Exp", scaled, at.hint)


def _logistic(at: Context, eqn: Equation, x: list[Value]) -> Value:
    value = vector(eqn, x[0])
    power = at.to.unary("Exp", at.to.with_scalar("Muls", value, Scalar(-1.0), "less"), "power")
    under = at.to.with_scalar("Adds", power, Scalar(1.0), "under")
    return number(at.to, "Div", Scalar(1.0), under, at.hint)


def _rsqrt(at: Context, eqn: Equation, x: list[Value]) -> Value:
    root = at.to.unary("Sqrt", vector(eqn, x[0]), "root")
    return number(at.to, "Div", Scalar(1.0), root, at.hint)


def _square(at: Context, eqn: Equation, x: list[Value]) -> Value:
    value = _numbers(at, eqn, x)[0]
    return number(at.to, "Mul", value, value, at.hint)


def _power(at: Context, eqn: Equation, x: list[Value]) -> Value:
    """x to a whole number, by products."""
    times = int(eqn.params["y"])
    value = _numbers(at, eqn, x)[0]
    if isinstance(value, Scalar):
        raise LoweringError("a power of a number that only the kernel knows")
    if times == 0:
        return Scalar(1.0 if eqn.kind == "f" else 1)
    found, square, left = None, value, abs(times)
    while left:
        if left & 1:
            found = square if found is None else number(at.to, "Mul", found, square, at.hint)
        left >>= 1
        square = number(at.to, "Mul", square, square, "square") if left else square
    assert found is not None
    return found if times > 0 else number(at.to, "Div", Scalar(1.0), found, at.hint)


def _root(at: Context, eqn: Equation, x: list[Value]) -> Value:
    value, by = x
    if not (isinstance(by, Scalar) and by.known and float(by.value) in (0.5, 1.0, 2.0)):
        raise LoweringError("a power is a whole number that Python knows, or 0.5")
    if by.value == 0.5:
        return at.to.unary("Sqrt", vector(eqn, value), at.hint)
    return value if by.value == 1 else number(at.to, "Mul", value, value, at.hint)


def _is_finite(at: Context, eqn: Equation, x: list[Value]) -> Value:
    value = at.to.cast(vector(eqn, x[0]), "float", "wide")
    infinite = 2.0**16 if eqn.inputs[0].aval.dtype == "float16" else math.inf
    size = at.to.unary("Abs", value, "size")  # NaN is not below anything
    return conditions.compared(at.to, "LT", size, Scalar(infinite))


def _clamp(at: Context, eqn: Equation, x: list[Value]) -> Value:
    lo, value, hi = _numbers(at, eqn, x)
    return number(at.to, "Min", number(at.to, "Max", value, lo, "clamped"), hi, at.hint)


RULES: dict[str, Rule] = {
    "abs": lambda at, eqn, x: whole.absolute(at.to, vector(eqn, _numbers(at, eqn, x)[0]), at.hint),
    "add": _arithmetic("Add"),
    "and": _logical("And"),
    "broadcast_in_dim": _broadcast,
    "ceil": _rounded("CEIL"),
    "clamp": _clamp,
    "convert_element_type": _convert,
    "div": _divide,
    "dot_general": _dot,
    "eq": _compare("EQ"),
    "exp": _unary("Exp"),
    "exp2": _exp2,
    "floor": _rounded("FLOOR"),
    "floor_divide": _of_known,
    "ge": _compare("GE"),
    "gt": _compare("GT"),
    "integer_pow": _power,
    "iota": _iota,
    "is_finite": _is_finite,
    "le": _compare("LE"),
    "log": _unary("Ln"),
    "logistic": _logistic,
    "lt": _compare("LT"),
    "max": _arithmetic("Max"),
    "min": _arithmetic("Min"),
    "mul": _arithmetic("Mul"),
    "ne": _compare("NE"),
    "neg": _neg,
    "not": _not,
    "or": _logical("Or"),
    "pow": _root,
    "reduce_max": _reduce("Max"),
    "reduce_sum": _reduce("Add"),
    "rem": _of_known,
    "remainder": _of_known,
    "reshape": _reshape,
    "round": _rounded("RINT"),
    "rsqrt": _rsqrt,
    "select_n": _select,
    "shift_left": _shift_left,
    "shift_right_arithmetic": _shift,
    "sign": _sign,
    "slice": _slice,
    "sqrt": _unary("Sqrt"),
    "square": _square,
    "squeeze": _reshape,
    "sub": _arithmetic("Sub"),
    "tanh": _tanh,
    "transpose": _transpose,
    "xor": _xor,
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
    "floor_divide": "quotient",
    "rem": "rest",
    "remainder": "rest",
    # Words that mean something else to C++.
    "and": "rest",
    "or": "any",
    "xor": "either",
    "not": "negation",
}


def unknown(primitive: str, source: str, function: str = "") -> LoweringError:
    """What is raised for a primitive without a rule."""
    return LoweringError(
        f"the primitive {primitive!r} has no instruction; {origin(source, function)}. "
        f"{way_out(function)}Known are {', '.join(sorted(RULES))}."
    )


def origin(source: str, function: str) -> str:
    """Where an equation comes from, as a clause."""
    where = f"`{function}`, {source}" if function else source
    return f"it comes from {where}"


def way_out(function: str) -> str:
    """What to do about a function that has no instructions, as a sentence; of others, nothing."""
    if not function:
        return ""
    dense = "a bias (bias='BNTS')" if function == "score_mod" else "a mask (mask='BNTS')"
    return (
        "Compute that before the call and give it as q_data, kv_data or head_data, or give the "
        f"whole as {dense}. "
    )
