"""How the tiles of one key head are walked: which there are, in which order, what each row sees.

Every walker is a `Walk`: the lax loops slice their tiles out of arrays, the Pallas kernels read
them out of refs. `tile` computes within a tile; the order of the tiles stands here. The G query
heads of one key head share a tile: its rows are stacked [G, positions].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pasa_jax.core import dropout as _dropout
from pasa_jax.core import tile
from pasa_jax.core.mask import Index, KeyRange, Mask, div, where
from pasa_jax.core.plan import Plan

if TYPE_CHECKING:
    from pasa_jax.core.shapes import Bool, Column, Float, Int

Array = jax.Array
Step = Callable[[Index, Array | None, Any], Any]


class Listed(NamedTuple):
    """The tiles that a tile of the other side visits.

    Arguments:
      at: the t-th of them, by t.
      partials: how many need a mask; they come first.
      count: how many there are.
      asks: bool by t, whether a block mask's function is asked; None: each element knows.
    """

    at: Callable[[Index], Index]
    partials: Index
    count: Index
    asks: Callable[[Index], Array] | None = None


class Rows(NamedTuple):
    """The results of a query tile, in the product's type."""

    out: Array  # [R, E]
    lse: Array  # [R, 1]
    m: Array  # [R, 1]
    l: Array  # noqa: E741  [R, 1]


@dataclass(frozen=True, kw_only=True)
class Walk(ABC):
    """One key head cut into tiles.

    Arguments:
      mask: of this head.
      groups: G, the query heads that share the key head.
      block_q: positions of a query tile, each of which is G rows.
      value_size: E.
    """

    mask: Mask
    plan: Plan
    numerics: tile.Numerics
    groups: int
    block_q: int
    value_size: int

    # Where a walker's tiles come from.

    @abstractmethod
    def query(self, start: Index) -> tile.QueryTile:
        """The rows of the query tile at ``start``."""

    @abstractmethod
    def key(self, j: Index, value_gain: Array | None = None) -> tile.KeyTile:
        """Key tile j, values multiplied by ``value_gain`` [] (None: 1), to keep P·V in range."""

    def key_beneath(
        self, j: Index, seen: Bool[Array, "R n"] | None, value_gain: Array | None
    ) -> tile.KeyTile:
        """`key` for rows whose mask is ``seen`` [R, n] (None: they see the whole tile). A walker of
        which hidden keys may be anything makes zeros of them.
        """
        del seen
        return self.key(j, value_gain)

    @abstractmethod
    def key_start(self, j: Index) -> Index:
        """The key at which tile j starts."""

    @abstractmethod
    def bias(self, start: Index, j: Index) -> Float[Array, "R n"] | None:
        """[R, n] bias of a tile."""

    @abstractmethod
    def array(self, start: Index, j: Index, asks: Array | None = None) -> Bool[Array, "R n"] | None:
        """[R, n] bool of the mask's data and functions, or None.

        Arguments:
          asks: as in `Listed`.
        """

    @abstractmethod
    def sinks(self) -> Column | None:
        """[R, 1] the sink of each row's head."""

    def typed(self, carry: Any) -> Any:
        """``carry`` as a loop over this head's tiles must start with it."""
        return carry

    def visits(self, start: Index) -> Listed | None:
        """The key tiles that the rows at ``start`` visit, where a list says so."""
        return None

    def row_visits(self, j: Index) -> Listed | None:
        """The query tiles that visit key tile j, where a list says so."""
        return None

    def low_rank(self, start: Index, j: Index) -> Float[Array, "R n"] | None:
        """[R, n] a bias of low rank of a tile, or None."""
        return None

    def modified(self, start: Index, j: Index) -> tile.Modify | None:
        """What changes the scores of a tile [R, n] by the caller's ``score_mod``, or None."""
        return None

    # What each row sees.

    @property
    def block_kv(self) -> int:
        return self.plan.schedule.block_kv

    @property
    def transposed(self) -> bool:
        return self.numerics.dialect.transposed

    def positions(self, start: Index) -> Int[Array, "R 1"]:
        """[R, 1] query position of each row; [1, R] where tiles are transposed."""
        if self.transposed:
            row = lax.broadcasted_iota(jnp.int32, (1, self.block_q), 1)
            return start + (row if self.groups == 1 else jnp.tile(row, (1, self.groups)))
        return self.position_column(start)

    def position_column(self, start: Index) -> Int[Array, "R 1"]:
        """[R, 1] query position of each row, however tiles lie."""
        shape = (self.groups, self.block_q, 1)
        return start + lax.broadcasted_iota(jnp.int32, shape, 1).reshape(-1, 1)

    def in_use(self, start: Index) -> Bool[Array, "R 1"]:
        """[R, 1] bool: False for rows of padding."""
        lengths, row = self.mask.query_lengths, self.positions(start)
        return jnp.ones_like(row, bool) if lengths is None else row < lengths

    def seen(self, start: Index, j: Index, asks: Array | None = None) -> Bool[Array, "R n"]:
        """[R, n] bool: the mask of one tile; False for keys that belong to another tile.

        [n, R] where tiles are transposed, as are bias, array and segments.

        Arguments:
          asks: as in `Listed`.
        """
        n = self.block_kv
        shape, axis = ((n, 1), 0) if self.transposed else ((1, n), 1)
        columns = self.key_start(j) + lax.broadcasted_iota(jnp.int32, shape, axis)
        seen = self.mask.visible(self.positions(start), columns)
        if self.mask.key_length % n:
            seen = seen & (columns >= j * n)
        array = self.array(start, j, asks)
        return seen if array is None else seen & array

    def kept(self, start: Index, j: Index) -> Bool[Array, "R n"] | None:
        """[R, n] bool: the weights of one tile that dropout keeps, or None: all."""
        if self.mask.dropout is None:
            return None
        rows = start + jnp.arange(self.block_q, dtype=jnp.int32)
        columns = self.key_start(j) + jnp.arange(self.block_kv, dtype=jnp.int32)
        if self.mask.dropout_origin is not None:
            rows = rows + self.mask.dropout_origin[0]
            columns = columns + self.mask.dropout_origin[1]
        rate = self.plan.dropout_rate
        return _dropout.kept(self.mask.dropout, self.groups, rows, columns, rate)

    # The loop over key tiles.

    def key_range(self, start: Index) -> KeyRange:
        return self.mask.key_range(start, start + self.block_q, self.block_kv)

    def over_keys(self, start: Index, body: Step, carry: Any) -> Any:
        """Folds ``body(j, mask, carry)`` over the key tiles that the rows at ``start`` see.

        ``mask`` is [R, n] bool, or None where the rows see the whole tile.
        """
        listed, seen = self.visits(start), partial(self.seen, start)
        if listed is not None:
            return self._over_list(listed, seen, body, carry)
        ends = self.mask.any_partial(self.block_kv)
        return self._over(self.key_range(start), ends, seen, body, carry)

    def _over_list(
        self, listed: Listed, seen: Callable[..., Bool[Array, "R n"]], body: Step, carry: Any
    ) -> Any:
        """Folds ``body(i, mask, carry)`` over the tiles of a list; seen(i, asks) is a mask."""

        def masked(t: Index, carry: Any) -> Any:
            asks = None if listed.asks is None else listed.asks(t)
            i, of_tile = listed.at(t), partial(seen, asks=asks)
            if not self.mask.tested:
                return body(i, of_tile(i), carry)
            return self.masked_step(i, of_tile, body, carry)

        def full(t: Index, carry: Any) -> Any:
            return body(listed.at(t), None, carry)

        carry = _loop(jnp.int32(0), listed.partials, masked, self.typed(carry))
        return _loop(listed.partials, listed.count, full, carry, self.plan.schedule.unroll)

    def masked_step(
        self, i: Index, seen: Callable[[Index], Bool[Array, "R n"]], body: Step, carry: Any
    ) -> Any:
        """``body(i, mask, carry)``; not where data or functions hide the whole tile."""
        mask = seen(i)
        if not self.mask.data_dependent:
            return body(i, mask, carry)
        some = jnp.max(mask.astype(jnp.int32)) > 0  # Triton has no reduction of bools
        return lax.cond(some, lambda c: body(i, mask, c), lambda c: c, carry)

    def query_range(self, j: Index) -> KeyRange:
        start = self.key_start(j)
        return self.mask.query_range(start, start + self.block_kv, self.block_q)

    def over_rows(self, j: Index, body: Step, carry: Any) -> Any:
        """Folds ``body(i, mask, carry)`` over the query tiles that see keys of tile j.

        ``mask`` is as in `over_keys`. Query tile i starts at i·block_q, and key tile j at j·n.
        """

        def seen(i: Index, asks: Array | None = None) -> Bool[Array, "R n"]:
            return self.seen(i * self.block_q, j, asks)

        listed = self.row_visits(j)
        if listed is not None:
            return self._over_list(listed, seen, body, carry)
        padded = self.mask.query_lengths is not None or self.mask.query_length % self.block_q != 0
        ends = padded or self.mask.any_partial(self.block_kv)
        return self._over(self.query_range(j), ends, seen, body, carry)

    def _over(
        self,
        r: KeyRange,
        ends: bool,
        seen: Callable[[Index], Bool[Array, "R n"]],
        body: Step,
        carry: Any,
    ) -> Any:
        """Folds ``body(i, mask, carry)`` over the tiles of a range; seen(i) is a tile's mask.

        Arguments:
          ends: whether there may be partial tiles.
        """
        carry, unroll = self.typed(carry), self.plan.schedule.unroll

        def masked(i: Index, carry: Any) -> Any:
            return self.masked_step(i, seen, body, carry)

        def full(i: Index, carry: Any) -> Any:
            return body(i, None, carry)

        def of_ends(t: Index, carry: Any) -> Any:  # the partial tiles of both ends, in one loop
            i = r.lo + t
            return masked(where(i < r.full_lo, i, i - r.full_lo + r.full_hi), carry)

        if all(isinstance(x, int) for x in r) and r.hi - r.lo <= unroll:
            for i in range(r.lo, r.hi):
                carry = (full if r.full_lo <= i < r.full_hi else masked)(i, carry)
            return carry
        carry = _loop(r.full_lo, r.full_hi, full, carry, unroll)
        if ends:
            carry = _loop(0, r.full_lo - r.lo + r.hi - r.full_hi, of_ends, carry)
        return carry

    # One query tile.

    def finished(self, start: Index) -> Rows:
        """The results of the query tile at ``start``."""
        query = self.query(start)
        state, _ = self.absorb(start, query, self.begin())
        return self.close(start, query, state)

    def begin(self) -> tuple[tile.State, Array]:
        """The state before any key, and the number of tiles seen, 0."""
        rows = self.groups * self.block_q
        return tile.initial_state(rows, self.value_size, self.numerics), jnp.float32(0)

    def absorb(
        self, start: Index, query: tile.QueryTile, carry: tuple[tile.State, Array]
    ) -> tuple[tile.State, Array]:
        """``carry`` after the key tiles that the rows see."""

        return self.over_keys(start, partial(self.fold, start, query), carry)

    def fold(
        self,
        start: Index,
        query: tile.QueryTile,
        j: Index,
        seen: Bool[Array, "R n"] | None,
        carry: tuple[tile.State, Array],
    ) -> tuple[tile.State, Array]:
        """``carry`` after key tile j, whose mask is ``seen`` [R, n] (None: all is seen)."""
        state, count = carry[0], carry[1] + 1
        key = self.key_beneath(j, seen, query.value_gain)
        s = self.scores(start, query, key, state, j, seen)
        kept = self.kept(start, j)
        return tile.update(state, s, query, key, count, self.numerics, kept), count

    def scores(
        self,
        start: Index,
        query: tile.QueryTile,
        key: tile.KeyTile,
        state: tile.State,
        j: Index,
        seen: Bool[Array, "R n"] | None,
        *,
        with_slope: bool = False,
    ) -> tile.Scores:
        """The scores of a tile, see `tile.scores`."""
        return tile.scores(
            query,
            key,
            state,
            seen,
            self.bias(start, j),
            self.numerics,
            modify=self.modified(start, j),
            added=self.low_rank(start, j),
            with_slope=with_slope,
        )

    def close(self, start: Index, query: tile.QueryTile, state: tile.State) -> Rows:
        """The results of a query tile that has seen all its keys."""
        state = tile.settle(state, self.numerics)
        sinks = self.sinks()
        only_sink = state.l == 0
        if sinks is not None:
            state = tile.add_sink(state, sinks, self.numerics, query.guard)
        out, lse = tile.finish(state, self.numerics, query.guard, query.value_gain)
        if sinks is not None:  # dividing by the guard may have cost a sink its last digits
            lse = jnp.where(only_sink, sinks.astype(lse.dtype), lse)
        if self.mask.query_lengths is not None:
            used = self.in_use(start)
            out = tile.zero_unusable(out, used)
            lse = jnp.where(used.reshape(lse.shape), lse, tile.lowest(lse.dtype))
        return Rows(out, lse, state.m, state.l)

    def rounded(self, out: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
        """``out`` rounded to ``dtype``, and the rounding error."""
        return tile.rounded(out, dtype, clip=self.plan.promises_finite)


def _loop(
    lo: Index, hi: Index, body: Callable[[Index, Any], Any], carry: Any, unroll: int = 1
) -> Any:
    """Folds ``body(j, carry)`` over [lo, hi), with ``unroll`` tiles in each step of the loop.

    A compiler may then overlap the products of one tile with the softmax of another. Up to
    ``unroll`` tiles need no loop at all: compilers schedule straight-line code best.
    """
    if isinstance(lo, int) and isinstance(hi, int) and hi - lo <= unroll:
        for j in range(lo, hi):
            carry = body(j, carry)
        return carry

    def step(t: Array, carry: Any) -> Any:
        for u in range(unroll):
            carry = body(lo + t.astype(jnp.int32) * unroll + u, carry)
        return carry

    steps = div(hi - lo, unroll)
    carry = lax.fori_loop(0, steps, step, carry)
    return carry if unroll == 1 else _loop(lo + steps * unroll, hi, body, carry)
