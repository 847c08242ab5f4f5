"""How the TPU's backward pass cuts a head, and what it writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels._common import floating, lists_shape
from pallas_kernels._tpu_inputs import LANES, Cuts, Inputs, axes_of, padded, with_axes
from pallas_kernels._tpu_lists import tiles_at_once
from pasa_jax.core.mask import Mask
from pasa_jax.core.mods import Data
from pasa_jax.core.operands import Factors, Operands, fold_heads
from pasa_jax.core.plan import Plan

Array = jax.Array

_BLOCK_Q, _BLOCK_KV = 512, 512  # of the fastest tiles, see docs/tpu.md
_SCORES = 1024 * 1024  # that a tile may have
_FEW_TILES = 4  # of a head: they are gone through without a list


class Gradients(NamedTuple):
    """The kernels' outputs: arrays outside, refs of one program's blocks inside; None where a
    kernel does not write it.
    """

    query: Any = None  # [B, K, G, T, D]; float32 for float16, as those of keys and values
    key: Any = None  # [B, K, S, D]
    value: Any = None  # [B, K, S, E]
    scale: Any = None  # [B, K, tiles, 1, D] float32, to be summed
    bias: Any = None  # [B, K, G|1, T|1, S|1] float32, to be summed where the bias broadcasts
    # [B, K, G|1, R, T], [B, K, G|1, R, S], [B, K, G, 1, S] float32, to be summed likewise
    factors: Any = None
    # `Data` of the floating leaves that ``score_mod`` is given, float32, to be summed: queries'
    # [B, K, G|1, 1, T], keys' [B, K, G|1, 1, S], and heads' [B, K, G, 1, T].
    data: Any = None

    @staticmethod
    def of(x: Inputs, mask: Mask, tiles: int, shape: Callable[..., Any]) -> Gradients:
        """The outputs' shapes, each made by ``shape``.

        Arguments:
          mask: of `without_arrays`.
          tiles: how many parts the scale's gradient comes in.
        """
        dtype = jnp.dtype(jnp.float32) if x.query.dtype == jnp.uint16 else x.query.dtype
        b, kv_heads, keys, d = x.key.shape
        scale = shape((b, kv_heads, tiles, 1, d), jnp.float32)
        query, key, value = (shape(a.shape, dtype) for a in (x.query, x.key, x.value))
        bias = factors = None
        if x.bias is not None:
            bias = shape((b, kv_heads, *x.bias.shape[2:]), jnp.float32)
        if x.factors is not None:
            q, k = (
                shape((b, kv_heads, *a.shape[2:]), jnp.float32) for a in (x.factors.q, x.factors.k)
            )
            of_scale = shape((b, kv_heads, x.query.shape[2], 1, keys), jnp.float32)
            factors = Factors(q, k, of_scale)
        data = None
        if mask.mods is not None and mask.mods.score_mod is not None:
            data = _shapes_of_data(x, mask.mods.data, shape)
        return Gradients(query, key, value, scale, bias, factors, data)

    @staticmethod
    def axes() -> Gradients:
        """The axes of each, by the names of `axes_of`; "tile" are the parts of the scale's."""
        x = axes_of(transposed=False)
        of_rows, of_keys = x.m, (*x.m[:4], "keys")
        factors = Factors(x.factors.q, x.factors.k, of_keys)
        data: Any = Data(of_rows, of_keys, of_rows)
        scale = ("b", "k", "tile", "one", "d")
        return Gradients(x.query, x.key, x.value, scale, x.bias, factors, data)

    def blocks(self, cuts: Cuts) -> Gradients:
        """The blocks of the outputs of these shapes."""
        return with_axes(cuts.block, self, self.axes())

    # Where two kernels share the outputs, and each may be called for some of its tiles.

    @property
    def halves(self) -> tuple[Gradients, Gradients]:
        """What belongs to rows, and what to keys."""
        rows, keys = self._replace(key=None, value=None), self._replace(query=None, scale=None)
        if self.factors is not None:
            rows = rows._replace(factors=self.factors._replace(k=None, scale=None))
            keys = keys._replace(factors=self.factors._replace(q=None))
        if self.data is not None:
            query, key, head = (tuple(None for _ in part) for part in self.data)
            rows = rows._replace(data=self.data._replace(key=key))
            keys = keys._replace(data=self.data._replace(query=query, head=head))
        return rows, keys

    @staticmethod
    def joined(rows: Gradients, keys: Gradients) -> Gradients:
        """The two `halves` as one."""
        both = Gradients(*(a if b is None else b for a, b in zip(rows, keys, strict=True)))
        if both.factors is not None:
            both = both._replace(factors=keys.factors._replace(q=rows.factors.q))
        if both.data is not None:
            both = both._replace(data=rows.data._replace(key=keys.data.key))
        return both

    def clear_shared(self) -> None:
        """Zeros in the refs of factors and data, to which tiles add."""
        for ref in jax.tree.leaves((self.factors, self.data)):
            ref[...] = jnp.zeros_like(ref)

    def part(
        self, own: tuple[str, ...], sides: dict[str, int], first: int, count: int
    ) -> Gradients:
        """The shapes of ``count`` tiles from tile ``first`` on, along the axes ``own``."""

        def one(x: Any, axes: tuple[str, ...]) -> Any:
            def length(n: int, axis: str) -> int:
                if axis not in own:
                    return n
                return min(n - first * sides[axis], count * sides[axis])

            return x.update(shape=tuple(map(length, x.shape, axes)))

        return with_axes(one, self, self.axes())

    @staticmethod
    def concatenated(parts: list[Gradients], own: tuple[str, ...]) -> Gradients:
        """All parts as one, along the axes ``own``."""

        def one(index: int, axes: tuple[str, ...]) -> Array:
            arrays = [jax.tree.leaves(x)[index] for x in parts]
            axis = next(i for i, name in enumerate(axes) if name in own)
            return jnp.concatenate(arrays, axis=axis) if len(arrays) > 1 else arrays[0]

        tree = jax.tree.structure(parts[0])
        whole = jax.tree.unflatten(tree, range(tree.num_leaves))
        return with_axes(one, whole, Gradients.axes())

    def operands(self, like: Operands) -> Operands:
        """As the user lays them out; sinks have none here."""
        b, _, _, t, d = self.query.shape
        query = jnp.swapaxes(self.query.reshape(b, -1, t, d), 1, 2)
        key, value = jnp.swapaxes(self.key, 1, 2), jnp.swapaxes(self.value, 1, 2)
        bias = factors = None
        if like.bias is not None:
            bias = fold_heads(self.bias, like.bias).astype(like.bias.dtype)
        if like.factors is not None:
            of = self.factors._replace(scale=jnp.sum(self.factors.scale, axis=(3, 4)))
            factors = jax.tree.map(lambda x, y: fold_heads(x, y).astype(y.dtype), of, like.factors)
        return Operands(
            query=query.astype(like.query.dtype),
            key=key.astype(like.key.dtype),
            value=value.astype(like.value.dtype),
            bias=bias,
            sinks=None,
            scale=jnp.sum(self.scale).astype(like.scale.dtype),
            factors=factors,
            data=self._of_data(like.data),
        )

    def _of_data(self, like: Data) -> Data:
        if self.data is None:  # a mask's: nothing depends on them
            return jax.tree.map(jnp.zeros_like, like)
        query, key = (jax.tree.map(lambda x: x[:, :, :, 0], part) for part in self.data[:2])
        head = jax.tree.map(lambda x: jnp.sum(x, axis=(3, 4)), self.data.head)
        found = Data(query, key, head)
        return jax.tree.map(lambda x, y: fold_heads(x, y).astype(y.dtype), found, like)


def _shapes_of_data(x: Inputs, types: Data, shape: Callable[..., Any]) -> Data:
    """The shapes of the gradients of floating leaves, None for the others.

    Arguments:
      types: of the leaves, None for the floating ones.
    """
    b, kv_heads, groups, t, _ = x.query.shape

    def one(groups: int, length: int) -> Any:
        return shape((b, kv_heads, groups, 1, length), jnp.float32)

    leaves = Data(
        tuple(one(leaf.shape[2], t) for leaf in x.query_data),
        tuple(one(leaf.shape[2], x.key.shape[2]) for leaf in x.key_data),
        tuple(one(groups, t) for _ in x.head_data),
    )
    return floating(leaves, types)


@dataclass(frozen=True)
class Sizes:
    """How a head is cut.

    Arguments:
      heads, groups: K and G.
      block_q, query_tiles: positions of a query tile, a multiple of the lanes in which row
        statistics come; how many tiles a head has.
      block_kv, key_tiles: the same of keys; block_kv is the whole of S, or the schedule's.
      streamed: whether rows come tile by tile, by a list; else all of a head lie in VMEM.
      listed: whether tiles are gone through by lists.
      bytes: of VMEM.
    """

    heads: int
    groups: int
    block_q: int
    query_tiles: int
    block_kv: int
    key_tiles: int
    streamed: bool
    listed: bool
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
    def of(o: Operands, mask: Mask, plan: Plan, vmem: int) -> Sizes:
        """With the rows of a head in VMEM, if they fit its ``vmem`` bytes and their lists SMEM."""
        (_, length, heads, _), kv_heads = o.query.shape, o.key.shape[2]
        groups, keys = heads // kv_heads, mask.key_length
        block_q = min(_BLOCK_Q, plan.schedule.block_q) // groups
        block_q = _ceil(min(max(1, block_q), length), LANES)
        block_kv = min(_BLOCK_KV, plan.schedule.block_kv)
        block_kv = min(block_kv, max(LANES, _SCORES // (groups * block_q) // LANES * LANES))
        block_kv = keys if keys <= block_kv else block_kv
        query_tiles, key_tiles = -(-length // block_q), -(-keys // block_kv)
        listed = mask.listed and (mask.kinds is not None or query_tiles * key_tiles > _FEW_TILES)
        sizes = Sizes(kv_heads, groups, block_q, query_tiles, block_kv, key_tiles, False, listed, 0)
        resident = replace(sizes, bytes=_bytes(sizes, o, mask, query_tiles))
        at_once = tiles_at_once(lists_shape(mask, groups), query_tiles)
        if resident.bytes <= vmem and (not listed or key_tiles <= at_once):
            return resident
        return replace(sizes, streamed=True, listed=True, bytes=_bytes(sizes, o, mask, 1))


def _bytes(sizes: Sizes, o: Operands, mask: Mask, query_tiles: int) -> int:
    """Bytes of VMEM that a program wants.

    Arguments:
      query_tiles: that lie there at once.
    """
    (_, _, _, d), e, groups, n = o.query.shape, o.value.shape[3], sizes.groups, sizes.block_kv
    positions, item = query_tiles * sizes.block_q, o.query.dtype.itemsize
    rows = groups * positions
    of_rows = padded(rows, d) * 2 * item + padded(rows, e) * 3 * item
    of_keys = (padded(n, d) + padded(n, e)) * (item + 4)
    tiled = 0
    for x in (o.bias, mask.array):
        if x is not None:
            r = positions if x.shape[2] > 1 else 1
            block = padded(r, n if x.shape[3] > 1 else 1)
            block *= groups if x.shape[1] > 1 else 1
            tiled += block * (x.dtype.itemsize + (4 if x is o.bias else 0))  # its gradient
    by_row = sum(x is not None for x in (mask.query_segments, mask.query_positions))
    if mask.mods is not None:
        given = mask.mods.data.beside(o.data).query
        by_row += sum(groups if x.shape[1] > 1 else 1 for x in given)
    tiled += by_row * padded(positions, 1) * 4
    if o.factors is not None:
        rank = o.factors.q.shape[2]
        tiled += 2 * groups * (padded(rank, positions) + padded(rank, n)) * 4
    scratch = (padded(rows, d) + padded(rows, 1)) * 4
    scores = 8 * padded(groups * sizes.block_q, n) * 4
    return 2 * (of_rows + of_keys + tiled) + scratch + scores  # blocks are double-buffered


def bias_copies(o: Operands) -> int:
    """How many heads and batch entries the bias is broadcast over, groups left out."""
    assert o.bias is not None
    entries, heads = o.bias.shape[:2]
    return (len(o.query) if entries == 1 else 1) * (o.key.shape[2] if heads == 1 else 1)


def _ceil(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple
