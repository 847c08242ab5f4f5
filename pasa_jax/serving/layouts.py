"""The page layouts of other libraries, from ours and into ours.

`to_jax`, `from_jax`                      `paged_attention` of JAX's Pallas for TPUs and GPUs
`to_ragged`, `from_ragged`                `ragged_paged_attention` of JAX's Pallas, vLLM's version 2
`to_tpu_inference`, `from_tpu_inference`  `ragged_paged_attention` of tpu-inference, its version 3
`to_flashinfer`, `from_flashinfer`        FlashInfer's paged key/value cache, NHD and HND

What a ``to_`` function returns has the names and the order of the library's arguments. None of
these kernels checks pages: blocks without a page name page 0 there, so a window that has given
pages up must be given to the kernel as well. RPA's ``sliding_window`` counts the query itself: it
is one more than the left part of ``local_window_size``. JAX's and RPA's kernels do not scale
queries on their own. All functions work under jit.

Letters: P pages of ``page`` tokens, K key heads, D and E head sizes of key and value, B sequences,
M blocks of each.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike

from pasa_jax.core.checks import is_size
from pasa_jax.core.errors import check_choice, wrong

Array = jax.Array

_LANES = 128  # of a TPU: tpu-inference pads head sizes to a multiple


class Pages(NamedTuple):
    """Our layout.

    Arguments:
      key, value: [P, K, page, D], [P, K, page, E].
      table: [B, M] int32, the page of each block of each sequence; -1 where there is none.
      lengths: [B] int32, tokens of each sequence.
    """

    key: Array
    value: Array
    table: Array
    lengths: Array


class JaxPages(NamedTuple):
    """`jax.experimental.pallas.ops.tpu.paged_attention` and `….gpu.paged_attention`.

    The GPU's function calls the last one ``block_tables`` and has it before ``lengths``.

    Arguments:
      k_pages, v_pages: [K, P, page, D].
      lengths: [B] int32.
      page_indices: [B, M] int32, all in [0, P).
    """

    k_pages: Array
    v_pages: Array
    lengths: Array
    page_indices: Array


class RaggedPages(NamedTuple):
    """`jax.experimental.pallas.ops.tpu.ragged_paged_attention`, RPA version 2 of vLLM.

    Arguments:
      kv_pages: [P, page, 2K, D], the key of head h at 2h, its value at 2h + 1.
      kv_lens: [B] int32; that and the others hold for the first ``num_seqs`` sequences.
      page_indices: [B, M] int32, all in [0, P).
      cu_q_lens: [B + 1] int32, where the queries of each sequence begin.
      num_seqs: [1] int32.
    """

    kv_pages: Array
    kv_lens: Array
    page_indices: Array
    cu_q_lens: Array
    num_seqs: Array


class TpuInferencePages(NamedTuple):
    """`ragged_paged_attention` of tpu-inference, RPA version 3, which also writes new tokens.

    Arguments:
      kv_cache: [P, page, ⌈2K/n⌉, n, ⌈D/128⌉·128], heads as in `RaggedPages`, n of them in 32 bits,
        with zeros at the end of both; for D = 64 [P, page, ⌈K/n⌉, n, 128], a value behind its key.
      kv_lens: [B] int32, with the new tokens.
      page_indices: [B·M] int32, all in [0, P).
      cu_q_lens: [B + 1] int32.
      distribution: [3] int32: the ends of the sequences that have one query, of those that have
        the kernel's fixed number (none), and of all others.
    """

    kv_cache: Array
    kv_lens: Array
    page_indices: Array
    cu_q_lens: Array
    distribution: Array


class FlashInferPages(NamedTuple):
    """FlashInfer's paged key/value cache; its arrays go there by DLPack.

    Arguments:
      paged_kv_cache: keys and values, each [P, page, K, D] (NHD) or [P, K, page, D] (HND); or both
        in one array, [P, 2, …].
      indptr: [B + 1] int32, where the pages of each sequence begin in ``indices``.
      indices: [B·M] int32, all in [0, P); those from ``indptr[B]`` on are padding.
      last_page_len: [B] int32, tokens in the last page; 0 for a sequence without tokens, which
        FlashInfer does not take.
    """

    paged_kv_cache: Array | tuple[Array, Array]
    indptr: Array
    indices: Array
    last_page_len: Array


def to_jax(pages: Pages, *, multiple: int = 1) -> JaxPages:
    """Ours as JAX's.

    Arguments:
      multiple: M is padded to a multiple of it: of ``pages_per_compute_block`` on a TPU, of
        ``k_splits`` times that on a GPU.

    Raises:
      ValueError: shapes or types that do not belong together, or unlike D and E.
    """
    _check(pages, alike=True)
    if not is_size(multiple) or multiple < 1:
        raise wrong("multiple", "be a positive int", repr(multiple))
    indices = jnp.pad(_in_range(pages), ((0, 0), (0, -pages.table.shape[1] % multiple)))
    return JaxPages(_swapped(pages.key, 0), _swapped(pages.value, 0), pages.lengths, indices)


def from_jax(given: JaxPages) -> Pages:
    """JAX's as ours; blocks beyond a sequence's length have no page."""
    key, value = (_swapped(x, 0) for x in (given.k_pages, given.v_pages))
    return _checked(key, value, given.page_indices, given.lengths)


def to_ragged(pages: Pages, counts: ArrayLike) -> RaggedPages:
    """Ours as RPA version 2's.

    Arguments:
      counts: [B] integers, how many of each sequence's last tokens are queries. Sequences without
        queries come last and are no part of the call; the others keep their order.

    Raises:
      ValueError: shapes or types that do not belong together, or unlike D and E.
    """
    _check(pages, alike=True)
    rows, counts = _active_first(pages, counts)
    number = jnp.sum(counts > 0, keepdims=True, dtype=jnp.int32)
    kv_pages = _interleaved(pages.key, pages.value)
    return RaggedPages(kv_pages, rows.lengths, _in_range(rows), _starts(counts), number)


def from_ragged(given: RaggedPages) -> Pages:
    """RPA version 2's as ours; sequences from ``num_seqs`` on have no tokens."""
    key, value = _separated(given.kv_pages)
    lengths = _first(given.kv_lens, given.num_seqs[0])
    return _checked(key, value, given.page_indices, lengths)


def to_tpu_inference(pages: Pages, counts: ArrayLike) -> TpuInferencePages:
    """Ours as RPA version 3's.

    Arguments:
      counts: as for `to_ragged`.

    Raises:
      ValueError: shapes or types that do not belong together, unlike D and E, a type of more than
        32 bits, or a page size that is no multiple of n.
    """
    _check(pages, alike=True)
    if pages.key.dtype.itemsize > 4:
        raise wrong("key", "be of a type of at most 32 bits", pages.key.dtype)
    packing = _packing(pages.key.dtype)
    if pages.key.shape[2] % packing:
        allowed = f"have a page size that is a multiple of {packing} for {pages.key.dtype}"
        raise wrong("key", allowed, pages.key.shape[2])
    rows, counts = _active_first(pages, counts)
    ones = jnp.sum(jnp.cumprod((counts == 1).astype(jnp.int32)), dtype=jnp.int32)
    distribution = jnp.stack([ones, ones, jnp.sum(counts > 0, dtype=jnp.int32)])
    if pages.key.shape[3] == _LANES // 2:
        kv = _swapped(jnp.concatenate([pages.key, pages.value], axis=3), 1)
    else:
        kv = _interleaved(pages.key, pages.value)
    kv = jnp.pad(kv, ((0, 0), (0, 0), (0, -kv.shape[2] % packing), (0, -kv.shape[3] % _LANES)))
    kv = kv.reshape(*kv.shape[:2], -1, packing, kv.shape[3])
    indices = _in_range(rows).reshape(-1)
    return TpuInferencePages(kv, rows.lengths, indices, _starts(counts), distribution)


def from_tpu_inference(given: TpuInferencePages, *, kv_heads: int, head_dim: int) -> Pages:
    """RPA version 3's as ours; sequences from ``distribution[2]`` on have no tokens.

    Arguments:
      kv_heads, head_dim: K and D, which the padded cache does not tell.

    Raises:
      ValueError: a cache that does not have this shape for K and D.
    """
    cache = given.kv_cache
    joined = head_dim == _LANES // 2
    packing = _packing(cache.dtype)
    rows = -(-kv_heads * (1 if joined else 2) // packing)
    expected = (*cache.shape[:2], rows, packing, -(-head_dim // _LANES) * _LANES)
    if cache.shape != expected:
        allowed = f"be {list(expected)} for {kv_heads} heads of size {head_dim}"
        raise wrong("kv_cache", allowed, cache.shape)
    kv = cache.reshape(*cache.shape[:2], rows * packing, cache.shape[4])
    if joined:
        both = _swapped(kv[:, :, :kv_heads], 1)
        key, value = both[..., :head_dim], both[..., head_dim:]
    else:
        key, value = _separated(kv[:, :, : 2 * kv_heads, :head_dim])
    lengths = _first(given.kv_lens, given.distribution[2])
    return _checked(key, value, given.page_indices.reshape(len(lengths), -1), lengths)


def to_flashinfer(pages: Pages, *, layout: str = "NHD", combined: bool = False) -> FlashInferPages:
    """Ours as FlashInfer's. In HND keys and values stay as they are.

    Arguments:
      layout: "NHD" or "HND", FlashInfer's ``kv_layout``.
      combined: keys and values in one array.

    Raises:
      ValueError: another layout, shapes or types that do not belong together, or unlike D and E in
        one array.
    """
    _check(pages, alike=combined)
    check_choice("layout", layout, ("NHD", "HND"))
    key, value = pages.key, pages.value
    if layout == "NHD":
        key, value = _swapped(key, 1), _swapped(value, 1)
    blocks = _blocks(pages.lengths, pages.key.shape[2])
    indptr = _starts(blocks)
    step = jnp.arange(pages.table.shape[1], dtype=jnp.int32)
    place = jnp.where(step < blocks[:, None], indptr[:-1, None] + step, pages.table.size)
    indices = jnp.zeros(pages.table.size, jnp.int32)
    indices = indices.at[place].set(_in_range(pages), mode="drop")
    last = pages.lengths - jnp.maximum(blocks - 1, 0) * pages.key.shape[2]
    cache = jnp.stack([key, value], axis=1) if combined else (key, value)
    return FlashInferPages(cache, indptr, indices, last)


def from_flashinfer(
    given: FlashInferPages, *, layout: str = "NHD", blocks: int | None = None
) -> Pages:
    """FlashInfer's as ours.

    Arguments:
      layout: "NHD" or "HND".
      blocks: M; default the most pages of a sequence, where that is known (not under jit).

    Raises:
      ValueError: another layout, no ``blocks`` under jit, or shapes that do not belong together.
    """
    check_choice("layout", layout, ("NHD", "HND"))
    cache = given.paged_kv_cache
    key, value = cache if isinstance(cache, tuple) else (cache[:, 0], cache[:, 1])
    if layout == "NHD":
        key, value = _swapped(key, 1), _swapped(value, 1)
    starts, number = given.indptr[:-1], jnp.diff(given.indptr)
    if blocks is None:
        if isinstance(number, Tracer):
            raise wrong("blocks", "be an int under jit", None)
        blocks = max(1, int(jnp.max(number)))
    step = jnp.arange(blocks, dtype=jnp.int32)
    table = given.indices.at[starts[:, None] + step].get(mode="fill", fill_value=-1)
    lengths = jnp.maximum(number - 1, 0) * key.shape[2] + given.last_page_len
    return _checked(key, value, table, lengths)


def _check(pages: Pages, *, alike: bool = False) -> None:
    """Raises unless the shapes and types of ``pages`` belong together.

    Arguments:
      alike: D and E are the same.
    """
    key, value, table, lengths = pages
    if key.ndim != 4:
        raise wrong("key", "be [P, K, page, D]", key.shape)
    size = "D" if not alike else key.shape[3]
    if value.ndim != 4 or value.shape[:3] != key.shape[:3] or (alike and value.shape != key.shape):
        allowed = f"be [{', '.join(map(str, key.shape[:3]))}, {'E' if not alike else size}]"
        raise wrong("value", f"{allowed}, as key's {key.shape}", value.shape)
    if value.dtype != key.dtype:
        raise wrong("value", f"be of key's type {key.dtype}", value.dtype, "Cast it.")
    for name, x, ndim in (("table", table, 2), ("lengths", lengths, 1)):
        if x.ndim != ndim or x.dtype != jnp.int32 or len(x) != len(table):
            allowed = f"be int32 of shape {'[B, M]' if ndim == 2 else f'[B] = [{len(table)}]'}"
            raise wrong(name, allowed, f"{x.dtype}{list(x.shape)}")


def _checked(key: Array, value: Array, table: Array, lengths: Array) -> Pages:
    """Our layout, without pages for blocks beyond a sequence's length."""
    pages = Pages(key, value, table, lengths)
    _check(pages)
    block = jnp.arange(table.shape[1], dtype=jnp.int32)
    has = block < _blocks(lengths, key.shape[2])[:, None]
    return pages._replace(table=jnp.where(has, table, -1))


def _in_range(pages: Pages) -> Array:
    """[B, M] int32: the table with page 0 where there is none."""
    table = pages.table
    return jnp.where((table >= 0) & (table < len(pages.key)), table, 0)


def _active_first(pages: Pages, counts: ArrayLike) -> tuple[Pages, Array]:
    """The pages and the counts with the sequences first that have queries."""
    counts = jnp.asarray(counts)
    if counts.shape != pages.lengths.shape or not jnp.issubdtype(counts.dtype, jnp.integer):
        allowed = f"be integers of shape [B] = [{len(pages.lengths)}]"
        raise wrong("counts", allowed, f"{counts.dtype}{list(counts.shape)}")
    order = jnp.argsort(counts <= 0, stable=True)
    rows = pages._replace(table=pages.table[order], lengths=pages.lengths[order])
    return rows, counts[order].astype(jnp.int32)


def _starts(counts: Array) -> Array:
    """[B + 1] int32: 0, and the sums of the counts up to each."""
    return jnp.pad(jnp.cumsum(counts, dtype=jnp.int32), (1, 0))


def _first(lengths: Array, number: Array) -> Array:
    """[B] int32: the first ``number`` lengths, then zeros."""
    return jnp.where(jnp.arange(len(lengths), dtype=jnp.int32) < number, lengths, 0)


def _blocks(lengths: Array, page_size: int) -> Array:
    """How many blocks so many tokens fill or begin."""
    return (lengths + (page_size - 1)) // page_size


def _interleaved(key: Array, value: Array) -> Array:
    """[P, page, 2K, D] of two [P, K, page, D]: the key of head h at 2h, its value at 2h + 1."""
    both = jnp.stack([key, value], axis=2)  # [P, K, 2, page, D]
    pages, heads, _, page_size, size = both.shape
    return _swapped(both.reshape(pages, 2 * heads, page_size, size), 1)


def _separated(kv: Array) -> tuple[Array, Array]:
    """Keys and values [P, K, page, D] of [P, page, 2K, D]."""
    both = _swapped(kv, 1)
    return both[:, 0::2], both[:, 1::2]


def _packing(dtype: jnp.dtype) -> int:
    """How many numbers of this type 32 bits hold."""
    return 4 // jnp.dtype(dtype).itemsize


def _swapped(x: Array, axis: int) -> Array:
    """``x`` with ``axis`` and the next one swapped."""
    return jnp.swapaxes(x, axis, axis + 1)
