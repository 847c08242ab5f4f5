"""`LowRankBias`: a bias as the product of two thin matrices (FlashBias), O(T + S) memory.

>>> import jax.numpy as jnp
>>> bias = LowRankBias.alibi(alibi_slopes(8), 4)
>>> [float(x) for x in bias.dense()[0, 0, 3]]  # 1/2 for each step to the left, of the first head
[-1.5, -1.0, -0.5, 0.0]
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from pasa_jax.core.errors import wrong

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class LowRankBias:
    """scale · q_factors · k_factorsᵀ, added to the scaled scores; differentiable.

    The product is computed in float32 (float64 for float64 inputs), tile by tile: whole numbers up
    to 2^24 in the factors give an exact product, which ``scale`` multiplies afterwards.

    Arguments:
      q_factors: [T, R], [N, T, R] or [B, N, T, R], B and N may be 1.
      k_factors: [S, R], [N, S, R] or [B, N, S, R].
      scale: [] or [N] or [B, N]; default 1.
    """

    q_factors: ArrayLike
    k_factors: ArrayLike
    scale: ArrayLike = 1.0

    def dense(self) -> Array:
        """[B|1, N|1, T, S] the bias itself."""
        q, k = (_with_heads(jnp.asarray(x)) for x in (self.q_factors, self.k_factors))
        product = jnp.einsum("...tr,...sr->...ts", q, k, precision="highest")
        scale = jnp.asarray(self.scale)
        return product * scale.reshape((1,) * (2 - scale.ndim) + scale.shape)[..., None, None]

    @staticmethod
    def alibi(
        slopes: ArrayLike,
        query_length: int | None = None,
        key_length: int | None = None,
        *,
        q_positions: ArrayLike | None = None,
        kv_positions: ArrayLike | None = None,
    ) -> LowRankBias:
        """ALiBi for causal attention: slope · (position of the key − position of the query).

        The difference is exact for positions up to 10⁶ and beyond, to 2^24. Without a causal mask
        ALiBi is −slope·|i − j|, which has no low rank: use a ``score_mod``.

        Arguments:
          slopes: [N], see `alibi_slopes`.
          query_length, key_length: T and S; S = T by default. The positions are 0, 1, ….
          q_positions, kv_positions: [T] or [B, T], [S] or [B, S] integers, in place of these.
        """
        if q_positions is None:
            if query_length is None:
                raise wrong("query_length", "be given where q_positions is not", None)
            q_positions = jnp.arange(query_length, dtype=jnp.int32)
        if kv_positions is None:
            if key_length is None and query_length is None:
                kv_positions = q_positions
            else:
                length = query_length if key_length is None else key_length
                kv_positions = jnp.arange(length, dtype=jnp.int32)
        q, k = (_of_batch(jnp.asarray(x, jnp.float32)) for x in (q_positions, kv_positions))
        slopes = jnp.asarray(slopes)
        if slopes.ndim != 1:
            raise wrong("slopes", "be [N]", f"{slopes.shape}")
        return LowRankBias(
            jnp.stack([jnp.ones_like(q), -q], axis=-1),
            jnp.stack([k, jnp.ones_like(k)], axis=-1),
            slopes,
        )

    @staticmethod
    def squared_distance(x_q: ArrayLike, x_k: ArrayLike, scale: ArrayLike = -1.0) -> LowRankBias:
        """scale · ‖x_q − x_k‖² of points [T, d] and [S, d], or [B, T, d] and [B, S, d]; rank d + 2.

        The points are taken relative to the mean of the keys', so that a common offset costs no
        digits.
        """
        q, k = (jnp.asarray(x) for x in (x_q, x_k))
        if q.ndim != k.ndim or q.ndim not in (2, 3) or q.shape[-1] != k.shape[-1]:
            allowed = "be [S, d] or [B, S, d], as x_q is"
            raise wrong("x_k", allowed, f"{k.shape} beside {q.shape}")
        centre = jax.lax.stop_gradient(jnp.mean(k, axis=-2, keepdims=True))
        q, k = q - centre, k - centre

        def with_square(x: Array, factor: float, first: bool) -> Array:
            square, one = jnp.sum(x * x, axis=-1, keepdims=True), jnp.ones_like(x[..., :1])
            pair = (square, one) if first else (one, square)
            joined = jnp.concatenate([*pair, factor * x], axis=-1)
            return joined if joined.ndim == 2 else joined[:, None]

        return LowRankBias(with_square(q, -2.0, True), with_square(k, 1.0, False), scale)

    @staticmethod
    def from_svd(bias: ArrayLike, energy: float = 0.995, rank: int | None = None) -> LowRankBias:
        """The least rank that keeps a share of the energy of ``bias`` [T, S], [N, T, S] or
        [B, N, T, S] in each head: of the sum of its squares.

        Arguments:
          bias: with numbers; no tracer, since the rank depends on them.
          energy: in (0, 1].
          rank: this rank, whatever share it keeps.
        """
        if isinstance(bias, Tracer):
            way_out = "Call it outside of jax.jit, or find the factors beforehand."
            raise wrong("bias", "have numbers when its rank is chosen", "a tracer", way_out)
        if not 0 < energy <= 1:
            raise wrong("energy", "lie in (0, 1]", energy)
        dense = np.asarray(bias, np.float64)
        if dense.ndim not in (2, 3, 4) or not np.isfinite(dense).all():
            raise wrong("bias", "be finite, [T, S], [N, T, S] or [B, N, T, S]", f"{dense.shape}")
        left, values, right = np.linalg.svd(dense, full_matrices=False)
        if rank is None:
            kept = energy_of_ranks(values)
            rank = int(np.max(np.sum(kept < energy, axis=-1))) + 1
        rank = min(max(1, rank), values.shape[-1])
        root = np.sqrt(values[..., :rank])
        q = left[..., :rank] * root[..., None, :]
        k = np.swapaxes(right[..., :rank, :], -1, -2) * root[..., None, :]
        return LowRankBias(jnp.asarray(q, jnp.float32), jnp.asarray(k, jnp.float32))


def energy_of_ranks(values: np.ndarray) -> np.ndarray:
    """The share of the energy that each rank keeps, from singular values in descending order."""
    square = np.square(values)
    total = np.sum(square, axis=-1, keepdims=True)
    return np.cumsum(square, axis=-1) / np.where(total > 0, total, 1) + (total == 0)


def alibi_slopes(heads: int) -> Array:
    """[N] float32, the slopes of ALiBi: 2^(−8(i+1)/N); where N is no power of two, those of the
    power below it, then every second one of twice that power (Press et al., arXiv 2108.12409).
    """
    if heads < 1:
        raise wrong("heads", "be positive", heads)

    def of_power(n: int) -> list[float]:
        return [2.0 ** (-8 * (i + 1) / n) for i in range(n)]

    power = 2 ** math.floor(math.log2(heads))
    slopes = of_power(power) + of_power(2 * power)[::2][: heads - power]
    return jnp.asarray(slopes, jnp.float32)


def _with_heads(x: Array) -> Array:
    """[L, R], [N, L, R] or [B, N, L, R] as the last of them."""
    return x.reshape((1,) * (4 - x.ndim) + x.shape)


def _of_batch(x: Array) -> Array:
    """[L] as it is, [B, L] as [B, 1, L]."""
    return x if x.ndim == 1 else x[:, None]
