"""The arrays that the kernels for TPUs read, and how they are cut into blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._common import given_data, narrowed
from pallas_kernels._float16 import to_bits
from pasa_jax.core import tile
from pasa_jax.core.mask import Index, Mask
from pasa_jax.core.operands import Factors, Operands

Array = jax.Array

LANES = 128


def padded(rows: int, columns: int) -> int:
    """How many numbers of 32 bits whole vectors hold, of a matrix that lies in them."""
    return -(-rows // 8) * 8 * -(-columns // LANES) * LANES


def grouped(x: Array, heads: int) -> Array:
    """[B, T, N, …] -> [B, K, G, T, …]."""
    x = jnp.swapaxes(x, 1, 2)
    return x.reshape(x.shape[0], heads, -1, *x.shape[2:])


def bias_per_head(bias: Array | None, heads: int) -> Array | None:
    """[B|1, K|1, G|1, T|1, S|1]; float16, which Mosaic refuses, as float32.

    The lowest number of float16 hides a key, and so must what it becomes.
    """
    bias = narrowed(bias)
    if bias is not None and bias.dtype == jnp.float16:
        hides = ~tile.shown_by(bias)
        bias = jnp.where(hides, jnp.float32(tile.lowest(jnp.float32)), bias.astype(jnp.float32))
    return per_head(bias, heads)


def per_head(x: Array | None, heads: int) -> Array | None:
    """[B|1, N|1, T|1, S|1] -> [B|1, K|1, G|1, T|1, S|1]."""
    if x is None:
        return None
    split = (1, 1) if x.shape[1] == 1 else (heads, -1)
    return x.reshape(x.shape[0], *split, *x.shape[2:])


class Inputs(NamedTuple):
    """A kernel's inputs: arrays [B, K, …] outside, refs of one program's blocks inside."""

    query: Any  # [B, K, G, T, D]
    key: Any  # [B, K, S, D]
    value: Any  # [B, K, S, E]
    scale: Any  # [1]
    bias: Any = None  # [B|1, K|1, G|1, T|1, S|1]
    sinks: Any = None  # [N]
    array: Any = None  # [B|1, K|1, G|1, T|1, S|1] int8
    query_segments: Any = None  # [B, T, 1]; transposed [B, 1, T]
    key_segments: Any = None  # [B, 1, S]; transposed [B, S, 1]
    query_positions: Any = None  # as segments
    key_positions: Any = None
    factors: Any = None  # Factors of [B|1, K|1, G|1, R, T], [B|1, K|1, G|1, R, S], [B|1, N|1]
    # Of the functions of the caller: the numbers of batch entries and heads, and `Data`.
    entries: Any = None  # [B]
    heads: Any = None  # [N]
    query_data: Any = None  # each [B|1, K|1, G|1, T, 1]; transposed [B|1, K|1, G|1, 1, T]
    key_data: Any = None  # each [B|1, K|1, G|1, 1, S]; transposed [B|1, K|1, G|1, S, 1]
    head_data: Any = None  # each [B|1, N|1]
    query_lengths: Any = None  # [B]
    key_lengths: Any = None  # [B]
    todo: Any = None  # [B, K, query tiles] int32, 0 for tiles that are left out; None: all are done
    # Of the backward pass alone.
    d_out: Any = None  # [B, K, G, T, E]
    # Where the rows of a head lie in VMEM: what a program finds its rows' statistics from.
    out: Any = None  # [B, K, G, T, E]
    remainder: Any = None  # [B, K, G, T, E]
    m: Any = None  # [B, K, G, 1, T]
    l: Any = None  # noqa: E741  [B, K, G, 1, T]
    d_lse: Any = None  # [B, K, G, 1, T]
    first_keys: Any = None  # ``key``, of which a program sees some of the first
    lists: Any = None  # the numbers of a `TileList`
    # Where they do not: these statistics, and the mean key.
    statistics: Any = None  # [B, K, G, 8, T]
    kappa: Any = None  # [B, K, 1, D]


def inputs_of(o: Operands, mask: Mask, *, transposed: bool) -> Inputs:
    """The arrays that both passes read.

    Arguments:
      transposed: whether tiles are. Rows lie along sublanes and keys along lanes; the other way
        round where they are.
    """
    heads = o.key.shape[2]
    array = None if mask.array is None else mask.array.astype(jnp.int8)
    of_rows, of_keys = (-2, -1) if transposed else (-1, -2)

    def along(x: Array | None, axis: int) -> Array | None:
        return None if x is None else jnp.expand_dims(x, axis)

    def by_head(x: Array, axis: int) -> Any:  # [B|1, N|1, L]
        split = per_head(x[..., None], heads)
        return None if split is None else along(split[..., 0], axis)

    inputs = Inputs(
        query=to_bits(grouped(o.query, heads)),
        key=to_bits(jnp.swapaxes(o.key, 1, 2)),
        value=to_bits(jnp.swapaxes(o.value, 1, 2)),
        scale=o.scale.astype(jnp.float32).reshape(1),
        bias=bias_per_head(o.bias, heads),
        sinks=narrowed(o.sinks),
        array=per_head(array, heads),
        query_segments=along(mask.query_segments, of_rows),
        key_segments=along(mask.key_segments, of_keys),
        query_positions=along(mask.query_positions, of_rows),
        key_positions=along(mask.key_positions, of_keys),
        query_lengths=mask.query_lengths,
        key_lengths=mask.key_lengths,
    )
    if o.factors is not None:
        q, k = (per_head(x, heads) for x in o.factors[:2])
        inputs = inputs._replace(factors=Factors(q, k, o.factors.scale))
    if mask.mods is None:
        return inputs
    data = given_data(mask, o)
    return inputs._replace(
        entries=mask.mods.entries,
        heads=mask.mods.heads,
        query_data=jax.tree.map(lambda x: by_head(x, of_rows), data.query),
        key_data=jax.tree.map(lambda x: by_head(x, of_keys), data.key),
        head_data=data.head,
    )


# What the axes of the arrays are; of an axis with a 1 in its name the length may be 1. None: the
# array is in SMEM, whole.
_LEAD = ("b", "k", "g")
_TILED = (*_LEAD, "rows1", "keys1")
_COLUMN = (*_LEAD, "one", "rows")
_OUT = (*_LEAD, "rows", "e")
Axes = tuple[str, ...] | None


def axes_of(*, transposed: bool) -> Inputs:
    """The axes of each array."""
    of_rows, of_keys = ("rows", "one"), ("one", "keys")
    if transposed:
        of_rows, of_keys = ("one", "rows"), ("keys", "one")
    return Inputs(
        query=(*_LEAD, "rows", "d"),
        key=("b", "k", "keys", "d"),
        value=("b", "k", "keys", "e"),
        scale=None,
        bias=_TILED,
        array=_TILED,
        query_segments=("b", *of_rows),
        key_segments=("b", *of_keys),
        query_positions=("b", *of_rows),
        key_positions=("b", *of_keys),
        factors=Factors((*_LEAD, "r", "rows"), (*_LEAD, "r", "keys"), None),
        query_data=(*_LEAD, *of_rows),
        key_data=(*_LEAD, *of_keys),
        d_out=_OUT,
        out=_OUT,
        remainder=_OUT,
        m=_COLUMN,
        l=_COLUMN,
        d_lse=_COLUMN,
        first_keys=("b", "k", "first", "d"),
        statistics=(*_LEAD, "eight", "rows"),
        kappa=("b", "k", "one", "d"),
    )


def with_axes(f: Callable[[Any, Any], Any], x: Any, axes: Any) -> Any:
    """f(leaf, axes) of every leaf of x.

    Arguments:
      axes: as x; or those of all its leaves.
    """
    if x is None:
        return None
    if hasattr(axes, "_fields"):
        return type(axes)(*(with_axes(f, *pair) for pair in zip(x, axes, strict=True)))
    return jax.tree.map(lambda leaf: f(leaf, axes), x)


@dataclass(frozen=True)
class Cuts:
    """How a kernel's arrays are cut.

    Arguments:
      sides: how long a block is, by the name of an axis; of an axis that is not named it is whole.
      places: which block a program has, by the name of an axis and from the program's indices; of
        an axis that is not named the first.
      transposed: see `inputs_of`.
    """

    sides: Mapping[str, int]
    places: Mapping[str, Callable[..., Index]]
    transposed: bool = False

    def inputs(self, x: Inputs) -> Inputs:
        """The blocks of a kernel's inputs."""
        return with_axes(self.block, x, axes_of(transposed=self.transposed))

    def block(self, x: Any, axes: Axes) -> pl.BlockSpec:
        """The block of an array, or of an output's shape, with these ``axes``."""
        if axes is None:
            return pl.BlockSpec(memory_space=pltpu.SMEM)

        def side(n: int, axis: str) -> int:
            name = axis.removesuffix("1")
            return n if name != axis and n == 1 else self.sides.get(name, n)

        def index(*program: Any) -> tuple[Any, ...]:
            return tuple(
                self.places[name](*program) if n > 1 and name in self.places else 0
                for n, name in zip(x.shape, (a.removesuffix("1") for a in axes), strict=True)
            )

        return pl.BlockSpec(tuple(map(side, x.shape, axes)), index)
