"""What is computed from a head's keys and queries once, before its tiles are walked.

The block means κ, which keys are usable, the guard's powers of two, and `auto`'s choice where it
depends on the data (docs/algorithm.md, sections 4 to 6). O((T + S)·D) work, O(T + S) memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pasa_jax.core.blocks import block_kappa, over_visited, per_block
from pasa_jax.core.bound import Bound
from pasa_jax.core.choice import shifting_helps
from pasa_jax.core.eight_bits import key_codes
from pasa_jax.core.guard import (
    divides_values,
    gain_of_values,
    guard_of,
    guards,
    key_norms,
    no_guard,
    ordinary,
)
from pasa_jax.core.heads import varying
from pasa_jax.core.mask import Mask
from pasa_jax.core.plan import Plan
from pasa_jax.core.tile import Codes, Guard, Storage, is_finite, wide_type

if TYPE_CHECKING:
    from pasa_jax.core.shapes import Float

Array = jax.Array


class HeadFacts(NamedTuple):
    """What `prepare` computes for one key head and its queries."""

    usable: Array  # [S] bool
    kappa: Array | None  # [blocks, D] of the keys' type
    chosen: Array | None  # [] bool: whether `auto` shifts this head
    guard: Guard | None  # each [T, G]
    # [query tiles] powers of two, 1 in ordinary data, by which the values are multiplied for a tile
    # of queries, so that sums of them stay in range; None where they always do.
    value_gain: Array | None
    bound: Bound | None = None  # for `Storage.BOUND`; the rest is then for heads without proof
    ordinary: Array | None = None  # [] bool, as `guard.ordinary`, where it was asked
    codes: Codes | None = None  # [S, D] and [S, 1] of the keys less κ, where products have 8 bits


def prepare(
    q: Float[Array, "T G D"],
    k: Float[Array, "S D"],
    v: Float[Array, "S E"],
    scale: Float[Array, ""],
    mask: Mask,
    plan: Plan,
    block_q: int,
    *,
    one_by_one: bool = False,
) -> HeadFacts:
    """The facts of one key head.

    Keys that no query sees are not usable, so that their content cannot matter. Keys that are seen
    and not finite are not usable either; `key_tile` makes their column NaN. The guard and the gain
    of a tile of ``block_q`` positions come from the key tiles that it visits.

    Arguments:
      one_by_one: heads are computed one after another, so that a condition saves work.
    """
    n = plan.schedule.block_kv
    # The two sides of a condition must vary over the same axes of a mesh.
    q, k, v, scale, mask = varying((q, k, v, scale, mask), (q, k, v, scale, mask))
    visible = varying(mask.visible_keys(), q)

    def usual(plain: Any, exact: Callable[[], Any]) -> Any:
        """``exact()``, which of ordinary data is ``plain``."""
        if not one_by_one:
            return exact()
        plain = varying(plain, q)
        return lax.cond(is_ordinary, lambda: plain, exact)

    def found_usable() -> Array:
        return visible & jnp.all(is_finite(k), axis=1) & jnp.all(is_finite(v), axis=1)

    def found_gain() -> Array:
        magnitude = jnp.max(jnp.abs(v), axis=1, initial=0)
        top = per_block(jnp.where(usable, magnitude, jnp.zeros_like(magnitude)), n, jnp.max)
        return gain_of_values(over_visited(top, mask, block_q, n), plan)

    def found_guard() -> Guard:
        return guard_of(q, key_norms(k, usable, kappa, plan), scale, mask, plan, block_q)

    is_ordinary = ordinary(q, k, v, scale, plan) if one_by_one else None
    usable = usual(visible, found_usable)
    value_gain = None
    if divides_values(plan, v.dtype):
        tiles = -(-len(q) // block_q)
        value_gain = usual(jnp.ones(tiles, wide_type(v.dtype)), found_gain)
    kappa = chosen = None
    if plan.storage.uses_kappa:
        kappa = block_kappa(k, usable, n, past=plan.storage is Storage.PAST_MEAN)
        if plan.chooses_per_head:
            chosen = shifting_helps(q, k, usable, kappa, n, scale)
            kappa = jnp.where(chosen, kappa, jnp.zeros_like(kappa))
    guard = None
    if guards(plan, q.dtype):
        guard = usual(no_guard(q), found_guard)
    codes = None
    if plan.precision.eight_bits:
        assert kappa is not None
        codes = key_codes(k, usable, kappa, n)
    return HeadFacts(usable, kappa, chosen, guard, value_gain, ordinary=is_ordinary, codes=codes)
