"""Lowers equations one after another, and holds what their variables are."""

from __future__ import annotations

from typing import Any

from npu_bridge.expressions import Scalar
from npu_bridge.ir import Buffer, Let, Node
from npu_bridge.lower import conditions
from npu_bridge.lower.emitter import Allocate, Emitter
from npu_bridge.lower.rules import NAMES, RULES, Context, origin, unknown, way_out
from npu_bridge.lower.scalars import is_scalar, scalar
from npu_bridge.lower.values import Equation, Margin, Value, Var, shape_of
from pasa_jax.core.errors import LoweringError


class Lowering:
    """The instructions of equations.

    Arguments:
      allocate: makes a buffer in UB of a name, a C++ type and a number of elements.
      inputs: what the variables that are not computed here are.
      names: how variables are called in the emitted source.
      prefix: of the names of numbers that have none, which are counted.
      ramp: see `Emitter`.
    """

    def __init__(
        self,
        allocate: Allocate,
        inputs: dict[Var, Value],
        *,
        names: dict[Var, str] | None = None,
        prefix: str = "n",
        ramp: Buffer | None = None,
    ) -> None:
        self.emitter = Emitter(allocate, ramp)
        self._values: dict[Var, Value] = dict(inputs)
        self._names = names or {}
        self._prefix = prefix
        self._numbers = 0

    @property
    def body(self) -> list[Node]:
        return self.emitter.body

    def value(self, x: Var | Scalar) -> Value:
        """What a variable is."""
        return x if isinstance(x, Scalar) else self._values[x]

    def lower(self, equations: list[Equation]) -> None:
        selecting = _only_select(equations)
        for eqn in equations:
            inputs = [self.value(x) for x in eqn.inputs]
            value = self._lowered(eqn, inputs)
            if isinstance(value, Margin) and eqn.output in selecting:  # bits are far smaller
                value = conditions.bits(self.emitter, value, *shape_of(eqn.output))
            self._values[eqn.output] = value

    def _lowered(self, eqn: Equation, inputs: list[Value]) -> Value:
        rule = RULES.get(eqn.primitive)
        if rule is None:
            raise unknown(eqn.primitive, eqn.source, eqn.function)
        if is_scalar(eqn, inputs):
            return self._named(scalar(eqn, inputs), eqn)  # type: ignore[arg-type]
        hint = self._names.get(eqn.output, NAMES.get(eqn.primitive, eqn.primitive))
        try:
            value = rule(Context(self.emitter, hint), eqn, inputs)
        except LoweringError as error:
            end = f". {way_out(eqn.function)}".rstrip() if eqn.function else ""
            raise LoweringError(f"{error}; {origin(eqn.source, eqn.function)}{end}") from None
        if isinstance(value, Scalar) and not str(value.value).isidentifier():
            return self._named(value, eqn)
        return value

    def _named(self, x: Scalar, eqn: Equation) -> Scalar:
        """A number that is computed, under a name of its own."""
        if x.known:
            return x
        name = self._names.get(eqn.output)
        if name is None:
            self._numbers += 1
            name = f"{self._prefix}{self._numbers}"
        ctype = {"f": "float", "b": "bool"}.get(eqn.kind, "int32_t")
        self.body.append(Let(name, str(x.value), ctype))
        return Scalar(name)


def _only_select(equations: list[Equation]) -> set[Any]:
    """The conditions that are used for nothing but to select."""
    uses: dict[Any, set[bool]] = {}
    for eqn in equations:
        for i, x in enumerate(eqn.inputs):
            uses.setdefault(x, set()).add(eqn.primitive == "select_n" and i == 0)
    return {x for x, selects in uses.items() if selects == {True}}
