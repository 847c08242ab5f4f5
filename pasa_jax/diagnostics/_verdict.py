"""What the measured calls mean, in sentences: the verdict and the advice."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from pasa_jax.diagnostics._call import Call
from pasa_jax.diagnostics._forms import DTYPES
from pasa_jax.diagnostics._measure import LARGEST

Calls = Sequence[Call]
Head = tuple[int, int]  # index of the call, query head

_REPAIRS = {
    "flax.nnx": "Run the model inside `with pasa_jax.plugins.nnx.replaced():`, which swaps the "
    "attention of flax.nnx that these heads call for PASA's.",
    "flax.linen": "Run `model.apply` inside `with pasa_jax.plugins.linen.replaced():`, which swaps "
    "the attention of flax.linen that these heads call for PASA's.",
    "jax.nn": "Run the model inside `with pasa_jax.plugins.replace_jax_nn():`, which swaps the "
    "`jax.nn.dot_product_attention` that these heads call for PASA's.",
    "pasa_jax": "These heads call `pasa_jax.dot_product_attention`, which is safe as it is.",
}


def heads_of(calls: Calls) -> int:
    """Query heads of all calls."""
    return sum(call.heads for call in calls)


def overflowing(calls: Calls) -> list[Head]:
    """Every head with a q·k beyond float16, largest first."""
    lost = _heads_where(calls, lambda call: call.overflows)
    return sorted(lost, key=lambda at: -calls[at[0]].max_product[at[1]])


def inaccurate(calls: Calls, dtype: str) -> list[Head]:
    """Every head that eager code in ``dtype`` gets wrong, overflow included."""
    return _heads_where(calls, lambda call: call.inaccurate(dtype))


def _heads_where(calls: Calls, of: Callable[[Call], NDArray]) -> list[Head]:
    return [(i, int(n)) for i, call in enumerate(calls) for n in np.flatnonzero(of(call))]


def verdict(calls: Calls) -> str:
    """One sentence: which heads overflow float16."""
    lost = [call.name for call in calls if any(call.not_finite)]
    if lost:
        return f"Not finite before any attention: an input of {lost[0]} holds NaN or infinity."
    beyond = overflowing(calls)
    if not beyond:
        top = max(float(call.max_product.max(initial=0)) for call in calls)
        return f"No head overflows float16: the largest |q·k| is {top:,.0f} of {LARGEST:,.0f}."
    return (
        f"{len(beyond)} of {heads_of(calls)} heads overflow float16, in {_where(calls, beyond)}: "
        "code that stores q·k in float16 gives NaN there."
    )


def _where(calls: Calls, beyond: list[Head]) -> str:
    """The three loudest of the calls that overflow, by name, and how many more there are."""
    loudest = list(dict.fromkeys(i for i, _ in beyond))
    names: dict[str, list[str]] = {}
    for i in loudest[:3]:
        names.setdefault(calls[i].name, []).append(str(i))
    places = [
        f"{name} (call{'s' * (len(numbers) > 1)} {', '.join(numbers)})"
        for name, numbers in names.items()
    ]
    more = [f"{len(loudest) - 3} more"] if len(loudest) > 3 else []
    return ", ".join(places + more)


def advice(calls: Calls) -> list[str]:
    """Sentences: a repair for each way by which attention was called, and what none repairs."""
    at_risk = {i for i, _ in overflowing(calls)}
    for dtype in DTYPES:
        at_risk |= {i for i, _ in inaccurate(calls, dtype)}
    vias = dict.fromkeys(calls[i].via for i in sorted(at_risk))
    return [_REPAIRS[via] for via in vias] + [
        f"In {count} of {heads_of(calls)} heads the cast of query, key and value to {dtype} costs "
        "more than 1 % by itself, which no attention gives back: keep those in a wider type."
        for dtype in DTYPES
        if (count := sum(int(call.cast_costs_much(dtype).sum()) for call in calls))
    ]
