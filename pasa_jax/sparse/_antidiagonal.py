"""Blocks by sums of scores along antidiagonals."""

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
_TOGETHER = 16  # rows of blocks whose scores are computed at once


def xattention(
    q: ArrayLike,
    k: ArrayLike,
    *,
    stride: int = 16,
    threshold: float = 0.9,
    block_size: int = 128,
    scale: float | None = None,
) -> BlockMask:
    r"""The blocks that hold most of the weight, guessed from one score for stride × stride pairs.

    With s the stride, groups of s queries and s keys are compared along an antidiagonal,

        a[i, j] = scale/s · Σ_r q[i·s + s−1−r] · k[j·s + r],   0 ≤ r < s,

    a softmax over the groups j that group i sees is summed over blocks, and of each row of blocks
    those are kept that hold ``threshold`` of it: block 0 and the diagonal first, then the largest.
    What one key of a group gets is divided by s before the softmax: a lone key is lost.

    Arguments:
      q: [B, T, N, D] queries.
      k: [B, S, K, D] keys, T ≤ S; the last query stands at the last key.
      stride: s, a divisor of ``block_size``; time and memory fall with it, T·S·D/s and T·S/s².
      threshold: τ in (0, 1].
      block_size: queries of a block, and keys.
      scale: of the scores; default 1/√D.

    Returns:
      A `BlockMask` [B, N]; causality is the caller's.

    Raises:
      ValueError: an argument is wrong.

    Source: Xu et al., XAttention, arXiv 2503.16428, section 2.
    """
    q, k = _checks.query_key(q, k)
    grid = Grid.of(q, k, block_size)
    if block_size % _checks.size("stride", stride):
        raise wrong("stride", f"be a divisor of block_size = {block_size}", stride)
    threshold = _checks.share("threshold", threshold)
    factor = _checks.scale(scale, q.shape[3]) / stride
    return _chosen(q, k, grid, stride, factor, threshold)


@partial(jax.jit, static_argnums=(2, 3))
def _chosen(
    q: Array, k: Array, grid: Grid, stride: int, factor: ArrayLike, threshold: ArrayLike
) -> BlockMask:
    mass = by_head(lambda q, k: _mass(q, k, grid, stride, factor), q, k)
    return grid.mask(grid.cover(mass, threshold))


def _mass(q: Array, k: Array, grid: Grid, stride: int, factor: ArrayLike) -> Array:
    """[rows, columns] float32: the weight of each block of one head."""
    groups = grid.block_size // stride  # of a block
    # Padding is 0: its products are, too. Groups of padding alone are hidden, or not counted.
    q = jnp.pad(q, ((0, grid.rows * grid.block_size - grid.length), (0, 0)))
    k = jnp.pad(k, ((0, grid.columns * grid.block_size - grid.keys), (0, 0)))
    q = q.reshape(grid.rows, groups, stride, -1)[:, :, ::-1].reshape(grid.rows, groups, -1)
    k = k.reshape(grid.columns * groups, -1)
    key = jnp.arange(len(k), dtype=jnp.int32) * stride  # the first of each group

    def row(inputs: tuple[Array, Array]) -> Array:
        i, query = inputs
        first = (i * groups + jnp.arange(groups, dtype=jnp.int32))[:, None] * stride
        last = jnp.minimum(first + stride, grid.length) - 1
        scores = jnp.matmul(query, k.T, preferred_element_type=jnp.float32) * factor
        weights = jax.nn.softmax(jnp.where(key <= last + grid.offset, scores, -jnp.inf), axis=-1)
        weights = jnp.where(first < grid.length, weights, jnp.zeros_like(weights))
        return jnp.sum(weights.reshape(groups, grid.columns, groups), axis=(0, 2))

    index = jnp.arange(grid.rows, dtype=jnp.int32)
    return lax.map(row, (index, q), batch_size=_TOGETHER)
