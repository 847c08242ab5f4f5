"""The TPU's backward pass where all rows of a head lie in VMEM.

A program of the grid (batch, key head, key tile) folds the query tiles that see its keys. The
gradient of the queries stays in VMEM too, in float32, until the head's last key tile is done. Each
score is computed once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._common import bound, lists_of, shape_maker, without_arrays
from pallas_kernels._float16 import from_bits, to_bits
from pallas_kernels._tpu_backward_blocks import Gradients, Sizes
from pallas_kernels._tpu_backward_walk import (
    BackwardWalk,
    Columns,
    mean_key,
    statistics,
)
from pallas_kernels._tpu_inputs import LANES, Cuts, Inputs, grouped, inputs_of
from pallas_kernels._tpu_lists import TileList
from pallas_kernels._tpu_walk import STRAIGHT_SCORES
from pasa_jax.core import tile
from pasa_jax.core.mask import Index, KeyRange, Mask
from pasa_jax.core.operands import Operands, Result
from pasa_jax.core.plan import Plan
from pasa_jax.core.target import MIB
from pasa_jax.core.walk import Listed, Walk

if TYPE_CHECKING:
    from pasa_jax.core.shapes import Float

Array = jax.Array
Ref = Any


def gradients_by_head(
    operands: Operands,
    mask: Mask,
    plan: Plan,
    sizes: Sizes,
    result: Result,
    d_out: Float[Array, "B T N E"],
    d_lse: Float[Array, "B T N"] | None,
    vmem: int,
) -> Gradients:
    """All gradients but that of the sinks.

    Arguments:
      vmem: bytes that a program may use.
    """
    inputs, list_shape = _inputs(operands, mask, sizes, result, d_out, d_lse), None
    if sizes.listed:
        tiles = (sizes.block_q, sizes.block_kv, sizes.groups)
        lists = TileList.of(lists_of(mask, *tiles, by_key=True, backward=True))
        inputs, list_shape = inputs._replace(lists=lists.numbers), lists.shape
    if not plan.interpret:
        inputs = in_hbm(inputs)
    outs = Gradients.of(inputs, without_arrays(mask), sizes.key_tiles, shape_maker(operands, mask))
    first = min(mask.key_length, LANES)
    cuts = Cuts(
        {"b": 1, "k": 1, "rows": sizes.rows, "keys": sizes.block_kv, "first": first, "tile": 1},
        {
            "b": lambda b, h, j: b,
            "k": lambda b, h, j: h,
            "keys": lambda b, h, j: sizes.last_first(j),
            "tile": lambda b, h, j: j,
        },
    )
    options = {"mask": without_arrays(mask), "plan": plan, "sizes": sizes, "list_shape": list_shape}
    call = pl.pallas_call(
        partial(_kernel, **options),
        grid=(len(operands.query), sizes.heads, sizes.key_tiles),
        in_specs=(cuts.inputs(inputs),),
        out_specs=outs.blocks(cuts),
        out_shape=outs,
        scratch_shapes=[
            pltpu.VMEM((sizes.groups, sizes.rows, inputs.query.shape[-1]), jnp.float32),
            pltpu.VMEM((sizes.groups, sizes.rows, 8), jnp.float32),
            pltpu.VMEM((1, inputs.query.shape[-1]), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=min(vmem, sizes.bytes + sizes.bytes // 4 + 8 * MIB),
        ),
        interpret=pltpu.InterpretParams() if plan.interpret else False,
        name="pasa_tpu_backward",
    )
    with jax.enable_x64(False):  # Pallas' compilers have no 64-bit loop counters
        return call(inputs)


def _inputs(
    o: Operands,
    mask: Mask,
    sizes: Sizes,
    result: Result,
    d_out: Array,
    d_lse: Array | None,
) -> Inputs:
    def rows(x: Array) -> Array:
        return to_bits(grouped(x, sizes.heads))

    def column(x: Array | None) -> Array | None:  # [B, T, N] -> [B, K, G, 1, T]
        return None if x is None else rows(x.astype(jnp.float32))[:, :, :, None]

    inputs = inputs_of(o, mask, transposed=False)
    return inputs._replace(
        d_out=rows(d_out),
        out=rows(result.out),
        remainder=rows(result.remainder),
        m=column(result.m),
        l=column(result.l),
        d_lse=column(d_lse),
        first_keys=inputs.key,
    )


def in_hbm(x: Inputs) -> Inputs:
    """The large arrays, where the compiler may not move them: what it would put into spare VMEM is
    read from there no faster.
    """

    def fixed(x: Array) -> Array:
        return pltpu.with_memory_space_constraint(x, pltpu.HBM) if x.ndim >= 3 else x

    return jax.tree.map(fixed, x)


def _kernel(
    refs: Inputs,
    *rest: Ref,
    mask: Mask,
    plan: Plan,
    sizes: Sizes,
    list_shape: Any,
) -> None:
    b, h, program = (pl.program_id(axis) for axis in range(3))
    j = sizes.last_first(program)
    *out_refs, d_query, columns, kappa = rest
    outs = Gradients(*out_refs)
    mask = bound(mask, refs.query_lengths, refs.key_lengths, b)
    walk = _HeadWalk(
        mask=mask,
        plan=plan,
        numerics=plan.numerics(mask.key_length),
        groups=sizes.groups,
        block_q=sizes.block_q,
        value_size=refs.value.shape[-1],
        refs=refs,
        entry=b,
        head=h,
        column_ref=columns,
        kappa=kappa,
        sizes=sizes,
        tiles=None if list_shape is None else TileList(refs.lists, list_shape),
    )
    pl.when(program == 0)(partial(walk.begin_head, d_query, outs))
    static = walk.static_tiles()
    if not static:
        walk.key_tile(j, d_query, outs)
    for c in static:
        pl.when(j == c)(partial(walk.key_tile, c, d_query, outs))
    pl.when(program == sizes.key_tiles - 1)(partial(walk.end_head, d_query, outs))


def _put_column(x: Array, c: int, column: Array) -> Array:
    """x [R, 8] with ``column`` [R, 1] in the place of column c."""
    return jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, 1) == c, column, x)


@dataclass(frozen=True, kw_only=True)
class _HeadWalk(BackwardWalk):
    """One program: the rows are those of the whole head, the keys those of one tile.

    Arguments:
      column_ref: [G, T, 8], see `Columns`.
      tiles: the query tiles of each key tile, or None: they are known by their place.
    """

    column_ref: Ref
    sizes: Sizes
    tiles: TileList | None

    # Tiles.

    def rows_at(self, start: Index) -> Any:
        return pl.ds(start, self.block_q)

    def columns(self, start: Index) -> Columns:
        x = self.column_ref[:, self.rows_at(start)]
        return Columns.of(x.reshape(-1, x.shape[-1]))

    def row_visits(self, j: Index) -> Listed | None:
        if self.tiles is None:
            return None
        tiles, at = self.tiles, (self.entry, self.head, j)
        return Listed(
            partial(tiles.tile, *at),
            tiles.partials(*at),
            tiles.count(*at),
            partial(tiles.asks, *at),
        )

    def query_range(self, j: Index) -> KeyRange:
        """Of ints where every key tile has the same."""
        if self.mask.query_lengths is None and self.mask.key_lengths is None:
            ranges = {Walk.query_range(self, c) for c in range(self.sizes.key_tiles)}
            if len(ranges) == 1:
                return ranges.pop()
        return super().query_range(j)

    def static_tiles(self) -> range:
        """The key tiles that get a body of their own, with their query tiles static.

        None do where lists say which, where all share one body because they are seen by the same
        query tiles, or where so many bodies would take too long to compile.
        """
        if self.tiles is not None:
            return range(0)
        ranges = [self.query_range(j) for j in range(self.sizes.key_tiles)]
        if not all(isinstance(x, int) for r in ranges for x in r) or len(set(ranges)) == 1:
            return range(0)
        tiles = sum(r.hi - r.lo for r in ranges)
        scores = tiles * self.groups * self.block_q * self.block_kv
        return range(self.sizes.key_tiles if scores <= STRAIGHT_SCORES else 0)

    # One head.

    def begin_head(self, d_query: Ref, outs: Gradients) -> None:
        """Nothing in what all key tiles add to, the columns of all rows, and κ."""
        d_query[...] = jnp.zeros_like(d_query)
        if outs.bias is not None and self.sums_keys(outs.bias):
            outs.bias[...] = jnp.zeros_like(outs.bias)
        outs.halves[0].clear_shared()
        self.kappa[...] = self._mean_key()
        for g in range(self.groups):
            of_head = self._statistics(g)
            for i in range(self.sizes.query_tiles):
                start = i * self.block_q
                at = slice(start, start + self.block_q)
                d_o, out, rest = (
                    from_bits(x[0, 0, g, at]).astype(jnp.float32)
                    for x in (self.refs.d_out, self.refs.out, self.refs.remainder)
                )
                found = of_head[at]
                delta = jnp.sum(d_o * (out + rest), axis=1, keepdims=True)
                if self.refs.d_lse is not None:
                    delta = delta - found[:, 2:3]
                if self.padded:
                    used = self.positions(start)[: self.block_q] < self.mask.valid_queries()
                    delta = tile.zero_unusable(delta, used)
                if self.adds_mean:
                    total = found[:, 2:3] + found[:, 3:4] * delta
                    found = _put_column(found, 3, total)
                self.column_ref[g, at] = _put_column(found, 2, delta)

    @property
    def adds_mean(self) -> bool:
        """Whether Σ dS may be other than 0."""
        return self.refs.d_lse is not None or self.refs.sinks is not None

    def _mean_key(self) -> Float[Array, "1 D"]:
        """The mean of the first keys; 0 under a soft cap or a function of the scores, whose slopes
        make Σ dS unknown.
        """
        k = from_bits(self.refs.first_keys[0, 0])
        if self.numerics.needs_scores:
            return jnp.zeros((1, k.shape[1]), jnp.float32)
        row = lax.broadcasted_iota(jnp.int32, (len(k), 1), 0)
        length = self.mask.key_lengths
        return mean_key(k, row < (self.mask.key_length if length is None else length))

    def _statistics(self, g: int) -> Float[Array, "T 8"]:
        """`statistics` of a query head, turned from rows to columns."""
        shape = (1, self.sizes.rows)
        refs, position = self.refs, lax.broadcasted_iota(jnp.int32, shape, 1)
        sink = None
        if refs.sinks is not None:
            sink = jnp.full(shape, refs.sinks[self.head * self.groups + g])
        d_lse = None if refs.d_lse is None else refs.d_lse[0, 0, g]
        inside = position < self.mask.valid_queries()
        rows, live = statistics(
            refs.m[0, 0, g], refs.l[0, 0, g], d_lse, sink, inside, self.numerics
        )
        which = lax.broadcasted_iota(jnp.int32, (8, shape[1]), 0)
        found = jnp.zeros((8, shape[1]), jnp.float32)
        for c, row in enumerate(rows):
            found = jnp.where((which == c) & (live | (c == 0)), row, found)
        return found.T

    def end_head(self, d_query: Ref, outs: Gradients) -> None:
        for i in range(self.sizes.query_tiles):
            start = i * self.block_q
            if self.adds_mean:
                self._add_mean(start, d_query, outs)
            at = slice(start, start + self.block_q)
            outs.query[0, 0, :, at] = (d_query[:, at] * self.refs.scale[0]).astype(outs.query.dtype)

    def _add_mean(self, start: int, d_query: Ref, outs: Gradients) -> None:
        """Adds κ·Σ dS to the gradient of a query tile, and its part to that of the scale."""
        at = (slice(None), slice(start, start + self.block_q))
        added = self.columns(start).total * self.kappa[...]
        d_query[at] += added.reshape(self.groups, self.block_q, -1)
        q = self.used(self.rows(self.refs.query, start), start).astype(jnp.float32)
        outs.scale[0, 0, 0] += jnp.sum(added * q, axis=0, keepdims=True)

    # One key tile.

    def key_tile(self, j: Index, d_query: Ref, outs: Gradients) -> None:
        key = self.key(j)
        k = self.centred(key)
        wide = self.numerics.product
        if outs.bias is not None:
            self.clear_bias(j, outs.bias)
        outs.halves[1].clear_shared()

        def step(i: Index, seen: Array | None, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            start = i * self.block_q
            g, s = self.reverse(start, j, key, k, seen)
            at = (slice(None), pl.ds(start, self.block_q))
            d_query[at] += g.q.reshape(self.groups, self.block_q, -1)
            if outs.bias is not None:
                self.add_to_bias(outs.bias, start, g.scores)
            self.add_shared(outs, start, j, s, g.scores)
            return carry[0] + g.k, carry[1] + g.v

        zeros = jnp.zeros(k.shape, wide), jnp.zeros(key.v.shape, wide)
        d_k, d_v = self.over_rows(j, step, zeros)
        # Σ q·(dS·K) over the rows is Σ k·(dSᵀ·Q) over the keys.
        outs.scale[0, 0, 0] = jnp.sum(d_k * k.astype(wide), axis=0, keepdims=True)
        outs.key[0, 0] = (d_k * self.refs.scale[0]).astype(outs.key.dtype)
        outs.value[0, 0] = d_v.astype(outs.value.dtype)

    # The bias's gradient, a block [1, 1, G|1, T|1, n|1].

    def sums_keys(self, d_bias: Ref) -> bool:
        """Whether all key tiles of the head add to the same block."""
        return d_bias.shape[4] == 1

    def clear_bias(self, j: Index, d_bias: Ref) -> None:
        """Zeros wherever no query tile will write, or several will add."""
        if self.sums_keys(d_bias):  # `begin_head` has done so
            return
        lo, _, _, hi = self.query_range(j)
        known = isinstance(lo, int) and isinstance(hi, int) and not self.mask.data_dependent
        if d_bias.shape[3] == 1 or not known:
            d_bias[...] = jnp.zeros_like(d_bias)
            return
        for i in range(self.sizes.query_tiles):
            if not lo <= i < hi:
                at = (0, 0, slice(None), slice(i * self.block_q, (i + 1) * self.block_q))
                d_bias[at] = jnp.zeros_like(d_bias[at])

    def add_to_bias(self, d_bias: Ref, start: Index, d_scores: Float[Array, "R n"]) -> None:
        """Adds a tile, summed over the axes along which the bias broadcasts."""
        shape = (self.groups, self.block_q, self.block_kv)
        axes = tuple(a for a, n in enumerate(shape) if n > 1 == d_bias.shape[a + 2])
        x = d_scores.reshape(shape)
        x = jnp.sum(x, axis=axes, keepdims=True) if axes else x
        rows = d_bias.shape[3] > 1
        at = (0, 0, slice(None), pl.ds(start, self.block_q) if rows else slice(None))
        alone = rows and not self.sums_keys(d_bias)  # no other tile has its place
        d_bias[at] = x if alone else d_bias[at] + x
