"""The tile functions behind the shift "bound", traced: what is known of each block of keys, and
from that the reference of each row and whether it is proved to be safe (eq. 21, 22).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from npu_bridge.layout import LEAST
from npu_bridge.specification import Array, Kernel
from npu_bridge.stages import Trace, trace
from pasa_jax.core import tile

_INT = jax.ShapeDtypeStruct((), jnp.int32)
_FLOAT = jax.ShapeDtypeStruct((), jnp.float32)
FACTS = ("radius", "reach", "off", "valueTop")  # of each block
RUNNING = ("m", "least", "size", "top")  # of each row, over the blocks seen so far
# What the squares of a length may lose where they are too small for float32.
_TINY = 2.0**-59
_MOST_KEYS = 2**24  # positions are compared in float32


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _length(x: Array) -> Array:
    """The Euclidean norm of rows of float32, infinite where squares leave it."""
    return jnp.sqrt(jnp.sum(x * x, axis=1, keepdims=True)) + _TINY


def queries(kernel: Kernel, rows: int) -> Trace:
    """Query rows as they are multiplied, and their lengths [R, 1]."""

    def scaled(query: Array, scale: Array) -> dict[str, Any]:
        q = tile.query_tile(query, kernel.plan.gain(scale), None, kernel.numerics).q
        return {"scaled": q, "length": _length(q.astype(jnp.float32))}

    query = jax.ShapeDtypeStruct((rows, kernel.head_dim), jnp.dtype(kernel.dtype))
    return trace(scaled, {"query": query, "scale": _FLOAT}).needed()


def centre(kernel: Kernel, rows: int) -> Trace:
    """κ of a block from sums of its keys; its length, and how far it is from the mean [1, 1]."""

    def found(total: Array, count: Array) -> dict[str, Any]:
        whole = jnp.sum(total, axis=0, keepdims=True)
        kappa = tile.mean_key(whole, count, jnp.dtype(kernel.dtype))
        mean, wide = tile.mean_key(whole, count, jnp.dtype(jnp.float32)), kappa.astype(jnp.float32)
        return {"kappa": kappa, "length": _length(wide), "off": _length(mean - wide)}

    return trace(found, {"total": _floats(rows, kernel.head_dim), "count": _FLOAT}).needed()


def shifted_keys(kernel: Kernel, rows: int) -> Trace:
    """K' of a slab of keys, and the largest square of a distance from κ so far, row by row."""

    def shifted(key: Array, kappa: Array, valid: Array, farthest: Array) -> dict[str, Any]:
        apart = key.astype(jnp.float32) - kappa.astype(jnp.float32)
        square = jnp.sum(apart * apart, axis=1, keepdims=True)
        row = lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
        square = jnp.where(row < valid, square, jnp.zeros_like(square))
        k = tile.key_tile(key, key, None, kernel.numerics, kappa=kappa).k
        return {"shifted": k, "farthest": jnp.maximum(farthest, square)}

    dtype = jnp.dtype(kernel.dtype)
    shapes = {
        "key": jax.ShapeDtypeStruct((rows, kernel.head_dim), dtype),
        "kappa": jax.ShapeDtypeStruct((1, kernel.head_dim), dtype),
        "valid": _INT,
        "farthest": _floats(rows, 1),
    }
    return trace(shifted, shapes).needed()


def ball(kernel: Kernel, rows: int) -> Trace:
    """The radius of a block and how far its keys reach, from the squares of `shifted_keys`."""

    def found(farthest: Array, length: Array) -> dict[str, Any]:
        radius = jnp.sqrt(jnp.max(farthest, axis=1, keepdims=True)) + _TINY
        return {"radius": radius, "reach": length + radius}

    return trace(found, {"farthest": _floats(1, rows), "length": _floats(1, 1)}).needed()


def largest_values(kernel: Kernel, rows: int) -> Trace:
    """The largest magnitudes in the values so far, place by place in a slab."""

    def found(value: Array, top: Array) -> dict[str, Any]:
        return {"top": jnp.maximum(top, jnp.abs(value.astype(jnp.float32)))}

    value = jax.ShapeDtypeStruct((rows, kernel.value_head_dim), jnp.dtype(kernel.dtype))
    return trace(found, {"value": value, "top": _floats(rows, kernel.value_head_dim)}).needed()


def largest_value(kernel: Kernel, rows: int) -> Trace:
    """The largest of them [1, 1]."""

    def found(top: Array) -> dict[str, Any]:
        return {"valueTop": jnp.max(jnp.max(top, axis=0, keepdims=True), axis=1, keepdims=True)}

    return trace(found, {"top": _floats(rows, kernel.value_head_dim)}).needed()


def _over_blocks(reduce: Callable[..., Array], x: Array) -> Array:
    return reduce(x, axis=0, keepdims=True)


def extremes(kernel: Kernel, rows: int) -> Trace:
    """`RUNNING` after a group of blocks, of which ``base`` is the first."""
    n = kernel.schedule.block_kv
    error = 2 * (kernel.head_dim + 4) * float(jnp.finfo(jnp.float32).eps)

    def found(
        centre: Array, length: Array, radius: Array, reach: Array, off: Array, valueTop: Array,
        m: Array, least: Array, size: Array, top: Array,
        start: Array, queries: Array, keys: Array, base: Array,
    ) -> dict[str, Any]:  # fmt: skip
        place = start + lax.broadcasted_iota(jnp.int32, (1, rows), 1)
        lo, hi = kernel.mask(queries, keys).key_interval(place)
        begin = (base + lax.broadcasted_iota(jnp.int32, (LEAST, 1), 0)) * n
        sight = tile.place_sight(lo, hi, begin, jnp.minimum(begin + n, keys))
        stored = tile.stored_error(radius, off, jnp.dtype(kernel.dtype))
        bounds = tile.row_bounds(centre, length, radius, reach, error, stored)
        upper, lower = tile.extremes(bounds, sight, _over_blocks)
        beyond = jnp.where(sight.some, tile.overreach(length, radius, reach), 0.0)
        seen_top = jnp.where(sight.some, valueTop, 0.0)
        return {
            "m": jnp.maximum(m, upper),
            "least": jnp.maximum(least, lower),
            "size": jnp.maximum(size, _over_blocks(jnp.max, beyond)),
            "top": jnp.maximum(top, _over_blocks(jnp.max, seen_top)),
        }

    shapes = {
        "centre": _floats(LEAST, rows),
        "length": _floats(1, rows),
        **{name: _floats(LEAST, 1) for name in FACTS},
        **{name: _floats(1, rows) for name in RUNNING},
        **dict.fromkeys(("start", "queries", "keys", "base"), _INT),
    }
    return trace(found, shapes).needed()


def settled(kernel: Kernel, rows: int) -> Trace:
    """The references of all rows [1, R], and ``failed`` [1, 1]: 0 where all are proved."""

    def found(m: Array, least: Array, size: Array, top: Array) -> dict[str, Any]:
        reference, gap = tile.settled_reference(m, least, math.log(2))
        largest = float(jnp.finfo(jnp.float32).max)
        proved = tile.in_range(gap, top, _MOST_KEYS) & (size < 1) & (jnp.abs(reference) <= largest)
        failed = jnp.where(proved, jnp.zeros_like(gap), jnp.ones_like(gap))
        return {"reference": reference, "failed": jnp.max(failed, axis=1, keepdims=True)}

    return trace(found, {name: _floats(1, rows) for name in RUNNING}).needed()
