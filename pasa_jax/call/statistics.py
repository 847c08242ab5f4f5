"""`Statistics`: how large the scores of a call are, per head, before and after the shift."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pasa_jax.core import tile
from pasa_jax.core.guard import key_norms, log2_norm
from pasa_jax.core.mask import Index, Mask
from pasa_jax.core.operands import Operands
from pasa_jax.core.plan import Plan
from pasa_jax.core.shifts import SHIFTS
from pasa_jax.implementations.head_walk import HeadWalk, over_heads

Array = jax.Array

REASONS = (
    "asked for",
    "scores are stored in at least float32",
    "the float32 product is seen before it is rounded",
    "rounded products, and the offset makes the scores that count larger",
    "rounded products, and shifting would not make the scores smaller",
    "the bound on its scores is proved to be safe",
    "the bound on its scores is too wide",
)


class Statistics(NamedTuple):
    """Per query head, over the pairs that the mask shows; without the axis B in unbatched calls.

    Scores are scaled, before bias and soft cap. All are float32 but the two codes.
    """

    max_score: Array  # [B, N] max |scale·q·k|
    max_stored: Array  # [B, N] max |S'| as stored, after the shift and the guard
    guard_bound: Array  # [B, N] Cauchy–Schwarz bound on |S'|, from which the guard is computed
    guard_exponent: Array  # [B, N] largest e; scores were stored divided by 2^e
    overflow_share: Array  # [B, N] share of scores that plain storage would have made non-finite
    key_bias: Array  # [B, N] norm of the keys' mean over the sequence
    key_spread: Array  # [B, N] root mean square distance of the keys from that mean
    gap: Array  # [B, N] of `bound`: log2 of how far a row's bound may lie above its maximum; else 0
    resonance: Array  # [B, N] −1 to 1: the largest |score| over ‖q‖·‖k‖'s largest, signed
    shift: Array  # [B, N] int32: index into `pasa_jax.shifts.SHIFTS`
    reason: Array  # [B, N] int32: index into `REASONS`

    def describe(self, head: int, batch: int | None = None) -> str:
        """One line on one head; arrays must be concrete."""
        index = (head,) if batch is None else (batch, head)
        shift, reason = SHIFTS[int(self.shift[index])], REASONS[int(self.reason[index])]
        return (
            f"max |score| {float(self.max_score[index]):.4g}, as stored "
            f"{float(self.max_stored[index]):.4g}; plain storage loses "
            f"{float(self.overflow_share[index]):.2%}; shift {shift}: {reason}"
        )


def collect(operands: Operands, mask: Mask, plan: Plan) -> Statistics:
    """The statistics of one call, by one more walk over its tiles; works under jit."""

    operands, mask = jax.lax.stop_gradient((operands, mask))
    return per_head(operands, mask, plan, _head)


def of_nothing(operands: Operands, plan: Plan) -> Statistics:
    """The statistics of a call without queries or keys: zeros, and the shift with its reason."""
    shape = (operands.query.shape[0], operands.query.shape[2])
    shift, reason = _choice(plan, jnp.zeros((), bool) if plan.chooses_per_head else None)
    zeros = [jnp.zeros(shape, jnp.float32)] * (len(Statistics._fields) - 2)
    return Statistics(*zeros, *(jnp.full(shape, x, jnp.int32) for x in (shift, reason)))


def per_head(operands: Operands, mask: Mask, plan: Plan, look: Callable[[HeadWalk], Any]) -> Any:
    """``look(walk)`` of every key head, whose leaves are [G, …], as [B, N, …]."""

    def program(walk: HeadWalk, b: Index, h: Index) -> tuple[Any, None]:
        del b, h
        return jax.tree.map(lambda x: x[None], look(walk)), None

    of_heads, _ = over_heads(operands, mask, plan, program)
    return jax.tree.map(lambda x: x[:, 0], of_heads)


def overflow_edge(dtype: str) -> float:
    """The smallest magnitude that ``dtype`` rounds to infinity: half a unit in the last place above
    its largest number."""
    info = jnp.finfo(dtype)
    return float(info.max) * (1 + float(info.eps) / 4)


class _Extremes(NamedTuple):
    """Folded over the tiles of a key head, each [G]."""

    high: Array
    low: Array
    stored: Array
    lost: Array
    count: Array


def _head(walk: HeadWalk) -> Statistics:
    """[G] of each: the statistics of one key head's query heads."""
    numerics, groups = walk.numerics, walk.groups
    edge = overflow_edge(walk.plan.precision.scores)
    # `BENEATH_MAXIMUM` rounds S' minus the maximum, the others S' itself.
    rounds_difference = numerics.storage is tile.Storage.BENEATH_MAXIMUM

    def query_tile(i: Array, e: _Extremes) -> _Extremes:
        start = walk.query_start(i)
        query = walk.query(start)
        raw, fresh = walk.rows(walk.head.query, start), walk.fresh(start, i)
        state = tile.initial_state(len(raw), 1, numerics)

        def step(j: Index, seen: Array | None, e: _Extremes) -> _Extremes:
            k, _, usable = walk.raw_keys(j)
            s = tile.plain_scores(raw, tile.zero_unusable(k, usable), walk.head.scale, numerics)
            s = jnp.where(jnp.isnan(s), jnp.inf, s).astype(jnp.float32)
            tiled = tile.scores(query, walk.key(j), state, seen, None, numerics)
            base = 0 if rounds_difference else tiled.base
            stored = jnp.abs(tiled.stored + base).astype(jnp.float32)
            shown = jnp.broadcast_to(fresh if seen is None else fresh & seen, s.shape)
            s, stored, shown = (x.reshape(groups, -1) for x in (s, stored, shown))
            return _Extremes(
                high=jnp.maximum(e.high, jnp.max(jnp.where(shown, s, -jnp.inf), axis=1)),
                low=jnp.minimum(e.low, jnp.min(jnp.where(shown, s, jnp.inf), axis=1)),
                stored=jnp.maximum(e.stored, jnp.max(jnp.where(shown, stored, 0), axis=1)),
                lost=e.lost + jnp.sum(shown & (jnp.abs(s) >= edge), axis=1, dtype=jnp.float32),
                count=e.count + jnp.sum(shown, axis=1, dtype=jnp.float32),
            )

        return walk.over_keys(start, step, e)

    zero = jnp.zeros(groups, jnp.float32)
    empty = _Extremes(zero - jnp.inf, zero + jnp.inf, zero, zero, zero)
    return _summary(walk, walk.over_queries(query_tile, empty))


def _summary(walk: HeadWalk, e: _Extremes) -> Statistics:
    head, facts, plan, zero = walk.head, walk.facts, walk.plan, jnp.zeros_like(e.count)
    some = e.count > 0
    peak = jnp.where(some, jnp.where(e.high >= -e.low, e.high, e.low), 0)
    scale = jnp.log2(jnp.abs(head.scale)).astype(jnp.float32)
    of_q = jnp.max(log2_norm(head.query), axis=0)
    of_k, of_shifted = map(jnp.max, key_norms(head.key, facts.usable, facts.kappa, plan))
    exponent = zero
    if facts.guard is not None:
        exponent = jnp.max(jnp.log2(facts.guard.temper) + jnp.log2(facts.guard.beyond), axis=0)
    usable = facts.usable[:, None]
    count = jnp.maximum(jnp.sum(usable, dtype=jnp.float32), 1)
    k = tile.zero_unusable(head.key, usable).astype(jnp.float32)
    mean = jnp.sum(k / count, axis=0)
    spread = jnp.sqrt(jnp.sum(tile.zero_unusable(jnp.square(k - mean) / count, usable)))
    shift, reason = _choice(plan, facts.chosen)
    if facts.bound is not None:
        reason = 5 if plan.storage is tile.Storage.BOUND else 6
    return Statistics(
        max_score=jnp.abs(peak),
        max_stored=e.stored,
        guard_bound=jnp.exp2(of_q + of_shifted + scale).astype(jnp.float32),
        guard_exponent=exponent.astype(jnp.float32),
        overflow_share=e.lost / jnp.maximum(e.count, 1),
        key_bias=zero + jnp.linalg.norm(mean),
        key_spread=zero + spread,
        gap=zero if facts.bound is None else facts.bound.gap.astype(jnp.float32),
        resonance=_share(peak, of_q + of_k + scale).astype(jnp.float32),
        shift=jnp.full(zero.shape, shift, jnp.int32),
        reason=jnp.full(zero.shape, reason, jnp.int32),
    )


def _share(peak: Array, log2: Array) -> Array:
    """peak/2^log2, between −1 and 1; 0 of nothing."""
    log2 = jnp.where(peak == 0, 0, log2)
    return jnp.clip(peak / jnp.exp2(log2), -1, 1)


def _choice(plan: Plan, chosen: Array | None) -> tuple[Array | int, Array | int]:
    """Indices into `SHIFTS` and `REASONS`."""
    shift = SHIFTS.index(plan.storage.shift)
    if plan.shift != "auto":
        return shift, 0
    if chosen is not None:
        return jnp.where(chosen, shift, SHIFTS.index("none")), jnp.where(chosen, 3, 4)
    return shift, 1 if plan.storage is tile.Storage.PLAIN else 2
