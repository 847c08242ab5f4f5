"""The forward pass as a Pallas kernel for TPUs (Mosaic).

A program of the grid (batch, key head, query tile) folds the key tiles of its head, which lie in
VMEM whole, with the tile functions and the walk of `pasa_jax`. The guard against overflow and the
care for keys that are not finite are left to the lax walk, which runs again, for the whole call,
where a result of the kernel is not finite or the size of queries and keys says that a product may
have left float32. Ordinary data pays for finding the largest key, and for nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._common import bound, narrowed, repaired, without_arrays
from pallas_kernels._float16 import from_bits, to_bits
from pasa_jax.core import tile
from pasa_jax.core.heads import heads_at_once, varying
from pasa_jax.core.mask import Index, Mask
from pasa_jax.core.operands import Operands, Result, Wanted
from pasa_jax.core.plan import Plan
from pasa_jax.core.prepare import prepare
from pasa_jax.core.target import MIB, find_target
from pasa_jax.core.walk import Walk

Array = jax.Array
Ref = Any

LANES = 128
# What a program may use of VMEM: the rest is XLA's, which keeps arrays of its own there. It is
# asked for no more than the call needs, and some for what the compiler spills.
_VMEM_SHARE = 0.75
# Scores in the tiles that the bodies of one kernel may spell out: they cost compile time.
_STRAIGHT_SCORES = 12 * 1024 * 1024
# Bound on a product that leaves float32 room for a key from which its mean has been taken.
_LARGEST_PRODUCT = 2.0**126


def adapt(plan: Plan) -> Plan:
    """``plan`` in the TPU's dialect.

    Mosaic has no float16, and chips before v6e compute with no bfloat16: unless the caller named
    a precision, scores are then stored in float32. (One that was named is never changed;
    `supports` refuses it.)
    """
    target = find_target(plan.schedule.target)
    precision = plan.precision
    if not plan.explicit_precision and precision.scores not in target.vector_types:
        probabilities = "float32" if precision.scores == "float16" else precision.probabilities
        plan = replace(
            plan, precision=replace(precision, scores="float32", probabilities=probabilities)
        )
    narrow = plan.precision.scores == "bfloat16" and "bfloat16" in target.vector_types
    dialect = tile.Dialect(
        base_two=True,
        exponential="bfloat16" if narrow else None,
        running_maximum=True,
        matrix_columns=target.matrix_columns if plan.precision.probabilities == "bfloat16" else 0,
    )
    return replace(plan, dialect=dialect)


def supports(operands: Operands, mask: Mask, plan: Plan) -> str | None:
    """None, or why the kernel cannot run the call."""
    precision = plan.precision
    stored = (precision.scores, precision.probabilities)
    if mask.dropout is not None:
        return "it has no dropout"
    if str(operands.query.dtype) == "float64":
        return "TPUs have no float64"
    if "float16" in (*stored, precision.statistics, precision.accumulator):
        return "Mosaic has no float16: store scores in bfloat16 or float32"
    if plan.shift == "paper":
        return "the shift 'paper' multiplies float16 matrices, which Mosaic refuses"
    if 0 in operands.query.shape or 0 in operands.key.shape or 0 in operands.value.shape:
        return "there is nothing to compute"
    specs = Specs.of(operands, mask, plan)
    tiled = (mask.array, mask.query_segments, operands.bias)
    if specs.key_tiles > 1 and specs.block_kv % LANES and any(x is not None for x in tiled):
        return f"block_kv must be a multiple of {LANES} beside a bias, an array or segments"
    limit = _vmem(plan)
    if specs.bytes > limit:
        return f"a head's keys and values and a tile want {specs.bytes} bytes of VMEM's {limit}"
    return None


@dataclass(frozen=True)
class Specs:
    """Grid, blocks and memory of one call, derived from its schedule.

    Arguments:
      heads, groups: K and G.
      block_q: positions of a query tile: the whole of T, or a multiple of 128, the lanes in which
        row statistics leave the kernel.
      block_kv, key_tiles: keys of a tile, and how many tiles a head has.
    """

    heads: int
    groups: int
    block_q: int
    block_kv: int
    query_tiles: int
    key_tiles: int
    bytes: int

    @staticmethod
    def of(o: Operands, mask: Mask, plan: Plan) -> Specs:
        (_, length, heads, size), kv_heads = o.query.shape, o.key.shape[2]
        groups, e = heads // kv_heads, o.value.shape[3]
        block_q = -(-max(1, plan.schedule.block_q // groups) // LANES) * LANES
        block_q = length if length <= block_q else block_q
        block_kv = plan.schedule.block_kv
        key_tiles = -(-mask.key_length // block_kv)
        rows, keys = groups * block_q, key_tiles * block_kv
        item = o.query.dtype.itemsize
        wide = [_padded(rows, size) * item, _padded(keys, size) * item, _padded(keys, e) * item]
        wide += [_padded(rows, e) * 4]
        for x in (o.bias, mask.array):
            if x is not None:
                r = rows if x.shape[2] > 1 else groups
                wide.append(_padded(r, keys if x.shape[3] > 1 else 1) * x.dtype.itemsize)
        scores = plan.schedule.unroll * _padded(rows, block_kv) * (4 + 4)
        state = 3 * _padded(rows, e) * 4 + 4 * _padded(rows, 1) * 4
        return Specs(
            kv_heads,
            groups,
            block_q,
            block_kv,
            -(-length // block_q),
            key_tiles,
            2 * sum(wide) + scores + state,  # blocks are double-buffered
        )


def _vmem(plan: Plan) -> int:
    """Bytes of VMEM that a program may use."""
    return int(find_target(plan.schedule.target).memories["VMEM"] * _VMEM_SHARE)


def _padded(rows: int, columns: int) -> int:
    return -(-rows // 8) * 8 * -(-columns // LANES) * LANES


class Inputs(NamedTuple):
    """The kernel's inputs: arrays [B, K, …] outside, refs of one program's blocks inside."""

    query: Any  # [B, K, G, T, D]
    key: Any  # [B, K, S, D]
    value: Any  # [B, K, S, E]
    scale: Any  # [1]
    kappa: Any = None  # [B, K, tiles, 16, D], rows equal
    bias: Any = None  # [B|1, K|1, G|1, T|1, S|1]
    sinks: Any = None  # [N]
    array: Any = None  # [B|1, K|1, G|1, T|1, S|1] int8
    query_segments: Any = None  # [B, T, 1]
    key_segments: Any = None  # [B, 1, S]
    query_lengths: Any = None  # [B]
    key_lengths: Any = None  # [B]


class Outputs(NamedTuple):
    """The kernel's outputs, as far as they are wanted."""

    out: Any  # [B, K, G, T, E], float32 for float16
    flag: Any  # [B, K, query tiles, 1, 128], NaN where something is not finite
    lse: Any = None  # [B, K, G, 1, T]
    m: Any = None
    l: Any = None  # noqa: E741
    remainder: Any = None  # as out; None for float16


def _grouped(x: Array, heads: int) -> Array:
    """[B, T, N, D] -> [B, K, G, T, D]."""
    x = jnp.swapaxes(x, 1, 2)
    return x.reshape(x.shape[0], heads, -1, *x.shape[2:])


def _inputs(o: Operands, mask: Mask, plan: Plan, specs: Specs) -> Inputs:
    def per_head(x: Array | None) -> Array | None:
        if x is None:
            return None
        split = (1, 1) if x.shape[1] == 1 else (specs.heads, specs.groups)
        return x.reshape(x.shape[0], *split, *x.shape[2:])

    return Inputs(
        query=to_bits(_grouped(o.query, specs.heads)),
        key=to_bits(jnp.swapaxes(o.key, 1, 2)),
        value=to_bits(jnp.swapaxes(o.value, 1, 2)),
        scale=o.scale.astype(jnp.float32).reshape(1),
        kappa=_kappa(o, mask, plan, specs) if plan.storage.uses_kappa else None,
        bias=per_head(narrowed(o.bias)),
        sinks=narrowed(o.sinks),
        array=per_head(None if mask.array is None else mask.array.astype(jnp.int8)),
        query_segments=None if mask.query_segments is None else mask.query_segments[..., None],
        key_segments=None if mask.key_segments is None else mask.key_segments[:, None],
        query_lengths=mask.query_lengths,
        key_lengths=mask.key_lengths,
    )


def _kappa(o: Operands, mask: Mask, plan: Plan, specs: Specs) -> Array:
    """κ of every key tile, as often as a matrix unit likes its rows."""
    heads = o.key.shape[2]
    groups = o.query.shape[2] // heads

    def of(b: Array, h: Array) -> Array:
        one = o.head(b, h)
        of_head = mask.head(b, h, groups)
        arrays = (one.query, one.key, one.value, one.scale)
        found = prepare(*arrays, of_head, plan, specs.block_q)
        assert found.kappa is not None
        return found.kappa

    kappa = heads_at_once(of, len(o.key), heads)
    return to_bits(jnp.repeat(kappa[:, :, :, None], 16, axis=3))


def _in_specs(x: Inputs, specs: Specs) -> Inputs:
    keys = specs.key_tiles * specs.block_kv

    def broadcast(x: Array | None) -> pl.BlockSpec | None:
        if x is None:
            return None
        block = (1, 1, x.shape[2])
        block += (specs.block_q if x.shape[3] > 1 else 1, keys if x.shape[4] > 1 else 1)
        several = [int(n > 1) for n in x.shape]
        return pl.BlockSpec(
            block,
            lambda b, h, i: (b * several[0], h * several[1], 0, i * several[3], 0),
        )

    def only(x: Array | None, spec: pl.BlockSpec) -> pl.BlockSpec | None:
        return None if x is None else spec

    scalars = partial(only, spec=pl.BlockSpec(memory_space=pltpu.SMEM))

    return Inputs(
        query=pl.BlockSpec(
            (1, 1, specs.groups, specs.block_q, x.query.shape[-1]), lambda b, h, i: (b, h, 0, i, 0)
        ),
        key=pl.BlockSpec((1, 1, keys, x.key.shape[-1]), lambda b, h, i: (b, h, 0, 0)),
        value=pl.BlockSpec((1, 1, keys, x.value.shape[-1]), lambda b, h, i: (b, h, 0, 0)),
        scale=scalars(x.scale),
        kappa=None
        if x.kappa is None
        else pl.BlockSpec((1, 1, *x.kappa.shape[2:]), lambda b, h, i: (b, h, 0, 0, 0)),
        bias=broadcast(x.bias),
        sinks=scalars(x.sinks),
        array=broadcast(x.array),
        query_segments=only(
            x.query_segments, pl.BlockSpec((1, specs.block_q, 1), lambda b, h, i: (b, i, 0))
        ),
        key_segments=only(x.key_segments, pl.BlockSpec((1, 1, keys), lambda b, h, i: (b, 0, 0))),
        query_lengths=scalars(x.query_lengths),
        key_lengths=scalars(x.key_lengths),
    )


@dataclass(frozen=True, kw_only=True)
class RefWalk(Walk):
    """One program: its tiles are read out of refs. Its last tile is longer than the keys."""

    refs: Inputs
    head: Index
    largest_key: Ref  # [1, D] the largest magnitude in each channel of the keys that `key` gave

    def key_start(self, j: Index) -> Index:
        return j * self.block_kv

    def keys_at(self, j: Index) -> Any:
        """The slice of tile j; a Python one where there is only one tile."""
        whole = self.mask.key_length <= self.block_kv
        return slice(None) if whole else pl.ds(self.key_start(j), self.block_kv)

    def static_starts(self, query_tiles: int) -> list[int] | None:
        """Where each query tile starts, if each is worth a body of its own, in which the tiles to
        visit are known; None where all of them can share one, or there would be too many.
        """
        starts = [i * self.block_q for i in range(query_tiles)]
        ranges = [self.key_range(start) for start in starts]
        if not all(isinstance(x, int) for r in ranges for x in r) or len(set(ranges)) == 1:
            return None
        scores = sum(r.hi - r.lo for r in ranges) * self.groups * self.block_q * self.block_kv
        return starts if scores <= _STRAIGHT_SCORES else None

    def query(self, start: Index) -> tile.QueryTile:
        q = from_bits(self.refs.query[0, 0])
        q = q.reshape(-1, q.shape[-1])
        if self.mask.query_lengths is not None:
            q = tile.zero_unusable(q, self.in_use(start))
        scale = self.refs.scale[0].astype(self.numerics.product)
        return tile.query_tile(q, scale, None, self.numerics)

    def key(self, j: Index, value_gain: Array | None = None) -> tile.KeyTile:
        assert value_gain is None  # the lax walk repairs what would want it
        at = self.keys_at(j)
        k, v = (from_bits(x[0, 0, at]) for x in (self.refs.key, self.refs.value))
        kappa = None if self.refs.kappa is None else from_bits(self.refs.kappa[0, 0, j])
        usable = self._usable(j)
        in_use = k if usable is None else tile.zero_unusable(k, usable)
        self.largest_key[...] = jnp.maximum(self.largest_key[...], self.largest(in_use))
        return tile.key_tile(k, v, usable, self.numerics, kappa=kappa)

    def _usable(self, j: Index) -> Array | None:
        """[n, 1] bool: False beyond the last key; None where no tile reaches beyond it."""
        if self.mask.key_length % self.block_kv == 0:
            return None
        row = self.key_start(j) + lax.broadcasted_iota(jnp.int32, (self.block_kv, 1), 0)
        return row < self.mask.key_length

    def largest(self, x: Array) -> Array:
        """[1, D] the largest magnitude in each channel of x [L, D]."""
        if str(x.dtype) not in find_target(self.plan.schedule.target).vector_types:
            x = x.astype(jnp.float32)
        return jnp.max(jnp.abs(x), axis=0, keepdims=True).astype(jnp.float32)

    def in_range(self, query: tile.QueryTile) -> Array:
        """[1, 1] bool: whether no product with the keys seen so far, shifted or not, and no sum in
        it can have left float32.
        """
        products = self.largest(query.q) * self.largest_key[...]
        bound = jnp.sum(products * jnp.maximum(jnp.abs(query.gain), 1), axis=1, keepdims=True)
        return bound < _LARGEST_PRODUCT

    def bias(self, start: Index, j: Index) -> Array | None:
        return None if self.refs.bias is None else self._tile_of(self.refs.bias, j)

    def array(self, start: Index, j: Index) -> Array | None:
        seen = None
        if self.refs.query_segments is not None:
            q = self.refs.query_segments[0]
            k = self.refs.key_segments[0, :, self.keys_at(j)]
            seen = self._rows(jnp.broadcast_to((q == k)[None], self._shape))
        if self.refs.array is not None:
            array = self._tile_of(self.refs.array, j).astype(jnp.int32) != 0
            seen = array if seen is None else seen & array
        return seen

    def sinks(self) -> Array | None:
        if self.refs.sinks is None:
            return None
        first = self.head * self.groups
        shape = (self.block_q, 1)
        columns = [jnp.full(shape, self.refs.sinks[first + g]) for g in range(self.groups)]
        return jnp.concatenate(columns) if len(columns) > 1 else columns[0]

    @property
    def _shape(self) -> tuple[int, int, int]:
        return self.groups, self.block_q, self.block_kv

    def _tile_of(self, ref: Ref, j: Index) -> Array:
        """[R, n] of a block [1, 1, G|1, block_q|1, S|1]."""
        x = ref[0, 0, :, :, self.keys_at(j)] if ref.shape[-1] > 1 else ref[0, 0]
        return self._rows(jnp.broadcast_to(x, self._shape))

    def _rows(self, x: Array) -> Array:
        return x.reshape(-1, x.shape[-1])


def _kernel(
    refs: Inputs, *rest: Ref, mask: Mask, plan: Plan, specs: Specs, out_type: jnp.dtype
) -> None:
    b, h, i = (pl.program_id(axis) for axis in range(3))
    *out_refs, largest_key = rest
    outs = Outputs(*out_refs)

    mask = bound(mask, refs.query_lengths, refs.key_lengths, b)
    walk = RefWalk(
        mask=mask,
        plan=plan,
        numerics=plan.numerics(mask.key_length),
        groups=specs.groups,
        block_q=specs.block_q,
        value_size=refs.value.shape[-1],
        refs=refs,
        head=h,
        largest_key=largest_key,
    )
    starts = walk.static_starts(specs.query_tiles)
    if starts is None:
        _query_tile(walk, i * specs.block_q, outs, out_type)
    for c, start in enumerate(starts or ()):
        pl.when(i == c)(partial(_query_tile, walk, start, outs, out_type))


def _query_tile(walk: RefWalk, start: Index, outs: Outputs, out_type: jnp.dtype) -> None:
    walk.largest_key[...] = jnp.zeros_like(walk.largest_key)
    query = walk.query(start)
    state, _ = walk.absorb(start, query, walk.begin())
    found = walk.close(start, query, state)
    # 0, or NaN where something in the tile is not finite or a product may have left float32. (Sums
    # carry NaN on; a maximum need not.)
    zero = jnp.sum(jnp.sum(found.out * 0, axis=0, keepdims=True), axis=1, keepdims=True)
    zero = zero + jnp.where(walk.in_range(query), 0.0, jnp.nan)
    outs.flag[0, 0, 0] = jnp.broadcast_to(zero, (1, LANES))

    out, remainder = found.out, found.out
    if out_type != jnp.float16:  # which leaves in float32, and is rounded outside
        out, remainder = walk.rounded(out, out_type)
    for ref, x in ((outs.out, out), (outs.remainder, remainder)):
        if ref is not None:
            ref[0, 0] = x.reshape(walk.groups, walk.block_q, -1)
    for ref, x in ((outs.lse, found.lse), (outs.m, found.m), (outs.l, found.l)):
        if ref is not None:
            ref[0, 0] = x.reshape(walk.groups, 1, walk.block_q)


def forward(operands: Operands, mask: Mask, plan: Plan, *, wanted: Wanted) -> Result:
    """Attention of all heads; the lax walk repairs what the kernel found not to be finite."""
    return repaired(kernel, operands, mask, plan, wanted, "tpu")


def kernel(operands: Operands, mask: Mask, plan: Plan, *, wanted: Wanted) -> tuple[Result, Array]:
    """What the kernel alone gives, and [] bool: whether something in it is not finite."""
    specs = Specs.of(operands, mask, plan)
    inputs = _inputs(operands, mask, plan, specs)
    # Mosaic multiplies and subtracts apart; XLA, which runs the repair and the gradient, may not.
    kernel_plan = replace(plan, dialect=replace(plan.dialect, contracts=False))
    out_type = operands.query.dtype
    half = out_type == jnp.float16
    kernel_type = jnp.dtype(jnp.float32) if half else out_type
    (b, t), e = operands.query.shape[:2], operands.value.shape[-1]
    heads = (b, specs.heads, specs.groups)
    varies = jax.typeof(varying(jnp.zeros(()), (operands, mask))).manual_axis_type

    def shape(*axes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(axes, dtype, manual_axis_type=varies)

    wide = shape(*heads, t, e, dtype=kernel_type)
    column = shape(*heads, 1, t)
    flag = shape(b, specs.heads, specs.query_tiles, 1, LANES)
    wide_block = pl.BlockSpec(
        (1, 1, specs.groups, specs.block_q, e), lambda b, h, i: (b, h, 0, i, 0)
    )
    column_block = pl.BlockSpec(
        (1, 1, specs.groups, 1, specs.block_q), lambda b, h, i: (b, h, 0, 0, i)
    )
    flag_block = pl.BlockSpec((1, 1, 1, 1, LANES), lambda b, h, i: (b, h, i, 0, 0))

    def parts(wide: Any, flag: Any, column: Any) -> Outputs:
        if wanted == "residuals":
            return Outputs(wide, flag, column, column, column, None if half else wide)
        return Outputs(wide, flag, column if wanted == "lse" else None)

    call = pl.pallas_call(
        partial(
            _kernel, mask=without_arrays(mask), plan=kernel_plan, specs=specs, out_type=out_type
        ),
        grid=(b, specs.heads, specs.query_tiles),
        in_specs=(_in_specs(inputs, specs),),
        out_specs=parts(wide_block, flag_block, column_block),
        out_shape=parts(wide, flag, column),
        scratch_shapes=[pltpu.VMEM((1, operands.key.shape[-1]), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel"),
            vmem_limit_bytes=min(_vmem(plan), specs.bytes + specs.bytes // 4 + 8 * MIB),
        ),
        interpret=pltpu.InterpretParams() if plan.interpret else False,
        name="pasa_tpu",
    )
    with jax.enable_x64(False):  # neither compiler takes 64-bit loop counters
        outs = call(inputs)

    def rows(x: Array | None) -> Any:  # [B, K, G, T, E] -> [B, T, N, E]
        return None if x is None else jnp.swapaxes(x.reshape(b, -1, *x.shape[3:]), 1, 2)

    def statistics(x: Array | None) -> Array | None:  # [B, K, G, 1, T] -> [B, T, N]
        return None if x is None else jnp.swapaxes(x.reshape(b, -1, t), 1, 2)

    out, remainder = rows(outs.out), rows(outs.remainder)
    if half:
        out, remainder = tile.rounded(out, out_type, clip=plan.promises_finite)
    found = Result(out, statistics(outs.lse), statistics(outs.m), statistics(outs.l), remainder)
    return found.only(wanted), jnp.any(jnp.isnan(outs.flag))
