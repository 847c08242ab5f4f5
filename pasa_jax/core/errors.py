"""The exceptions of all three packages, and the one helper that writes their sentences.

ValueError               a wrong call: shapes, dtypes, unknown names
├── ScheduleError        a schedule that does not fit the chip (in bytes)
├── BackendUnsupported   a right call that the named implementation cannot do
└── PlanError            npu_bridge: a kernel that does not fit the chip
NotImplementedError
└── LoweringError        npu_bridge: a traced operation that has no instruction
RuntimeError
└── EmulationError       npu_bridge: a kernel that the host emulator could not run
"""

from __future__ import annotations


class ScheduleError(ValueError):
    """The tiles of a `Schedule` do not fit the memories of its target."""


class BackendUnsupported(ValueError):
    """The implementation asked for cannot run this call; another one can."""


class PlanError(ValueError):
    """A kernel does not fit the chip."""


class LoweringError(NotImplementedError):
    """A traced operation has no instruction."""


class EmulationError(RuntimeError):
    """The host emulator could not run a kernel."""


def wrong(argument: str, allowed: str, seen: object, way_out: str = "") -> ValueError:
    """The error for a wrong argument: its name, what is allowed, what was seen, the way out."""
    sentence = f"`{argument}` must {allowed}; got {seen}."
    return ValueError(f"{sentence} {way_out}".rstrip())


def check_choice(argument: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raises unless ``value`` is one of the names ``allowed``."""
    if not isinstance(value, str) or value not in allowed:
        names = ", ".join(repr(name) for name in allowed)
        raise wrong(argument, f"be one of {names}", repr(value))
