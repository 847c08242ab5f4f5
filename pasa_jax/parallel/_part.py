"""What one device sees: the parts of a call, by where its queries and keys stand in the whole.

The local form of a call: queries, keys and what belongs to them are the device's parts; the lengths
count in the whole sequences; mask and bias have the device's rows and all columns; a block mask is
whole. Sinks, scale and what belongs to heads are as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pasa_jax.core.mask import Index, Mask
from pasa_jax.core.mods import Data, Mods, call
from pasa_jax.core.operands import Factors, Operands

Array = jax.Array


class Moving(NamedTuple):
    """What belongs to keys and has a gradient: it travels together."""

    key: Array  # [B, S, K, D]
    value: Array  # [B, S, K, E]
    factors: Array | None  # [B|1, N|1, R, S]
    data: tuple[Any, ...]  # [B|1, N|1, S] each


class Told(NamedTuple):
    """What belongs to keys and has no gradient."""

    segments: Array | None  # [B, S]
    positions: Array | None  # [B|1, S]
    data: tuple[Any, ...]  # [B|1, N|1, S] each


def of_keys(operands: Operands, mask: Mask) -> tuple[Moving, Told]:
    """What belongs to the keys of a call in the local form."""
    factors = None if operands.factors is None else operands.factors.k
    moving = Moving(operands.key, operands.value, factors, operands.data.key)
    data = () if mask.mods is None else mask.mods.data.key
    return moving, Told(mask.key_segments, mask.key_positions, data)


def axes_of_keys(moving: Moving, told: Told) -> tuple[Moving, Told]:
    """For each leaf of both the axis along which keys stand."""
    last = jax.tree.map(lambda x: x.ndim - 1, (moving, told))
    return last[0]._replace(key=1, value=1), last[1]


def with_moving(operands: Operands, moving: Moving) -> Operands:
    """The operands with other keys."""
    factors = operands.factors
    if factors is not None:
        factors = Factors(factors.q, moving.factors, factors.scale)
    return operands._replace(
        key=moving.key,
        value=moving.value,
        factors=factors,
        data=operands.data._replace(key=moving.data),
    )


def with_told(mask: Mask, told: Told, keys: int) -> Mask:
    """The mask with other keys, of which there are ``keys``."""
    mods = mask.mods
    if mods is not None:
        mods = replace(mods, data=mods.data._replace(key=told.data))
    return replace(
        mask,
        key_length=keys,
        key_segments=told.segments,
        key_positions=told.positions,
        mods=mods,
    )


@dataclass(frozen=True)
class Where:
    """Where the queries and keys of a part stand in the whole sequences.

    Arguments:
      query, key: the places of the first of each.
      apart: the difference of these where it is known when the program is compiled, else None.
      whole: S.
    """

    query: Index
    key: Index
    apart: int | None
    whole: int


def columns(operands: Operands, keys: int, where: Where) -> Operands:
    """The operands with those columns of the bias that belong to the part's keys."""
    if operands.bias is None or operands.bias.shape[3] == 1 or keys == where.whole:
        return operands
    return operands._replace(bias=lax.dynamic_slice_in_dim(operands.bias, where.key, keys, 3))


def seen_by_part(operands: Operands, mask: Mask, where: Where) -> tuple[Operands, Mask]:
    """A call in the local form as one that an implementation takes.

    Arguments:
      operands: with the `columns` of the part.
    """
    rows, keys = mask.query_length, mask.key_length
    q_at, k_at = jnp.asarray(where.query, jnp.int32), jnp.asarray(where.key, jnp.int32)
    compares = mask.is_causal or mask.window is not None
    if compares and mask.query_positions is None:
        if where.apart is None:
            mask = replace(
                mask,
                query_positions=(q_at + jnp.arange(rows, dtype=jnp.int32))[None],
                key_positions=(k_at + jnp.arange(keys, dtype=jnp.int32))[None],
            )
        else:
            mask = replace(mask, place=where.apart)
    array = mask.array
    if array is not None and array.shape[3] > 1 and keys != where.whole:
        array = lax.dynamic_slice_in_dim(array, k_at, keys, 3)
    mask = replace(
        mask,
        query_lengths=_within(mask.query_lengths, q_at, rows),
        key_lengths=_within(mask.key_lengths, k_at, keys),
        array=array,
        kinds=_blocks(mask, q_at, k_at),
        dropout_origin=None if mask.dropout is None else jnp.stack([q_at, k_at]),
    )
    if mask.mods is None:
        return operands, mask
    data = operands.data._replace(
        query=(*operands.data.query, None), key=(*operands.data.key, None)
    )
    places = (q_at + jnp.arange(rows, dtype=jnp.int32), k_at + jnp.arange(keys, dtype=jnp.int32))
    return operands._replace(data=data), replace(mask, mods=by_place(mask.mods, *places))


def _within(lengths: Array | None, at: Array, most: int) -> Array | None:
    """How many of the ``most`` tokens from ``at`` on are within lengths of the whole."""
    return None if lengths is None else jnp.clip(lengths - at, 0, most)


def _blocks(mask: Mask, q_at: Array, k_at: Array) -> Array | None:
    """The kinds of the blocks of a part, whose sides are multiples of the blocks'."""
    kinds = mask.kinds
    if kinds is None:
        return None
    for axis, at, length in ((2, q_at, mask.query_length), (3, k_at, mask.key_length)):
        block = mask.block_size[axis - 2]
        count = -(-length // block)
        if kinds.shape[axis] != count:
            kinds = lax.dynamic_slice_in_dim(kinds, at // block, count, axis)
    return kinds


# Functions of places: on a device the index of a query is not its place in the whole.


@dataclass(frozen=True)
class ByPlace:
    """A function of the caller, which gets the places in the whole sequences.

    Arguments:
      function: mask_mod or score_mod.
      names: the data that the caller gave.
    """

    function: Callable[..., Any]
    names: tuple[str, ...]

    def __call__(self, *arguments: Any, q_data: Any, kv_data: Any, head_data: Any = None) -> Any:
        *first, _, _ = arguments
        given = {"q_data": q_data["given"], "kv_data": kv_data["given"], "head_data": head_data}
        data = {name: x for name, x in given.items() if name in self.names}
        return call(self.function, *first, q_data["place"], kv_data["place"], **data)


def by_place(mods: Mods, rows: Array, keys: Array) -> Mods:
    """The functions with the places of queries [T] and keys [S] among their data."""
    names = ("q_data", "kv_data", "head_data")
    given = tuple(n for n, tree in zip(names, mods.trees, strict=True) if tree is not None)

    def of(function: Callable[..., Any] | None) -> ByPlace | None:
        return None if function is None else ByPlace(function, given)

    data = Data(
        query=(*mods.data.query, rows[None, None]),
        key=(*mods.data.key, keys[None, None]),
        head=mods.data.head,
    )
    return replace(
        mods,
        mask_mod=of(mods.mask_mod),
        block_mod=of(mods.block_mod),
        score_mod=of(mods.score_mod),
        trees=(_beside_place(mods.trees[0]), _beside_place(mods.trees[1]), mods.trees[2]),
        data=data,
    )


def _beside_place(tree: Any) -> Any:
    """The tree of {"given": what ``tree`` is of, "place": a leaf}, in the order of its leaves."""
    leaves = tree.num_leaves if tree is not None else 0
    inner = None if tree is None else jax.tree.unflatten(tree, [0] * leaves)
    return jax.tree.structure({"given": inner, "place": 0})
