"""What the vector unit computes of one or two numbers: name, meaning, types, time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pasa_jax.core.errors import LoweringError

FLOATS = ("half", "float")
_WHOLE = ("int16_t", "uint16_t")


@dataclass(frozen=True)
class Operation:
    """One of the vector unit's operations, number by number.

    Arguments:
      name: of the AscendC function.
      meaning: of float64 arrays, or of whole ones; the result is rounded once.
      types: C++ types that it takes.
      repeat_cycles: cycles per repeat by type, where they are not 1.
      in_place: whether it may write where it reads.
    """

    name: str
    meaning: Callable[..., np.ndarray]
    types: tuple[str, ...] = FLOATS
    repeat_cycles: Mapping[str, int] = field(default_factory=dict)
    in_place: bool = True

    def __call__(self, dtype: np.dtype, *x: Any) -> np.ndarray:
        """Computed in float64 (or in whole numbers) and rounded once to ``dtype``."""
        kind = np.float64 if dtype.kind not in "iu" else dtype
        return self.meaning(*(np.asarray(v).astype(kind) for v in x)).astype(dtype)


def check_type(name: str, dtype: str, types: tuple[str, ...]) -> None:
    """Raises where an instruction does not take a type.

    Raises:
      LoweringError: the sentence says which types it takes.
    """
    if dtype not in types:
        raise LoweringError(f"{name} takes {' or '.join(types)} on this chip, not {dtype}")


def _larger(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(x) | (x > y), x, y)


def _smaller(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(x) | (x < y), x, y)


_SLOW = {"half": 4, "float": 2}
_TWO = {"half": 2, "float": 2}
UNARY = {
    op.name: op
    for op in (
        Operation("Exp", np.exp, repeat_cycles=_SLOW),
        Operation("Ln", np.log, repeat_cycles=_SLOW),
        Operation("Abs", np.abs),
        Operation("Sqrt", np.sqrt, repeat_cycles=_TWO),
    )
}
BINARY = {
    op.name: op
    for op in (
        Operation("Add", np.add),
        Operation("Sub", np.subtract, (*FLOATS, "int32_t")),
        Operation("Mul", np.multiply),
        Operation("Div", np.divide, repeat_cycles=_SLOW),
        Operation("Max", _larger),
        Operation("Min", _smaller),
        Operation("And", np.bitwise_and, _WHOLE, in_place=False),
        Operation("Or", np.bitwise_or, _WHOLE, in_place=False),
    )
}
WITH_SCALAR = {
    op.name: op
    for op in (
        Operation("Adds", np.add),
        Operation("Muls", np.multiply),
        Operation("Maxs", _larger),
        Operation("Mins", _smaller),
    )
}
