"""Attention over keys in pages as a Pallas kernel for TPUs (Mosaic), forward.

A program of the grid (query tile, step) folds one key tile of every key head: some pages, each of
which is a block of its own, with all key heads side by side. Which pages a step reads stands in
SMEM. A page that its query tile does not see is not fetched: its block stays where it is. The state
of the online softmax waits in VMEM between the steps.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu as _kernel
from pallas_kernels._common import shape_maker
from pallas_kernels._float16 import to_bits
from pallas_kernels._pages import (
    Kind,
    Sight,
    Tiles,
    kappas,
    mask_of,
    numbers_of,
    refusal,
    repaired,
    with_pages,
)
from pallas_kernels._tpu_lists import LISTED
from pallas_kernels._tpu_pages_program import Inputs, Specs, numbers_at, run
from pallas_kernels._tpu_walk import vmem
from pasa_jax.core import tile
from pasa_jax.core.packed import PackedPages
from pasa_jax.core.plan import Plan
from pasa_jax.core.target import MIB
from pasa_jax.implementations.page_walk import Call, Outputs

Array = jax.Array
Ref = Any

# The pages of a key tile that has one mean; each of them is two blocks.
_MOST_PAGES = 32
# Rows of a tile of a sequence with few queries: whole vectors of 32-bit numbers.
_FEW_ROWS = 8
# Tokens of a group of `PackedPages`: whole vectors of 16-bit numbers.
_UNIT_OF_GROUPS = 16


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
        stored = "8 bits" if isinstance(call.pages, PackedPages) else call.pages.dtype
        return f"a page of {stored} must have a multiple of {unit} tokens, and has {n}"
    if isinstance(call.pages, PackedPages) and call.pages.group % _UNIT_OF_GROUPS:
        least = f"a multiple of {_UNIT_OF_GROUPS} tokens, and have {call.pages.group}"
        return f"tokens packed at once must be {least}: use another page size or block_kv"
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
    if isinstance(pages, PackedPages):
        inputs = inputs._replace(
            key_scale=[pages.key_scale] * specs.pages,
            key_mean=[pages.key_mean] * specs.pages,
            value_scale=[pages.value_scale] * specs.pages,
            open_key=pages.open_key,
            open_value=pages.open_value,
        )
    numbers = numbers_of(call, tiles, sight)
    state = jax.eval_shape(
        partial(tile.initial_state, specs.rows, e, plan.numerics(plan.schedule.block_kv))
    )
    shape = shape_maker(call.arrays)
    program = pl.pallas_call(
        partial(run, mask=mask_of(call), plan=plan, specs=specs, value_size=e, kind=Kind.of(pages)),
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
        out, lse = program(numbers, shown.reshape(-1), inputs)
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
            return (page_at(shown, specs, i, t, place), *[0] * (x.ndim - 1))

        return pl.BlockSpec((1, *x.shape[1:]), index)

    def key_tile(i: Array, t: Array, numbers: Ref, shown: Ref) -> tuple[Any, ...]:
        at = numbers_at(numbers, i)
        last = jnp.maximum(at.sight.hi - 1, 0)
        return (at.sequence, jnp.minimum(at.sight.lo + t, last), 0, 0)

    def open_group(x: Array | None) -> pl.BlockSpec | None:
        def index(i: Array, t: Array, numbers: Ref, shown: Ref) -> tuple[Any, ...]:
            return (numbers_at(numbers, i).row, 0, 0, 0)

        return None if x is None else pl.BlockSpec((1, *x.shape[1:]), index)

    def pages(arrays: list[Array] | None) -> list[pl.BlockSpec] | None:
        return None if arrays is None else [page(x, p) for p, x in enumerate(arrays)]

    in_smem = pl.BlockSpec(memory_space=pltpu.SMEM)
    return Inputs(
        scale=in_smem,
        query=_of_tile((1, *inputs.query.shape[1:])),
        sinks=None if inputs.sinks is None else in_smem,
        kappa=None
        if inputs.kappa is None
        else pl.BlockSpec((1, 1, *inputs.kappa.shape[2:]), key_tile),
        key=pages(inputs.key),
        value=pages(inputs.value),
        key_scale=pages(inputs.key_scale),
        key_mean=pages(inputs.key_mean),
        value_scale=pages(inputs.value_scale),
        open_key=open_group(inputs.open_key),
        open_value=open_group(inputs.open_value),
    )
