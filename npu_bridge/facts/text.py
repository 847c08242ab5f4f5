"""The calls in a kernel's source, compared with the facts as far as the text tells.

The types of tensors are those of their declarations: of the core's class, and of the function that
the call stands in.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, takewhile

from npu_bridge.facts import FACTS

_CALL = re.compile(r"\b(?P<name>[A-Z]\w*[a-z]\w*)(?:<(?P<template>[^<>;(){}]*)>)?\s*(?P<open>[({])")
_DEFINED = re.compile(
    r"\b(?:class|struct) (\w+)|__aicore__ inline (?:explicit )?(?:[\w:]+ )?(\w+)\("
)
_FUNCTION = re.compile(r"^    __aicore__ inline void \w+\(", re.MULTILINE)
_DECLARED = re.compile(r"^( +)(?:Local|Global)Tensor<(\w+)> (\w+)", re.MULTILINE)
_TENSOR = re.compile(r"(?:this->)?(\w+)(?:\.ReinterpretCast<(\w+)>\(\))?(?:\[.*\])?", re.DOTALL)
_MEMBER = 4  # how deep what belongs to a class is indented


@dataclass(frozen=True)
class Found:
    """A call in the text.

    Arguments:
      tensors: the C++ types of its first arguments, as far as they are tensors with a known type.
    """

    name: str
    line: int
    template: str
    arguments: list[str]
    tensors: list[str]

    @property
    def problem(self) -> str:
        """What the chip has against it; nothing if nothing."""
        if self.name in FACTS.fields:
            return ""
        fits = self.arguments and self.arguments[-1].startswith("Nd2NzParams")
        name = "Nd2Nz" if self.name == "DataCopy" and fits else self.name
        if name not in FACTS.calls:
            return f"{name} is in no table of what the chip has (npu_bridge/facts)"
        call = FACTS.calls[name]
        mode = re.search(rf"{call.mode}(\w+)", ", ".join(self.arguments)) if call.mode else None
        choice = self.template.split(", ")[-1].removeprefix("HardEvent::")
        return call.formed(len(self.arguments)) or call.problem(
            *self.tensors,
            mode=mode[1] if mode else "",
            choice=choice if call.choices else "",
        )


def problems(text: str) -> list[str]:
    """What is wrong with the calls of a source, as sentences."""
    return [f"line {call.line}: {call.problem}" for call in calls(text) if call.problem]


def calls(text: str) -> Iterator[Found]:
    """Every call of a function that the text itself does not define."""
    text = re.sub(r"//[^\n]*", lambda m: " " * len(m[0]), text)
    defined = {name for names in _DEFINED.findall(text) for name in names if name}
    for types, start, end in _scopes(text):
        for m in _CALL.finditer(text, start, end):
            arguments = _arguments(text, m.end() - 1)
            tensors = list(takewhile(bool, (_dtype(a, types) for a in arguments)))
            if m["name"] in defined and not (tensors and m["name"] in FACTS.calls):
                continue
            line = text.count("\n", 0, m.start()) + 1
            yield Found(m["name"], line, m["template"] or "", arguments, tensors)


def _scopes(text: str) -> Iterator[tuple[dict[str, str], int, int]]:
    """Each stretch of the text in which the same tensors are known: their types, start and end."""
    classes = [m.start() for m in re.finditer(r"^class ", text, re.MULTILINE)]
    ends = [*classes, len(text)]
    yield {}, 0, ends[0]
    for start, end in pairwise(ends):
        members = _declared(text[start:end], members=True)
        functions = [start + m.start() for m in _FUNCTION.finditer(text[start:end])]
        for a, b in pairwise([start, *functions, end]):
            yield members | _declared(text[a:b], members=False), a, b


def _declared(text: str, *, members: bool) -> dict[str, str]:
    """The types of the tensors that a text declares, by name."""
    found = _DECLARED.findall(text)
    return {name: dtype for space, dtype, name in found if (len(space) == _MEMBER) == members}


def _arguments(text: str, at: int) -> list[str]:
    """What stands between a bracket and the one that closes it, cut at its commas."""
    depth, parts, begin = 0, [], at + 1
    for i in range(at, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0 or (depth == 1 and text[i] == ","):
            parts.append(text[begin:i].strip())
            begin = i + 1
        if depth == 0:
            break
    return [part for part in parts if part]


def _dtype(argument: str, types: dict[str, str]) -> str:
    """The type of a tensor; nothing if it is none that the text declares."""
    m = _TENSOR.fullmatch(argument)
    return (m[2] or types[m[1]]) if m and m[1] in types else ""
