"""One program of the TPU kernel over pages: the key tile that it folds, of every key head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels._float16 import from_bits
from pallas_kernels._packed import PackedTile
from pallas_kernels._pages import Kind, Numbers, PagesWalk, pages_of_tile
from pallas_kernels._tpu_inputs import padded
from pallas_kernels._tpu_walk import vmem
from pasa_jax.core import tile
from pasa_jax.core.mask import Index, Mask
from pasa_jax.core.packed import PackedPages
from pasa_jax.core.plan import Plan
from pasa_jax.core.walk import Rows
from pasa_jax.implementations.page_walk import Call

Array = jax.Array
Ref = Any

# Pages of one step, each of which is two blocks.
_PAGES = 16
# Keys of one step of few rows. More would be computed in vain for short sequences.
_KEYS = 1024
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
    if isinstance(call.pages, PackedPages):
        keys += pages * (2 * heads * padded(n // call.pages.group, size) + padded(heads, n)) * 4
    item = call.queries.query.dtype.itemsize
    of_rows = heads * (padded(rows, size) * item + padded(rows, e) * 4 + padded(rows, 1) * 4)
    state = heads * (padded(rows, e) + 3 * padded(rows, 1)) * 4
    return 2 * (keys + of_rows) + state + 8 * padded(rows, pages * n) * 4


class Inputs(NamedTuple):
    """The arrays of a program outside, refs of one tile inside."""

    scale: Any  # [1]
    query: Any  # [tiles, K, G·block_q, D]; inside a tile's
    sinks: Any  # [N], or None
    kappa: Any  # [B, key tiles, K, D] float32, or None; inside a key tile's
    key: Any  # of each page of a tile: [P, K, n, D]; inside a page's
    value: Any  # the same: [P, K, n, E]
    # Of `PackedPages`, by page as the keys; else None.
    key_scale: Any = None  # [P, K, n/g, D]
    key_mean: Any = None  # [P, K, n/g, D]
    value_scale: Any = None  # [P, K, n]
    open_key: Any = None  # [R, K, g, D]; inside that of a tile's sequence
    open_value: Any = None  # [R, K, g, E]


def numbers_at(numbers: Ref, i: Array) -> Numbers:
    """What SMEM holds of query tile i."""
    return Numbers.of(lambda x: numbers[x], i)


class Heads(NamedTuple):
    """What a program has of some key heads, or, without their axis, of one."""

    query: Array  # [heads, R, D]
    key: Array | None = None  # [heads, n, D]
    value: Array | None = None  # [heads, n, E]
    kappa: Array | None = None  # [heads, 1, D]
    sinks: Array | None = None  # [heads, R, 1]
    # Of pages of 8 bits, see `PackedTile`.
    key_scale: Array | None = None  # [heads, m, D]
    key_mean: Array | None = None  # [heads, m, D]
    value_scale: Array | None = None  # [heads, 1, n]
    open_key: Array | None = None  # [heads, g, D]
    open_value: Array | None = None  # [heads, g, E]


def run(
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
    kind: Kind,
) -> None:
    """The kernel: one key tile of every key head, for one query tile.

    The heads of a straight-line body are computed side by side (`vmap`): a compiler for one head
    after another would wait for each of its products.
    """
    del shown
    i, t = pl.program_id(0), pl.program_id(1)
    sight = numbers_at(numbers, i).sight
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
            format=kind.format,
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
        new = jax.vmap(of_head)(_key_tiles(inputs, heads, kind.dtype, with_open=masked), held)
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
    over = partial(over_heads, specs)
    pl.when(t == 0)(begin)
    pl.when((j < sight.hi) & ~whole)(lambda: over(partial(fold, True)))
    pl.when((j < sight.hi) & whole)(lambda: over(partial(fold, False)))
    pl.when(t == pl.num_programs(1) - 1)(lambda: over(finish))


def over_heads(specs: Specs, body: Callable[[Any], None]) -> None:
    """``body(heads)`` of every key head, ``specs.at_once`` of them at a time."""
    if specs.at_once == specs.heads:
        body(slice(None))
        return

    def several(x: Array, none: None) -> None:
        body(pl.ds(x * specs.at_once, specs.at_once))

    lax.fori_loop(0, specs.heads // specs.at_once, several, None)


def _key_tiles(inputs: Inputs, heads: Any, dtype: jnp.dtype, *, with_open: bool) -> Heads:
    """The queries and the key tile of some key heads, with the open group if asked for."""

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
    tiles = Heads(query, of_pages(inputs.key), of_pages(inputs.value), kappa)
    if inputs.key_scale is None:
        return tiles
    tiles = tiles._replace(
        key_scale=of_pages(inputs.key_scale),
        key_mean=of_pages(inputs.key_mean),
        value_scale=of_pages(inputs.value_scale)[:, None],
    )
    if not with_open:
        return tiles
    return tiles._replace(
        open_key=read(inputs.open_key[0, heads]), open_value=read(inputs.open_value[0, heads])
    )


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


_PACKED = tuple(x for x in PackedTile._fields if x in Heads._fields)


@dataclass(frozen=True, kw_only=True)
class RefWalk(PagesWalk):
    """One key head of a program's query tile, and one key tile."""

    scale: Array
    arrays: Heads
    format: str | None

    def query(self, start: Index) -> tile.QueryTile:
        scale = self.scale.astype(self.numerics.product)
        return tile.query_tile(self.arrays.query, scale, None, self.numerics)

    def stored(self, j: Index) -> tuple[Array, Array]:
        assert self.arrays.key is not None
        assert self.arrays.value is not None
        return self.arrays.key, self.arrays.value

    def packed(self, j: Index, *, with_open: bool) -> PackedTile | None:
        if self.format is None:
            return None
        found: dict[str, Any] = {x: getattr(self.arrays, x) for x in _PACKED}
        # Mosaic has no float16.
        return PackedTile(**found, format=self.format, dtype=self.arrays.query.dtype)

    def kappa(self, j: Index) -> Array | None:
        return self.arrays.kappa

    def sinks(self) -> Array | None:
        return self.arrays.sinks
