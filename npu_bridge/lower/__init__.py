"""From the equations of a jaxpr on one tile to instructions of the vector unit.

The tile functions of `pasa_jax` are traced on a slab of rows; every equation becomes one or a few
instructions. Values are tiles [rows, width], columns [rows, 1], rows [1, width] or single numbers;
a broadcast is never written to memory, the strides of the instruction that reads it do it.

Whole numbers (positions) are held as float32, exact to 2^24. The condition that one of them is at
least another is held as their difference, so that conditions on rows and columns broadcast like
numbers and "and" is a minimum; it becomes bits where it selects.
"""

from npu_bridge.lower.flatten import flatten
from npu_bridge.lower.lowering import Lowering
from npu_bridge.lower.rules import RULES
from npu_bridge.lower.values import Bits, Equation, Margin, Value, Var, Vector

__all__ = [
    "RULES",
    "Bits",
    "Equation",
    "Lowering",
    "Margin",
    "Value",
    "Var",
    "Vector",
    "flatten",
]
