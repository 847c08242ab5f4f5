"""One number, or one mean key, for each block of n keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from pasa_jax.core.mask import Mask
from pasa_jax.core.tile import mean_key, wide_type

if TYPE_CHECKING:
    from pasa_jax.core.shapes import Bool, Float, Shaped

Array = jax.Array


def per_block(
    x: Shaped[Array, "S ..."], n: int, reduce: Callable[[Array, int], Array]
) -> Shaped[Array, "blocks ..."]:
    """``reduce(blocks, axis)`` over the blocks of n rows of x [S, …]; the last may be shorter."""
    tail = x.shape[0] // n * n
    parts = [reduce(x[:tail].reshape(-1, n, *x.shape[1:]), 1)]
    if tail < x.shape[0]:
        parts.append(reduce(x[tail:], 0)[None])
    return jnp.concatenate(parts)


def over_blocks(
    x: Shaped[Array, "#T #G S"], n: int, reduce: Callable[[Array, int], Array]
) -> Shaped[Array, "#T #G blocks"]:
    """`per_block` along the last axis."""
    return jnp.moveaxis(per_block(jnp.moveaxis(x, -1, 0), n, reduce), 0, -1)


def spread(values: Float[Array, "blocks ..."], n: int, keys: int) -> Float[Array, "S ..."]:
    """[blocks, …] -> [S, …]: for each key, what belongs to its block."""
    return jnp.repeat(values, n, axis=0, total_repeat_length=len(values) * n)[:keys]


def over_visited(
    values: Float[Array, " blocks"], mask: Mask, block_q: int, n: int
) -> Float[Array, " query_tiles"]:
    """[blocks] -> [query tiles]: the largest over the key tiles that each query tile visits; the
    type's lowest number where it visits none.
    """
    length = mask.query_length
    blocks = jnp.arange(len(values), dtype=jnp.int32)

    def largest(start: Array) -> Array:
        r = mask.key_range(start, start + block_q, n)
        visited = (blocks >= r.lo) & (blocks < r.hi)
        return jnp.max(jnp.where(visited, values, jnp.finfo(values.dtype).min))

    starts = jnp.arange(-(-length // block_q), dtype=jnp.int32) * block_q
    return jax.vmap(largest)(jnp.minimum(starts, max(0, length - block_q)))


def block_kappa(
    k: Float[Array, "S D"], usable: Bool[Array, " S"], n: int, *, past: bool
) -> Float[Array, "blocks D"]:
    """κ of each block (eq. 7, 8): the mean of its usable keys, in the keys' own type.

    Any vector would do, since the same one is added back. A block whose shifted keys would leave
    the range of their type is not shifted.
    """
    wide = wide_type(k.dtype)
    count = per_block(usable[:, None], n, lambda x, axis: jnp.sum(x, axis, dtype=wide))
    clean = jnp.where(usable[:, None], k, jnp.zeros_like(k)).astype(wide)
    # A power of two keeps the sum in range; dividing by it later is exact.
    part = wide.type(0.5 ** n.bit_length() if k.dtype != jnp.float16 else 1.0)
    kappa = mean_key(per_block(clean * part, n, jnp.sum), count, wide) / part
    if past:
        kappa = jnp.concatenate([clean[:1], kappa[:-1]])
    most = float(jnp.finfo(k.dtype).max)  # rounding may lead a mean beyond it
    kappa = jnp.clip(kappa, -most, most).astype(k.dtype).astype(wide)
    distance = jnp.max(jnp.abs(clean - spread(kappa, n, k.shape[0])), axis=1)
    largest = per_block(jnp.where(usable, distance, jnp.zeros_like(distance)), n, jnp.max)
    fits = largest < most / 2
    return jnp.where(fits[:, None], kappa, jnp.zeros_like(kappa)).astype(k.dtype)
