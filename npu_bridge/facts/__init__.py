"""What AscendC has on this chip, as its own headers say: `dav_2201.toml` and how it is asked.

The generator, the emulator and `npu_bridge.check` take their lists of types, modes and limits from
here, so that none of them can hold a belief of its own.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from pasa_jax.core.errors import LoweringError


@dataclass(frozen=True)
class Call:
    """A call of AscendC; the file says what each field means.

    Arguments:
      types: modes by what stands for the template letters, ("float", "half"); () if there are none.
    """

    name: str
    source: str
    operands: tuple[str, ...] = ()
    forms: tuple[tuple[str, ...], ...] = ()
    types: dict[tuple[str, ...], tuple[str, ...]] = field(default_factory=dict)
    mode: str = ""
    newer: str = ""
    listed: bool = True
    tpipe: bool = False
    scratch: bool = False
    scalar: bool = False
    flags: tuple[int, ...] = ()
    choices: tuple[str, ...] = ()

    def require(self, *tensors: str, mode: str = "", choice: str = "") -> None:
        """Raises where the call cannot be emitted so.

        Arguments:
          tensors: the C++ types of its tensors, in the order of the call; of the first ones, if
            no more are known.
          mode: of rounding, comparing or quantising.
          choice: the template argument, "PIPE_V" or "MTE2_V".

        Raises:
          LoweringError: the sentence names the call, what it takes, what was asked, and the header.
        """
        problem = self.problem(*tensors, mode=mode, choice=choice)
        if problem:
            raise LoweringError(problem)

    def problem(self, *tensors: str, mode: str = "", choice: str = "") -> str:
        """What `require` would say; nothing if the call can be emitted so."""
        if self.tpipe:
            return (
                f"{self.name} needs a live TPipe, which kernels with static tensors do not have "
                f"({self.source})"
            )
        if choice and choice not in self.choices:
            return self._refused(list(self.choices), choice)
        letters: dict[str, str] = {}
        for letter, dtype in zip(self.operands, tensors, strict=False):
            if letters.setdefault(letter, dtype) != dtype:
                return self._refused(self._near(()), _listed(tensors))
        types = tuple(letters.values())
        if not types or len(types) < len(set(self.operands)):
            return ""  # no tensors, or not all are known
        if types not in self.types:
            return self._refused(self._near(types), _listed(types))
        if mode and mode not in self.types[types]:
            return self._refused(list(self.types[types]), f"{mode} of {_listed(types)}")
        return ""

    def formed(self, arguments: int) -> str:
        """What is wrong with a number of arguments; nothing if there is such a form."""
        if not self.forms or any(len(form) == arguments for form in self.forms):
            return ""
        return self._refused([f"({', '.join(form)})" for form in self.forms], f"{arguments}")

    def _near(self, types: tuple[str, ...]) -> list[str]:
        """What there is that has one of these types in its place; all, if nothing has."""
        near = [x for x in self.types if any(a == b for a, b in zip(x, types, strict=False))]
        return [_listed(x) for x in near or self.types]

    def _refused(self, allowed: list[str], seen: str) -> str:
        return f"{self.name} takes {' or '.join(allowed)} on this chip, not {seen} ({self.source})"


@dataclass(frozen=True)
class Fields:
    """The lowest and the highest value of each number of a group."""

    name: str
    source: str
    limits: dict[str, tuple[int, int]]

    def require(self, **values: Any) -> None:
        """Raises where a value that is known here is out of its limits.

        Raises:
          LoweringError: the sentence names the field, its limits, the value, and the header.
        """
        for name, value in values.items():
            low, high = self.limits[name]
            if isinstance(value, int) and not low <= value <= high:
                raise LoweringError(
                    f"{self.name}.{name} must be {low} to {high} on this chip; got {value} "
                    f"({self.source})"
                )


@dataclass(frozen=True)
class Facts:
    """The whole table.

    Arguments:
      scratch: the bytes of UB that are kept for the library.
      first, last: the calls with which a core's program must begin and end.
      static_tensors: the page of the guide that says so.
    """

    calls: dict[str, Call]
    fields: dict[str, Fields]
    scratch: tuple[int, int]
    first: str
    last: str
    static_tensors: str

    def call(self, name: str) -> Call:
        """The entry of a call.

        Raises:
          LoweringError: there is none, so it must not be emitted.
        """
        if name not in self.calls:
            raise LoweringError(
                f"{name} is not in npu_bridge/facts/dav_2201.toml, so it cannot be emitted: add "
                "what the headers say of it first"
            )
        return self.calls[name]

    @property
    def taken_flags(self) -> tuple[int, ...]:
        """Cross-core flags that calls take themselves."""
        return tuple(flag for call in self.calls.values() for flag in call.flags)


def _listed(types: tuple[str, ...]) -> str:
    return types[0] if len(types) == 1 else f"({', '.join(types)})"


def _call(name: str, entry: dict[str, Any]) -> Call:
    types = entry.get("types", {})
    modes = types if isinstance(types, dict) else dict.fromkeys(types, ())
    fixed: dict[str, Any] = {
        "operands": tuple(entry.get("operands", "").split()),
        "types": {tuple(key.split()): tuple(value) for key, value in modes.items()},
        "forms": tuple(tuple(form.split()) for form in entry.get("forms", ())),
        "flags": tuple(entry.get("flags", ())),
        "choices": tuple(entry.get("choices", ())),
    }
    return Call(name, **(entry | fixed))


def _fields(name: str, entry: dict[str, Any]) -> Fields:
    limits = {key: (x[0], x[1]) for key, x in entry.items() if key != "source"}
    return Fields(name, entry["source"], limits)


def load(text: str) -> Facts:
    """The table that a file of facts holds."""
    table = tomllib.loads(text)
    low, high = table["ub"]["scratch"]
    return Facts(
        {name: _call(name, entry) for name, entry in table["calls"].items()},
        {name: _fields(name, entry) for name, entry in table["fields"].items()},
        (low, high),
        table["static_tensors"]["first"],
        table["static_tensors"]["last"],
        table["static_tensors"]["source"].rsplit(":", 1)[0],
    )


FACTS = load(files("npu_bridge.facts").joinpath("dav_2201.toml").read_text("utf-8"))
