"""How well a language model predicts, and how far two are apart."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

Array = jax.Array


def log_probabilities(logits: Array) -> Array:
    """float32 log-probabilities [..., V] of logits [..., V]."""
    return jax.nn.log_softmax(logits.astype(jnp.float32))


def perplexity(log_probabilities: Array, tokens: ArrayLike) -> float:
    """exp of the mean negative log-probability of each next token.

    Arguments:
      log_probabilities: [..., T, V], of the token that follows each position.
      tokens: [..., T] integers.
    """
    following = jnp.asarray(tokens)[..., 1:, None]
    chosen = jnp.take_along_axis(log_probabilities[..., :-1, :], following, axis=-1)
    return float(jnp.exp(-jnp.mean(chosen)))


def divergence(true: Array, found: Array) -> float:
    """Mean KL(true ‖ found) of the next-token distributions, from log-probabilities [..., T, V]."""
    return float(jnp.mean(jnp.sum(jnp.exp(true) * (true - found), axis=-1)))
