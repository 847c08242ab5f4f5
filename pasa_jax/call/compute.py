"""From the arguments of one call to what it returns."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pasa_jax.call import statistics
from pasa_jax.call.arguments import Arguments, Call
from pasa_jax.call.backends import BACKENDS, Choice, choose
from pasa_jax.call.explicit import HEADS, OUTPUT, ROWS, sharded
from pasa_jax.call.observe import announce
from pasa_jax.core.mask import Mask
from pasa_jax.core.operands import Operands
from pasa_jax.core.plan import Plan
from pasa_jax.core.tile import lowest, wide_type

Array = jax.Array


def compute(arguments: Arguments, *, wide_output: bool = False) -> Any:
    """What `dot_product_attention` returns.

    Arguments:
      wide_output: as in `Plan`.
    """
    call = Call.of(arguments)
    call = replace(call, plan=replace(call.plan, wide_output=wide_output))
    implementation = arguments.implementation
    chosen = choose(implementation, call.operands, call.mask, call.plan)
    asked = (arguments.return_residual, arguments.return_statistics)
    if call.empty:
        results = _of_nothing(call.operands, chosen.plan, *asked)
    else:
        announce(call.operands, call.mask, chosen.plan)
        run = partial(_run, chosen, implementation is None, *asked)
        results = sharded(run, call.operands, call.mask, _Results.places(*asked))
    parts = [jax.tree.map(call.unbatch, x) for x in results if x is not None]
    return parts[0] if len(parts) == 1 else tuple(parts)


class _Results(NamedTuple):
    """What a call returns, as far as it is asked for."""

    out: Any
    lse: Any
    statistics: Any

    @staticmethod
    def places(lse: bool, stats: bool) -> _Results:
        """Where each result's axes come from, for `sharded`."""
        return _Results(OUTPUT, ROWS if lse else None, HEADS if stats else None)


def _run(
    chosen: Choice, anywhere: bool, lse: bool, stats: bool, operands: Operands, mask: Mask
) -> _Results:
    *shape, size = operands.value.shape
    if size == 0:  # the weights still have a log-sum-exp
        operands = operands._replace(value=jnp.zeros((*shape, 1), operands.value.dtype))
    out, of_rows = BACKENDS[chosen.name].run(
        operands, mask, chosen.plan, lse=lse, anywhere=anywhere
    )
    of_heads = statistics.collect(operands, mask, chosen.plan) if stats else None
    return _Results(out[..., :size], of_rows if lse else None, of_heads)


def _of_nothing(o: Operands, plan: Plan, lse: bool, stats: bool) -> _Results:
    """The documented result where no query sees a key: 0, and the log-sum-exp of the sinks."""
    rows = o.query.shape[:3]
    wide = wide_type(o.query.dtype)
    of_rows = jnp.full(rows, lowest(wide))
    if o.sinks is not None:
        of_rows = jnp.broadcast_to(o.sinks.astype(wide), rows)
    return _Results(
        out=jnp.zeros((*rows, o.value.shape[-1]), plan.output(o.query.dtype)),
        lse=of_rows.astype(wide) if lse else None,
        statistics=statistics.of_nothing(o, plan) if stats else None,
    )
