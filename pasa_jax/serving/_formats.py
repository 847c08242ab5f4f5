"""What each format of a cache would cost one call, head by head."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pasa_jax.call.api import dot_product_attention
from pasa_jax.core.errors import check_choice
from pasa_jax.core.packed import FORMATS, GROUP, pack_keys, pack_values

Array = jax.Array
TYPES = ("bfloat16", "float16")


@partial(jax.jit, static_argnums=0)
def as_stored(format: str, key: Array, value: Array) -> tuple[Array, Array]:
    """Keys and values as a cache of a format gives them back, in float32.

    Arguments:
      format: ``"int8"``, ``"float8_e4m3"``, ``"float8_e5m2"``, ``"bfloat16"`` or ``"float16"``.
      key, value: [B, S, K, D], [B, S, K, E]. Groups of 64 tokens are packed; the last may be
        shorter, and is packed too.

    Raises:
      ValueError: an unknown format.
    """
    check_choice("format", format, (*FORMATS, *TYPES))
    if format in TYPES:
        k, v = (x.astype(format).astype(jnp.float32) for x in (key, value))
        return k, v
    chosen, tokens = FORMATS[format], key.shape[1]

    def in_groups(x: Array) -> Array:  # [B, K, groups, 64, size], what is missing NaN
        x = jnp.moveaxis(x.astype(jnp.float32), 1, 2)
        spare = -tokens % GROUP
        x = jnp.pad(x, ((0, 0), (0, 0), (0, spare), (0, 0)), constant_values=jnp.nan)
        return x.reshape(*x.shape[:2], -1, GROUP, x.shape[-1])

    codes, scale, mean = pack_keys(in_groups(key), chosen)
    k = chosen.read(codes) * scale[..., None, :] + mean[..., None, :]
    codes, of_token = pack_values(value, chosen)
    k = k.reshape(*k.shape[:2], -1, k.shape[-1])[:, :, :tokens]
    return jnp.moveaxis(k, 2, 1), chosen.read(codes) * of_token[..., None]


def format_errors(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, **options: Any
) -> dict[str, Array]:
    """The largest error of an output that each format would make, [N] for each query head.

    Arguments:
      query, key, value: [B, T, N, D], [B, S, K, D], [B, S, K, E], as they would be cached: keys
        after rotary positions.
      options: of `pasa_jax.dot_product_attention`; default ``is_causal=True``, the queries last.

    Returns:
      By the name of a format, float32: the largest difference from attention over the arrays as
      they are, both in float32, over the largest output of the head.

    >>> import jax
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 16))
    >>> found = format_errors(q, k + 100, v)
    >>> bool((found["int8"] < found["bfloat16"]).all())
    True
    """
    options = {"is_causal": True, "causal_alignment": "bottom_right", **options}
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (query, key, value))
    attend = jax.jit(partial(dot_product_attention, **options))
    true = attend(q, k, v)
    largest = jnp.max(jnp.abs(true), axis=(0, 1, 3))

    def of(format: str) -> Array:
        found = attend(q, *as_stored(format, k, v))
        return jnp.max(jnp.abs(found - true), axis=(0, 1, 3)) / jnp.maximum(largest, 1e-30)

    return {format: of(format) for format in (*FORMATS, *TYPES)}
