"""One tile of the backward pass on a TPU, wherever its rows lie.

Each score is computed anew from its row's maximum, which the forward pass has left: it is the
reference of `Storage.BOUND`, as any other that is known beforehand.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels._common import floating, known
from pallas_kernels._float16 import from_bits
from pallas_kernels._tpu_backward_blocks import Gradients
from pallas_kernels._tpu_tiles import TileWalk
from pasa_jax.core import tile
from pasa_jax.core.mask import Index, Mask
from pasa_jax.core.mods import Data
from pasa_jax.core.operands import Factors

if TYPE_CHECKING:
    from pasa_jax.core.shapes import Bool, Float

Array = jax.Array
Ref = Any

_LARGEST = float(jnp.finfo(jnp.float32).max)


class Columns(NamedTuple):
    """What is known of each row, [R, 1] each."""

    m: Array  # the maximum; the largest number for a row that sees nothing, whose weights are 0
    share: Array  # 1/l
    delta: Array
    total: Array  # Σ dS over the keys, which is known without them

    @staticmethod
    def of(x: Array) -> Columns:
        """The columns that stand side by side in x [R, 8]."""
        return Columns(*(x[:, c : c + 1] for c in range(len(Columns._fields))))


def statistics(
    m: Array,
    l: Array,  # noqa: E741
    d_lse: Array | None,
    sink: Array | None,
    inside: Array,
    numerics: tile.Numerics,
) -> tuple[list[Array], Array]:
    """m, 1/l, the log-sum-exp's cotangent and, where there are sinks, their weight of rows; and
    which rows have more than m.

    Arguments:
      sink: that of each row's head, of the shape of m, or None.
      inside: bool, False for rows of padding.
    """
    live = (l != 0) & (m != tile.lowest(m.dtype)) & inside
    m = jnp.where(live, m, jnp.full_like(m, _LARGEST))
    l = jnp.where(live, l, jnp.ones_like(l))  # noqa: E741
    rows = [m, 1 / l, jnp.zeros_like(l) if d_lse is None else d_lse]
    if sink is not None:
        rows.append(tile.sink_weight(sink, m, l, numerics, None))
    return rows, live


def mean_key(k: Float[Array, "n D"], usable: Bool[Array, "n 1"]) -> Float[Array, "1 D"]:
    """κ, the mean of some usable keys.

    Σ_j dS_ij·k_j = Σ_j dS_ij·(k_j − κ) + κ·Σ_j dS_ij for any κ, and the last sum is known. So a
    mean that all keys share does not multiply the rounding of dS.
    """
    usable = finite(k) & usable
    total = jnp.sum(tile.zero_unusable(k.astype(jnp.float32), usable), axis=0, keepdims=True)
    count = jnp.sum(usable.astype(jnp.float32), axis=0, keepdims=True)
    return tile.mean_key(total, count, jnp.dtype(jnp.float32))


def finite(x: Float[Array, "n d"]) -> Bool[Array, "n 1"]:
    """Whether all of a row is finite."""
    return jnp.sum(x.astype(jnp.float32) * 0, axis=1, keepdims=True) == 0


def hides_keys(mask: Mask) -> bool:
    """Whether there may be a key that no row sees.

    If it is not finite, it must not reach the sums. If a key that a row sees is not finite, nor is
    the forward pass's result, and the lax walk computes both passes.
    """
    if mask.data_dependent or mask.mods is not None:
        return True
    if mask.query_lengths is not None or mask.key_lengths is not None:
        return True
    ends = (mask.query_range(c, c + 1, 1) for c in (0, mask.key_length - 1))
    return any(r.lo >= r.hi for r in ends)  # what rows see, all together, has no gaps


@dataclass(frozen=True, kw_only=True)
class BackwardWalk(TileWalk):
    """A program of the backward pass, whose refs hold the keys of one tile.

    Arguments:
      kappa: ref [1, D], see `mean_key`.
    """

    kappa: Ref

    @abstractmethod
    def columns(self, start: Index) -> Columns:
        """What is known of the rows at ``start``."""

    def keys_at(self, j: Index) -> Any:
        return slice(None)

    def sinks(self) -> None:
        """They are in l."""

    def rows(self, ref: Ref, start: Index) -> Array:
        """[R, …] of a block [1, 1, G, rows, …]."""
        x = from_bits(ref[0, 0, :, self.rows_at(start)])
        return x.reshape(-1, x.shape[-1])

    @property
    def padded(self) -> bool:
        """Whether some rows are padding."""
        short = self.mask.query_length % self.block_q != 0
        return short or self.mask.query_lengths is not None

    def used(self, x: Array, start: Index) -> Array:
        """Rows x [R, …], zeros where they are padding."""
        return tile.zero_unusable(x, self.in_use(start)) if self.padded else x

    def in_use(self, start: Index) -> Bool[Array, "R 1"]:
        return self.positions(start) < self.mask.valid_queries()

    def seen(self, start: Index, j: Index, asks: Array | None = None) -> Bool[Array, "R n"]:
        seen = super().seen(start, j, asks)
        return seen & self.in_use(start) if self.mask.query_length % self.block_q else seen

    def query(self, start: Index) -> tile.QueryTile:
        q = self.used(self.rows(self.refs.query, start), start)
        scale = self.refs.scale[0].astype(self.numerics.product)
        return tile.query_tile(q, scale, None, self.numerics)

    def key(self, j: Index, value_gain: Array | None = None) -> tile.KeyTile:
        assert value_gain is None
        k, v = (from_bits(x[0, 0]) for x in (self.refs.key, self.refs.value))
        usable = self.usable(j)
        if hides_keys(self.mask):
            of_both = finite(k) & finite(v)
            usable = of_both if usable is None else usable & of_both
        return tile.key_tile(k, v, usable, self.numerics)

    def centred(self, key: tile.KeyTile) -> Float[Array, "n D"]:
        """The keys without κ, unusable ones zeroed."""
        k = (key.k.astype(jnp.float32) - self.kappa[...]).astype(key.k.dtype)
        return k if key.usable is None else tile.zero_unusable(k, key.usable.reshape(-1, 1))

    def reverse(
        self, start: Index, j: Index, key: tile.KeyTile, k: Float[Array, "n D"], seen: Array | None
    ) -> tuple[tile.TileGradients, tile.Scores]:
        """What the rows at ``start`` and key tile j add to the gradients, and their scores."""
        row = self.columns(start)
        query = self.query(start)._replace(reference=row.m)
        state = self.begin()[0]
        s = self.scores(start, query, key, state, j, seen, with_slope=True)
        p = tile.probabilities(s, query, self.numerics).astype(self.numerics.product) * row.share
        d_o = self.used(self.rows(self.refs.d_out, start), start)
        return tile.reverse(p, s, key, query.q, k, d_o, row.delta, self.numerics), s

    def add_shared(
        self, outs: Gradients, start: Index, j: Index, s: tile.Scores, d_scores: Array
    ) -> None:
        """Adds a tile's part to the gradients of factors and of data, as far as ``outs`` has them.

        Factors and data that are hidden may be anything, and are zeroed; those that are seen and
        not finite have made ``d_scores`` NaN.
        """
        if outs.factors is not None:
            self._add_factors(outs.factors, start, j, d_scores)
        if jax.tree.leaves(outs.data):
            self._add_data(outs.data, start, j, s, d_scores)

    def _add_factors(self, outs: Factors, start: Index, j: Index, d_scores: Array) -> None:
        """To blocks [1, 1, G|1, R, rows], [1, 1, G|1, R, n] and [1, 1, G, 1, n]."""
        of, rows, keys = self.factors(start, j), self.rows_at(start), self.keys_at(j)
        for g, scale in enumerate(of.scale):
            q, k = (known(x[min(g, len(x) - 1)]) for x in (of.q, of.k))
            d = d_scores[g * self.block_q : (g + 1) * self.block_q]
            d_q, d_k = jax.vjp(lambda q, k: self.outer([q], [k], 0), q, k)[1](d)
            _add(outs.q, g, rows, d_q * scale)
            _add(outs.k, g, keys, d_k * scale)
            _add(outs.scale, g, keys, jnp.sum(d_k * k, axis=0, keepdims=True))

    def _add_data(
        self, outs: Data, start: Index, j: Index, s: tile.Scores, d_scores: Array
    ) -> None:
        """To blocks [1, 1, G|1, 1, rows], [1, 1, G|1, 1, n] and [1, 1, G, 1, rows]."""
        mods, data = self.mask.mods, self._data(start, j)
        assert mods is not None
        assert s.given is not None
        given, place, rows = s.given, self._place(start, j), self.rows_at(start)
        learned = jax.tree.map(known, floating(data, mods.data))

        def scored(learned: Data) -> Array:
            return mods.scored(given, place, learned.beside(data))

        (found,) = jax.vjp(scored, learned)[1](d_scores.astype(given.dtype))
        for refs, parts in ((outs.query, found.query), (outs.head, found.head)):
            for ref, x in zip(refs, parts, strict=True):  # [R, 1]
                for g in self._heads:
                    of_head = x if x is None else x[g * self.block_q : (g + 1) * self.block_q]
                    _add(ref, g, rows, of_head, turned=True)
        for ref, x in zip(outs.key, found.key, strict=True):  # [1, n], or [R, n]
            if ref is None:
                continue
            for g in range(ref.shape[2]):
                of_head = x[g * self.block_q : (g + 1) * self.block_q]
                _add(ref, g, self.keys_at(j), jnp.sum(of_head, axis=0, keepdims=True))


def _add(ref: Ref | None, g: int, at: Any, x: Array | None, *, turned: bool = False) -> None:
    """Adds x [R, L] to what query head g, or all, have in a block [1, 1, G|1, R, L].

    Arguments:
      turned: x is [L, 1].
    """
    if ref is None or x is None:
        return
    place = (0, 0, min(g, ref.shape[2] - 1), slice(None), at)
    ref[place] = ref[place] + (x.reshape(1, -1) if turned else x)
