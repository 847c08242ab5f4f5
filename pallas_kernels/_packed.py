"""A tile of keys and values of 8 bits in a kernel over pages, made ready for its products."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pasa_jax.core.mask import Index
from pasa_jax.core.packed import FORMATS

Array = jax.Array


class PackedTile(NamedTuple):
    """m whole groups of g tokens of one key head as `PackedPages` stores them, n = m·g.

    On a TPU a value's scale is a factor of its weights, a row [1, n]; on a GPU of the value, a
    column [n, 1], since a weight of float16 has no room for it.
    """

    key: Array  # [n, D] codes
    value: Array  # [n, E] codes
    key_scale: Array  # [m, D] float32
    key_mean: Array  # [m, D] float32
    value_scale: Array  # [1, n] or [n, 1] float32
    open_key: Array | None  # [g, D] the sequence's open group, in the type that is multiplied
    open_value: Array | None  # [g, E]
    format: str
    dtype: Any  # in which keys and values are multiplied

    @property
    def group(self) -> int:
        """g."""
        return len(self.key) // len(self.key_mean)


class Unpacked(NamedTuple):
    """What a tile is multiplied by."""

    key: Array  # [n, D] less `mean`
    value: Array  # [n, E] less its factor ``value_scale``
    mean: Array  # [m, D] float32
    value_scale: Array | None  # [1, n] float32, or None: 1
    usable: Array | None  # [1, n] bool: False for a token that is not finite; None: its key is NaN


def unpacked(packed: PackedTile, open_at: Index | None, kappa: Array | None) -> Unpacked:
    """A tile in the type that is multiplied.

    Keys lack the mean of their group, so that 16 bits hold them with the digits that 8 bits have.

    Arguments:
      open_at: which of the m groups is the open one, if it is one of them; None: none is.
      kappa: [1, D] float32 what the keys of the open group lack; None: nothing.
    """
    format, dtype = FORMATS[packed.format], packed.dtype
    k = format.centred(packed.key, packed.key_scale)
    mean, scale = packed.key_mean, packed.value_scale
    usable = scale == scale
    scale = jnp.where(usable, scale, jnp.zeros_like(scale))
    v = format.read(packed.value)
    by_value = scale.shape[0] != 1
    if by_value:
        v = v * scale
        k = jnp.where(usable, k, jnp.full_like(k, jnp.nan))
    if open_at is not None:
        assert packed.open_key is not None
        assert packed.open_value is not None
        own = packed.open_key.astype(jnp.float32)
        less = jnp.zeros_like(mean[:1]) if kappa is None else kappa
        k = _with_group(k, own - less, open_at)
        v = _with_group(v, packed.open_value.astype(jnp.float32), open_at)
        mean = _with_group(mean, less, open_at)
        if not by_value:
            column = lax.broadcasted_iota(jnp.int32, scale.shape, 1)
            first = open_at * packed.group
            is_open = (column >= first) & (column < first + packed.group)
            scale = jnp.where(is_open, jnp.ones_like(scale), scale)
            usable = usable | is_open
    k, v = k.astype(dtype), v.astype(dtype)
    return Unpacked(k, v, mean, None, None) if by_value else Unpacked(k, v, mean, scale, usable)


def _with_group(x: Array, own: Array, at: Index) -> Array:
    """x [m·r, W] with ``own`` [r, W] in the place of its rows [at·r, at·r + r)."""
    groups = x.reshape(-1, *own.shape)
    index = lax.broadcasted_iota(jnp.int32, (len(groups), 1, 1), 0)
    return jnp.where(index == at, own[None], groups).reshape(x.shape)
