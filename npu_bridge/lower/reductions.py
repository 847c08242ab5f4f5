"""One number of each row, or one row of all rows."""

from __future__ import annotations

from dataclasses import replace

from npu_bridge.dtypes import BLOCK, ITEMSIZE, REPEAT
from npu_bridge.instructions import Binary, BlockReduce, WholeReduce
from npu_bridge.lower.arithmetic import binary, fold, whole_blocks
from npu_bridge.lower.emitter import Emitter
from npu_bridge.lower.values import Vector
from pasa_jax.core.errors import LoweringError

_FEW = 32
_KINDS = {"Max": "Max", "Min": "Min", "Add": "Sum"}


def reduce_columns(to: Emitter, name: str, x: Vector, hint: str) -> Vector:
    """The column of row maxima or sums: the repeats of a row first, then within one.

    Arguments:
      name: "Max", "Min" or "Add".
    """
    each = REPEAT // ITEMSIZE[x.dtype]
    if x.rows > 255:
        raise LoweringError(f"{x.rows} rows are not reduced: at most 255 repeats are")
    if x.width > each:
        x = fold(to, name, x, each)
    half_blocks = x.width * ITEMSIZE[x.dtype] % BLOCK != 0 and x.width % 8 == 0
    # A maximum is the same number in float32; 8 numbers are a whole block there. Of a few rows it
    # is faster found at once.
    if x.dtype == "half" and (half_blocks or (name != "Add" and x.rows > _FEW)):
        x = fold(to, name, x, 64) if x.width > 64 else x
        wide = reduce_columns(to, name, to.cast(x, "float", "wide"), hint)
        return to.cast(wide, "half", hint)
    if x.dtype == "float" and x.width in (8, 64) and x.rows % 8 == 0:
        return _by_blocks(to, name, x, hint)
    whole_blocks(x)
    out = to.new(hint, x.dtype, x.rows, 1)
    to.emit(WholeReduce(_KINDS[name], out.place, x.place, x.width, x.rows))
    return out


def _by_blocks(to: Emitter, name: str, x: Vector, hint: str) -> Vector:
    """The column of a float32 tile of 64 or 8 columns: eight of them become one, and again.
    (A repeat of this takes a cycle, where reducing it whole takes seven.)
    """
    while x.width > 1:
        last = x.width == 8
        out = to.new(hint if last else "blocks", "float", x.rows, x.width // 8)
        to.emit(BlockReduce(_KINDS[name], out.place, x.place, x.size // 64))
        x = out
    return x


def reduce_rows(to: Emitter, name: str, x: Vector, hint: str) -> Vector:
    """The row of column maxima or sums: the rows are halved until one is left."""
    rows = x.rows
    if rows == 1:
        return x
    if x.width == 1:  # a column lies in memory as a row does
        return reduce_columns(to, name, Vector(x.place, 1, rows), hint)
    if rows & (rows - 1):
        raise LoweringError(f"{rows} rows are not folded: a power of two is")
    whole_blocks(x)
    out = to.new(hint, x.dtype, rows // 2, x.width)
    source = x.place
    while rows > 1:
        rows //= 2
        size = rows * x.width
        to.emit(Binary(name, out.place, source, source.at(size, size), size))
        source = out.place
    return Vector(replace(out.place, count=x.width), 1, x.width)


def times_column(to: Emitter, a: Vector, b: Vector, dtype: str, hint: str) -> Vector:
    """A tile times a column of ``dtype`` numbers: weighted, then summed."""
    a, b = to.cast(a, dtype, "wide"), to.cast(b, dtype, "wide")
    row = Vector(b.place, 1, b.rows)
    return reduce_columns(to, "Add", binary(to, "Mul", a, row, "weighted"), hint)
