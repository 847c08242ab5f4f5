"""A decoder on a `LatentCache`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from pasa_jax.core import bits
from pasa_jax.core.checks import is_size
from pasa_jax.core.errors import wrong
from pasa_jax.serving.sals._basis import Basis, dense
from pasa_jax.serving.sals._cache import LatentCache

if TYPE_CHECKING:
    from pasa_jax.models import Decoder

Array = jax.Array


@jax.jit
def prefill(model: Decoder, tokens: Array, caches: LatentCache) -> tuple[Array, LatentCache]:
    """Reads a prompt with dense attention, and stores it.

    Arguments:
      model: a `pasa_jax.models.Decoder`.
      tokens: [B, T] int32.
      caches: empty ones of all layers.

    Returns:
      The final states [B, T, W], see `Decoder.logits`, and the caches with the tokens.
    """
    states, kv = model.walk(tokens, dense(model), lambda q, k, v, layer: (k, v), rotate=False)
    return states, jax.vmap(LatentCache.append)(caches, *kv)


@jax.jit
def step(model: Decoder, tokens: Array, caches: LatentCache) -> tuple[Array, LatentCache]:
    """Reads the next tokens [B, T], T at most the caches' window, with sparse attention.

    Returns:
      The final states [B, T, W], see `Decoder.logits`, and the caches with the tokens.
    """
    return _step(model, tokens, caches, bits.stored_tree(model.blocks))


def _step(
    model: Decoder, tokens: Array, caches: LatentCache, blocks: Any
) -> tuple[Array, LatentCache]:
    def attend(caches: LatentCache, layer: Array, q: Array, k: Array, v: Array) -> Any:
        grown = jax.tree.map(lambda x: x[layer], caches).append(k, v)
        caches = jax.tree.map(lambda x, new: x.at[layer].set(new), caches, grown)
        return grown.attend(q), caches

    return model.remember(tokens, None, caches, blocks, attend)


def generate(
    model: Decoder, basis: Basis, tokens: ArrayLike, max_new_tokens: int, **options: Any
) -> Array:
    """The likeliest tokens that follow: a dense prompt, then steps on a `LatentCache`.

    Arguments:
      model: a `pasa_jax.models.Decoder`.
      basis: of its layers, from `calibrate`.
      tokens: [B, T] integers, prompts of one length.
      max_new_tokens: how many, at least 1.
      options: of `LatentCache.empty`: ``dtype``, ``sinks``, ``window``, ``top``, ``scored``.

    Returns:
      [B, max_new_tokens] int32.

    Raises:
      ValueError: an argument is wrong.
    """
    tokens = model.checked(tokens)
    room = model.config.max_length - tokens.shape[1]
    if not is_size(max_new_tokens) or not 1 <= max_new_tokens <= room:
        allowed = f"be an int from 1 to {room}, what max_length leaves after the prompt"
        raise wrong("max_new_tokens", allowed, repr(max_new_tokens))
    length = tokens.shape[1] + int(max_new_tokens)
    options = {"dtype": model.dtype, "rope_base": model.config.rope_base} | options
    caches = LatentCache.empty(basis, len(tokens), length, **options)
    return _generated(model, tokens, caches, int(max_new_tokens))


@partial(jax.jit, static_argnames="count")
def _generated(model: Decoder, tokens: Array, caches: LatentCache, count: int) -> Array:
    def likeliest(states: Array) -> Array:
        return jnp.argmax(model.logits(states[:, -1]), axis=-1).astype(jnp.int32)

    blocks = bits.stored_tree(model.blocks)  # once, before the loop

    def next_token(carry: tuple[Array, LatentCache], _: None) -> tuple[Any, Array]:
        states, caches = _step(model, carry[0][:, None], carry[1], blocks)
        return (likeliest(states), caches), carry[0]

    states, caches = prefill(model, tokens, caches)
    return lax.scan(next_token, (likeliest(states), caches), length=count)[1].T
