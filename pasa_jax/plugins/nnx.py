"""The plug-in for `flax.nnx.MultiHeadAttention`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
from flax.nnx.nn.dtypes import promote_dtype as flax_promote_dtype

from pasa_jax.plugins._adapter import Options, attend, checked, refuse_to_sow

Array = jax.Array


def attention_fn(**options: Any) -> Callable[..., Array]:
    """A function for ``flax.nnx.MultiHeadAttention(attention_fn=…)``.

    It takes every argument of `flax.nnx.dot_product_attention`: query [batch…, T, N, D], key and
    value [batch…, S, K, D] (N a multiple of K), and

      mask: any type, broadcastable to [batch…, N, T, S]; what is not 0 is seen. Flax's decode
        cache passes one.
      bias: floating, broadcastable likewise. Flax's modules never pass one; `functools.partial`
        can.
      is_causal: query i sees keys up to i; refused for one query beside many keys, whose position
        the function is not told.
      dropout_rng, dropout_rate, broadcast_dropout, deterministic: as in flax, with other random
        bits.
      dtype, promote_dtype: the type of the computation, as in flax.
      precision: a `jax.lax.Precision`; products are always as precise as its ``HIGHEST``.
      module: refused, for there are no attention weights to sow.

    Arguments:
      options: of `pasa_jax.dot_product_attention`, by keyword: ``shift``, ``precision``, ``beta``,
        ``schedule``, ``implementation``, ``scale``, ``logits_soft_cap``, ``local_window_size``,
        ``causal_alignment``. Equal options give the same function, so that modules made with it
        share compiled code.

    Returns:
      The function; its output is [batch…, T, N, E].

    Raises:
      ValueError: an unknown option; when called, a wrong or refused argument, by name.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> attention = nnx.MultiHeadAttention(
    ...     4, 32, attention_fn=attention_fn(), decode=False, rngs=nnx.Rngs(0)
    ... )
    >>> attention(jnp.ones((2, 10, 32)), is_causal=True).shape
    (2, 10, 32)
    """
    return _attention_fn(checked(options))


@cache
def _attention_fn(options: Options) -> Callable[..., Array]:
    def attention(
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None = None,
        mask: Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        promote_dtype: Callable[..., Any] = flax_promote_dtype,
        is_causal: bool = False,
    ) -> Array:
        refuse_to_sow(module)
        query, key, value = promote_dtype((query, key, value), dtype=dtype)
        return attend(
            query,
            key,
            value,
            bias,
            mask,
            is_causal=is_causal,
            dropout_rng=dropout_rng,
            dropout_rate=dropout_rate,
            broadcast_dropout=broadcast_dropout,
            deterministic=deterministic,
            precision=precision,
            options=dict(options),
        )

    return attention
