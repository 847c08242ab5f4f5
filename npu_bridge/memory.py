"""Where everything lies: addresses in the on-chip memories, from what is used when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from npu_bridge.dtypes import BLOCK
from npu_bridge.ir import Buffer, For, Instruction, Node, Slice, instructions
from pasa_jax.core.errors import PlanError
from pasa_jax.core.target import find_target


@dataclass
class Memory:
    """One on-chip memory: the buffers that stay for the whole kernel lie at its start, one behind
    the other; the values of one function lie behind them.

    Arguments:
      name: as in `Target.memories`.
      capacity: bytes.
      scratch: bytes behind the staying buffers that some function uses.
    """

    name: str
    capacity: int
    buffers: list[Buffer] = field(default_factory=list)
    scratch: int = 0

    @staticmethod
    def of(target: str, name: str) -> Memory:
        return Memory(name, find_target(target).memories[name])

    @property
    def staying(self) -> int:
        """Bytes of the buffers that stay."""
        return sum(b.bytes for b in self.buffers)

    @property
    def used(self) -> int:
        return self.staying + self.scratch

    def stay(self, name: str, dtype: str, count: int, slots: int = 1, note: str = "") -> Buffer:
        """A buffer that stays for the whole kernel. No value may have been placed before."""
        assert self.scratch == 0
        buffer = Buffer(name, self.name, dtype, count, slots, note, address=self.staying)
        self.buffers.append(buffer)
        return buffer

    def place(self, nodes: list[Node], base: int, spare: Sequence[Slice] = ()) -> list[Buffer]:
        """Gives addresses from ``base`` on to the buffers of a straight-line program, each for as
        long as it is used; a result may take the place of an operand that is used no more.

        Arguments:
          spare: memory that the program may overwrite once it has read it for the last time.
        """
        self._reuse(nodes, list(spare))
        spans = _spans(nodes, self.name)
        live: list[Buffer] = []
        for i, node in enumerate(nodes):
            starting = [b for b, (first, _) in spans.items() if first == i]
            ending = [b for b in live if spans[b][1] == i]
            for b in starting:
                operand = _replaceable(node, b, ending)
                if operand is not None:
                    b.address = operand.address
                    ending.remove(operand)
                    live.remove(operand)
                else:
                    b.address = _gap(b, live, base)
                assert b.address is not None
                live.append(b)
                self.scratch = max(self.scratch, b.address + b.bytes - self.staying)
            live = [b for b in live if spans[b][1] > i]
        return list(spans)

    def _reuse(self, nodes: list[Node], spare: list[Slice]) -> None:
        """Lets a value take the place of ``spare`` memory of its size in the instruction that reads
        that memory for the last time; a later value may take the place of this value likewise.
        """
        spans = _spans(nodes, self.name)
        for i, node in enumerate(nodes):
            for b in [b for b, (first, _) in spans.items() if first == i]:
                for s in spare:
                    if s.count != b.count or s.buffer.dtype != b.dtype:
                        continue
                    if _last_use(nodes, s) == i and _in_place(node) is not None:
                        b.alias = s
                        spare = [Slice(b, 0, b.count) if x is s else x for x in spare]
                        break

    def check(self, wanted: str) -> None:
        """Raises `PlanError` if more is used than there is."""
        if self.used > self.capacity:
            raise PlanError(
                f"{wanted} wants {self.used} bytes of {self.name}; there are {self.capacity}"
            )


def _gap(b: Buffer, live: list[Buffer], base: int) -> int:
    """The lowest address from ``base`` on where b fits between the buffers in use."""
    at = base
    for other in sorted(live, key=lambda x: x.address or 0):
        assert other.address is not None
        if at + b.bytes <= other.address:
            break
        at = max(at, other.address + other.bytes)
    return -(-at // BLOCK) * BLOCK


def _spans(nodes: list[Node], memory: str) -> dict[Buffer, tuple[int, int]]:
    """First and last node that touches each buffer that has no place yet."""
    spans: dict[Buffer, tuple[int, int]] = {}
    for i, node in enumerate(nodes):
        for x in instructions([node]):
            for s in (*x.writes, *x.reads):
                b = s.buffer
                if b.memory == memory and b.address is None and b.alias is None:
                    spans[b] = (spans.get(b, (i, i))[0], i)
    return spans


def _last_use(nodes: list[Node], s: Slice) -> int:
    """The last node that touches the buffer of a slice."""
    last = -1
    for i, node in enumerate(nodes):
        for x in instructions([node]):
            if any(y.buffer is s.buffer for y in x.reads + x.writes):
                last = i
    return last


def _in_place(node: Node) -> Instruction | None:
    """The instruction of a node, which may be a loop of one, if it may write where it reads."""
    if isinstance(node, For) and len(node.body) == 1:
        node = node.body[0]
    return node if isinstance(node, Instruction) and node.in_place else None


def _replaceable(node: Node, b: Buffer, ending: list[Buffer]) -> Buffer | None:
    """The operand whose place b may take, if its last use is the instruction that makes b."""
    instruction = _in_place(node)
    if instruction is None:
        return None
    reads = [s.buffer for s in instruction.reads]
    for other in ending:
        if other in reads and other.dtype == b.dtype and other.bytes == b.bytes:
            return other
    return None


def frees_before(nodes: list[Node], old: Buffer, new: Buffer) -> bool:
    """Whether nothing reads ``old`` any more once ``new`` is first written, except in place in the
    instruction that writes it.
    """
    written = False
    for node in nodes:
        inside = list(instructions([node]))
        reads = any(s.buffer is old for x in inside for s in x.reads)
        writes = any(s.buffer is new for x in inside for s in x.writes)
        if written and reads:
            return False
        if writes and reads and not all(x.in_place for x in inside):
            return False
        written = written or writes
    return True


def aliases(nodes: list[Node]) -> list[Buffer]:
    """The buffers in a body that are names for memory of others, in order."""
    result: dict[Buffer, None] = {}
    for x in instructions(nodes):
        result |= {s.buffer: None for s in (*x.writes, *x.reads) if s.buffer.alias is not None}
    return list(result)
