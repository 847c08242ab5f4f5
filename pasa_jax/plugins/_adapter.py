"""Shared by the two plug-ins: flax's arguments as arguments of `dot_product_attention`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp

from pasa_jax.call.api import dot_product_attention
from pasa_jax.core.errors import check_choice, wrong
from pasa_jax.core.precision import Precision

Array = jax.Array
Options = tuple[tuple[str, Any], ...]

# The options of an attention function; all other arguments come with each call.
OPTIONS = (
    "scale",
    "local_window_size",
    "implementation",
    "causal_alignment",
    "logits_soft_cap",
    "shift",
    "beta",
    "precision",
    "schedule",
    "attention",
)


def checked(options: dict[str, Any]) -> Options:
    """The options as a hashable tuple.

    Raises:
      ValueError: an unknown option, or one that is not hashable (modules are compared by it).
    """
    for name, value in options.items():
        check_choice("option", name, OPTIONS)
        try:
            hash(value)
        except TypeError:
            raise wrong(name, "be hashable: a number, a name or a tuple", repr(value)) from None
    return tuple(sorted(options.items()))


def call_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None,
    mask: Array | None,
    *,
    is_causal: bool,
    dropout_rng: Array | None,
    dropout_rate: float,
    broadcast_dropout: bool,
    deterministic: bool,
    precision: Any,
    options: dict[str, Any],
) -> Array:
    """`dot_product_attention` with flax's arguments: [batch…, T, N, D] to [batch…, T, N, E]."""
    _check_shapes(query, key, value)
    _check_precision(precision)
    _check_position(query, key, is_causal, options)
    drops = not deterministic and dropout_rate > 0
    if drops and dropout_rng is None:
        allowed = "be given where dropout_rate is not 0 and deterministic is False"
        raise wrong("dropout_rng", allowed, None, "Pass an rng for dropout to the module.")
    batch = query.shape[:-3]
    options = dict(options)
    attention = options.pop("attention", dot_product_attention)
    out = attention(
        *(_one_batch(x) for x in (query, key, value)),
        bias=None if bias is None else _one_batch_of_scores("bias", bias, batch),
        mask=None if mask is None else _one_batch_of_scores("mask", mask, batch).astype(bool),
        is_causal=is_causal,
        dropout_rate=dropout_rate if drops else 0.0,
        dropout_key=dropout_rng if drops else None,
        dropout_broadcast=broadcast_dropout,
        **options,
    )
    return out.reshape(*batch, *out.shape[1:])


def refuse(name: str, given: object, way_out: str) -> None:
    """Raises if an argument is given that only flax's own attention can use."""
    if given is not None:
        raise wrong(name, "be None: scores are computed tile by tile", repr(given), way_out)


def refuse_to_sow(module: object) -> None:
    """Raises if a module wants the attention weights: they never exist as a whole matrix."""
    if module is not None:
        allowed = "be False: attention weights are never held whole"
        way_out = (
            "Give the modules that sow flax's own attention_fn, or ask "
            "pasa_jax.dot_product_attention for return_statistics."
        )
        raise wrong("sow_weights", allowed, True, way_out)


def check_softmax(force_fp32_for_softmax: bool, options: dict[str, Any]) -> None:
    """Raises if the softmax must be in float32 and the options make it float16."""
    given = options.get("precision")
    if not force_fp32_for_softmax or given is None:
        return
    chosen = given if isinstance(given, Precision) else Precision.named(given)
    if "float16" in (chosen.statistics, chosen.exponential):
        allowed = "be False beside a precision whose softmax is in float16"
        raise wrong("force_fp32_for_softmax", allowed, True, "Choose another precision.")


def _check_shapes(query: Array, key: Array, value: Array) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim < 3 or x.shape[:-3] != query.shape[:-3]:
            allowed = f"be [batch…, length, heads, size], with the batch {query.shape[:-3]}"
            raise wrong(name, allowed, x.shape)


def _check_precision(precision: Any) -> None:
    """Raises for an algorithm by name. Any precision is fine: products of 16-bit numbers are exact,
    and those of float32 are as precise as "highest"."""
    for one in precision if isinstance(precision, tuple) else (precision,):
        try:
            jax.lax.Precision(one)
        except ValueError:
            allowed = "be None or a jax.lax.Precision: products are as precise as 'highest'"
            raise wrong(
                "precision", allowed, repr(one), "attention_fn(precision=…) names the types."
            ) from None


def _check_position(query: Array, key: Array, is_causal: bool, options: dict[str, Any]) -> None:
    """Raises if a position is needed that is not known: one query beside many keys comes from a
    decoder, and only the decoder's mask knows where it stands."""
    if query.shape[-3] != 1 or key.shape[-3] == 1:
        return
    window = options.get("local_window_size")
    for name, given in (("is_causal", is_causal or None), ("local_window_size", window)):
        if given is not None:
            allowed = f"be left out for one query beside {key.shape[-3]} keys"
            way_out = (
                "The mask of flax's decode cache hides later keys by itself; "
                "pasa_jax.plugins.KVCache knows the position."
            )
            raise wrong(name, allowed, given, way_out)


def _one_batch(x: Array) -> Array:
    """[batch…, L, H, D] -> [B, L, H, D]."""
    return x.reshape(-1, *x.shape[-3:]) if x.shape[:-3] else x[None]


def _one_batch_of_scores(name: str, x: Array, batch: tuple[int, ...]) -> Array:
    """A mask or bias that broadcasts to [batch…, N, T, S] as one that does to [B, N, T, S]."""
    x = jnp.asarray(x)
    if x.ndim > len(batch) + 3:
        raise wrong(name, f"broadcast to [batch…, N, T, S], with the batch {batch}", x.shape)
    x = x.reshape((1,) * (len(batch) + 3 - x.ndim) + x.shape)
    own = x.shape[: len(batch)]
    if any(a not in (1, b) for a, b in zip(own, batch, strict=True)):
        raise wrong(name, f"broadcast to [batch…, N, T, S], with the batch {batch}", x.shape)
    if math.prod(own) == 1:
        return x.reshape(1, *x.shape[-3:])
    return jnp.broadcast_to(x, (*batch, *x.shape[-3:])).reshape(-1, *x.shape[-3:])


# Giving modules another attention.

Choose = Callable[[str, Any], Mapping[str, Any] | None]


@contextmanager
def lent(module: Any, attention_fn: Callable[..., Array]) -> Iterator[None]:
    """A context in which a flax module has another ``attention_fn``.

    Flax would refuse to change the module here. ``object.__setattr__`` bypasses that, and the end
    of the context undoes the change.
    """
    before = module.attention_fn
    object.__setattr__(module, "attention_fn", attention_fn)
    try:
        yield
    finally:
        object.__setattr__(module, "attention_fn", before)


def options_for(
    path: str, module: Any, choose: Choose | None, options: dict[str, Any], native: object
) -> dict[str, Any] | None:
    """The options for one module's attention, or None if the module keeps its own.

    Arguments:
      choose: see `patch`.
      native: flax's own attention function, the only one that is replaced without being chosen.
    """
    if choose is None:
        _check_native(path, module.attention_fn, native)
    return chosen_options(path, module, choose, options)


def chosen_options(
    path: str, module: Any, choose: Choose | None, options: dict[str, Any]
) -> dict[str, Any] | None:
    """The common options together with those that ``choose`` gives; None if it gives None."""
    chosen = {} if choose is None else choose(path, module)
    return None if chosen is None else {**options, **chosen}


def _check_native(path: str, own: Any, native: object) -> None:
    if own is not native and not getattr(own, "__module__", "").startswith("pasa_jax.plugins."):
        way_out = "`choose` says which modules to change."
        raise wrong(f"attention_fn at {path!r}", "be flax's own", repr(own), way_out)
