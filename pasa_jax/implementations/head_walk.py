"""One key head in memory, cut into tiles, and the loop over all key heads.

One key head with its G query heads is one problem of plain 2-D arrays, so that keys and values are
never repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from pasa_jax.core import bits, tile
from pasa_jax.core.bound import bound_of
from pasa_jax.core.heads import heads_at_once, varying
from pasa_jax.core.mask import Index, Mask, div, minimum, slice_tile
from pasa_jax.core.mods import Data
from pasa_jax.core.operands import Factors, Operands, fold_heads
from pasa_jax.core.plan import Plan
from pasa_jax.core.prepare import HeadFacts, prepare
from pasa_jax.core.visits import Visits, visits
from pasa_jax.core.walk import Listed, Walk

if TYPE_CHECKING:
    from pasa_jax.core.shapes import Bool, Float, Shaped

Array = jax.Array

_FEW_TILES = 2  # of a head: each is looked at
_MANY_TILES = 16  # of queries: their keys are cleaned once for all of them
_FEW_ROWS = 16  # what is made of keys costs as much as their products


@dataclass(frozen=True, kw_only=True)
class HeadWalk(Walk):
    """One key head in memory: its tiles are slices of the arrays.

    The last tile ends with the last row or key. It may overlap the tile before; the mask hides what
    both hold.
    """

    head: Operands
    facts: HeadFacts
    lists: Visits | None = None
    # Keys and values with NaN and zeros where they are not usable, where many query tiles need them
    # so; None: each key tile sees to it.
    clean: tuple[Array, Array] | None = None

    @staticmethod
    def of(head: Operands, mask: Mask, plan: Plan) -> HeadWalk:
        length, groups = head.query.shape[:2]
        block_q = max(1, min(plan.schedule.block_q // groups, length))
        if plan.storage is tile.Storage.BOUND:
            walk, as_multiplied, kappa = HeadWalk.of(head, mask, plan.unproved), head, None
            if plan.centred:
                one, kappa = jnp.ones_like(head.scale), walk.facts.kappa
                as_multiplied = head._replace(query=_multiplied(head, plan), scale=one)
            bound = bound_of(as_multiplied, walk.facts.usable, mask, plan, kappa)
            return replace(walk, facts=walk.facts._replace(bound=bound))
        arrays, alone = (head.query, head.key, head.value), not plan.schedule.batch_heads
        facts = prepare(*arrays, head.scale, mask, plan, block_q, one_by_one=alone)
        often = length >= _MANY_TILES * block_q and facts.kappa is None
        often = often and plan.storage is not tile.Storage.PAPER
        return HeadWalk(
            mask=mask,
            plan=plan,
            numerics=plan.numerics(len(head.key)),
            groups=groups,
            block_q=block_q,
            value_size=head.value.shape[1],
            head=head,
            facts=facts,
            lists=_lists(mask, block_q, plan.schedule.block_kv),
            clean=_clean(head, facts.usable[:, None], plan) if often else None,
        )

    def by_bound(self) -> HeadWalk:
        """This walk with the bound as reference, which a proof says is safe."""
        plan = replace(self.plan, shift="bound")
        facts = self.facts._replace(guard=None, value_gain=None)
        return replace(self, plan=plan, facts=facts, numerics=plan.numerics(len(self.head.key)))

    def without_care(self) -> HeadWalk:
        """This walk for ordinary keys and values, which nothing must be made of."""
        facts = self.facts._replace(guard=None, value_gain=None)
        return replace(self, facts=facts, clean=(self.head.key, self.head.value))

    @property
    def query_tiles(self) -> int:
        return -(-len(self.head.query) // self.block_q)

    def over_queries(self, body: Callable[[Array, Any], Any], carry: Any) -> Any:
        """Folds ``body(i, carry)`` over the query tiles."""
        return lax.fori_loop(0, self.query_tiles, body, self.typed(carry))

    def typed(self, carry: Any) -> Any:
        return varying(carry, (self.head, self.mask))

    # Rows of one query tile, [T, G, …] <-> [G·block_q, …].

    def rows(self, x: Shaped[Array, "T G *rest"], start: Index) -> Shaped[Array, "R last"]:
        """The rows [R, …] of x [T, G, …] that belong to the query tile at ``start``."""
        x = bits.take(x, start, self.block_q)
        x = jnp.moveaxis(x, 1, 0).reshape(self.groups * self.block_q, *x.shape[2:])
        return x if x.ndim > 1 else x[:, None]

    def put_rows(
        self,
        buffer: Shaped[Array, "T G *rest"],
        x: Shaped[Array, "R last"],
        start: Index,
        which: Bool[Array, "R 1"] | None,
    ) -> Shaped[Array, "T G *rest"]:
        """``buffer`` with the rows of x [R, …] that ``which`` [R, 1] names (None: all)."""
        if which is not None:
            x = jnp.where(which, x, self.rows(buffer, start))
        x = x.reshape(self.groups, self.block_q, *buffer.shape[2:])
        return bits.put(buffer, jnp.moveaxis(x, 0, 1), _place(start, *[0] * (buffer.ndim - 1)))

    def new(self, start: Index, i: Array) -> Bool[Array, "R 1"] | None:
        """[R, 1] bool: the rows that no earlier tile holds; None: all of them."""
        if len(self.head.query) % self.block_q == 0:
            return None
        return self.positions(start) >= i.astype(jnp.int32) * self.block_q

    def fresh(self, start: Index, i: Array) -> Bool[Array, "R 1"]:
        """[R, 1] bool: the rows in use that no earlier tile holds."""
        new, used = self.new(start, i), self.in_use(start)
        return used if new is None else used & new

    # Tiles.

    def query_start(self, i: Array) -> Index:
        return minimum(i.astype(jnp.int32) * self.block_q, len(self.head.query) - self.block_q)

    def key_start(self, j: Index) -> Index:
        return minimum(j * self.block_kv, len(self.head.key) - self.block_kv)

    def query(self, start: Index) -> tile.QueryTile:
        guard = self.facts.guard
        if guard is not None:
            guard = tile.Guard(*(self.rows(x, start) for x in guard))
        q = self.rows(self.head.query, start)
        if self.mask.query_lengths is not None:
            q = tile.zero_unusable(q, self.in_use(start))
        query = tile.query_tile(q, self.plan.gain(self.head.scale), guard, self.numerics)
        if self.numerics.storage is tile.Storage.BOUND:
            assert self.facts.bound is not None
            reference = self.rows(self.facts.bound.reference, start)
            return query._replace(reference=reference * self.numerics.unit)
        if self.facts.value_gain is None:
            return query
        i = div(start + self.block_q - 1, self.block_q)
        return query._replace(value_gain=bits.pick(self.facts.value_gain, i))

    def raw_keys(
        self, j: Index
    ) -> tuple[Float[Array, "n D"], Float[Array, "n E"], Bool[Array, "n 1"]]:
        """Keys, values and which of them are usable [n, 1], of key tile j."""
        at, n = self.key_start(j), self.block_kv
        k, v, usable = (
            bits.take(x, at, n) for x in (self.head.key, self.head.value, self.facts.usable)
        )
        return k, v, usable[:, None]

    def key(self, j: Index, value_gain: Float[Array, ""] | None = None) -> tile.KeyTile:
        if self.clean is not None:
            at = self.key_start(j), self.block_kv
            k, v = (bits.take(x, *at) for x in self.clean)
            return tile.key_tile(k, v, None, self.numerics, value_gain=value_gain)
        k, v, usable = self.raw_keys(j)
        extra: dict[str, Any] = {}
        if self.facts.kappa is not None:
            extra["kappa"] = lax.dynamic_slice_in_dim(self.facts.kappa, j, 1)
        if self.facts.codes is not None:
            at = self.key_start(j), self.block_kv
            k, scale = (bits.take(x, *at) for x in self.facts.codes)
            extra["scale"] = scale.reshape(1, -1)
        if self.numerics.storage is tile.Storage.PAPER:
            blocks = self.plan.paper_blocks(len(self.head.key))
            tail = j == len(self.head.key) // self.block_kv
            extra["matrix"] = jnp.where(tail, blocks.tail_matrix, blocks.matrix).astype(jnp.float16)
            extra["weights"] = jnp.where(tail, blocks.tail_weights, blocks.weights)
        return tile.key_tile(k, v, usable, self.numerics, value_gain=value_gain, **extra)

    def visits(self, start: Index) -> Listed | None:
        if self.lists is None:
            return None
        i = div(start + self.block_q - 1, self.block_q)
        row = lax.dynamic_index_in_dim(self.lists.order, i, keepdims=False)

        def at(t: Index) -> Index:
            return lax.dynamic_index_in_dim(row, t, keepdims=False)

        return Listed(at, self.lists.partial[i], self.lists.count[i])

    def array(self, start: Index, j: Index, asks: Array | None = None) -> Bool[Array, "R n"] | None:
        assert asks is None
        at, n = self.key_start(j), self.block_kv
        return self.mask.tile_array(start, self.block_q, at, n, self.groups, self.head.data)

    def bias(self, start: Index, j: Index) -> Shaped[Array, "R n"] | None:
        if self.head.bias is None:
            return None
        x = slice_tile(self.head.bias, start, self.block_q, self.key_start(j), self.block_kv)
        shape = (self.groups, self.block_q, self.block_kv)
        return jnp.broadcast_to(x, shape).reshape(-1, self.block_kv)

    def low_rank(self, start: Index, j: Index) -> Float[Array, "R n"] | None:
        if self.head.factors is None:
            return None
        return self.product_of(self.factors(start, j, self.head.factors))

    def product_of(self, factors: Factors) -> Float[Array, "R n"]:
        """[R, n] the bias of a tile from its factors."""
        return tile.low_rank(*factors, self.groups, self.numerics)

    def factors(self, start: Index, j: Index, of: Factors) -> Factors:
        """The factors of a tile: one [G|1, block_q] and [G|1, n] for each r, and [G|1].

        XLA for CPUs would slice all of them at once element by element, for each use.
        """
        at_rows, at_keys = (start, self.block_q), (self.key_start(j), self.block_kv)
        ranks = range(of.q.shape[1])
        q, k = (
            tuple(bits.take(x[:, r], *at, 1) for r in ranks)
            for x, at in ((of.q, at_rows), (of.k, at_keys))
        )
        return Factors(q, k, of.scale)

    def modified(self, start: Index, j: Index) -> tile.Modify | None:
        mods = self.mask.mods
        if mods is None or mods.score_mod is None:
            return None
        return partial(self.scored, start, j, self.head.data)

    def scored(self, start: Index, j: Index, data: Data, score: Array) -> Float[Array, "R n"]:
        """What the caller's function makes of a tile of scores, from floating data of this head."""
        mods, at = self.mask.mods, ((start, self.block_q), (self.key_start(j), self.block_kv))
        assert mods is not None
        tiled = mods.data.beside(data).tile(*at, self.groups, transposed=False)
        return mods.scored(score, mods.place(*at, self.groups, transposed=False), tiled)

    def sinks(self) -> Float[Array, "R 1"] | None:
        if self.head.sinks is None:
            return None
        return jnp.repeat(self.head.sinks, self.block_q)[:, None]


def _lists(mask: Mask, block_q: int, block_kv: int) -> Visits | None:
    """The tiles to visit, where data say so, and there are enough tiles to choose from."""
    tiles = -(-mask.query_length // block_q) * -(-mask.key_length // block_kv)
    return visits(mask, block_q, block_kv) if mask.listed and tiles > _FEW_TILES else None


def _clean(head: Operands, usable: Bool[Array, "S 1"], plan: Plan) -> tuple[Array, Array]:
    """Keys and values as `tile.key_tile` leaves them where nothing is taken off the keys."""
    key = tile.key_tile(head.key, head.value, usable, plan.numerics(len(head.key)))
    return key.k, key.v


def _multiplied(head: Operands, plan: Plan) -> Float[Array, "T G D"]:
    """The queries as they are multiplied where products are rounded: with their factor."""
    rows = head.query.reshape(-1, head.query.shape[-1])
    numerics = plan.numerics(len(head.key))
    return tile.query_tile(rows, plan.gain(head.scale), None, numerics).q.reshape(head.query.shape)


def over_heads(
    operands: Operands,
    mask: Mask,
    plan: Plan,
    program: Callable[[HeadWalk, Index, Index], tuple[Any, Any]],
    sums: Any = None,
) -> tuple[Any, Any]:
    """Runs ``program`` for every key head, one after another or all at once.

    Arguments:
      program: (walk, b, h) -> (arrays [L, g, …], addends to the gradients of ``sums``).
      sums: arrays [B|1, N|1, …] that heads may share; the addends of one head are [G|1, …].

    Returns:
      The arrays as [B, L, K·g, …] and the sums of the addends, of the shapes of ``sums``.
    """
    batch, keys, kv_heads, _ = operands.key.shape
    groups = operands.query.shape[2] // kv_heads
    few = sums is None and operands.query.shape[1] * groups <= _FEW_ROWS
    # An array has no slice that is larger than it is: cut the blocks.
    plan = replace(plan, schedule=plan.schedule.fitted(plan.schedule.block_q, keys))

    def one(b: Index, h: Index) -> tuple[Any, Any]:
        walk = HeadWalk.of(operands.head(b, h), mask.head(b, h, groups), plan)
        bound, careful = walk.facts.bound, partial(program, walk, b, h)
        if bound is not None:
            return lax.cond(bound.proved, lambda: program(walk.by_bound(), b, h), careful)
        if walk.facts.ordinary is None or not few or not plan.storage.keeps_keys:
            return careful()
        easy = partial(program, walk.without_care(), b, h)
        return lax.cond(walk.facts.ordinary, easy, careful)

    if plan.schedule.batch_heads:
        placed, added = heads_at_once(one, batch, kv_heads)
        placed = jax.tree.map(
            lambda x: jnp.moveaxis(x, 1, 2).reshape(batch, x.shape[2], -1, *x.shape[4:]), placed
        )
        return placed, jax.tree.map(fold_heads, added, sums)

    def body(t: Array, buffers: tuple[Any, Any]) -> tuple[Any, Any]:
        b, h = t.astype(jnp.int32) // kv_heads, t.astype(jnp.int32) % kv_heads
        placed, added = one(b, h)

        def put(buffer: Array, x: Array) -> Array:
            return bits.put(buffer, x[None], _place(b, 0, h * x.shape[1], *[0] * (x.ndim - 2)))

        def add(total: Array, x: Array) -> Array:
            at = (b if len(total) > 1 else 0, h * groups if total.shape[1] > 1 else 0)
            return add_at(total, x[None], (*at, *[0] * (total.ndim - 2)))

        return jax.tree.map(put, buffers[0], placed), jax.tree.map(add, buffers[1], added)

    shapes, added = jax.eval_shape(one, jnp.int32(0), jnp.int32(0))
    buffers = jax.tree.map(
        lambda x: jnp.zeros((batch, x.shape[0], kv_heads * x.shape[1], *x.shape[2:]), x.dtype),
        shapes,
    )
    totals = jax.tree.map(lambda x, like: jnp.zeros(like.shape, x.dtype), added, sums)
    return lax.fori_loop(0, batch * kv_heads, body, varying((buffers, totals), (operands, mask)))


def _place(*index: Index) -> tuple[Array, ...]:
    """The indices as int32; under x64 Python numbers would be int64."""
    return tuple(jnp.asarray(i, jnp.int32) for i in index)


def add_at(buffer: Array, x: Array, at: tuple[Index, ...]) -> Array:
    """``buffer`` with x added at the place ``at``."""
    place = _place(*at)
    old = lax.dynamic_slice(buffer, place, x.shape)
    return lax.dynamic_update_slice(buffer, old + x, place)
