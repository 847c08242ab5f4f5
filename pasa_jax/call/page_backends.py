"""The table of implementations of attention over pages, in the order in which None tries them."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax

from pasa_jax.core.errors import BackendUnsupported, check_choice, wrong
from pasa_jax.core.plan import Plan
from pasa_jax.core.target import find_target
from pasa_jax.implementations import lax as _lax
from pasa_jax.implementations import page_walk
from pasa_jax.implementations.page_walk import Call, Outputs


class PageBackend(ABC):
    """One implementation. The plan that it is given is one that its ``adapt`` made."""

    is_kernel = False  # whether it can be run step by step, with ``interpret``

    @abstractmethod
    def adapt(self, plan: Plan) -> Plan:
        """The plan that it follows."""

    @abstractmethod
    def supports(self, call: Call, plan: Plan) -> str | None:
        """None, or the reason why it cannot run the call."""

    @abstractmethod
    def run(self, call: Call, plan: Plan, *, anywhere: bool) -> Outputs:
        """The results.

        Arguments:
          anywhere: whether it must run on whatever platform the program is compiled for.
        """


class Lax(PageBackend):
    """The walk in lax loops, which runs on every platform."""

    def adapt(self, plan: Plan) -> Plan:
        plan = _lax.adapt(plan)
        return replace(plan, shift="mean") if plan.chooses_per_head else plan  # by all keys

    def supports(self, call: Call, plan: Plan) -> str | None:
        return None

    def run(self, call: Call, plan: Plan, *, anywhere: bool) -> Outputs:
        return page_walk.attend(*call, plan)


@dataclass(frozen=True)
class Pallas(PageBackend):
    """The Pallas kernel for the chips of one kind.

    Arguments:
      kind, platform, example: as of `backends.Pallas`.
    """

    kind: str
    platform: str
    example: str
    is_kernel = True

    def adapt(self, plan: Plan) -> Plan:
        return self._module.adapt(plan) if self._is_for(plan) else plan

    def supports(self, call: Call, plan: Plan) -> str | None:
        if not self._is_for(plan):
            return (
                f"its schedule would have to be for a {self.kind.upper()}, and is for "
                f"{plan.schedule.target} (schedule=Schedule.for_target({self.example!r}))"
            )
        return self._module.supports(call, plan)

    def run(self, call: Call, plan: Plan, *, anywhere: bool) -> Outputs:
        if plan.interpret or not anywhere:
            return self._module.attend(call, plan)

        def of(attend: Callable[[Call, Plan], Outputs]) -> Callable[..., Outputs]:
            return lambda *arrays: attend(call.beside(*arrays), plan)

        choices = {self.platform: of(self._module.attend)}
        elsewhere = of(lambda call, plan: page_walk.attend(*call, plan))
        return jax.lax.platform_dependent(*call.arrays, **choices, default=elsewhere)

    @property
    def _module(self) -> Any:
        """The module of the kernel, imported when first used."""
        return importlib.import_module(f"pallas_kernels.{self.kind}_pages")

    def _is_for(self, plan: Plan) -> bool:
        return find_target(plan.schedule.target).kind == self.kind


BACKENDS: dict[str, PageBackend] = {
    "pallas_tpu": Pallas("tpu", "tpu", "tpu_v6e"),
    "pallas_gpu": Pallas("gpu", "cuda", "h100"),
    "lax": Lax(),
}


def choose(implementation: str | None, call: Call, plan: Plan) -> tuple[str, Plan]:
    """The name of the implementation to use, and the plan adapted to it.

    Arguments:
      implementation: None = the first that supports the call, a name = that one.

    Raises:
      ValueError: an unknown name.
      BackendUnsupported: the one that is named does not support the call.
    """
    if implementation is not None:
        check_choice("implementation", implementation, tuple(BACKENDS))
    for name in BACKENDS if implementation is None else (implementation,):
        adapted = BACKENDS[name].adapt(plan)
        reason = BACKENDS[name].supports(call, adapted)
        if reason is None:
            break
    if reason is not None:
        way_out = "'lax' can, or None."
        raise BackendUnsupported(
            f"`implementation` cannot run this call. {name!r}: {reason}. {way_out}"
        )
    if plan.interpret and not BACKENDS[name].is_kernel:
        allowed = "be False unless a Pallas kernel runs the call"
        way_out = "Name the kernel, with a schedule for its chip."
        raise wrong("interpret", allowed, f"True beside {name!r}", way_out)
    return name, adapted
