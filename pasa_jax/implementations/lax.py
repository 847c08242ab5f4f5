"""The lax implementation: walks the tiles of `core.tile` with lax loops, forward and backward."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pasa_jax.core import tile
from pasa_jax.core.mask import Index, Mask
from pasa_jax.core.mods import Data
from pasa_jax.core.operands import Factors, Operands, Result, Wanted, heads_of
from pasa_jax.core.plan import Plan
from pasa_jax.core.target import find_target
from pasa_jax.implementations.head_walk import HeadWalk, add_at, over_heads

if TYPE_CHECKING:
    from pasa_jax.core.shapes import Float

Array = jax.Array


def adapt(plan: Plan) -> Plan:
    """The plan in the forms that suit XLA's compiler for CPUs, where the schedule is for one."""
    if find_target(plan.schedule.target).kind != "cpu":
        return plan
    return replace(plan, dialect=tile.Dialect(narrow=_narrow, maximum_first=True))


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _narrow(x: Float[Array, "*shape"], dtype: jnp.dtype) -> Float[Array, "*shape"]:
    """x rounded to ``dtype``; from float32 to bfloat16 by its bits, which takes half the time."""
    if x.dtype != jnp.float32 or dtype != jnp.bfloat16:
        return x.astype(dtype)
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    odd = (bits >> 16) & jnp.uint32(1)
    high = ((bits + jnp.uint32(0x7FFF) + odd) >> 16).astype(jnp.uint16)
    nan = jnp.full_like(high, 0x7FC0)
    return lax.bitcast_convert_type(jnp.where(x == x, high, nan), jnp.bfloat16)


@_narrow.defjvp
def _narrow_jvp(
    dtype: jnp.dtype, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    return _narrow(*primals, dtype), tangents[0].astype(dtype)


def supports(operands: Operands, mask: Mask, plan: Plan) -> str | None:
    """None: every call is supported, on every device."""
    del operands, mask, plan
    return None


def forward(operands: Operands, mask: Mask, plan: Plan, *, wanted: Wanted) -> Result:
    """Attention of all heads."""
    result, _ = over_heads(operands, mask, plan, lambda walk, b, h: (_forward_head(walk), None))
    return result.only(wanted)


def backward(
    operands: Operands,
    mask: Mask,
    plan: Plan,
    result: Result,
    d_out: Float[Array, "B T N E"],
    d_lse: Float[Array, "B T N"] | None,
) -> Operands:
    """Cotangents of the operands, tile by tile from the row statistics in ``result``.

    Arguments:
      d_out: [B, T, N, E] cotangent of the output.
      d_lse: [B, T, N] cotangent of the log-sum-exp, or None.
    """
    groups = operands.query.shape[2] // operands.key.shape[2]

    def program(walk: HeadWalk, b: Index, h: Index) -> tuple[Any, _Shared]:
        def of_head(x: Array) -> Array:
            return heads_of(x, b, h, groups)

        residuals = jax.tree.map(of_head, result._replace(by_lax=None))
        return _backward_head(
            walk, residuals, of_head(d_out), None if d_lse is None else of_head(d_lse)
        )

    shared = _Shared(operands.bias, operands.factors, operands.data)
    placed, sums = over_heads(operands, mask, plan, program, sums=shared)
    d_q, d_k, d_v, d_scale, d_sinks = placed
    sums = jax.tree.map(lambda x, like: x.astype(like.dtype), sums, shared)
    return Operands(
        query=d_q,
        key=d_k,
        value=d_v,
        bias=sums.bias,
        sinks=None if operands.sinks is None else _sum_to(d_sinks, 2, operands.sinks),
        scale=jnp.sum(d_scale).astype(operands.scale.dtype),
        factors=sums.factors,
        data=sums.data,
    )


class _Shared(NamedTuple):
    """What heads may share, or its gradient."""

    bias: Array | None
    factors: Factors | None
    data: Data


def _sum_to(x: Array, axis: int, like: Array) -> Array:
    return jnp.sum(x, axis=tuple(a for a in range(x.ndim) if a != axis)).astype(like.dtype)


def _forward_head(walk: HeadWalk) -> Result:
    numerics, head = walk.numerics, walk.head
    value_size, out_type = head.value.shape[1], walk.plan.output(head.value.dtype)

    def query_tile(i: Array, result: Result) -> Result:
        start = walk.query_start(i)
        rows = walk.finished(start)
        out, remainder = walk.rounded(rows.out, out_type)
        new = Result(
            out=out,
            lse=rows.lse.astype(result.lse.dtype),
            m=rows.m.astype(result.m.dtype),
            l=rows.l.astype(result.l.dtype),
            remainder=remainder,
        )
        which = walk.new(start, i)
        return jax.tree.map(lambda old, x: walk.put_rows(old, x, start, which), result, new)

    rows, wide = head.query.shape[:2], numerics.product
    out = jnp.zeros((*rows, value_size), out_type)
    column = jnp.zeros(rows, wide)
    lse = jnp.zeros(rows, tile.wide_type(out_type))
    return walk.over_queries(query_tile, Result(out, lse, column, column, out))


def _backward_head(
    walk: HeadWalk,
    result: Result,
    d_out: Float[Array, "T G E"],
    d_lse: Float[Array, "T G"] | None,
) -> tuple[tuple[Array, ...], _Shared]:
    numerics, head = walk.numerics, walk.head
    wide = numerics.product
    hides_rows = walk.mask.query_lengths is not None or len(head.query) % walk.block_q != 0

    def query_tile(i: Array, totals: Any) -> Any:
        start = walk.query_start(i)
        query = walk.query(start)
        m, l = walk.rows(result.m, start), walk.rows(result.l, start)  # noqa: E741
        if result.whole is not None:
            whole = walk.rows(result.whole, start).astype(wide) * wide.type(numerics.unit)
            m = tile.divided(whole, query.guard)
        live = walk.fresh(start, i) & (l != 0)  # rows that saw nothing have no gradient either
        q, d_o, out, rest = (
            tile.zero_unusable(walk.rows(x, start), live)
            for x in (head.query, d_out, result.out, result.remainder)
        )
        d_o = d_o.astype(wide)
        delta = jnp.sum(d_o * (out.astype(wide) + rest.astype(wide)), axis=1, keepdims=True)
        if d_lse is not None:
            delta = delta - tile.zero_unusable(walk.rows(d_lse, start).astype(wide), live)

        state, _ = walk.begin()
        # The forward pass stored `LAGGING` scores minus the running maximum. The backward pass
        # follows the same maximum, so that it rounds the same scores.
        running = state.m if numerics.storage is tile.Storage.LAGGING else None

        def step(j: Index, seen: Array | None, carry: Any) -> Any:
            d_q, d_k, d_v, shared, running = carry
            key = walk.key(j)
            if hides_rows:  # the mask of a tile that is seen in full does not hide padding
                seen = live if seen is None else seen & live
            before = state if running is None else state._replace(m=running)
            s = walk.scores(start, query, key, before, j, seen, with_slope=True)
            if running is not None:
                running = tile.running_maximum(running, s, numerics)
            k, _, usable = walk.raw_keys(j)
            k = tile.zero_unusable(k, usable)
            kept = walk.kept(start, j)
            g = tile.gradients(s, query, key, q, k, m, l, d_o, delta, numerics, kept)
            at = walk.key_start(j)
            shared = _add_shared(walk, shared, start, j, s, g.scores)
            d_k, d_v = add_at(d_k, g.k, (at, 0)), add_at(d_v, g.v, (at, 0))
            return d_q + g.q, d_k, d_v, shared, running

        d_q, d_k, d_v, d_scale, d_sinks, shared = totals
        zero = jnp.zeros(q.shape, wide)
        carry = (zero, d_k, d_v, shared, running)
        d_q_tile, d_k, d_v, shared, _ = walk.over_keys(start, step, carry)

        def add(buffer: Array, x: Array) -> Array:  # rows of an earlier tile stay as they are
            return walk.put_rows(buffer, x.astype(buffer.dtype), start, live)

        d_scale = add(d_scale, jnp.sum(d_q_tile * q.astype(wide), axis=1, keepdims=True))
        d_q = add(d_q, d_q_tile * head.scale.astype(wide))
        sinks = walk.sinks()
        if sinks is not None:
            weight = tile.sink_weight(sinks, m, l, numerics, query.guard)
            d_sinks = add(d_sinks, -weight * delta)
        return d_q, d_k, d_v, d_scale, d_sinks, shared

    rows = head.query.shape[:2]
    shared = _Shared(head.bias, head.factors, head.data)
    shared = jax.tree.map(lambda x: jnp.zeros(x.shape, wide), shared)
    totals = (
        jnp.zeros(head.query.shape, head.query.dtype),
        jnp.zeros(head.key.shape, wide),
        jnp.zeros(head.value.shape, wide),
        jnp.zeros(rows, wide),
        jnp.zeros(rows, wide),
        shared,
    )
    d_q, d_k, d_v, d_scale, d_sinks, shared = walk.over_queries(query_tile, totals)
    d_k = (d_k * head.scale.astype(wide)).astype(head.key.dtype)
    return (d_q, d_k[:, None], d_v.astype(head.value.dtype)[:, None], d_scale, d_sinks), shared


def _add_shared(
    walk: HeadWalk,
    total: _Shared,
    start: Index,
    j: Index,
    s: tile.Scores,
    d_scores: Float[Array, "R n"],
) -> _Shared:
    """The gradients of what heads share, with a tile's part added.

    Arguments:
      d_scores: [R, n] cotangent of the scores after soft cap, function and bias.
    """
    head, at = walk.head, walk.key_start(j)
    if total.bias is not None:
        tiled = d_scores.reshape(walk.groups, walk.block_q, walk.block_kv)
        total = total._replace(bias=_add_bias(total.bias, tiled, start, at))
    if total.factors is not None and head.factors is not None:
        tiled = walk.factors(start, j, head.factors)
        # Those that are hidden may be anything; those that are seen and not finite have made d NaN.
        tiled = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x)), tiled)
        (d,) = jax.vjp(walk.product_of, tiled)[1](d_scores.astype(tiled.scale.dtype))
        old, d_q, d_k = total.factors, jnp.stack(d.q, axis=1), jnp.stack(d.k, axis=1)
        factors = Factors(
            q=add_at(old.q, d_q.astype(old.q.dtype), (0, 0, start)),
            k=add_at(old.k, d_k.astype(old.k.dtype), (0, 0, at)),
            scale=old.scale + d.scale.astype(old.scale.dtype),
        )
        total = total._replace(factors=factors)
    if jax.tree.leaves(total.data) and s.given is not None:
        score, given = partial(walk.scored, start, j), s.given
        (d_data,) = jax.vjp(lambda data: score(data, given), head.data)[1](
            d_scores.astype(given.dtype)
        )
        data = jax.tree.map(lambda x, d: x + d.astype(x.dtype), total.data, d_data)
        total = total._replace(data=data)
    return total


def _add_bias(
    d_bias: Float[Array, "#G #T #S"], d_scores: Float[Array, "G rows keys"], start: Index, at: Index
) -> Float[Array, "#G #T #S"]:
    """The bias's gradient [G|1, T|1, S|1] with a tile [G, rows, keys] added.

    The tile is summed over the axes along which the bias is broadcast.
    """
    axes = tuple(a for a in range(3) if d_bias.shape[a] == 1)
    place = (0, 0 if 1 in axes else start, 0 if 2 in axes else at)
    return add_at(d_bias, jnp.sum(d_scores, axis=axes, keepdims=True), place)
