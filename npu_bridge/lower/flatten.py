"""A jaxpr as a list of equations: inner functions expanded, what changes nothing left out."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from npu_bridge.expressions import Scalar
from npu_bridge.lower.rules import unknown
from npu_bridge.lower.values import Equation, Var

# What calls a function once, which is expanded in its place. (A scan has a function too.)
_CALLS = {
    "jit", "pjit", "closed_call", "core_call", "checkpoint", "custom_jvp_call", "custom_vjp_call",
}  # fmt: skip
FUNCTIONS = ("mask_mod", "score_mod", "block_mask")  # as the caller's functions are called
_JAX = os.path.dirname(jax.__file__) + os.sep


def flatten(closed: ClosedJaxpr) -> tuple[list[Var], list[Equation], list[Any]]:
    """Inputs, equations and outputs of a jaxpr; products by 1 and casts to the same type are left
    out.
    """
    flat = _Flattening()
    jaxpr = closed.jaxpr
    flat.name(jaxpr.constvars, [_constant(x) for x in closed.consts])
    inputs = [Var(x.aval) for x in jaxpr.invars]
    outputs = flat.expand(jaxpr, inputs, "an unknown place")
    return inputs, flat.equations, outputs


def _constant(x: Any) -> Scalar:
    return Scalar(np.asarray(x).item())


class _Flattening:
    """Expands a jaxpr; holds the equations so far and what jax's variables stand for."""

    def __init__(self) -> None:
        self.equations: list[Equation] = []
        self._names: dict[Any, Any] = {}

    def name(self, variables: Sequence[Any], values: Sequence[Any]) -> None:
        self._names.update(zip(variables, values, strict=True))

    def _value(self, x: Any) -> Any:
        return _constant(x.val) if isinstance(x, Literal) else self._names[x]

    def expand(
        self, jaxpr: Jaxpr, inputs: Sequence[Any], caller: str, function: str = ""
    ) -> list[Any]:
        """The outputs of ``jaxpr``, whose equations are added.

        Arguments:
          caller: the line that calls it, for equations that have none of their own.
          function: the caller's function in which it stands.
        """
        self.name(jaxpr.invars, inputs)
        for eqn in jaxpr.eqns:
            values = [self._value(x) for x in eqn.invars]
            source = _source(eqn.source_info.traceback) or caller
            inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            called = eqn.params.get("name", "")
            if eqn.primitive.name in _CALLS and inner is not None and not _known(called, values):
                body = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
                consts = inner.consts if isinstance(inner, ClosedJaxpr) else []
                self.name(body.constvars, [_constant(c) for c in consts])
                of = called if called in FUNCTIONS else function
                self.name(eqn.outvars, self.expand(body, values, source, of))
            else:
                name = called if _known(called, values) else eqn.primitive.name
                self._add(name, eqn, values, source, function)
        return [self._value(x) for x in jaxpr.outvars]

    def _add(self, name: str, eqn: Any, values: list[Any], source: str, function: str) -> None:
        """Adds an equation, unless it returns an input as it is."""
        if len(eqn.outvars) != 1:
            raise unknown(name, source, function)
        (out,) = eqn.outvars
        same = _unchanged(name, values, out, eqn)
        if same is not None:
            self._names[out] = same
            return
        var = self._names[out] = Var(out.aval)
        self.equations.append(Equation(name, tuple(values), var, eqn.params, source, function))


def _known(called: str, values: list[Any]) -> bool:
    """Whether a call is a quotient or a remainder of whole numbers by one that is known: jax spells
    them with ten primitives.
    """
    if called not in ("floor_divide", "remainder"):
        return False
    by = values[1]
    return isinstance(by, Scalar) and isinstance(by.value, int) and by.value > 0


def _source(traceback: Any) -> str:
    """The line outside of jax that an equation comes from; empty where jax alone made it."""
    lines = str(traceback or "").splitlines()
    return next((line for line in lines if not line.startswith(_JAX)), "")


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
