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

    A value's scale is a factor of its weights where it is a row [1, n], and of the value where it
    is a column [n, 1]: a weight of float16 has no room for it.
    """

    key: Array  # [n, D] codes
    value: Array  # [n, E] codes
    key_scale: Array  # [m, D] float32
    key_mean: Array  # [m, D] float32
    value_scale: Array  # [1, n] or [n, 1] float32
    open_key: Array | None  # [g, D] the sequence's open group, in the type that is multiplied
    open_value: Array | None  # [g, E]
    format: str
    dtype: Any  # in which codes are multiplied

    @property
    def group(self) -> int:
        """g."""
        return len(self.key) // len(self.key_mean)


class Unpacked(NamedTuple):
    """What a tile is multiplied by, see `tile.key_tile`."""

    key: Array  # [n, D] less the means of their groups
    value: Array  # [n, E]
    means: Array  # [m, D] float32
    value_scale: Array | None  # [1, n] float32, or None: 1
    usable: Array  # as ``value_scale``, bool: False for a token that is not finite


def unpacked(packed: PackedTile, open_at: Index | None, kappa: Array | None) -> Unpacked:
    """A tile in the type that is multiplied. 16 bits hold keys less their mean with the digits that
    their codes have.

    Arguments:
      open_at: which of the m groups is the open one, if it is one of them; None: none is.
      kappa: [1, D] float32 what the keys of the open group lack; None: nothing.
    """
    format, dtype = FORMATS[packed.format], packed.dtype
    k = format.centred(packed.key, packed.key_scale).astype(dtype)
    v = format.read(packed.value, dtype)
    means, factor = packed.key_mean, packed.value_scale
    usable = factor == factor
    factor = jnp.where(usable, factor, jnp.zeros_like(factor))
    if open_at is not None:
        assert packed.open_key is not None
        assert packed.open_value is not None
        own, less = packed.open_key, jnp.zeros_like(means[:1])
        if kappa is not None:
            own, less = (own.astype(jnp.float32) - kappa).astype(dtype), kappa
        k, v = _with_group(k, own, open_at), _with_group(v, packed.open_value, open_at)
        means = _with_group(means, less, open_at)
        place = lax.broadcasted_iota(jnp.int32, factor.shape, int(len(factor) == 1))
        place = place - open_at * packed.group
        is_open = (place >= 0) & (place < packed.group)
        factor, usable = jnp.where(is_open, jnp.ones_like(factor), factor), usable | is_open
    if len(factor) == 1:
        return Unpacked(k, v, means, factor, usable)
    v = (v.astype(jnp.float32) * factor).astype(dtype)
    return Unpacked(k, v, means, None, usable.reshape(1, -1))


def _with_group(x: Array, own: Array, at: Index) -> Array:
    """x [m·r, W] with ``own`` [r, W] in the place of its rows [at·r, at·r + r)."""
    groups = x.reshape(-1, *own.shape)
    index = lax.broadcasted_iota(jnp.int32, (len(groups), 1, 1), 0)
    return jnp.where(index == at, own[None], groups).reshape(x.shape)
