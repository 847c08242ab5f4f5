"""Which flax module, or which function, runs: read off Python's stack."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import jax
from flax import linen, nnx

# Functions of these packages are not part of a model.
_LIBRARIES = ("pasa_jax.", "jax.", "flax.", "contextlib")
_SCAN = inspect.unwrap(jax.lax.scan).__code__


def frames() -> list[FrameType]:
    """The frames of the caller, innermost first."""
    return list(_outwards(sys._getframe(1)))


def modules(stack: list[FrameType]) -> list[Any]:
    """The flax modules whose methods run, innermost first."""
    owners = (_owner(frame) for frame in stack)
    return [owner for owner in owners if isinstance(owner, (nnx.Module, linen.Module))]


def path(running: list[Any]) -> str:
    """The path of the innermost module, as seen from the outermost module that holds it.

    The outermost module itself has the path "". Jit and scan run copies of modules, which the
    outermost does not hold: then the path begins with the class of the copy that holds the module.
    """
    innermost = running[0]
    if isinstance(innermost, linen.Module):
        return "" if innermost.scope is None else ".".join(innermost.path)
    for outer in reversed(running):
        if isinstance(outer, nnx.Module) and outer is not innermost:
            for parts, module in nnx.iter_modules(outer):
                if module is innermost:
                    copied = [] if outer is running[-1] else [type(outer).__name__]
                    return ".".join([*copied, *map(str, parts)])
    return "" if innermost is running[-1] else type(innermost).__name__


def name(stack: list[FrameType]) -> str:
    """The path or the class of the innermost module, or the function that runs, and its line."""
    running = modules(stack)
    return path(running) or type(running[0]).__name__ if running else _function(stack)


def scan_steps(stack: list[FrameType]) -> tuple[int, ...]:
    """The step of each `jax.lax.scan` that runs, outermost first; () under jit.

    Without jit a scan is a Python loop, whose variable is ``i``.
    """
    steps = (frame.f_locals.get("i") for frame in reversed(stack) if frame.f_code is _SCAN)
    return tuple(step for step in steps if isinstance(step, int))


def tried_by_linen(stack: list[FrameType]) -> bool:
    """Whether linen's scan traces its body beforehand, to see what does not depend on the step."""
    return any(
        frame.f_globals.get("__name__") == "flax.core.axes_scan"
        and frame.f_locals.get("init_mode") is True
        for frame in stack
    )


def _function(stack: list[FrameType]) -> str:
    for frame in stack:
        if not frame.f_globals.get("__name__", "").startswith(_LIBRARIES):
            return f"{frame.f_code.co_qualname}:{frame.f_lineno}"
    return "call"


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _owner(frame: FrameType) -> Any:
    """The object whose method runs: the first argument, if it has a method of that name."""
    code = frame.f_code
    first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    return first if hasattr(type(first), code.co_name) else None
