"""Where everything lies: addresses in the on-chip memories, from what lives when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from npu_bridge.ir import Buffer, For, Instruction, Node, Slice, walk
from pasa_jax.core.errors import PlanError
from pasa_jax.core.target import find_target

_ALIGN = 32
# Instructions that may write where they read: number by number, at the same place.
_IN_PLACE = (
    "Add(", "Sub(", "Mul(", "Div(", "Max(", "Min(", "Adds(", "Muls(", "Maxs(", "Mins(",
    "Exp(", "Ln(", "Abs(", "Sqrt(", "Select(",
)  # fmt: skip


@dataclass
class Memory:
    """One on-chip memory: what stays, one behind the other, and how far scratch reached above it.

    Arguments:
      name: as in `Target.memories`.
      capacity: bytes.
    """

    name: str
    capacity: int
    buffers: list[Buffer] = field(default_factory=list)
    scratch: int = 0

    @staticmethod
    def of(target: str, name: str) -> Memory:
        return Memory(name, find_target(target).memories[name])

    @property
    def kept(self) -> int:
        """Bytes of what stays."""
        return sum(b.bytes for b in self.buffers)

    @property
    def used(self) -> int:
        return self.kept + self.scratch

    def keep(self, name: str, dtype: str, count: int, slots: int = 1, note: str = "") -> Buffer:
        """A buffer that stays for the whole kernel. No scratch may have been placed before."""
        assert self.scratch == 0
        buffer = Buffer(name, self.name, dtype, count, slots, note, address=self.kept)
        self.buffers.append(buffer)
        return buffer

    def place(self, nodes: list[Node], base: int, spare: Sequence[Slice] = ()) -> list[Buffer]:
        """Gives addresses from ``base`` on to the buffers of a straight-line program, each for as
        long as it lives; a value may take the place of one that ends in the same instruction.

        Arguments:
          spare: memory that the program may overwrite once it has read it for the last time.
        """
        self._lend(nodes, list(spare))
        spans = _spans(nodes, self.name)
        live: list[Buffer] = []
        for i, node in enumerate(nodes):
            starting = [b for b, (first, _) in spans.items() if first == i]
            ending = [b for b in live if spans[b][1] == i]
            for b in starting:
                heir = _in_place(node, b, ending)
                if heir is not None:
                    b.address = heir.address
                    ending.remove(heir)
                    live.remove(heir)
                else:
                    b.address = _gap(b, live, base)
                assert b.address is not None
                live.append(b)
                self.scratch = max(self.scratch, b.address + b.bytes - self.kept)
            live = [b for b in live if spans[b][1] > i]
        return list(spans)

    def _lend(self, nodes: list[Node], spare: list[Slice]) -> None:
        """Lets a value take the place of ``spare`` memory of its size, and its heirs after it."""
        spans = _spans(nodes, self.name)
        for i, node in enumerate(nodes):
            for b in [b for b, (first, _) in spans.items() if first == i]:
                for s in spare:
                    if s.count != b.count or s.buffer.dtype != b.dtype:
                        continue
                    if _last_read(nodes, s) == i and _numberwise(node):
                        b.alias = s
                        spare = [Slice(b, 0, b.count) if x is s else x for x in spare]
                        break

    def check(self, wanted: str) -> None:
        if self.used > self.capacity:
            raise PlanError(
                f"{wanted} wants {self.used} bytes of {self.name}; there are {self.capacity}"
            )


def _gap(b: Buffer, live: list[Buffer], base: int) -> int:
    """The lowest address from ``base`` on where b fits between what lives."""
    at = base
    for other in sorted(live, key=lambda x: x.address or 0):
        assert other.address is not None
        if at + b.bytes <= other.address:
            break
        at = max(at, other.address + other.bytes)
    return -(-at // _ALIGN) * _ALIGN


def _spans(nodes: list[Node], memory: str) -> dict[Buffer, tuple[int, int]]:
    """First and last node that touches each buffer that has no place yet."""
    spans: dict[Buffer, tuple[int, int]] = {}
    for i, node in enumerate(nodes):
        for x in walk([node]):
            if not isinstance(x, Instruction):
                continue
            for s in (*x.writes, *x.reads):
                b = s.buffer
                if b.memory == memory and b.address is None and b.alias is None:
                    spans[b] = (spans.get(b, (i, i))[0], i)
    return spans


def _last_read(nodes: list[Node], s: Slice) -> int:
    """The last node that touches the buffer of a slice."""
    last = -1
    for i, node in enumerate(nodes):
        for x in walk([node]):
            if isinstance(x, Instruction) and any(y.buffer is s.buffer for y in x.reads + x.writes):
                last = i
    return last


def _numberwise(node: Node) -> bool:
    """Whether a node reads and writes number by number, at the same places."""
    if isinstance(node, For) and len(node.body) == 1:
        node = node.body[0]
    return isinstance(node, Instruction) and node.text.startswith(_IN_PLACE)


def _in_place(node: Node, b: Buffer, ending: list[Buffer]) -> Buffer | None:
    """The buffer whose place b may take, if its last use is the instruction that makes b."""
    if not _numberwise(node):
        return None
    node = node.body[0] if isinstance(node, For) else node
    reads = [s.buffer for s in node.reads]
    for other in ending:
        if other in reads and other.dtype == b.dtype and other.bytes == b.bytes:
            return other
    return None


def frees_before(nodes: list[Node], old: Buffer, new: Buffer) -> bool:
    """Whether nothing reads ``old`` any more once ``new`` is first written, except number by
    number in the instruction that writes it.
    """
    written = False
    for node in nodes:
        inside = [x for x in walk([node]) if isinstance(x, Instruction)]
        reads = any(s.buffer is old for x in inside for s in x.reads)
        writes = any(s.buffer is new for x in inside for s in x.writes)
        if written and reads:
            return False
        if writes and reads and not all(x.text.startswith(_IN_PLACE) for x in inside):
            return False
        written = written or writes
    return True
