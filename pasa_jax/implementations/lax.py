"""The lax implementation: walks the tiles of `core.tile` with lax loops, forward and backward.

One key head with its G query heads is one problem of plain 2-D arrays, so that keys and values are
never repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pasa_jax.core import tile
from pasa_jax.core.mask import Index, Mask, div, minimum, pick, slice_tile
from pasa_jax.core.operands import Keep, Operands, Result, heads_of
from pasa_jax.core.prepare import HeadFacts, Known, Plan, prepare, prepare_known
from pasa_jax.core.walk import Walk

Array = jax.Array


def supports(operands: Operands, mask: Mask, plan: Plan) -> str | None:
    """None: every call is supported, on every device."""
    del operands, mask, plan
    return None


def forward(
    operands: Operands, mask: Mask, plan: Plan, known: Known | None = None, *, keep: Keep
) -> Result:
    """Attention of all heads."""
    found, _ = over_heads(
        operands, mask, plan, lambda walk, b, h: (_forward_head(walk), None), known
    )
    return found.only(keep)


def backward(
    operands: Operands,
    mask: Mask,
    plan: Plan,
    result: Result,
    d_out: Array,
    d_lse: Array | None,
) -> Operands:
    """Cotangents of the operands, tile by tile from the row statistics in ``result``.

    Arguments:
      d_out: [B, T, N, E] cotangent of the output.
      d_lse: [B, T, N] cotangent of the log-sum-exp, or None.
    """
    groups = operands.query.shape[2] // operands.key.shape[2]

    def program(walk: HeadWalk, b: Index, h: Index) -> tuple[Any, Array | None]:
        def of_head(x: Array) -> Array:
            return heads_of(x, b, h, groups)

        residuals = Result(*map(of_head, result))
        return _backward_head(
            walk, residuals, of_head(d_out), None if d_lse is None else of_head(d_lse)
        )

    (d_q, d_k, d_v, d_scale, d_sinks), d_bias = over_heads(operands, mask, plan, program)
    if operands.bias is not None and d_bias is not None:
        d_bias = d_bias.astype(operands.bias.dtype)
    return Operands(
        query=d_q,
        key=d_k,
        value=d_v,
        bias=d_bias,
        sinks=None if operands.sinks is None else _sum_to(d_sinks, 2, operands.sinks),
        scale=jnp.sum(d_scale).astype(operands.scale.dtype),
    )


def _sum_to(x: Array, axis: int, like: Array) -> Array:
    return jnp.sum(x, axis=tuple(a for a in range(x.ndim) if a != axis)).astype(like.dtype)


# All heads.


def over_heads(
    operands: Operands,
    mask: Mask,
    plan: Plan,
    program: Callable[[HeadWalk, Index, Index], tuple[Any, Array | None]],
    known: Known | None = None,
) -> tuple[Any, Array | None]:
    """Runs ``program`` for every key head, one after another or all at once.

    Arguments:
      program: (walk, b, h) -> (arrays [L, g, …], an addend to the bias's gradient or None).
      known: what a cache has kept of keys and values, [B, K, …], or None.

    Returns:
      The arrays as [B, L, K·g, …] and the bias's gradient.
    """
    batch, keys, kv_heads, _ = operands.key.shape
    groups = operands.query.shape[2] // kv_heads
    # Slices of tiles larger than the problem, which a kernel would mask, do not exist.
    plan = replace(plan, schedule=plan.schedule.fitted(plan.schedule.block_q, keys))

    def one(b: Index, h: Index) -> tuple[Any, Array | None]:
        of_head = None if known is None else jax.tree.map(lambda x: pick(pick(x, b), h), known)
        walk = HeadWalk.of(operands.head(b, h), mask.head(b, h, groups), plan, of_head)
        return program(walk, b, h)

    if plan.schedule.batch_heads:
        placed, d_bias = heads_at_once(one, batch, kv_heads)
        placed = jax.tree.map(
            lambda x: jnp.moveaxis(x, 1, 2).reshape(batch, x.shape[2], -1, *x.shape[4:]), placed
        )
        return placed, None if d_bias is None else _fold_bias(d_bias, operands.bias)

    def body(t: Array, buffers: tuple[Any, Array | None]) -> tuple[Any, Array | None]:
        b, h = t.astype(jnp.int32) // kv_heads, t.astype(jnp.int32) % kv_heads
        placed, d_bias = one(b, h)

        def put(buffer: Array, x: Array) -> Array:
            at = _place(b, 0, h * x.shape[1], *[0] * (x.ndim - 2))
            return lax.dynamic_update_slice(buffer, x[None], at)

        total = buffers[1]
        if total is not None and d_bias is not None:
            at = (b if len(total) > 1 else 0, h * groups if total.shape[1] > 1 else 0, 0, 0)
            total = _add_at(total, d_bias[None], at)
        return jax.tree.map(put, buffers[0], placed), total

    shapes, bias_shape = jax.eval_shape(one, jnp.int32(0), jnp.int32(0))
    buffers = jax.tree.map(
        lambda x: jnp.zeros((batch, x.shape[0], kv_heads * x.shape[1], *x.shape[2:]), x.dtype),
        shapes,
    )
    d_bias = None
    if bias_shape is not None and operands.bias is not None:
        d_bias = jnp.zeros(operands.bias.shape, bias_shape.dtype)
    return lax.fori_loop(0, batch * kv_heads, body, varying((buffers, d_bias), (operands, mask)))


def heads_at_once(one: Callable[[Array, Array], Any], batch: int, kv_heads: int) -> Any:
    """``one(b, h)`` of every key head, stacked [B, K, …]."""
    index = (jnp.arange(batch, dtype=jnp.int32), jnp.arange(kv_heads, dtype=jnp.int32))
    return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(*index)


def _fold_bias(d_bias: Array, bias: Array | None) -> Array:
    """[B, K, G|1, T|1, S|1] -> the bias's own shape, summed where it is broadcast."""
    assert bias is not None
    full = d_bias.reshape(d_bias.shape[0], -1, *d_bias.shape[3:])
    axes = tuple(a for a in (0, 1) if bias.shape[a] == 1)
    return jnp.sum(full, axis=axes, keepdims=True)


def _place(*index: Index) -> tuple[Array, ...]:
    """Indices of one type, as x64 does not make them of itself."""
    return tuple(jnp.asarray(i, jnp.int32) for i in index)


def _add_at(buffer: Array, x: Array, at: tuple[Index, ...]) -> Array:
    place = _place(*at)
    old = lax.dynamic_slice(buffer, place, x.shape)
    return lax.dynamic_update_slice(buffer, old + x, place)


def varying(carry: Any, sources: Any) -> Any:
    """``carry`` typed as varying over the manual mesh axes of ``sources``.

    Inside `shard_map` a loop's first carry must have the type of its last.
    """
    axes: set[Any] = set()
    for x in jax.tree.leaves(sources):
        axes |= jax.typeof(x).manual_axis_type.varying
    if not axes:
        return carry

    def cast(x: Array) -> Array:
        missing = tuple(axes - jax.typeof(x).manual_axis_type.varying)
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, carry)


# One head.


@dataclass(frozen=True, kw_only=True)
class HeadWalk(Walk):
    """One key head in memory: its tiles are slices of the arrays.

    An odd length moves the last tile back, and the mask hides what it then holds twice.
    """

    head: Operands
    facts: HeadFacts

    @staticmethod
    def of(head: Operands, mask: Mask, plan: Plan, known: Known | None = None) -> HeadWalk:
        length, groups = head.query.shape[:2]
        block_q = max(1, min(plan.schedule.block_q // groups, length))
        if known is None:
            facts = prepare(head.query, head.key, head.value, head.scale, mask, plan, block_q)
        else:
            facts = prepare_known(head.query, head.key, known, head.scale, mask, plan, block_q)
        return HeadWalk(
            mask=mask,
            plan=plan,
            numerics=plan.numerics(len(head.key)),
            groups=groups,
            block_q=block_q,
            value_size=head.value.shape[1],
            head=head,
            facts=facts,
        )

    @property
    def query_tiles(self) -> int:
        return -(-len(self.head.query) // self.block_q)

    def over_queries(self, body: Callable[[Array, Any], Any], carry: Any) -> Any:
        """Folds ``body(i, carry)`` over the query tiles."""
        return lax.fori_loop(0, self.query_tiles, body, self.typed(carry))

    def typed(self, carry: Any) -> Any:
        return varying(carry, (self.head, self.mask))

    # Rows of one query tile, [T, G, …] <-> [G·block_q, …].

    def rows(self, x: Array, start: Index) -> Array:
        x = lax.dynamic_slice_in_dim(x, start, self.block_q)
        x = jnp.moveaxis(x, 1, 0).reshape(self.groups * self.block_q, *x.shape[2:])
        return x if x.ndim > 1 else x[:, None]

    def put_rows(self, buffer: Array, x: Array, start: Index, which: Array | None) -> Array:
        """``buffer`` with the rows of x [R, …] that ``which`` [R, 1] names (None: all)."""
        if which is not None:
            x = jnp.where(which, x, self.rows(buffer, start))
        x = x.reshape(self.groups, self.block_q, *buffer.shape[2:])
        return lax.dynamic_update_slice_in_dim(buffer, jnp.moveaxis(x, 0, 1), start, axis=0)

    def new(self, start: Index, i: Array) -> Array | None:
        """[R, 1] bool: the rows that no earlier tile has done; None: all of them."""
        if len(self.head.query) % self.block_q == 0:
            return None
        return self.positions(start) >= i.astype(jnp.int32) * self.block_q

    def fresh(self, start: Index, i: Array) -> Array:
        """[R, 1] bool: the rows in use that no earlier tile has done."""
        new, used = self.new(start, i), self.in_use(start)
        return used if new is None else used & new

    # Tiles.

    def query_start(self, i: Array) -> Index:
        return minimum(i.astype(jnp.int32) * self.block_q, len(self.head.query) - self.block_q)

    def key_start(self, j: Index) -> Index:
        return minimum(j * self.block_kv, len(self.head.key) - self.block_kv)

    def query(self, start: Index) -> tile.QueryTile:
        guard = self.facts.guard
        if guard is not None:
            guard = tile.Guard(*(self.rows(x, start) for x in guard))
        q = self.rows(self.head.query, start)
        if self.mask.query_lengths is not None:
            q = tile.zero_unusable(q, self.in_use(start))
        query = tile.query_tile(q, self.plan.gain(self.head.scale), guard, self.numerics)
        if self.facts.value_gain is None:
            return query
        i = div(start + self.block_q - 1, self.block_q)
        return query._replace(value_gain=pick(self.facts.value_gain, i))

    def raw_keys(self, j: Index) -> tuple[Array, Array, Array]:
        """Keys, values and which of them are usable [n, 1], of key tile j."""
        at, n = self.key_start(j), self.block_kv
        k, v, usable = (
            lax.dynamic_slice_in_dim(x, at, n)
            for x in (self.head.key, self.head.value, self.facts.usable)
        )
        return k, v, usable[:, None]

    def key(self, j: Index, value_gain: Array | None = None) -> tile.KeyTile:
        k, v, usable = self.raw_keys(j)
        extra: dict[str, Any] = {}
        if self.facts.kappa is not None:
            extra["kappa"] = lax.dynamic_slice_in_dim(self.facts.kappa, j, 1)
        if self.numerics.shift == "paper":
            blocks = self.plan.paper_blocks(len(self.head.key))
            tail = j == len(self.head.key) // self.block_kv
            extra["matrix"] = jnp.where(tail, blocks.tail_matrix, blocks.matrix).astype(jnp.float16)
            extra["weights"] = jnp.where(tail, blocks.tail_weights, blocks.weights)
        return tile.key_tile(k, v, usable, self.numerics, value_gain=value_gain, **extra)

    def array(self, start: Index, j: Index) -> Array | None:
        at, n = self.key_start(j), self.block_kv
        return self.mask.tile_array(start, self.block_q, at, n, self.groups)

    def bias(self, start: Index, j: Index) -> Array | None:
        if self.head.bias is None:
            return None
        x = slice_tile(self.head.bias, start, self.block_q, self.key_start(j), self.block_kv)
        shape = (self.groups, self.block_q, self.block_kv)
        return jnp.broadcast_to(x, shape).reshape(-1, self.block_kv)

    def sinks(self) -> Array | None:
        if self.head.sinks is None:
            return None
        return jnp.repeat(self.head.sinks, self.block_q)[:, None]


def _forward_head(walk: HeadWalk) -> Result:
    numerics, head = walk.numerics, walk.head
    value_size, out_type = head.value.shape[1], head.value.dtype

    def query_tile(i: Array, result: Result) -> Result:
        start = walk.query_start(i)
        query = walk.query(start)
        state, _ = walk.absorb(start, query, walk.begin())
        found = walk.close(start, query, state)
        rounded, remainder = walk.rounded(found.out, out_type)
        new = Result(
            out=rounded,
            lse=found.lse.astype(result.lse.dtype),
            m=found.m.astype(result.m.dtype),
            l=found.l.astype(result.l.dtype),
            remainder=remainder,
        )
        rows = walk.new(start, i)
        return Result(*(walk.put_rows(a, b, start, rows) for a, b in zip(result, new, strict=True)))

    rows, wide = head.query.shape[:2], numerics.product
    out = jnp.zeros((*rows, value_size), out_type)
    column = jnp.zeros(rows, wide)
    lse = jnp.zeros(rows, tile.wide_type(out_type))
    return walk.over_queries(query_tile, Result(out, lse, column, column, out))


def _backward_head(
    walk: HeadWalk, result: Result, d_out: Array, d_lse: Array | None
) -> tuple[tuple[Array, ...], Array | None]:
    numerics, head = walk.numerics, walk.head
    wide = numerics.product
    hides_rows = walk.mask.query_lengths is not None or len(head.query) % walk.block_q != 0

    def query_tile(i: Array, totals: Any) -> Any:
        start = walk.query_start(i)
        query = walk.query(start)
        m, l = walk.rows(result.m, start), walk.rows(result.l, start)  # noqa: E741
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
        # The maximum of the tiles so far, where the forward pass stored scores relative to it: the
        # same one, or their roundings would be others.
        running = state.m if numerics.lags else None

        def step(j: Index, seen: Array | None, carry: Any) -> Any:
            d_q, d_k, d_v, d_bias, running = carry
            key = walk.key(j)
            if hides_rows:  # a tile that all of them see in full says nothing of padding
                seen = live if seen is None else seen & live
            bias = walk.bias(start, j)
            before = state if running is None else state._replace(m=running)
            s = tile.scores(query, key, before, seen, bias, numerics, with_slope=True)
            if running is not None:
                running = tile.running_maximum(running, s, numerics)
            k, _, usable = walk.raw_keys(j)
            k = tile.zero_unusable(k, usable)
            kept = walk.kept(start, j)
            g = tile.gradients(s, query, key, q, k, m, l, d_o, delta, numerics, kept)
            at = walk.key_start(j)
            if d_bias is not None:
                tiled = g.scores.reshape(walk.groups, walk.block_q, walk.block_kv)
                d_bias = _add_bias(d_bias, tiled, start, at)
            d_k, d_v = _add_at(d_k, g.k, (at, 0)), _add_at(d_v, g.v, (at, 0))
            return d_q + g.q, d_k, d_v, d_bias, running

        d_q, d_k, d_v, d_scale, d_sinks, d_bias = totals
        zero = jnp.zeros(q.shape, wide)
        carry = (zero, d_k, d_v, d_bias, running)
        d_q_tile, d_k, d_v, d_bias, _ = walk.over_keys(start, step, carry)

        def add(buffer: Array, x: Array) -> Array:  # rows done before keep what they have
            return walk.put_rows(buffer, x.astype(buffer.dtype), start, live)

        d_scale = add(d_scale, jnp.sum(d_q_tile * q.astype(wide), axis=1, keepdims=True))
        d_q = add(d_q, d_q_tile * head.scale.astype(wide))
        sinks = walk.sinks()
        if sinks is not None:
            weight = tile.sink_weight(sinks, m, l, numerics, query.guard)
            d_sinks = add(d_sinks, -weight * delta)
        return d_q, d_k, d_v, d_scale, d_sinks, d_bias

    rows = head.query.shape[:2]
    d_bias = None if head.bias is None else jnp.zeros(head.bias.shape, wide)
    totals = (
        jnp.zeros(head.query.shape, head.query.dtype),
        jnp.zeros(head.key.shape, wide),
        jnp.zeros(head.value.shape, wide),
        jnp.zeros(rows, wide),
        jnp.zeros(rows, wide),
        d_bias,
    )
    d_q, d_k, d_v, d_scale, d_sinks, d_bias = walk.over_queries(query_tile, totals)
    d_k = (d_k * head.scale.astype(wide)).astype(head.key.dtype)
    return (d_q, d_k[:, None], d_v.astype(head.value.dtype)[:, None], d_scale, d_sinks), d_bias


def _add_bias(d_bias: Array, d_scores: Array, start: Index, at: Index) -> Array:
    """Adds a tile [G, rows, keys] to the gradient [G|1, T|1, S|1], summed where it broadcasts."""
    axes = tuple(a for a in range(3) if d_bias.shape[a] == 1)
    place = (0, 0 if 1 in axes else start, 0 if 2 in axes else at)
    return _add_at(d_bias, jnp.sum(d_scores, axis=axes, keepdims=True), place)
