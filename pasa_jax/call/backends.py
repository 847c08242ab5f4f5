"""The table of implementations, in the order in which None tries them.

An implementation adapts the plan to its machine (``adapt``), says what it cannot do
(``supports``) and computes (``run``). `choose` adapts the plan, once; whatever comes after it sees
only the adapted plan. Packages for accelerators are imported when first used.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pasa_jax.call.differentiation import Backward, Core, Forward, differentiable_attention
from pasa_jax.core.errors import BackendUnsupported, check_choice, wrong
from pasa_jax.core.heads import varying
from pasa_jax.core.mask import Mask
from pasa_jax.core.operands import Operands, Result, Wanted
from pasa_jax.core.plan import Plan
from pasa_jax.core.target import Target, find_target
from pasa_jax.implementations import lax as _lax
from pasa_jax.implementations import reference

Array = jax.Array
Implementation = str | Sequence[str] | None
Outputs = tuple[Array, Any]


class Backend(ABC):
    """One implementation. The plan that it is given is one that its ``adapt`` made."""

    is_kernel = False  # whether it can be run step by step, with ``interpret``

    def adapt(self, plan: Plan) -> Plan:
        """The plan that it follows: the types that its machine has, the forms that suit it."""
        return plan

    @abstractmethod
    def supports(self, operands: Operands, mask: Mask, plan: Plan) -> str | None:
        """None, or the reason why it cannot run the call."""

    @abstractmethod
    def passes(
        self, operands: Operands, mask: Mask, plan: Plan, *, anywhere: bool
    ) -> tuple[Forward, Backward]:
        """Its two passes. The backward pass also takes a result of more keys (`Result.whole`).

        Arguments:
          anywhere: whether it must run on whatever platform the program is compiled for.
        """

    def run(
        self, operands: Operands, mask: Mask, plan: Plan, *, lse: bool, anywhere: bool
    ) -> Outputs:
        """The output and, where ``lse`` asks for it, the log-sum-exp."""
        passes = self.passes(operands, mask, plan, anywhere=anywhere)
        return differentiable_attention(Core(*passes, plan, lse), operands, mask)


class Reference(Backend):
    """The plain formula."""

    def adapt(self, plan: Plan) -> Plan:
        return reference.adapt(plan)

    def supports(self, operands: Operands, mask: Mask, plan: Plan) -> str | None:
        return reference.supports(operands, mask, plan)

    def passes(
        self, operands: Operands, mask: Mask, plan: Plan, *, anywhere: bool
    ) -> tuple[Forward, Backward]:
        return _forward_by_formula, _backward_by_lax

    def run(
        self, operands: Operands, mask: Mask, plan: Plan, *, lse: bool, anywhere: bool
    ) -> Outputs:
        return reference.attention(operands, mask, plan)


class Lax(Backend):
    """The walk in lax loops, which runs on every platform."""

    def adapt(self, plan: Plan) -> Plan:
        return _lax.adapt(plan)

    def supports(self, operands: Operands, mask: Mask, plan: Plan) -> str | None:
        return _lax.supports(operands, mask, plan)

    def passes(
        self, operands: Operands, mask: Mask, plan: Plan, *, anywhere: bool
    ) -> tuple[Forward, Backward]:
        return _lax.forward, _lax.backward


def _forward_by_formula(operands: Operands, mask: Mask, plan: Plan, *, wanted: Wanted) -> Result:
    """The plain formula's result; it has no row statistics."""
    del wanted
    return Result(*reference.attention(operands, mask, plan))


def _backward_by_lax(
    operands: Operands, mask: Mask, plan: Plan, result: Result, d_out: Array, d_lse: Array | None
) -> Operands:
    """The lax walk's backward pass of a kernel's result; it needs no proof of a bound."""
    return _lax.backward(operands, mask, plan.unproved, result, d_out, d_lse)


@dataclass(frozen=True)
class Pallas(Backend):
    """The Pallas kernels for the chips of one kind.

    Arguments:
      kind: of the chips, as in `Target.kind`.
      platform: the platform's name in JAX.
      example: one of the chips.
    """

    kind: str
    platform: str
    example: str
    is_kernel = True

    def adapt(self, plan: Plan) -> Plan:
        return self._module.adapt(plan) if self._target_of(plan).kind == self.kind else plan

    def supports(self, operands: Operands, mask: Mask, plan: Plan) -> str | None:
        target = self._target_of(plan)
        if target.kind != self.kind:
            return (
                f"its schedule would have to be for a {self.kind.upper()}, and is for "
                f"{target.name} (schedule=Schedule.for_target({self.example!r}))"
            )
        return self._module.supports(operands, mask, plan)

    def passes(
        self, operands: Operands, mask: Mask, plan: Plan, *, anywhere: bool
    ) -> tuple[Forward, Backward]:
        forward, backward = self._module.forward, self._module.backward
        own = self._module.no_backward(operands, mask, plan) is None
        if anywhere and not plan.interpret:
            forward, backward = self._forward_or_lax, self._backward_or_lax
        return forward, backward if own else _backward_by_lax

    def _forward_or_lax(
        self, operands: Operands, mask: Mask, plan: Plan, *, wanted: Wanted
    ) -> Result:
        """The kernel where the program is compiled for ``platform``, the lax walk elsewhere."""

        def kernel(operands: Operands, mask: Mask) -> Result:
            return self._module.forward(operands, mask, plan, wanted=wanted)

        def elsewhere(operands: Operands, mask: Mask) -> Result:
            result = _lax.forward(operands, mask, plan, wanted=wanted)
            if wanted != "residuals":
                return result
            return result._replace(by_lax=varying(jnp.bool_(True), (operands, mask)))

        return self._where_compiled(kernel, elsewhere, operands, mask)

    def _backward_or_lax(
        self,
        operands: Operands,
        mask: Mask,
        plan: Plan,
        result: Result,
        d_out: Array,
        d_lse: Array | None,
    ) -> Operands:
        """The kernel where the program is compiled for ``platform``, the lax walk elsewhere."""

        def of(backward: Backward) -> Callable[..., Operands]:
            return lambda operands, mask, *rest: backward(operands, mask, plan, *rest)

        choices = (of(self._module.backward), of(_backward_by_lax))
        return self._where_compiled(*choices, operands, mask, result, d_out, d_lse)

    def _where_compiled(self, kernel: Any, elsewhere: Any, *arguments: Any) -> Any:
        """``kernel`` in programs for ``platform``, ``elsewhere`` in others."""
        choices = {self.platform: kernel}
        return jax.lax.platform_dependent(*arguments, **choices, default=elsewhere)

    @property
    def _module(self) -> Any:
        """The module of the kernels, imported when first used."""
        return importlib.import_module(f"pallas_kernels.{self.kind}")

    @staticmethod
    def _target_of(plan: Plan) -> Target:
        return find_target(plan.schedule.target)


BACKENDS: dict[str, Backend] = {
    "pallas_tpu": Pallas("tpu", "tpu", "tpu_v6e"),
    "pallas_gpu": Pallas("gpu", "cuda", "h100"),
    "lax": Lax(),
    "reference": Reference(),
}

# jax.nn's names, each with the names here that come nearest to it.
ALIASES: dict[str, tuple[str, ...]] = {"xla": ("lax",), "cudnn": ("pallas_gpu", "lax")}


class Choice(NamedTuple):
    """Which implementation runs a call, and the plan adapted to it.

    Arguments:
      why_not: for each other implementation, the reason.
    """

    name: str
    plan: Plan
    why_not: dict[str, str]


def choose(implementation: Implementation, operands: Operands, mask: Mask, plan: Plan) -> Choice:
    """The implementation to use, and the plan adapted to it.

    Arguments:
      implementation: None = the first of `BACKENDS` that supports the call, a name = that one,
        a sequence of names = the first of them that does. A name of `ALIASES` stands for its own.

    Raises:
      ValueError: an unknown name.
      BackendUnsupported: none of those asked for supports the call; with every reason.
    """
    names = _names(implementation)
    chosen: str | None = None
    why: dict[str, str] = {}
    plans = {name: backend.adapt(plan) for name, backend in BACKENDS.items()}
    for name, backend in BACKENDS.items():
        reason = backend.supports(operands, mask, plans[name])
        if reason is not None:
            why[name] = reason
        elif name not in names:
            why[name] = "it was not asked for"
    for name in names:
        if name in why:
            continue
        if chosen is None:
            chosen = name
        else:
            why[name] = f"{chosen!r} comes before it"
    if chosen is None:
        reasons = "; ".join(f"{name!r}: {why[name]}" for name in names)
        others = [name for name in BACKENDS if why[name] == "it was not asked for"]
        way_out = f" {others[0]!r} can, or None." if others else ""
        raise BackendUnsupported(f"`implementation` cannot run this call. {reasons}.{way_out}")
    if plan.interpret and not BACKENDS[chosen].is_kernel:
        allowed = "be False unless a Pallas kernel runs the call"
        way_out = "Name the kernel, with a schedule for its chip."
        raise wrong("interpret", allowed, f"True beside {chosen!r}", way_out)
    return Choice(chosen, plans[chosen], why)


def _names(implementation: Implementation) -> tuple[str, ...]:
    if implementation is None:
        return tuple(BACKENDS)
    allowed = (*BACKENDS, *ALIASES)
    one = isinstance(implementation, str) or not isinstance(implementation, Sequence)
    names: tuple[Any, ...] = (implementation,) if one else tuple(implementation)
    for name in names or ("",):
        check_choice("implementation", name, allowed)
    full = [x for name in names for x in ALIASES.get(name, (name,))]
    return tuple(dict.fromkeys(full))
