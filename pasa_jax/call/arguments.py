"""The arguments of a call, and the call that an implementation is given."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from pasa_jax.call import checks, functions
from pasa_jax.call.backends import Implementation
from pasa_jax.call.checks import SegmentIds
from pasa_jax.core.block_mask import BlockMask
from pasa_jax.core.checks import flag, window
from pasa_jax.core.low_rank import LowRankBias
from pasa_jax.core.mask import Mask
from pasa_jax.core.mods import MaskMod, ScoreMod
from pasa_jax.core.operands import Operands
from pasa_jax.core.plan import Plan
from pasa_jax.core.precision import Precision
from pasa_jax.core.schedule import Schedule
from pasa_jax.core.target import find_target
from pasa_jax.core.tile import wide_type

Array = jax.Array
# Those that are arrays: `explain` takes their shapes alone.
ARRAYS = (
    "query",
    "key",
    "value",
    "bias",
    "mask",
    "query_seq_lengths",
    "key_value_seq_lengths",
    "segment_ids",
    "q_positions",
    "kv_positions",
    "block_mask",
    "q_data",
    "kv_data",
    "head_data",
    "sinks",
    "dropout_key",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Arguments:
    """The arguments of `dot_product_attention`, as they were given."""

    query: ArrayLike
    key: ArrayLike
    value: ArrayLike
    bias: ArrayLike | LowRankBias | None
    mask: ArrayLike | None
    scale: ArrayLike | None
    is_causal: bool
    query_seq_lengths: ArrayLike | None
    key_value_seq_lengths: ArrayLike | None
    local_window_size: int | tuple[int, int] | None
    implementation: Implementation
    return_residual: bool
    causal_alignment: str
    segment_ids: SegmentIds | None
    q_positions: ArrayLike | None
    kv_positions: ArrayLike | None
    mask_mod: MaskMod | None
    score_mod: ScoreMod | None
    block_mask: BlockMask | None
    q_data: Any
    kv_data: Any
    head_data: Any
    logits_soft_cap: float | None
    sinks: ArrayLike | None
    shift: str
    beta: float | None
    precision: str | Precision | None
    schedule: Schedule | None
    return_statistics: bool
    dropout_rate: float
    dropout_key: Array | None
    dropout_broadcast: bool
    interpret: bool


@dataclass(frozen=True)
class Call:
    """A call as an implementation takes it: checked, with the axis B, every default resolved.

    Arguments:
      batched: whether the arrays were given with the axis B.
    """

    operands: Operands
    mask: Mask
    plan: Plan
    batched: bool

    @staticmethod
    def of(given: Arguments) -> Call:
        """The canonical call.

        Raises:
          ValueError: an argument is wrong.
          ScheduleError: the schedule does not fit its target.
        """
        q, k, v = checks.query_key_value(given.query, given.key, given.value)
        target = given.schedule.target if isinstance(given.schedule, Schedule) else "cpu"
        precision = checks.precision(given.precision, str(q.dtype), given.shift, target)
        scale, number = checks.scale(given.scale, q)
        cap = given.logits_soft_cap
        causal, reach = flag("is_causal", given.is_causal), window(given.local_window_size)
        full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        kinds = checks.block_mask(given.block_mask, full)
        size = None if given.block_mask is None else given.block_mask.block_size
        plan = Plan(
            shift=given.shift,
            precision=precision,
            logits_soft_cap=None if cap is None else checks.soft_cap(cap),
            modified=given.score_mod is not None,
            schedule=checks.schedule(given.schedule, q, k, v, causal, reach, size),
            interpret=flag("interpret", given.interpret),
            beta=given.beta,
            scale=number,
            explicit_precision=given.precision not in (None, "int8"),
            dropout_rate=checks.dropout_rate(given.dropout_rate),
        )
        checks.shift(plan)
        ids = (None, None)
        if given.segment_ids is not None:
            ids = checks.segments(given.segment_ids, q, k)
        wide = wide_type(q.dtype)
        low_rank = given.bias if isinstance(given.bias, LowRankBias) else None
        bias = None if isinstance(given.bias, LowRankBias) else given.bias
        mods, data = functions.mods_of(given, full, wide)
        operands = Operands(
            query=q,
            key=k,
            value=v,
            bias=checks.bias(bias, full, wide),
            sinks=checks.sinks(given.sinks, q.shape[2]),
            scale=scale,
            factors=None if low_rank is None else checks.factors(low_rank, full, wide),
            data=data,
        )
        places = checks.positions(
            given.q_positions, given.kv_positions, q, k, given.causal_alignment
        )
        if not causal and reach is None:  # nothing else compares positions
            places = (None, None)
        mask = Mask(
            query_length=q.shape[1],
            key_length=k.shape[1],
            is_causal=causal,
            causal_alignment=given.causal_alignment,
            window=reach,
            query_lengths=checks.lengths("query_seq_lengths", given.query_seq_lengths, q),
            key_lengths=checks.lengths("key_value_seq_lengths", given.key_value_seq_lengths, k),
            query_segments=ids[0],
            key_segments=ids[1],
            query_positions=places[0],
            key_positions=places[1],
            kinds=kinds,
            block_size=size or (1, 1),
            mods=mods,
            array=checks.mask(given.mask, full),
            dropout=checks.seeds(plan.dropout_rate, given.dropout_key, given.dropout_broadcast, q),
        )
        if given.schedule is None:
            plan = _for_few_rows(plan, operands, mask)
        return Call(operands, mask, plan, batched=np.ndim(given.query) == 4)

    def unbatch(self, x: Array) -> Array:
        """x as it is returned: without the axis B where the arrays had none."""
        return x if self.batched else x[0]

    @property
    def empty(self) -> bool:
        """Whether there is no query or no key to compute with."""
        return 0 in self.operands.query.shape or 0 in self.operands.key.shape


def _for_few_rows(plan: Plan, o: Operands, mask: Mask) -> Plan:
    """The plan with longer tiles where rows are few, all see all keys, and slices are what costs:
    those of numbers of 16 bits on CPUs. Only where a block of keys has no mean.
    """
    rows, schedule = o.query.shape[1] * o.query.shape[2] // max(1, o.key.shape[2]), plan.schedule
    narrowed = mask.listed or mask.any_partial(1)
    copies = find_target(schedule.target).kind == "cpu" and o.query.dtype.itemsize == 2
    if not copies or narrowed or rows == 0 or not plan.storage.keeps_keys:
        return plan
    keys = min(schedule.keys_beside(rows, most=64), max(1, mask.key_length))
    return replace(plan, schedule=replace(schedule, block_kv=max(keys, schedule.block_kv)))
