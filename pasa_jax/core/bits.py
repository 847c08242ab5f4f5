"""Slices of arrays, taken and put; numbers of 16 bits as bits.

XLA for CPUs has no arithmetic in 16 bits. It would widen a whole array to float32 to slice it, or
to put a slice into it, and narrow the whole result.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def stored_type(dtype: jnp.dtype) -> jnp.dtype:
    """The type of the bits of numbers of 16 bits; of others their own."""
    narrow = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize == 2
    return jnp.dtype(jnp.uint16) if narrow else jnp.dtype(dtype)


def stored(x: Array) -> Array:
    """x of `stored_type`."""
    return lax.bitcast_convert_type(x, jnp.uint16) if stored_type(x.dtype) != x.dtype else x


def read(x: Array, dtype: jnp.dtype) -> Array:
    """Numbers of ``dtype`` of what `stored` made of them."""
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)


def stored_tree(tree: Any) -> Any:
    """A pytree of arrays of one type as bits, for a loop that takes slices of them."""
    return jax.tree.map(stored, tree)


def read_tree(tree: Any, dtype: jnp.dtype) -> Any:
    """Numbers of ``dtype`` of what `stored_tree` made of them."""
    return jax.tree.map(lambda x: read(x, dtype), tree)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def take(x: Array, start: Any, size: int, axis: int = 0) -> Array:
    """``size`` entries of one axis of x, from ``start`` on."""
    return read(lax.dynamic_slice_in_dim(stored(x), start, size, axis), x.dtype)


@take.defjvp
def _take_jvp(
    size: int, axis: int, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Array, Array]:
    x, start = primals
    return take(x, start, size, axis), lax.dynamic_slice_in_dim(tangents[0], start, size, axis)


def pick(x: Array, index: Any) -> Array:
    """Entry ``index`` of the first axis; of an axis of size 1, its only entry."""
    return x[0] if x.shape[0] == 1 else take(x, index, 1)[0]


def pick_heads(x: Array, b: Any, h: Any, groups: int) -> Array:
    """[B|1, N|1, …] -> [groups|1, …]: the query heads of batch entry b and of key head h."""
    x = pick(x, b)
    return x if x.shape[0] == 1 else lax.dynamic_slice_in_dim(x, h * groups, groups)


@jax.custom_jvp
def put(buffer: Array, x: Array, place: tuple[Any, ...]) -> Array:
    """``buffer`` with x at ``place``, an index for each axis."""
    return read(lax.dynamic_update_slice(stored(buffer), stored(x), place), buffer.dtype)


@put.defjvp
def _put_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    (buffer, x, place), (d_buffer, d_x, _) = primals, tangents
    return put(buffer, x, place), lax.dynamic_update_slice(d_buffer, d_x, place)
