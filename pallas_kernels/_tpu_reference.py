"""The means of a head's blocks in the TPU kernel, and the fixed references that come from them.

The first program of a head finds the means and leaves them in scratch. The reference of a row is
the largest product with the mean of a block that it sees, raised a little. Nothing is proved
beforehand: the row's sum says afterwards whether its weights stayed in range
(`tile.in_range_by_sum`), and a query tile in which one did not is computed again with a running
maximum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels._tpu_inputs import LANES
from pallas_kernels._tpu_walk import MATRIX_ROWS, RefWalk, Specs
from pasa_jax.core import tile
from pasa_jax.core.mask import Index, minimum
from pasa_jax.core.tile.arrays import dot, query_key

Array = jax.Array
Ref = Any

_FLOAT = jnp.dtype("float32")


@dataclass(frozen=True)
class Blocks:
    """What the first program of a head leaves in scratch for all of them.

    Arguments:
      kappa: ref [blocks, D] float32, κ of each block, and zeros that fill whole vectors.
      value: ref [1, 128] float32, equal along the lanes: the largest magnitude in the values.
    """

    kappa: Ref
    value: Ref

    @staticmethod
    def shapes(specs: Specs, head_size: int) -> dict[str, tuple[int, int]]:
        rows = -(-(specs.key_tiles + 1) // MATRIX_ROWS) * MATRIX_ROWS
        return {"kappa": (rows, head_size), "value": (1, LANES)}

    def fill(self, walk: RefWalk, specs: Specs) -> None:
        """Looks at all keys and values of the head, or of the chunk."""
        if not specs.in_parts:
            self.kappa[...] = jnp.zeros_like(self.kappa)
            self.value[...] = jnp.zeros_like(self.value)
        first = walk.chunk * specs.chunk_tiles
        tiles = minimum(specs.chunk_tiles, specs.key_tiles - first)

        def look(j: Index, carry: int) -> int:
            self._look(walk, first + j)
            return carry

        if isinstance(tiles, int) and tiles <= walk.plan.schedule.unroll:
            for j in range(tiles):
                look(j, 0)
        else:
            lax.fori_loop(0, tiles, look, 0)

    def _look(self, walk: RefWalk, j: Index) -> None:
        k, v = walk.raw_keys(j)
        n, valid = walk.block_kv, walk.mask.valid_keys()
        count: Any = float(n)
        if not isinstance(valid, int) or valid % n:
            row = walk.key_start(j) + lax.broadcasted_iota(jnp.int32, (n, 1), 0)
            k, v = tile.zero_unusable(k, row < valid), tile.zero_unusable(v, row < valid)
            count = jnp.clip(jnp.int32(valid) - walk.key_start(j), 1, n).astype(_FLOAT)
        ones = jnp.ones((MATRIX_ROWS, n), k.dtype)
        kappa = dot(ones, k, (1, 0), _FLOAT)[:1] / count
        if walk.codes is not None:
            kappa = kappa.astype(walk.query_type).astype(_FLOAT)
            self._pack(walk, j, k.astype(_FLOAT) - kappa)
        if walk.numerics.storage is tile.Storage.PAST_MEAN:
            self._shift(j, k, kappa)
            return
        self.kappa[pl.ds(j, 1)] = kappa
        if walk.numerics.storage is not tile.Storage.BOUND:
            return
        largest = jnp.max(walk.largest(v), axis=1, keepdims=True)
        self.value[...] = jnp.maximum(self.value[...], largest)

    def _pack(self, walk: RefWalk, j: Index, shifted: Array) -> None:
        """Leaves the keys less κ of a tile, [n, D], in 8 bits."""
        assert walk.codes is not None
        refs, n = walk.codes, walk.block_kv
        codes, scale = tile.codes_of(shifted)
        at = walk.keys_at(j)
        refs.codes[at] = codes
        if walk.transposed:
            refs.scale[at] = scale
        else:
            refs.scale[:, at] = jnp.broadcast_to(scale, (n, LANES)).T[:1]

    def _shift(self, j: Index, k: Array, kappa: Array) -> None:
        """κ of the block after tile j is the mean of this one; of the first, the first key."""

        def first() -> None:
            self.kappa[:1] = k[:1].astype(_FLOAT)

        pl.when(j == 0)(first)
        self.kappa[pl.ds(j + 1, 1)] = kappa

    def refer(self, walk: RefWalk, start: Index, query: tile.QueryTile) -> tile.QueryTile:
        """``query`` with its reference."""
        numerics, n = walk.numerics, walk.block_kv
        kappa = self.kappa[...].astype(query.q.dtype)
        centre = query_key(query.q, kappa, _FLOAT, numerics) * query.gain
        if numerics.logits_soft_cap is not None:
            cap = jnp.float32(numerics.logits_soft_cap * numerics.unit)
            centre = cap * jnp.tanh(centre / cap)
        axis = 0 if walk.transposed else 1
        first = lax.broadcasted_iota(jnp.int32, centre.shape, axis) * n
        lo, hi = walk.mask.key_interval(walk.positions(start))
        seen = (first < hi) & (first + n > lo)
        reference = tile.fixed_reference(centre, seen, numerics)
        return query._replace(reference=reference)

    def in_range(self, walk: RefWalk, start: Index, l: Array) -> Array:  # noqa: E741
        """[1, 1] bool: whether the weights of all rows stayed in range, by their sums l."""
        lo, hi = walk.mask.key_interval(walk.positions(start))
        sees_nothing = (hi <= lo) | (walk.positions(start) >= walk.mask.query_length)
        fine = tile.in_range_by_sum(l, self.value[:, :1]) | sees_nothing
        fine = jnp.min(fine.astype(_FLOAT), axis=0, keepdims=True)
        return jnp.min(fine, axis=1, keepdims=True) > 0
