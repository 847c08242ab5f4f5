"""Static checks of the files of an emitted project, which may have been edited since.

Found here: calls, types and modes that the chip does not have (`npu_bridge.facts`), a core's
program that does not begin and end as it must, events that are set and never waited for, ids and
flags out of range, local tensors that reach beyond their memory or are not aligned, files that
differ from what this version emits. The emulator finds races, deadlocks and everything that depends
on the data.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from npu_bridge.dtypes import ITEMSIZE
from npu_bridge.facts import FACTS
from npu_bridge.facts.text import problems
from npu_bridge.layout import POSITIONS
from npu_bridge.program import build
from npu_bridge.project import NAME, files, read_description
from npu_bridge.specification import Kernel
from pasa_jax.core.target import find_target

_MEMORIES = {position: memory for memory, position in POSITIONS.items()}
_TENSOR = re.compile(r"LocalTensor<(\w+)>\(TPosition::(\w+), (\d+), (\d+)\)")
_EVENT = re.compile(r"(Set|Wait)Flag<HardEvent::(\w+)>\(([^;]*)\);")
_CROSS = re.compile(r"CrossCore(Set|Wait)Flag<(\d+), PIPE_(\w+)>\((\w+)\);")
_RUN = re.compile(r"^    __aicore__ inline void Run\(\) \{\n(.*?)^    \}", re.MULTILINE | re.DOTALL)
_FLAG = re.compile(r"constexpr uint16_t (\w+) = (\d+);")
_AGAIN = "Careful"  # begins the names of classes that run where a result was not right


def check(folder: Path, kernel: Kernel | None = None) -> list[str]:
    """What is wrong, as sentences; nothing if the text is in order.

    Arguments:
      kernel: what was emitted, where its functions do not stand in modules.
    """
    source = folder / f"{NAME}.cpp"
    if not source.exists():
        return [f"there is no {source.name} in {folder}"]
    text = source.read_text()
    kernel = read_description(folder, kernel)
    findings = [
        *problems(text),
        *_ends(text),
        *_tensors(text, kernel.schedule.target),
        *_events(text),
        *_cross(text),
    ]
    emitted = files(build(kernel))
    for name, want in emitted.items():
        path = folder / name
        if not path.exists():
            findings.append(f"{name} is missing")
        elif path.read_text() != want:
            findings.append(
                f"{name} is not what this version emits for kernel.json: edited, or older"
            )
    return findings


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def _tensors(text: str, target: str) -> list[str]:
    capacity = find_target(target).memories
    findings = []
    for m in _TENSOR.finditer(text):
        dtype, position, address, count = m[1], m[2], int(m[3]), int(m[4])
        memory = _MEMORIES[position]
        end = address + count * ITEMSIZE[dtype]
        where = f"line {_line(text, m.start())}"
        if memory == "UB" and end > FACTS.scratch[0]:
            findings.append(
                f"{where}: a tensor ends at {end} in UB, where {FACTS.scratch[0]} to "
                f"{FACTS.scratch[1]} are the library's: Select writes there"
            )
        elif end > capacity[memory]:
            findings.append(
                f"{where}: a tensor ends at {end} of {capacity[memory]} bytes of {memory}"
            )
        if address % 32:
            findings.append(f"{where}: address {address} is not a multiple of 32")
    return findings


def _ends(text: str) -> list[str]:
    """What each core's program must begin and end with."""
    findings = []
    for name, body in _classes(text).items():
        run = _RUN.search(body)
        calls = [line.strip() for line in run[1].splitlines()] if run else []
        calls = [line for line in calls if line and not line.startswith("//")]
        ends = [(FACTS.first, 0), (FACTS.last, -1)]
        for what, at in ends[1:] if name.startswith(_AGAIN) else ends:  # which runs after another
            if not calls or calls[at] != f"{what}();":
                place = "begins" if at == 0 else "ends"
                findings.append(f"{name}: its Run() {place} without {what}()")
    return findings


def _events(text: str) -> list[str]:
    """Each pair of pipes and id is set as often as it is waited for, in the text of each core."""
    findings = []
    for name, body in _classes(text).items():
        count: Counter[tuple[str, str]] = Counter()
        for m in _EVENT.finditer(body):
            kind, event, number = m[1], m[2], m[3].strip()
            if number.isdigit() and int(number) > FACTS.fields["Event"].limits["id"][1]:
                findings.append(f"{name}: {event} uses the reserved event id {number}")
            count[event, number] += 1 if kind == "Set" else -1
        findings += [
            f"{name}: HardEvent::{event} ({number}) is {'set' if n > 0 else 'waited for'} {abs(n)} "
            f"times more often than {'waited for' if n > 0 else 'set'}"
            for (event, number), n in sorted(count.items())
            if n and number.isdigit() and not _slotted(count, event)
        ]
    return findings


def _slotted(count: Counter[tuple[str, str]], event: str) -> bool:
    """Whether an event's id is also an expression: then texts do not pair one by one."""
    return any(e == event and not number.isdigit() for e, number in count)


def _cross(text: str) -> list[str]:
    """Each cross-core flag is set by one kind of core and waited for by the other."""
    flags = {m[1]: int(m[2]) for m in _FLAG.finditer(text)}
    _, last = FACTS.fields["CrossCore"].limits["flag"]
    findings = [
        f"the flag {name} = {number} is reserved: 0 to {last} without SyncAll's "
        f"{', '.join(map(str, FACTS.taken_flags))} are free"
        for name, number in flags.items()
        if number > last or number in FACTS.taken_flags
    ]
    classes = _classes(text)
    sides: dict[str, dict[str, set[str]]] = {}
    for core, body in classes.items():
        for m in _CROSS.finditer(body):
            side = sides.setdefault(m[4], {"Set": set(), "Wait": set()})[m[1]]
            side.add(core.removeprefix(_AGAIN))
    for name in flags:
        side = sides.get(name, {"Set": set(), "Wait": set()})
        if len(side["Set"]) != 1 or len(side["Wait"]) != 1 or side["Set"] == side["Wait"]:
            setters, waiters = sorted(side["Set"]), sorted(side["Wait"])
            findings.append(f"the flag {name} is set by {setters} and waited for by {waiters}")
    return findings


def _classes(text: str) -> dict[str, str]:
    """The text of each core's class."""
    parts = re.split(r"^class (\w+)", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))
