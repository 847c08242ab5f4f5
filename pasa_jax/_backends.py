"""The table of implementations, in the order in which None tries them.

An implementation is a module with ``supports(operands, mask, plan)`` (None, or the reason why not
as a sentence) and ``attend(operands, mask, plan)``; modules are imported when first used, so that
`import pasa_jax` needs no accelerator package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax

from pasa_jax import _lax, reference
from pasa_jax._attend import Core, attend
from pasa_jax._errors import BackendUnsupported, check_choice
from pasa_jax._operands import Operands
from pasa_jax._prepare import Plan
from pasa_jax.mask import Mask

Array = jax.Array
Implementation = str | Sequence[str] | None


@dataclass(frozen=True)
class Backend:
    """One implementation: what it cannot do, and how it computes output and log-sum-exp."""

    supports: Callable[[Operands, Mask, Plan], str | None]
    attend: Callable[[Operands, Mask, Plan], tuple[Array, Array]]


def _attend_lax(operands: Operands, mask: Mask, plan: Plan) -> tuple[Array, Array]:
    return attend(Core(_lax.forward, plan), operands, mask)


BACKENDS: dict[str, Backend] = {
    "lax": Backend(_lax.supports, _attend_lax),
    "reference": Backend(reference.supports, reference.attend),
}


def choose(
    implementation: Implementation, operands: Operands, mask: Mask, plan: Plan
) -> tuple[str, dict[str, str]]:
    """The name of the implementation to use, and why each other one is not.

    Arguments:
      implementation: None = the first of `BACKENDS` that supports the call, a name = that one,
        a sequence of names = the first of them that does.

    Raises:
      ValueError: an unknown name.
      BackendUnsupported: none of those asked for supports the call; with every reason.
    """
    names = _names(implementation)
    chosen: str | None = None
    why: dict[str, str] = {}
    for name, backend in BACKENDS.items():
        reason = backend.supports(operands, mask, plan)
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
    return chosen, why


def _names(implementation: Implementation) -> tuple[str, ...]:
    if implementation is None:
        return tuple(BACKENDS)
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    for name in names:
        check_choice("implementation", name, tuple(BACKENDS))
    if not names:
        check_choice("implementation", "", tuple(BACKENDS))
    return names
