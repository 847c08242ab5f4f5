"""Where the vector pipe must wait for itself."""

from __future__ import annotations

from npu_bridge.dtypes import ITEMSIZE
from npu_bridge.ir import Barrier, Node, Slice, instructions

_Range = tuple[str, int, int]  # memory, first byte, byte behind the last


def with_barriers(nodes: list[Node]) -> list[Node]:
    """The straight-line program with a barrier before each vector instruction that depends on an
    earlier one since the last barrier, through a value or through memory that is used again.
    """
    result: list[Node] = []
    written: list[_Range] = []
    read: list[_Range] = []
    for node in nodes:
        inside = [x for x in instructions([node]) if x.pipe == "V"]
        writes = [_range(s) for x in inside for s in x.writes]
        reads = [_range(s) for x in inside for s in x.reads]
        if _overlap(writes, written) or _overlap(writes, read) or _overlap(reads, written):
            result.append(Barrier("V"))
            written, read = [], []
        result.append(node)
        written += writes
        read += reads
    return result


def _range(s: Slice) -> _Range:
    """The bytes that a slice may touch: the whole buffer where its offset is not known."""
    b = s.buffer
    if b.alias is not None:
        return _range(b.alias)
    assert b.address is not None, b.name
    if isinstance(s.offset, int) and isinstance(s.count, int):
        size = ITEMSIZE[s.dtype]
        return b.memory, b.address + s.offset * size, b.address + (s.offset + s.count) * size
    return b.memory, b.address, b.address + b.bytes


def _overlap(a: list[_Range], b: list[_Range]) -> bool:
    return any(m == n and lo < top and bottom < hi for m, lo, hi in a for n, bottom, top in b)
