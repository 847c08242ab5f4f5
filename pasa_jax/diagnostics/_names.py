"""Names each call: by the module or function that made it, and by its library."""

from __future__ import annotations

from dataclasses import dataclass
from types import FrameType
from typing import Any

import jax
from flax import linen, nnx
from jax.core import Tracer

from pasa_jax.plugins import _callers

_VIA = {
    "flax.nnx.nn.attention": "flax.nnx",
    "flax.linen.attention": "flax.linen",
    # Within `inspect`, a model that calls flax's function itself calls one of these.
    "pasa_jax.plugins.nnx.attention": "flax.nnx",
    "pasa_jax.plugins.linen.attention": "flax.linen",
}


@dataclass(frozen=True)
class Root:
    """The outermost flax module that runs.

    Arguments:
      kind: its class.
      weights: its parameters. Jit runs copies of a module, which share its parameters. While linen
        initializes a model, parameters are added.
    """

    kind: str
    weights: tuple[Any, ...]

    def is_same(self, other: Root) -> bool:
        """Whether both are one model; yes if weights are tracers, of which it cannot be known."""
        if self.kind != other.kind:
            return False
        if any(isinstance(x, Tracer) for x in self.weights + other.weights):
            return True
        fewer, more = sorted(({id(x) for x in root.weights} for root in (self, other)), key=len)
        return fewer <= more


@dataclass(frozen=True)
class Caller:
    """Who made a call.

    Arguments:
      place: path of the flax module in the root, or the function and its line.
      steps: of the scans in which it ran, outermost first.
      via: see `pasa_jax.diagnostics.Call`.
      root: None where no module runs.
    """

    place: str
    steps: tuple[int, ...]
    via: str
    root: Root | None

    @property
    def name(self) -> str:
        """The place, and the steps in brackets."""
        return self.named(self.place)

    def named(self, place: str) -> str:
        """The steps behind another name of the place."""
        return place + "".join(f"[{step}]" for step in self.steps)


def caller() -> Caller | None:
    """The caller of the attention call that is on the stack; None where nothing is computed."""
    stack = _callers.frames()
    if _callers.tried_by_linen(stack):
        return None
    running = _callers.modules(stack)
    root = _root(running) if running else None
    return Caller(_callers.name(stack), _callers.scan_steps(stack), _via(stack), root)


def _via(stack: list[FrameType]) -> str:
    via = "pasa_jax"
    for frame in stack:
        module = frame.f_globals.get("__name__", "")
        library = _VIA.get(module) or _VIA.get(f"{module}.{frame.f_code.co_name}")
        if library:
            via = library
        elif module == "pasa_jax.plugins.patching" and via == "pasa_jax":
            via = "jax.nn"
    return via


def _root(running: list[Any]) -> Root:
    outermost = running[-1]
    if isinstance(outermost, nnx.Module):
        weights = nnx.state(outermost, nnx.Param)
    else:  # linen's apply runs in a module without variables, and binds a copy
        scopes = [m.scope for m in running if isinstance(m, linen.Module) and m.scope is not None]
        weights = scopes[-1].root.variables().get("params", {}) if scopes else {}
    return Root(type(outermost).__name__, tuple(jax.tree.leaves(weights)))


def unique_names(callers: list[Caller]) -> list[str]:
    """The callers' names, each below its root's where two roots have a place in common."""
    roots: list[Root] = []
    numbers = [_number(roots, caller.root) for caller in callers]
    places = [caller.place for caller in callers]
    if len(set(zip(places, numbers, strict=True))) == len(set(places)):
        return [caller.name for caller in callers]
    labels = _labels([root.kind for root in roots])
    return [
        caller.name
        if number is None
        else caller.named(_below(labels[number], roots[number], caller.place))
        for caller, number in zip(callers, numbers, strict=True)
    ]


def _number(roots: list[Root], root: Root | None) -> int | None:
    """The index of ``root`` in ``roots``, to which it is added if it is new."""
    if root is None:
        return None
    for i, other in enumerate(roots):
        if root.is_same(other):
            return i
    roots.append(root)
    return len(roots) - 1


def _labels(kinds: list[str]) -> list[str]:
    """The classes, with numbers where several are the same."""
    return [
        kind if kinds.count(kind) == 1 else f"{kind}_{kinds[:i].count(kind)}"
        for i, kind in enumerate(kinds)
    ]


def _below(label: str, root: Root, place: str) -> str:
    """``place`` below ``label``; the root itself is named by its label."""
    return label if place == root.kind else f"{label}.{place}"
