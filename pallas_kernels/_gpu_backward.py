"""The backward pass as two Pallas kernels for NVIDIA GPUs, through Triton.

A program of ``pasa_gpu_dq`` has a query tile and folds the key tiles that it sees into dq. A
program of ``pasa_gpu_dkv`` has a key tile and folds the query tiles that see it, of each of the G
query heads, into dk and dv. Both compute the forward pass's scores again, each with the tile
functions and the walk of `pasa_jax`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels._common import floating, known, lists_of, shape_maker, without_arrays
from pallas_kernels._gpu_inputs import (
    HeadRef,
    Inputs,
    Specs,
    block_specs,
    inputs_of,
    of_query_head,
)
from pallas_kernels._gpu_shared import Shared
from pallas_kernels._gpu_walk import PointerWalk, for_triton, thin_product
from pasa_jax.core import tile
from pasa_jax.core.mask import Index, Mask
from pasa_jax.core.mods import Data
from pasa_jax.core.operands import Factors, Operands, Result
from pasa_jax.core.plan import Plan

Array = jax.Array
Ref = Any


def gradients(
    operands: Operands,
    mask: Mask,
    plan: Plan,
    result: Result,
    d_out: Array,
    d_lse: Array | None,
) -> Operands:
    """The kernels' own cotangents, from a result that the forward kernel computed."""
    plan = for_triton(plan)
    inputs = _inputs(operands, mask, plan, result, d_out, d_lse)
    same_blocks = plan.storage.uses_kappa
    schedule = plan.schedule.backward(operands.query.dtype, same_blocks=same_blocks)
    plan = replace(plan, schedule=schedule)
    specs = Specs.of(operands, plan)
    if mask.listed:
        tiles = (mask, specs.block_q, specs.block_kv, 1)
        row_lists = lists_of(*tiles, by_key=True, backward=True)
        inputs = inputs._replace(lists=lists_of(*tiles), row_lists=row_lists)
    (b, t, n, d), (s, kv_heads) = operands.query.shape, operands.key.shape[1:3]
    shape = shape_maker(operands, mask)
    call = partial(_call, inputs, mask, plan, specs)
    rows, keys = (specs.padded(x, axis) for x, axis in ((t, "rows"), (s, "keys")))

    def block(*sizes: int) -> pl.BlockSpec:
        """One head of an output [B, L, heads, …]."""
        sides = (None, sizes[0], None, *sizes[1:])
        return pl.BlockSpec(sides, lambda i, h, b: (b, 0, h, 0)[: len(sides)])

    shared = Shared.shapes(operands, without_arrays(mask), shape)
    d_query, d_scale, of_rows = call(
        "pasa_gpu_dq",
        _query_kernel,
        (specs.query_tiles, n, b),
        (block(rows, specs.padded_size), block(rows), shared.of_rows.blocks(specs)),
        (
            shape((b, t, n, d), operands.query.dtype),
            shape((b, t, n), jnp.float32),
            shared.of_rows,
        ),
    )
    of_keys = shared.of_keys
    d_key, d_value, of_keys = call(
        "pasa_gpu_dkv",
        _key_kernel,
        (-(-s // specs.block_kv), kv_heads, b),
        (
            block(keys, specs.padded_size),
            block(keys, specs.padded_value),
            of_keys.blocks(specs, groups=n // kv_heads),
        ),
        (*(shape(x.shape, x.dtype) for x in (operands.key, operands.value)), of_keys),
        by_key_head=True,
    )
    factors, data = Shared.joined(of_rows, of_keys).operands(operands)
    return Operands(
        query=d_query,
        key=d_key,
        value=d_value,
        bias=None,
        sinks=_of_sinks(operands, inputs, plan),
        scale=jnp.sum(d_scale).astype(operands.scale.dtype),
        factors=factors,
        data=data,
    )


def _inputs(
    o: Operands,
    mask: Mask,
    plan: Plan,
    result: Result,
    d_out: Array,
    d_lse: Array | None,
) -> Inputs:
    """What the forward kernel reads, the row statistics of ``result``, and the cotangents."""
    inputs = inputs_of(o, mask, plan, Specs.of(o, plan))
    valid = mask.row_valid()
    l = result.l if valid is None else jnp.where(valid[..., None], result.l, 0)  # noqa: E741
    out = result.out.astype(jnp.float32) + result.remainder.astype(jnp.float32)
    delta = jnp.sum(d_out.astype(jnp.float32) * out, axis=-1)
    if d_lse is not None:
        delta = delta - d_lse.astype(jnp.float32)
    return inputs._replace(
        largest_key=None,
        value_gain=None,  # the output is divided by it, and so it is by lax
        sinks=None,
        raw_key=None if inputs.key is o.key else o.key,
        d_out=d_out,
        m=result.m,
        l=l,
        delta=jnp.where(l != 0, delta, jnp.zeros_like(delta)),
    )


def _of_sinks(o: Operands, inputs: Inputs, plan: Plan) -> Array | None:
    """[N] the cotangent of the sinks."""
    if o.sinks is None:
        return None
    numerics = plan.numerics(o.key.shape[1])
    weight = tile.sink_weight(o.sinks, inputs.m, inputs.l, numerics, inputs.guard)
    return -jnp.sum(weight * inputs.delta, axis=(0, 1)).astype(o.sinks.dtype)


def _call(
    inputs: Inputs,
    mask: Mask,
    plan: Plan,
    specs: Specs,
    name: str,
    kernel: Any,
    grid: tuple[int, ...],
    out_specs: Any,
    out_shape: Any,
    *,
    by_key_head: bool = False,
) -> Any:
    call = pl.pallas_call(
        partial(kernel, mask=without_arrays(mask), plan=plan, specs=specs),
        grid=grid,
        in_specs=(block_specs(inputs, specs, by_key_head=by_key_head),),
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(
            num_warps=plan.schedule.warps, num_stages=plan.schedule.stages
        ),
        interpret=plan.interpret,
        name=name,
    )
    with jax.enable_x64(False):  # Pallas' compilers have no 64-bit loop counters
        return call(inputs)


def _query_kernel(
    refs: Inputs,
    d_query: Ref,
    d_scale: Ref,
    outs: Shared,
    *,
    mask: Mask,
    plan: Plan,
    specs: Specs,
) -> None:
    walk = BackwardWalk.of(refs, mask, plan, specs)
    start = pl.program_id(0) * specs.block_q
    rows = walk.rows(start)

    def step(j: Index, seen: Array | None, carry: tuple[Array, Shared]) -> tuple[Array, Shared]:
        found, shared = walk.reverse(rows, walk.key(j), start, j, seen, outs)
        return carry[0] + found.q, _sum(carry[1], shared.of_rows)

    carry = (jnp.zeros(rows.q.shape, jnp.float32), walk.zeros(outs))
    d_q, shared = walk.over_keys(start, step, carry)
    column = jnp.sum(d_q * rows.q.astype(jnp.float32), axis=1)
    d_q = (d_q * refs.scale[0]).astype(rows.q.dtype)
    walk.store(d_query, d_q, walk.rows_at(start), walk.along_size)
    walk.store(d_scale, column, walk.rows_at(start))
    walk.store_shared(outs, shared, walk.rows_at(start))


def _key_kernel(
    refs: Inputs,
    d_key: Ref,
    d_value: Ref,
    outs: Shared,
    *,
    mask: Mask,
    plan: Plan,
    specs: Specs,
) -> None:
    j = pl.program_id(0)
    key = BackwardWalk.of(refs, mask, plan, specs).key(j)

    def head(g: Index, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        walk = BackwardWalk.of(of_query_head(refs, g), mask, plan, specs)
        of_head = jax.tree.map(lambda ref: HeadRef(ref, 0, g), outs)

        def step(i: Index, seen: Array | None, carry: Any) -> Any:
            start = i * specs.block_q
            found, shared = walk.reverse(walk.rows(start), key, start, j, seen, outs)
            return carry[0] + found.k, carry[1] + found.v, _sum(carry[2], shared.of_keys)

        d_k, d_v, shared = walk.over_rows(j, step, (*carry, walk.zeros(outs)))
        walk.store_shared(of_head, shared, walk.keys_at(j))
        return d_k, d_v

    groups = refs.query.shape[1]
    carry = (jnp.zeros(key.k.shape, jnp.float32), jnp.zeros(key.v.shape, jnp.float32))
    d_k, d_v = head(0, carry) if groups == 1 else lax.fori_loop(0, groups, head, carry)
    walk = BackwardWalk.of(refs, mask, plan, specs)
    d_k = (d_k * refs.scale[0]).astype(key.k.dtype)
    walk.store(d_key, d_k, walk.keys_at(j), walk.along_size)
    walk.store(d_value, d_v.astype(key.v.dtype), walk.keys_at(j), walk.along_value)


def _sum(total: Shared, part: Shared) -> Shared:
    return jax.tree.map(lambda x, y: x + y, total, part)


class Rows(NamedTuple):
    """What the reverse of a tile needs of its rows."""

    query: tile.QueryTile
    q: Array  # [R, D] as the user gave it
    d_out: Array  # [R, E]
    m: Array  # [R]
    l: Array  # noqa: E741  [R]
    delta: Array  # [R]


class BackwardWalk(PointerWalk):
    """One program of the backward pass."""

    def rows(self, start: Index) -> Rows:
        """The rows at ``start``, zeros where they have no gradient."""
        place = self.rows_at(start)
        m, l, delta = (  # noqa: E741
            self.column(x, *place) for x in (self.refs.m, self.refs.l, self.refs.delta)
        )
        live = (l != 0)[:, None]
        q = self.load(self.refs.query, place, self.along_size)
        d_out = self.load(self.refs.d_out, place, self.along_value)
        return Rows(
            self.query(start),
            tile.zero_unusable(q, live),
            tile.zero_unusable(d_out, live),
            m,
            l,
            delta,
        )

    def reverse(
        self,
        rows: Rows,
        key: tile.KeyTile,
        start: Index,
        j: Index,
        seen: Array | None,
        outs: Shared,
    ) -> tuple[tile.TileGradients, Shared]:
        """What the tile of ``rows`` at ``start`` and key tile j adds to the gradients, and to those
        that heads share, if ``outs`` has some.

        The running maximum of its scores is the last one, so that P needs only be divided by l.
        """
        state = self.begin()[0]._replace(m=rows.m)
        s = self.scores(start, rows.query, key, state, j, seen, with_slope=True)
        k = key.k
        if self.refs.raw_key is not None:
            k = self.load(self.refs.raw_key, self.keys_at(j), self.along_size)
        found = tile.gradients(
            s, rows.query, key, rows.q, k, rows.m, rows.l, rows.d_out, rows.delta, self.numerics
        )
        factors = data = None
        if outs.factors is not None:
            factors = self._of_factors(start, j, found.scores)
        if outs.data is not None:
            data = self._of_data(start, j, s, found.scores)
        return found, Shared(factors, data)

    def _of_factors(self, start: Index, j: Index, d_scores: Array) -> Factors:
        """[R, block_q], [R, n] and [block_q] the gradients of a tile's factors."""
        of = self.factors(start, j)
        q, k = known(of.q), known(of.k)
        d_q, d_k = jax.vjp(thin_product, q, k)[1](d_scores.astype(q.dtype))
        return Factors(d_q * of.scale, d_k * of.scale, jnp.sum(d_q * q, axis=0))

    def _of_data(self, start: Index, j: Index, s: tile.Scores, d_scores: Array) -> Data:
        """[block_q], [n] and [block_q] the gradients of the floating leaves of a tile's data."""
        mods, shape = self.mask.mods, (self.block_q, self.block_kv)
        assert mods is not None
        assert s.given is not None
        given, place, data = s.given, self.place(start, j), self.data(start, j)
        query, keys, head = floating(self.numbers(start, j), mods.data)
        rows = tuple(None if x is None else jnp.full((self.block_q,), x) for x in head)

        def scored(leaves: Data) -> Array:
            wide = Data(
                *(
                    tuple(None if x is None else lax.broadcast_in_dim(x, shape, axes) for x in part)
                    for part, axes in zip(leaves, ((0,), (1,), (0,)), strict=True)
                )
            )
            return mods.scored(given, place, wide.beside(data))

        leaves = jax.tree.map(known, Data(query, keys, rows))
        return jax.vjp(scored, leaves)[1](d_scores.astype(given.dtype))[0]

    def zeros(self, outs: Shared) -> Shared:
        """Nothing in what tiles add to ``outs``."""
        rank = self.specs.padded(self.specs.rank, "rank")

        def part(refs: Any, *shape: int) -> Any:
            return jax.tree.map(lambda _: jnp.zeros(shape, jnp.float32), refs)

        factors = data = None
        if outs.factors is not None:
            q, k, scale = outs.factors
            factors = Factors(
                part(q, rank, self.block_q), part(k, rank, self.block_kv), part(scale, self.block_q)
            )
        if outs.data is not None:
            query, key, head = outs.data
            data = Data(
                part(query, self.block_q), part(key, self.block_kv), part(head, self.block_q)
            )
        return Shared(factors, data)

    def store_shared(self, outs: Shared, x: Shared, at: tuple[Index, int, int]) -> None:
        """Writes the gradients of one tile's rows, or keys, which are ``at``."""
        for ref, value in zip(_leaves(outs), jax.tree.leaves(x), strict=True):
            place = (self.along_rank, at) if value.ndim == 2 else (at,)
            self.store(ref, value, *place)


def _leaves(x: Shared) -> list[Any]:
    return jax.tree.leaves(x, is_leaf=lambda y: isinstance(y, HeadRef))
