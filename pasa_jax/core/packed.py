"""`PackedPages`: pages whose keys and values have 8 bits.

Tokens are packed by groups, each once, when it is full: the mean key of a head is taken off, as
PASA takes it off the scores, and each channel of what is left has a scale of its own; each value
has one. The open group of a sequence, to which tokens are still added, keeps the type of the model.
Letters as in `Pages`; R rows, one for each sequence (and layer).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from pasa_jax.core import bits
from pasa_jax.core.mask import Index, div
from pasa_jax.core.pages import PageFacts, Pages, cut, for_each, put_tokens, soundness
from pasa_jax.core.tile import wide_type

if TYPE_CHECKING:
    from pasa_jax.core.shapes import Float, Int

Array = jax.Array
GROUP = 64  # tokens that are packed at once, or fewer


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

    def read(self, codes: Array, dtype: Any = jnp.float32) -> Array:
        """The numbers of codes, which every type of 16 bits or more holds."""
        if self.dtype != "int8":
            codes = lax.bitcast_convert_type(codes, jnp.dtype(self.dtype))
        return codes.astype(dtype)

    def centred(self, codes: Int[Array, "n D"], scale: Float[Array, "m D"]) -> Float[Array, "n D"]:
        """float32 keys of m whole groups, each less the mean of its group."""
        k = self.read(codes).reshape(len(scale), -1, codes.shape[1])
        return (k * scale[:, None]).reshape(codes.shape)


FORMATS = {
    "int8": Format("int8", 127.0),
    "float8_e4m3": Format("float8_e4m3fn", 448.0),
    "float8_e5m2": Format("float8_e5m2", 57344.0),
}


def pack_keys(
    k: Float[Array, "*H n D"], format: Format, *, centred: bool = True
) -> tuple[Array, Array, Array]:
    """Codes [*H, n, D], scales [*H, D] and means [*H, D] float32 of the keys of a group.

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
    """P pages of n tokens with 8-bit keys and values, packed by groups of g tokens.

    Arguments:
      key, value: [P, K, n, D], [P, K, n, E] int8, codes of the format.
      key_scale, key_mean: [P, K, n/g, D] float32.
      value_scale: [P, K, n] float32; NaN for a token whose key or value is not finite.
      open_key, open_value: [R, K, g, D], [R, K, g, E], stored as in `Pages`: the last tokens of
        each sequence, until they are g.
      facts: as in `Pages`, of keys and values as they were given.
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
        group: int,
        kv_heads: int,
        page_size: int,
        size: int,
        value_size: int,
        dtype: str,
        format: str,
    ) -> PackedPages:
        stored = bits.stored_type(jnp.dtype(dtype))
        heads, groups = (pages, kv_heads), page_size // group
        return PackedPages(
            key=jnp.zeros((*heads, page_size, size), jnp.int8),
            value=jnp.zeros((*heads, page_size, value_size), jnp.int8),
            key_scale=jnp.ones((*heads, groups, size), jnp.float32),
            key_mean=jnp.zeros((*heads, groups, size), jnp.float32),
            value_scale=jnp.ones((*heads, page_size), jnp.float32),
            open_key=jnp.zeros((rows, kv_heads, group, size), stored),
            open_value=jnp.zeros((rows, kv_heads, group, value_size), stored),
            facts=PageFacts.empty(pages, kv_heads, size, wide_type(jnp.dtype(dtype))),
            dtype=dtype,
            format=format,
        )

    @property
    def count(self) -> int:
        """P."""
        return self.key.shape[0]

    @property
    def page_size(self) -> int:
        """n; of all heads."""
        return self.key.shape[2]

    @property
    def group(self) -> int:
        """g."""
        return self.open_key.shape[-2]

    def tile(
        self, page: Index, start: Index, size: int
    ) -> tuple[Float[Array, "n D"], Float[Array, "n E"]]:
        """``size`` keys and values of a page in float32, from slot ``start`` on, of one head.

        Arguments:
          start, size: whole groups.
        """
        format, g = FORMATS[self.format], self.group
        scale, mean = (
            cut(x, page, div(start, g), size // g) for x in (self.key_scale, self.key_mean)
        )
        k = format.centred(cut(self.key, page, start, size), scale)
        k = (k.reshape(*mean.shape[:1], g, -1) + mean[:, None]).reshape(size, -1)
        of_value = cut(self.value_scale, page, start, size)[:, None]
        v = format.read(cut(self.value, page, start, size)) * of_value
        sound = of_value == of_value
        return jnp.where(sound, k, jnp.nan), jnp.where(sound, v, 0)

    def with_open(
        self, k: Array, v: Array, start: Index, length: Array, row: Array | None
    ) -> tuple[Array, Array]:
        """Keys and values [n, …] of a tile, with those that are not packed yet.

        Arguments:
          start: [] where the tile begins in its sequence.
          length: [] the tokens of the sequence.
          row: [] which of the open groups it has.
        """
        assert row is not None
        place = start + jnp.arange(len(k), dtype=jnp.int32) - length // self.group * self.group
        is_open = (place >= 0)[:, None]

        def beside(x: Array, held: Array) -> Array:
            own = lax.dynamic_index_in_dim(held, row, keepdims=False)
            own = bits.read(own, jnp.dtype(self.dtype)).astype(x.dtype)
            return jnp.where(is_open, own[jnp.clip(place, 0, self.group - 1)], x)

        return beside(k, self.open_key), beside(v, self.open_value)

    def written(
        self,
        page: Int[Array, " T"],
        slot: Int[Array, " T"],
        key: Float[Array, "T K D"],
        value: Float[Array, "T K E"],
        row: Int[Array, " T"],
    ) -> PackedPages:
        """With tokens added to the open groups of their rows, one group of each row after another;
        a group that is full is packed.

        Arguments:
          page, slot: [T] int32, where each token stands when it is packed. A token whose page is
            out of range is not written.
          row: [T] int32. The tokens of a row stand one after another.
        """
        rows, g = self.open_key.shape[0], self.group
        there = (page >= 0) & (page < self.count)
        begins = (there & (slot % g == 0)).astype(jnp.int32)
        begun = jnp.cumsum(begins, dtype=jnp.int32)
        row = jnp.where(there, row, rows)
        # It does not fall, so that a row's first is its least.
        first = jnp.full(rows, len(page), jnp.int32).at[row].min(begun - begins, mode="drop")
        turn = jnp.where(there, begun - first.at[row].get(mode="fill", fill_value=0), -1)
        sound = soundness(key, value)

        def step(i: Array, pages: PackedPages) -> PackedPages:
            now = turn == i.astype(jnp.int32)
            at = jnp.where(now, row, rows)
            pages = replace(
                pages,
                open_key=put_tokens(pages.open_key, at, slot % g, key, sound, jnp.nan),
                open_value=put_tokens(pages.open_value, at, slot % g, value, sound, 0.0),
            )
            full = now & (slot % g == g - 1)
            return for_each(full, lambda p, t: p._packed(row[t], page[t], slot[t] // g), pages)

        pages = lax.fori_loop(0, jnp.max(turn, initial=-1) + 1, step, self)
        facts = self.facts.begun(jnp.where(slot == 0, page, self.count))
        return replace(pages, facts=facts.beside(page, key, value, sound))

    def _packed(self, row: Array, page: Array, group: Array) -> PackedPages:
        """With the open group of a row packed as a group of a page."""
        format, dtype = FORMATS[self.format], jnp.dtype(self.dtype)
        k, v = (bits.read(x[row], dtype) for x in (self.open_key, self.open_value))
        codes, scale, mean = pack_keys(k, format)
        values, of_value = pack_values(v, format)
        of_value = jnp.where(jnp.isfinite(k[..., 0]), of_value, jnp.nan)
        slot = group * self.group

        def put(old: Array, x: Array, at: Array) -> Array:
            return bits.put(
                old, x[None], (page, jnp.int32(0), at, *[jnp.int32(0)] * (old.ndim - 3))
            )

        return replace(
            self,
            key=put(self.key, codes, slot),
            value=put(self.value, values, slot),
            key_scale=put(self.key_scale, scale[:, None], group),
            key_mean=put(self.key_mean, mean[:, None], group),
            value_scale=put(self.value_scale, of_value, slot),
        )

    def copied(self, source: Int[Array, " B"], target: Int[Array, " B"]) -> PackedPages:
        """With pages copied; a target out of range is none. Open groups are those of sequences."""
        by_page = ("key", "value", "key_scale", "key_mean", "value_scale", "facts")

        def copy(pages: PackedPages, i: Array) -> PackedPages:
            def one(x: Array) -> Array:
                return lax.dynamic_update_index_in_dim(x, x[source[i]], target[i], 0)

            return replace(pages, **{x: jax.tree.map(one, getattr(pages, x)) for x in by_page})

        return for_each((target >= 0) & (target < self.count), copy, self)

    def begun_as(
        self, row: Array, page: Array, source: Array, length: Array, of_source: Array
    ) -> PackedPages:
        """With open groups that begin as another sequence does.

        Arguments:
          row: [L] int32, whose; a row out of range is none.
          page: [L] int32, where the group stands or will stand.
          source: [L] int32, the rows of the other sequence.
          length, of_source: [] int32, the tokens of both.
        """
        g, wide = self.group, jnp.dtype(self.dtype)
        is_open = length // g == of_source // g

        def copy(pages: PackedPages, i: Array) -> PackedPages:
            slot = length // g * g % self.page_size
            packed = jax.vmap(lambda x: x.tile(page[i], slot, g), 1)(pages)

            def put(old: Array, x: Array) -> Array:
                new = jnp.where(is_open, old[source[i]], bits.stored(x.astype(wide)))
                return lax.dynamic_update_index_in_dim(old, new, row[i], 0)

            return replace(
                pages,
                open_key=put(pages.open_key, packed[0]),
                open_value=put(pages.open_value, packed[1]),
            )

        return for_each((row >= 0) & (row < self.open_key.shape[0]), copy, self)


Store = Pages | PackedPages


def empty_store(
    pages: int,
    rows: int,
    block_kv: int,
    kv_heads: int,
    page_size: int,
    size: int,
    value_size: int,
    dtype: str,
    format: str | None,
) -> Store:
    """Pages in the model's type, or, with a ``format``, in 8 bits.

    Arguments:
      block_kv: the keys of a tile, which has whole groups.
    """
    sizes = (kv_heads, page_size, size, value_size, dtype)
    if format is None:
        return Pages.empty(pages, *sizes)
    group = math.gcd(page_size, block_kv)
    group = next(g for g in range(min(GROUP, group), 0, -1) if group % g == 0)
    return PackedPages.empty(pages, rows, group, *sizes, format)
