"""The joint low-rank space of a layer's keys, found from the keys of a text."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pasa_jax import dot_product_attention
from pasa_jax.core.checks import is_size
from pasa_jax.core.errors import wrong
from pasa_jax.core.precision import FLOATS
from pasa_jax.core.rotary import rotated, rotation

if TYPE_CHECKING:
    from pasa_jax.models import Decoder

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Basis:
    """The r directions in which the keys of all heads of a layer, taken together, vary most.

    A key k, K·D numbers before its rotary positions, is stored as z = U·(k − mean), r numbers, and
    rebuilt as mean + Uᵀ·z; the rows of U are orthonormal.

    Arguments:
      directions: U, [..., r, K, D] float32, the largest variance first.
      mean: [..., K, D] float32.
      kept: [...] float32, the share of the variance that the directions hold. What is missing from
        1 is the mean squared error of rebuilt keys, by their variance.

    The leading axes are layers, or none.
    """

    directions: Array
    mean: Array
    kept: Array

    @staticmethod
    def of(keys: ArrayLike, rank: int) -> Basis:
        """The basis of one layer.

        Arguments:
          keys: [M, K, D] floats, keys of M tokens before their rotary positions.
          rank: r, from 1 to K·D.

        Raises:
          ValueError: an argument is wrong, or a key is not finite.

        >>> Basis.of(jnp.eye(8).reshape(8, 2, 4), 4).directions.shape
        (4, 2, 4)
        """
        keys = jnp.asarray(keys)
        if keys.ndim != 3 or 0 in keys.shape or str(keys.dtype) not in FLOATS:
            raise wrong("keys", "be floats [M, K, D]", f"{keys.dtype}{list(keys.shape)}")
        _check_rank(rank, keys.shape[1] * keys.shape[2])
        products, total = _sums(keys)
        return _of_sums(products, total, len(keys), rank)


def calibrate(model: Decoder, tokens: ArrayLike, rank: int, *, skip: int = 16) -> Basis:
    """The bases of all layers, from the keys of a text.

    Arguments:
      model: a `pasa_jax.models.Decoder`.
      tokens: [B, T] integers, T > ``skip``; some thousand tokens like those to come.
      rank: r, from 1 to K·D. A quarter of K·D is "25 %".
      skip: how many tokens at the start of each text are left out: models keep keys there that are
        unlike all others, and `LatentCache` stores them as they are.

    Returns:
      A `Basis` with L as its first axis.

    Raises:
      ValueError: an argument is wrong, or a key is not finite.

    Source: SALS, arXiv 2510.24273. There the keys are not centred, and no token is left out.
    """
    config = model.config
    _check_rank(rank, config.kv_heads * config.head_dim)
    tokens = model.checked(tokens)
    if not is_size(skip) or skip >= tokens.shape[1]:
        raise wrong("skip", f"be an int from 0 to {tokens.shape[1] - 1}, below T", repr(skip))
    products, total = _observed(model, tokens, int(skip))
    return _of_sums(products, total, tokens.shape[0] * (tokens.shape[1] - int(skip)), rank)


@partial(jax.jit, static_argnames="skip")
def _observed(model: Decoder, tokens: Array, skip: int) -> tuple[Array, Array]:
    """What `_sums` gives, for each layer."""

    def look(q: Array, k: Array, v: Array, layer: Array) -> tuple[Array, Array]:
        del q, v, layer
        return _sums(k[:, skip:].reshape(-1, *k.shape[2:]))

    return model.walk(tokens, dense(model), look, rotate=False)[1]


def dense(model: Decoder) -> Any:
    """Causal attention of ``model`` over queries and keys before their rotary positions."""

    def attention(q: Array, k: Array, v: Array, layer: Array) -> Array:
        del layer
        at = jnp.arange(q.shape[1], dtype=jnp.int32)
        turn = rotation(at, model.config.head_dim, model.config.rope_base)
        return dot_product_attention(rotated(q, turn), rotated(k, turn), v, is_causal=True)

    return attention


def _sums(keys: Array) -> tuple[Array, Array]:
    """Of keys [M, K, D]: Σ kᵀ·k [K·D, K·D] and Σ k [K, D]."""
    flat = keys.reshape(len(keys), -1).astype(jnp.float32)
    products = jnp.matmul(flat.T, flat, precision=jax.lax.Precision.HIGHEST)
    return products, jnp.sum(flat, axis=0).reshape(keys.shape[1:])


def _of_sums(products: Array, total: Array, count: int, rank: int) -> Basis:
    """The basis of ``count`` keys."""
    mean = np.asarray(total, np.float64) / count  # [..., K, D]
    if not np.all(np.isfinite(mean)):
        way_out = "Calibrate in float32 or bfloat16, which hold larger numbers than float16."
        raise wrong("keys", "be finite", "others", way_out)
    flat = mean.reshape(*products.shape[:-1])
    covariance = np.asarray(products, np.float64) / count - flat[..., None] * flat[..., None, :]
    variances, vectors = np.linalg.eigh(covariance)  # ascending
    variances = np.maximum(variances, 0)
    largest = np.swapaxes(vectors[..., ::-1], -1, -2)[..., :rank, :]
    share = variances[..., -rank:].sum(-1) / np.maximum(variances.sum(-1), np.finfo(float).tiny)
    return Basis(
        directions=jnp.asarray(largest.reshape(*largest.shape[:-1], *mean.shape[-2:]), jnp.float32),
        mean=jnp.asarray(mean, jnp.float32),
        kept=jnp.asarray(share, jnp.float32),
    )


def _check_rank(rank: int, most: int) -> None:
    if not is_size(rank) or not 1 <= rank <= most:
        raise wrong("rank", f"be an int from 1 to K·D = {most}", repr(rank))
