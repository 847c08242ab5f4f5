"""Attention without some keys, or within buckets: sorted, so that whole tiles are skipped."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pasa_jax import dot_product_attention
from pasa_jax.core.errors import wrong
from pasa_jax.sparse import _checks
from pasa_jax.sparse._delta import check_options

Array = jax.Array


def dropped_keys(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    keep_q: ArrayLike | None = None,
    keep_k: ArrayLike | None = None,
    **options: Any,
) -> Array:
    """Causal attention without the queries and the keys that are dropped, in the time of the rest.

    The kept rows are sorted to the front, in order, and attend at their old positions.

    Arguments:
      q, k, v: [B, T, N, D], [B, S, K, D], [B, S, K, E], T ≤ S; the last query stands at the last
        key.
      keep_q: bool [B, T] or [B, T, N]; None: all are kept.
      keep_k: bool [B, S] or [B, S, K]; None: all are kept.
      options: of `dot_product_attention`: scale, logits_soft_cap, implementation, shift, precision,
        schedule.

    Returns:
      [B, T, N, E] of q's type, differentiable. Dropped queries, and those whose keys are all
      dropped, are 0.

    Raises:
      ValueError: an argument is wrong.

    Source: Pagliardini et al., Sparse Flash Attention, arXiv 2306.01160, section 3.

    >>> x = jnp.ones((1, 4, 2, 8))
    >>> dropped_keys(x, x, x, keep_q=jnp.array([[True, False, True, True]]))[0, :, 0, 0].tolist()
    [1.0, 0.0, 1.0, 1.0]
    """
    arrays = _checked(q, k, v, options)
    of_q = _by_row("keep_q", keep_q, arrays[0], jnp.bool_)
    of_k = _by_row("keep_k", keep_k, arrays[1], jnp.bool_)
    rows, keys = _Sorted.of(~of_q), _Sorted.of(~_per_query_head(of_k, arrays[0]))
    return _attention(
        arrays,
        rows,
        keys,
        query_seq_lengths=jnp.sum(~rows.group, axis=1, dtype=jnp.int32),
        key_value_seq_lengths=jnp.sum(~keys.group, axis=1, dtype=jnp.int32),
        **options,
    )


def hash_buckets(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    q_buckets: ArrayLike,
    k_buckets: ArrayLike,
    **options: Any,
) -> Array:
    """Causal attention of each query over the keys of its own bucket.

    Rows are sorted by bucket, in order within each, and attend at their old positions with their
    buckets as segments: tiles that share no bucket are skipped.

    Arguments:
      q, k, v: [B, T, N, D], [B, S, K, D], [B, S, K, E], T ≤ S; the last query stands at the last
        key.
      q_buckets: integers [B, T] or [B, T, N]; see `random_buckets`.
      k_buckets: integers [B, S] or [B, S, K].
      options: as in `dropped_keys`.

    Returns:
      [B, T, N, E] of q's type, differentiable. A query with no key in its bucket is 0.

    Raises:
      ValueError: an argument is wrong.

    Source: Pagliardini et al., Sparse Flash Attention, arXiv 2306.01160, section 3.

    >>> x = jnp.arange(4.).reshape(1, 4, 1, 1)
    >>> odd = jnp.array([[0, 1, 0, 1]])
    >>> hash_buckets(0 * x, 0 * x, x, odd, odd)[0, :, 0, 0].tolist()
    [0.0, 1.0, 1.0, 2.0]
    """
    arrays = _checked(q, k, v, options)
    of_q = _by_row("q_buckets", q_buckets, arrays[0], jnp.integer)
    of_k = _by_row("k_buckets", k_buckets, arrays[1], jnp.integer)
    rows, keys = _Sorted.of(of_q), _Sorted.of(_per_query_head(of_k, arrays[0]))
    return _attention(arrays, rows, keys, segment_ids=(rows.group, keys.group), **options)


def random_buckets(x: ArrayLike, count: int, key: Array) -> Array:
    """The bucket of each row: the nearest of ``count`` random directions, in opposite pairs.

    Rows whose angle is small are likely to share one. Queries and keys must be given the same
    ``count`` and ``key``.

    Arguments:
      x: [B, L, N, D] queries or keys.
      count: of buckets, even.
      key: of `jax.random`.

    Returns:
      int32 [B, L, N].

    Raises:
      ValueError: an argument is wrong.

    Source: Kitaev et al., Reformer, arXiv 2001.04451, section 2.
    """
    x = jnp.asarray(x)
    if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise wrong("x", "be floating, [B, L, N, D]", f"{x.dtype}{list(x.shape)}")
    if _checks.size("count", count, 2) % 2:
        raise wrong("count", "be even", count)
    axes = jax.random.normal(key, (x.shape[3], count // 2), jnp.float32)
    along = jnp.matmul(x.astype(jnp.float32), axes, precision="highest")
    return jnp.argmax(jnp.concatenate([along, -along], axis=-1), axis=-1).astype(jnp.int32)


class _Sorted(NamedTuple):
    """Rows of each head, sorted: [B·N, L] which row stands where, and its group."""

    order: Array
    group: Array

    @staticmethod
    def of(group: Array) -> _Sorted:
        """By ``group`` [B, L, N], and in order within each."""
        group = jnp.swapaxes(group, 1, 2).reshape(-1, group.shape[1])
        order = jnp.argsort(group, axis=1, stable=True).astype(jnp.int32)
        return _Sorted(order, jnp.take_along_axis(group, order, axis=1))

    def take(self, x: Array) -> Array:
        """x [B·N, L, 1, D] in this order."""
        return jnp.take_along_axis(x, self.order[..., None, None], axis=1)

    def put_back(self, x: Array) -> Array:
        """The inverse of `take`."""
        back = jnp.argsort(self.order, axis=1).astype(jnp.int32)
        return jnp.take_along_axis(x, back[..., None, None], axis=1)


def _attention(
    arrays: tuple[Array, Array, Array], rows: _Sorted, keys: _Sorted, **options: Any
) -> Array:
    """[B, T, N, E] of the rows and keys in their orders, each head a batch entry."""
    q, k, v = arrays
    batch, length, heads, _ = q.shape
    k, v = (_per_query_head(x, q) for x in (k, v))
    q, k, v = (jnp.swapaxes(x, 1, 2).reshape(-1, x.shape[1], 1, x.shape[3]) for x in (q, k, v))
    out = dot_product_attention(
        rows.take(q),
        keys.take(k),
        keys.take(v),
        is_causal=True,
        q_positions=rows.order + jnp.int32(k.shape[1] - length),
        kv_positions=keys.order,
        **options,
    )
    return jnp.swapaxes(rows.put_back(out).reshape(batch, heads, length, -1), 1, 2)


def _per_query_head(x: Array, q: Array) -> Array:
    """x [B, S, K, ...] with each key head repeated for its query heads: [B, S, N, ...]."""
    return jnp.repeat(x, q.shape[2] // x.shape[2], axis=2)


def _checked(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, options: dict[str, Any]
) -> tuple[Array, Array, Array]:
    """The arrays, with the axis B."""
    check_options(options, sinks=False)
    q, k = _checks.query_key(q, k)
    v = jnp.asarray(v)
    if v.ndim != 4 or v.shape[:3] != k.shape[:3]:
        raise wrong("v", f"be [B, S, K, E] with k's {list(k.shape[:3])}", f"{v.shape}")
    return q, k, v


def _by_row(name: str, given: ArrayLike | None, like: Array, kind: Any) -> Array:
    """[B, L, heads] of what is given for ``like`` [B, L, heads, D]; None: all True."""
    if given is None:
        return jnp.ones(like.shape[:3], bool)
    x = jnp.asarray(given)
    right = x.dtype == kind if kind is jnp.bool_ else jnp.issubdtype(x.dtype, kind)
    if not right or x.shape not in (like.shape[:2], like.shape[:3]):
        kinds = "bool" if kind is jnp.bool_ else "integers"
        allowed = f"be {kinds}, {list(like.shape[:2])} or {list(like.shape[:3])}"
        raise wrong(name, allowed, f"{x.dtype}{list(x.shape)}")
    return jnp.broadcast_to(x if x.ndim == 3 else x[..., None], like.shape[:3])
