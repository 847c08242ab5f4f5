"""Which attention weights dropout keeps: a function of the key, the head and the two positions.

It depends on nothing else, so every implementation, every schedule and both passes drop the same
weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from pasa_jax.core.shapes import Bool, Int, UInt32

Array = jax.Array

_KIND = "threefry2x32"  # the generator, whatever kind of key seeds it
# Every key [R] with every number [n]: [R, n] keys.
_folded = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))


def seeds(key: Array, batch: int, heads: int, *, broadcast: bool) -> UInt32[Array, "B N 2"]:
    """[B, N, 2] uint32, a seed per head; with ``broadcast`` [1, 1, 2], one for all."""
    seed = jax.random.bits(key, (2,), jnp.uint32)
    if broadcast:
        return seed[None, None]
    entries, numbers = (jnp.arange(x, dtype=jnp.uint32) for x in (batch, heads))
    of_entries = _folded(_keys(seed[None]), entries)[0]
    return jax.random.key_data(_folded(of_entries, numbers))


def kept(
    seed: UInt32[Array, "G 2"],
    groups: int,
    rows: Int[Array, " rows"],
    columns: Int[Array, " keys"],
    rate: float,
) -> Bool[Array, "R keys"]:
    """[G·rows, keys] bool: the pairs of positions whose weight is kept.

    Arguments:
      seed: [G|1, 2] of the G heads.
      rows, columns: [rows], [keys] integers, positions of queries and keys.
      rate: the share that is dropped, to within 2^-32.
    """
    of_rows = _folded(_keys(seed), rows.astype(jnp.uint32))
    of_rows = jnp.broadcast_to(of_rows, (groups, rows.shape[0])).reshape(-1)
    words = jax.random.key_data(_folded(of_rows, columns.astype(jnp.uint32)))
    return words[..., 0] >= np.uint32(min(round(rate * 2**32), 2**32 - 1))


def _keys(words: Array) -> Array:
    return jax.random.wrap_key_data(words, impl=_KIND)
