"""The plug-in for `flax.linen.MultiHeadDotProductAttention` and `SelfAttention`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import jax
from flax import linen
from flax.linen.dtypes import promote_dtype

from pasa_jax.plugins._adapter import (
    Choose,
    Options,
    call_attention,
    check_softmax,
    checked,
    lent,
    refuse,
    refuse_to_sow,
)
from pasa_jax.plugins._swap import Swap

Array = jax.Array
# Flax's own function, also inside a context that gives its name to another.
NATIVE = linen.dot_product_attention


def attention_fn(**options: Any) -> Callable[..., Array]:
    """A function for ``flax.linen.MultiHeadDotProductAttention(attention_fn=…)``.

    Linen passes only the keywords that the function's signature names, so it names them all:
    query [batch…, T, N, D], key and value [batch…, S, N, D], and

      mask, bias, dropout_rng, dropout_rate, broadcast_dropout, deterministic, dtype, precision: as
        in `pasa_jax.plugins.nnx.attention_fn`.
      force_fp32_for_softmax: always so, unless ``precision`` among the options says float16: then
        it is refused.
      einsum_dot_general, qk_attn_weights_einsum, attn_weights_value_einsum: refused, for there is
        no einsum.
      module: refused, for there are no attention weights to sow.

    Arguments:
      options: as in `pasa_jax.plugins.nnx.attention_fn`; equal options give the same function.

    Returns:
      The function; its output is [batch…, T, N, E].

    Raises:
      ValueError: an unknown option; when called, a wrong or refused argument, by name.

    >>> import jax, jax.numpy as jnp
    >>> from flax import linen
    >>> attention = linen.MultiHeadDotProductAttention(4, attention_fn=attention_fn())
    >>> x = jnp.ones((2, 10, 32))
    >>> attention.init_with_output(jax.random.key(0), x)[0].shape
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
        force_fp32_for_softmax: bool = False,
        einsum_dot_general: Any = None,
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
    ) -> Array:
        refuse_to_sow(module)
        way_out = "Leave it out, or use flax's own attention_fn in this module."
        refuse("einsum_dot_general", einsum_dot_general, way_out)
        refuse("qk_attn_weights_einsum", qk_attn_weights_einsum, way_out)
        refuse("attn_weights_value_einsum", attn_weights_value_einsum, way_out)
        check_softmax(force_fp32_for_softmax, dict(options))
        query, key, value = promote_dtype(query, key, value, dtype=dtype)
        return call_attention(
            query,
            key,
            value,
            bias,
            mask,
            is_causal=False,
            dropout_rng=dropout_rng,
            dropout_rate=dropout_rate,
            broadcast_dropout=broadcast_dropout,
            deterministic=deterministic,
            precision=precision,
            options=dict(options),
        )

    return attention


@contextmanager
def replaced(
    choose: Choose | None = None, *, missing_ok: bool = False, **options: Any
) -> Iterator[list[str]]:
    """A context in which linen's attention is `attention_fn`.

    Linen makes its modules anew at each call, so there is nothing to change in a model. Instead,
    every `MultiHeadDotProductAttention` (and what derives from it) that is called within the
    context, at whatever depth, takes another ``attention_fn`` for that call, and so does every
    call of `flax.linen.dot_product_attention`, by that name or one imported from there. A function
    that jit has compiled before is not traced again and stays as it was. Modules are swapped in
    this thread, the function in every one.

    Arguments:
      choose: (path, module) -> options for this module beside ``options``, or None to leave it;
        path as ``"encoder.layers_0.attention"``, or for the function
        ``"block.attention1: dot_product_attention"``, with the module that calls it, or None.
        Without it, everything is changed, and each module must have flax's own attention.
      missing_ok: no error where there is nothing to swap.
      options: as in `attention_fn`.

    Returns:
      A context manager; it yields a list, to which the path of each changed module and of each
      caller of the function is added.

    Raises:
      ValueError: an unknown option, an ``attention_fn`` that is not flax's own; at the end, where
        no attention was called or traced meanwhile.
    """
    swap = Swap(NATIVE, attention_fn, choose, options)

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        attends = isinstance(module, linen.MultiHeadDotProductAttention)
        if not attends or context.method_name != "__call__":
            return call(*args, **kwargs)
        swapped = swap.of_module(".".join(module.path), module)
        with lent(module, swapped or module.attention_fn):
            return call(*args, **kwargs)

    with linen.intercept_methods(intercept), swap.calls_of(linen.dot_product_attention):
        yield swap.changed
    if not missing_ok:
        swap.check("linen.replaced", "flax.linen")
