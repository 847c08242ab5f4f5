"""Rotary positions: the pairs (i, i + D/2) of a head turn by an angle that grows with position."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Rotation = tuple[Array, Array]  # cosine and sine, [..., 1, D/2] float32


def rotation(positions: Array, size: int, base: float) -> Rotation:
    """The cosines and sines of positions [...], for heads of D = ``size`` channels.

    Pair i turns by base^(−2i/D) a position.
    """
    speed = base ** (-np.arange(0, size, 2) / size)
    angle = positions.astype(jnp.float32)[..., None, None] * jnp.asarray(speed, jnp.float32)
    return jnp.cos(angle), jnp.sin(angle)


def rotated(x: Array, turn: Rotation) -> Array:
    """x [..., heads, D], turned; in float32, rounded once."""
    cos, sin = turn
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def rotation_below(limit: int, positions: Array, size: int, base: float) -> Rotation:
    """As `rotation`, of positions from 0 to ``limit`` − 1, by the sum of two angles from tables.

    XLA for CPUs computes a cosine anew for each number that it multiplies; a table it reads. And
    the tables' angles are float64: a float32 angle of 32 768 is off by 0.001.
    """
    step = 2 ** math.ceil(math.log2(limit) / 2)
    speed = base ** (-np.arange(0, size, 2) / size)

    def table(of: np.ndarray, at: Array) -> Rotation:
        angle = of[:, None, None] * speed
        cos, sin = (jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin))
        return jnp.take(cos, at, axis=0, mode="clip"), jnp.take(sin, at, axis=0, mode="clip")

    cos, sin = table(np.arange(0, limit, step), positions // step)
    more_cos, more_sin = table(np.arange(step), positions % step)
    return cos * more_cos - sin * more_sin, sin * more_cos + cos * more_sin
