"""What equations are made of, and what their values are while they are lowered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from npu_bridge.expressions import Scalar
from npu_bridge.ir import Slice
from pasa_jax.core.errors import LoweringError


@dataclass(frozen=True)
class Vector:
    """Numbers in UB: ``rows`` × ``width``, each of which may be 1."""

    place: Slice
    rows: int
    width: int

    @property
    def dtype(self) -> str:
        return self.place.dtype

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
Span = tuple[int, int] | None


@dataclass(eq=False, frozen=True)
class Var:
    """A traced value. (jax's own stand for several where an inner function is called twice.)"""

    aval: Any


@dataclass(frozen=True)
class Equation:
    """One equation, its inner functions expanded.

    Arguments:
      inputs: `Var` or `Scalar`.
      source: the line that it comes from.
      function: "mask_mod", "score_mod" or "block_mask" where it is of the caller's.
      spans: of a function's whole numbers: the least and the largest of each input and of the
        output, None where float32 may not hold them. See `npu_bridge.lower.ranges`.
    """

    primitive: str
    inputs: tuple[Any, ...]
    output: Var
    params: dict[str, Any]
    source: str
    function: str = ""
    spans: tuple[Span, ...] = ()

    @property
    def kind(self) -> str:
        """Of the output's numbers: "f", "i", "u" or "b"."""
        return self.output.aval.dtype.kind

    @property
    def of_whole_numbers(self) -> bool:
        """Whether an operand is of whole numbers, which are held as float32 or as int32_t."""
        return any(
            np.dtype(getattr(getattr(x, "aval", None), "dtype", "f4")).kind in "iu"
            for x in self.inputs
        )


def shape_of(var: Var) -> tuple[int, int]:
    """Rows and width of a traced shape: [R, n], [R], [1, n], []."""
    shape = tuple(var.aval.shape)
    if len(shape) > 2:
        shape = tuple(n for n in shape if n != 1) or (1,)
    if len(shape) <= 1:
        return (shape[0], 1) if shape else (1, 1)
    return shape[0], shape[1]


def vector(eqn: Equation, x: Value) -> Vector:
    """x, which must be in memory.

    Raises:
      LoweringError: it is a single number or a condition.
    """
    if isinstance(x, Vector):
        return x
    kind = "a number" if isinstance(x, Scalar) else "a condition"
    raise LoweringError(f"{eqn.primitive} of {kind} that only the kernel knows")


def no_condition(eqn: Equation, x: Value) -> Vector | Scalar:
    """x, which must not be a condition.

    Raises:
      LoweringError: it is one.
    """
    if isinstance(x, (Margin, Bits)):
        raise LoweringError(f"{eqn.primitive} of conditions")
    return x
