"""What the kernels over pages have in common: query tiles, what each sees, and the repair.

The queries of all sequences lie in one row. A query tile has some of those of one sequence; XLA
gathers the rows of all tiles before the kernel, and scatters their results after it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._common import only_on, repairing
from pallas_kernels._packed import PackedTile, unpacked
from pasa_jax.core import tile
from pasa_jax.core.guard import divides_values, guards
from pasa_jax.core.heads import varying
from pasa_jax.core.mask import Index, Mask, div
from pasa_jax.core.packed import PackedPages, Store
from pasa_jax.core.plan import Plan
from pasa_jax.core.walk import Walk
from pasa_jax.implementations import page_walk
from pasa_jax.implementations.page_walk import Call, Outputs

Array = jax.Array
Ref = Any


# Rows of a matrix operand that holds a single one: the least that both kinds of chips multiply.
_MATRIX_ROWS = 16


class Tiles(NamedTuple):
    """Query tiles of ``block_q`` positions; those in use come first."""

    sequence: Array  # [tiles] int32, 0 where it is not in use
    start: Array  # [tiles] int32, its first query in its sequence
    token: Array  # [tiles, block_q] int32, where its queries lie; beyond them all where none is
    count: Array  # [] int32, how many are in use

    @staticmethod
    def of(call: Call, which: Array, block_q: int) -> Tiles:
        """The tiles of the sequences ``which`` [B] bool."""
        tokens, (first, count, *_) = len(call.queries.query), call.sequences
        count = jnp.where(which, count, 0)
        each = (count + block_q - 1) // block_q
        end = jnp.cumsum(each, dtype=jnp.int32)
        tiles = min(tokens, tokens // block_q + len(count))
        tile = jnp.arange(tiles, dtype=jnp.int32)
        used = tile < end[-1]
        sequence = jnp.searchsorted(end, tile, side="right", method="compare_all").astype(jnp.int32)
        sequence = jnp.where(used, sequence, 0)
        start = jnp.where(used, (tile - (end - each)[sequence]) * block_q, 0)
        row = start[:, None] + jnp.arange(block_q, dtype=jnp.int32)
        there = used[:, None] & (row < count[sequence][:, None])
        token = jnp.where(there, first[sequence][:, None] + row, tokens)
        return Tiles(sequence, start, token, end[-1])

    def part(self, first: int, most: int) -> Tiles:
        """At most so many of the tiles, from ``first`` on."""
        some = slice(first, first + most)
        count = jnp.clip(self.count - first, 0, most)
        return Tiles(self.sequence[some], self.start[some], self.token[some], count)

    def gathered(self, x: Array, kv_heads: int) -> Array:
        """[tiles, K, G·block_q, …] of x [tokens, N, …]; zeros where there is no query."""
        x = x.at[self.token].get(mode="fill", fill_value=0)  # [tiles, block_q, N, …]
        x = x.reshape(*self.token.shape, kv_heads, -1, *x.shape[3:])
        return jnp.moveaxis(x, 1, 3).reshape(len(x), kv_heads, -1, *x.shape[4:])

    def scattered(self, x: Array, buffer: Array) -> Array:
        """``buffer`` [tokens, N, …] with x [tiles, K, G·block_q, …] in its place."""
        x = x.reshape(*x.shape[:2], -1, self.token.shape[1], *x.shape[3:])
        x = jnp.moveaxis(x, 3, 1)  # [tiles, block_q, K, G, …]
        return buffer.at[self.token].set(
            x.reshape(*self.token.shape, *buffer.shape[1:]), mode="drop"
        )


class Sight(NamedTuple):
    """What each query tile sees, all [tiles] int32: its sequence's count and length, its start, its
    key tiles as in `KeyRange`, and the blocks of the pages that it sees.
    """

    count: Array
    length: Array
    start: Array
    lo: Array
    full_lo: Array
    full_hi: Array
    hi: Array
    first_page: Array
    last_page: Array  # the one after it

    @staticmethod
    def of(call: Call, tiles: Tiles, block_kv: int) -> Sight:
        """Of key tiles of ``block_kv`` keys."""
        n, block_q = call.pages.page_size, tiles.token.shape[1]

        def one(sequence: Array, start: Array, used: Array) -> Sight:
            of_one = jax.tree.map(lambda x: x[sequence], call.sequences)
            # A sequence whose tokens did not fit may say that it has more than its pages hold.
            of_one = of_one._replace(
                count=jnp.where(used, of_one.count, 0),
                length=jnp.minimum(of_one.length, len(of_one.table) * n),
            )
            mask = page_walk.mask_of(of_one, call.most, call.window, n)
            by_page = mask.key_range(start, start + block_q, n)
            r = mask.key_range(start, start + block_q, block_kv)
            found = (of_one.count, of_one.length, start, *r, by_page.lo, by_page.hi)
            return Sight(*(jnp.asarray(x, jnp.int32) for x in found))

        used = jnp.arange(len(tiles.start)) < tiles.count
        return jax.vmap(one)(tiles.sequence, tiles.start, used)


def numbers_of(call: Call, tiles: Tiles, sight: Sight) -> Array:
    """[tiles · `WIDTH`] int32: of each query tile its sequence, the row of that, and its sight."""
    row = call.sequences.row
    row = jnp.zeros_like(tiles.sequence) if row is None else row[tiles.sequence]
    return jnp.stack([tiles.sequence, row.astype(jnp.int32), *sight], axis=1).reshape(-1)


class Kind(NamedTuple):
    """What pages hold: the type of keys and values, and a name of `FORMATS` or None."""

    dtype: jnp.dtype
    format: str | None

    @staticmethod
    def of(pages: Store) -> Kind:
        format = pages.format if isinstance(pages, PackedPages) else None
        return Kind(jnp.dtype(pages.dtype), format)


class Numbers(NamedTuple):
    """What a program reads of its query tile."""

    sequence: Array
    row: Array  # which open group of `PackedPages` its sequence has
    sight: Sight

    @staticmethod
    def of(read: Callable[[Index], Array], i: Array) -> Numbers:
        """Those of query tile i, by a function that reads one number."""
        first, row, *rest = (read(i * WIDTH + x) for x in range(WIDTH))
        return Numbers(first, row, Sight(*rest))


WIDTH = 2 + len(Sight._fields)


def mask_of(call: Call) -> Mask:
    """The mask that a kernel is traced with: that of a sequence, without its lengths."""
    one = jax.tree.map(lambda x: x[0], call.sequences)
    mask = page_walk.mask_of(one, call.most, call.window, call.pages.page_size)
    return replace(mask, query_lengths=None, key_lengths=None)


def with_pages(plan: Plan, pages: int, n: int) -> Plan:
    """The plan with key tiles of so many pages of n tokens."""
    return replace(plan, schedule=replace(plan.schedule, block_kv=pages * n))


def pages_of_tile(call: Call, keys: int) -> int:
    """How many pages hold at most so many keys, as in the lax walk."""
    return page_walk.whole_pages(keys, call.pages.page_size, call.sequences.table.shape[1])


def kappas(call: Call, table: Array, pages: int, plan: Plan) -> Array:
    """[B, key tiles, K, D] float32: κ of each key tile of the sequences, as the lax walk has it.

    Arguments:
      table: [B, key tiles · pages].
      pages: of a tile.
    """
    table = table.reshape(len(table), -1, pages)
    dtype = jnp.dtype(call.pages.dtype)

    def of_tile(table: Array) -> Array:
        facts = jax.tree.map(lambda x: x[table], call.pages.facts)
        return jax.vmap(partial(page_walk.mean_of_pages, dtype=dtype), 1)(facts)

    kappa = jax.vmap(jax.vmap(of_tile))(table).astype(jnp.float32)
    if plan.storage is tile.Storage.PAST_MEAN:
        kappa = jnp.concatenate([kappa[:, :1], kappa[:, :-1]], axis=1)
    return kappa


@dataclass(frozen=True, kw_only=True)
class PagesWalk(Walk):
    """One key head of one query tile, which begins at the query ``start``."""

    start: Index

    @abstractmethod
    def stored(self, j: Index) -> tuple[Array, Array]:
        """[n, D] and [n, E] keys and values of tile j as they are."""

    @abstractmethod
    def packed(self, j: Index, *, with_open: bool) -> PackedTile | None:
        """Tile j of pages of 8 bits, with the open group if asked for; None for other pages."""

    @abstractmethod
    def kappa(self, j: Index) -> Array | None:
        """[1, D] κ of tile j in float32; None where nobody asks."""

    def key(self, j: Index, value_gain: Array | None = None) -> tile.KeyTile:
        return self.key_beneath(j, None, value_gain)

    def key_beneath(self, j: Index, seen: Array | None, value_gain: Array | None) -> tile.KeyTile:
        """Hidden keys may be NaN, since their scores are replaced; hidden values are multiplied."""
        assert value_gain is None  # the lax walk repairs calls that would need one
        packed = self.packed(j, with_open=seen is not None)
        if packed is not None:
            return self._key_of_packed(packed, j, seen is not None)
        k, v = self.stored(j)
        if seen is not None:
            v = tile.zero_unusable(v, self.shown(j))
        kappa = self.kappa(j)
        if kappa is not None:
            kappa = kappa.astype(k.dtype)
        return _in_matrix_rows(tile.key_tile(k, v, None, self.numerics, kappa=kappa))

    def _key_of_packed(self, packed: PackedTile, j: Index, partly: bool) -> tile.KeyTile:
        """`key_beneath` of pages of 8 bits.

        Arguments:
          partly: whether some row does not see the whole tile. Then some keys may be unwritten, and
            some in the open group.
        """
        kappa = self.kappa(j)
        open_at = None
        if partly:
            g = packed.group
            assert self.mask.key_lengths is not None
            open_at = div(self.mask.key_lengths, g) - div(self.key_start(j), g)
        found = unpacked(packed, open_at, kappa)
        v, factors = found.value, found.value_scale
        if partly:
            v = tile.zero_unusable(v, self.shown(j))
            if factors is not None:
                factors = jnp.where(self.shown(j, axis=1), factors, jnp.zeros_like(factors))
        if kappa is not None:
            kappa = kappa.astype(v.dtype)
        key = tile.key_tile(
            found.key,
            v,
            None,
            self.numerics,
            kappa=kappa,
            means=found.means,
            value_scale=factors,
        )
        return _in_matrix_rows(key._replace(usable=found.usable))

    def shown(self, j: Index, axis: int = 0) -> Array:
        """[n, 1] bool, [1, n] along axis 1: the keys of tile j that some row sees."""
        last = jnp.minimum(self.start + self.block_q, self.mask.valid_queries()) - 1
        lo, _ = self.mask.key_interval(jnp.asarray(self.start, jnp.int32))
        _, hi = self.mask.key_interval(last)
        shape = (self.block_kv, 1) if axis == 0 else (1, self.block_kv)
        column = self.key_start(j) + lax.broadcasted_iota(jnp.int32, shape, axis)
        return (column >= lo) & (column < hi)

    def key_start(self, j: Index) -> Index:
        return j * self.block_kv

    def bias(self, start: Index, j: Index) -> None:
        return None

    def array(self, start: Index, j: Index, asks: Array | None = None) -> None:
        return None


def _in_matrix_rows(key: tile.KeyTile) -> tile.KeyTile:
    """The tile with κ, if it has one, in as many equal rows as a matrix operand needs."""
    if key.kappa is None:
        return key
    return key._replace(kappa=jnp.broadcast_to(key.kappa, (_MATRIX_ROWS, key.kappa.shape[1])))


def refusal(call: Call, plan: Plan) -> str | None:
    """None, or the reason why neither kernel can run the call."""
    if call.pages.dtype == "float64":
        return "it has no float64"
    if plan.shift == "paper":
        return "it does not mix keys by the matrix of 'paper'"
    if plan.storage is tile.Storage.LAGGING:
        return "'reference' needs a float32 product: use the shift 'mean', or products='float32'"
    if 0 in call.queries.query.shape:
        return "there is nothing to compute"
    return None


def repaired(
    kernel: Callable[[Call, Plan], Outputs],
    call: Call,
    plan: Plan,
    platform: str,
    largest_log2: float | None = None,
) -> Outputs:
    """The results of ``kernel``, which has no guard; those of the lax walk where queries, keys or
    values are so large that it would need one.

    Arguments:
      platform: what JAX calls the kernel's machines.
      largest_log2: log2 of the largest score that the kernel may have, or None.
    """
    query = call.queries.query
    if not plan.interpret:
        query = only_on(platform, query)
        call = call._replace(queries=call.queries._replace(query=query))
    guarded = guards(plan, query.dtype) or divides_values(plan, query.dtype)
    if not guarded and largest_log2 is None:
        return kernel(call, plan)

    def by_kernel(*arrays: Any) -> Outputs:
        return varying(kernel(call.beside(*arrays), plan), arrays)

    def by_lax(*arrays: Any) -> Outputs:
        return varying(page_walk.attend(*call.beside(*arrays), repairing(plan)), arrays)

    # The walk wants pages in an order of its own: only a branch that is taken puts them into it.
    plain = page_walk.are_plain(call, plan, largest_log2)
    if isinstance(call.pages, PackedPages) and query.dtype == jnp.float16:
        # A key less the mean of its group may be twice as large.
        plain = plain & (jnp.max(call.pages.facts.key_top) < float(jnp.finfo(query.dtype).max) / 2)
    return lax.cond(plain, by_kernel, by_lax, *call.arrays)
