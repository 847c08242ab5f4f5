"""Attention over keys in pages as a Pallas kernel for NVIDIA GPUs, through Triton, forward.

A program of the grid (query tile, key head, part of the keys) goes through its key tiles, whose
rows it finds in the table of pages, and leaves a state of the online softmax. Where there are few
tiles and heads, the keys come in several parts, so that every core has work. XLA merges the states
and finishes them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import gpu as _kernel
from pallas_kernels._common import shape_maker
from pallas_kernels._gpu_inputs import side
from pallas_kernels._gpu_walk import LARGEST_SCORE, for_triton
from pallas_kernels._packed import PackedTile
from pallas_kernels._pages import (
    Kind,
    Numbers,
    PagesWalk,
    Sight,
    Tiles,
    kappas,
    mask_of,
    numbers_of,
    pages_of_tile,
    refusal,
    repaired,
)
from pasa_jax.core import bits, tile
from pasa_jax.core.mask import Index, KeyRange, Mask, div
from pasa_jax.core.packed import PackedPages
from pasa_jax.core.plan import Plan
from pasa_jax.core.target import find_target
from pasa_jax.implementations.page_walk import Call, Outputs

Array = jax.Array
Ref = Any

_FEW_ROWS = 16  # of a tile in a product
_KEYS = 128  # of a tile of few rows
_MOST_PARTS = 16
_CORES = 132  # of a GPU whose data sheet is not in the table
_PROGRAMS = 4  # that one core should have
_UNIT_LOG2 = 0.53  # log2 of log2 e: scores are in units of ln 2


@dataclass(frozen=True)
class Specs:
    """Grid and blocks of the program for tiles of ``block_q`` positions.

    Arguments:
      groups, padded_groups: G, and as many as make a power of two.
      block_kv: keys of a tile.
      parts: of the keys.
    """

    heads: int
    groups: int
    padded_groups: int
    block_q: int
    block_kv: int
    parts: int
    page_size: int
    size: int
    value_size: int

    @staticmethod
    def of(call: Call, plan: Plan, block_q: int, tiles: int) -> Specs:
        heads, n, size = call.pages.key.shape[1:]
        groups = pl.next_power_of_2(call.groups)
        keys = _keys_of_tile(call, plan, groups * block_q)
        gpu = find_target(plan.schedule.target).gpu
        cores = _CORES if gpu is None else gpu.cores
        most = -(-call.sequences.table.shape[1] * n // keys)
        parts = min(_PROGRAMS * cores // max(1, tiles * heads), most, _MOST_PARTS)
        return Specs(
            heads,
            call.groups,
            groups,
            block_q,
            keys,
            max(1, parts),
            n,
            size,
            call.pages.value.shape[3],
        )

    @property
    def pages(self) -> int:
        """Of a tile, or of the page of which it is a part; they have one mean."""
        return max(1, self.block_kv // self.page_size)

    @property
    def rows(self) -> int:
        """Of a query tile."""
        return self.padded_groups * self.block_q


def _keys_of_tile(call: Call, plan: Plan, rows: int) -> int:
    """The keys of a tile: of few rows more than the schedule's, where they fit."""
    if isinstance(call.pages, PackedPages):
        return call.pages.group  # which has one mean, and one scale of each channel
    keys = side(plan.schedule.block_kv)
    if plan.storage.uses_kappa:  # a tile has one mean, of whole pages
        return pages_of_tile(call, keys) * call.pages.page_size
    narrow = call.pages.key.dtype.itemsize == 2 and plan.precision.products != "float16"
    if rows > _FEW_ROWS or not narrow:
        return keys
    return max(keys, min(side(plan.schedule.keys_beside(rows)), _KEYS))


def adapt(plan: Plan) -> Plan:
    """``plan`` adapted to a GPU."""
    return _kernel.adapt(plan)


def supports(call: Call, plan: Plan) -> str | None:
    """None, or the reason why the kernel cannot run the call."""
    reason = refusal(call, plan)
    if reason is not None:
        return reason
    if "float16" in (plan.precision.statistics, plan.precision.accumulator):
        return "it keeps float32 statistics"
    for name in ("block_q", "block_kv"):
        block = getattr(plan.schedule, name)
        if block != side(block):
            return f"schedule.{name} must be a power of two of at least 16, and is {block}"
    keys = _keys_of_tile(call, plan, _FEW_ROWS)
    if isinstance(call.pages, PackedPages) and keys != side(keys):
        least = f"a power of two of at least 16 tokens, and have {keys}"
        return f"tokens packed at once must be {least}: use another page size or block_kv"
    if keys != side(keys):
        return f"the pages of a key tile must have a power of two of at least 16 keys, not {keys}"
    return None


def attend(call: Call, plan: Plan) -> Outputs:
    """The results of `page_walk.attend`, which has the last word where numbers are large."""
    largest = math.log2(LARGEST_SCORE) - _UNIT_LOG2
    return repaired(kernel, call, plan, "cuda", largest)


def kernel(call: Call, plan: Plan) -> Outputs:
    """The kernel's own results: those of sequences with few queries, and of the others."""
    tokens, heads, _ = call.queries.query.shape
    outputs = Outputs(
        out=jnp.zeros((tokens, heads, call.pages.value.shape[3]), jnp.float32),
        lse=jnp.full((tokens, heads), tile.lowest(jnp.dtype(jnp.float32)), jnp.float32),
    )
    groups = pl.next_power_of_2(call.groups)
    few, many = (max(1, x // groups) for x in (_FEW_ROWS, plan.schedule.block_q))
    short = call.sequences.count <= few
    outputs = _of_sequences(call, plan, short, few, outputs)
    if call.most > few:
        outputs = _of_sequences(call, plan, ~short, many, outputs)
    return outputs


def _of_sequences(call: Call, plan: Plan, which: Array, block_q: int, outputs: Outputs) -> Outputs:
    """``outputs`` with those of the sequences ``which`` [B] bool."""
    tiles = Tiles.of(call, which, block_q)
    specs = Specs.of(call, plan, block_q, len(tiles.start))
    schedule = replace(plan.schedule, block_q=specs.rows, block_kv=specs.block_kv)
    plan = for_triton(replace(plan, schedule=schedule))
    state = _program(call, plan, specs, tiles)
    found = _finished(call, plan, specs, state)
    return Outputs(*(tiles.scattered(x, y) for x, y in zip(found, outputs, strict=True)))


def _finished(call: Call, plan: Plan, specs: Specs, state: tile.State) -> Outputs:
    """The results [tiles, K, G·block_q, …] of the states [parts, tiles, K, rows, …]."""
    shape, e = state.m.shape[1:], specs.value_size
    numerics = plan.numerics(specs.block_kv)
    flat = state._replace(o=state.o[..., :e])
    flat = jax.tree.map(lambda x: x.reshape(specs.parts, -1, *x.shape[4:]), flat)
    parts = [tile.State(*x) for x in zip(*flat, strict=True)]
    each = [tile.settle(x, numerics) for x in parts]
    whole = reduce(partial(tile.merge, numerics=numerics), each)
    if call.queries.sinks is not None:
        sinks = jnp.repeat(
            _padded(call.queries.sinks.reshape(-1, specs.groups), specs, 1), specs.block_q
        )
        whole = tile.add_sink(whole, jnp.tile(sinks, shape[0]), numerics, None)
    out, lse = tile.finish(whole, numerics, None)

    def own(x: Array) -> Array:
        x = x.reshape(*shape[:2], specs.padded_groups, specs.block_q, *x.shape[1:])
        return x[:, :, : specs.groups].reshape(*shape[:2], -1, *x.shape[4:])

    return Outputs(own(out), own(lse))


def _padded(x: Array, specs: Specs, axis: int) -> Array:
    """x with G padded to `Specs.padded_groups` along an axis."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, specs.padded_groups - specs.groups)
    return jnp.pad(x, widths)


class Inputs(NamedTuple):
    """The arrays of a program outside; inside refs, of its own queries and of all else."""

    scale: Any  # [1]
    numbers: Any  # [tiles · `WIDTH`]
    table: Any  # [B · blocks]
    query: Any  # [tiles, K, rows, D]; inside [rows, D]
    kappa: Any  # [B · tiles of one mean · K, D] float32, or None
    key: Any  # [P · K · n, D]
    value: Any  # [P · K · n, E]
    # Of `PackedPages`, else None.
    key_scale: Any = None  # [P · K · n/g, D]
    key_mean: Any = None  # [P · K · n/g, D]
    value_scale: Any = None  # [P · K · n]
    open_key: Any = None  # [R · K · g, D]
    open_value: Any = None  # [R · K · g, E]


def _program(call: Call, plan: Plan, specs: Specs, tiles: Tiles) -> tile.State:
    """The states of query tiles over each part of the keys, [parts, tiles, K, rows, …]."""
    pages, n = call.pages, specs.page_size
    dtype, count = jnp.dtype(pages.dtype), len(tiles.start)
    d, e = side(specs.size), side(specs.value_size)
    sight = Sight.of(call, tiles, specs.block_kv)
    blocks = -(-call.sequences.table.shape[1] * n // specs.block_kv) * specs.block_kv // n + 1
    if plan.storage.uses_kappa:
        blocks -= 1
    table = call.sequences.table
    table = jnp.pad(table, ((0, 0), (0, blocks - table.shape[1])))
    table = jnp.clip(table, 0, pages.count - 1)
    kappa = None
    if plan.storage.uses_kappa:
        kappa = kappas(call, table, specs.pages, plan).reshape(-1, specs.size)
        kappa = jnp.pad(kappa, ((0, 0), (0, d - specs.size)))
    query = tiles.gathered(call.queries.query, specs.heads)
    query = query.reshape(count, specs.heads, specs.groups, specs.block_q, specs.size)
    query = _padded(query, specs, 2).reshape(count, specs.heads, specs.rows, specs.size)
    inputs = Inputs(
        scale=call.queries.scale.astype(jnp.float32).reshape(1),
        numbers=numbers_of(call, tiles, sight),
        table=table.reshape(-1),
        query=jnp.pad(query, ((0, 0),) * 3 + ((0, d - specs.size),)),
        kappa=kappa,
        key=_rows_of(pages.key, dtype),
        value=_rows_of(pages.value, dtype),
    )
    if isinstance(pages, PackedPages):
        inputs = inputs._replace(
            key_scale=_rows_of(pages.key_scale, dtype),
            key_mean=_rows_of(pages.key_mean, dtype),
            value_scale=pages.value_scale.reshape(-1),
            open_key=_rows_of(pages.open_key, dtype),
            open_value=_rows_of(pages.open_value, dtype),
        )
    in_specs = jax.tree.map(lambda x: pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim), inputs)
    own = pl.BlockSpec((None, None, specs.rows, d), lambda i, h, p: (i, h, 0, 0))
    column = pl.BlockSpec((None, None, None, specs.rows), lambda i, h, p: (p, i, h, 0))
    out = pl.BlockSpec((None, None, None, specs.rows, e), lambda i, h, p: (p, i, h, 0, 0))
    shape, rows = shape_maker(call.arrays), (specs.parts, count, specs.heads, specs.rows)
    kind = Kind.of(pages)
    run = pl.pallas_call(
        partial(_run, mask=mask_of(call), plan=plan, specs=specs, blocks=blocks, kind=kind),
        grid=(count, specs.heads, specs.parts),
        in_specs=(in_specs._replace(query=own),),
        out_specs=[column, column, out],
        out_shape=[shape(rows, jnp.float32)] * 2 + [shape((*rows, e), jnp.float32)],
        compiler_params=plgpu.CompilerParams(
            num_warps=_warps(plan, specs, kind),
            num_stages=plan.schedule.stages,
        ),
        interpret=plan.interpret,
        name="pasa_gpu_pages",
    )
    with jax.enable_x64(False):  # Pallas' compilers have no 64-bit loop counters
        m, l, o = run(inputs)  # noqa: E741
    return tile.State(m, l, o, jnp.zeros_like(m))


def _warps(plan: Plan, specs: Specs, kind: Kind) -> int:
    if specs.rows > _FEW_ROWS:
        return plan.schedule.warps
    return 4 if kind.format is None else 8  # codes and what they become need more registers


def _rows_of(x: Array, dtype: jnp.dtype) -> Array:
    """[L, W] of x […, W], bits of numbers of ``dtype`` as these."""
    x = bits.read(x, dtype) if x.dtype == bits.stored_type(dtype) else x
    return x.reshape(-1, x.shape[-1])


def _run(
    inputs: Inputs,
    m: Ref,
    l: Ref,  # noqa: E741
    o: Ref,
    *,
    mask: Mask,
    plan: Plan,
    specs: Specs,
    blocks: int,
    kind: Kind,
) -> None:
    """The kernel: the state of one query tile and key head over one part of the keys."""
    numbers = Numbers.of(partial(_number, inputs.numbers), pl.program_id(0))
    sight = numbers.sight
    walk = PointerWalk(
        mask=replace(mask, query_lengths=sight.count, key_lengths=sight.length),
        plan=plan,
        numerics=plan.numerics(specs.block_kv),
        groups=specs.padded_groups,
        block_q=specs.block_q,
        value_size=side(specs.value_size),
        start=sight.start,
        refs=inputs,
        specs=specs,
        numbers=numbers,
        head=pl.program_id(1),
        part=pl.program_id(2),
        blocks=blocks,
        kind=kind,
    )
    state, _ = walk.absorb(walk.start, walk.query(walk.start), walk.begin())
    m[...], l[...], o[...] = state.m, state.l, state.o


def _number(ref: Ref, index: Index) -> Array:
    """One number of a ref [L]."""
    return plgpu.load(ref.at[jnp.int32(index)])


@dataclass(frozen=True, kw_only=True)
class PointerWalk(PagesWalk):
    """One program: its key tiles are loaded row by row, as the table says.

    Arguments:
      numbers, head, part: of the program.
      blocks: of a sequence in the table.
      kind: of the pages.
    """

    refs: Inputs
    specs: Specs
    numbers: Numbers
    head: Array
    part: Array
    blocks: int
    kind: Kind

    def key_range(self, start: Index) -> KeyRange:
        """The key tiles of the program's part."""
        whole = super().key_range(start)
        each = div(whole.hi - whole.lo + self.specs.parts - 1, self.specs.parts)
        lo = jnp.minimum(whole.lo + self.part * each, whole.hi)
        hi = jnp.minimum(lo + each, whole.hi)
        return KeyRange(*(jnp.minimum(jnp.maximum(x, lo), hi) for x in whole))

    def position_column(self, start: Index) -> Array:
        row = lax.broadcasted_iota(jnp.int32, (self.specs.rows, 1), 0)
        return start + (row & (self.block_q - 1))  # which is a power of two

    def query(self, start: Index) -> tile.QueryTile:
        scale = self.refs.scale[0].astype(self.numerics.product)
        return tile.query_tile(self.refs.query[...], scale, None, self.numerics)

    def stored(self, j: Index) -> tuple[Array, Array]:
        n, at = self.specs.page_size, self.key_start(j)
        place = at + lax.broadcasted_iota(jnp.int32, (self.block_kv,), 0)
        block = div(place, n)
        row = self._page(block) * n + place - block * n
        return self._rows(self.refs.key, row), self._rows(self.refs.value, row)

    def _page(self, block: Index) -> Array:
        """Where the program's head begins in the page of a block of the sequence."""
        page = plgpu.load(self.refs.table.at[self.numbers.sequence * self.blocks + block])
        return page * self.specs.heads + self.head

    def packed(self, j: Index, *, with_open: bool) -> PackedTile | None:
        if self.kind.format is None:
            return None
        refs, n, g, at = self.refs, self.specs.page_size, self.block_kv, self.key_start(j)
        block = div(at, n)
        token = self._page(block) * n + at - block * n
        each = lax.broadcasted_iota(jnp.int32, (g,), 0)
        group = jnp.full((1,), div(token, g))
        open_key = open_value = None
        if with_open:
            row = (self.numbers.row * self.specs.heads + self.head) * g + each
            open_key, open_value = (self._rows(x, row) for x in (refs.open_key, refs.open_value))
        return PackedTile(
            key=self._rows(refs.key, token + each),
            value=self._rows(refs.value, token + each),
            key_scale=self._rows(refs.key_scale, group),
            key_mean=self._rows(refs.key_mean, group),
            value_scale=self._value_scale(token + each),
            open_key=open_key,
            open_value=open_value,
            format=self.kind.format,
            dtype=self.kind.dtype,
        )

    def _value_scale(self, token: Array) -> Array:
        """[1, g] or [g, 1], see `PackedTile`."""
        scale = plgpu.load(self.refs.value_scale.at[token])
        by_value = self.numerics.precision.probabilities == "float16"
        return scale[:, None] if by_value else scale[None]

    def _rows(self, ref: Ref, row: Array) -> Array:
        """[n, side(W)] the rows of ref [L, W]; zeros beyond W."""
        width = ref.shape[1]
        column = lax.broadcasted_iota(jnp.int32, (1, side(width)), 1)
        place = jnp.broadcast_to(row[:, None], (len(row), side(width)))
        view = ref.at[place, jnp.broadcast_to(column, place.shape)]
        if width == side(width):
            return plgpu.load(view)
        return plgpu.load(view, mask=jnp.broadcast_to(column < width, place.shape), other=0)

    def kappa(self, j: Index) -> Array | None:
        if self.refs.kappa is None:
            return None
        keys = self.specs.pages * self.specs.page_size
        tiles = self.blocks * self.specs.page_size // keys
        j = div(self.key_start(j), keys)
        row = (self.numbers.sequence * tiles + j) * self.specs.heads + self.head
        return plgpu.load(self.refs.kappa.at[pl.ds(row, 1), :])

    def sinks(self) -> Array | None:
        return None  # they count once, after the parts are merged
