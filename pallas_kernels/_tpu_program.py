"""One program of the TPU kernel: the query tiles that it computes, and where they are written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._common import Outputs, bound
from pallas_kernels._tpu_inputs import LANES, Inputs
from pallas_kernels._tpu_lists import TileList
from pallas_kernels._tpu_reference import Blocks
from pallas_kernels._tpu_walk import RefWalk, Specs
from pasa_jax.core import tile
from pasa_jax.core.mask import Index, Mask
from pasa_jax.core.plan import Plan

Array = jax.Array
Ref = Any

# The flag of a query tile whose weights did not stay in range of a fixed reference.
AGAIN = 1.0


def scratch_shapes(specs: Specs, plan: Plan, size: int, value_size: int) -> dict[str, Any]:
    """The kernel's scratch memory by name, for head sizes D and E."""
    shapes = {"largest_key": (1, size)}
    if needs_blocks(plan):
        shapes |= Blocks.shapes(specs, size)
    if plan.precision.eight_bits:
        keys = specs.chunk_tiles * specs.block_kv
        shapes |= {"codes": (keys, size), "scale": (keys, 1) if specs.transposed else (1, keys)}
    if specs.in_parts:
        rows = specs.groups * specs.block_q
        state = jax.eval_shape(
            partial(tile.initial_state, rows, value_size, plan.numerics(specs.key_tiles))
        )
        shapes |= {name: x.shape for name, x in state._asdict().items()}
    types = {"codes": jnp.int8}
    return {name: pltpu.VMEM(shape, types.get(name, jnp.float32)) for name, shape in shapes.items()}


def run_listed(numbers: Ref, refs: Inputs, *rest: Ref, list_shape: Any, **options: Any) -> None:
    """`run_program` for the grid (batch, key head, query tiles, place in a list of key tiles)."""
    run_program(refs, *rest, tiles=TileList(numbers, list_shape), **options)


def run_program(
    refs: Inputs,
    *rest: Ref,
    mask: Mask,
    plan: Plan,
    specs: Specs,
    out_type: jnp.dtype,
    first: int = 0,
    tiles: TileList | None = None,
) -> None:
    """The kernel: one program of the grid (batch, key head, query tiles, chunk of keys).

    Arguments:
      first: the row with which the refs begin.
      tiles: the lists of key tiles, if the grid goes through them.
    """
    b, h, i, c = (pl.program_id(axis) for axis in range(4))
    t = c
    if tiles is not None:
        c = tiles.tile(b, h, i, t)
    by_bound = plan.storage is tile.Storage.BOUND
    names = list(scratch_shapes(specs, plan, 1, 1))
    outs, scratch = (
        Outputs(*rest[: -len(names)]),
        dict(zip(names, rest[-len(names) :], strict=True)),
    )
    blocks = Blocks(scratch["kappa"], scratch["value"]) if needs_blocks(plan) else None

    mask = bound(mask, refs.query_lengths, refs.key_lengths, b)
    walk = RefWalk(
        mask=mask,
        plan=plan,
        numerics=plan.numerics(mask.key_length),
        groups=specs.groups,
        block_q=specs.block_q,
        value_size=refs.value.shape[-1],
        refs=refs,
        entry=b,
        head=h,
        offset=None,
        largest_key=None if by_bound else scratch["largest_key"],
        kappa=None if blocks is None else blocks.kappa,
        codes=tile.Codes(scratch["codes"], scratch["scale"]) if plan.precision.eight_bits else None,
        chunk_tiles=specs.chunk_tiles,
        chunk=c if specs.in_parts else 0,
    )
    program = Program(walk, blocks if by_bound else None, outs, out_type)
    if blocks is not None:
        once = i == 0 if not specs.in_parts else i >= 0
        _where(once, specs.programs, lambda: blocks.fill(walk, specs))
    if specs.in_parts:
        program.run_part(first + i * specs.block_q, i, t, tiles, scratch)
        return
    starts = walk.static_starts()
    if starts is None:
        program.run([i * specs.rows + t * specs.block_q for t in range(specs.tiles)])
        return
    for p in range(specs.programs):
        mine = starts[p * specs.tiles : (p + 1) * specs.tiles]
        _where(i == p, specs.programs, partial(program.run, mine))


def _where(condition: Array, programs: int, body: Callable[[], None]) -> None:
    """``body`` in the programs of a head that meet ``condition``, or in its only one."""
    body() if programs == 1 else pl.when(condition)(body)


def needs_blocks(plan: Plan) -> bool:
    """Whether something is to be known of each block before the tiles are walked."""
    return plan.storage.uses_kappa or plan.storage is tile.Storage.BOUND


@dataclass(frozen=True)
class Program:
    """One program: its query tiles, one after the other.

    Arguments:
      blocks: where the rows' references come from; None: there is a running maximum.
    """

    walk: RefWalk
    blocks: Blocks | None
    outs: Outputs
    out_type: jnp.dtype

    def run(self, starts: Sequence[Index]) -> None:
        """Computes the query tiles that start at ``starts``."""
        flags, todo = self.outs.flag, self.walk.refs.todo
        tiles = flags.shape[2]
        flags[...] = jnp.zeros_like(flags)
        for t, start in enumerate(starts):
            offset = None if tiles == 1 else t * self.walk.block_q
            tile_of = partial(self._query_tile, replace(self.walk, offset=offset), start, t)
            needed = None
            if todo is not None:
                needed = self._todo(t)
            elif not isinstance(start, int) and self.walk.mask.query_length % (
                tiles * self.walk.block_q
            ):
                needed = start < self.walk.mask.query_length
            tile_of() if needed is None else pl.when(needed)(tile_of)

    def run_part(
        self, start: Index, i: Index, t: Array, tiles: TileList | None, scratch: dict[str, Ref]
    ) -> None:
        """Folds one part of the keys into the state of the query tile at ``start``, in scratch.

        Arguments:
          i, t: the program's query tile, and which of its parts of the keys is there.
          tiles: the lists of key tiles; None: the part is a chunk.
        """
        walk = self.walk
        refs = tile.State(*(scratch[name] for name in tile.State._fields))

        def begin() -> None:
            for ref, x in zip(refs, walk.begin()[0], strict=True):
                ref[...] = x
            if walk.largest_key is not None:
                walk.largest_key[...] = jnp.zeros_like(walk.largest_key)
            self.outs.flag[...] = jnp.zeros_like(self.outs.flag)

        def fold(absorb: Callable[..., tuple[tile.State, Array]]) -> None:
            carry = tile.State(*(ref[...] for ref in refs)), jnp.float32(0)
            state, _ = absorb(walk.query(start), carry)
            for ref, x in zip(refs, state, strict=True):
                ref[...] = x

        def finish() -> None:
            state = tile.State(*(ref[...] for ref in refs))
            self._finish(walk, start, 0, walk.query(start), state)

        pl.when(t == 0)(begin)
        if tiles is None:
            fold(partial(walk.absorb, start))
        else:
            at = (walk.entry, walk.head, i)
            partials, count, asks = tiles.partials(*at), tiles.count(*at), tiles.asks(*at, t)
            masked = partial(walk.absorb_tile, start, walk.chunk, asks)
            whole = partial(walk.absorb_tile, start, walk.chunk, None)
            pl.when(t < partials)(partial(fold, masked))
            pl.when((t >= partials) & (t < count))(partial(fold, whole))
        pl.when(t == pl.num_programs(3) - 1)(finish)

    def _todo(self, t: int) -> Array:
        assert self.walk.refs.todo is not None
        b, h, i = (pl.program_id(axis) for axis in range(3))
        return self.walk.refs.todo[b, h, i * self.outs.flag.shape[2] + t] != 0

    def _query_tile(self, walk: RefWalk, start: Index, t: int) -> None:
        if walk.largest_key is not None:
            walk.largest_key[...] = jnp.zeros_like(walk.largest_key)
        query = walk.query(start)
        if self.blocks is not None:
            query = self.blocks.refer(walk, start, query)
        state, _ = walk.absorb(start, query, walk.begin())
        self._finish(walk, start, t, query, state)

    def _finish(
        self, walk: RefWalk, start: Index, t: int, query: tile.QueryTile, state: tile.State
    ) -> None:
        """Writes the results of a query tile that has seen all its keys."""
        done = walk.close(start, query, state)
        self._flag(walk, start, t, query, done.out, state.l)
        out = done.out.T if walk.transposed else done.out
        remainder = out
        if self.out_type != jnp.float16:  # float16 is rounded outside of the kernel
            out, remainder = walk.rounded(out, self.out_type)
        for ref, x in ((self.outs.out, out), (self.outs.remainder, remainder)):
            if ref is not None:
                ref[0, 0, :, walk.own_rows] = x.reshape(walk.groups, walk.block_q, -1)
        for ref, x in ((self.outs.lse, done.lse), (self.outs.m, done.m), (self.outs.l, done.l)):
            if ref is not None:
                _store_column(ref, x, walk)

    def _flag(
        self,
        walk: RefWalk,
        start: Index,
        t: int,
        query: tile.QueryTile,
        out: Array,
        l: Array,  # noqa: E741
    ) -> None:
        """NaN where something in the tile is not finite or a product may have left float32. (A sum
        passes NaN on; a maximum need not.)

        Arguments:
          l: the row sums, without sinks.
        """
        zero = out * 0
        length = walk.mask.query_length
        if length % walk.block_q:  # rows beyond hold anything
            zero = jnp.where(walk.positions(start) < length, zero, jnp.zeros_like(zero))
        flag = jnp.sum(jnp.sum(zero, axis=0, keepdims=True), axis=1, keepdims=True)
        if self.blocks is None:
            flag = flag + jnp.where(walk.in_range(query), 0.0, jnp.nan)
        else:
            fine = self.blocks.in_range(walk, start, l) & (flag == 0)
            flag = jnp.where(fine, flag, AGAIN)
        self.outs.flag[0, 0, t] = jnp.broadcast_to(flag, (1, LANES))


def _store_column(ref: Ref, x: Array, walk: RefWalk) -> None:
    """Writes one number per row to a block [1, 1, G, 1, rows]."""
    if not walk.transposed:
        ref[0, 0, :, :, walk.own_rows] = x.reshape(walk.groups, 1, walk.block_q)
        return
    for g in range(walk.groups):
        ref[0, 0, g, :, walk.own_rows] = x[:, g * walk.block_q : (g + 1) * walk.block_q]
