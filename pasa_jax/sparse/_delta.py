"""What sparse attention lost, measured on some rows and added to all."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pasa_jax import dot_product_attention
from pasa_jax.core.errors import wrong
from pasa_jax.sparse import _checks

Array = jax.Array


def delta_correction(
    sparse_out: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    gamma: int = 64,
    *,
    last: int | None = None,
    **options: Any,
) -> Array:
    r"""Sparse outputs with the difference to dense attention, known for every γ-th row, added.

        out[i] = sparse[i] + dense[γ·⌊i/γ⌋] − sparse[γ·⌊i/γ⌋],   and out[i] = dense[i] at the end.

    It helps where neighbours lose alike, and harms where they do not: for differences of equal size
    and correlation c the error becomes √(2 − 2c) of what it was.

    Arguments:
      sparse_out: [B, T, N, E] output of sparse causal attention over q, k and v.
      q, k, v: [B, T, N, D], [B, S, K, D], [B, S, K, E], T ≤ S; the last query stands at the last
        key.
      gamma: γ; dense attention of T/γ + ``last`` rows is computed.
      last: how many of the last rows are dense; default T mod γ + max(128, γ).
      options: of `dot_product_attention`: scale, logits_soft_cap, sinks, implementation, shift,
        precision, schedule.

    Returns:
      [B, T, N, E] of the type of ``sparse_out``.

    Raises:
      ValueError: an argument is wrong.

    Source: Willette et al., Delta Attention, arXiv 2505.11254.
    """
    q, k = _checks.query_key(q, k)
    length = q.shape[1]
    sparse_out = jnp.asarray(sparse_out)
    allowed = (*q.shape[:3], np.shape(v)[-1] if np.ndim(v) else 0)
    if sparse_out.shape != allowed:
        raise wrong("sparse_out", f"be [B, T, N, E] = {list(allowed)}", f"{sparse_out.shape}")
    gamma = _checks.size("gamma", gamma)
    last = length % gamma + max(128, gamma) if last is None else _checks.size("last", last, 0)
    check_options(options, sinks=True)
    start = max(0, length - last)
    sampled = np.arange(0, start, gamma, dtype=np.int32)
    rows = np.concatenate([sampled, np.arange(start, length, dtype=np.int32)])
    at = jnp.asarray(rows + (k.shape[1] - length))
    dense = dot_product_attention(q[:, rows], k, v, is_causal=True, q_positions=at, **options)
    return _spread(sparse_out, dense, start, gamma)


@partial(jax.jit, static_argnums=(2, 3))
def _spread(sparse_out: Array, dense: Array, start: int, gamma: int) -> Array:
    """The sparse rows before ``start`` with the differences added, and dense ones after it."""
    wide, dense = sparse_out[:, :start].astype(jnp.float32), dense.astype(jnp.float32)
    sampled = wide[:, ::gamma]
    difference = jnp.repeat(dense[:, : sampled.shape[1]] - sampled, gamma, axis=1)[:, :start]
    out = jnp.concatenate([wide + difference, dense[:, sampled.shape[1] :]], axis=1)
    return out.astype(sparse_out.dtype)


_OPTIONS = ("scale", "logits_soft_cap", "implementation", "shift", "beta", "precision", "schedule")


def check_options(options: dict[str, Any], *, sinks: bool) -> None:
    """Raises unless all are options of attention that do not say what a query sees."""
    allowed = (*_OPTIONS, "sinks") if sinks else _OPTIONS
    for name in options:
        if name not in allowed:
            raise wrong("options", f"be of {', '.join(allowed)}", repr(name))
