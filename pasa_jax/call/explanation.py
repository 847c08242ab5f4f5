"""`Explanation`: what would be done with a call."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax

from pasa_jax.call.arguments import ARRAYS, Arguments, Call
from pasa_jax.call.backends import choose
from pasa_jax.core.block_mask import BlockMask
from pasa_jax.core.mask import Mask
from pasa_jax.core.operands import Operands
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
      tiles: how many tiles of how many a head visits, and who says so.
      guarded: whether finite inputs are promised finite outputs.
      why_not: for every other implementation, the reason.
    """

    implementation: str
    shift: str
    reason: str
    precision: Precision
    schedule: Schedule
    tiles: str
    guarded: bool
    why_not: dict[str, str]

    def __str__(self) -> str:
        lines = [
            f"implementation  {self.implementation}",
            f"shift           {self.shift}: {self.reason}",
            f"precision       {self.precision}",
            f"schedule        {self.schedule}",
            f"tiles           {self.tiles}",
            f"finite outputs  {'promised for finite inputs' if self.guarded else 'not promised'}",
        ]
        lines += [f"not {name}: {reason}" for name, reason in self.why_not.items()]
        return "\n".join(lines)


def explained(arguments: Arguments) -> Explanation:
    """What would be done with a call; arrays may be `jax.ShapeDtypeStruct`."""
    explanations: list[Explanation] = []
    blocks, mask = "", arguments.block_mask
    if isinstance(mask, BlockMask) and mask.is_concrete:
        blocks = f"; {mask.sparsity():.1f} % of the blocks of block_mask are hidden"

    def trace(arrays: dict[str, Any]) -> None:
        call = Call.of(replace(arguments, **arrays))
        name, plan, why_not = choose(arguments.implementation, call.operands, call.mask, call.plan)
        shift, reason = plan.explain_shift()
        explanations.append(
            Explanation(
                implementation=name,
                shift=shift,
                reason=reason,
                precision=plan.precision,
                schedule=plan.schedule,
                tiles=_tiles(call.operands, call.mask, plan.schedule) + blocks,
                guarded=plan.promises_finite,
                why_not=why_not,
            )
        )

    arrays = {name: getattr(arguments, name) for name in ARRAYS}
    jax.eval_shape(trace, {name: x for name, x in arrays.items() if x is not None})
    return explanations[0]


def _tiles(operands: Operands, mask: Mask, schedule: Schedule) -> str:
    """How many tiles a head visits, as far as it is known before the call runs."""
    if 0 in operands.query.shape or 0 in operands.key.shape:
        return "none: there is nothing to compute"
    groups = operands.query.shape[2] // operands.key.shape[2]
    block_q = max(1, min(schedule.block_q // groups, mask.query_length))
    by_place = replace(mask, query_lengths=None, key_lengths=None)
    starts = range(0, mask.query_length, block_q)
    ranges = [by_place.place_range(i, i + block_q, schedule.block_kv) for i in starts]
    visited = sum(int(r.hi - r.lo) for r in ranges)
    total = len(starts) * -(-mask.key_length // schedule.block_kv)
    said = f"{visited} of {total} by lengths, causality and window"
    named = {
        "segment_ids": mask.query_segments,
        "q_positions and kv_positions": mask.query_positions,
        "block_mask": mask.kinds,
        "query_seq_lengths": mask.query_lengths,
        "key_value_seq_lengths": mask.key_lengths,
    }
    narrows = [name for name, x in named.items() if x is not None]
    if narrows:
        said += f"; fewer where {', '.join(narrows)} say so, on the device"
    if mask.tested:
        said += "; a tile that mask or mask_mod hides is looked at, and no more"
    return said
