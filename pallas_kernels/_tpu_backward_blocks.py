"""The arrays of the TPU's backward pass, and how they are cut into blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._common import narrowed
from pallas_kernels._float16 import to_bits
from pallas_kernels._tpu_walk import LANES, bias_per_head, grouped, padded, per_head
from pasa_jax.core.mask import Mask
from pasa_jax.core.operands import Operands, Result, fold_heads
from pasa_jax.core.plan import Plan

Array = jax.Array

_BLOCK_Q, _BLOCK_KV = 512, 512  # of the fastest tiles, see docs/tpu.md
_SCORES = 1024 * 1024  # that a tile may have


class Inputs(NamedTuple):
    """The kernel's inputs: arrays outside, refs of one program's blocks inside."""

    query: Any  # [B, K, G, T, D]
    d_out: Any  # [B, K, G, T, E]
    out: Any  # [B, K, G, T, E]
    remainder: Any  # [B, K, G, T, E]
    m: Any  # [B, K, G, 1, T]
    l: Any  # noqa: E741  [B, K, G, 1, T]
    key: Any  # [B, K, S, D]
    first_keys: Any  # the same array, of which a program sees some of the first
    value: Any  # [B, K, S, E]
    scale: Any  # [1]
    d_lse: Any = None  # [B, K, G, 1, T]
    sinks: Any = None  # [N]
    bias: Any = None  # [B|1, K|1, G|1, T|1, S|1]
    array: Any = None  # [B|1, K|1, G|1, T|1, S|1] int8
    query_segments: Any = None  # [B, T, 1]
    key_segments: Any = None  # [B, 1, S]
    query_lengths: Any = None  # [B]
    key_lengths: Any = None  # [B]


class Gradients(NamedTuple):
    """The kernel's outputs: arrays outside, refs of one program's blocks inside."""

    query: Any  # [B, K, G, T, D]; float32 for float16, as those of keys and values
    key: Any  # [B, K, S, D]
    value: Any  # [B, K, S, E]
    scale: Any  # [B, K, key tiles, 1, D] float32, to be summed
    bias: Any = None  # [B, K, G|1, T|1, S|1] float32, to be summed where the bias broadcasts

    @staticmethod
    def of(x: Inputs, sizes: Sizes, shape: Callable[..., Any]) -> Gradients:
        """The outputs' shapes, each made by ``shape``."""
        dtype = jnp.dtype(jnp.float32) if x.query.dtype == jnp.uint16 else x.query.dtype
        b, kv_heads, _, d = x.key.shape
        scale = shape((b, kv_heads, sizes.key_tiles, 1, d), jnp.float32)
        query, key, value = (shape(a.shape, dtype) for a in (x.query, x.key, x.value))
        bias = None
        if x.bias is not None:
            bias = shape((b, kv_heads, *x.bias.shape[2:]), jnp.float32)
        return Gradients(query, key, value, scale, bias)

    def operands(self, like: Operands) -> Operands:
        """As the user lays them out; sinks have none here."""
        b, _, _, t, d = self.query.shape
        query = jnp.swapaxes(self.query.reshape(b, -1, t, d), 1, 2)
        key, value = jnp.swapaxes(self.key, 1, 2), jnp.swapaxes(self.value, 1, 2)
        return Operands(
            query=query.astype(like.query.dtype),
            key=key.astype(like.key.dtype),
            value=value.astype(like.value.dtype),
            bias=None
            if like.bias is None
            else fold_heads(self.bias, like.bias).astype(like.bias.dtype),
            sinks=None,
            scale=jnp.sum(self.scale).astype(like.scale.dtype),
            data=like.data,  # without leaves
        )


@dataclass(frozen=True)
class Sizes:
    """How a head is cut.

    Arguments:
      heads, groups: K and G.
      block_q, query_tiles: positions of a query tile, a multiple of the lanes in which row
        statistics come; how many tiles a head has.
      block_kv, key_tiles: the same of keys; block_kv is the whole of S, or the schedule's.
      bytes: of VMEM.
    """

    heads: int
    groups: int
    block_q: int
    query_tiles: int
    block_kv: int
    key_tiles: int
    bytes: int

    @property
    def rows(self) -> int:
        """Positions of all query tiles."""
        return self.query_tiles * self.block_q

    def last_first(self, program: Any) -> Any:
        """The key tile of a program: the last tile of a head comes first.

        Under a causal mask the last program then has the most to compute, beside which the rows of
        the next head are loaded.
        """
        return self.key_tiles - 1 - program

    @staticmethod
    def of(o: Operands, mask: Mask, plan: Plan) -> Sizes:
        (_, length, heads, d), kv_heads = o.query.shape, o.key.shape[2]
        groups, e, keys = heads // kv_heads, o.value.shape[3], mask.key_length
        block_q = min(_BLOCK_Q, plan.schedule.block_q) // groups
        block_q = _ceil(min(max(1, block_q), length), LANES)
        block_kv = min(_BLOCK_KV, plan.schedule.block_kv)
        block_kv = min(block_kv, max(LANES, _SCORES // (groups * block_q) // LANES * LANES))
        block_kv = keys if keys <= block_kv else block_kv
        query_tiles, key_tiles = -(-length // block_q), -(-keys // block_kv)
        rows, item = groups * query_tiles * block_q, o.query.dtype.itemsize
        of_rows = padded(rows, d) * 2 * item + padded(rows, e) * 3 * item
        of_keys = (padded(block_kv, d) + padded(block_kv, e)) * (item + 4)
        tiled = 0
        for x in (o.bias, mask.array):
            if x is not None:
                r = rows // groups if x.shape[2] > 1 else 1
                block = padded(r, block_kv if x.shape[3] > 1 else 1)
                block *= groups if x.shape[1] > 1 else 1
                tiled += block * (x.dtype.itemsize + (4 if x is o.bias else 0))  # its gradient
        if mask.query_segments is not None:
            tiled += padded(rows // groups, 1) * 4
        scratch = (padded(rows, d) + padded(rows, 1)) * 4
        scores = 8 * padded(groups * block_q, block_kv) * 4
        return Sizes(
            kv_heads,
            groups,
            block_q,
            query_tiles,
            block_kv,
            key_tiles,
            2 * (of_rows + of_keys + tiled) + scratch + scores,  # blocks are double-buffered
        )

    def of_inputs(self, x: Inputs) -> Inputs:
        """The blocks of the inputs."""

        def only(x: Array | None, spec: pl.BlockSpec) -> pl.BlockSpec | None:
            return None if x is None else spec

        first = (1, 1, min(x.key.shape[2], LANES), x.key.shape[-1])
        column = pl.BlockSpec((1, 1, self.groups, 1, self.rows), lambda b, h, j: (b, h, 0, 0, 0))
        scalars = pl.BlockSpec(memory_space=pltpu.SMEM)
        row = pl.BlockSpec((1, self.rows, 1), lambda b, h, j: (b, 0, 0))
        keys = pl.BlockSpec((1, 1, self.block_kv), lambda b, h, j: (b, 0, self.last_first(j)))
        return Inputs(
            query=self._head(x.query),
            d_out=self._head(x.d_out),
            out=self._head(x.out),
            remainder=self._head(x.remainder),
            m=column,
            l=column,
            key=self._keys(x.key),
            first_keys=pl.BlockSpec(first, lambda b, h, j: (b, h, 0, 0)),
            value=self._keys(x.value),
            scale=scalars,
            d_lse=only(x.d_lse, column),
            sinks=only(x.sinks, scalars),
            bias=self._tiled(x.bias),
            array=self._tiled(x.array),
            query_segments=only(x.query_segments, row),
            key_segments=only(x.key_segments, keys),
            query_lengths=only(x.query_lengths, scalars),
            key_lengths=only(x.key_lengths, scalars),
        )

    def of_gradients(self, x: Inputs, out: Gradients) -> Gradients:
        """The blocks of the outputs ``out``."""
        scale = pl.BlockSpec((1, 1, 1, 1, x.key.shape[-1]), lambda b, h, j: (b, h, j, 0, 0))
        heads, keys, values = self._head(x.query), self._keys(x.key), self._keys(x.value)
        return Gradients(heads, keys, values, scale, self._tiled(out.bias))

    def bias_copies(self, o: Operands) -> int:
        """How many heads and batch entries the bias is broadcast over, groups left out."""
        assert o.bias is not None
        entries, heads = o.bias.shape[:2]
        return (len(o.query) if entries == 1 else 1) * (self.heads if heads == 1 else 1)

    def _tiled(self, x: Any) -> pl.BlockSpec | None:
        """The block [1, 1, G|1, T|1, n|1] of an array [B|1, K|1, G|1, T|1, S|1], or None."""
        if x is None:
            return None
        block = (1, 1, x.shape[2], self.rows if x.shape[3] > 1 else 1)
        block += (self.block_kv if x.shape[4] > 1 else 1,)
        b, k, _, _, s = (int(n > 1) for n in x.shape)
        return pl.BlockSpec(block, lambda i, h, j: (i * b, h * k, 0, 0, self.last_first(j) * s))

    def _head(self, x: Array) -> pl.BlockSpec:
        block = (1, 1, self.groups, self.rows, x.shape[-1])
        return pl.BlockSpec(block, lambda b, h, j: (b, h, 0, 0, 0))

    def _keys(self, x: Array) -> pl.BlockSpec:
        block = (1, 1, self.block_kv, x.shape[-1])
        return pl.BlockSpec(block, lambda b, h, j: (b, h, self.last_first(j), 0))


def inputs_of(o: Operands, mask: Mask, result: Result, d_out: Array, d_lse: Array | None) -> Inputs:
    """The arrays of a call as the kernel takes them."""
    heads = o.key.shape[2]

    def rows(x: Array) -> Array:
        return to_bits(grouped(x, heads))

    def column(x: Array | None) -> Array | None:  # [B, T, N] -> [B, K, G, 1, T]
        return None if x is None else rows(x.astype(jnp.float32))[:, :, :, None]

    array = None if mask.array is None else mask.array.astype(jnp.int8)
    key = to_bits(jnp.swapaxes(o.key, 1, 2))
    return Inputs(
        query=rows(o.query),
        d_out=rows(d_out),
        out=rows(result.out),
        remainder=rows(result.remainder),
        m=column(result.m),
        l=column(result.l),
        key=key,
        first_keys=key,
        value=to_bits(jnp.swapaxes(o.value, 1, 2)),
        scale=o.scale.astype(jnp.float32).reshape(1),
        d_lse=column(d_lse),
        sinks=narrowed(o.sinks),
        bias=bias_per_head(o.bias, heads),
        array=per_head(array, heads),
        query_segments=None if mask.query_segments is None else mask.query_segments[..., None],
        key_segments=None if mask.key_segments is None else mask.key_segments[:, None],
        query_lengths=mask.query_lengths,
        key_lengths=mask.key_lengths,
    )


def _ceil(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple
