"""The TPU's backward pass where rows and keys come tile by tile, in the order of lists.

A program of ``pasa_tpu_backward_dq`` has a query tile, into whose gradient the key tiles that it
visits are folded, one in each step of the grid's last axis. One of ``pasa_tpu_backward_dkv`` has a
key tile and the query tiles that visit it. Both compute the scores; none of size T or S is in VMEM.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._common import (
    Lists,
    bound,
    lists_of,
    lists_shape,
    shape_maker,
    without_arrays,
)
from pallas_kernels._float16 import from_bits, to_bits
from pallas_kernels._tpu_backward_blocks import Gradients, Sizes
from pallas_kernels._tpu_backward_walk import (
    BackwardWalk,
    Columns,
    mean_key,
    statistics,
)
from pallas_kernels._tpu_inputs import LANES, Cuts, Inputs, grouped, inputs_of
from pallas_kernels._tpu_lists import TileList, steps_of, tiles_at_once
from pasa_jax.core.mask import Index, Mask
from pasa_jax.core.operands import Operands, Result
from pasa_jax.core.plan import Plan
from pasa_jax.core.target import MIB

if TYPE_CHECKING:
    from pasa_jax.core.shapes import Float

Array = jax.Array
Ref = Any


def streamed_gradients(
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
    inputs = _inputs(operands, mask, plan, sizes, result, d_out, d_lse)
    outs = Gradients.of(
        inputs, without_arrays(mask), sizes.query_tiles, shape_maker(operands, mask)
    )
    of_rows, of_keys = outs.halves
    adds_mean = d_lse is not None or operands.sinks is not None
    call = partial(_in_parts, inputs, mask, plan, sizes, adds_mean=adds_mean, vmem=vmem)
    return Gradients.joined(call(_QueryProgram, of_rows), call(_KeyProgram, of_keys))


def _inputs(
    o: Operands,
    mask: Mask,
    plan: Plan,
    sizes: Sizes,
    result: Result,
    d_out: Array,
    d_lse: Array | None,
) -> Inputs:
    inputs = inputs_of(o, mask, transposed=False)
    k = from_bits(inputs.key[:, :, :LANES])
    row, lengths = jnp.arange(k.shape[2])[:, None], mask.key_lengths
    usable = row < (mask.key_length if lengths is None else lengths[:, None, None, None])
    usable = jnp.broadcast_to(usable, (*k.shape[:3], 1))
    kappa = jax.vmap(jax.vmap(mean_key))(k, usable)
    if plan.numerics(mask.key_length).needs_scores:
        kappa = jnp.zeros_like(kappa)
    return inputs._replace(
        d_out=to_bits(grouped(d_out, sizes.heads)),
        statistics=_statistics(o, mask, plan, sizes, result, d_out, d_lse),
        kappa=kappa,
        d_lse=None,
    )


def _statistics(
    o: Operands,
    mask: Mask,
    plan: Plan,
    sizes: Sizes,
    result: Result,
    d_out: Array,
    d_lse: Array | None,
) -> Float[Array, "B K G 8 T"]:
    """What `Columns` are made of, of whole tiles."""
    wide = jnp.float32
    more = sizes.rows - mask.query_length

    def column(x: Array) -> Array:  # [B, T, N] -> [B, K, G, T]
        x = grouped(x.astype(wide), sizes.heads)
        return jnp.pad(x, ((0, 0),) * 3 + ((0, more),))

    m, l = column(result.m), column(result.l)  # noqa: E741
    out = result.out.astype(wide) + result.remainder.astype(wide)
    delta = column(jnp.sum(d_out.astype(wide) * out, axis=-1))
    of_lse = None if d_lse is None else column(d_lse)
    if of_lse is not None:
        delta = delta - of_lse
    sink = None
    if o.sinks is not None:
        sink = jnp.broadcast_to(o.sinks.astype(wide).reshape(1, sizes.heads, -1, 1), m.shape)
    position, lengths = jnp.arange(sizes.rows), mask.query_lengths
    inside = position < (mask.query_length if lengths is None else lengths[:, None, None, None])
    rows, live = statistics(m, l, of_lse, sink, inside, plan.numerics(mask.key_length))
    delta = jnp.where(inside, delta, 0)
    total = jnp.where(live, rows[2] + (rows[3] * delta if len(rows) > 3 else 0), 0)
    rows = [rows[0], jnp.where(live, rows[1], 0), delta, total]
    return jnp.stack(rows + [jnp.zeros_like(m)] * (8 - len(rows)), axis=3)


def _in_parts(
    x: Inputs,
    mask: Mask,
    plan: Plan,
    sizes: Sizes,
    program: type[_Program],
    outs: Gradients,
    *,
    adds_mean: bool,
    vmem: int,
) -> Gradients:
    """The outputs ``outs`` of one kernel, called for as many of its tiles at once as have their
    lists in SMEM.
    """
    tiles = (sizes.block_q, sizes.block_kv, sizes.groups)
    lists = lists_of(mask, *tiles, by_key=program.by_key, backward=True)
    _, _, count, others = lists.order.shape
    at_once = tiles_at_once(lists_shape(mask, sizes.groups), others)
    sides = {"b": 1, "k": 1, "rows": sizes.block_q, "keys": sizes.block_kv, "tile": 1}
    found = []
    for first in range(0, count, at_once):
        some = jax.tree.map(lambda a: a[:, :, first : first + at_once], lists)  # noqa: B023
        part = outs.part(program.own_axes, sides, first, at_once)
        options = {"first": first, "adds_mean": adds_mean}
        found.append(_call(x, mask, plan, sizes, program, part, some, sides, vmem, options))
    return Gradients.concatenated(found, program.own_axes)


def _call(
    x: Inputs,
    mask: Mask,
    plan: Plan,
    sizes: Sizes,
    program: type[_Program],
    outs: Gradients,
    lists: Lists,
    sides: dict[str, int],
    vmem: int,
    options: dict[str, Any],
) -> Gradients:
    tiles, first = TileList.of(lists), options["first"]

    def other(b: Array, h: Array, i: Array, t: Array, numbers: Ref) -> Index:
        return TileList(numbers, tiles.shape).tile(b, h, i, t)

    lead = {"b": lambda b, *_: b, "k": lambda b, h, *_: h}
    own, by_list = ("keys", "rows") if program.by_key else ("rows", "keys")
    of_inputs = {**lead, own: lambda b, h, i, *_: first + i, by_list: other}
    of_outputs = {**lead, **dict.fromkeys(program.own_axes, lambda b, h, i, *_: i)}
    steps = steps_of(lists, interpret=plan.interpret)
    static = {"mask": without_arrays(mask), "plan": plan, "sizes": sizes, "program": program}
    call = pl.pallas_call(
        partial(_kernel, list_shape=tiles.shape, **static, **options),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(len(x.query), sizes.heads, tiles.shape[2], steps),
            in_specs=(Cuts(sides, of_inputs).inputs(x),),
            out_specs=outs.blocks(Cuts(sides, of_outputs)),
            scratch_shapes=[
                pltpu.VMEM(shape, jnp.float32) for shape in program.scratch_shapes(sizes, x)
            ],
        ),
        out_shape=outs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=min(vmem, sizes.bytes + sizes.bytes // 4 + 8 * MIB),
        ),
        interpret=pltpu.InterpretParams() if plan.interpret else False,
        name=program.name,
    )
    with jax.enable_x64(False):  # Pallas' compilers have no 64-bit loop counters
        return call(tiles.numbers, x)


def _kernel(
    numbers: Ref,
    refs: Inputs,
    *rest: Ref,
    mask: Mask,
    plan: Plan,
    sizes: Sizes,
    program: type[_Program],
    list_shape: Any,
    first: int,
    adds_mean: bool,
) -> None:
    b, h, i, t = (pl.program_id(axis) for axis in range(4))
    *out_refs, of_first, of_second = rest
    mask = bound(mask, refs.query_lengths, refs.key_lengths, b)
    walk = program(
        mask=mask,
        plan=plan,
        numerics=plan.numerics(mask.key_length),
        groups=sizes.groups,
        block_q=sizes.block_q,
        value_size=refs.value.shape[-1],
        refs=refs,
        entry=b,
        head=h,
        kappa=refs.kappa.at[0, 0],
        outs=Gradients(*out_refs),
        scratch=(of_first, of_second),
        adds_mean=adds_mean,
    )
    tiles, place = TileList(numbers, list_shape), (b, h, i)
    own, other = first + i, tiles.tile(b, h, i, t)
    i, j = (other, own) if program.by_key else (own, other)
    start = i * sizes.block_q
    partials, count = tiles.partials(*place), tiles.count(*place)

    def masked() -> None:
        asks = tiles.asks(*place, t)
        seen = partial(walk.seen, start, asks=asks)
        walk.masked_step(j, seen, lambda j, seen, _: walk.fold(start, j, seen), None)

    pl.when(t == 0)(partial(walk.open, start))
    pl.when(t < partials)(masked)
    pl.when((t >= partials) & (t < count))(lambda: walk.fold(start, j, None))
    pl.when(t == pl.num_programs(3) - 1)(partial(walk.finish, start))


@dataclass(frozen=True, kw_only=True)
class _Program(BackwardWalk):
    """One program: its refs hold the rows of one tile and the keys of one.

    Arguments:
      scratch: two refs of the shapes `scratch_shapes`.
      adds_mean: whether Σ dS may be other than 0.
    """

    outs: Gradients
    scratch: tuple[Ref, Ref]
    adds_mean: bool

    name: ClassVar[str]
    by_key: ClassVar[bool]  # whether it stays with a key tile
    own_axes: ClassVar[tuple[str, ...]]  # of the outputs, see `Gradients.axes`

    @staticmethod
    @abstractmethod
    def scratch_shapes(sizes: Sizes, x: Inputs) -> list[tuple[int, int]]:
        """The shapes of the two arrays of float32 that it keeps."""

    @abstractmethod
    def open(self, start: Index) -> None:
        """Before the first tile."""

    @abstractmethod
    def fold(self, start: Index, j: Index, seen: Array | None) -> None:
        """One tile, whose mask is ``seen``."""

    @abstractmethod
    def finish(self, start: Index) -> None:
        """After the last tile."""

    def rows_at(self, start: Index) -> Any:
        return slice(None)

    def turned(self) -> Float[Array, "R 8"]:
        """The statistics of the rows, from rows to columns."""
        parts = [self.refs.statistics[0, 0, g].T for g in range(self.groups)]
        return jnp.concatenate(parts) if len(parts) > 1 else parts[0]

    def columns(self, start: Index) -> Columns:
        return Columns.of(self.turned())


class _QueryProgram(_Program):
    """The gradient of a query tile."""

    name = "pasa_tpu_backward_dq"
    by_key = False
    own_axes = ("rows", "tile")

    @staticmethod
    def scratch_shapes(sizes: Sizes, x: Inputs) -> list[tuple[int, int]]:
        rows = sizes.groups * sizes.block_q
        return [(rows, x.query.shape[4]), (rows, 8)]

    def columns(self, start: Index) -> Columns:
        return Columns.of(self.scratch[1][...])

    def open(self, start: Index) -> None:
        d_query, columns = self.scratch
        d_query[...] = jnp.zeros_like(d_query)
        columns[...] = self.turned()
        self.outs.clear_shared()

    def fold(self, start: Index, j: Index, seen: Array | None) -> None:
        key, d_query = self.key(j), self.scratch[0]
        g, s = self.reverse(start, j, key, self.centred(key), seen)
        d_query[...] += g.q
        self.add_shared(self.outs, start, j, s, g.scores)

    def finish(self, start: Index) -> None:
        d_query = self.scratch[0][...]
        if self.adds_mean:
            d_query = d_query + self.columns(start).total * self.kappa[...]
        q = self.used(self.rows(self.refs.query, start), start).astype(jnp.float32)
        self.outs.scale[0, 0, 0] = jnp.sum(d_query * q, axis=0, keepdims=True)
        d_query = (d_query * self.refs.scale[0]).astype(self.outs.query.dtype)
        self.outs.query[0, 0] = d_query.reshape(self.groups, self.block_q, -1)


class _KeyProgram(_Program):
    """The gradients of a key tile."""

    name = "pasa_tpu_backward_dkv"
    by_key = True
    own_axes = ("keys",)

    @staticmethod
    def scratch_shapes(sizes: Sizes, x: Inputs) -> list[tuple[int, int]]:
        return [(sizes.block_kv, x.key.shape[3]), (sizes.block_kv, x.value.shape[3])]

    def open(self, start: Index) -> None:
        for ref in self.scratch:
            ref[...] = jnp.zeros_like(ref)
        self.outs.clear_shared()

    def fold(self, start: Index, j: Index, seen: Array | None) -> None:
        key, (d_key, d_value) = self.key(j), self.scratch
        g, s = self.reverse(start, j, key, key.k, seen)
        d_key[...] += g.k
        d_value[...] += g.v
        self.add_shared(self.outs, start, j, s, g.scores)

    def finish(self, start: Index) -> None:
        (d_key, d_value), outs = self.scratch, self.outs
        outs.key[0, 0] = (d_key[...] * self.refs.scale[0]).astype(outs.key.dtype)
        outs.value[0, 0] = d_value[...].astype(outs.value.dtype)
