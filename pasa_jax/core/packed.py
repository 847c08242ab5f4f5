"""`PackedPages`: pages whose keys and values have 8 bits.

A page is packed once, when it is full: each head's mean key is taken off, as PASA takes it off the
scores, and each channel of what is left has a scale of its own; each value has one. The open page
of a sequence, to which tokens are still added, keeps the type of the model. Letters as in `Pages`;
R rows, one for each sequence (and layer).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax

from pasa_jax.core import bits
from pasa_jax.core.mask import Index
from pasa_jax.core.pages import PageFacts, Pages, for_each, put_tokens, soundness
from pasa_jax.core.tile import wide_type

if TYPE_CHECKING:
    from pasa_jax.core.shapes import Float, Int

Array = jax.Array


@dataclass(frozen=True)
class Format:
    """How a number is stored in 8 bits: as a code times a scale.

    Arguments:
      dtype: of the codes.
      largest: the code of the largest magnitude of those that share a scale.
    """

    dtype: str
    largest: float

    def codes(self, x: Array) -> Array:
        """The bits of x, which lies within ±`largest`."""
        x = jnp.clip(x, -self.largest, self.largest)  # beyond its range float8_e4m3fn is NaN
        if self.dtype == "int8":
            return jnp.round(x).astype(jnp.int8)
        return lax.bitcast_convert_type(x.astype(self.dtype), jnp.int8)

    def read(self, codes: Array) -> Array:
        """float32 numbers of codes."""
        if self.dtype != "int8":
            codes = lax.bitcast_convert_type(codes, jnp.dtype(self.dtype))
        return codes.astype(jnp.float32)


FORMATS = {
    "int8": Format("int8", 127.0),
    "float8_e4m3": Format("float8_e4m3fn", 448.0),
    "float8_e5m2": Format("float8_e5m2", 57344.0),
}


def pack_keys(
    k: Float[Array, "*H n D"], format: Format, *, centred: bool = True
) -> tuple[Array, Array, Array]:
    """Codes [*H, n, D], scales [*H, D] and means [*H, D] float32 of the keys of a page.

    Arguments:
      k: a key that is not finite is NaN; it has codes of 0.
      centred: whether the mean is taken off.
    """
    sound = jnp.isfinite(k)
    k = jnp.where(sound, k, jnp.zeros_like(k)).astype(jnp.float32)
    count = jnp.maximum(jnp.sum(sound.astype(jnp.float32), axis=-2), 1)
    mean = jnp.sum(k / count[..., None, :], axis=-2) * jnp.float32(centred)
    off = jnp.where(sound, k - mean[..., None, :], 0)
    scale = _scale(jnp.max(jnp.abs(off), axis=-2), format)
    return format.codes(off / scale[..., None, :]), scale, mean


def pack_values(v: Float[Array, "*H n E"], format: Format) -> tuple[Array, Array]:
    """Codes [*H, n, E] and scales [*H, n] float32 of values."""
    v = v.astype(jnp.float32)
    scale = _scale(jnp.max(jnp.abs(v), axis=-1), format)
    return format.codes(v / scale[..., None]), scale


def _scale(largest: Array, format: Format) -> Array:
    scale = largest / format.largest
    return jnp.where(scale > 0, scale, jnp.ones_like(scale))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PackedPages:
    """P pages of 8-bit keys and values, and R open pages in the model's type.

    A table names an open page by P and its row.

    Arguments:
      key, value: [P, K, n, D], [P, K, n, E] int8, codes of the format.
      key_scale, key_mean: [P, K, D] float32.
      value_scale: [P, K, n] float32; NaN for a token whose key or value is not finite.
      open_key, open_value: [R, K, n, D], [R, K, n, E], stored as in `Pages`.
      facts: of all P + R pages.
      dtype: the type of keys and values before they are packed, by name.
      format: a name of `FORMATS`.
    """

    key: Array
    value: Array
    key_scale: Array
    key_mean: Array
    value_scale: Array
    open_key: Array
    open_value: Array
    facts: PageFacts
    dtype: str = field(metadata={"static": True})
    format: str = field(metadata={"static": True})

    @staticmethod
    def empty(
        pages: int,
        rows: int,
        kv_heads: int,
        page_size: int,
        size: int,
        value_size: int,
        dtype: str,
        format: str,
    ) -> PackedPages:
        stored = bits.stored_type(jnp.dtype(dtype))
        heads = (pages, kv_heads)
        return PackedPages(
            key=jnp.zeros((*heads, page_size, size), jnp.int8),
            value=jnp.zeros((*heads, page_size, value_size), jnp.int8),
            key_scale=jnp.ones((*heads, size), jnp.float32),
            key_mean=jnp.zeros((*heads, size), jnp.float32),
            value_scale=jnp.ones((*heads, page_size), jnp.float32),
            open_key=jnp.zeros((rows, kv_heads, page_size, size), stored),
            open_value=jnp.zeros((rows, kv_heads, page_size, value_size), stored),
            facts=PageFacts.empty(pages + rows, kv_heads, size, wide_type(jnp.dtype(dtype))),
            dtype=dtype,
            format=format,
        )

    @property
    def count(self) -> int:
        """P."""
        return self.key.shape[0]

    @property
    def places(self) -> int:
        """P + R."""
        return self.count + self.open_key.shape[0]

    @property
    def page_size(self) -> int:
        """n; of all heads."""
        return self.key.shape[2]

    def tile(self, page: Index) -> tuple[Float[Array, "*K n D"], Float[Array, "*K n E"]]:
        """Keys and values of a page in float32; of one head where the arrays are those of one."""

        def at(x: Array, i: Index) -> Array:
            return lax.dynamic_index_in_dim(x, i, keepdims=False)

        def of_open() -> tuple[Array, Array]:
            arrays = (at(x, page - self.count) for x in (self.open_key, self.open_value))
            k, v = (bits.read(x, jnp.dtype(self.dtype)).astype(jnp.float32) for x in arrays)
            return k, v

        def of_packed() -> tuple[Array, Array]:
            format, scale = FORMATS[self.format], at(self.value_scale, page)[..., None]
            k = format.read(at(self.key, page)) * at(self.key_scale, page)[..., None, :]
            k = k + at(self.key_mean, page)[..., None, :]
            v = format.read(at(self.value, page)) * scale
            sound = scale == scale
            return jnp.where(sound, k, jnp.nan), jnp.where(sound, v, 0)

        return lax.cond(page >= self.count, of_open, of_packed)

    def read_by(self, table: Array, length: Array, row: Array) -> Array:
        """The table by which the pages are read: the last page of a sequence may be open.

        Arguments:
          table: [B, M] int32.
          length, row: [B] int32.
        """
        block = jnp.arange(table.shape[1], dtype=jnp.int32)
        is_open = (block == (length // self.page_size)[:, None]) & (length % self.page_size > 0)[
            :, None
        ]
        return jnp.where(is_open, self.count + row[:, None], table)

    def written(
        self,
        page: Int[Array, " T"],
        slot: Int[Array, " T"],
        key: Float[Array, "T K D"],
        value: Float[Array, "T K E"],
        row: Int[Array, " T"],
    ) -> PackedPages:
        """With tokens added to the open pages of their rows, one page of each row after another;
        those that become full are packed.

        Arguments:
          page, slot: [T] int32, where each token will stand when its page is full. A token whose
            page is out of range is not written.
          row: [T] int32. The tokens of a row stand one after another.
        """
        rows, there = self.open_key.shape[0], (page >= 0) & (page < self.count)
        begins = there & (slot == 0)
        opened = jnp.cumsum(begins, dtype=jnp.int32)
        row = jnp.where(there, row, rows)
        before = opened - begins.astype(jnp.int32)  # it does not fall, so that a row's first is its least
        least = jnp.full(rows, len(page), jnp.int32).at[row].min(before, mode="drop")
        turn = jnp.where(there, opened - least.at[row].get(mode="fill", fill_value=0), -1)
        sound = soundness(key, value)

        def step(i: Array, pages: PackedPages) -> PackedPages:
            now = turn == i.astype(jnp.int32)
            at = jnp.where(now, row, rows)
            fact = jnp.where(now, self.count + row, self.places)
            begun = jnp.where(slot == 0, fact, self.places)
            pages = replace(
                pages,
                open_key=put_tokens(pages.open_key, at, slot, key, sound, jnp.nan),
                open_value=put_tokens(pages.open_value, at, slot, value, sound, 0.0),
                facts=pages.facts.begun(begun).beside(fact, key, value, sound),
            )
            full = now & (slot == self.page_size - 1)
            return for_each(full, lambda p, t: p._packed(row[t], page[t]), pages)

        return lax.fori_loop(0, jnp.max(turn, initial=-1) + 1, step, self)

    def _packed(self, row: Array, page: Array) -> PackedPages:
        """With the open page of a row packed as ``page``."""
        format = FORMATS[self.format]
        k, v = self.tile(self.count + row)
        codes, scale, mean = pack_keys(k, format)
        values, value_scale = pack_values(v, format)
        value_scale = jnp.where(jnp.isfinite(k[..., 0]), value_scale, jnp.nan)

        def put(old: Array, x: Array) -> Array:
            return lax.dynamic_update_index_in_dim(old, x, page, 0)

        return replace(
            self,
            key=put(self.key, codes),
            value=put(self.value, values),
            key_scale=put(self.key_scale, scale),
            key_mean=put(self.key_mean, mean),
            value_scale=put(self.value_scale, value_scale),
            facts=jax.tree.map(lambda x: put(x, x[self.count + row]), self.facts),
        )

    def copied(self, source: Array, target: Array) -> PackedPages:
        """These: a page that is shared and written to is an open one, see `begun_as`."""
        del source, target
        return self

    def begun_as(self, row: Array, page: Array) -> PackedPages:
        """With what stands in pages ``page`` [L], open ones or not, in the open pages of rows
        ``row`` [L]; a row out of range is none.
        """

        def copy(pages: PackedPages, i: Array) -> PackedPages:
            k, v = (bits.stored(x.astype(self.dtype)) for x in pages.tile(page[i]))

            def put(old: Array, x: Array) -> Array:
                return lax.dynamic_update_index_in_dim(old, x, row[i], 0)

            def fact(x: Array) -> Array:
                return lax.dynamic_update_index_in_dim(x, x[page[i]], self.count + row[i], 0)

            return replace(
                pages,
                open_key=put(pages.open_key, k),
                open_value=put(pages.open_value, v),
                facts=jax.tree.map(fact, pages.facts),
            )

        return for_each((row >= 0) & (row < self.open_key.shape[0]), copy, self)


Store = Pages | PackedPages


def empty_store(
    pages: int,
    rows: int,
    kv_heads: int,
    page_size: int,
    size: int,
    value_size: int,
    dtype: str,
    format: str | None,
) -> Store:
    """Pages in the model's type, or, with a ``format``, in 8 bits."""
    sizes = (kv_heads, page_size, size, value_size, dtype)
    if format is None:
        return Pages.empty(pages, *sizes)
    return PackedPages.empty(pages, rows, *sizes, format)
