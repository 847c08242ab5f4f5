"""The first keys and the last ones: what does not look at queries or keys."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pasa_jax import BlockMask
from pasa_jax.sparse import _checks
from pasa_jax.sparse._grid import Grid

Array = jax.Array


@dataclass(frozen=True)
class _Near:
    """Key kv is a sink, or one of the last ``window`` up to query q. Equal ones compile once."""

    sinks: int
    window: int
    offset: int

    def __call__(self, b: Array, h: Array, q: Array, kv: Array) -> Array:
        del b, h
        return (kv < self.sinks) | (kv > q + (self.offset - self.window))


def sink_window(T: int, S: int, sinks: int, window: int, block_size: int = 128) -> BlockMask:
    """The first ``sinks`` keys and the last ``window`` up to each query, to the key.

    Arguments:
      T, S: lengths, T ≤ S. The last query stands at the last key.
      sinks: how many of the first keys every query sees, at least 0.
      window: how many keys up to itself a query sees, itself included, at least 1.
      block_size: queries of a block, and keys.

    Returns:
      A `BlockMask` of one head for all; causality is the caller's.

    Raises:
      ValueError: an argument is wrong.

    Source: Xiao et al., StreamingLLM, arXiv 2309.17453.

    >>> sink_window(512, 512, sinks=4, window=128)
    BlockMask(1 × 1 heads, 512 × 512 in blocks of 128 × 128, 43.75 % hidden)
    █░░░
    ▒█░░
    ▒▒█░
    ▒░▒█
    """
    _checks.lengths(T, S)
    sinks, window = _checks.size("sinks", sinks, 0), _checks.size("window", window)
    grid = Grid(T, S, _checks.size("block_size", block_size))
    (q_first, q_last), (k_first, k_last) = grid.query_ends, grid.key_ends
    some = (k_first < sinks) | (k_last > q_first - window)
    whole = (k_last < sinks) | (k_first > q_last - window)
    kinds = np.where(grid.causal & some, 1 + whole, 0).astype(np.int8)
    return _of(jnp.asarray(kinds)[None, None], grid, _Near(sinks, window, grid.offset))


@partial(jax.jit, static_argnums=(1, 2))
def _of(kinds: Array, grid: Grid, near: _Near) -> BlockMask:
    return BlockMask.from_kinds(kinds, (grid.length, grid.keys), grid.block_size, near)
