"""The forward pass as a Pallas kernel for NVIDIA GPUs, through Triton.

All that is Triton's stands here: JAX has deprecated that path since 0.11 in favour of Mosaic GPU.
A program of the grid (query tile, head, batch) reads its tiles out of the arrays as the user laid
them out, [B, L, N, D], and folds them with the tile functions and the walk of `pasa_jax`.

What a kernel would repeat for every query tile is done once before it: `mean` is taken off the
keys, and with float16 products the guard's powers of two are found. Where the accumulator is
float32 the guard is left to the lax walk, which runs again, for the whole call, where a result of
the kernel is not finite or its scores are so large that rounding could have spoilt them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels._common import bound, narrowed, repaired, without_arrays
from pasa_jax.core import tile
from pasa_jax.core.heads import heads_at_once, varying
from pasa_jax.core.mask import Index, Mask, div
from pasa_jax.core.operands import Operands, Result, Wanted
from pasa_jax.core.plan import Plan
from pasa_jax.core.prepare import HeadFacts, prepare
from pasa_jax.core.walk import Walk

Array = jax.Array
Ref = Any

# Triton contracts product·gain − maximum into one rounding. Up to here that is only more exact;
# beyond, a row's largest score may be far from its own maximum.
_LARGEST_SCORE = 2.0**24
# Bound on a product that leaves float32 room for sums of it.
_LARGEST_PRODUCT = 2.0**126


def adapt(plan: Plan) -> Plan:
    """``plan`` in a GPU's dialect. Scores never leave the registers, so unless the caller names a
    precision they stay in float32, and only the probabilities are rounded, for the product.
    """
    if not plan.explicit_precision and plan.precision.scores in ("float16", "bfloat16"):
        plan = replace(plan, precision=replace(plan.precision, scores="float32"))
    return replace(plan, dialect=tile.Dialect(base_two=True, running_maximum=True))


def _side(n: int) -> int:
    """The side of a tile that holds n: Triton's are powers of two, 16 at least for a product."""
    return max(16, pl.next_power_of_2(n))


def supports(operands: Operands, mask: Mask, plan: Plan) -> str | None:
    """None, or why the kernel cannot run the call."""
    schedule, precision = plan.schedule, plan.precision
    if mask.dropout is not None:
        return "it has no dropout"
    if str(operands.query.dtype) == "float64":
        return "it has no float64: the matrix units of most GPUs do not"
    if 0 in operands.query.shape or 0 in operands.key.shape or 0 in operands.value.shape:
        return "there is nothing to compute"
    if plan.shift == "paper" or "float16" in (precision.statistics, precision.accumulator):
        return "it keeps float32 statistics, and does not mix keys by the matrix of 'paper'"
    if plan.storage is tile.Storage.LAGGING:
        return "'reference' needs a float32 product: use the shift 'mean', or products='float32'"
    for name, length in (("block_q", mask.query_length), ("block_kv", mask.key_length)):
        block = getattr(schedule, name)
        if block < length and block != _side(block):
            return f"schedule.{name} must be a power of two of at least 16, and is {block}"
    return None


def _exp2(x: Array) -> Array:
    """2^x; two at a time where x is float16."""
    if x.dtype != jnp.float16:
        return jnp.exp2(x)
    (found,) = plgpu.elementwise_inline_asm(
        "ex2.approx.f16x2 $0, $1;",
        args=[x],
        constraints="=r,r",
        pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    return found


@dataclass(frozen=True)
class Specs:
    """Grid and block sizes of one call, derived from its schedule.

    Arguments:
      block_q, block_kv: positions and keys of a tile.
      size, value_size: D and E, and `padded_size` and `padded_value` rounded up to powers of two,
        as Triton's tiles must be.
    """

    block_q: int
    block_kv: int
    query_tiles: int
    size: int
    value_size: int
    padded_size: int
    padded_value: int

    @staticmethod
    def of(o: Operands, plan: Plan) -> Specs:
        length = o.query.shape[1]
        block_q = plan.schedule.block_q
        return Specs(
            block_q,
            plan.schedule.block_kv,
            -(-length // block_q),
            size := o.query.shape[-1],
            value_size := o.value.shape[-1],
            _side(size),
            _side(value_size),
        )

    def padded(self, n: int, axis: str) -> int:
        """Length n of an axis, padded to whole tiles; "1" marks one that may be broadcast."""
        tiles = {
            "rows": self.block_q,
            "keys": self.block_kv,
            "size": self.padded_size,
            "value": self.padded_value,
        }
        unit = 1 if n == 1 and axis.endswith("1") else tiles.get(axis.removesuffix("1"), 1)
        return -(-n // unit) * unit


class Inputs(NamedTuple):
    """The kernel's inputs: arrays outside, refs of one program's batch entry and head inside."""

    query: Any  # [B, T, N, D]                                      inside: [T, D]
    key: Any  # [B, S, K, D], shifted                               [S, D]
    value: Any  # [B, S, K, E]                                      [S, E]
    scale: Any  # [1]                                               [1]
    largest_key: Any = None  # [B, K] of the keys as they are       []
    kappa: Any = None  # [B, tiles, K, D]                           [tiles, D]
    value_gain: Any = None  # [B, K, query tiles]                   [query tiles]
    guard: Any = None  # tile.Guard of [B, T, N]                    [T]
    bias: Any = None  # [B|1, N|1, T|1, S|1]                        [T|1, S|1]
    sinks: Any = None  # [N]                                        []
    array: Any = None  # [B|1, N|1, T|1, S|1] int8                  [T|1, S|1]
    query_segments: Any = None  # [B, T]                            [T]
    key_segments: Any = None  # [B, S]                              [S]
    query_lengths: Any = None  # [B]                                []
    key_lengths: Any = None  # [B]                                  []


class Outputs(NamedTuple):
    """The kernel's outputs, as far as they are wanted."""

    out: Any  # [B, T, N, E]                                        inside: [T, E]
    flag: Any  # [B, N, query tiles], 0 where all is well          [query tiles]
    lse: Any = None  # [B, T, N]                                    [T]
    m: Any = None
    l: Any = None  # noqa: E741
    remainder: Any = None  # as out


def _inputs(o: Operands, mask: Mask, plan: Plan, specs: Specs) -> Inputs:
    inputs = Inputs(
        query=o.query,
        key=o.key,
        value=o.value,
        scale=o.scale.astype(jnp.float32).reshape(1),
        bias=narrowed(o.bias),
        sinks=narrowed(o.sinks),
        array=None if mask.array is None else mask.array.astype(jnp.int8),
        query_segments=mask.query_segments,
        key_segments=mask.key_segments,
        query_lengths=mask.query_lengths,
        key_lengths=mask.key_lengths,
    )
    if o.key.dtype != jnp.float16:  # whose products cannot leave float32
        largest = jnp.max(jnp.abs(o.key.astype(jnp.float32)), axis=(1, 3))
        inputs = inputs._replace(largest_key=largest)
    if not plan.storage.uses_kappa and not plan.rounds_products:
        return inputs
    return _prepared(inputs, o, mask, plan, specs)


def _prepared(inputs: Inputs, o: Operands, mask: Mask, plan: Plan, specs: Specs) -> Inputs:
    """``inputs`` with keys shifted, and the guard's powers where products are in float16."""
    heads, n = o.key.shape[2], plan.schedule.block_kv
    groups = o.query.shape[2] // heads

    def of(b: Array, h: Array) -> tuple[Array, HeadFacts]:
        one = o.head(b, h)
        of_head = mask.head(b, h, groups)
        arrays = (one.query, one.key, one.value, one.scale)
        facts = prepare(*arrays, of_head, plan, specs.block_q)
        key = tile.zero_unusable(one.key, facts.usable[:, None])
        if facts.kappa is None:
            return key, facts

        def shifted(k: Array, kappa: Array) -> Array:
            return tile.key_tile(k, k, None, plan.numerics(len(key)), kappa=kappa[None]).k

        tiles = jnp.pad(key, ((0, -len(key) % n), (0, 0))).reshape(-1, n, key.shape[1])
        flat = jax.vmap(shifted)(tiles, facts.kappa).reshape(-1, key.shape[1])
        return flat[: len(key)], facts

    key, facts = heads_at_once(of, len(o.key), heads)

    def rows(x: Array) -> Array:  # [B, K, T, G] -> [B, T, N]
        return jnp.moveaxis(x, 1, 2).reshape(x.shape[0], x.shape[2], -1)

    inputs = inputs._replace(key=jnp.swapaxes(key, 1, 2))
    if facts.kappa is not None:
        inputs = inputs._replace(kappa=jnp.swapaxes(facts.kappa, 1, 2))
    if not plan.rounds_products:
        return inputs
    guard = None if facts.guard is None else tile.Guard(*map(rows, facts.guard))
    return inputs._replace(guard=guard, value_gain=facts.value_gain)


def _specs(x: Inputs, specs: Specs) -> Inputs:
    """Whole arrays of a program's batch entry and head: in Triton a ref is a pointer. They are
    padded to whole tiles, so that any tile may be sliced; loads and stores are masked.
    """
    groups = x.query.shape[2] // x.key.shape[2]

    def at(array: Array | None, *axes: str) -> Any:
        """``axes``: "b" batch, "n" or "k" heads, or one of those that `Specs.padded` knows."""
        if array is None:
            return None
        block = tuple(
            None if axis in "bnk" else specs.padded(n, axis)
            for n, axis in zip(array.shape, axes, strict=True)
        )
        several = [n > 1 for n in array.shape]

        def index(i: Array, n: Array, b: Array) -> tuple[Any, ...]:
            del i
            place = {"b": b, "n": n, "k": lax.div(n, jnp.int32(groups))}
            return tuple(
                place.get(axis, 0) if many else 0 for axis, many in zip(axes, several, strict=True)
            )

        return pl.BlockSpec(block, index)

    tiled = ("b", "n", "rows1", "keys1")
    guard = None if x.guard is None else tile.Guard(*(at(y, "b", "rows", "n") for y in x.guard))
    return Inputs(
        query=at(x.query, "b", "rows", "n", "size"),
        key=at(x.key, "b", "keys", "k", "size"),
        value=at(x.value, "b", "keys", "k", "value"),
        scale=at(x.scale, "one"),
        largest_key=at(x.largest_key, "b", "k"),
        kappa=at(x.kappa, "b", "tiles", "k", "size"),
        value_gain=at(x.value_gain, "b", "k", "tiles"),
        guard=guard,
        bias=at(x.bias, *tiled),
        sinks=at(x.sinks, "n"),
        array=at(x.array, *tiled),
        query_segments=at(x.query_segments, "b", "rows"),
        key_segments=at(x.key_segments, "b", "keys"),
        query_lengths=at(x.query_lengths, "b"),
        key_lengths=at(x.key_lengths, "b"),
    )


@dataclass(frozen=True, kw_only=True)
class PointerWalk(Walk):
    """One program: its tiles are loaded through refs; what lies outside the arrays reads as 0."""

    refs: Inputs
    specs: Specs

    def load(self, ref: Ref, row: tuple[Index, int, int], column: tuple[Index, int, int]) -> Array:
        """A tile of ref [L|1, W|1]; zeros outside the array.

        Arguments:
          row, column: where it starts, how many there are of them, and of the array's.
        """
        slices, shape, inside = [], [], None
        for axis, (at, count, total) in enumerate((row, column)):
            if ref.shape[axis] == 1:
                at, count, total = 0, 1, 1
            slices.append(pl.ds(jnp.int32(at), count))  # of one type, under x64 too
            shape.append(count)
            if total % count:
                along = (count, 1) if axis == 0 else (1, count)
                within = at + lax.broadcasted_iota(jnp.int32, along, axis) < total
                inside = within if inside is None else inside & within
        view = ref.at[tuple(slices)]
        if inside is None:
            return plgpu.load(view)
        return plgpu.load(view, mask=jnp.broadcast_to(inside, shape), other=0)

    def column(self, ref: Ref, start: Index, count: int, total: int) -> Array:
        """[count] of ref [L] at ``start``; zeros outside the array's ``total``."""
        view = ref.at[pl.ds(start, count)]
        if total % count == 0:
            return plgpu.load(view)
        inside = start + lax.broadcasted_iota(jnp.int32, (count,), 0) < total
        return plgpu.load(view, mask=inside, other=0)

    def rows_at(self, start: Index) -> tuple[Index, int, int]:
        return start, self.block_q, self.mask.query_length

    def keys_at(self, j: Index) -> tuple[Index, int, int]:
        return self.key_start(j), self.block_kv, self.mask.key_length

    def key_start(self, j: Index) -> Index:
        return j * self.block_kv

    def query(self, start: Index) -> tile.QueryTile:
        size = (0, self.specs.padded_size, self.specs.size)
        q = self.load(self.refs.query, self.rows_at(start), size)
        if self.mask.query_lengths is not None:
            q = tile.zero_unusable(q, self.in_use(start))
        guard = None
        if self.refs.guard is not None:
            columns = tile.Guard(*(self.column(x, *self.rows_at(start)) for x in self.refs.guard))
            guard = columns._replace(
                down=columns.down[:, None], rest=columns.rest[:, None], gain=columns.gain[:, None]
            )
        scale = self.refs.scale[0].astype(self.numerics.product)
        query = tile.query_tile(q, scale, guard, self.numerics)
        if self.refs.value_gain is None:
            return query
        return query._replace(value_gain=self.refs.value_gain[div(start, self.block_q)])

    def key(self, j: Index, value_gain: Array | None = None) -> tile.KeyTile:
        specs, size = self.specs, (0, self.specs.padded_size, self.specs.size)
        k = self.load(self.refs.key, self.keys_at(j), size)
        v = self.load(self.refs.value, self.keys_at(j), (0, specs.padded_value, specs.value_size))
        if value_gain is not None:
            v = v * value_gain.astype(v.dtype)
        kappa = None
        if self.refs.kappa is not None:
            kappa = self.load(self.refs.kappa, (j, 1, 1), size)
            kappa = jnp.broadcast_to(kappa, (_side(1), specs.padded_size))
        return tile.KeyTile(k, v, None, kappa)

    def bias(self, start: Index, j: Index) -> Array | None:
        return None if self.refs.bias is None else self._tile_of(self.refs.bias, start, j)

    def _tile_of(self, ref: Ref, start: Index, j: Index) -> Array:
        x = self.load(ref, self.rows_at(start), self.keys_at(j))
        return jnp.broadcast_to(x, (self.block_q, self.block_kv))

    def array(self, start: Index, j: Index) -> Array | None:
        seen = None
        if self.refs.query_segments is not None:
            q = self.column(self.refs.query_segments, *self.rows_at(start))
            k = self.column(self.refs.key_segments, *self.keys_at(j))
            seen = q[:, None] == k[None, :]
        if self.refs.array is not None:
            array = self._tile_of(self.refs.array, start, j).astype(jnp.int32) != 0
            seen = array if seen is None else seen & array
        return seen

    def sinks(self) -> Array | None:
        if self.refs.sinks is None:
            return None
        return jnp.full((self.block_q,), self.refs.sinks[...])

    def in_range(self, query: tile.QueryTile, m: Array, l: Array) -> Array:  # noqa: E741
        """[] bool: whether neither products nor the rounding of scores can have gone astray."""
        fine = jnp.max(jnp.where(l > 0, jnp.abs(m), jnp.zeros_like(m))) < _LARGEST_SCORE
        if self.refs.largest_key is None:
            return fine
        largest = jnp.max(jnp.abs(query.q.astype(jnp.float32))) * self.refs.largest_key[...]
        gain = jnp.maximum(jnp.abs(self.refs.scale[0]) * self.numerics.unit, 1)
        return fine & (largest * gain * query.q.shape[1] < _LARGEST_PRODUCT)


def _along(axis: int, count: int) -> tuple[int, int]:
    return (count, 1) if axis == 0 else (1, count)


def _kernel(
    refs: Inputs, *rest: Ref, mask: Mask, plan: Plan, specs: Specs, out_type: jnp.dtype
) -> None:
    i = pl.program_id(0)
    outs = Outputs(*rest)

    mask = bound(mask, refs.query_lengths, refs.key_lengths)
    walk = PointerWalk(
        mask=mask,
        plan=plan,
        numerics=plan.numerics(mask.key_length),
        groups=1,
        block_q=specs.block_q,
        value_size=specs.padded_value,
        refs=refs,
        specs=specs,
    )
    start = i * specs.block_q
    query = walk.query(start)
    state, _ = walk.absorb(start, query, walk.begin())
    found = walk.close(start, query, state)
    fine = walk.in_range(query, found.m, found.l)
    # 0; or NaN, which a sum carries on, where something is not finite; or 1.
    outs.flag[i] = jnp.sum(found.out * 0) + (~fine).astype(jnp.float32)

    rounded, remainder = walk.rounded(found.out, out_type)
    t, e = mask.query_length, specs.value_size
    columns = lax.broadcasted_iota(jnp.int32, (1, specs.padded_value), 1)
    inside = jnp.broadcast_to((walk.positions(start) < t) & (columns < e), rounded.shape)
    for ref, x in ((outs.out, rounded), (outs.remainder, remainder)):
        if ref is not None:
            view = ref.at[pl.ds(start, specs.block_q), pl.ds(jnp.int32(0), specs.padded_value)]
            plgpu.store(view, x, mask=inside)
    in_rows = lax.broadcasted_iota(jnp.int32, (specs.block_q,), 0) < t - start
    for ref, x in ((outs.lse, found.lse), (outs.m, found.m), (outs.l, found.l)):
        if ref is not None:
            view = ref.at[pl.ds(start, specs.block_q)]
            plgpu.store(view, x, mask=in_rows)


def forward(operands: Operands, mask: Mask, plan: Plan, *, wanted: Wanted) -> Result:
    """Attention of all heads; the lax walk repairs what the kernel found not to be right."""
    return repaired(kernel, operands, mask, plan, wanted, "cuda")


def kernel(operands: Operands, mask: Mask, plan: Plan, *, wanted: Wanted) -> tuple[Result, Array]:
    """What the kernel alone gives, and [] bool: whether something in it may not be right."""
    schedule = plan.schedule
    # Problems smaller than a tile have cut it; a tile that is larger than they are is masked.
    schedule = replace(schedule, block_q=_side(schedule.block_q), block_kv=_side(schedule.block_kv))
    plan = replace(plan, schedule=schedule)
    specs = Specs.of(operands, plan)
    inputs = _inputs(operands, mask, plan, specs)
    # What is Triton's alone; XLA, which runs the repair and the gradient, knows none of it. (The
    # contraction is harmless below `_LARGEST_SCORE`, beyond which the kernel is not believed.)
    exp2 = jnp.exp2 if plan.interpret else _exp2
    dialect = replace(plan.dialect, contracts=False, flat=True, exp2=exp2)
    kernel_plan = replace(plan, dialect=dialect)
    (b, t, n, _), e = operands.query.shape, operands.value.shape[-1]
    out_type = operands.query.dtype
    varies = jax.typeof(varying(jnp.zeros(()), (operands, mask))).manual_axis_type

    def parts(wide: Any, flag: Any, column: Any) -> Outputs:
        if wanted == "residuals":
            return Outputs(wide, flag, column, column, column, wide)
        return Outputs(wide, flag, column if wanted == "lse" else None)

    def shape(dtype: Any, *axes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((b, *axes), dtype, manual_axis_type=varies)

    rows = specs.padded(t, "rows")
    shapes = parts(
        shape(out_type, t, n, e), shape(jnp.float32, n, specs.query_tiles), shape(jnp.float32, t, n)
    )
    blocks = parts(
        pl.BlockSpec((None, rows, None, specs.padded_value), lambda i, n, b: (b, 0, n, 0)),
        pl.BlockSpec((None, None, specs.query_tiles), lambda i, n, b: (b, n, 0)),
        pl.BlockSpec((None, rows, None), lambda i, n, b: (b, 0, n)),
    )
    call = pl.pallas_call(
        partial(
            _kernel, mask=without_arrays(mask), plan=kernel_plan, specs=specs, out_type=out_type
        ),
        grid=(specs.query_tiles, n, b),
        in_specs=(_specs(inputs, specs),),
        out_specs=blocks,
        out_shape=shapes,
        compiler_params=plgpu.CompilerParams(
            num_warps=plan.schedule.warps, num_stages=plan.schedule.stages
        ),
        interpret=plan.interpret,
        name="pasa_gpu",
    )
    with jax.enable_x64(False):  # neither compiler takes 64-bit loop counters
        outs = call(inputs)
    found = Result(outs.out, outs.lse, outs.m, outs.l, outs.remainder)
    return found.only(wanted), jnp.any(outs.flag != 0)
