"""`KVCache`: keys and values of a decoder, and what PASA needs to know of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike

from pasa_jax.call import checks, paged
from pasa_jax.core.errors import wrong
from pasa_jax.core.packed import Store, empty_store
from pasa_jax.core.schedule import Schedule
from pasa_jax.implementations.page_walk import Sequences, in_order

Array = jax.Array
_LONG = 16  # tiles of a long sequence


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys and values of up to S tokens, made by `empty`, grown by `append`, read by `attend`.

    It is a pytree and works with jit, scan and vmap; if it is donated, `append` writes in place.
    Keys and values lie in pages of as many tokens as a tile has keys, the heads of a page side by
    side, and each page's sum of keys and largest norms are stored beside it and updated by
    `append`. So `attend` reads the keys and values within length and window once, and nothing else;
    `pasa_jax.dot_product_attention` reads all keys a second time to find those.

    Letters as in `pasa_jax.dot_product_attention`; S is the most that fits.

    Arguments:
      pages: M of them for each batch entry.
      table: [B, M] int32, which.
      row: [B] int32, which of the open groups each has, where pages have 8 bits.
      length: [B] int32, tokens appended to each batch entry so far; more than S if they did not
        fit.
      max_length: S.
      schedule: tile sizes; a page has as many keys as a tile, or four times as many.
    """

    pages: Store
    table: Array
    row: Array
    length: Array
    max_length: int = field(metadata={"static": True})
    schedule: Schedule = field(metadata={"static": True})

    @staticmethod
    def empty(
        batch: int,
        max_length: int,
        kv_heads: int,
        head_dim: int,
        dtype: Any,
        *,
        value_head_dim: int | None = None,
        schedule: Schedule | None = None,
        format: str | None = None,
    ) -> KVCache:
        """A cache of no tokens.

        Arguments:
          batch, max_length, kv_heads, head_dim: B, S, K, D; positive.
          dtype: float16, bfloat16, float32, or float64 under x64.
          value_head_dim: E; default D.
          schedule: default that of the device.
          format: None: keys and values keep their type; ``"int8"``, ``"float8_e4m3"`` or
            ``"float8_e5m2"``: 64 tokens at a time are packed into 8 bits, less the mean key of each
            head, with a scale for each channel of the keys and for each value; docs/serving.md says
            what that costs.

        Raises:
          ValueError: a size, a type or a format that is not allowed.

        >>> KVCache.empty(1, 64, 2, 16, "float16").key.shape
        (1, 64, 2, 16)
        """
        sizes = (batch, max_length, kv_heads, head_dim)
        options = {"value_head_dim": value_head_dim, "schedule": schedule, "format": format}
        return KVCaches.empty(1, *sizes, dtype, **options)[0]

    @property
    def key(self) -> Array:
        """[B, S, K, D]; what was not appended may be anything."""
        return self._in_order(0)

    @property
    def value(self) -> Array:
        """[B, S, K, E]; what was not appended may be anything."""
        return self._in_order(1)

    def append(self, key: Array, value: Array, *, lengths: ArrayLike | None = None) -> KVCache:
        """This cache with more tokens: those of a prompt, or the next one.

        Arguments:
          key, value: [B, T, K, D], [B, T, K, E] of the cache's type.
          lengths: [B] integers, how many of the T tokens of each batch entry are no padding;
            default T. Clipped to [0, T].

        Returns:
          The new cache. Tokens that do not fit are not written, and every later `attend` of that
          batch entry gives NaN; where the length is known (not under jit) that is an error.

        Raises:
          ValueError: a wrong shape or type, or tokens that do not fit.
        """
        tokens = self._check_new(key, value)
        added = checks.lengths("lengths", lengths, key)
        added = jnp.full_like(self.length, tokens) if added is None else added
        length = self.length + added
        if _is_known(length) and int(jnp.max(length)) > self.max_length:
            allowed = f"hold tokens that fit beside the cache's: at most {self.max_length} in all"
            raise wrong("key", allowed, int(jnp.max(length)), "Make a longer cache.")
        return self._grown(key, value, added)

    @jax.jit  # outside of a jitted step, one program
    def _grown(self, key: Array, value: Array, added: Array) -> KVCache:
        """The cache with the first ``added`` [B] tokens of key and value; those that do not fit are
        not written."""
        step = jnp.arange(key.shape[1], dtype=jnp.int32)
        place = self.length[:, None] + step  # [B, T]
        fits = (step < added[:, None]) & (place < self.max_length)
        n = self.pages.page_size
        page = jnp.take_along_axis(self.table, place // n, axis=1, mode="clip")
        page = jnp.where(fits, page, self.pages.count)
        row = jnp.broadcast_to(self.row[:, None], page.shape)
        flat = (x.reshape(-1, *x.shape[2:]) for x in (page, place % n, key, value, row))
        return replace(self, pages=self.pages.written(*flat), length=self.length + added)

    def attend(self, query: Array, *, lengths: ArrayLike | None = None, **options: Any) -> Array:
        """Attention of the last T tokens: each sees itself and all tokens before it.

        Arguments:
          query: [B, T, N, D] of the T tokens that were appended last, of the cache's type.
          lengths: [B], how many of them are no padding, as given to `append`.
          options: ``scale``, ``local_window_size``, ``logits_soft_cap``, ``sinks``, ``shift``,
            ``beta``, ``precision``, ``interpret``, as in `pasa_jax.dot_product_attention`, and
            ``implementation``: "pallas_tpu", "pallas_gpu", "lax", or None for the kernel of the
            schedule's target, if it supports the call, else "lax". Where ``"auto"`` would choose by
            all keys, it is ``"mean"``.

        Returns:
          [B, T, N, E] of query's type. It equals what one causal call
          over all tokens gives for the last T, within the rounding of stored scores: the block
          means differ, as later keys are not in them yet. NaN for a batch entry whose tokens did
          not fit, or that has fewer tokens than there are queries. There is no gradient.

        Raises:
          ValueError: a wrong shape or type, an unknown option, or (where lengths are known)
            tokens that did not fit or more queries than tokens.
        """
        for name in options:
            if name not in paged.OPTIONS:
                raise wrong("options", f"be among {', '.join(paged.OPTIONS)}", name)
        batch, kv_heads, size = len(self.length), *self.pages.key.shape[1:4:2]
        expected = f"[{batch}, T, N, {size}] with N a multiple of {kv_heads}"
        if query.ndim != 4 or query.shape[0] != batch or 0 in query.shape:
            raise wrong("query", f"be {expected}", query.shape)
        asked = checks.lengths("lengths", lengths, query)
        asked = jnp.full_like(self.length, query.shape[1]) if asked is None else asked
        lost = (self.length > self.max_length) | (self.length < asked)
        if _is_known(lost) and bool(jnp.any(lost)):
            allowed = "hold at most as many tokens as were appended, all of which fit"
            raise wrong("query", allowed, f"{query.shape[1]} beside {self.length.tolist()}")
        most = query.shape[1]
        sequences = Sequences(
            first=jnp.arange(batch, dtype=jnp.int32) * most,
            count=asked,
            length=self.length,
            table=self.table,
            row=self.row,
        )
        flat = query.reshape(-1, *query.shape[2:])
        out, _ = paged.attend(self.pages, flat, sequences, self.schedule, most, **options)
        out = out.reshape(batch, most, *out.shape[1:])
        return jnp.where(lost[:, None, None, None], jnp.full_like(out, jnp.nan), out)

    def _in_order(self, which: int) -> Array:
        """Keys (0) or values (1), [B, S, K, D]."""
        found = in_order(self.pages, self.table, self.length, self.row)[which]
        return found[:, : self.max_length]

    def _check_new(self, key: Array, value: Array) -> int:
        """The number of tokens in ``key`` and ``value``."""
        tokens, batch = key.shape[1] if key.ndim == 4 else 0, len(self.length)
        for name, new, old in (("key", key, self.pages.key), ("value", value, self.pages.value)):
            expected = (batch, tokens, old.shape[1], old.shape[3])
            if new.shape != expected or tokens == 0:
                allowed = f"be [{expected[0]}, T, {expected[2]}, {expected[3]}] with one T ≥ 1"
                raise wrong(name, allowed, new.shape)
            if str(new.dtype) != self.pages.dtype:
                allowed = f"be of the cache's type {self.pages.dtype}"
                raise wrong(name, allowed, new.dtype, "Cast it.")
        if tokens > self.max_length:
            allowed = f"hold at most the cache's {self.max_length} tokens"
            raise wrong("key", allowed, tokens, "Make a longer cache.")
        return tokens


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class KVCaches:
    """The caches of L layers in one store of pages, for a loop over layers.

    `jax.lax.scan` would copy each cache that it hands to a layer and takes back. These it carries:
    ``caches[i]`` is a `KVCache` that shares the pages, and ``caches.beside(i, cache)`` has what was
    appended to it.

    Arguments:
      pages: M of them for each layer and batch entry.
      length: [L, B] int32, as in `KVCache`.
      max_length, schedule: as in `KVCache`.
    """

    pages: Store
    length: Array
    max_length: int = field(metadata={"static": True})
    schedule: Schedule = field(metadata={"static": True})

    @staticmethod
    def empty(
        layers: int,
        batch: int,
        max_length: int,
        kv_heads: int,
        head_dim: int,
        dtype: Any,
        *,
        value_head_dim: int | None = None,
        schedule: Schedule | None = None,
        format: str | None = None,
    ) -> KVCaches:
        """Caches of no tokens. Arguments and errors are those of `KVCache.empty`.

        >>> KVCaches.empty(3, 1, 64, 2, 16, "float16")[2].key.shape
        (1, 64, 2, 16)
        """
        sizes = {"layers": layers, "batch": batch, "max_length": max_length, "kv_heads": kv_heads}
        value_size = head_dim if value_head_dim is None else value_head_dim
        sizes |= {"head_dim": head_dim, "value_head_dim": value_size}
        name, schedule = paged.of_new_cache(sizes, dtype, format, schedule, max_length)
        schedule = schedule.fitted(schedule.block_q, max_length)
        n = schedule.block_kv
        if max_length >= _LONG * n:  # what a step of decoding reads at once
            n = schedule.keys_beside(1)
        rows, pages = layers * batch, layers * batch * -(-max_length // n)
        of_page = (kv_heads, n, head_dim, value_size, name)
        return KVCaches(
            pages=empty_store(pages, rows, schedule.block_kv, *of_page, format),
            length=jnp.zeros((layers, batch), jnp.int32),
            max_length=int(max_length),
            schedule=schedule,
        )

    def __getitem__(self, layer: int | Array) -> KVCache:
        layers, batch = self.length.shape
        table = jnp.arange(self.pages.count // layers, dtype=jnp.int32).reshape(batch, -1)
        return KVCache(
            pages=self.pages,
            table=table + jnp.int32(layer) * jnp.int32(table.size),
            row=jnp.arange(batch, dtype=jnp.int32) + jnp.int32(layer) * jnp.int32(batch),
            length=self.length[layer],
            max_length=self.max_length,
            schedule=self.schedule,
        )

    def beside(self, layer: int | Array, cache: KVCache) -> KVCaches:
        """These with what was appended to ``self[layer]``."""
        length = self.length.at[layer].set(cache.length)
        return replace(self, pages=cache.pages, length=length)


def _is_known(x: Array) -> bool:
    return not isinstance(x, Tracer)
