"""Mutants of an emitted kernel: one text in which each of many small defects can be switched on.

A mutant is a number in the environment variable MUTANT; 0 is the kernel as it was emitted. So one
compilation serves them all.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

_SYNC = re.compile(
    r"^\s*((?:Set|Wait)Flag<|PipeBarrier<|CrossCore(?:Set|Wait)Flag<|SyncAll<|InitSocState)"
)
_ZEROING = re.compile(r"^\s*(Duplicate\(\w+\.ReinterpretCast<half>|Select\()")
_TENSOR = re.compile(r"(TPosition::\w+, \d+, )(\d+)(\))")
_STRIDES = re.compile(r"\{1, ([01]), ([01]), (\d+), (\d+), (\d+)\}")
_ND2NZ = re.compile(
    r"(Nd2NzParams\{1, \d+, \d+, 0, static_cast<uint16_t>\()([^{}]*?)(\), )(\d+)(, 1, 0\})"
)
_FIXPIPE = re.compile(r"(FixpipeParamsV220\{\d+, \d+, \d+, )(\d+)(,)")
_LOAD = re.compile(r"(LoadData2DParams\{0, (?!1,)\d+, )(\d+)(,)")


@dataclass(frozen=True)
class Mutant:
    number: int
    kind: str
    line: int
    text: str


def with_switches(source: str) -> tuple[str, list[Mutant]]:
    """The source with every mutant in it, and what they are."""
    mutants: list[Mutant] = []
    lines = []
    for number, line in enumerate(source.splitlines(), 1):

        def new(kind: str, line: str = line, number: int = number) -> int:
            mutants.append(Mutant(len(mutants) + 1, kind, number, line.strip()))
            return len(mutants)

        lines.append(_switched(line, new))
    text = "\n".join(lines) + "\n"
    head = '#include <cstdlib>\nstatic const int MUTANT = std::atoi(std::getenv("MUTANT"));\n'
    return head + text, mutants


def _switched(line: str, new: Callable[[str], int]) -> str:
    if _SYNC.match(line):
        kind = "dropped " + re.sub(r"[<(].*", "", line.strip())
        return f"if (MUTANT != {new(kind)}) {{ {line.strip()} }}"
    if _ZEROING.match(line):
        return f"if (MUTANT != {new('dropped zeroing')}) {{ {line.strip()} }}"
    line = _TENSOR.sub(
        lambda m: f"{m[1]}(MUTANT == {new('shrunk buffer')} ? {_half(m[2])} : {m[2]}){m[3]}", line
    )
    line = _STRIDES.sub(lambda m: _swapped(m, new), line)
    line = _ND2NZ.sub(
        lambda m: (
            f"{m[1]}MUTANT == {new('wrong row stride')} ? ({m[2]}) + 16 : ({m[2]})"
            f"{m[3]}{m[4]}{m[5]}"
        ),
        line,
    )
    line = _FIXPIPE.sub(
        lambda m: (
            f"{m[1]}(MUTANT == {new('wrong output stride')} ? {2 * int(m[2])} : {m[2]}){m[3]}"
        ),
        line,
    )
    return _LOAD.sub(
        lambda m: (
            f"{m[1]}(MUTANT == {new('wrong fractal stride')} ? {int(m[2]) + 1} : {m[2]}){m[3]}"
        ),
        line,
    )


def _half(count: str) -> int:
    """Half of a tensor; of a short one, which is padded to a block, the first number."""
    return int(count) // 2 if int(count) > 64 else 1


def _swapped(m: re.Match[str], new: Callable[[str], int]) -> str:
    """Repeat strides of the two sources changed for each other, where they differ."""
    if (m[1], m[4]) == (m[2], m[5]):
        return m[0]
    n = new("swapped strides")
    first = [f"(MUTANT == {n} ? {a} : {b})" for a, b in ((m[2], m[1]), (m[1], m[2]))]
    second = [f"(MUTANT == {n} ? {a} : {b})" for a, b in ((m[5], m[4]), (m[4], m[5]))]
    return f"{{1, {first[0]}, {first[1]}, {m[3]}, {second[0]}, {second[1]}}}"
