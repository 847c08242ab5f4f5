"""The guard: powers of two that keep scores and sums of values in range (eq. 12)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from pasa_jax.core.blocks import over_visited, per_block, spread
from pasa_jax.core.mask import Mask
from pasa_jax.core.plan import Plan
from pasa_jax.core.tile import Guard, Storage, wide_type

if TYPE_CHECKING:
    from pasa_jax.core.shapes import Bool, Float, Float32

Array = jax.Array

# Largest log2 |S'| stored in float16: half of its range, since `reference` with rounded products
# subtracts an r as large as S itself.
_FLOAT16_LOG2 = 14.0
# Largest log2 |S| in an accumulator.
_PRODUCT_LOG2 = {"float32": 120.0, "float64": 1000.0}
# Largest log2 |q/α| where the query is multiplied by 1/α in its own type.
_QUERY_LOG2 = {"float16": 15.0, "bfloat16": 120.0, "float32": 120.0, "float64": 1000.0}
# Values up to 2^94 can be summed over 2^31 of them in float32.
_SUMMABLE_LOG2 = 94
# A product of float16 numbers is below 2^32·D: up to this factor it stays in float32.
_SAFE_SCALE = 2.0**60


def divides_values(plan: Plan, dtype: jnp.dtype) -> bool:
    """Whether sums of values of ``dtype`` may leave the type in which they are added up."""
    wide = plan.promises_finite and dtype != jnp.float16
    return wide or plan.precision.products == "float16"


def gain_of_values(top: Float[Array, "*tiles"], plan: Plan) -> Float[Array, "*tiles"]:
    """The power of two, at most 1, that brings sums of values of magnitude ``top`` into range."""
    wide = wide_type(top.dtype)
    limit = _product_log2(plan) if plan.precision.products == "float16" else _SUMMABLE_LOG2
    excess = jnp.maximum(jnp.frexp(jnp.maximum(top, 0).astype(wide))[1] - limit, 0)
    return jnp.ldexp(jnp.ones((), wide), -excess)


def _product_log2(plan: Plan) -> int:
    """log2 of the largest value where P·V is added up in float16: P ≤ 1, a block's sum < 2^15."""
    return 15 - (plan.schedule.block_kv - 1).bit_length()


def _stores16(plan: Plan, dtype: jnp.dtype) -> bool:
    """Whether scores of any size would be stored in float16, for inputs of ``dtype``."""
    if plan.storage is Storage.BENEATH_MAXIMUM:
        return False  # S' ≤ 0, clamped
    r = plan.storage is Storage.LAGGING and dtype == jnp.float16  # r enters q·k in q's type
    return r or "float16" in (plan.precision.scores, plan.precision.products)


def guards(plan: Plan, dtype: jnp.dtype) -> bool:
    """Whether anything can leave its range, for inputs of ``dtype``."""
    # Where q/α is formed in q's type, a factor above 1 may lead out of it.
    safe = 1.0 if plan.rounds_products else _SAFE_SCALE
    small = plan.scale is not None and abs(plan.scale) <= safe
    return plan.promises_finite and (dtype != jnp.float16 or _stores16(plan, dtype) or not small)


def guard_of(
    q: Float[Array, "T G D"],
    norms: tuple[Float[Array, " blocks"], Float[Array, " blocks"]],
    scale: Float[Array, ""],
    mask: Mask,
    plan: Plan,
    block_q: int,
) -> Guard:
    """The powers of two of eq. 12, each [T, G], from the keys that a row's tile visits.

    Arguments:
      norms: as from `key_norms`, or upper bounds on them.
    """
    n = plan.schedule.block_kv

    def seen(per_block: Array) -> Array:  # [T, 1]
        per_tile = over_visited(per_block, mask, block_q, n)
        return jnp.repeat(per_tile, block_q)[: len(q), None]

    of_k, of_shifted = map(seen, norms)
    return powers_of_guard(log2_norm(q), of_k, of_shifted, scale, plan, q.dtype)


def powers_of_guard(
    of_q: Float32[Array, "*shape"],
    of_k: Float32[Array, "*#shape"],
    of_shifted: Float32[Array, "*#shape"],
    scale: Float[Array, ""],
    plan: Plan,
    dtype: jnp.dtype,
) -> Guard:
    """The powers of two of eq. 12, of the shape of ``of_q``.

    Arguments: as of `excess`.
    """
    beyond = excess(of_q, of_k, of_shifted, scale, plan, dtype)
    exponent = jnp.clip(jnp.ceil(beyond), 0, 2000).astype(jnp.int32)
    of_scale, wide = jnp.log2(jnp.abs(scale.astype(jnp.float32))), wide_type(dtype)
    range_log2 = _PRODUCT_LOG2[str(wide)]
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


def no_guard(q: Float[Array, "T G D"]) -> Guard:
    """The guard of rows that need none: ones."""
    return Guard(*[jnp.ones(q.shape[:2], wide_type(q.dtype))] * len(Guard._fields))


def ordinary(
    q: Float[Array, "T G D"],
    k: Float[Array, "S D"],
    v: Float[Array, "S E"],
    scale: Float[Array, ""],
    plan: Plan,
) -> Bool[Array, ""]:
    """True only where keys and values are finite, guards are ones and no value is divided.

    It reads each array once, for the largest norm of its rows, which the exact functions read
    several times: it is True of all but strange data.
    """

    def largest(x: Array) -> Array:
        return jnp.max(jnp.sum(jnp.square(x.astype(wide_type(x.dtype))), axis=-1), initial=0)

    of_k, of_v = largest(k), largest(v)
    fine = jnp.isfinite(of_k) & jnp.isfinite(of_v)
    if divides_values(plan, v.dtype):
        fine = fine & (gain_of_values(jnp.sqrt(of_v), plan) == 1)
    if guards(plan, q.dtype):
        of_q, of_k = (0.5 * jnp.log2(x).astype(jnp.float32) for x in (largest(q), of_k))
        # A shifted key is at most twice as long.
        fine = fine & (excess(of_q, of_k, of_k + 1, scale, plan, q.dtype) <= 0)
    return fine


def excess(
    of_q: Float32[Array, "*shape"],
    of_k: Float32[Array, "*#shape"],
    of_shifted: Float32[Array, "*#shape"],
    scale: Float[Array, ""],
    plan: Plan,
    dtype: jnp.dtype,
) -> Float32[Array, "*shape"]:
    """log2 of how far scores may leave their range, from log2 of the norms of queries, of keys
    and of shifted keys, of ``dtype``.
    """
    of_scale = jnp.log2(jnp.abs(scale.astype(jnp.float32)))
    range_log2 = _PRODUCT_LOG2[str(wide_type(dtype))]
    log2 = of_q + jnp.maximum(of_k, of_shifted) + jnp.maximum(of_scale, 0) - range_log2
    if _stores16(plan, dtype):
        log2 = jnp.maximum(log2, of_q + of_shifted + of_scale - _FLOAT16_LOG2)
    if plan.rounds_products:  # q·gain is formed in q's type, which a gain below 1 cannot leave
        of_factor = jnp.log2(jnp.abs(plan.gain(scale.astype(jnp.float32))))
        of_product = of_q + of_factor - _QUERY_LOG2[str(dtype)]
        log2 = jnp.maximum(log2, jnp.where(of_factor > 0, of_product, -jnp.inf))
    return log2 + 0.01  # which covers the rounding of the logarithms


def key_norms(
    k: Float[Array, "S D"],
    usable: Bool[Array, " S"],
    kappa: Float[Array, "blocks D"] | None,
    plan: Plan,
) -> tuple[Float32[Array, " blocks"], Float32[Array, " blocks"]]:
    """log2 of the largest norm of a usable key, and of a shifted one, in each block: [blocks]."""
    n = plan.schedule.block_kv

    def largest(x: Array) -> Array:
        return per_block(jnp.where(usable, log2_norm(x), -jnp.inf), n, jnp.max)

    clean = jnp.where(usable[:, None], k, jnp.zeros_like(k))
    of_k = largest(clean)
    if plan.storage is Storage.PAPER:
        return of_k, of_k + 1  # ‖k − β·k̄‖ ≤ 2·max‖k‖
    if kappa is None or plan.storage is Storage.LAGGING:
        return of_k, of_k
    wide = wide_type(k.dtype)
    return of_k, largest(clean.astype(wide) - spread(kappa.astype(wide), n, len(k)))


def log2_norm(x: Float[Array, "*shape D"]) -> Float32[Array, "*shape"]:
    """log2 of the Euclidean norm over the last axis, or a bound on it where squares overflow."""
    x = jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x)).astype(wide_type(x.dtype))
    top = jnp.max(jnp.abs(x), axis=-1)
    square = jnp.sum(jnp.square(x), axis=-1)
    exact = jnp.isfinite(square) & (square > 0)
    by_top = jnp.log2(top) + 0.5 * float(np.log2(x.shape[-1]))
    log2 = jnp.where(exact, 0.5 * jnp.log2(jnp.where(exact, square, 1)), by_top)
    return log2.astype(jnp.float32)
