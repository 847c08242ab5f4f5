"""The facts as a header of the emulator: `python -m npu_bridge.facts.cpp` writes it."""

from __future__ import annotations

from npu_bridge.emulation import EMULATOR
from npu_bridge.facts import FACTS, Call, Facts, Fields

PATH = EMULATOR / "facts.h"
_HEAD = """\
// What this chip has, as AscendC's headers say. Written by `python -m npu_bridge.facts.cpp` from
// npu_bridge/facts/dav_2201.toml: change that.
#pragma once

#include "numbers.h"

// The events that a flag can join, as X(from, to).
#define ASCENDC_EVENTS(X) \\
  {events}

namespace AscendC::emulator::facts {{

struct Limit {{
  int64_t low, high;
}};

template <class... Mode>
constexpr uint32_t modes(Mode... mode) {{
  return ((1u << int(mode)) | ...);
}}

// The bytes of UB that are kept for the library, and the cross-core flags that SyncAll takes.
constexpr uint64_t kScratchBegin = {begin}, kScratchEnd = {end};
constexpr int64_t kTakenFlags[] = {{{flags}}};

// By the types of its tensors, whether the chip has a call, or which modes of it, as bits.
{calls}

// What a field may be.
{fields}

}}  // namespace AscendC::emulator::facts
"""


def header(facts: Facts) -> str:
    """The text of `facts.h`."""
    events = (x.split("_") for x in facts.calls["SetFlag"].choices)
    return _HEAD.format(
        events=" \\\n  ".join(f"X({a}, {b})" for a, b in events),
        begin=facts.scratch[0],
        end=facts.scratch[1],
        flags=", ".join(map(str, facts.taken_flags)),
        calls="\n".join(_call(x) for x in facts.calls.values() if x.types),
        fields="\n".join(_fields(x) for x in facts.fields.values()),
    )


def _call(call: Call) -> str:
    lines = [f"template <class... T> inline constexpr uint32_t {call.name} = 0;"]
    for types, modes in call.types.items():
        value = f"modes({', '.join(call.mode + mode for mode in modes)})" if modes else "1"
        name = f"{call.name}<{', '.join(types)}>"
        lines.append(f"template <> inline constexpr uint32_t {name} = {value};")
    return "\n".join(lines)


def _fields(fields: Fields) -> str:
    limits = ", ".join(f"{name}{{{low}, {high}}}" for name, (low, high) in fields.limits.items())
    return f"namespace {fields.name} {{ constexpr Limit {limits}; }}"


if __name__ == "__main__":
    PATH.write_text(header(FACTS))
