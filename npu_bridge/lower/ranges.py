"""How large the whole numbers of the caller's functions may be.

Indices are held as float32, which is exact below 2^24. Numbers that may be larger are computed as
int32_t, and so are those that come as data. A division is computed in float32: what is divided must
be small enough for its rounding not to reach the next whole number.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from npu_bridge.expressions import Scalar
from npu_bridge.lower.values import Equation, Span, Var

EXACT = 2**24 - 1  # float32 holds every whole number to it
DIVISIBLE = 2**21  # (x + 1/2)·(1/d) rounds to the right side of a whole number
_MOVES = (
    "broadcast_in_dim", "reshape", "squeeze", "transpose", "convert_element_type", "copy",
)  # fmt: skip
EXACT_DIVISIONS = (
    "they are exact for indices and a known positive number (of bits, for those of a power of two)"
)
DIVISIONS = ("div", "rem", "floor_divide", "remainder", "shift_right_arithmetic", "and")


def divisor(eqn: Equation) -> int | None:
    """By what a division divides, if it is a positive number that is known."""
    by = eqn.inputs[1]
    if not isinstance(by, Scalar) or not isinstance(by.value, int):
        return None
    n = int(by.value)
    if eqn.primitive == "shift_right_arithmetic":
        return 1 << n if 0 <= n < 31 else None
    if eqn.primitive == "and":  # by bits: the remainder of a power of two
        n += 1
        return n if n > 0 and n & (n - 1) == 0 else None
    return n if n > 0 else None


def divisible(eqn: Equation) -> bool:
    """Whether a division is exact in float32."""
    by, span = divisor(eqn), eqn.spans[0] if eqn.spans else None
    if by is None or span is None:
        return False
    power = by & (by - 1) == 0
    return max(-span[0], span[1]) <= (EXACT if power else DIVISIBLE)


def inexact(equations: list[Equation], shared: Collection[Var]) -> Equation | None:
    """The first division of the caller's functions that is not exact.

    Arguments:
      shared: inputs that are numbers which a whole tile shares: the scalar unit divides these.
    """
    scalars = set(shared)
    for eqn in equations:
        alone = all(isinstance(x, Scalar) or x in scalars for x in eqn.inputs)
        if alone and eqn.primitive != "iota":
            scalars.add(eqn.output)
        elif eqn.function and eqn.kind == "i" and eqn.primitive in DIVISIONS and not divisible(eqn):
            return eqn
    return None


def marked(equations: list[Equation], known: Mapping[Var, Span]) -> list[Equation]:
    """The equations; those of the caller's functions with the spans of their whole numbers.

    Arguments:
      known: of inputs. Those that are not there may be any numbers.
    """
    spans: dict[Var, Span] = dict(known)
    result = []
    for eqn in equations:
        given = tuple(_span(x, spans) for x in eqn.inputs)
        own = _of(eqn, given)
        spans[eqn.output] = own
        result.append(replace(eqn, spans=(*given, own)) if eqn.function else eqn)
    return result


def _span(x: Any, spans: Mapping[Var, Span]) -> Span:
    if not isinstance(x, Scalar):
        return spans.get(x)
    whole = isinstance(x.value, int)  # bools too
    return (int(x.value), int(x.value)) if whole and abs(x.value) <= EXACT else None


def _of(eqn: Equation, given: tuple[Span, ...]) -> Span:
    """The span of an equation's whole numbers; None where they may be beyond `EXACT`."""
    if eqn.kind not in "iu":
        return (0, 1) if eqn.kind == "b" else None
    rule = _RULES.get(eqn.primitive)
    span = None if rule is None else rule(eqn, given)
    return span if span is not None and -EXACT <= span[0] <= span[1] <= EXACT else None


def _corners(op: Callable[[int, int], int]) -> Callable[[Equation, tuple[Span, ...]], Span]:
    def rule(eqn: Equation, given: tuple[Span, ...]) -> Span:
        a, b = given
        if a is None or b is None:
            return None
        ends = [op(x, y) for x in a for y in b]
        return min(ends), max(ends)

    return rule


def _moved(eqn: Equation, given: tuple[Span, ...]) -> Span:
    return given[0]


def _absolute(eqn: Equation, given: tuple[Span, ...]) -> Span:
    return None if given[0] is None else (0, max(-given[0][0], given[0][1]))


def _negated(eqn: Equation, given: tuple[Span, ...]) -> Span:
    return None if given[0] is None else (-given[0][1], -given[0][0])


def _chosen(eqn: Equation, given: tuple[Span, ...]) -> Span:
    sides = [x for x in given[1:] if x is not None]
    whole = len(sides) == len(given) - 1
    return (min(x[0] for x in sides), max(x[1] for x in sides)) if whole else None


def _clamped(eqn: Equation, given: tuple[Span, ...]) -> Span:
    lo, _, hi = given
    return None if lo is None or hi is None else (lo[0], hi[1])


def _quotient(eqn: Equation, given: tuple[Span, ...]) -> Span:
    by = divisor(eqn)
    return None if by is None or given[0] is None else (given[0][0] // by, -(-given[0][1] // by))


def _remainder(eqn: Equation, given: tuple[Span, ...]) -> Span:
    by = divisor(eqn)
    if by is None:
        return None
    return (1 - by if eqn.primitive == "rem" else 0), by - 1


def _counted(eqn: Equation, given: tuple[Span, ...]) -> Span:
    return 0, eqn.params["shape"][eqn.params["dimension"]] - 1


def _shifted(eqn: Equation, given: tuple[Span, ...]) -> Span:
    return _corners(lambda x, n: x << n if 0 <= n < 31 else EXACT + 1)(eqn, given)


_RULES: dict[str, Callable[[Equation, tuple[Span, ...]], Span]] = {
    "add": _corners(lambda x, y: x + y),
    "sub": _corners(lambda x, y: x - y),
    "mul": _corners(lambda x, y: x * y),
    "max": _corners(max),
    "min": _corners(min),
    "abs": _absolute,
    "neg": _negated,
    "sign": lambda eqn, given: (-1, 1),
    "clamp": _clamped,
    "select_n": _chosen,
    "square": lambda eqn, given: _corners(lambda x, y: x * y)(eqn, (_absolute(eqn, given),) * 2),
    "div": _quotient,
    "floor_divide": _quotient,
    "shift_right_arithmetic": _quotient,
    "rem": _remainder,
    "remainder": _remainder,
    "and": _remainder,
    "shift_left": _shifted,
    "iota": _counted,
    **dict.fromkeys(_MOVES, _moved),
}
