"""What a compiled program sends, and what it computes meanwhile, read from its optimised HLO."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1}
COLLECTIVE = re.compile(
    r"(?P<name>[\w.\-]+) = (?P<shapes>.*?) (?P<kind>all-gather|all-to-all|collective-permute"
    r"|reduce-scatter|all-reduce)(?P<half>-start|-done)?\(%?(?P<operand>[\w.\-]*)"
)
SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
GROUP = re.compile(r"replica_groups=(?:\{\{([\d,]+)\}|\[(\d+),(\d+)\])")
COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
CALLED = re.compile(
    r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
    r"|branch_computations=\{([^}]*)\}"
)
# A product of matrices, or a kernel of Pallas.
PRODUCT = re.compile(
    r" (?:dot|convolution)\(|tpu_custom_call|__cublas|__gpu\$xla\.gpu\.triton|__triton"
)


@dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Arguments:
      kind: as HLO calls it.
      sent: bytes that a device sends.
      is_async: whether it has a start and an end.
      overlapped: whether products are computed between them.
    """

    kind: str
    sent: float
    is_async: bool = False
    overlapped: bool = False


def collectives(text: str) -> list[Collective]:
    """Every collective of ``text``, a program's optimised HLO."""
    program = _computations(text)
    found = [(name, x) for name, lines in program.items() for x in _of_lines(lines, program)]
    # libtpu writes a reduce-scatter as an all-reduce and a slice, which it runs as one.
    return [_scattered(x) if name.startswith("all-reduce-scatter") else x for name, x in found]


def _scattered(x: Collective) -> Collective:
    return replace(x, kind="reduce-scatter", sent=x.sent / 2)


def _computations(text: str) -> dict[str, list[str]]:
    """The instructions of each computation by its name, in their order."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        match = COMPUTATION.match(line)
        if match is not None:
            lines = found.setdefault(match["name"], [])
        elif " = " in line:
            lines.append(line)
    return found


def _of_lines(lines: list[str], program: dict[str, list[str]]) -> Iterator[Collective]:
    ends = {x["operand"]: i for i, x in _matches(lines) if x["half"] == "-done"}
    for i, match in _matches(lines):
        if match["half"] == "-done":
            continue
        end = ends.get(match["name"], i) if match["half"] else i
        between = lines[i + 1 : end]
        yield Collective(
            kind=match["kind"],
            sent=_sent(match, lines[i]),
            is_async=bool(match["half"]),
            overlapped=any(_has_product(x, program) for x in between),
        )


def _matches(lines: list[str]) -> list[tuple[int, re.Match[str]]]:
    found = ((i, COLLECTIVE.search(line)) for i, line in enumerate(lines))
    return [(i, match) for i, match in found if match is not None]


def _sent(match: re.Match[str], line: str) -> float:
    """Bytes that a device sends."""
    shapes = SHAPE.findall(match["shapes"])
    if match["half"]:  # of operands, results, and scalars for the compiler's own use
        shapes = [x for x in shapes if x[1]]
        shapes = shapes[len(shapes) // 2 :] if match["kind"] != "all-reduce" else shapes
    size = sum(BYTES[kind] * math.prod(int(x) for x in of.split(",") if x) for kind, of in shapes)
    group = GROUP.search(line)
    devices = 1
    if group is not None:
        devices = len(group[1].split(",")) if group[1] else int(group[3])
    share = (devices - 1) / devices
    return {
        "all-gather": size * share,
        "all-to-all": size * share,
        "collective-permute": size,
        "reduce-scatter": size * (devices - 1),
        "all-reduce": 2 * size * share,
    }[match["kind"]]


def _has_product(line: str, program: dict[str, list[str]]) -> bool:
    """Whether an instruction, or what it calls, multiplies matrices."""
    if PRODUCT.search(line):
        return True
    names = [x for one, many in CALLED.findall(line) for x in (one, *many.split(","))]
    called = (program.get(x.strip().lstrip("%"), []) for x in names if x)
    return any(_has_product(x, program) for lines in called for x in lines)
