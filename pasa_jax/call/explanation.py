"""`Explanation`: what would be done with a call."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax

from pasa_jax.call.arguments import ARRAYS, Arguments, Call
from pasa_jax.call.backends import choose
from pasa_jax.core.precision import Precision
from pasa_jax.core.schedule import Schedule


@dataclass(frozen=True)
class Explanation:
    """What `dot_product_attention` would do with a call, and why not otherwise.

    Arguments:
      implementation: the name that would run.
      shift: the shift that would be used; ``"none or mean"`` where it depends on the data.
      reason: why this shift.
      precision, schedule: as resolved.
      guarded: whether finite inputs are promised finite outputs.
      why_not: for every other implementation, the reason.
    """

    implementation: str
    shift: str
    reason: str
    precision: Precision
    schedule: Schedule
    guarded: bool
    why_not: dict[str, str]

    def __str__(self) -> str:
        lines = [
            f"implementation  {self.implementation}",
            f"shift           {self.shift}: {self.reason}",
            f"precision       {self.precision}",
            f"schedule        {self.schedule}",
            f"finite outputs  {'promised for finite inputs' if self.guarded else 'not promised'}",
        ]
        lines += [f"not {name}: {reason}" for name, reason in self.why_not.items()]
        return "\n".join(lines)


def explained(arguments: Arguments) -> Explanation:
    """What would be done with a call; arrays may be `jax.ShapeDtypeStruct`."""
    explanations: list[Explanation] = []

    def trace(arrays: dict[str, Any]) -> None:
        call = Call.of(replace(arguments, **arrays))
        name, plan, why_not = choose(arguments.implementation, call.operands, call.mask, call.plan)
        shift, reason = plan.explain_shift()
        explanations.append(
            Explanation(
                name, shift, reason, plan.precision, plan.schedule, plan.promises_finite, why_not
            )
        )

    arrays = {name: getattr(arguments, name) for name in ARRAYS}
    jax.eval_shape(trace, {name: x for name, x in arrays.items() if x is not None})
    return explanations[0]
