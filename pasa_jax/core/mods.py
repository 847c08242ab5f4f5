"""`Mods`: functions of the caller that hide keys (`mask_mod`) and change scores (`score_mod`).

They have FlexAttention's meaning: elementwise functions of the batch entry, the query head and the
two positions. A walker calls them once for a tile, with arrays that broadcast to it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pasa_jax.core.bits import pick, pick_heads, take

Array = jax.Array
Index = int | Array
MaskMod = Callable[..., Any]
ScoreMod = Callable[..., Any]


class Data(NamedTuple):
    """Leaves of the data that the functions are given, None where another `Data` holds the leaf.

    In a call: each query's [B|1, N|1, T], each key's [B|1, N|1, S], each head's [B|1, N|1]. Of one
    head: [G|1, T], [G|1, S] and [G|1]. Of one tile: arrays that broadcast to it.
    """

    query: tuple[Any, ...] = ()
    key: tuple[Any, ...] = ()
    head: tuple[Any, ...] = ()

    def one_head(self, b: Index, h: Index, groups: int) -> Data:
        """The data of batch entry ``b`` and of the ``groups`` query heads of key head ``h``."""
        return jax.tree.map(lambda x: pick_heads(x, b, h, groups), self)

    def beside(self, other: Data) -> Data:
        """All leaves of two parts."""
        return Data(
            *(
                tuple(a if a is not None else b for a, b in zip(x, y, strict=True))
                for x, y in zip(self, other, strict=True)
            )
        )

    def split(self, chosen: Callable[[Array], bool]) -> tuple[Data, Data]:
        """The leaves that are ``chosen``, and the others."""
        yes, no = (
            Data(*(tuple(x if chosen(x) == want else None for x in part) for part in self))
            for want in (True, False)
        )
        return yes, no

    def tile(
        self, rows: tuple[Index, int], keys: tuple[Index, int], groups: int, *, transposed: bool
    ) -> Data:
        """One head's data at a tile of ``groups`` query heads, whose rows are stacked.

        Arguments:
          rows, keys: where they start, and how many they are.
          transposed: whether the tile is [n, R] instead of [R, n].
        """
        count, n = rows[1], keys[1]

        def of_query(x: Array) -> Array:  # [R, 1]
            x = take(x, *rows, 1)
            return jnp.broadcast_to(x, (groups, count)).reshape(-1, 1)

        def of_key(x: Array) -> Array:  # [1, n], or [R, n] where heads differ
            x = take(x, *keys, 1)
            if len(x) == 1:
                return x
            return jnp.broadcast_to(x[:, None], (groups, count, n)).reshape(-1, n)

        def of_head(x: Array) -> Array:  # [R, 1]
            return jnp.broadcast_to(x[:, None], (groups, count)).reshape(-1, 1)

        tiles = (
            tuple(None if x is None else f(x) for x in part)
            for f, part in zip((of_query, of_key, of_head), self, strict=True)
        )
        return Data(*(jax.tree.map(jnp.transpose, x) for x in tiles) if transposed else tiles)


class Place(NamedTuple):
    """Where the elements of a tile stand; int32 arrays that broadcast to the tile."""

    b: Array
    h: Array
    q: Array
    kv: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Mods:
    """The functions of a call, and what they are given beside the place.

    Arguments:
      mask_mod: mask_mod(b, h, q, kv) -> whether the query sees the key; or None.
      block_mod: that of a block mask, which is asked in its partial blocks alone; or None.
      score_mod: score_mod(score, b, h, q, kv) -> score; or None.
      trees: how the leaves of ``q_data``, ``kv_data`` and ``head_data`` are put together; None
        where one is not given. The functions get those that are given by these names.
      data: the leaves that have no gradient. (`Operands.data` are the others.)
      entries, heads: [B], [N] int32, the numbers of the batch entries and of the query heads; of
        one head [] and [G].
    """

    mask_mod: MaskMod | None = field(default=None, metadata={"static": True})
    block_mod: MaskMod | None = field(default=None, metadata={"static": True})
    score_mod: ScoreMod | None = field(default=None, metadata={"static": True})
    trees: tuple[Any, Any, Any] = field(default=(None, None, None), metadata={"static": True})
    data: Data = field(default_factory=Data)
    entries: Array | None = None
    heads: Array | None = None

    def one_head(self, b: Index, h: Index, groups: int) -> Mods:
        """The functions of batch entry ``b`` and key head ``h``."""
        assert self.entries is not None
        assert self.heads is not None
        return replace(
            self,
            data=self.data.one_head(b, h, groups),
            entries=pick(self.entries, b),
            heads=lax.dynamic_slice_in_dim(self.heads, h * groups, groups),
        )

    def place(
        self, rows: tuple[Index, int], keys: tuple[Index, int], groups: int, *, transposed: bool
    ) -> Place:
        """The place of a tile of one head, see `Data.tile`."""
        assert self.entries is not None
        assert self.heads is not None
        count, n = rows[1], keys[1]
        shape = (groups, count)
        head = jnp.broadcast_to(self.heads[:, None], shape).reshape(-1, 1)
        row = rows[0] + lax.broadcasted_iota(jnp.int32, shape, 1).reshape(-1, 1)
        column = keys[0] + lax.broadcasted_iota(jnp.int32, (1, n), 1)
        place = Place(self.entries.reshape(1, 1), head, row, column)
        return Place(*map(jnp.transpose, place)) if transposed else place

    def shows(self, mod: MaskMod, place: Place, data: Data) -> Array:
        """Bool that broadcasts to the tile: what ``mod``, one of the two mask functions, says."""
        return jnp.asarray(call(mod, *place, **self.given(data)), bool)

    def scored(self, score: Array, place: Place, data: Data) -> Array:
        """``score`` as ``score_mod`` changes it, of the same shape and type."""
        assert self.score_mod is not None
        new = jnp.asarray(call(self.score_mod, score, *place, **self.given(data)), score.dtype)
        return jnp.broadcast_to(new, score.shape)

    def given(self, data: Data) -> dict[str, Any]:
        """The data of a tile by the names by which the functions get them."""
        names = ("q_data", "kv_data", "head_data")
        return {
            name: jax.tree.unflatten(tree, leaves)
            for name, tree, leaves in zip(names, self.trees, data, strict=True)
            if tree is not None
        }


def call(function: Callable[..., Any], *arguments: Array, **data: Any) -> Any:
    """``function`` with those of the data that it takes."""
    parameters = inspect.signature(function).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        data = {name: x for name, x in data.items() if name in parameters}
    return function(*arguments, **data)
