"""Expressions of numbers that are known only when a kernel runs.

An expression (`Expr`) is an int, or one text that is valid both in C++ and in Python: + - * / and
comparisons of numbers, and calls of `HELPERS`. `evaluate` gives it the value that C++ gives it.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import CodeType
from typing import Any, NamedTuple

import numpy as np

Expr = int | str


class Helper(NamedTuple):
    """A function that expressions may call.

    Arguments:
      head, result: its C++ signature and the expression that it returns.
      value: the same in Python.
    """

    head: str
    result: str
    value: Callable[..., Any]
    note: str = ""


def _chosen(condition: Any, yes: Any, no: Any) -> Any:
    return yes if condition else no


def _cut(a: int, b: int) -> int:
    """The quotient, cut towards zero as C++ does."""
    return a // b if (a < 0) == (b < 0) else -(-a // b)


HELPERS = {
    "Min": Helper("int32_t Min(int32_t a, int32_t b)", "a < b ? a : b", min),
    "Max": Helper("int32_t Max(int32_t a, int32_t b)", "a > b ? a : b", max),
    "Div": Helper(
        "int32_t Div(int32_t a, int32_t b)", "a / b", lambda a, b: _cut(a, b), "of numbers >= 0"
    ),
    "Mod": Helper("int32_t Mod(int32_t a, int32_t b)", "a % b", lambda a, b: a - b * _cut(a, b)),
    "CeilDiv": Helper(
        "int32_t CeilDiv(int32_t a, int32_t b)", "(a + b - 1) / b", lambda a, b: -(-a // b)
    ),
    "Pick": Helper("int32_t Pick(bool c, int32_t a, int32_t b)", "c ? a : b", _chosen),
    "MinFloat": Helper("float MinFloat(float a, float b)", "a < b ? a : b", min),
    "MaxFloat": Helper("float MaxFloat(float a, float b)", "a > b ? a : b", max),
    "PickFloat": Helper("float PickFloat(bool c, float a, float b)", "c ? a : b", _chosen),
}
_NAMES: dict[str, Any] = {
    **{name: f.value for name, f in HELPERS.items()},
    "int64_t": int,
    "uint64_t": int,
    "int32_t": int,
    "float32": np.float32,
    "float16": np.float16,
    "INFINITY": math.inf,
    "NAN": math.nan,
    "true": True,
    "false": False,
}


def prelude() -> str:
    """`HELPERS` in C++."""
    lines = []
    for f in HELPERS.values():
        note = f"  // {f.note}" if f.note else ""
        lines.append(f"__aicore__ inline {f.head} {{ return {f.result}; }}{note}\n")
    return "".join(lines)


def evaluate(x: Expr, names: Mapping[str, Any]) -> Any:
    """The value of an expression.

    Arguments:
      names: the values of the names in it.
    """
    return x if isinstance(x, int) else eval(_compiled(x), dict(_NAMES), names)


def _quotient(a: Any, b: Any) -> Any:
    """a / b as C++ has it: of two whole numbers, the whole part (of numbers >= 0)."""
    return a // b if isinstance(a, int) and isinstance(b, int) else a / b


_NAMES["_quotient"] = _quotient


class _Quotients(ast.NodeTransformer):
    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        if not isinstance(node.op, ast.Div):
            return node
        called = ast.Name("_quotient", ast.Load())
        return ast.copy_location(ast.Call(called, [node.left, node.right], []), node)


@cache
def _compiled(text: str) -> CodeType:
    text = text.replace("->", ".")
    for c_type, name in (("float", "float32"), ("half", "float16"), ("int32_t", "int32_t")):
        text = text.replace(f"static_cast<{c_type}>", name)
    text = re.sub(r"((?:\d\.\d*|\d)(?:e[+-]?\d+)?)f\b", r"\1", text)
    tree = _Quotients().visit(ast.parse(text, "<expression>", "eval"))
    return compile(ast.fix_missing_locations(tree), "<expression>", "eval")


def times(a: Expr, b: int) -> Expr:
    """a·b, computed here where a is known."""
    if isinstance(a, int):
        return a * b
    return 0 if b == 0 else a if b == 1 else f"({a}) * {b}"


def plus(a: Expr, b: Expr) -> Expr:
    """a + b, computed here where both are known."""
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    return b if a == 0 else a if b == 0 else f"{a} + {b}"


@dataclass(frozen=True)
class Scalar:
    """A number that a whole tile shares: a Python one, or an expression."""

    value: Any

    @property
    def known(self) -> bool:
        return not isinstance(self.value, str)

    def text(self, dtype: str) -> str:
        """As C++ writes it, of the C++ type ``dtype``."""
        if dtype == "bfloat16_t":
            return f"ToBfloat16({self.text('float')})"
        if not self.known:
            return f"static_cast<{dtype}>({self.value})"
        if dtype == "int32_t":
            return f"int32_t({int(self.value)})"
        if dtype == "uint16_t":
            return f"uint16_t(0x{self.value:04x})"
        if dtype == "float":
            return float_text(float(np.float32(self.value)))
        return f"{dtype}({float_text(float(self.value))})"


def float_text(x: float) -> str:
    """A float32 as C++ writes it."""
    if math.isnan(x):
        return "NAN"
    if math.isinf(x):
        return "-INFINITY" if x < 0 else "INFINITY"
    text = repr(x)
    return f"{text}f" if "." in text or "e" in text else f"{text}.0f"
