"""The lists of tiles that a program on a TPU goes through, in SMEM."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels._common import Lists
from pasa_jax.core.mask import Index, div

# Numbers that lists may hold in SMEM, which has 1 MiB and is used by others too.
LISTED = 160 * 1024


class TileList(NamedTuple):
    """`Lists` as one array of SMEM: for each tile how many of those that it visits need a mask, how
    many it visits, and which: 2·tile + whether a block mask's function is asked.

    Arguments:
      numbers: [B|1 · K|1 · tiles · (2 + tiles of the other side)] int32.
      shape: (B|1, K|1, tiles, tiles of the other side)
    """

    numbers: Any
    shape: tuple[int, int, int, int]

    @staticmethod
    def of(lists: Lists) -> TileList:
        order = 2 * lists.order if lists.asks is None else 2 * lists.order + lists.asks
        parts = [lists.partial[..., None], lists.count[..., None], order]
        return TileList(jnp.concatenate(parts, axis=-1).reshape(-1), lists.order.shape)

    def row(self, b: Index, h: Index, i: Index) -> Index:
        """Where the numbers of tile i start."""
        batch, heads, rows, columns = self.shape
        place = (b if batch > 1 else 0) * heads + (h if heads > 1 else 0)
        return (place * rows + i) * (2 + columns)

    def tile(self, b: Index, h: Index, i: Index, t: Index) -> Index:
        """The t-th tile that tile i visits; beyond, the last one."""
        return div(self.numbers[self.row(b, h, i) + 2 + t], 2)

    def partials(self, b: Index, h: Index, i: Index) -> Any:
        """How many of the tiles that tile i visits need a mask."""
        return self.numbers[self.row(b, h, i)]

    def count(self, b: Index, h: Index, i: Index) -> Any:
        """How many tiles tile i visits."""
        return self.numbers[self.row(b, h, i) + 1]

    def asks(self, b: Index, h: Index, i: Index, t: Index) -> Any:
        """Bool: whether a block mask's function is asked in the t-th tile that tile i visits."""
        return (self.numbers[self.row(b, h, i) + 2 + t] & 1) != 0


def steps_of(lists: Lists, *, interpret: bool) -> Any:
    """How many steps a grid takes through lists: as many as the longest has tiles.

    Arguments:
      interpret: the interpreter takes no bound from the device.
    """
    return lists.order.shape[3] if interpret else jnp.maximum(jnp.max(lists.count), 1)


def tiles_at_once(heads: tuple[int, int], visited: int) -> int:
    """Of how many tiles the lists fit SMEM, each with room for so many visited ones.

    Arguments:
      heads: (B|1, K|1)
    """
    return LISTED // (heads[0] * heads[1] * (visited + 2))
