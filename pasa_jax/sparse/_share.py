"""Heads alike share the blocks of one of them, whose whole softmax is computed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import rel_entr
from jax.typing import ArrayLike

from pasa_jax import BlockMask
from pasa_jax.core.checks import is_size, positive
from pasa_jax.core.errors import wrong
from pasa_jax.sparse import _checks
from pasa_jax.sparse._grid import Grid, by_head
from pasa_jax.sparse._lines import count_marked, last_weights, sums_of_lines

Array = jax.Array


def share_prefill(
    q: ArrayLike,
    k: ArrayLike,
    clusters: Sequence[Sequence[int]],
    *,
    threshold: float = 0.9,
    similarity: float = 0.5,
    fallback: float = 0.9,
    block_size: int = 128,
    scale: float | None = None,
) -> BlockMask:
    r"""The blocks that the first head of a cluster looks at, for the others of it that are alike.

    The first head of each cluster, its pivot, is dense. Another head takes the blocks that hold
    ``threshold`` of each row's weight in the pivot, if the last queries of both look alike,

        √JS(p, p′) < similarity,   JS(p, p′) = ½·Σ p·ln(p/m) + ½·Σ p′·ln(p′/m),   m = (p + p′)/2,

    for the sums of the last queries' softmax by blocks of keys and by blocks of distances, and if
    the columns and diagonals of the pivot hold less than ``fallback`` of its weight. Every other
    head, and each one in no cluster, gets its own columns and diagonals: as many blocks of them as
    hold ``threshold`` of what its last queries see.

    Arguments:
      q: [B, T, N, D] queries.
      k: [B, S, K, D] keys, T ≤ S; the last query stands at the last key.
      clusters: query heads that were found alike beforehand, each in at most one cluster. A cluster
        of one head shares nothing.
      threshold, fallback: in (0, 1].
      similarity: a positive number; √JS is at most √ln 2 ≈ 0.83.
      block_size: queries of a block, and keys; also how many of the last queries are asked.
      scale: of the scores; default 1/√D.

    Returns:
      A `BlockMask` [B, N]; causality is the caller's. Pivots cost O(T·S) time here besides.

    Raises:
      ValueError: an argument is wrong.

    Source: SharePrefill, arXiv 2505.19578, section 4; here within one layer.

    >>> x = jnp.zeros((1, 256, 3, 8))
    >>> share_prefill(x, x, clusters=[[0, 2]]).shape
    (1, 3, 256, 256)
    """
    q, k = _checks.query_key(q, k)
    grid = Grid.of(q, k, block_size)
    scale = _checks.scale(scale, q.shape[3])
    threshold, fallback = (
        _checks.share(name, x) for name, x in (("threshold", threshold), ("fallback", fallback))
    )
    similarity = positive("similarity", similarity)
    groups = tuple(c for c in _clusters(clusters, q.shape[2]) if len(c) > 1)
    return _chosen(q, k, grid, groups, scale, threshold, similarity, fallback)


@partial(jax.jit, static_argnums=(2, 3))
def _chosen(
    q: Array,
    k: Array,
    grid: Grid,
    groups: tuple[tuple[int, ...], ...],
    scale: ArrayLike,
    threshold: ArrayLike,
    similarity: ArrayLike,
    fallback: ArrayLike,
) -> BlockMask:
    last = q[:, -min(grid.block_size, q.shape[1]) :]
    kept, columns, distances = by_head(
        lambda q, k: _own(last_weights(q, k, scale), grid, threshold), last, k
    )
    if not groups:
        return grid.mask(kept)
    pivots = np.array([c[0] for c in groups], np.int32)
    members = np.array([h for c in groups for h in c[1:]], np.int32)
    which = np.array([i for i, c in enumerate(groups) for _ in c[1:]], np.int32)
    of_key = pivots // (q.shape[2] // k.shape[2])
    weights = by_head(lambda q, k: _weights(q, k, grid, scale), q[:, :, pivots], k[:, :, of_key])
    by_lines = jnp.sum(jnp.where(kept[:, pivots], weights, jnp.zeros_like(weights)), (2, 3))
    alike = by_lines < fallback * jnp.sum(weights, (2, 3))
    alike = alike[:, which]
    for x in (columns, distances):
        alike &= js_distance(x[:, members], x[:, pivots[which]]) < similarity
    shared = grid.cover(weights, threshold)[:, which]
    shared = jnp.where(alike[..., None, None], shared, kept[:, members])
    return grid.mask(kept.at[:, members].set(shared).at[:, pivots].set(True))


def js_distance(p: ArrayLike, other: ArrayLike) -> Array:
    """√JS of distributions along the last axis, in [0, √ln 2]; 0·ln 0 is 0."""
    p, other = jnp.asarray(p), jnp.asarray(other)
    middle = (p + other) / 2
    divergence = jnp.sum(rel_entr(p, middle) + rel_entr(other, middle), axis=-1) / 2
    return jnp.sqrt(jnp.maximum(divergence, 0))


def _own(weights: Array, grid: Grid, threshold: ArrayLike) -> tuple[Array, Array, Array]:
    """The blocks of one head's columns and diagonals, and the shares of both, by blocks.

    Arguments:
      weights: [n, S] float32, the softmax of the last queries.

    Returns:
      [rows, columns] bool, [columns] float32, [columns] float32.
    """
    lines = [x / len(weights) for x in sums_of_lines(weights)]
    pooled = [_pool(x, grid) for x in lines]
    marks = []
    for fine, coarse in zip(lines, pooled, strict=True):
        largest = jnp.sort(fine, descending=True)
        needed = jnp.sum(jnp.cumsum(largest) < threshold, dtype=jnp.int32) + 1
        rank = jnp.argsort(jnp.argsort(-coarse.at[0].set(jnp.inf), stable=True))
        chosen = rank < needed // grid.block_size + 1
        marks.append(jnp.repeat(chosen, grid.block_size)[: grid.keys])
    (q_first, q_last), (k_first, k_last) = grid.query_ends, grid.key_ends
    kept = count_marked(marks[0], k_first, k_last) > 0
    kept |= count_marked(marks[1], q_first - k_last, q_last - k_first) > 0
    return (kept | grid.forced) & grid.causal, pooled[0], pooled[1]


def _pool(x: Array, grid: Grid) -> Array:
    """[..., columns]: x [..., S] summed over blocks of keys."""
    more = grid.columns * grid.block_size - grid.keys
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more)])
    return jnp.sum(x.reshape(*x.shape[:-1], grid.columns, grid.block_size), axis=-1)


def _weights(q: Array, k: Array, grid: Grid, scale: ArrayLike) -> Array:
    """[rows, columns] float32: the softmax of one head, summed over keys, averaged over queries."""
    size = grid.block_size
    q = jnp.pad(q, ((0, grid.rows * size - grid.length), (0, 0))).reshape(grid.rows, size, -1)
    key = jnp.arange(grid.keys, dtype=jnp.int32)

    def row(inputs: tuple[Array, Array]) -> Array:
        i, query = inputs
        at = i * size + jnp.arange(size, dtype=jnp.int32)[:, None]
        scores = jnp.matmul(query, k.T, preferred_element_type=jnp.float32) * scale
        weights = jax.nn.softmax(jnp.where(key <= at + grid.offset, scores, -jnp.inf), axis=-1)
        weights = jnp.where(at < grid.length, weights, jnp.zeros_like(weights))
        queries = jnp.sum(at < grid.length, dtype=jnp.float32)
        return jnp.sum(_pool(weights, grid), axis=0) / queries

    return lax.map(row, (jnp.arange(grid.rows, dtype=jnp.int32), q))


def _clusters(given: Sequence[Sequence[int]], heads: int) -> list[tuple[int, ...]]:
    """The clusters, lists of heads; no head is in two places."""
    try:
        clusters = [list(c) for c in given]
    except TypeError:
        clusters = []
        seen: object = repr(given)
    else:
        seen = clusters
    members = [h for c in clusters for h in c]
    right = all(is_size(h) and h < heads for h in members) and len(set(members)) == len(members)
    if not right or any(not c for c in clusters) or isinstance(seen, str):
        allowed = f"be lists of query heads below {heads}, no head in two places, none empty"
        raise wrong("clusters", allowed, seen, "A head may be in no cluster.")
    return [tuple(int(h) for h in c) for c in clusters]
