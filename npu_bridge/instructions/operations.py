"""What the vector unit computes of one or two numbers: name, meaning, types, time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from npu_bridge.facts import FACTS
from pasa_jax.core.errors import LoweringError


@dataclass(frozen=True)
class Operation:
    """One of the vector unit's operations, number by number.

    Arguments:
      name: of the AscendC function.
      meaning: of float64 arrays, or of whole ones; the result is rounded once.
      repeat_cycles: cycles per repeat by type, where they are not 1.
      in_place: whether it may write where it reads.
    """

    name: str
    meaning: Callable[..., np.ndarray]
    repeat_cycles: Mapping[str, int] = field(default_factory=dict)
    in_place: bool = True

    def __post_init__(self) -> None:
        FACTS.call(self.name)

    def __call__(self, dtype: np.dtype, *x: Any) -> np.ndarray:
        """Computed in float64 (or in whole numbers) and rounded once to ``dtype``."""
        kind = np.float64 if dtype.kind not in "iu" else dtype
        return self.meaning(*(np.asarray(v).astype(kind) for v in x)).astype(dtype)


def check_written(name: str, dtype: str, types: tuple[str, ...]) -> None:
    """Raises where the chip has an instruction for a type and this project has not.

    Raises:
      LoweringError: the sentence says for which types it is written.
    """
    if dtype not in types:
        raise LoweringError(f"{name} is written here for {' or '.join(types)}, not {dtype}")


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
        Operation("Not", np.bitwise_not),
    )
}
BINARY = {
    op.name: op
    for op in (
        Operation("Add", np.add),
        Operation("Sub", np.subtract),
        Operation("Mul", np.multiply),
        Operation("Div", np.divide, repeat_cycles=_SLOW),
        Operation("Max", _larger),
        Operation("Min", _smaller),
        Operation("And", np.bitwise_and, in_place=False),
        Operation("Or", np.bitwise_or, in_place=False),
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
