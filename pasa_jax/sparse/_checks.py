"""The checks of the choosers' arguments."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pasa_jax.core.checks import is_real, is_size
from pasa_jax.core.errors import wrong
from pasa_jax.core.precision import FLOATS

Array = jax.Array


def size(name: str, value: int, least: int = 1) -> int:
    """``value``, which must be an int of at least ``least``."""
    if not is_size(value) or value < least:
        raise wrong(name, f"be an int of at least {least}", repr(value))
    return int(value)


def share(name: str, value: float) -> float:
    """``value``, which must be a number in (0, 1]."""
    if not is_real(value) or not 0 < value <= 1:
        raise wrong(name, "be a number in (0, 1]", repr(value))
    return float(value)


def scale(value: float | None, head_dim: int) -> float:
    """``value``, a finite number; None: 1/√D."""
    if value is None:
        return 1 / math.sqrt(head_dim)
    if not is_real(value) or not math.isfinite(value):
        raise wrong("scale", "be a finite number or None", repr(value))
    return float(value)


def query_key(q: ArrayLike, k: ArrayLike) -> tuple[Array, Array]:
    """[B, T, N, D] and [B, S, K, D] of one type, with T ≤ S."""
    q, k = jnp.asarray(q), jnp.asarray(k)
    for name, x, layout in (("q", q, "[B, T, N, D]"), ("k", k, "[B, S, K, D]")):
        if x.ndim != 4 or 0 in x.shape:
            raise wrong(name, f"be {layout}, no size of which is 0", f"{x.shape}")
        if str(x.dtype) not in FLOATS:
            raise wrong(name, f"be of type {', '.join(FLOATS)}", str(x.dtype))
    if k.shape[::3] != q.shape[::3] or q.shape[2] % k.shape[2]:
        allowed = f"be [{q.shape[0]}, S, K, {q.shape[3]}], K a divisor of {q.shape[2]}"
        raise wrong("k", allowed, f"{k.shape}", f"It must fit q's {q.shape}.")
    if k.dtype != q.dtype:
        raise wrong("k", f"be of q's type {q.dtype}", str(k.dtype), "Cast one of them.")
    lengths(q.shape[1], k.shape[1])
    return q, k


def lengths(T: int, S: int) -> tuple[int, int]:
    """T and S, positive, with T ≤ S."""
    for name, x in (("T", T), ("S", S)):
        size(name, x)
    if T > S:
        way_out = "The last query stands at the last key: give it the keys of earlier queries too."
        raise wrong("T", f"be at most S = {S}", T, way_out)
    return int(T), int(S)
