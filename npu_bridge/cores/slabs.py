"""Parts that the functions of the vector core have in common."""

from __future__ import annotations

from npu_bridge.dtypes import ITEMSIZE
from npu_bridge.expressions import Expr, Scalar, times
from npu_bridge.instructions import DataCopy, Duplicate, RowsIn
from npu_bridge.ir import For, If, Instruction, Node, SetFlag, Slice, WaitFlag, instructions
from npu_bridge.layout import PADDING, SINGLE


def slab(
    ids: Expr, loads: list[Node], compute: list[Node], stores: list[Node], out: Expr = SINGLE
) -> list[Node]:
    """Load, compute, store, each on its pipe.

    Arguments:
      ids, out: the events of the slots that are loaded and stored.
    """
    nodes: list[Node] = [
        WaitFlag("V", "MTE2", ids),
        *loads,
        SetFlag("MTE2", "V", ids),
        WaitFlag("MTE2", "V", ids),
    ]
    if not stores:
        return [*nodes, *compute, SetFlag("V", "MTE2", ids)]
    at = _first_write(compute, stores)  # what is stored may still be on its way out until then
    nodes += [*compute[:at], WaitFlag("MTE3", "V", out), *compute[at:]]
    nodes += [SetFlag("V", "MTE2", ids), SetFlag("V", "MTE3", out), WaitFlag("V", "MTE3", out)]
    return [*nodes, *stores, SetFlag("MTE3", "V", out)]


def computed(compute: list[Node], stores: list[Node]) -> list[Node]:
    """Compute and store, where nothing is loaded."""
    return [
        WaitFlag("MTE3", "V", SINGLE),
        *compute,
        SetFlag("V", "MTE3", SINGLE),
        WaitFlag("V", "MTE3", SINGLE),
        *stores,
        SetFlag("MTE3", "V", SINGLE),
    ]


def _first_write(compute: list[Node], stores: list[Node]) -> int:
    """The first node that writes what ``stores`` read."""
    stored = {s.buffer for x in instructions(stores) for s in x.reads}
    for i, node in enumerate(compute):
        for x in instructions([node]):
            for s in x.writes:
                if s.buffer in stored or (s.buffer.alias and s.buffer.alias.buffer in stored):
                    return i
    return 0


def copy(to: Slice, source: Slice, count: int) -> DataCopy:
    """``count`` elements in one piece."""
    return DataCopy(
        Slice(to.buffer, to.offset, count), Slice(source.buffer, source.offset, count), count
    )


def cleared(zeros: Instruction) -> list[Node]:
    """Zeros before a load that fills only a part, which must wait for them."""
    return [
        SetFlag("MTE2", "V", PADDING),
        WaitFlag("MTE2", "V", PADDING),
        zeros,
        SetFlag("V", "MTE2", PADDING),
        WaitFlag("V", "MTE2", PADDING),
    ]


def zero_bits(to: Slice, count: int) -> Duplicate:
    """``count`` zeros of any type."""
    bits = of_halves(to, count)
    return Duplicate(bits, Scalar(0), int(bits.count))


def of_halves(to: Slice, count: int) -> Slice:
    """The bytes of ``count`` elements as float16."""
    size = ITEMSIZE[to.dtype]
    offset = to.offset
    if size != 2 and offset != 0:
        offset = f"({offset}) / 2" if size == 1 else times(offset, size // 2)
    return Slice(to.buffer, offset, count * size // 2, "half")


def padded_load(
    to: Slice, source: Slice, rows: int, valid: str, width: int, gap: Expr
) -> list[Node]:
    """Loads ``valid`` of ``rows`` rows, and zeros for the others."""
    whole = Slice(to.buffer, to.offset, rows * width)
    load = RowsIn(whole, source, valid, width, gap)
    return [
        If(f"{valid} < {rows}", cleared(zero_bits(whole, rows * width))),
        If(f"{valid} > 0", [load]),
    ]


def spread_units(units: str, body: list[Node]) -> list[Node]:
    """Units of work dealt out over all vector cores."""
    return [For("unit", "vectorCore", units, body, "vectorCores")]
