"""`PagedCache`: keys and values of sequences that come, grow, share beginnings and go."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pasa_jax.call import paged
from pasa_jax.core.checks import window
from pasa_jax.core.errors import wrong
from pasa_jax.core.packed import Store, empty_store
from pasa_jax.core.schedule import Schedule
from pasa_jax.implementations.page_walk import Sequences
from pasa_jax.serving._table import Places, Table

Array = jax.Array


class Batch(NamedTuple):
    """The new tokens of one step: T of them in a row, one sequence after another.

    Arguments:
      places: where each is written.
      first, count: [B] int32, where the tokens of each sequence begin, and how many they are.
    """

    places: Places
    first: Array
    count: Array

    @property
    def position(self) -> Array:
        """[T] int32, the place of each token in its sequence; 0 for padding."""
        return self.places.position

    @property
    def last(self) -> Array:
        """[B] int32, where the last token of each sequence stands in the row; 0 where none is."""
        return jnp.maximum(self.first + self.count - 1, 0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PagedCache:
    """Keys and values of B sequences in P pages for each of L layers, made by `empty`.

    One step of a model is `grown` (room for new tokens of any of the sequences: chunks of prompts
    and single tokens in one row), then for each layer `write` and `attend`. `forked`, `freed` and
    `trimmed` share and release pages. Everything is a pytree of fixed shapes for one `jax.jit`;
    donated, nothing is copied.

    Letters as in `pasa_jax.dot_product_attention`; T new tokens of all sequences, n tokens of a
    page.

    Arguments:
      pages: L·P pages; layer l has those from l·P on.
      table: which page holds which tokens; the same for all layers.
      schedule: tile sizes. A tile holds as many whole pages as make its ``block_kv``.
    """

    pages: Store
    table: Table
    schedule: Schedule = field(metadata={"static": True})

    @staticmethod
    def empty(
        sequences: int,
        pages: int,
        page_size: int,
        max_length: int,
        kv_heads: int,
        head_dim: int,
        dtype: Any,
        *,
        layers: int = 1,
        value_head_dim: int | None = None,
        schedule: Schedule | None = None,
        format: str | None = None,
    ) -> PagedCache:
        """A cache of no tokens.

        Arguments:
          sequences, pages, page_size, max_length: B, P (of each layer), n, and the most tokens of
            one sequence.
          kv_heads, head_dim, layers: K, D, L.
          dtype: float16, bfloat16, float32, or float64 under x64.
          value_head_dim: E; default D.
          schedule: default that of the device.
          format: as in `pasa_jax.plugins.KVCache.empty`.

        Raises:
          ValueError: a size, a type or a format that is not allowed.

        >>> PagedCache.empty(2, 8, 16, 64, 2, 32, "bfloat16").table.pages.shape
        (2, 4)
        """
        table = Table.empty(sequences, pages, page_size, max_length)
        value_size = head_dim if value_head_dim is None else value_head_dim
        sizes = {"kv_heads": kv_heads, "head_dim": head_dim, "value_head_dim": value_size}
        sizes |= {"layers": layers}
        name, schedule = paged.of_new_cache(sizes, dtype, format, schedule, max_length)
        of_page = (kv_heads, page_size, head_dim, value_size, name)
        return PagedCache(
            pages=empty_store(
                layers * pages, layers * sequences, schedule.block_kv, *of_page, format
            ),
            table=table,
            schedule=schedule,
        )

    @property
    def layers(self) -> int:
        """L."""
        return self.pages.count // self._per_layer

    @property
    def length(self) -> Array:
        """[B] int32, tokens of each sequence."""
        return self.table.length

    def grown(self, counts: ArrayLike, *, total: int) -> tuple[PagedCache, Batch]:
        """Room for new tokens, and where they go; open pages that are shared are copied first.

        A sequence whose tokens do not fit (no page is free, or it would be too long) gets none of
        them and is lost: `attend` gives NaN for it until it is freed.

        Arguments:
          counts: [B] integers, how many new tokens each sequence has.
          total: T, at least their sum; tokens beyond it are padding.

        Raises:
          ValueError: a wrong shape, type or value; where values are known, also tokens that do
            not fit.
        """
        counts = jnp.asarray(counts)
        table, places = self.table.appended(counts, total=total)
        counts = jnp.maximum(counts.astype(jnp.int32), 0)
        batch = Batch(places, jnp.cumsum(counts, dtype=jnp.int32) - counts, counts)
        layer = jnp.arange(self.layers, dtype=jnp.int32)[:, None]
        source, target = (
            self._of_layer(x, layer).reshape(-1) for x in (places.source, places.target)
        )
        return replace(self, pages=self.pages.copied(source, target), table=table), batch

    def write(self, batch: Batch, key: Array, value: Array, *, layer: Any = 0) -> PagedCache:
        """This cache with the keys and values of a layer at the places of a batch.

        Arguments:
          key, value: [T, K, D], [T, K, E] of the cache's type.
          layer: an int or an int32 array [], below L.

        Raises:
          ValueError: a wrong shape or type.
        """
        tokens = len(batch.position)
        for name, new, old in (("key", key, self.pages.key), ("value", value, self.pages.value)):
            expected = (tokens, old.shape[1], old.shape[3])
            if new.shape != expected:
                raise wrong(name, f"be [T, K, …] = {list(expected)}", new.shape)
            if str(new.dtype) != self.pages.dtype:
                allowed = f"be of the cache's type {self.pages.dtype}"
                raise wrong(name, allowed, new.dtype, "Cast it.")
        layer, places = jnp.asarray(layer, jnp.int32), batch.places
        page, row = self._of_layer(places.page, layer), self._rows(layer)
        row = row.at[places.sequence].get(mode="fill", fill_value=0)
        return replace(self, pages=self.pages.written(page, places.slot, key, value, row))

    def attend(
        self,
        query: Array,
        batch: Batch,
        *,
        layer: Any = 0,
        return_residual: bool = False,
        **options: Any,
    ) -> Any:
        """Attention of new tokens: each sees itself and the tokens before it in its sequence.

        Arguments:
          query: [T, N, D] of the cache's type, of the batch that was written last.
          layer: as in `write`.
          return_residual: also return the log-sum-exp [T, N].
          options: ``scale``, ``local_window_size``, ``logits_soft_cap``, ``sinks``, ``shift``,
            ``beta``, ``precision``, ``interpret``, as in `pasa_jax.dot_product_attention`, and
            ``implementation``: "pallas_tpu", "pallas_gpu", "lax", or None for the kernel of the
            schedule's target, if it supports the call, else "lax". Where ``"auto"`` would choose by
            all keys, it is ``"mean"``.

        Returns:
          [T, N, E] of query's type. Padding gives 0. The tokens of a sequence that is lost, or that
          refers to a page that is out of range or free, give NaN; no other sequence is touched.
          There is no gradient.

        Raises:
          ValueError: a wrong shape or type, or an unknown option.
        """
        for name in options:
            if name not in paged.OPTIONS:
                raise wrong("options", f"be among {', '.join(paged.OPTIONS)}", name)
        if query.ndim != 3 or len(query) != len(batch.position):
            raise wrong("query", f"be [T, N, D] with T = {len(batch.position)}", query.shape)
        layer = jnp.asarray(layer, jnp.int32)
        table = self._of_layer(self.table.pages, layer)
        row = self._rows(layer)
        sequences = Sequences(batch.first, batch.count, self.length, table, row)
        most = len(query)
        out, lse = paged.attend(self.pages, query, sequences, self.schedule, most, **options)
        unfit = ~self._valid(batch, options.get("local_window_size"))
        unfit = unfit.at[batch.places.sequence].get(mode="fill", fill_value=False)
        out = jnp.where(unfit[:, None, None], jnp.full_like(out, jnp.nan), out)
        lse = jnp.where(unfit[:, None], jnp.full_like(lse, jnp.nan), lse)
        return (out, lse) if return_residual else out

    def forked(self, source: ArrayLike, target: ArrayLike, *, length: ArrayLike = -1) -> PagedCache:
        """Sequence ``target``, which has no tokens, begins as ``source`` does and shares its pages.

        Arguments:
          source, target: [] integers.
          length: how many tokens of the source the target begins with; -1 for all.

        Raises:
          ValueError: as `Table.forked`.
        """
        table = self.table.forked(source, target, length=length)
        source, target = jnp.asarray(source, jnp.int32), jnp.asarray(target, jnp.int32)
        layer, length = jnp.arange(self.layers, dtype=jnp.int32), table.length[target]
        page = self._of_layer(table.pages[target, length // table.page_size], layer)
        row = self._rows(layer)
        to = jnp.where(table.lost[target], -1, row[:, target])
        lengths = (length, self.table.length[source])
        pages = self.pages.begun_as(to, page, row[:, source], *lengths)
        return replace(self, pages=pages, table=table)

    def freed(self, which: ArrayLike) -> PagedCache:
        """The sequences ``which`` [B] bool have no tokens; pages of theirs alone are free."""
        return replace(self, table=self.table.freed(which))

    def trimmed(self, window: ArrayLike) -> PagedCache:
        """Pages that no later query sees are free, where each sees ``window`` tokens before it."""
        return replace(self, table=self.table.trimmed(window))

    @property
    def _per_layer(self) -> int:
        """P."""
        return len(self.table.references)

    def _rows(self, layer: Array) -> Array:
        """[..., B] int32, of ``layer`` [...]: where the sequences' open groups lie."""
        sequences = len(self.length)
        row = jnp.arange(sequences, dtype=jnp.int32)
        return row + layer[..., None] * jnp.int32(sequences)

    def _of_layer(self, page: Array, layer: Array) -> Array:
        """The pages of a layer; one that is out of range stays so."""
        there = (page >= 0) & (page < self._per_layer)
        return jnp.where(there, page + layer * self._per_layer, self.pages.count)

    def _valid(self, batch: Batch, reach: Any) -> Array:
        """[B] bool: whose tokens are all there that the queries see."""
        n, lo = self.table.page_size, jnp.zeros_like(self.length)
        seen = window(reach)
        if seen is not None:
            lo = jnp.maximum(self.length - batch.count - seen[0], 0) // n
        return self.table.valid(lo, (self.length + n - 1) // n)
