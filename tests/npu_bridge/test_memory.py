"""Barriers and places, by brute force on random programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest

from npu_bridge.barriers import with_barriers
from npu_bridge.ir import Barrier, Buffer, For, Instruction, Slice, instructions
from npu_bridge.memory import Memory


@dataclass(eq=False)
class Random(Instruction):
    """An instruction of which only the memory that it touches counts."""

    to: Slice
    read: tuple[Slice, ...]
    pipe: ClassVar[str] = "V"
    text: ClassVar[str] = "Random"
    work: ClassVar[int] = 0

    @property
    def reads(self) -> tuple[Slice, ...]:
        return self.read

    def cycles(self, work: float, rates: Any) -> float:
        return 0

    def run(self, machine: Any) -> None:
        raise NotImplementedError


class InPlace(Random):
    in_place: ClassVar[bool] = True


def random_program(seed: int, slices: bool) -> list[Any]:
    """Straight-line instructions, some of them loops; each value is written before it is read."""
    rng = np.random.default_rng(seed)
    made: list[Buffer] = []
    nodes: list[Any] = []
    for i in range(int(rng.integers(3, 30))):
        count = int(rng.choice([8, 16, 64, 128]))
        recent = made[-6:]
        chosen = rng.permutation(len(recent))[: int(rng.integers(0, 3))]
        reads = tuple(_part(rng, recent[j], slices) for j in chosen)
        kind = InPlace if rng.random() < 0.6 else Random
        if kind is InPlace:  # as the lowering makes them: of one size
            reads = tuple(s for s in reads if s.buffer.count == count or not slices)
        again = made and rng.random() < 0.15
        buffer = recent[-1] if again else Buffer(f"x{i}", "UB", "float", count)
        if not again:
            made.append(buffer)
        node: Any = kind(_part(rng, buffer, slices and bool(again)), reads)
        if rng.random() < 0.2:
            node = For("lane", 0, 2, [node])
        nodes.append(node)
    return nodes


def _part(rng: Any, buffer: Buffer, slices: bool) -> Slice:
    if not slices or rng.random() < 0.5:
        return buffer.at()
    start = int(rng.integers(0, buffer.count))
    if rng.random() < 0.2:
        return buffer.at("lane")  # may be anywhere
    return buffer.at(start, int(rng.integers(1, buffer.count - start + 1)))


def touched(slices: tuple[Slice, ...]) -> set[int]:
    """Every byte that slices may touch."""
    found: set[int] = set()
    for s in slices:
        assert s.buffer.address is not None
        first, count = (s.offset, s.count) if isinstance(s.offset, int) else (0, s.buffer.count)
        start = s.buffer.address + 4 * first
        found |= set(range(start, start + 4 * count))
    return found


def dependent(a: Any, b: Any) -> bool:
    wrote, read = (
        {x for i in instructions([a]) for x in touched(getattr(i, k))} for k in ("writes", "reads")
    )
    writes, reads = (
        {x for i in instructions([b]) for x in touched(getattr(i, k))} for k in ("writes", "reads")
    )
    return bool(writes & (wrote | read) or reads & wrote)


@pytest.mark.parametrize("seed", range(40))
def test_a_barrier_stands_before_what_depends(seed):
    nodes = random_program(seed, slices=True)
    Memory("UB", 1 << 20).place(nodes, 0)
    found = with_barriers(nodes)
    assert [x for x in found if not isinstance(x, Barrier)] == nodes
    since: list[Any] = []
    for i, node in enumerate(found):
        if isinstance(node, Barrier):
            # ... and nowhere else.
            assert any(dependent(x, found[i + 1]) for x in since)
            since = []
            continue
        assert not any(dependent(x, node) for x in since)
        since.append(node)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("lent", [False, True])
def test_no_place_is_taken_while_it_is_in_use(seed, lent):
    """Every byte that is read holds what was last written to it under that name."""
    nodes = random_program(seed, slices=False)
    memory = Memory("UB", 1 << 20)
    staying = memory.stay("staying", "float", 64)
    spare = (staying.at(),) if lent else ()
    if lent:
        middle: Any = list(instructions(nodes))[len(nodes) // 2]
        middle.read += (staying.at(),)
    placed = memory.place(nodes, memory.staying, spare)
    assert all(b.address is not None and b.address % 32 == 0 for b in placed)
    assert memory.used == max([b.address + b.bytes for b in placed], default=memory.staying)
    owner: dict[int, Buffer] = dict.fromkeys(range(staying.bytes), staying)
    for node in instructions(nodes):
        for s in node.reads:
            if s.buffer.address is not None or s.buffer.alias is not None:
                assert all(owner.get(x) is s.buffer for x in where(s.buffer))
        for s in node.writes:
            others = [r.buffer for r in node.reads if r.buffer is not s.buffer]
            for other in others:
                same = where(other) == where(s.buffer)
                apart = not set(where(other)) & set(where(s.buffer))
                assert apart or (node.in_place and same)
            owner |= dict.fromkeys(where(s.buffer), s.buffer)


def where(b: Buffer) -> range:
    """The bytes of a buffer, wherever it is a name for."""
    if b.alias is not None:
        return where(b.alias.buffer)
    assert b.address is not None
    return range(b.address, b.address + 4 * b.count)
