"""`Pages`: keys and values that are stored by pages, and what attention needs to know of them.

Everything that a step of decoding would otherwise read from all keys (sums for the block means,
largest norms and values, which keys are finite) is stored for each page, and updated by what is
written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pasa_jax.core import bits
from pasa_jax.core.guard import log2_norm
from pasa_jax.core.mask import Index
from pasa_jax.core.tile import is_finite, wide_type

if TYPE_CHECKING:
    from pasa_jax.core.shapes import Float, Int

Array = jax.Array


class PageFacts(NamedTuple):
    """Of the keys and values that are written in each page."""

    total: Array  # [P, K, D] sum of the keys that are finite, float32 (float64 for float64)
    count: Array  # [P, K] float32, how many those are
    key_norm: Array  # [P, K] float32, log2 of the largest norm of a key, −∞ where there is none
    key_top: Array  # [P, K] largest magnitude in a key, float32 (float64)
    value_top: Array  # [P, K] largest magnitude in a value, float32 (float64)

    @staticmethod
    def empty(pages: int, kv_heads: int, size: int, wide: jnp.dtype) -> PageFacts:
        heads = (pages, kv_heads)
        return PageFacts(
            total=jnp.zeros((*heads, size), wide),
            count=jnp.zeros(heads, jnp.float32),
            key_norm=jnp.full(heads, -jnp.inf, jnp.float32),
            key_top=jnp.zeros(heads, wide),
            value_top=jnp.zeros(heads, wide),
        )

    def begun(self, page: Int[Array, " T"]) -> PageFacts:
        """Those of the pages [T] forgotten; a page out of range is none."""
        none = PageFacts.empty(1, self.count.shape[1], self.total.shape[2], self.total.dtype)
        return jax.tree.map(lambda x, new: x.at[page].set(new[0], mode="drop"), self, none)

    def beside(
        self,
        page: Int[Array, " T"],
        key: Float[Array, "T K D"],
        value: Float[Array, "T K E"],
        sound: Array,
    ) -> PageFacts:
        """With tokens written to ``page`` [T], whose keys and values are finite where ``sound``
        [T, K] says so.
        """
        wide = self.total.dtype
        key, value = (
            jnp.where(sound[..., None], x, jnp.zeros_like(x)).astype(wide) for x in (key, value)
        )
        norms = jnp.where(sound, log2_norm(key), -jnp.inf)

        def raised(old: Array, x: Array) -> Array:
            return old.at[page].max(x.astype(old.dtype), mode="drop")

        return PageFacts(
            total=self.total.at[page].add(key, mode="drop"),
            count=self.count.at[page].add(sound.astype(jnp.float32), mode="drop"),
            key_norm=raised(self.key_norm, norms),
            key_top=raised(self.key_top, jnp.max(jnp.abs(key), axis=-1)),
            value_top=raised(self.value_top, jnp.max(jnp.abs(value), axis=-1)),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Pages:
    """Keys and values of P pages of n tokens each, in their own type.

    Numbers of 16 bits are stored as their bits, which XLA for CPUs reads and writes in place. A
    token whose key or value is not finite has NaN for its key and 0 for its value: the queries that
    see it become NaN, and no others. What is not written may hold anything.

    Arguments:
      key: [P, K, n, D].
      value: [P, K, n, E].
      dtype: the type of both, by name.
    """

    key: Array
    value: Array
    facts: PageFacts
    dtype: str = field(metadata={"static": True})

    @staticmethod
    def empty(
        pages: int, kv_heads: int, page_size: int, size: int, value_size: int, dtype: str
    ) -> Pages:
        stored = bits.stored_type(jnp.dtype(dtype))
        return Pages(
            key=jnp.zeros((pages, kv_heads, page_size, size), stored),
            value=jnp.zeros((pages, kv_heads, page_size, value_size), stored),
            facts=PageFacts.empty(pages, kv_heads, size, wide_type(jnp.dtype(dtype))),
            dtype=dtype,
        )

    @property
    def count(self) -> int:
        """P."""
        return self.key.shape[0]

    @property
    def page_size(self) -> int:
        """n; of all heads."""
        return self.key.shape[2]

    def tile(
        self, page: Index, start: Index, size: int
    ) -> tuple[Float[Array, "n D"], Float[Array, "n E"]]:
        """``size`` keys and values of a page, from slot ``start`` on, of the pages of one head."""
        dtype = jnp.dtype(self.dtype)
        return (
            bits.read(cut(self.key, page, start, size), dtype),
            bits.read(cut(self.value, page, start, size), dtype),
        )

    def with_open(
        self, k: Array, v: Array, start: Index, length: Array, row: Array | None
    ) -> tuple[Array, Array]:
        """Keys and values of a tile with those that are not packed yet; for `PackedPages`."""
        del start, length, row
        return k, v

    def written(
        self,
        page: Int[Array, " T"],
        slot: Int[Array, " T"],
        key: Float[Array, "T K D"],
        value: Float[Array, "T K E"],
        row: Int[Array, " T"] | None = None,
    ) -> Pages:
        """With tokens at the slots of their pages; a page begins with its slot 0.

        Arguments:
          page, slot: [T] int32. A token whose page is out of range is not written.
          row: [T] int32, the sequence of each, for `PackedPages`.
        """
        del row
        sound = soundness(key, value)
        begun = jnp.where(slot == 0, page, self.count)
        return replace(
            self,
            key=put_tokens(self.key, page, slot, key, sound, jnp.nan),
            value=put_tokens(self.value, page, slot, value, sound, 0.0),
            facts=self.facts.begun(begun).beside(page, key, value, sound),
        )

    def copied(self, source: Int[Array, " B"], target: Int[Array, " B"]) -> Pages:
        """With pages copied; a target out of range is none.

        The loop has as many steps as there are pages to copy, and changes the arrays in place.
        """

        def copy(pages: Pages, i: Array) -> Pages:
            def one(x: Array) -> Array:
                return lax.dynamic_update_index_in_dim(x, x[source[i]], target[i], 0)

            return jax.tree.map(one, pages)

        return for_each((target >= 0) & (target < self.count), copy, self)

    def begun_as(
        self, row: Array, page: Array, source: Array, length: Array, of_source: Array
    ) -> Pages:
        """For `PackedPages`, whose last tokens lie elsewhere."""
        del row, page, source, length, of_source
        return self


def cut(x: Array, page: Index, start: Index, size: int) -> Array:
    """[size, …] of x [P, n, …]: a part of one page."""
    rest = x.shape[2:]
    at = (page, start, *[0] * len(rest))
    at = tuple(jnp.asarray(i, jnp.int32) for i in at)
    return lax.dynamic_slice(x, at, (1, size, *rest))[0]


def soundness(key: Float[Array, "T K D"], value: Float[Array, "T K E"]) -> Array:
    """[T, K] bool: whose key and value are finite."""
    return jnp.all(is_finite(key), axis=-1) & jnp.all(is_finite(value), axis=-1)


def put_tokens(
    old: Array, page: Array, slot: Array, x: Array, sound: Array, otherwise: float
) -> Array:
    """``old`` [P, K, n, …] with tokens [T, K, …], or ``otherwise`` for those that are not sound."""
    heads, n = old.shape[1:3]
    x = jnp.where(sound[..., None], x, jnp.full_like(x, otherwise))
    # As rows [P·K·n, …]: else XLA brings the whole arrays into another order and back.
    there = jnp.where((page >= 0) & (page < len(old)), page, len(old))
    row = (there[:, None] * heads + jnp.arange(heads, dtype=jnp.int32)) * n + slot[:, None]
    rows = old.reshape(-1, old.shape[3]).at[row].set(bits.stored(x), mode="drop")
    return rows.reshape(old.shape)


def for_each(wanted: Array, body: Callable[[Any, Array], Any], carry: Any) -> Any:
    """Folds ``body(carry, i)`` over the entries that are ``wanted`` [L] bool, and no others."""
    order = jnp.argsort(~wanted) if len(wanted) > 1 else jnp.zeros(1, jnp.int32)
    steps = jnp.sum(wanted, dtype=jnp.int32)
    return lax.fori_loop(0, steps, lambda t, carry: body(carry, order[t]), carry)
