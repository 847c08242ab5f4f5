"""What a head's keys and queries are asked once, before its tiles are walked.

The block means κ, which keys are usable, the guard's powers of two, and `auto`'s choice where it
depends on the data (docs/algorithm.md, sections 4 to 6). O((T + S)·D) work, O(T + S) memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pasa_jax.core.mask import Mask
from pasa_jax.core.precision import Precision
from pasa_jax.core.schedule import Schedule
from pasa_jax.core.shifts import optimal_beta, paper_matrix
from pasa_jax.core.target import find_target
from pasa_jax.core.tile import Dialect, Guard, Numerics, mean_key, wide_type

Array = jax.Array

# Largest |S'| the guard lets into float16: half of its range, for `reference` behind the rounding
# subtracts an r as large as S itself. And into an accumulator.
_FLOAT16_LOG2 = 14.0
_PRODUCT_LOG2 = {"float32": 120.0, "float64": 1000.0}
# Largest |q/α| where the query is multiplied by 1/α in its own type.
_QUERY_LOG2 = {"float16": 15.0, "bfloat16": 120.0, "float32": 120.0, "float64": 1000.0}
# Values up to 2^94 can be summed over 2^31 of them in float32.
_SUMMABLE_LOG2 = 94
# A product of float16 numbers is below 2^32·D: up to this factor it stays in float32.
_SAFE_SCALE = 2.0**60


@dataclass(frozen=True)
class Plan:
    """The static part of one call, all defaults resolved.

    Arguments:
      shift: as asked for, ``"auto"`` included.
      precision, schedule: resolved.
      logits_soft_cap: or None.
      beta: β of `paper`, or None for `optimal_beta` of the block.
      scale: 1/α where it is a Python number; None: it is an array. `paper` folds it into M.
      explicit_precision: whether the caller named the precision.
      dialect: the forms that the implementation's machine likes.
      dropout_rate: the share of the weights that dropout drops.
      guarded: whether the implementation keeps scores in range (eq. 12).
      interpret: whether a Pallas kernel is run step by step, on any device.
    """

    shift: str
    precision: Precision
    schedule: Schedule
    logits_soft_cap: float | None = None
    beta: float | None = None
    scale: float | None = None
    explicit_precision: bool = False
    dialect: Dialect = field(default_factory=Dialect)
    dropout_rate: float = 0.0
    guarded: bool = True
    interpret: bool = False

    @property
    def resolved(self) -> str:
        """The shift after the static part of `auto`'s choice (section 6)."""
        if self.shift != "auto":
            return self.shift
        if self.precision.scores in ("float32", "float64") and self.precision.products != "float16":
            return "none"
        return "reference" if self.reachable else "mean"

    @property
    def reachable(self) -> bool:
        target = find_target(self.schedule.target)
        return target.accumulator_reachable and self.precision.products == "float32"

    @property
    def promises_finite(self) -> bool:
        """Whether finite inputs must give finite outputs (all but plain and all-16-bit forms)."""
        narrow = (self.precision.statistics, self.precision.accumulator)
        return self.guarded and self.shift != "none" and "float16" not in narrow

    @property
    def chooses_per_head(self) -> bool:
        return self.shift == "auto" and self.resolved == "mean"

    def explain_shift(self) -> tuple[str, str]:
        """The shift, and the reason for it as a clause."""
        target, scores = self.schedule.target, self.precision.scores
        if self.shift != "auto":
            return self.shift, "it was asked for"
        if self.resolved == "none":
            return "none", f"scores are stored in {scores}"
        if self.precision.products == "float16":
            why = "products are added up in float16, so each key head decides:"
            return "none or mean", f"{why} mean where the offset makes the scores that count larger"
        if self.resolved == "reference":
            return "reference", f"{target} sees the float32 product before it is rounded"
        why = f"{target} rounds the product to {scores} first, so each key head decides:"
        return "none or mean", f"{why} mean where the offset makes the scores that count larger"

    def needs_kappa(self) -> bool:
        if self.resolved == "reference":  # primed by `mean` where it lags behind the rounding
            return not self.reachable
        return self.resolved in ("mean", "mean_past")

    def numerics(self, keys: int) -> Numerics:
        shift = "mean" if self.resolved == "mean_past" else self.resolved
        inva = self.paper_blocks(keys).inva if shift == "paper" else 1.0
        cap, dialect, kept = self.logits_soft_cap, self.dialect, 1 - self.dropout_rate
        return Numerics(shift, self.precision, self.reachable, inva, cap, dialect, kept)

    def gain(self, scale: Array) -> Array:
        """The factor of the product: 1/α, or what is left of it by `paper`, whose M carries it."""
        return jnp.full_like(scale, self._paper_gain) if self.resolved == "paper" else scale

    @property
    def _paper_gain(self) -> float:
        """The power of two, at least 1, that is left out of M: |K'| ≤ 2·max|K|/α must fit the type
        of the keys. 1 where α ≥ 2, as for every usual head size.
        """
        assert self.scale is not None
        return max(1.0, 2.0 ** math.ceil(math.log2(2 * abs(self.scale))))

    def paper_blocks(self, keys: int) -> PaperBlocks:
        assert self.scale is not None
        return paper_blocks(self.schedule.block_kv, keys, self.beta, self.scale / self._paper_gain)


class PaperBlocks(NamedTuple):
    """`paper`'s constants: one matrix for full blocks, one for the tail, one Inva for both."""

    matrix: np.ndarray  # [n, n] float32 that holds float16 numbers
    weights: np.ndarray  # [n, 1]
    tail_matrix: np.ndarray
    tail_weights: np.ndarray
    inva: float


@lru_cache(maxsize=32)
def paper_blocks(n: int, keys: int, beta: float | None, scale: float) -> PaperBlocks:
    """M and the row-mean weights for ``keys`` keys in blocks of n.

    The tail tile is the last n columns; those of the block before it are left out of its mean.
    """
    beta = optimal_beta(n) if beta is None else beta
    float16 = np.dtype(np.float16)
    columns = np.ones(n, bool)
    matrix, inva = paper_matrix(columns, beta, scale, float16)
    tail = columns.copy()
    if keys % n:
        tail[: n - keys % n] = False
    tail_matrix, tail_inva = paper_matrix(tail, beta, scale, float16)
    # Inva depends on n through M's rounding; the tail's row mean carries the ratio.
    ratio = tail_inva / inva
    return PaperBlocks(
        matrix.astype(np.float32),
        np.full((n, 1), 1 / n, np.float32),
        tail_matrix.astype(np.float32),
        (tail[:, None] * (ratio / tail.sum())).astype(np.float32),
        inva,
    )


class HeadFacts(NamedTuple):
    """What `prepare` found out about one key head and its queries."""

    usable: Array  # [S] bool
    kappa: Array | None  # [blocks, D] of the keys' type
    chosen: Array | None  # [] bool: whether `auto` shifts this head
    guard: Guard | None  # each [T, G]
    # [query tiles] powers of two, 1 in ordinary data, by which the values that a tile of queries
    # sees are multiplied so that sums of them stay in range; None where they do anyhow.
    value_gain: Array | None


def prepare(
    q: Array, k: Array, v: Array, scale: Array, mask: Mask, plan: Plan, block_q: int
) -> HeadFacts:
    """The facts of one key head: q [T, G, D], k [S, D], v [S, E].

    Keys that nobody sees are not usable, so that what stands there cannot matter; keys that are
    seen and not finite are not usable either, and `key_tile` says so in their column. The guard
    and the gain of a tile of ``block_q`` positions come from the key tiles that it visits.
    """
    finite = jnp.all(jnp.isfinite(k), axis=1) & jnp.all(jnp.isfinite(v), axis=1)
    usable = finite & mask.visible_keys()
    n = plan.schedule.block_kv
    value_gain = None
    if _divides_values(plan, v.dtype):
        magnitude = jnp.max(jnp.abs(v), axis=1, initial=0)
        top = _per_block(jnp.where(usable, magnitude, jnp.zeros_like(magnitude)), n, jnp.max)
        value_gain = _value_gain(over_visited(top, mask, block_q, n), plan)
    kappa = chosen = None
    if plan.needs_kappa():
        kappa = _block_kappa(k, usable, n, past=plan.resolved == "mean_past")
        if plan.chooses_per_head:
            chosen = _shifting_helps(q, k, usable, kappa, n, scale)
            kappa = jnp.where(chosen, kappa, jnp.zeros_like(kappa))
    guard = None
    if _guards(plan, q.dtype):
        guard = _guard(q, key_norms(k, usable, kappa, plan), scale, mask, plan, block_q)
    return HeadFacts(usable, kappa, chosen, guard, value_gain)


def over_visited(per_block: Array, mask: Mask, block_q: int, n: int) -> Array:
    """[blocks] -> [query tiles]: the largest over the key tiles that each query tile visits; the
    type's lowest number where it visits none.
    """
    length = mask.query_length
    blocks = jnp.arange(len(per_block), dtype=jnp.int32)

    def largest(start: Array) -> Array:
        r = mask.key_range(start, start + block_q, n)
        visited = (blocks >= r.lo) & (blocks < r.hi)
        return jnp.max(jnp.where(visited, per_block, jnp.finfo(per_block.dtype).min))

    starts = jnp.arange(-(-length // block_q), dtype=jnp.int32) * block_q
    return jax.vmap(largest)(jnp.minimum(starts, max(0, length - block_q)))


class Known(NamedTuple):
    """What a cache keeps of one head's finite keys and values, so that none is looked at again."""

    finite: Array  # [S] bool: key and value are there, and finite
    total: Array  # [blocks, D] sum of each block's keys, float32 (float64 for float64)
    key_norm: Array  # [blocks] log2 of the largest norm of a key, float32
    key_top: Array  # [blocks] largest magnitude in a key
    value_top: Array  # [blocks] largest magnitude in a value


def prepare_known(
    q: Array, k: Array, known: Known, scale: Array, mask: Mask, plan: Plan, block_q: int
) -> HeadFacts:
    """`prepare` for the keys of a cache, in O(S + blocks·D).

    A block's mean is of all its finite keys, and the bounds on shifted keys are coarser
    (‖k − κ‖ ≤ 2·max‖k‖). Where `auto` chooses by the data, it looks at k.
    """
    usable = known.finite & mask.visible_keys()
    wide = wide_type(k.dtype)
    n = plan.schedule.block_kv
    value_gain = None
    if _divides_values(plan, k.dtype):
        value_gain = _value_gain(over_visited(known.value_top, mask, block_q, n), plan)
    kappa = chosen = None
    if plan.needs_kappa():
        count = _per_block(known.finite[:, None], n, lambda x, axis: jnp.sum(x, axis, dtype=wide))
        kappa = mean_key(known.total, count, wide)
        if plan.resolved == "mean_past":
            first = jnp.where(known.finite[:1, None], k[:1], jnp.zeros_like(k[:1]))
            kappa = jnp.concatenate([first.astype(wide), kappa[:-1]])
        fits = jnp.max(known.key_top) < float(jnp.finfo(k.dtype).max) / 4
        fits = fits & jnp.isfinite(kappa)  # their sum may not be
        kappa = jnp.where(fits, kappa, jnp.zeros_like(kappa)).astype(k.dtype)
        if plan.chooses_per_head:
            chosen = _shifting_helps(q, k, usable, kappa, n, scale)
            kappa = jnp.where(chosen, kappa, jnp.zeros_like(kappa))
    guard = None
    if _guards(plan, q.dtype):
        shifts = plan.resolved == "paper" or (kappa is not None and plan.resolved != "reference")
        norms = (known.key_norm, known.key_norm + float(shifts))
        guard = _guard(q, norms, scale, mask, plan, block_q)
    return HeadFacts(usable, kappa, chosen, guard, value_gain)


def _divides_values(plan: Plan, dtype: jnp.dtype) -> bool:
    """Whether sums of values of ``dtype`` may leave the type in which they are formed."""
    wide = plan.promises_finite and dtype != jnp.float16
    return wide or plan.precision.products == "float16"


def _value_gain(top: Array, plan: Plan) -> Array:
    """The power of two, at most 1, that brings sums of values up to ``top`` into range."""
    wide = wide_type(top.dtype)
    limit = _product_log2(plan) if plan.precision.products == "float16" else _SUMMABLE_LOG2
    excess = jnp.maximum(jnp.frexp(jnp.maximum(top, 0).astype(wide))[1] - limit, 0)
    return jnp.ldexp(jnp.ones((), wide), -excess)


def _product_log2(plan: Plan) -> int:
    """What values may be where P·V is added up in float16: P ≤ 1, a block's sum below 2^15."""
    return 15 - (plan.schedule.block_kv - 1).bit_length()


def _per_block(x: Array, n: int, reduce: Callable[[Array, int], Array]) -> Array:
    """``reduce(blocks, axis)`` over the blocks of n rows of x [S, …]; the tail is shorter."""
    whole = x.shape[0] // n * n
    parts = [reduce(x[:whole].reshape(-1, n, *x.shape[1:]), 1)]
    if whole < x.shape[0]:
        parts.append(reduce(x[whole:], 0)[None])
    return jnp.concatenate(parts)


def _spread(per_block: Array, n: int, keys: int) -> Array:
    """[blocks, …] -> [S, …]: each key's own block."""
    return jnp.repeat(per_block, n, axis=0, total_repeat_length=len(per_block) * n)[:keys]


def _block_kappa(k: Array, usable: Array, n: int, *, past: bool) -> Array:
    """κ of each block (eq. 7, 8): the mean of its usable keys, in the keys' own type.

    Any vector would do, since the same one is put back: a block whose shifted keys would leave
    the range of their type is not shifted.
    """
    wide = wide_type(k.dtype)
    count = _per_block(usable[:, None], n, lambda x, axis: jnp.sum(x, axis, dtype=wide))
    clean = jnp.where(usable[:, None], k, jnp.zeros_like(k)).astype(wide)
    # A power of two keeps the sum in range; it is taken out again exactly.
    part = wide.type(0.5 ** n.bit_length() if k.dtype != jnp.float16 else 1.0)
    kappa = mean_key(_per_block(clean * part, n, jnp.sum), count, wide) / part
    if past:
        kappa = jnp.concatenate([clean[:1], kappa[:-1]])
    most = float(jnp.finfo(k.dtype).max)  # which the rounding of a mean may pass
    kappa = jnp.clip(kappa, -most, most).astype(k.dtype).astype(wide)
    distance = jnp.max(jnp.abs(clean - _spread(kappa, n, k.shape[0])), axis=1)
    largest = _per_block(jnp.where(usable, distance, jnp.zeros_like(distance)), n, jnp.max)
    fits = largest < most / 2
    return jnp.where(fits[:, None], kappa, jnp.zeros_like(kappa)).astype(k.dtype)


# A row's largest score stands about so many standard deviations above their mean.
_TOP = 3.0


def _shifting_helps(q: Array, k: Array, usable: Array, kappa: Array, n: int, scale: Array) -> Array:
    """`auto` behind the rounding (section 6): are the scores that count larger with the offset?

    Rounding errors are proportional to the scores' size, and those near a row's maximum count.
    With o = q·κ/α and σ the standard deviation of q·(k − κ)/α these are about o + 3σ unshifted and
    3σ shifted, where rounding k − κ costs about σ once more: shifting pays where
    (o + 3σ)² > (3σ)² + σ². Keys biased against the queries (o < 0) are often better left alone.
    o and σ are estimated from the mean and the variance of each channel.
    """
    wide = wide_type(k.dtype)
    rows = q.reshape(-1, q.shape[-1]).astype(wide)
    rows = jnp.where(jnp.isfinite(rows), rows, jnp.zeros_like(rows))
    q_mean = jnp.mean(rows, axis=0)
    q_var = jnp.mean(jnp.square(rows - q_mean), axis=0)
    centre = kappa.astype(wide)
    offset = centre @ q_mean
    square = jnp.mean(jnp.square(offset) + jnp.square(centre) @ q_var)
    weights = usable.astype(wide) / jnp.maximum(jnp.sum(usable, dtype=wide), 1)
    deviation = jnp.where(usable[:, None], k.astype(wide) - _spread(centre, n, k.shape[0]), 0)
    around = jnp.sum(weights * (jnp.square(deviation) @ (jnp.square(q_mean) + q_var)))
    towards = jnp.sign(scale).astype(wide) * jnp.mean(offset)
    return square + 2 * _TOP * jnp.sqrt(around) * towards > around


def _stores16(plan: Plan, dtype: jnp.dtype) -> bool:
    """Whether scores of any size would be stored in float16, for inputs of ``dtype``."""
    if plan.resolved == "reference" and plan.reachable:
        return False  # S' ≤ 0, clamped
    lags = plan.resolved == "reference" and dtype == jnp.float16  # r travels in q's type
    return lags or "float16" in (plan.precision.scores, plan.precision.products)


def _guards(plan: Plan, dtype: jnp.dtype) -> bool:
    """Whether anything can leave its range, for inputs of ``dtype``."""
    # Where q/α is formed in q's type, a factor above 1 may lead out of it.
    safe = _SAFE_SCALE if plan.reachable else 1.0
    small = plan.scale is not None and abs(plan.scale) <= safe
    return plan.promises_finite and (dtype != jnp.float16 or _stores16(plan, dtype) or not small)


def _guard(
    q: Array,
    norms: tuple[Array, Array],
    scale: Array,
    mask: Mask,
    plan: Plan,
    block_q: int,
) -> Guard:
    """The powers of two of eq. 12, each [T, G]: as large as the keys that a row's tile visits ask.

    Arguments:
      norms: as from `key_norms`, or bounds on them.
    """
    n = plan.schedule.block_kv

    def seen(per_block: Array) -> Array:  # [T, 1]
        per_tile = over_visited(per_block, mask, block_q, n)
        return jnp.repeat(per_tile, block_q)[: len(q), None]

    of_q, of_scale = log2_norm(q), jnp.log2(jnp.abs(scale.astype(jnp.float32)))
    of_k, of_shifted = map(seen, norms)
    range_log2 = _PRODUCT_LOG2[str(wide_type(q.dtype))]
    excess = of_q + jnp.maximum(of_k, of_shifted) + jnp.maximum(of_scale, 0) - range_log2
    if _stores16(plan, q.dtype):
        excess = jnp.maximum(excess, of_q + of_shifted + of_scale - _FLOAT16_LOG2)
    if not plan.reachable:  # q·gain is formed in q's type; a gain below 1 cannot lead out of it
        of_factor = jnp.log2(jnp.abs(plan.gain(scale.astype(jnp.float32))))
        of_product = of_q + of_factor - _QUERY_LOG2[str(q.dtype)]
        excess = jnp.maximum(excess, jnp.where(of_factor > 0, of_product, -jnp.inf))
    # The margin covers the rounding of the logarithms.
    exponent = jnp.clip(jnp.ceil(excess + 0.01), 0, 2000).astype(jnp.int32)
    wide = wide_type(q.dtype)
    largest = jnp.finfo(wide).maxexp - 2  # of a power whose inverse is a normal number too
    of_gain = jnp.clip(jnp.ceil(of_scale), 0, range_log2).astype(jnp.int32)
    of_gain = jnp.minimum(exponent, of_gain)
    half, one = (exponent - of_gain) // 2, jnp.ones(exponent.shape, wide)
    temper = jnp.minimum(exponent, largest)
    return Guard(
        down=jnp.ldexp(one, -half),
        rest=jnp.ldexp(one, half + of_gain - exponent),
        gain=jnp.ldexp(one, -of_gain),
        temper=jnp.ldexp(one, temper),
        beyond=jnp.ldexp(one, jnp.minimum(exponent - temper, largest)),
    )


def key_norms(k: Array, usable: Array, kappa: Array | None, plan: Plan) -> tuple[Array, Array]:
    """log2 of the largest norm of a usable key, and of a shifted one, in each block: [blocks]."""
    n = plan.schedule.block_kv

    def largest(x: Array) -> Array:
        return _per_block(jnp.where(usable, log2_norm(x), -jnp.inf), n, jnp.max)

    clean = jnp.where(usable[:, None], k, jnp.zeros_like(k))
    of_k = largest(clean)
    if plan.resolved == "paper":
        return of_k, of_k + 1  # ‖k − β·k̄‖ ≤ 2·max‖k‖
    if kappa is None or plan.resolved == "reference":
        return of_k, of_k
    wide = wide_type(k.dtype)
    return of_k, largest(clean.astype(wide) - _spread(kappa.astype(wide), n, len(k)))


def log2_norm(x: Array) -> Array:
    """log2 of the Euclidean norm over the last axis, or a bound on it where squares overflow."""
    x = jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x)).astype(wide_type(x.dtype))
    top = jnp.max(jnp.abs(x), axis=-1)
    square = jnp.sum(jnp.square(x), axis=-1)
    exact = jnp.isfinite(square) & (square > 0)
    by_top = jnp.log2(top) + 0.5 * float(np.log2(x.shape[-1]))
    log2 = jnp.where(exact, 0.5 * jnp.log2(jnp.where(exact, square, 1)), by_top)
    return log2.astype(jnp.float32)
