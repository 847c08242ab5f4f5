"""The backward pass as a Pallas kernel for TPUs (Mosaic).

A program of the grid (batch, key head, key tile) folds the query tiles that see its keys. All rows
of the head lie in VMEM, and so does the gradient of its queries, in float32, until the head's last
key tile is done. Each score is computed once: `Storage.BOUND` computes the weights of a row from
its maximum, which the forward pass has left, as any other reference that is known beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._common import bound, shape_maker, without_arrays
from pallas_kernels._float16 import from_bits
from pallas_kernels._tpu_backward_blocks import Gradients, Inputs, Sizes, inputs_of
from pallas_kernels._tpu_walk import STRAIGHT_SCORES
from pasa_jax.core import tile
from pasa_jax.core.mask import Index, KeyRange, Mask
from pasa_jax.core.operands import Operands, Result
from pasa_jax.core.plan import Plan
from pasa_jax.core.target import MIB
from pasa_jax.core.walk import Walk

if TYPE_CHECKING:
    from pasa_jax.core.shapes import Bool, Float

Array = jax.Array
Ref = Any

_LARGEST = float(jnp.finfo(jnp.float32).max)

# A bias's gradient is written for every batch entry and key head, and then summed over those that
# share the bias. What is written may be so many times as large as the bias, or as the queries. More
# would take the memory that tiles are there to save.
_BIAS_COPIES = 8


def refusal(operands: Operands, mask: Mask, plan: Plan, vmem: int) -> str | None:
    """None, or the reason why the kernel cannot compute a call's gradients.

    Arguments:
      vmem: bytes that a program may use.
    """
    if mask.query_positions is not None or mask.kinds is not None or mask.mods is not None:
        return "it has no gradient beside positions, block masks and functions"
    if operands.factors is not None:
        return "it has no gradient of a bias of low rank"
    sizes, bias = Sizes.of(operands, mask, plan), operands.bias
    if bias is not None:
        copies = sizes.bias_copies(operands)
        if copies * bias.size > _BIAS_COPIES * max(bias.size, operands.query.size):
            return f"the gradient of the bias, which heads share, would be written {copies} times"
    wanted = sizes.bytes
    if wanted > vmem:
        return f"a head's rows and their gradients want {wanted} bytes of VMEM's {vmem}"
    return None


def adapt(plan: Plan, sizes: Sizes) -> Plan:
    """The plan of the kernel: scores less their row's maximum, in float32, in its own tiles."""
    schedule = replace(plan.schedule, block_q=sizes.block_q, block_kv=sizes.block_kv)
    return replace(
        plan,
        shift="bound",
        precision=replace(plan.precision, probabilities="float32"),
        schedule=replace(schedule, unroll=sizes.query_tiles),
        dialect=tile.Dialect(base_two=True, exponential=None, contracts=False),
    )


def gradients(
    operands: Operands,
    mask: Mask,
    plan: Plan,
    result: Result,
    d_out: Float[Array, "B T N E"],
    d_lse: Float[Array, "B T N"] | None,
    vmem: int,
) -> Operands:
    """The kernel's own gradients.

    Arguments:
      vmem: bytes that a program may use.
    """
    sizes = Sizes.of(operands, mask, plan)
    inputs = inputs_of(operands, mask, result, d_out, d_lse)
    if not plan.interpret:
        inputs = _in_hbm(inputs)
    outs = Gradients.of(inputs, sizes, shape_maker(operands, mask))
    call = pl.pallas_call(
        partial(_kernel, mask=without_arrays(mask), plan=adapt(plan, sizes), sizes=sizes),
        grid=(len(operands.query), sizes.heads, sizes.key_tiles),
        in_specs=(sizes.of_inputs(inputs),),
        out_specs=sizes.of_gradients(inputs, outs),
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
        found = call(inputs)
    cotangents = found.operands(operands)
    if operands.sinks is None:
        return cotangents
    return cotangents._replace(sinks=_of_sinks(operands, mask, plan, result, d_out, d_lse))


def _of_sinks(
    operands: Operands,
    mask: Mask,
    plan: Plan,
    result: Result,
    d_out: Float[Array, "B T N E"],
    d_lse: Float[Array, "B T N"] | None,
) -> Float[Array, " N"]:
    """The sinks' gradient, which needs no scores."""
    assert operands.sinks is not None
    d_o, out, rest = (x.astype(jnp.float32) for x in (d_out, result.out, result.remainder))
    delta = jnp.sum(d_o * (out + rest), axis=-1)
    delta = delta if d_lse is None else delta - d_lse
    numerics = plan.numerics(mask.key_length)
    weight = tile.sink_weight(operands.sinks, result.m, result.l, numerics, None)
    used = mask.row_valid()
    used = result.l != 0 if used is None else (result.l != 0) & used[..., None]
    total = jnp.sum(jnp.where(used, -weight * delta, 0), axis=(0, 1))
    return total.astype(operands.sinks.dtype)


def _in_hbm(x: Inputs) -> Inputs:
    """The large arrays, where the compiler may not move them: what it would put into spare VMEM is
    read from there no faster.
    """

    def fixed(x: Array) -> Array:
        return pltpu.with_memory_space_constraint(x, pltpu.HBM) if x.ndim >= 3 else x

    return jax.tree.map(fixed, x)


class _Columns(NamedTuple):
    """What the head's first program finds out about each row, [R, 1] each."""

    m: Array  # the maximum; the largest number for a row that sees nothing, whose weights are 0
    share: Array  # 1/l
    delta: Array
    total: Array  # Σ dS over the keys, which is known without them

    @staticmethod
    def of(x: Array) -> _Columns:
        """The columns that stand side by side in x [R, 8]."""
        return _Columns(*(x[:, c : c + 1] for c in range(len(_Columns._fields))))


def _put_column(x: Array, c: int, column: Array) -> Array:
    """x [R, 8] with ``column`` [R, 1] in the place of column c."""
    return jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, 1) == c, column, x)


@dataclass(frozen=True, kw_only=True)
class _BackwardWalk(Walk):
    """One program: the rows are those of the whole head, the keys those of one tile."""

    refs: Inputs
    columns: Ref  # [G, T, 8], see `_Columns`
    kappa: Ref  # [1, D] a mean key, see `begin_head`
    sizes: Sizes
    head: Index

    # Tiles.

    def key_start(self, j: Index) -> Index:
        return j * self.block_kv

    def query_range(self, j: Index) -> KeyRange:
        """Of ints where every key tile has the same."""
        if self.mask.query_lengths is None and self.mask.key_lengths is None:
            ranges = {Walk.query_range(self, c) for c in range(self.sizes.key_tiles)}
            if len(ranges) == 1:
                return ranges.pop()
        return super().query_range(j)

    def static_tiles(self) -> range:
        """The key tiles that get a body of their own, with their query tiles static.

        None do where all share one body because they are seen by the same query tiles, or where so
        many bodies would take too long to compile.
        """
        ranges = [self.query_range(j) for j in range(self.sizes.key_tiles)]
        if not all(isinstance(x, int) for r in ranges for x in r) or len(set(ranges)) == 1:
            return range(0)
        tiles = sum(r.hi - r.lo for r in ranges)
        scores = tiles * self.groups * self.block_q * self.block_kv
        return range(self.sizes.key_tiles if scores <= STRAIGHT_SCORES else 0)

    def rows(self, ref: Ref, start: Index) -> Array:
        """[R, …] of a block [1, 1, G, T, …], or of a scratch [G, T, …]."""
        lead = (0, 0) if len(ref.shape) == 5 else ()
        x = from_bits(ref[(*lead, slice(None), pl.ds(start, self.block_q))])
        return x.reshape(-1, x.shape[-1])

    @property
    def padded(self) -> bool:
        """Whether some rows are padding."""
        short = self.mask.query_length % self.block_q != 0
        return short or self.mask.query_lengths is not None

    def used(self, x: Array, start: Index) -> Array:
        """Rows x [R, …], zeros where they are padding."""
        return tile.zero_unusable(x, self.in_use(start)) if self.padded else x

    def in_use(self, start: Index) -> Bool[Array, "R 1"]:
        return self.positions(start) < self.mask.valid_queries()

    def seen(self, start: Index, j: Index, asks: Array | None = None) -> Bool[Array, "R n"]:
        seen = super().seen(start, j, asks)
        return seen & self.in_use(start) if self.mask.query_length % self.block_q else seen

    def query(self, start: Index) -> tile.QueryTile:
        q = self.used(self.rows(self.refs.query, start), start)
        scale = self.refs.scale[0].astype(self.numerics.product)
        return tile.query_tile(q, scale, None, self.numerics)

    def key(self, j: Index, value_gain: Array | None = None) -> tile.KeyTile:
        assert value_gain is None
        k, v = (from_bits(x[0, 0]) for x in (self.refs.key, self.refs.value))
        usable = None
        if self.mask.key_length % self.block_kv:
            row = self.key_start(j) + lax.broadcasted_iota(jnp.int32, (self.block_kv, 1), 0)
            usable = row < self.mask.key_length
        if self.hides_keys():
            finite = _finite(k) & _finite(v)
            usable = finite if usable is None else usable & finite
        return tile.key_tile(k, v, usable, self.numerics)

    def hides_keys(self) -> bool:
        """Whether there may be a key that no row sees.

        If it is not finite, it must not reach the sums. If a key that a row sees is not finite, nor
        is the forward pass's result, and the lax walk computes both passes.
        """
        mask = self.mask
        if mask.data_dependent or mask.query_lengths is not None or mask.key_lengths is not None:
            return True
        ends = (mask.query_range(c, c + 1, 1) for c in (0, mask.key_length - 1))
        return any(r.lo >= r.hi for r in ends)  # what rows see, all together, has no gaps

    def centred(self, key: tile.KeyTile) -> Float[Array, "n D"]:
        """The keys without κ, unusable ones zeroed."""
        k = (key.k.astype(jnp.float32) - self.kappa[...]).astype(key.k.dtype)
        return k if key.usable is None else tile.zero_unusable(k, key.usable.reshape(-1, 1))

    def bias(self, start: Index, j: Index) -> Array | None:
        return None if self.refs.bias is None else self._tile_of(self.refs.bias, start)

    def array(self, start: Index, j: Index, asks: Array | None = None) -> Array | None:
        seen = None
        shape = (self.groups, self.block_q, self.block_kv)
        if self.refs.query_segments is not None:
            q = self.refs.query_segments[0, pl.ds(start, self.block_q)]
            seen = jnp.broadcast_to((q == self.refs.key_segments[0])[None], shape)
            seen = seen.reshape(-1, self.block_kv)
        if self.refs.array is not None:
            array = self._tile_of(self.refs.array, start).astype(jnp.int32) != 0
            seen = array if seen is None else seen & array
        return seen

    def sinks(self) -> None:
        """They are in l."""

    def _tile_of(self, ref: Ref, start: Index) -> Array:
        """[R, n] of a block [1, 1, G|1, T|1, n|1]."""
        x = ref[0, 0, :, pl.ds(start, self.block_q)] if ref.shape[3] > 1 else ref[0, 0]
        x = jnp.broadcast_to(x, (self.groups, self.block_q, self.block_kv))
        return x.reshape(-1, self.block_kv)

    # One head.

    def begin_head(self, d_query: Ref, outs: Gradients) -> None:
        """Nothing in the queries' gradient [G, T, D], the columns of all rows, and κ.

        Σ_j dS_ij·k_j = Σ_j dS_ij·(k_j − κ) + κ·Σ_j dS_ij for any κ, and the last sum is known. So
        a mean that all keys share does not multiply the rounding of dS.
        """
        d_query[...] = jnp.zeros_like(d_query)
        if outs.bias is not None and self.sums_keys(outs.bias):
            outs.bias[...] = jnp.zeros_like(outs.bias)
        self.kappa[...] = self._mean_key()
        for g in range(self.groups):
            statistics = self._statistics(g)
            for i in range(self.sizes.query_tiles):
                start = i * self.block_q
                at = slice(start, start + self.block_q)
                d_o, out, rest = (
                    from_bits(x[0, 0, g, at]).astype(jnp.float32)
                    for x in (self.refs.d_out, self.refs.out, self.refs.remainder)
                )
                found = statistics[at]
                delta = jnp.sum(d_o * (out + rest), axis=1, keepdims=True)
                if self.refs.d_lse is not None:
                    delta = delta - found[:, 2:3]
                if self.padded:
                    used = self.positions(start)[: self.block_q] < self.mask.valid_queries()
                    delta = tile.zero_unusable(delta, used)
                if self.adds_mean:
                    total = found[:, 2:3] + found[:, 3:4] * delta
                    found = _put_column(found, 3, total)
                self.columns[g, at] = _put_column(found, 2, delta)

    @property
    def adds_mean(self) -> bool:
        """Whether Σ dS may be other than 0."""
        return self.refs.d_lse is not None or self.refs.sinks is not None

    def _mean_key(self) -> Float[Array, "1 D"]:
        """The mean of the first keys; 0 under a soft cap, whose slopes make Σ dS unknown."""
        k = from_bits(self.refs.first_keys[0, 0])
        row = lax.broadcasted_iota(jnp.int32, (len(k), 1), 0)
        length = self.mask.key_lengths
        usable = _finite(k) & (row < (self.mask.key_length if length is None else length))
        if self.numerics.logits_soft_cap is not None:
            return jnp.zeros((1, k.shape[1]), jnp.float32)
        total = jnp.sum(tile.zero_unusable(k.astype(jnp.float32), usable), axis=0, keepdims=True)
        count = jnp.sum(usable.astype(jnp.float32), axis=0, keepdims=True)
        return tile.mean_key(total, count, jnp.dtype(jnp.float32))

    def _statistics(self, g: int) -> Float[Array, "T 8"]:
        """m, 1/l, the log-sum-exp's cotangent and the sink's weight of each row of a query head,
        turned from rows to columns.
        """
        shape = (1, self.sizes.rows)
        m, l = self.refs.m[0, 0, g], self.refs.l[0, 0, g]  # noqa: E741
        position = lax.broadcasted_iota(jnp.int32, shape, 1)
        live = (l != 0) & (m != tile.lowest(m.dtype)) & (position < self.mask.valid_queries())
        m = jnp.where(live, m, jnp.full_like(m, _LARGEST))
        l = jnp.where(live, l, jnp.ones_like(l))  # noqa: E741
        rows = [m, 1 / l]
        rows.append(jnp.zeros_like(l) if self.refs.d_lse is None else self.refs.d_lse[0, 0, g])
        if self.refs.sinks is not None:
            sink = jnp.full_like(m, self.refs.sinks[self.head * self.groups + g])
            rows.append(tile.sink_weight(sink, m, l, self.numerics, None))
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
        added = _Columns.of(self.rows(self.columns, start)).total * self.kappa[...]
        d_query[at] += added.reshape(self.groups, self.block_q, -1)
        q = self.used(self.rows(self.refs.query, start), start).astype(jnp.float32)
        outs.scale[0, 0, 0] += jnp.sum(added * q, axis=0, keepdims=True)

    # One key tile.

    def key_tile(self, j: Index, d_query: Ref, outs: Gradients) -> None:
        key, nothing = self.key(j), self.begin()[0]
        k = self.centred(key)
        wide = self.numerics.product
        if outs.bias is not None:
            self.clear_bias(j, outs.bias)

        def step(i: Index, seen: Array | None, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            start = i * self.block_q
            row = _Columns.of(self.rows(self.columns, start))
            query = self.query(start)._replace(reference=row.m)
            s = self.scores(start, query, key, nothing, j, seen, with_slope=True)
            p = tile.probabilities(s, query, self.numerics).astype(wide) * row.share
            d_o = self.used(self.rows(self.refs.d_out, start), start)
            g = tile.reverse(p, s, key, query.q, k, d_o, row.delta, self.numerics)
            at = (slice(None), pl.ds(start, self.block_q))
            d_query[at] += g.q.reshape(self.groups, self.block_q, -1)
            if outs.bias is not None:
                self.add_to_bias(outs.bias, start, g.scores)
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


def _kernel(refs: Inputs, *rest: Ref, mask: Mask, plan: Plan, sizes: Sizes) -> None:
    b, h, program = (pl.program_id(axis) for axis in range(3))
    j = sizes.last_first(program)
    *out_refs, d_query, columns, kappa = rest
    outs = Gradients(*out_refs)
    mask = bound(mask, refs.query_lengths, refs.key_lengths, b)
    walk = _BackwardWalk(
        mask=mask,
        plan=plan,
        numerics=plan.numerics(mask.key_length),
        groups=sizes.groups,
        block_q=sizes.block_q,
        value_size=refs.value.shape[-1],
        refs=refs,
        columns=columns,
        kappa=kappa,
        sizes=sizes,
        head=h,
    )
    pl.when(program == 0)(partial(walk.begin_head, d_query, outs))
    static = walk.static_tiles()
    if not static:
        walk.key_tile(j, d_query, outs)
    for c in static:
        pl.when(j == c)(partial(walk.key_tile, c, d_query, outs))
    pl.when(program == sizes.key_tiles - 1)(partial(walk.end_head, d_query, outs))


def _finite(x: Float[Array, "n d"]) -> Bool[Array, "n 1"]:
    """Whether all of a row is finite."""
    return jnp.sum(x.astype(jnp.float32) * 0, axis=1, keepdims=True) == 0
