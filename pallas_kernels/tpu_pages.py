"""Attention over keys in pages as a Pallas kernel for TPUs (Mosaic), forward.

A program of the grid (query tile, step) folds one key tile of every key head: some pages, each of
which is a block of its own, with all key heads side by side. Which pages a step reads stands in
SMEM. A page that its query tile does not see is not fetched: its block stays where it is. The state
of the online softmax waits in VMEM between the steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu as _kernel
from pallas_kernels._common import shape_maker
from pallas_kernels._float16 import from_bits, to_bits
from pallas_kernels._pages import (
    PagesWalk,
    Sight,
    Tiles,
    kappas,
    mask_of,
    pages_of_tile,
    refusal,
    repaired,
    with_pages,
)
from pallas_kernels._tpu_inputs import padded
from pallas_kernels._tpu_lists import LISTED
from pallas_kernels._tpu_walk import vmem
from pasa_jax.core import tile
from pasa_jax.core.mask import Index, Mask
from pasa_jax.core.plan import Plan
from pasa_jax.core.target import MIB
from pasa_jax.core.walk import Rows
from pasa_jax.implementations.page_walk import Call, Outputs

Array = jax.Array
Ref = Any

# Pages of one step, each of which is two blocks: as many as are useful, and as may be.
_PAGES, _MOST_PAGES = 16, 32
# Keys of one step of few rows. More would be computed in vain for short sequences.
_KEYS = 1024
# Rows of a tile of a sequence with few queries: whole vectors of 32-bit numbers.
_FEW_ROWS = 8
# The scores that a straight-line body computes, of several key heads: they cost compile time.
_STRAIGHT_SCORES = 128 * 1024


@dataclass(frozen=True)
class Specs:
    """Grid, blocks and memory of the program for tiles of ``block_q`` positions.

    Arguments:
      pages, page_size: of a key tile, and n.
      steps: key tiles that a sequence may have.
      at_once: key heads of one straight-line body.
    """

    heads: int
    groups: int
    block_q: int
    pages: int
    page_size: int
    steps: int
    at_once: int
    bytes: int

    @staticmethod
    def of(call: Call, plan: Plan, block_q: int) -> Specs:
        heads, groups = call.pages.key.shape[1], call.groups
        n, keys = call.pages.page_size, plan.schedule.block_kv
        bytes_of = partial(_bytes, call, groups * block_q)
        if plan.storage.uses_kappa:  # a tile has one mean
            pages = pages_of_tile(call, keys)
        else:
            beside = min(plan.schedule.keys_beside(groups * block_q), _KEYS)
            pages = min(pages_of_tile(call, max(keys, beside)), _PAGES)
            while pages > 1 and bytes_of(pages) > vmem(plan):
                pages //= 2
        scores = groups * block_q * pages * n
        few = max(1, min(8, _STRAIGHT_SCORES // scores))
        at_once = max(x for x in range(1, few + 1) if heads % x == 0)
        blocks = call.sequences.table.shape[1]
        return Specs(
            heads, groups, block_q, pages, n, -(-blocks // pages), at_once, bytes_of(pages)
        )

    @property
    def rows(self) -> int:
        """Of a query tile: G·block_q."""
        return self.groups * self.block_q


def _bytes(call: Call, rows: int, pages: int) -> int:
    """Bytes of VMEM that a program wants.

    Arguments:
      rows: G·block_q.
    """
    heads, n, size = call.pages.key.shape[1:]
    e, item = call.pages.value.shape[3], call.pages.key.dtype.itemsize
    keys = pages * heads * (padded(n, size) + padded(n, e)) * item
    of_rows = heads * (padded(rows, size) * item + padded(rows, e) * 4 + padded(rows, 1) * 4)
    state = heads * (padded(rows, e) + 3 * padded(rows, 1)) * 4
    return 2 * (keys + of_rows) + state + 8 * padded(rows, pages * n) * 4


def supports(call: Call, plan: Plan) -> str | None:
    """None, or the reason why the kernel cannot run the call."""
    reason = refusal(call, plan)
    if reason is not None:
        return reason
    stored = plan.precision
    types = (stored.scores, stored.probabilities, stored.statistics, stored.accumulator)
    if "float16" in types:
        return "Mosaic has no float16: store scores in bfloat16 or float32"
    n, unit = call.pages.page_size, 8 * 4 // call.pages.key.dtype.itemsize
    if n % unit:
        return f"a page of {call.pages.dtype} must have a multiple of {unit} tokens, and has {n}"
    specs = Specs.of(call, plan, _tile_sizes(call, plan)[-1])
    if specs.pages > _MOST_PAGES:
        most = f"a key tile may have {_MOST_PAGES} pages, and has {specs.pages}"
        return f"{most}: use a smaller block_kv"
    if specs.bytes > vmem(plan):
        return f"a tile with its pages wants {specs.bytes} bytes of VMEM's {vmem(plan)}"
    if specs.steps * specs.pages > LISTED:
        return f"a sequence may have {LISTED} pages, and has {specs.steps * specs.pages}"
    return None


def adapt(plan: Plan) -> Plan:
    """``plan`` adapted to a TPU, with a running maximum: references would need all keys first."""
    plan = _kernel.adapt(plan)
    return replace(plan, shift="auto") if plan.shift == "bound" else plan


def attend(call: Call, plan: Plan) -> Outputs:
    """The results of `page_walk.attend`, which has the last word where numbers are huge."""
    return repaired(kernel, call, plan, "tpu")


def kernel(call: Call, plan: Plan) -> Outputs:
    """The kernel's own results: those of sequences with few queries, and of the others."""
    tokens, heads, _ = call.queries.query.shape
    few, *many = _tile_sizes(call, plan)
    outputs = Outputs(
        out=jnp.zeros((tokens, heads, call.pages.value.shape[3]), jnp.float32),
        lse=jnp.full((tokens, heads), tile.lowest(jnp.dtype(jnp.float32)), jnp.float32),
    )
    short = call.sequences.count <= few
    outputs = _of_sequences(call, plan, short, few, outputs)
    for block_q in many:
        outputs = _of_sequences(call, plan, ~short, block_q, outputs)
    return outputs


def _tile_sizes(call: Call, plan: Plan) -> tuple[int, ...]:
    """Positions of a query tile: of a sequence with few queries, and, if there may be one with
    more, of that.
    """
    few = -(-_FEW_ROWS // call.groups)
    many = max(1, plan.schedule.block_q // call.groups)
    many = min(many, -(-call.most // few) * few)
    return (few, many) if many > few else (few,)


def _of_sequences(call: Call, plan: Plan, which: Array, block_q: int, outputs: Outputs) -> Outputs:
    """``outputs`` with those of the sequences ``which`` [B] bool."""
    specs = Specs.of(call, plan, block_q)
    plan = with_pages(plan, specs.pages, specs.page_size)
    dialect = replace(plan.dialect, contracts=False, matrix_columns=0)
    plan = replace(plan, dialect=dialect)
    tiles = Tiles.of(call, which, block_q)
    # The lists of a program must fit SMEM.
    at_once = max(1, LISTED // (specs.steps * specs.pages + len(Sight._fields)))
    for first in range(0, len(tiles.start), at_once):
        part = tiles.part(first, at_once)
        found = _program(call, plan, specs, part)
        outputs = Outputs(*(part.scattered(x, y) for x, y in zip(found, outputs, strict=True)))
    return outputs


class Inputs(NamedTuple):
    """The arrays of a program outside, refs of one tile inside."""

    scale: Any  # [1]
    query: Any  # [tiles, K, G·block_q, D]; inside a tile's
    sinks: Any  # [N], or None
    kappa: Any  # [B, key tiles, K, D] float32, or None; inside a key tile's
    key: Any  # of each page of a tile: [P, K, n, D]; inside a page's
    value: Any  # the same: [P, K, n, E]


def _program(call: Call, plan: Plan, specs: Specs, tiles: Tiles) -> Outputs:
    """The results of query tiles, [tiles, K, G·block_q, …]."""
    pages, sequences = call.pages, call.sequences
    count, e = len(tiles.start), pages.value.shape[3]
    sight = Sight.of(call, tiles, specs.pages * specs.page_size)
    blocks = specs.steps * specs.pages
    table = jnp.pad(sequences.table, ((0, 0), (0, blocks - sequences.table.shape[1])))
    table = jnp.clip(table, 0, pages.count - 1)
    by_step = table.reshape(len(table), specs.steps, specs.pages)
    shown = fetched(by_step[tiles.sequence], sight, specs)
    kappa = kappas(call, table, specs.pages, plan) if plan.storage.uses_kappa else None
    sinks = call.queries.sinks
    inputs = Inputs(
        scale=call.queries.scale.astype(jnp.float32).reshape(1),
        query=to_bits(tiles.gathered(call.queries.query, specs.heads)),
        sinks=None if sinks is None else sinks.astype(jnp.float32),
        kappa=kappa,
        key=[pages.key] * specs.pages,
        value=[pages.value] * specs.pages,
    )
    numbers = jnp.stack([tiles.sequence, *sight], axis=1).reshape(-1)
    state = jax.eval_shape(
        partial(tile.initial_state, specs.rows, e, plan.numerics(plan.schedule.block_kv))
    )
    shape = shape_maker(call.arrays)
    run = pl.pallas_call(
        partial(_run, mask=mask_of(call), plan=plan, specs=specs, value_size=e, dtype=pages.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid_of(tiles, sight, specs, plan),
            in_specs=(_blocks(inputs, specs),),
            out_specs=[
                _of_tile((1, specs.heads, specs.rows, e)),
                _of_tile((1, specs.heads, specs.rows, 1)),
            ],
            scratch_shapes=[pltpu.VMEM((specs.heads, *x.shape), x.dtype) for x in state],
        ),
        out_shape=[
            shape((count, specs.heads, specs.rows, e), jnp.float32),
            shape((count, specs.heads, specs.rows, 1), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            disable_bounds_checks=True,  # every page is one of the pages
            vmem_limit_bytes=min(vmem(plan), specs.bytes + specs.bytes // 4 + 8 * MIB),
        ),
        interpret=pltpu.InterpretParams() if plan.interpret else False,
        name="pasa_tpu_pages",
    )
    with jax.enable_x64(False):  # Pallas' compilers have no 64-bit loop counters
        out, lse = run(numbers, shown.reshape(-1), inputs)
    return Outputs(out, lse[..., 0])


def grid_of(tiles: Tiles, sight: Sight, specs: Specs, plan: Plan) -> tuple[Any, Any]:
    """The query tiles in use, and steps for the longest of their lists of key tiles."""
    if plan.interpret:  # the interpreter takes no bound from the device
        return len(tiles.start), specs.steps
    steps = jnp.max(sight.hi - sight.lo)
    return jnp.maximum(tiles.count, 1), jnp.maximum(steps, 1)


def page_at(shown: Ref, specs: Specs, i: Array, t: Array, place: int) -> Array:
    """The page in a block at a step, by what `fetched` says."""
    return shown[(i * specs.steps + t) * specs.pages + place]


def fetched(table: Array, sight: Sight, specs: Specs) -> Array:
    """[tiles, steps, pages] the page that each block holds: one that is not seen is that of the
    step before, or of the query tile before.

    Arguments:
      table: [tiles, steps, pages] of each tile's sequence.
    """
    index = jnp.arange(len(table), dtype=jnp.int32)[:, None]
    place = jnp.arange(specs.pages, dtype=jnp.int32)
    first, last, lo = (x[:, None] for x in (sight.first_page, sight.last_page, sight.lo))
    # The last key tile in which a block has a page that is seen; it may have none.
    final = (last - 1 - place) // specs.pages
    some = final * specs.pages + place >= first  # [tiles, pages]
    end = (last - 1) // specs.pages
    rows = [table[index[:, 0], jnp.maximum(end[:, 0] - back, 0)] for back in (0, 1)]
    page = jnp.where(final == end, *rows)
    # What the block held before the query tile.
    latest = lax.cummax(jnp.where(some, index, -1), axis=0)
    before = jnp.concatenate([jnp.zeros_like(latest[:1]), latest[:-1]])
    held = jnp.take_along_axis(page, jnp.maximum(before, 0), axis=0)
    at = lo + jnp.arange(specs.steps, dtype=jnp.int32)  # [tiles, steps]
    own = table[index, jnp.minimum(at, specs.steps - 1)]
    seen = at[..., None] * specs.pages + place >= first[..., None]
    own = jnp.where(at[..., None] <= final[:, None], own, page[:, None])
    return jnp.where(seen & some[:, None], own, held[:, None])


def _of_tile(shape: tuple[int, ...]) -> pl.BlockSpec:
    """A block of what each query tile has."""
    return pl.BlockSpec(shape, lambda i, t, *_: (i, *[0] * (len(shape) - 1)))


def _blocks(inputs: Inputs, specs: Specs) -> Inputs:
    def page(x: Array, place: int) -> pl.BlockSpec:
        def index(i: Array, t: Array, numbers: Ref, shown: Ref) -> tuple[Any, ...]:
            return (page_at(shown, specs, i, t, place), 0, 0, 0)

        return pl.BlockSpec((1, *x.shape[1:]), index)

    def key_tile(i: Array, t: Array, numbers: Ref, shown: Ref) -> tuple[Any, ...]:
        at = Numbers.of(numbers, i)
        last = jnp.maximum(at.sight.hi - 1, 0)
        return (at.sequence, jnp.minimum(at.sight.lo + t, last), 0, 0)

    in_smem = pl.BlockSpec(memory_space=pltpu.SMEM)
    return Inputs(
        scale=in_smem,
        query=_of_tile((1, *inputs.query.shape[1:])),
        sinks=None if inputs.sinks is None else in_smem,
        kappa=None
        if inputs.kappa is None
        else pl.BlockSpec((1, 1, *inputs.kappa.shape[2:]), key_tile),
        key=[page(x, p) for p, x in enumerate(inputs.key)],
        value=[page(x, p) for p, x in enumerate(inputs.value)],
    )


class Numbers(NamedTuple):
    """What SMEM holds of one query tile."""

    sequence: Array
    sight: Sight

    @staticmethod
    def of(numbers: Ref, i: Array) -> Numbers:
        width = 1 + len(Sight._fields)
        first, *rest = (numbers[i * width + x] for x in range(width))
        return Numbers(first, Sight(*rest))


class Heads(NamedTuple):
    """What a program has of some key heads, or, without their axis, of one."""

    query: Array  # [heads, R, D]
    key: Array | None = None  # [heads, n, D]
    value: Array | None = None  # [heads, n, E]
    kappa: Array | None = None  # [heads, 1, D]
    sinks: Array | None = None  # [heads, R, 1]


def _run(
    numbers: Ref,
    shown: Ref,
    inputs: Inputs,
    out: Ref,
    lse: Ref,
    *state: Ref,
    mask: Mask,
    plan: Plan,
    specs: Specs,
    value_size: int,
    dtype: str,
) -> None:
    """The kernel: one key tile of every key head, for one query tile.

    The heads of a straight-line body are computed side by side (`vmap`): a compiler for one head
    after another would wait for each of its products.
    """
    del shown
    i, t = pl.program_id(0), pl.program_id(1)
    sight = Numbers.of(numbers, i).sight
    refs = tile.State(*state)
    start, j = sight.start, sight.lo + t

    def walk_of(arrays: Heads) -> RefWalk:
        return RefWalk(
            mask=replace(mask, query_lengths=sight.count, key_lengths=sight.length),
            plan=plan,
            numerics=plan.numerics(plan.schedule.block_kv),
            groups=specs.groups,
            block_q=specs.block_q,
            value_size=value_size,
            start=start,
            scale=inputs.scale[0],
            arrays=arrays,
        )

    def begin() -> None:
        first, _ = walk_of(Heads(inputs.query)).begin()
        for ref, x in zip(refs, first, strict=True):
            ref[...] = jnp.broadcast_to(x[None], ref.shape)

    def fold(masked: bool, heads: Any) -> None:
        def of_head(arrays: Heads, held: tile.State) -> tile.State:
            walk = walk_of(arrays)
            seen = walk.seen(start, j) if masked else None
            return walk.fold(start, walk.query(start), j, seen, (held, jnp.float32(0)))[0]

        held = tile.State(*(ref[heads] for ref in refs))
        new = jax.vmap(of_head)(_key_tiles(inputs, heads, dtype), held)
        for ref, x in zip(refs, new, strict=True):
            ref[heads] = x

    def finish(heads: Any) -> None:
        def of_head(arrays: Heads, held: tile.State) -> Rows:
            walk = walk_of(arrays)
            return walk.close(start, walk.query(start), held)

        held = tile.State(*(ref[heads] for ref in refs))
        done = jax.vmap(of_head)(_ends(inputs, heads, specs), held)
        out[0, heads], lse[0, heads] = done.out, done.lse

    whole = (j >= sight.full_lo) & (j < sight.full_hi)
    over = partial(_over_heads, specs)
    pl.when(t == 0)(begin)
    pl.when((j < sight.hi) & ~whole)(lambda: over(partial(fold, True)))
    pl.when((j < sight.hi) & whole)(lambda: over(partial(fold, False)))
    pl.when(t == pl.num_programs(1) - 1)(lambda: over(finish))


def _over_heads(specs: Specs, body: Callable[[Any], None]) -> None:
    """``body(heads)`` of every key head, ``specs.at_once`` of them at a time."""
    if specs.at_once == specs.heads:
        body(slice(None))
        return

    def several(x: Array, none: None) -> None:
        body(pl.ds(x * specs.at_once, specs.at_once))

    lax.fori_loop(0, specs.heads // specs.at_once, several, None)


def _key_tiles(inputs: Inputs, heads: Any, dtype: str) -> Heads:
    """The queries and the key tile of some key heads."""

    def read(x: Array) -> Array:
        if dtype == "bfloat16" and x.dtype == jnp.uint16:
            return lax.bitcast_convert_type(x, jnp.bfloat16)
        return from_bits(x)

    def of_pages(refs: list[Ref]) -> Array:
        pages = [read(ref[0, heads]) for ref in refs]
        return pages[0] if len(pages) == 1 else jnp.concatenate(pages, axis=1)

    kappa = None
    if inputs.kappa is not None:
        kappa = inputs.kappa[0, 0, heads][:, None]
    query = from_bits(inputs.query[0, heads])
    return Heads(query, of_pages(inputs.key), of_pages(inputs.value), kappa)


def _ends(inputs: Inputs, heads: Any, specs: Specs) -> Heads:
    """The queries and the sinks of some key heads."""
    query = from_bits(inputs.query[0, heads])
    if inputs.sinks is None:
        return Heads(query)
    first = 0 if specs.at_once == specs.heads else heads.start

    def of_head(h: int) -> Array:
        place = (first + h) * specs.groups
        each = [jnp.full((specs.block_q, 1), inputs.sinks[place + g]) for g in range(specs.groups)]
        return each[0] if len(each) == 1 else jnp.concatenate(each)

    return Heads(query, sinks=jnp.stack([of_head(h) for h in range(specs.at_once)]))


@dataclass(frozen=True, kw_only=True)
class RefWalk(PagesWalk):
    """One key head of a program's query tile, and one key tile."""

    scale: Array
    arrays: Heads

    def query(self, start: Index) -> tile.QueryTile:
        scale = self.scale.astype(self.numerics.product)
        return tile.query_tile(self.arrays.query, scale, None, self.numerics)

    def stored(self, j: Index) -> tuple[Array, Array]:
        assert self.arrays.key is not None
        assert self.arrays.value is not None
        return self.arrays.key, self.arrays.value

    def kappa(self, j: Index) -> Array | None:
        return self.arrays.kappa

    def sinks(self) -> Array | None:
        return self.arrays.sinks
