"""The table of implementations, in the order in which None tries them.

An implementation puts the plan into its own terms (``adapt``), says what it cannot do
(``supports``: None, or the reason as a sentence) and computes (``attend``). `choose` adapts the
plan, once; whatever comes after it sees that plan alone. Packages for accelerators are imported
when first used.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax

from pasa_jax.call.differentiation import Core, Forward, attend
from pasa_jax.core.errors import BackendUnsupported, check_choice, wrong
from pasa_jax.core.mask import Mask
from pasa_jax.core.operands import Keep, Operands, Result
from pasa_jax.core.prepare import Plan
from pasa_jax.core.target import find_target
from pasa_jax.implementations import lax as _lax
from pasa_jax.implementations import reference

Array = jax.Array
Implementation = str | Sequence[str] | None
Outputs = tuple[Array, Any]


def _as_it_is(plan: Plan) -> Plan:
    return plan


@dataclass(frozen=True)
class Backend:
    """One implementation; what it is given is a plan that its ``adapt`` made.

    Arguments:
      supports: None, or why it cannot run the call.
      attend: the output, and the log-sum-exp where the last argument asks for it.
      adapt: the plan that it follows: the types that its machine has, the forms that it likes.
      elsewhere: how to compute where the call is lowered for another platform than its own; None:
        it runs on every platform.
    """

    supports: Callable[[Operands, Mask, Plan], str | None]
    attend: Callable[[Operands, Mask, Plan, bool], Outputs]
    adapt: Callable[[Plan], Plan] = _as_it_is
    elsewhere: Callable[[Operands, Mask, Plan, bool], Outputs] | None = None

    def run(
        self, operands: Operands, mask: Mask, plan: Plan, *, lse: bool, anywhere: bool
    ) -> Outputs:
        """Output and log-sum-exp; with ``anywhere``, on whatever platform this is lowered for."""
        anywhere = anywhere and not plan.interpret
        use = self.elsewhere if anywhere and self.elsewhere is not None else self.attend
        return use(operands, mask, plan, lse)


def _attend_lax(operands: Operands, mask: Mask, plan: Plan, lse: bool) -> Outputs:
    return attend(Core(_lax.forward, plan, lse), operands, mask)


def _kernels(kind: str) -> Any:
    """The module whose kernels run on chips of a kind, imported when first used."""
    return importlib.import_module(f"pallas_kernels.{kind}")


def _pallas(kind: str, platform: str, example: str) -> Backend:
    """The Pallas kernels for chips of ``kind``, which JAX calls ``platform`` when it compiles;
    ``example`` is one of them.
    """

    def supports(operands: Operands, mask: Mask, plan: Plan) -> str | None:
        target = find_target(plan.schedule.target)
        if target.kind != kind:
            return (
                f"its schedule would have to be for a {kind.upper()}, and is for {target.name} "
                f"(schedule=Schedule.for_target({example!r}))"
            )
        return _kernels(kind).supports(operands, mask, plan)

    def adapt(plan: Plan) -> Plan:
        fits = find_target(plan.schedule.target).kind == kind
        return _kernels(kind).adapt(plan) if fits else plan

    def alone(operands: Operands, mask: Mask, plan: Plan, lse: bool) -> Outputs:
        return attend(Core(_kernels(kind).forward, plan, lse), operands, mask)

    on_or_lax = partial(_on_or_lax, kind, platform)

    def or_lax(operands: Operands, mask: Mask, plan: Plan, lse: bool) -> Outputs:
        return attend(Core(on_or_lax, plan, lse), operands, mask)

    return Backend(supports, alone, adapt, or_lax)


def _on_or_lax(
    kind: str, platform: str, operands: Operands, mask: Mask, plan: Plan, *, keep: Keep
) -> Result:
    """The kernel where this is lowered for ``platform``, the lax walk elsewhere."""

    def on(forward: Forward) -> Callable[[Operands, Mask], Result]:
        return lambda operands, mask: forward(operands, mask, plan, keep=keep)

    choices = {platform: on(_kernels(kind).forward)}
    return jax.lax.platform_dependent(operands, mask, **choices, default=on(_lax.forward))


BACKENDS: dict[str, Backend] = {
    "pallas_tpu": _pallas("tpu", "tpu", "tpu_v6e"),
    "pallas_gpu": _pallas("gpu", "cuda", "h100"),
    "lax": Backend(_lax.supports, _attend_lax),
    "reference": Backend(reference.supports, reference.attend, reference.adapt),
}

# The names that jax.nn has, for what comes nearest to them here.
ALIASES: dict[str, tuple[str, ...]] = {"xla": ("lax",), "cudnn": ("pallas_gpu", "lax")}


class Choice(NamedTuple):
    """Which implementation runs a call, and its own plan for it.

    Arguments:
      why_not: for each other implementation, the reason.
    """

    name: str
    plan: Plan
    why_not: dict[str, str]


def choose(implementation: Implementation, operands: Operands, mask: Mask, plan: Plan) -> Choice:
    """The implementation to use, with the plan in its own terms.

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
    if plan.interpret and BACKENDS[chosen].elsewhere is None:
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
