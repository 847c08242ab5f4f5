"""What every implementation needs to compute one head after another, or all at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def heads_at_once(one: Callable[[Array, Array], Any], batch: int, kv_heads: int) -> Any:
    """``one(b, h)`` of every key head, stacked [B, K, …]."""
    index = (jnp.arange(batch, dtype=jnp.int32), jnp.arange(kv_heads, dtype=jnp.int32))
    return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(*index)


def varying(carry: Any, sources: Any) -> Any:
    """``carry`` typed as varying over the manual mesh axes over which ``sources`` vary.

    Inside `shard_map` the carry must have the same type before a loop and after it.
    """
    axes: set[Any] = set()
    for x in jax.tree.leaves(sources):
        axes |= jax.typeof(x).manual_axis_type.varying
    if not axes:
        return carry

    def cast(x: Array) -> Array:
        missing = tuple(axes - jax.typeof(x).manual_axis_type.varying)
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, carry)
