"""Sequences whose length the devices do not divide: padded at the end, and hidden by lengths."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp

from pasa_jax.core.mask import Mask
from pasa_jax.core.mods import Data
from pasa_jax.core.operands import Operands

Array = jax.Array


def padded(operands: Operands, mask: Mask, devices: int) -> tuple[Operands, Mask]:
    """The call with lengths that the devices divide, at least two tokens on each: an axis of size 1
    would be taken for one that broadcasts. Blocks of a block mask stay whole.
    """
    rows, keys = mask.query_length, mask.key_length
    block_rows, block_keys = (1, 1) if mask.kinds is None else mask.block_size
    more_rows = _on_all(rows, block_rows, devices) - rows
    more_keys = _on_all(keys, block_keys, devices) - keys
    mask = _longer_mask(mask, len(operands.query), more_rows, more_keys)
    factors = operands.factors
    if factors is not None:
        factors = factors._replace(
            q=_zeros(factors.q, more_rows, 3), k=_zeros(factors.k, more_keys, 3)
        )
    operands = operands._replace(
        query=_zeros(operands.query, more_rows, 1),
        key=_zeros(operands.key, more_keys, 1),
        value=_zeros(operands.value, more_keys, 1),
        bias=_pairs(operands.bias, more_rows, more_keys),
        factors=factors,
        data=_data(operands.data, more_rows, more_keys),
    )
    return operands, mask


def _on_all(length: int, block: int, devices: int) -> int:
    """How long a sequence of ``length`` becomes."""
    return length if devices == 1 else devices * max(2, -(-length // (devices * block)) * block)


def _longer_mask(mask: Mask, batch: int, rows: int, keys: int) -> Mask:
    """The mask of ``rows`` more queries and ``keys`` more keys, which it hides."""
    mods = mask.mods
    if mods is not None:
        mods = replace(mods, data=_data(mods.data, rows, keys))
    kinds = mask.kinds
    if kinds is not None:
        lengths = (mask.query_length + rows, mask.key_length + keys)
        for axis, length, block in zip((2, 3), lengths, mask.block_size, strict=True):
            kinds = _zeros(kinds, -(-length // block) - kinds.shape[axis], axis)
    return replace(
        mask,
        query_length=mask.query_length + rows,
        key_length=mask.key_length + keys,
        query_lengths=_lengths(mask.query_lengths, mask.query_length, rows, batch),
        key_lengths=_lengths(mask.key_lengths, mask.key_length, keys, batch),
        query_segments=_edge(mask.query_segments, rows, 1),
        key_segments=_edge(mask.key_segments, keys, 1),
        query_positions=_edge(mask.query_positions, rows, 1),
        key_positions=_edge(mask.key_positions, keys, 1),
        array=_pairs(mask.array, rows, keys),
        kinds=kinds,
        mods=mods,
    )


def _lengths(given: Array | None, length: int, more: int, batch: int) -> Array | None:
    return given if given is not None or more == 0 else jnp.full(batch, length, jnp.int32)


def _pairs(x: Array | None, rows: int, keys: int) -> Array | None:
    """x [B|1, N|1, T|1, S|1]."""
    if x is None:
        return None
    x = x if x.shape[2] == 1 else _zeros(x, rows, 2)
    return x if x.shape[3] == 1 else _zeros(x, keys, 3)


def _data(data: Data, rows: int, keys: int) -> Data:
    query = tuple(_edge(x, rows, 2) for x in data.query)
    return Data(query, tuple(_edge(x, keys, 2) for x in data.key), data.head)


def _zeros(x: Array, more: int, axis: int) -> Array:
    return x if more == 0 else jnp.pad(x, _widths(x, more, axis))


def _edge(x: Array | None, more: int, axis: int) -> Array | None:
    """The last entry repeated: it is as good as any, and keeps the extremes of tiles."""
    return x if x is None or more == 0 else jnp.pad(x, _widths(x, more, axis), mode="edge")


def _widths(x: Array, more: int, axis: int) -> list[tuple[int, int]]:
    return [(0, more if i == axis else 0) for i in range(x.ndim)]
