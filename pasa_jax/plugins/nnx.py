"""The plug-in for `flax.nnx.MultiHeadAttention`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

import jax
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype as flax_promote_dtype

from pasa_jax.plugins import _callers
from pasa_jax.plugins._adapter import Choose, Options, call_attention, checked, lent, refuse_to_sow
from pasa_jax.plugins._swap import Swap

Array = jax.Array
# Flax's own function, also inside a context that gives its name to another.
NATIVE = nnx.dot_product_attention


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
        ``causal_alignment``; and ``attention``, a function in its place, as
        `pasa_jax.parallel.attention_fn` makes one for a mesh of devices. Equal options give the
        same function, so that modules made with it share compiled code.

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
        return call_attention(
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


@contextmanager
def replaced(
    choose: Choose | None = None, *, missing_ok: bool = False, **options: Any
) -> Iterator[list[str]]:
    """A context in which nnx's attention is `attention_fn`.

    As `pasa_jax.plugins.linen.replaced`: every `flax.nnx.MultiHeadAttention` that is called within
    the context takes another ``attention_fn`` for that call, and so does every call of
    `flax.nnx.dot_product_attention`, which `pasa_jax.plugins.patch` cannot change in a model. A
    function that jit has compiled before is not traced again and stays as it was. The change is
    seen by every thread.

    Arguments:
      choose: (path, module) -> options for this module beside ``options``, or None to leave it;
        path as ``"encoder.layers.0.attention"``, or for the function
        ``"encoder.layers.0: dot_product_attention"``, with the module that calls it, or None.
        Without it, everything is changed, and each module must have flax's own attention.
      missing_ok: no error where there is nothing to swap.
      options: as in `attention_fn`.

    Returns:
      A context manager; it yields a list, to which the path of each changed module and of each
      caller of the function is added.

    Raises:
      ValueError: an unknown option, an ``attention_fn`` that is not flax's own; at the end, where
        no attention was called or traced meanwhile.

    >>> import jax.numpy as jnp
    >>> x = jnp.full((1, 4, 2, 64), 300.0, jnp.float16)
    >>> with replaced(shift="mean"):
    ...     bool(jnp.all(nnx.dot_product_attention(x, x, x) == 300))
    True
    """
    swap = Swap(NATIVE, attention_fn, choose, options)
    with _modules_swapped(swap), swap.calls_of(nnx.dot_product_attention):
        yield swap.changed
    if not missing_ok:
        swap.check("nnx.replaced", "flax.nnx")


@contextmanager
def _modules_swapped(swap: Swap) -> Iterator[None]:
    """Replaces ``__call__`` in the class, since jit and scan run copies of a model's modules."""
    kind: Any = nnx.MultiHeadAttention
    before = kind.__call__
    # Not the method of an outer context, which would set its own attention again.
    original = getattr(before, "original", before)

    @wraps(before)
    def call(module: Any, *args: Any, **keywords: Any) -> Any:
        path = _callers.path([module, *_callers.modules(_callers.frames())])
        swapped = swap.of_module(path, module)
        if swapped is None:
            return before(module, *args, **keywords)
        with lent(module, swapped):
            return original(module, *args, **keywords)

    call.original = original  # pyright: ignore[reportAttributeAccessIssue]
    kind.__call__ = call
    try:
        yield
    finally:
        kind.__call__ = before
