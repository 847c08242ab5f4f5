"""Columns and diagonals that the last queries look at."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from pasa_jax import BlockMask
from pasa_jax.core.errors import wrong
from pasa_jax.sparse import _checks
from pasa_jax.sparse._grid import Grid, by_head

Array = jax.Array


def line_scores(
    q: ArrayLike, k: ArrayLike, *, queries: int = 64, scale: float | None = None
) -> tuple[Array, Array]:
    """What the last queries give to each key, and to each distance: sums of their softmax.

    Arguments:
      q, k: [B, T, N, D] and [B, S, K, D]; of q only the last ``queries`` are read.
      queries: how many; all, where there are fewer.
      scale: of the scores; default 1/√D.

    Returns:
      (columns, diagonals), each [B, N, S] float32: over the queries, the sum of what key s gets,
      and of what the key s before the query gets. Each sums to the number of queries.

    Raises:
      ValueError: an argument is wrong.
    """
    q, k = _checks.query_key(q, k)
    queries = min(_checks.size("queries", queries), q.shape[1])
    scale = _checks.scale(scale, q.shape[3])
    return _line_scores(q[:, -queries:], k, scale)


@jax.jit
def _line_scores(q: Array, k: Array, scale: ArrayLike) -> tuple[Array, Array]:
    return by_head(lambda q, k: sums_of_lines(last_weights(q, k, scale)), q, k)


def last_weights(q: Array, k: Array, scale: ArrayLike) -> Array:
    """[n, S] float32: the causal softmax of the last queries q [n, D] over the keys k [S, D]."""
    at, key = _positions(len(q), len(k))
    scores = jnp.matmul(q, k.T, preferred_element_type=jnp.float32) * scale
    return jax.nn.softmax(jnp.where(key <= at, scores, -jnp.inf), axis=-1)


def sums_of_lines(weights: Array) -> tuple[Array, Array]:
    """The sums of columns and of diagonals, [S] each, of the last queries' weights [n, S]."""
    at, key = _positions(*weights.shape)
    before = at - key
    moved = jnp.take_along_axis(weights, jnp.maximum(before, 0), axis=1)
    moved = jnp.where(before >= 0, moved, jnp.zeros_like(moved))
    return jnp.sum(weights, axis=0), jnp.sum(moved, axis=0)


def _positions(queries: int, keys: int) -> tuple[Array, Array]:
    """[n, 1] and [1, S] int32: where the last queries stand, and the keys."""
    key = jnp.arange(keys, dtype=jnp.int32)
    return key[keys - queries :, None], key[None]


def vertical_slash(
    q: ArrayLike,
    k: ArrayLike,
    *,
    vertical: int = 1000,
    slash: int = 6096,
    queries: int = 64,
    sinks: int = 30,
    local: int = 100,
    block_size: int = 128,
    scale: float | None = None,
) -> BlockMask:
    """The blocks that hold a key, or a distance, that the last queries look at most.

    It finds a single key that the last queries ask for, and repeated text (a diagonal); it cannot
    find what only earlier queries ask for. A column makes every block that it passes seen, so
    scattered columns leave little hidden: choose few.

    Arguments:
      q: [B, T, N, D] queries, of which the last ones are read.
      k: [B, S, K, D] keys, T ≤ S; the last query stands at the last key.
      vertical: how many keys, those of the first ``sinks`` among them.
      slash: how many distances, those below ``local`` among them.
      queries: how many of the last queries are asked.
      sinks, local: how many of the first keys and of the least distances are kept in any case.
      block_size: queries of a block, and keys.
      scale: of the scores; default 1/√D.

    Returns:
      A `BlockMask` [B, N]; causality is the caller's.

    Raises:
      ValueError: an argument is wrong.

    Source: Jiang et al., MInference 1.0, arXiv 2407.02490, section 3.

    >>> q = k = jnp.zeros((1, 640, 1, 8)).at[0, 140, 0, 0].set(90.).at[0, 576:, 0, 0].set(9.)
    >>> vertical_slash(q, k, vertical=40, slash=100)
    BlockMask(1 × 1 heads, 640 × 640 in blocks of 128 × 128, 44.00 % hidden)
    █░░░░
    ██░░░
    ███░░
    ████░
    ██░██
    """
    q, k = _checks.query_key(q, k)
    columns, diagonals = line_scores(q, k, queries=queries, scale=scale)
    return vertical_slash_of(
        columns,
        diagonals,
        q.shape[1],
        vertical=vertical,
        slash=slash,
        sinks=sinks,
        local=local,
        block_size=block_size,
    )


def vertical_slash_of(
    columns: ArrayLike,
    diagonals: ArrayLike,
    T: int,
    *,
    vertical: int = 1000,
    slash: int = 6096,
    sinks: int = 30,
    local: int = 100,
    block_size: int = 128,
) -> BlockMask:
    """`vertical_slash` of statistics that the caller has: of earlier chunks, say.

    Arguments:
      columns, diagonals: [B, N, S], as `line_scores` returns them; only their order counts.
      T: how many queries the mask is for; the last one stands at key S − 1.

    Raises:
      ValueError: an argument is wrong.
    """
    columns, diagonals = jnp.asarray(columns), jnp.asarray(diagonals)
    for name, x in (("columns", columns), ("diagonals", diagonals)):
        if x.ndim != 3 or x.shape != columns.shape or not jnp.issubdtype(x.dtype, jnp.floating):
            seen = f"{x.dtype}{list(x.shape)}"
            raise wrong(name, "be floating, [B, N, S], both of one shape", seen)
    grid = Grid(*_checks.lengths(T, columns.shape[2]), _checks.size("block_size", block_size))
    counts = {"vertical": vertical, "sinks": sinks, "slash": slash, "local": local}
    return _chosen(columns, diagonals, grid, *(_checks.size(n, x, 0) for n, x in counts.items()))


@partial(jax.jit, static_argnums=(2, 3, 4, 5, 6))
def _chosen(
    columns: Array, diagonals: Array, grid: Grid, vertical: int, sinks: int, slash: int, local: int
) -> BlockMask:
    seen_keys, distances = _largest(columns, vertical, sinks), _largest(diagonals, slash, local)
    by_column = count_marked(seen_keys, *grid.key_ends) > 0
    (q_first, q_last), (k_first, k_last) = grid.query_ends, grid.key_ends
    by_diagonal = count_marked(distances, q_first - k_last, q_last - k_first) > 0
    return grid.mask(by_column | by_diagonal | grid.forced)


def _largest(x: Array, count: int, forced: int) -> Array:
    """bool [B, N, S]: the ``count`` largest of each row of x, the first ``forced`` among them."""
    first = jnp.arange(x.shape[-1], dtype=jnp.int32) < forced
    _, index = lax.top_k(jnp.where(first, jnp.inf, x), min(count, x.shape[-1]))
    b, h, _ = jnp.ogrid[: x.shape[0], : x.shape[1], :1]
    return jnp.broadcast_to(first, x.shape).at[b, h, index].set(True)


def count_marked(marked: Array, low: ArrayLike, high: ArrayLike) -> Array:
    """[..., rows|1, columns]: how many of marked [..., S] are at ``low`` … ``high``, inclusive."""
    length = marked.shape[-1]
    total = jnp.cumsum(marked, axis=-1, dtype=jnp.int32)
    total = jnp.pad(total, [(0, 0)] * (marked.ndim - 1) + [(1, 0)])
    low, high = (jnp.clip(jnp.asarray(x), 0, length) for x in (low, jnp.asarray(high) + 1))
    return total[..., high] - total[..., low]
