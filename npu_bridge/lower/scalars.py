"""Equations of numbers that a whole tile shares: they become expressions, not instructions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from npu_bridge.expressions import Scalar
from npu_bridge.lower.values import Equation


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
    "abs": lambda x: f"Max({x}, -({x}))",
    "square": lambda x: f"(({x}) * ({x}))",
    "xor": _infix("!="),
    "not": lambda x: f"(({x}) == 0)",
    "select_n": lambda c, no, yes: f"Pick({c}, {yes}, {no})",
}
# Of numbers that are not whole, where they differ.
_FLOAT_RULES: dict[str, Callable[..., str]] = {
    "max": _call("MaxFloat"),
    "min": _call("MinFloat"),
    "abs": lambda x: f"MaxFloat({x}, -({x}))",
    "select_n": lambda c, no, yes: f"PickFloat({c}, {yes}, {no})",
}
# Of numbers that are known when the kernel is emitted.
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
    "abs": abs,
    "square": lambda a: a * a,
    "sign": lambda a: (a > 0) - (a < 0),
    "xor": lambda a, b: bool(a) != bool(b),
    "not": lambda a: not a,
    "floor_divide": lambda a, b: a // b,
    "remainder": lambda a, b: a % b,
    "rem": lambda a, b: math.fmod(a, b) if isinstance(a, float) else _left(a, b),
    "exp2": lambda a: 2.0**a,
    "sqrt": math.sqrt,
    "pow": lambda a, b: a**b,
    "tanh": math.tanh,
    "exp": math.exp,
    "log": math.log,
}


def _left(a: int, b: int) -> int:
    """What C++ calls a % b."""
    return abs(a) % abs(b) * (1 if a >= 0 else -1)


def is_scalar(eqn: Equation, inputs: list[Any]) -> bool:
    """Whether an equation is one of numbers that the whole tile shares."""
    if not inputs or not all(isinstance(x, Scalar) for x in inputs):
        return False
    if eqn.primitive in ("xor", "not") and eqn.kind != "b":
        return False
    return eqn.primitive in SCALAR_RULES or (
        eqn.primitive in _KNOWN and eqn.primitive != "div" and all(x.known for x in inputs)
    )


def scalar(eqn: Equation, inputs: list[Scalar]) -> Scalar:
    """The output of such an equation."""
    name = eqn.primitive
    if all(x.known for x in inputs) and name in _KNOWN:
        value = _KNOWN[name](*(x.value for x in inputs))
        return Scalar(eqn.output.aval.dtype.type(value).item() if eqn.kind == "f" else value)
    texts = [str(x.value) if not isinstance(x.value, bool) else str(int(x.value)) for x in inputs]
    if eqn.kind != "f":
        return Scalar(SCALAR_RULES[name](*texts))
    conditions = 1 if name == "select_n" else 0
    texts[conditions:] = [x.text("float") for x in inputs[conditions:]]
    return Scalar(_FLOAT_RULES.get(name, SCALAR_RULES[name])(*texts))
