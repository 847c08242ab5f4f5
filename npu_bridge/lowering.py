"""Lowers a jaxpr on one tile to vector instructions.

The tile functions of `pasa_jax` are traced on a slab of rows; every equation becomes one or a few
instructions of the vector unit. Values are tiles [rows, width], columns [rows, 1], rows [1, width]
or scalars; a broadcast is never materialised, the repeat strides of the instruction do it.

Whole numbers (positions) are held as float32, exact to 2^24. What is true where one of them is at
least another is held as their difference, so that conditions on rows and columns broadcast like
numbers and "and" is a minimum; it becomes bits where it selects.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from npu_bridge.ir import (
    C_TYPES,
    ITEMSIZE,
    Barrier,
    Buffer,
    Expr,
    For,
    Instruction,
    Let,
    Node,
    Slice,
    times,
)
from pasa_jax.core.errors import LoweringError, PlanError

_REDUCES = {"Max": "Max", "Min": "Min", "Add": "Sum"}
BLOCK, REPEAT = 32, 256  # bytes of a block, and of a vector instruction's repeat


@dataclass(frozen=True)
class Scalar:
    """A number: a Python one, or an expression."""

    value: Any

    @property
    def known(self) -> bool:
        return not isinstance(self.value, str)

    def text(self, dtype: str) -> str:
        """As C++ writes it."""
        if not self.known:
            return f"static_cast<{dtype}>({self.value})"
        if dtype == "float":
            return _float(float(np.float32(self.value)))
        return f"{dtype}({_float(float(self.value))})"


def _float(x: float) -> str:
    if math.isinf(x):
        return "-INFINITY" if x < 0 else "INFINITY"
    text = repr(x)
    return f"{text}f" if "." in text or "e" in text else f"{text}.0f"


@dataclass(frozen=True)
class Vector:
    """Numbers in UB: ``rows`` × ``width``, each of which may be 1."""

    place: Slice
    rows: int
    width: int

    @property
    def dtype(self) -> str:
        return self.place.dtype or self.place.buffer.dtype

    @property
    def size(self) -> int:
        return self.rows * self.width


@dataclass(frozen=True)
class Margin:
    """True where the whole number is at least 0."""

    value: Vector | Scalar


@dataclass(frozen=True)
class Bits:
    """True where the bit is set: of rows × width numbers, in order."""

    place: Slice
    rows: int
    width: int


Value = Scalar | Vector | Margin | Bits


@dataclass(eq=False, frozen=True)
class Var:
    """A traced value. (jax's own stand for several where an inner function is called twice.)"""

    aval: Any


@dataclass(frozen=True)
class Equation:
    """One equation, its inner functions expanded."""

    primitive: str
    inputs: tuple[Any, ...]  # Var or Scalar
    output: Var
    params: dict[str, Any]
    source: str


def flatten(closed: ClosedJaxpr) -> tuple[list[Var], list[Equation], list[Any]]:
    """Inputs, equations and outputs of a jaxpr; products by 1 and casts to the same type are left
    out.
    """
    equations: list[Equation] = []
    names: dict[Any, Any] = {}

    def look(x: Any) -> Any:
        if isinstance(x, Literal):
            return Scalar(np.asarray(x.val).item())
        return names[x]

    def expand(jaxpr: Jaxpr, inputs: Sequence[Any], caller: str) -> list[Any]:
        names.update(zip(jaxpr.invars, inputs, strict=True))
        for eqn in jaxpr.eqns:
            values = [look(x) for x in eqn.invars]
            source = _source(eqn.source_info.traceback) or caller
            inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            if eqn.primitive.name in _CALLS and inner is not None:
                consts = inner.consts if isinstance(inner, ClosedJaxpr) else []
                body = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
                names.update(
                    zip(body.constvars, (Scalar(np.asarray(c).item()) for c in consts), strict=True)
                )
                names.update(zip(eqn.outvars, expand(body, values, source), strict=True))
                continue
            if len(eqn.outvars) != 1:
                raise _unknown(eqn.primitive.name, source)
            (out,) = eqn.outvars
            same = _unchanged(eqn.primitive.name, values, out, eqn)
            if same is not None:
                names[out] = same
                continue
            names[out] = Var(out.aval)
            equations.append(
                Equation(eqn.primitive.name, tuple(values), names[out], eqn.params, source)
            )
        return [look(x) for x in jaxpr.outvars]

    jaxpr = closed.jaxpr
    for var, const in zip(jaxpr.constvars, closed.consts, strict=True):
        names[var] = Scalar(np.asarray(const).item())
    inputs = [Var(x.aval) for x in jaxpr.invars]
    return inputs, equations, expand(jaxpr, inputs, "an unknown place")


# What calls a function once, which is expanded in its place. (A scan has a function too.)
_CALLS = {
    "jit", "pjit", "closed_call", "core_call", "checkpoint", "custom_jvp_call", "custom_vjp_call",
}  # fmt: skip
_JAX = os.path.dirname(jax.__file__) + os.sep


def _source(traceback: Any) -> str:
    """The line outside of jax that an equation comes from; empty where jax alone made it."""
    lines = str(traceback or "").splitlines()
    return next((line for line in lines if not line.startswith(_JAX)), "")


def _unknown(primitive: str, source: str) -> LoweringError:
    return LoweringError(
        f"the primitive {primitive!r} has no instruction; it comes from {source}. "
        f"Known are {', '.join(sorted(RULES))}."
    )


def _unchanged(name: str, values: list[Any], out: Any, eqn: Any) -> Any:
    """The input that the equation returns as it is, or None."""
    if name in ("stop_gradient", "copy"):
        return values[0]
    if name == "convert_element_type" and eqn.invars[0].aval.dtype == out.aval.dtype:
        return values[0]
    if name == "broadcast_in_dim" and isinstance(values[0], Scalar):
        return values[0]  # of any shape
    if name in ("add", "sub") and isinstance(values[1], Scalar) and values[1].value == 0:
        whole = out.aval.dtype.kind in "iu"  # 0.0 is added to tell −0 from 0
        return values[0] if whole else None
    if name == "mul":
        for a, b in (values, values[::-1]):
            if isinstance(a, Scalar) and a.known and a.value == 1 and isinstance(b, Var):
                same = math.prod(b.aval.shape) == math.prod(out.aval.shape)
                return b if same else None
    return None


class Lowering:
    """Lowers equations on tiles of ``rows`` rows.

    Arguments:
      allocate: makes a buffer in UB of a name, a C++ type and a number of elements.
      inputs: what the variables that are not computed here are.
      outputs: where a variable must be left, if it matters.
    """

    def __init__(
        self,
        rows: int,
        allocate: Callable[[str, str, int], Buffer],
        inputs: dict[Var, Value],
        *,
        names: dict[Var, str] | None = None,
        prefix: str = "n",
    ) -> None:
        self.rows = rows
        self.values: dict[Var, Value] = dict(inputs)
        self.body: list[Node] = []
        self._allocate = allocate
        self._names = names or {}
        self._spread: dict[tuple[Slice, str], Slice] = {}
        self._counts: dict[str, int] = {}
        self._padded: dict[Slice, Vector] = {}
        self._prefix = prefix

    # Equations.

    def lower(self, equations: list[Equation]) -> None:
        selecting = _only_select(equations)
        for eqn in equations:
            rule = RULES.get(eqn.primitive)
            if rule is None:
                raise _unknown(eqn.primitive, eqn.source)
            inputs = [x if isinstance(x, Scalar) else self.values[x] for x in eqn.inputs]
            if _of_scalars(eqn, inputs):
                self.values[eqn.output] = self._named(_scalar(eqn, inputs), eqn)
            else:
                try:
                    value = rule(self, eqn, inputs)
                except LoweringError as error:
                    raise LoweringError(f"{error}; it comes from {eqn.source}") from None
                if isinstance(value, Scalar) and not str(value.value).isidentifier():
                    value = self._named(value, eqn)
                if isinstance(value, Margin) and eqn.output in selecting:
                    value = self.bits(value, *self.shape(eqn.output))  # which are far smaller
                self.values[eqn.output] = value

    def _named(self, x: Scalar, eqn: Equation) -> Scalar:
        """A number that is computed, under a name of its own."""
        if x.known:
            return x
        kind = eqn.output.aval.dtype.kind
        count = self._counts[self._prefix] = self._counts.get(self._prefix, 0) + 1
        name = f"{self._prefix}{count}"
        ctype = {"f": "float", "b": "bool"}.get(kind, "int32_t")
        self.body.append(Let(name, str(x.value), ctype))
        return Scalar(name)

    def value(self, x: Any) -> Value:
        return x if isinstance(x, Scalar) else self.values[x]

    # What instructions are made of.

    def emit(
        self, text: str, writes: tuple[Slice, ...], reads: tuple[Slice, ...], work: Expr
    ) -> None:
        self.body.append(Instruction(text, "V", writes, reads, work))

    def new(self, hint: str, dtype: str, rows: int, width: int) -> Vector:
        padded = -(-rows * width * ITEMSIZE[dtype] // BLOCK) * BLOCK // ITEMSIZE[dtype]
        return Vector(self._allocate(hint, dtype, padded).at(0, rows * width), rows, width)

    def hint(self, eqn: Equation) -> str:
        return self._names.get(eqn.output, NAMES.get(eqn.primitive, eqn.primitive))

    def shape(self, var: Any) -> tuple[int, int]:
        """Rows and width of a traced shape: [R, n], [R], [1, n], []."""
        shape = tuple(n for n in var.aval.shape)
        if len(shape) <= 1:
            return (shape[0], 1) if shape else (1, 1)
        if len(shape) > 2:
            shape = tuple(n for n in shape if n != 1) or (1,)
            return (shape[0], 1) if len(shape) == 1 else shape[:2]
        return shape[0], shape[1]

    def unary(self, name: str, x: Vector, hint: str, extra: str = "") -> Vector:
        out = self.new(hint, x.dtype, x.rows, x.width)
        self.emit(
            f"{name}({out.place}, {x.place}{extra}, {x.size})",
            (out.place,),
            (x.place,),
            x.size * ITEMSIZE[x.dtype],
        )
        return out

    def with_scalar(self, name: str, x: Vector, scalar: Scalar, hint: str) -> Vector:
        return self.unary(name, x, hint, f", {scalar.text(x.dtype)}")

    def filled(self, scalar: Scalar, rows: int, width: int, dtype: str, hint: str) -> Vector:
        out = self.new(hint, dtype, rows, width)
        size = rows * width
        self.emit(
            f"Duplicate({out.place}, {scalar.text(dtype)}, {size})",
            (out.place,),
            (),
            size * ITEMSIZE[dtype],
        )
        return out

    def full(
        self, x: Vector | Scalar, rows: int, width: int, dtype: str = "", hint: str = "full"
    ) -> Vector:
        """x as [rows, width] numbers in memory, for what cannot broadcast."""
        if isinstance(x, Scalar):
            return self.filled(x, rows, width, dtype, "number")
        if (x.rows, x.width) == (rows, width):
            return x
        zero = self.filled(Scalar(0), x.rows, x.width, x.dtype, "zero")
        return self.binary("Add", x, zero, hint, rows, width)

    def spread(self, x: Vector) -> Slice:
        """A column as one block a row, all of whose numbers are the row's."""
        key = (x.place, x.dtype)
        if key not in self._spread:
            each = BLOCK // ITEMSIZE[x.dtype]
            out = self.new("rows", x.dtype, x.rows, each)
            if x.rows % 8:
                raise LoweringError(f"a column of {x.rows} rows cannot be spread: 8 at a time are")
            self.emit(
                f"Brcb({out.place}, {x.place}, {x.rows // 8}, {{1, 8}})",
                (out.place,),
                (x.place,),
                x.rows * BLOCK,
            )
            self._spread[key] = out.place
        return self._spread[key]

    def binary(
        self, name: str, a: Vector, b: Vector, hint: str, rows: int = 1, width: int = 1
    ) -> Vector:
        """``name`` of two vectors, whichever of them is broadcast, [rows, width] at least."""
        rows, width = max(a.rows, b.rows, rows), max(a.width, b.width, width)
        if a.dtype != b.dtype:
            raise LoweringError(f"{name} of {a.dtype} and {b.dtype}")
        out = self.new(hint, a.dtype, rows, width)
        item = ITEMSIZE[a.dtype]
        if (a.rows, a.width) == (b.rows, b.width) == (rows, width):
            self.emit(
                f"{name}({out.place}, {a.place}, {b.place}, {out.size})",
                (out.place,),
                (a.place, b.place),
                out.size * item,
            )
            return out
        if width * item % BLOCK:
            raise LoweringError(f"a row of {width} {a.dtype} is not whole blocks of {BLOCK} bytes")
        sides = [self._strides(x, rows, width) for x in (a, b)]
        each = min(width, REPEAT // item)
        per_row = width * item // BLOCK
        for start, stop in _repeats(rows):
            self._by_lanes(name, out, sides, each, per_row, start, stop)
        return out

    def _strides(self, x: Vector, rows: int, width: int) -> tuple[Slice, int, int, bool]:
        """Where an operand is read from, its strides in blocks within and between repeats, and
        whether it goes along with the lanes.
        """
        item = ITEMSIZE[x.dtype]
        if x.width == 1 and width > 1:
            if x.rows == 1:
                raise LoweringError("one number in memory is not broadcast")
            return self.spread(x), 0, 1, False
        step = 0 if x.rows == 1 and rows > 1 else x.width * item // BLOCK
        return x.place, 1, step, True

    def _by_lanes(
        self,
        name: str,
        out: Vector,
        sides: list[tuple[Slice, int, int, bool]],
        each: int,
        per_row: int,
        start: int,
        stop: int,
    ) -> None:
        """The instruction of ``each`` lanes of rows [start, stop), for all lanes."""
        blocks = REPEAT // BLOCK
        item = ITEMSIZE[out.dtype]

        def place(side: tuple[Slice, int, int, bool], lane: Expr) -> Slice:
            s, _, step, along = side
            s = s.at(start * step * BLOCK // item)
            return s.at(lane) if along else s

        def instruction(lane: Expr) -> Instruction:
            dst = out.place.at(start * out.width).at(lane)
            a, b = (place(side, lane) for side in sides)
            (_, ab, ar, _), (_, bb, br, _) = sides
            strides = f"{{1, {ab}, {bb}, {per_row}, {ar}, {br}}}"
            return Instruction(
                f"{name}({dst}, {a}, {b}, {each}, {stop - start}, {strides})",
                "V",
                (out.place,),
                (sides[0][0], sides[1][0]),
                (stop - start) * REPEAT,
            )

        if max(per_row, blocks) > 255:
            raise PlanError(
                f"rows of {out.width} {out.dtype} are longer than 255 blocks, a repeat stride"
            )
        if out.width == each:
            self.body.append(instruction(0))
        else:
            if out.width % each:
                raise LoweringError(f"{out.width} columns are no multiple of {each}")
            self.body.append(For("lane", 0, out.width, [instruction("lane")], each))

    def reduce(self, name: str, x: Vector, hint: str) -> Vector:
        """The column of row maxima or sums: the repeats of a row first, then within one."""
        each = REPEAT // ITEMSIZE[x.dtype]
        if x.rows > 255:
            raise LoweringError(f"{x.rows} rows are not reduced: at most 255 repeats are")
        if x.width > each:
            x = self._folded(name, x, each)
        half_blocks = x.width * ITEMSIZE[x.dtype] % BLOCK != 0 and x.width % 8 == 0
        # A maximum is the same number in float32; 8 numbers are a whole block there.
        if x.dtype == "half" and (name != "Add" or half_blocks):
            x = self._folded(name, x, 64) if x.width > 64 else x
            return self.cast(self.reduce(name, self.cast(x, "float", "wide"), hint), "half", hint)
        if x.dtype == "float" and x.width in (8, 64) and x.rows % 8 == 0:
            return self._by_blocks(name, x, hint)
        if x.width * ITEMSIZE[x.dtype] % BLOCK:
            raise LoweringError(
                f"a row of {x.width} {x.dtype} is not whole blocks of {BLOCK} bytes"
            )
        out = self.new(hint, x.dtype, x.rows, 1)
        order = "" if name == "Add" else ", ReduceOrder::ORDER_ONLY_VALUE"
        blocks = x.width * ITEMSIZE[x.dtype] // BLOCK
        self.emit(
            f"WholeReduce{_REDUCES[name]}<{x.dtype}>({out.place}, {x.place}, {x.width}, {x.rows}, "
            f"1, 1, {blocks}{order})",
            (out.place,),
            (x.place,),
            x.rows * REPEAT,
        )
        return out

    def _folded(self, name: str, x: Vector, width: int) -> Vector:
        """[rows, width]: the stretches of ``width`` columns of x, all in one."""
        item = ITEMSIZE[x.dtype]
        if x.width % width:
            raise LoweringError(f"{x.width} columns are no multiple of {width}")
        part = self.new("lanes", x.dtype, x.rows, width)
        to, source = width * item // BLOCK, x.width * item // BLOCK

        def fold(a: Slice, b: Slice, step: int, reads: tuple[Slice, ...]) -> Instruction:
            return Instruction(
                f"{name}({part.place}, {a}, {b}, {width}, {x.rows}, "
                f"{{1, 1, 1, {to}, {step}, {source}}})",
                "V",
                (part.place,),
                reads,
                x.rows * REPEAT,
            )

        self.body.append(fold(x.place, x.place.at(width), source, (x.place,)))
        if x.width > 2 * width:
            more = fold(part.place, x.place.at("lane"), to, (x.place, part.place))
            self.body.append(For("lane", 2 * width, x.width, [Barrier("V"), more], width))
        return part

    def _by_blocks(self, name: str, x: Vector, hint: str) -> Vector:
        """The column of a float32 tile of 64 or 8 columns: eight of them become one, and again.
        (A repeat of this takes a cycle, where reducing it whole takes seven.)
        """
        while x.width > 1:
            last = x.width == 8
            out = self.new(hint if last else "blocks", "float", x.rows, x.width // 8)
            repeats = x.size // 64
            self.emit(
                f"BlockReduce{_REDUCES[name]}<float>({out.place}, {x.place}, {repeats}, 64, "
                "1, 1, 8)",
                (out.place,),
                (x.place,),
                repeats * REPEAT,
            )
            x = out
        return x

    def cast(self, x: Vector, dtype: str, hint: str) -> Vector:
        if x.dtype == dtype:
            return x
        if {x.dtype, dtype} == {"half", "bfloat16_t"}:
            x = self.cast(x, "float", hint)
        out = self.new(hint, dtype, x.rows, x.width)
        mode = "CAST_NONE" if ITEMSIZE[dtype] > ITEMSIZE[x.dtype] else "CAST_RINT"
        self.emit(
            f"Cast({out.place}, {x.place}, RoundMode::{mode}, {x.size})",
            (out.place,),
            (x.place,),
            x.size * 4,
        )
        return out

    def copied(self, x: Vector, to: Slice) -> None:
        """Leaves x in ``to``."""
        zero = Scalar(0).text(x.dtype)
        self.emit(
            f"Adds({to}, {x.place}, {zero}, {x.size})",
            (replace(to, count=x.size),),
            (x.place,),
            x.size * ITEMSIZE[x.dtype],
        )

    # Conditions.

    def bits(self, x: Value, rows: int, width: int) -> Bits:
        """A condition as bits of all ``rows`` × ``width``."""
        if isinstance(x, Bits):
            if (x.rows, x.width) == (rows, width):
                return x
            zero = self.filled(Scalar(0), x.rows, x.width, "float", "zero")
            x = Margin(self.selected(x, zero, Scalar(-1.0), "margin"))
        if not isinstance(x, Margin):
            raise LoweringError(f"{x} is no condition")
        value = x.value
        if isinstance(value, Scalar):
            value = self.filled(value, rows, width, "float", "margin")
        return self.compared("GE", self.full(value, rows, width, hint="margin"), Scalar(0.0))

    def compared(self, mode: str, x: Vector, y: Vector | Scalar) -> Bits:
        """Bits of whole repeats: beyond a short column stand zeros."""
        if isinstance(y, Vector):
            shape = max(x.rows, y.rows), max(x.width, y.width)
            x, y = self.full(x, *shape), self.full(y, *shape)
        x, rows, width = self._whole(x), x.rows, x.width
        words = x.size // 16
        place = self.new("bits", "uint16_t", 1, words).place
        bytes_ = place.of_type("uint8_t")
        if isinstance(y, Scalar):
            name, other, reads = "CompareScalar", y.text(x.dtype), (x.place,)
        else:
            y = self._whole(y)
            name, other, reads = "Compare", str(y.place), (x.place, y.place)
        self.emit(
            f"{name}({bytes_}, {x.place}, {other}, CMPMODE::{mode}, {x.size})",
            (place,),
            reads,
            x.size * ITEMSIZE[x.dtype],
        )
        return Bits(place, rows, width)

    def _whole(self, x: Vector) -> Vector:
        """x, filled up with zeros to whole repeats."""
        each = REPEAT // ITEMSIZE[x.dtype]
        size = -(-x.size // each) * each
        if size == x.size:
            return x
        if x.place not in self._padded:
            out = self.filled(Scalar(0), size, 1, x.dtype, "padded")
            self.copied(x, replace(out.place, count=x.size))
            self._padded[x.place] = out
        return self._padded[x.place]

    def combined(self, name: str, a: Value, b: Value) -> Value:
        """ "And" or "Or" of two conditions."""
        if isinstance(a, Margin) and isinstance(b, Margin):
            op = {"And": "Min", "Or": "Max"}[name]
            return Margin(_number(self, op, a.value, b.value, "margin"))
        sides = [x.value if isinstance(x, Margin) else x for x in (a, b)]
        shapes = [(x.rows, x.width) for x in sides if not isinstance(x, Scalar)]
        shape = max(rows for rows, _ in shapes), max(width for _, width in shapes)
        a, b = (self.bits(x, *shape) for x in (a, b))
        words = int(min(a.place.count, b.place.count))
        out = self.new("bits", "uint16_t", 1, words).place
        self.emit(
            f"{name}({out}, {a.place}, {b.place}, {words})", (out,), (a.place, b.place), words * 2
        )
        return Bits(out, a.rows, a.width)

    def selected(self, mask: Bits, yes: Vector, no: Vector | Scalar, hint: str) -> Vector:
        out = self.new(hint, yes.dtype, yes.rows, yes.width)
        mode = "TENSOR_SCALAR" if isinstance(no, Scalar) else "TENSOR_TENSOR"
        other = no.text(yes.dtype) if isinstance(no, Scalar) else str(no.place)
        reads = (mask.place, yes.place, *(() if isinstance(no, Scalar) else (no.place,)))
        size = yes.size * ITEMSIZE[yes.dtype]
        self.emit(
            f"Select({out.place}, {mask.place.of_type('uint8_t')}, {yes.place}, {other}, "
            f"SELMODE::VSEL_{mode}_MODE, {yes.size})",
            (out.place,),
            reads,
            size,
        )
        return out


def _only_select(equations: list[Equation]) -> set[Any]:
    """The conditions that are used for nothing but to select."""
    uses: dict[Any, set[bool]] = {}
    for eqn in equations:
        for i, x in enumerate(eqn.inputs):
            uses.setdefault(x, set()).add(eqn.primitive == "select_n" and i == 0)
    return {x for x, selects in uses.items() if selects == {True}}


def _repeats(rows: int) -> list[tuple[int, int]]:
    """Rows in runs that one instruction's repeat count, 255 at most, can hold."""
    return [(start, min(start + 248, rows)) for start in range(0, rows, 248)]


# Scalars.


def _infix(symbol: str) -> Callable[..., str]:
    return lambda *x: "(" + f" {symbol} ".join(x) + ")"


def _call(name: str) -> Callable[..., str]:
    return lambda *x: f"{name}({', '.join(x)})"


SCALAR_RULES: dict[str, Callable[..., str]] = {
    "add": _infix("+"),
    "sub": _infix("-"),
    "mul": _infix("*"),
    "max": _call("Max"),
    "min": _call("Min"),
    "ge": _infix(">="),
    "gt": _infix(">"),
    "le": _infix("<="),
    "lt": _infix("<"),
    "eq": _infix("=="),
    "ne": _infix("!="),
    "neg": lambda x: f"(-({x}))",
    "and": _infix("&"),
    "or": _infix("|"),
    "select_n": lambda c, no, yes: f"Pick({c}, {yes}, {no})",
}
# Those of numbers that are not whole, where they differ.
_FLOAT_RULES: dict[str, Callable[..., str]] = {
    "max": _call("MaxFloat"),
    "min": _call("MinFloat"),
    "select_n": lambda c, no, yes: f"PickFloat({c}, {yes}, {no})",
}
_KNOWN: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "max": max,
    "min": min,
    "div": lambda a, b: a // b if isinstance(a, int) else a / b,
    "ge": lambda a, b: a >= b,
    "gt": lambda a, b: a > b,
    "le": lambda a, b: a <= b,
    "lt": lambda a, b: a < b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "neg": lambda a: -a,
    "tanh": math.tanh,
    "exp": math.exp,
}


def _of_scalars(eqn: Equation, inputs: list[Any]) -> bool:
    """Whether an equation is one of numbers that the whole tile shares."""
    if not inputs or not all(isinstance(x, Scalar) for x in inputs):
        return False
    return eqn.primitive in SCALAR_RULES or (
        eqn.primitive in _KNOWN and eqn.primitive != "div" and all(x.known for x in inputs)
    )


def _scalar(eqn: Equation, inputs: list[Any]) -> Scalar:
    name = eqn.primitive
    if all(x.known for x in inputs) and name in _KNOWN:
        value = _KNOWN[name](*(x.value for x in inputs))
        dtype = eqn.output.aval.dtype
        return Scalar(dtype.type(value).item() if dtype.kind == "f" else value)
    texts = [str(x.value) if not isinstance(x.value, bool) else str(int(x.value)) for x in inputs]
    if eqn.output.aval.dtype.kind == "f":
        if name == "select_n":
            texts[1:] = [x.text("float") for x in inputs[1:]]
        else:
            texts = [x.text("float") for x in inputs]
        rule = _FLOAT_RULES.get(name, SCALAR_RULES[name])
        return Scalar(rule(*texts))
    return Scalar(SCALAR_RULES[name](*texts))


# Rules: (lowering, equation, inputs) -> value.


def _whole(eqn: Equation) -> bool:
    """Whether an equation's operands are whole numbers, which are held as float32."""
    return any(
        np.dtype(getattr(getattr(x, "aval", None), "dtype", "f4")).kind in "iu" for x in eqn.inputs
    )


def _number(low: Lowering, name: str, a: Value, b: Value, hint: str) -> Any:
    """Add, Sub, Mul, Div, Max or Min of vectors and scalars."""
    if isinstance(a, Scalar) and isinstance(b, Scalar):
        raise LoweringError(f"{name} of two numbers that only the kernel knows")
    if isinstance(b, Scalar):
        assert isinstance(a, Vector)
        if name == "Sub" and b.known:
            return low.with_scalar("Adds", a, Scalar(-b.value), hint)
        if name == "Sub":
            return low.with_scalar("Adds", a, Scalar(f"(-({b.value}))"), hint)
        if name in ("Add", "Mul", "Max", "Min"):
            return low.with_scalar(f"{name}s", a, b, hint)
        if b.known and math.frexp(b.value)[0] == 0.5:
            return low.with_scalar("Muls", a, Scalar(1 / b.value), hint)
        return low.binary(name, a, low.filled(b, a.rows, a.width, a.dtype, "number"), hint)
    assert isinstance(b, Vector)
    if isinstance(a, Scalar):
        if name in ("Add", "Mul", "Max", "Min"):
            return low.with_scalar(f"{name}s", b, a, hint)
        if name == "Sub":
            negative = low.with_scalar("Muls", b, Scalar(-1.0), hint)
            return low.with_scalar("Adds", negative, a, hint)
        return low.binary(name, low.filled(a, b.rows, b.width, b.dtype, "number"), b, hint)
    assert isinstance(a, Vector)
    return low.binary(name, a, b, hint)


def _arithmetic(name: str) -> Callable[..., Value]:
    def rule(low: Lowering, eqn: Equation, x: list[Value]) -> Value:
        a, b = x
        if isinstance(a, (Margin, Bits)) or isinstance(b, (Margin, Bits)):
            raise LoweringError(f"{eqn.primitive} of conditions")
        return _number(low, name, a, b, low.hint(eqn))

    return rule


def _unary(name: str) -> Callable[..., Value]:
    return lambda low, eqn, x: low.unary(name, _vector(eqn, x[0]), low.hint(eqn))


def _vector(eqn: Equation, x: Value) -> Vector:
    if isinstance(x, Vector):
        return x
    kind = "a number" if isinstance(x, Scalar) else "a condition"
    raise LoweringError(f"{eqn.primitive} of {kind} that only the kernel knows")


def _neg(low: Lowering, eqn: Equation, x: list[Any]) -> Value:
    return low.with_scalar("Muls", x[0], Scalar(-1.0), low.hint(eqn))


def _tanh(low: Lowering, eqn: Equation, x: list[Any]) -> Value:
    """tanh x = ±(1 − t)/(1 + t) with t = exp(−2|x|)."""
    value = _vector(eqn, x[0])
    size = low.unary("Abs", value, "size")
    t = low.unary("Exp", low.with_scalar("Muls", size, Scalar(-2.0), "twice"), "power")
    over = low.with_scalar(
        "Adds", low.with_scalar("Muls", t, Scalar(-1.0), "less"), Scalar(1.0), "over"
    )
    tanh = low.binary("Div", over, low.with_scalar("Adds", t, Scalar(1.0), "under"), "tanh")
    negative = low.with_scalar("Muls", tanh, Scalar(-1.0), "negative")
    return low.selected(low.compared("GE", value, Scalar(0.0)), tanh, negative, low.hint(eqn))


def _convert(low: Lowering, eqn: Equation, x: list[Value]) -> Value:
    value, to = x[0], str(eqn.output.aval.dtype)
    if isinstance(value, Scalar):
        if value.known:
            return Scalar(float(value.value) if "float" in to else int(value.value))
        return Scalar(f"static_cast<float>({value.value})") if "float" in to else value
    if isinstance(value, Vector):
        if to == "int32":  # whole numbers stay float32
            if not _whole(eqn):
                raise LoweringError("numbers are not cut to whole ones")
            return value
        return low.cast(value, C_TYPES[to], low.hint(eqn))
    raise LoweringError("a condition is not converted to a number")


def _compare(mode: str) -> Callable[..., Value]:
    def rule(low: Lowering, eqn: Equation, x: list[Value]) -> Value:
        a, b = x
        if isinstance(a, (Margin, Bits)) or isinstance(b, (Margin, Bits)):
            raise LoweringError(f"{eqn.primitive} of conditions")
        if _whole(eqn) and mode in ("GE", "GT", "LE", "LT"):
            if mode in ("LE", "LT"):
                a, b = b, a
            margin = _number(low, "Sub", a, b, "margin")
            if mode in ("GT", "LT"):
                margin = _number(low, "Sub", margin, Scalar(1), "margin")
            return Margin(margin)
        if isinstance(a, Scalar):
            assert isinstance(b, Vector)
            swapped = {"GE": "LE", "LE": "GE", "GT": "LT", "LT": "GT"}.get(mode, mode)
            return low.compared(swapped, b, a)
        return low.compared(mode, a, b)

    return rule


def _logical(name: str) -> Callable[..., Value]:
    def rule(low: Lowering, eqn: Equation, x: list[Value]) -> Value:
        for a, b in (x, x[::-1]):
            if isinstance(a, Scalar) and a.known:
                neutral = (name == "And") == bool(a.value)
                return b if neutral else a
        a, b = (
            Margin(Scalar(f"Pick({v.value}, 0, -1)")) if isinstance(v, Scalar) else v for v in x
        )
        return low.combined(name, a, b)

    return rule


def _select(low: Lowering, eqn: Equation, x: list[Value]) -> Value:
    mask, no, yes = x[0], *(_numbers(eqn, value) for value in x[1:])
    rows, width = low.shape(eqn.output)
    if isinstance(mask, Scalar):
        if mask.known:
            return yes if mask.value else no
        return _chosen(low, eqn, mask, no, yes)
    bits = low.bits(mask, rows, width)
    yes = low.full(yes, rows, width, _type(eqn, no))
    if isinstance(no, Vector):
        no = low.full(no, rows, width)
    return low.selected(bits, yes, no, low.hint(eqn))


def _type(eqn: Equation, other: Value) -> str:
    """The C++ type of a number beside ``other``; whole numbers are float32."""
    return other.dtype if isinstance(other, Vector) else C_TYPES[str(eqn.output.aval.dtype)]


def _numbers(eqn: Equation, x: Value) -> Vector | Scalar:
    if isinstance(x, (Margin, Bits)):
        raise LoweringError(f"{eqn.primitive} of conditions")
    return x


def _chosen(
    low: Lowering, eqn: Equation, mask: Scalar, no: Vector | Scalar, yes: Vector | Scalar
) -> Value:
    """One of two vectors, by a number that the whole tile shares: no + (yes − no) would round."""
    from npu_bridge.ir import If

    shapes = [(x.rows, x.width) for x in (no, yes) if isinstance(x, Vector)]
    shape = max(rows for rows, _ in shapes), max(width for _, width in shapes)
    dtypes = _type(eqn, yes), _type(eqn, no)
    no, yes = (low.full(x, *shape, dtype) for x, dtype in zip((no, yes), dtypes, strict=True))
    out = low.new(low.hint(eqn), yes.dtype, yes.rows, yes.width)
    branches: list[list[Node]] = []
    for side in (yes, no):
        kept, low.body = low.body, []
        low.copied(side, out.place)
        branches.append(low.body)
        low.body = kept
    low.body.append(If(str(mask.value), *branches))
    return out


def _broadcast(low: Lowering, eqn: Equation, x: list[Value]) -> Value:
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
    return x[0]  # instructions broadcast


def _reshape(low: Lowering, eqn: Equation, x: list[Value]) -> Value:
    value = x[0]
    if not isinstance(value, (Vector, Bits)):
        return value
    rows, width = low.shape(eqn.output)
    if (value.rows, value.width) == (rows, width) or rows * width == value.rows * value.width == 1:
        return value
    raise LoweringError(f"{value.rows} × {value.width} numbers as {rows} × {width}")


def _reduce(name: str) -> Callable[..., Value]:
    def rule(low: Lowering, eqn: Equation, x: list[Value]) -> Value:
        axes, shape = tuple(eqn.params["axes"]), eqn.inputs[0].aval.shape
        if len(shape) != 2 or len(axes) != 1:
            raise LoweringError(f"axes {axes} of {shape} at once")
        value = low.full(_vector(eqn, x[0]), *shape)  # what is broadcast counts as often
        if axes == (0,):
            return _fold_rows(low, name, value, low.hint(eqn))
        return low.reduce(name, value, low.hint(eqn))

    return rule


def _fold_rows(low: Lowering, name: str, x: Vector, hint: str) -> Vector:
    """The row of column maxima or sums: halves upon halves."""
    rows = x.rows
    if rows & (rows - 1):
        raise LoweringError(f"{rows} rows are not folded: a power of two is")
    if rows == 1:
        return x
    if x.width * ITEMSIZE[x.dtype] % BLOCK:
        raise LoweringError(f"a row of {x.width} {x.dtype} is not whole blocks of {BLOCK} bytes")
    out = low.new(hint, x.dtype, max(rows // 2, 1), x.width)
    source = x.place
    while rows > 1:
        rows //= 2
        size = rows * x.width
        low.emit(
            f"{name}({out.place}, {source}, {source.at(size)}, {size})",
            (out.place,),
            (source,),
            size * ITEMSIZE[x.dtype],
        )
        source = out.place
    return Vector(replace(out.place, count=x.width), 1, x.width)


def _iota(low: Lowering, eqn: Equation, x: list[Value]) -> Value:
    shape, dimension = eqn.params["shape"], eqn.params["dimension"]
    size = shape[dimension]
    if size == 1:
        return Scalar(0)
    along_rows = math.prod(shape[dimension + 1 :]) == 1 and math.prod(shape) == size
    rows, width = (size, 1) if along_rows and shape[-1] == 1 else (1, size)
    if math.prod(shape) != size:
        raise LoweringError(f"an index over {shape} along axis {dimension}")
    out = low.new("index", "float", rows, width)
    low.emit(f"CreateVecIndex({out.place}, 0.0f, {size})", (out.place,), (), size * 4)
    return out


def _slice(low: Lowering, eqn: Equation, x: list[Value]) -> Value:
    value = _vector(eqn, x[0])
    start, limit = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,)
    if len(start) != 2 or set(strides) != {1}:
        raise LoweringError(f"a slice with strides {strides} of {len(start)} axes")
    value = low.full(value, *eqn.inputs[0].aval.shape)
    (r0, c0), (r1, c1) = start, limit
    if (c0, c1) != (0, value.width):
        raise LoweringError("only whole rows are sliced")
    place = value.place.at(times(r0, value.width), (r1 - r0) * value.width)
    return Vector(place, r1 - r0, value.width)


def _dot(low: Lowering, eqn: Equation, x: list[Value]) -> Value:
    """A product with one column, which the vector unit computes."""
    a, b = (_vector(eqn, value) for value in x)
    column = b.width == 1 and (a.width, 1) == eqn.inputs[1].aval.shape == (b.rows, 1)
    if eqn.params["dimension_numbers"][0] != ((1,), (0,)) or not column:
        raise LoweringError("the vector unit multiplies a tile by one column only")
    dtype = C_TYPES[str(eqn.output.aval.dtype)]
    a, b = low.cast(a, dtype, "wide"), low.cast(b, dtype, "wide")
    row = Vector(b.place, 1, b.rows)
    return low.reduce("Add", low.binary("Mul", a, row, "weighted"), low.hint(eqn))


def _shift(low: Lowering, eqn: Equation, x: list[Value]) -> Value:
    a, b = x
    if isinstance(a, Scalar) and isinstance(b, Scalar) and b.known:
        if a.known:
            return Scalar(a.value >> b.value)
        return Scalar(f"Div({a.value}, {1 << b.value})")
    raise LoweringError("only indices are shifted")


def _divide(low: Lowering, eqn: Equation, x: list[Value]) -> Value:
    a, b = x
    if isinstance(a, Scalar) and isinstance(b, Scalar):
        if eqn.output.aval.dtype.kind == "f":
            return Scalar(f"({a.text('float')} / {b.text('float')})")
        return Scalar(f"Div({a.value}, {b.value})")
    if _whole(eqn):
        raise LoweringError("whole numbers are divided only if the tile shares them")
    return _arithmetic("Div")(low, eqn, x)


def _clamp(low: Lowering, eqn: Equation, x: list[Value]) -> Value:
    lo, value, hi = x
    return _number(low, "Min", _number(low, "Max", value, lo, "clamped"), hi, low.hint(eqn))


RULES: dict[str, Callable[[Lowering, Equation, list[Any]], Value]] = {
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
    "squeeze": _reshape,
    "sub": _arithmetic("Sub"),
    "tanh": _tanh,
}
# How values are called in the emitted source, by what makes them.
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
