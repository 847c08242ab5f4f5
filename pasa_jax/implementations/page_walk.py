"""Attention over keys in pages: the walk of one key head of one sequence, and the loop over all.

The key heads of a sequence are walked at once, as a page holds them side by side; sequences one
after another, each as far as its own keys reach.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pasa_jax.core import tile
from pasa_jax.core.guard import (
    divides_values,
    excess,
    gain_of_values,
    guards,
    log2_norm,
    powers_of_guard,
)
from pasa_jax.core.heads import varying
from pasa_jax.core.mask import Index, Mask, div
from pasa_jax.core.operands import Operands
from pasa_jax.core.packed import Store
from pasa_jax.core.pages import PageFacts, for_each
from pasa_jax.core.plan import Plan
from pasa_jax.core.prepare import HeadFacts
from pasa_jax.core.tile import Storage, lowest, mean_key, wide_type
from pasa_jax.implementations.head_walk import HeadWalk

if TYPE_CHECKING:
    from pasa_jax.core.shapes import Bool, Float

Array = jax.Array
_FEW_QUERIES = 32  # of a sequence


class Sequences(NamedTuple):
    """The sequences of a call. Their queries lie one after another in one array [tokens, …].

    Arguments:
      first, count: [B] int32, where the queries of each begin, and how many they are.
      length: [B] int32, how many keys each has, those of its queries included.
      table: [B, M] int32, the page of each block of keys.
      row: [B] int32, which open group of `PackedPages` each has.
    """

    first: Array
    count: Array
    length: Array
    table: Array
    row: Array | None = None


class Queries(NamedTuple):
    """What is asked: queries, with the sinks of their heads and their scale.

    Arguments:
      query: [tokens, N, D].
      sinks: [N], or None.
      scale: [].
    """

    query: Array
    sinks: Array | None
    scale: Array


class Call(NamedTuple):
    """What the pages, the queries and the sequences of a call are.

    Arguments:
      most: no sequence has more queries.
      window: as in `Mask`.
    """

    pages: Store
    queries: Queries
    sequences: Sequences
    most: int
    window: tuple[int, int] | None

    @property
    def groups(self) -> int:
        """G."""
        return self.queries.query.shape[1] // self.pages.key.shape[1]

    @property
    def arrays(self) -> tuple[Store, Queries, Sequences]:
        """What is not static."""
        return self.pages, self.queries, self.sequences

    def beside(self, pages: Store, queries: Queries, sequences: Sequences) -> Call:
        """The call with other arrays."""
        return Call(pages, queries, sequences, self.most, self.window)


class Outputs(NamedTuple):
    """The results of all tokens, in the product's type."""

    out: Array  # [tokens, N, E]
    lse: Array  # [tokens, N]


class Sizes(NamedTuple):
    """What was found of the keys that one sequence sees, for each key head."""

    key: Array  # [K] log2 of the largest norm of a key
    shifted: Array  # [K] and of a key less what is taken off it
    value_gain: Array  # [K] the power of two by which values are multiplied
    plain: Array  # [] bool: whether neither scores nor sums of values can leave their range


@dataclass(frozen=True, kw_only=True)
class PageWalk(HeadWalk):
    """One key head of one sequence. ``head`` has the queries of all sequences, and no keys.

    Arguments:
      pages: of this head, arrays [P, n, …].
      sequence: the one.
      sizes: of this head, where scores or sums of values may leave their range; else None.
    """

    pages: Store
    sequence: Sequences
    sizes: Sizes | None = None

    @property
    def query_tiles(self) -> Index:
        return div(self.mask.valid_queries() + self.block_q - 1, self.block_q)

    def typed(self, carry: Any) -> Any:
        return varying(carry, (self.head, self.mask, self.pages, self.sequence))

    def query_start(self, i: Array) -> Index:
        return i.astype(jnp.int32) * self.block_q

    def key_start(self, j: Index) -> Index:
        return j * self.block_kv

    def rows(self, x: Array, start: Index) -> Array:
        return super().rows(x, self.sequence.first + start)

    def put_rows(self, buffer: Array, x: Array, start: Index, which: Array | None) -> Array:
        if which is not None:
            x = jnp.where(which, x, self.rows(buffer, start))
        return super().put_rows(buffer, x, self.sequence.first + start, None)

    def query(self, start: Index) -> tile.QueryTile:
        q = tile.zero_unusable(self.rows(self.head.query, start), self.in_use(start))
        scale, guard, value_gain = self.head.scale, None, None
        if self.sizes is not None:
            of_keys, value_gain = (self.sizes.key, self.sizes.shifted), self.sizes.value_gain
            if guards(self.plan, q.dtype):
                of_q = log2_norm(q)[:, None]
                guard = powers_of_guard(of_q, *of_keys, scale, self.plan, q.dtype)
        query = tile.query_tile(q, self.plan.gain(scale), guard, self.numerics)
        return query._replace(value_gain=value_gain)

    def raw_keys(
        self, j: Index
    ) -> tuple[Float[Array, "n D"], Float[Array, "n E"], Bool[Array, "n 1"]]:
        n, size = self._page_size, self.block_kv
        start = j * size % n if size < n else jnp.int32(0)
        tiles = [self.pages.tile(page, start, min(n, size)) for page in self._pages_of(j)]
        k, v = (jnp.concatenate(x) for x in zip(*tiles, strict=True))
        return k, v, k[:, :1] == k[:, :1]

    def key_beneath(
        self, j: Index, seen: Bool[Array, "R n"] | None, value_gain: Array | None
    ) -> tile.KeyTile:
        k, v, _ = self.raw_keys(j)
        if seen is not None:  # the last tokens are in a tile that is partly seen
            one = self.sequence
            k, v = self.pages.with_open(k, v, self.key_start(j), one.length, one.row)
        extra: dict[str, Any] = {}
        paper = self.numerics.storage is Storage.PAPER
        if paper:  # M mixes the keys of a block, so that none may be NaN
            blocks = self.plan.paper_blocks(self.block_kv)
            extra["matrix"] = jnp.asarray(blocks.matrix, jnp.float16)
            extra["weights"] = jnp.asarray(blocks.weights)
        if self.numerics.storage.uses_kappa:
            extra["kappa"] = self.kappa(j)
        shown = None if seen is None else jnp.any(seen, axis=0)[:, None]
        if paper:
            finite = k[:, :1] == k[:, :1]
            shown = finite if shown is None else finite & shown
        return tile.key_tile(k, v, shown, self.numerics, value_gain=value_gain, **extra)

    def kappa(self, j: Index) -> Float[Array, "1 D"]:
        """κ of key tile j: the mean of what is written in its pages (eq. 7), or in those of the
        tile before it (eq. 8).
        """
        if self.numerics.storage is Storage.PAST_MEAN:
            j = jnp.maximum(j - 1, 0)
        pages = jnp.stack(self._pages_of(j))
        facts = jax.tree.map(lambda x: x[pages], self.pages.facts)
        return mean_of_pages(facts, jnp.dtype(self.pages.dtype))[None]

    @property
    def _page_size(self) -> int:
        return self.pages.key.shape[1]

    def _pages_of(self, j: Index) -> list[Array]:
        """The pages of tile j, or the page of which it is a part."""
        n, size = self._page_size, self.block_kv
        if size < n:
            return [self.sequence.table[div(jnp.asarray(j, jnp.int32), n // size)]]
        each = size // n
        pages = lax.dynamic_slice_in_dim(self.sequence.table, j * each, each)
        return [pages[i] for i in range(each)]


def mean_of_pages(facts: PageFacts, dtype: jnp.dtype) -> Float[Array, " D"]:
    """[D] the mean of the keys of some pages of one head, of their type.

    Arguments:
      facts: each with the pages as its first axis, and no axis of heads.
    """
    kappa = mean_key(jnp.sum(facts.total, axis=0), jnp.sum(facts.count), facts.total.dtype)
    # The sum may not be finite, nor what is less the mean.
    top = jnp.max(facts.key_top)
    fits = jnp.all(jnp.isfinite(kappa)) & (top < float(jnp.finfo(dtype).max) / 4)
    return jnp.where(fits, kappa, jnp.zeros_like(kappa)).astype(dtype)


def mask_of(one: Sequences, most: int, window: tuple[int, int] | None, n: int) -> Mask:
    """What the queries of one sequence see, which has pages of n tokens.

    Arguments:
      most, window: as of `attend`.
    """
    return Mask(
        query_length=most,
        key_length=len(one.table) * n,
        is_causal=True,
        causal_alignment="bottom_right",
        window=window,
        query_lengths=one.count,
        key_lengths=one.length,
    )


def in_order(pages: Store, table: Array, length: Array, row: Array | None) -> tuple[Array, Array]:
    """Keys and values [B, M·n, K, …] of the sequences, in the type that the cache is of.

    Arguments: as of `Sequences`.
    """

    def of_head(
        pages: Store, table: Array, length: Array, row: Array | None
    ) -> tuple[Array, Array]:
        parts = lax.map(lambda page: pages.tile(page, jnp.int32(0), pages.key.shape[1]), table)
        k, v = (x.reshape(-1, x.shape[-1]) for x in parts)
        return pages.with_open(k, v, jnp.int32(0), length, row)

    of_heads = jax.vmap(of_head, (1, None, None, None), 1)
    found = jax.vmap(of_heads, (None, 0, 0, None if row is None else 0))(pages, table, length, row)
    k, v = (x.astype(pages.dtype) for x in found)
    return k, v


def are_plain(call: Call, plan: Plan, largest_log2: float | None = None) -> Array:
    """[] bool: True only where no score and no sum of values can leave its range.

    Arguments:
      largest_log2: log2 of what no score may exceed, or None.
    """
    pages, queries, sequences = call.arrays
    n, dtype = pages.page_size, queries.query.dtype
    table = jnp.clip(sequences.table, 0, pages.count - 1)

    def visited(one: Sequences) -> Array:
        return _visited(one, mask_of(one, call.most, call.window, n), n)

    token = jnp.arange(len(queries.query), dtype=jnp.int32)[:, None]
    own = (token >= sequences.first) & (token < sequences.first + sequences.count)
    of_q = jnp.where(jnp.any(own, axis=1)[:, None], log2_norm(queries.query), -jnp.inf)
    of_q = jnp.max(of_q, axis=0, initial=-jnp.inf)
    seen = jax.vmap(visited)(sequences)
    sizes = _sizes(pages.facts, of_q, table, seen, queries.scale, plan, dtype)
    if largest_log2 is None:
        return sizes.plain
    of_scale = jnp.log2(jnp.abs(queries.scale.astype(jnp.float32)))
    of_rows = jnp.max(of_q.reshape(len(sizes.key), -1), axis=1)
    return sizes.plain & jnp.all(of_rows + sizes.shifted + of_scale < largest_log2)


def attend(
    pages: Store,
    queries: Queries,
    sequences: Sequences,
    most: int,
    window: tuple[int, int] | None,
    plan: Plan,
) -> Outputs:
    """Causal attention of the last tokens of each sequence over all of its keys.

    A query that belongs to no sequence has output 0 and the lowest log-sum-exp.

    Arguments:
      most: no sequence has more queries.
      window: as in `Mask`.
      plan: adapted to the lax walk. A tile is a part of a page or some whole ones, of about
        ``block_kv`` keys; those of one row in a long sequence are larger.
    """
    n, (tokens, heads, size) = pages.page_size, queries.query.shape
    kv_heads, groups = pages.key.shape[1], heads // pages.key.shape[1]
    # Sequences of a few queries each do not pay for the tile of a long one.
    usual_rows = max(_FEW_QUERIES, 4 * -(-tokens // len(sequences.first)))
    block_q = max(1, min(plan.schedule.block_q // groups, most, usual_rows))
    blocks = sequences.table.shape[1]
    keys = (plan.schedule.block_kv, _keys_of_few_rows(plan, groups))
    usual, long = (_with_tiles(plan, x, n, blocks) for x in keys)
    long_tile = long.schedule.block_kv
    table = jnp.pad(sequences.table, ((0, 0), (0, -blocks % max(1, long_tile // n))))
    sequences = sequences._replace(table=jnp.clip(table, 0, pages.count - 1))
    # Rows are cut out of these by whole tiles.
    spare = 0 if block_q == 1 else block_q
    query = jnp.pad(queries.query, ((0, spare), (0, 0), (0, 0)))
    query = query.reshape(-1, kv_heads, groups, size)
    wide = wide_type(query.dtype)
    of_q = log2_norm(queries.query)

    def of_sequence(b: Array, outputs: Outputs) -> Outputs:
        one = jax.tree.map(lambda x: x[b], sequences)
        mask = mask_of(one, most, window, n)
        token = jnp.arange(tokens, dtype=jnp.int32)[:, None]
        own = (token >= one.first) & (token < one.first + one.count)
        of_rows = jnp.max(jnp.where(own, of_q, -jnp.inf), axis=0)
        at = (one.table, _visited(one, mask, n))
        sizes = _sizes(pages.facts, of_rows, *at, queries.scale, plan, query.dtype)

        def walked(block_q: int, plan: Plan, outputs: Outputs, careful: bool = False) -> Outputs:
            def of_head(
                pages: Store,
                query: Array,
                sinks: Array | None,
                sizes: Sizes,
                outputs: Outputs,
            ) -> Outputs:
                head = Operands(query, *[None] * 3, sinks, queries.scale)  # type: ignore[arg-type]
                walk = PageWalk(
                    mask=mask,
                    plan=plan,
                    numerics=plan.numerics(plan.schedule.block_kv),
                    groups=groups,
                    block_q=block_q,
                    value_size=pages.value.shape[-1],
                    head=head,
                    facts=_NO_FACTS,
                    pages=pages,
                    sequence=one,
                    sizes=sizes if careful else None,
                )
                return _of_head(walk, outputs)

            sinks = queries.sinks
            sinks = None if sinks is None else sinks.reshape(kv_heads, groups)
            of_sizes = Sizes(0, 0, 0, None)  # type: ignore[arg-type]
            axes = (1, 1, None if sinks is None else 0, of_sizes, 1)
            return jax.vmap(of_head, axes, 1)(pages, query, sinks, sizes, outputs)

        branches = [partial(walked, block_q, usual, careful=True), partial(walked, block_q, usual)]
        which = sizes.plain.astype(jnp.int32)
        one_row = sizes.plain & (one.count == 1)
        if block_q > 1:  # a tile of many rows would be computed for one
            which = jnp.where(one_row, jnp.int32(len(branches)), which)
            branches.append(partial(walked, 1, usual))
        if long_tile > usual.schedule.block_kv:
            keys = one.length if window is None else jnp.minimum(one.length, window[0] + 1)
            which = jnp.where(one_row & (keys > long_tile), jnp.int32(len(branches)), which)
            branches.append(partial(walked, 1, long))
        return lax.switch(which, branches, outputs)

    rows = query.shape[:3]
    outputs = Outputs(
        out=jnp.zeros((*rows, pages.value.shape[-1]), wide),
        lse=jnp.full(rows, lowest(wide), wide),
    )
    outputs = varying(outputs, (pages, queries, sequences))
    outputs = for_each(sequences.count > 0, lambda outputs, b: of_sequence(b, outputs), outputs)
    return jax.tree.map(lambda x: x[:tokens].reshape(tokens, heads, *x.shape[3:]), outputs)


def _keys_of_few_rows(plan: Plan, rows: int) -> int:
    """The keys of a tile of few rows, in a long sequence."""
    schedule = plan.schedule  # where keys have a mean, a tile has one
    return schedule.keys_beside(rows) if plan.storage.keeps_keys else schedule.block_kv


def _with_tiles(plan: Plan, keys: int, n: int, blocks: int) -> Plan:
    """The plan with tiles of about so many ``keys``: a part of a page of n keys, or whole pages, of
    which a sequence has ``blocks``.
    """
    if keys < n:
        parts = next(x for x in range(-(-n // keys), n + 1) if n % x == 0)
        keys = n // parts
    else:
        keys = n * whole_pages(keys, n, blocks)
    return replace(plan, schedule=replace(plan.schedule, block_kv=keys))


def whole_pages(keys: int, n: int, blocks: int) -> int:
    """How many pages of n keys a tile of at most so many ``keys`` has, or one: a power of two, for
    which a table of whole tiles of any size has room. A sequence has ``blocks`` pages.
    """
    pages = max(1, min(keys // n, blocks))
    return 1 << (pages.bit_length() - 1)


_NO_FACTS = HeadFacts(usable=None, kappa=None, chosen=None, guard=None, value_gain=None)  # type: ignore[arg-type]


def _of_head(walk: PageWalk, outputs: Outputs) -> Outputs:
    """The outputs [tokens, G, …] of a head with those of one sequence."""

    def query_tile(i: Array, outputs: Outputs) -> Outputs:
        start = walk.query_start(i)
        rows = walk.finished(start)
        which = None if walk.block_q == 1 else walk.in_use(start)
        return Outputs(
            out=walk.put_rows(outputs.out, rows.out.astype(outputs.out.dtype), start, which),
            lse=walk.put_rows(outputs.lse, rows.lse.astype(outputs.lse.dtype), start, which),
        )

    return walk.over_queries(query_tile, outputs)


def _visited(one: Sequences, mask: Mask, n: int) -> Array:
    """[M] bool: the blocks of a sequence, of n keys each, that some query of it sees."""
    r = mask.key_range(jnp.int32(0), one.count, n)
    block = jnp.arange(len(one.table), dtype=jnp.int32)
    return (block >= r.lo) & (block < r.hi)


def _sizes(
    facts: PageFacts,
    of_q: Array,
    table: Array,
    visited: Array,
    scale: Array,
    plan: Plan,
    dtype: jnp.dtype,
) -> Sizes:
    """What the pages that are visited say of their keys.

    Arguments:
      of_q: [N] log2 of the largest norm of a query.
      table, visited: of one shape, pages, and bool: which of them some query sees.
    """

    def largest(x: Array, least: float) -> Array:  # [P, K] -> [K]
        x = jnp.where(visited[..., None], x[table], least)
        return jnp.max(x, axis=range(visited.ndim))

    key = largest(facts.key_norm, -jnp.inf)
    as_they_are = plan.storage.keeps_keys or plan.storage is Storage.LAGGING
    shifted = key + float(not as_they_are)  # at most twice as long
    value_gain = jnp.ones(key.shape, facts.value_top.dtype)
    plain = jnp.bool_(True)
    if divides_values(plan, dtype):
        value_gain = gain_of_values(largest(facts.value_top, 0), plan)
        plain = plain & jnp.all(value_gain == 1)
    if guards(plan, dtype):
        of_rows = of_q.reshape(len(key), -1)
        beyond = excess(of_rows, key[:, None], shifted[:, None], scale, plan, dtype)
        plain = plain & jnp.all(beyond <= 0)
    return Sizes(key, shifted, value_gain, plain)
