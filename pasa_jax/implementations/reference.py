"""The reference implementation: the plain formula, in float32 or float64, T × S scores in memory.

It differentiates in every mode (`jax.jvp`, `jax.hessian`), and the other implementations are tested
against it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from pasa_jax.core import dropout as _dropout
from pasa_jax.core.mask import Mask
from pasa_jax.core.mods import Data
from pasa_jax.core.operands import Factors, Operands
from pasa_jax.core.plan import Plan
from pasa_jax.core.tile import lowest, shown_by, wide_type

if TYPE_CHECKING:
    from pasa_jax.core.shapes import Bool, Float

Array = jax.Array


def adapt(plan: Plan) -> Plan:
    """``plan`` with scores in float32 at least, and without a guard.

    A narrower type that the caller named stays, and `supports` refuses it. Without a guard, scores
    beyond float32 are not finite.
    """
    if plan.precision.scores in ("float16", "bfloat16") and not plan.explicit_precision:
        wide = replace(plan.precision, scores="float32", probabilities="float32")
        plan = replace(plan, precision=wide)
    return replace(plan, guarded=False)


def supports(operands: Operands, mask: Mask, plan: Plan) -> str | None:
    """None, or the reason: it stores no score in 16 bits, and shifts are made for such scores."""
    del operands, mask
    if plan.shift not in ("auto", "none"):
        return f"it computes the plain formula, without the shift {plan.shift!r}"
    if plan.precision.eight_bits:
        return "it multiplies queries and keys as they are, not in 8 bits"
    if plan.explicit_precision and plan.precision.scores in ("float16", "bfloat16"):
        return f"it stores scores in float32 at least, not in {plan.precision.scores}"
    return None


@partial(jax.jit, static_argnums=2)  # outside of `jax.jit`, one program for a call
def attention(
    operands: Operands, mask: Mask, plan: Plan
) -> tuple[Float[Array, "B T N E"], Float[Array, "B T N"]]:
    """Output [B, T, N, E] and log-sum-exp [B, T, N] of softmax(scale·Q·Kᵀ + bias)·V."""
    wide = wide_type(operands.query.dtype)
    highest = jax.lax.Precision.HIGHEST
    batch, length, heads, size = operands.query.shape
    kv_heads = operands.key.shape[2]
    grouped = (batch, kv_heads, heads // kv_heads, length, mask.key_length)
    finite = jnp.all(jnp.isfinite(operands.key), -1) & jnp.all(jnp.isfinite(operands.value), -1)
    key, value = (
        jnp.where(finite[..., None], x, jnp.zeros_like(x)).astype(wide)
        for x in (operands.key, operands.value)
    )
    query = operands.query
    valid = mask.row_valid()
    if valid is not None:  # padding may not reach a gradient
        query = jnp.where(valid[..., None, None], query, jnp.zeros_like(query))
    query = query.astype(wide).reshape(batch, length, kv_heads, -1, size)
    s = jnp.einsum("btkgd,bskd->bkgts", query, key, precision=highest)
    s = (s * operands.scale.astype(wide)).reshape(batch, heads, length, -1)
    if plan.logits_soft_cap is not None:
        s = plan.logits_soft_cap * jnp.tanh(s / plan.logits_soft_cap)
    seen = _seen(mask, operands.data, batch, heads)
    if mask.mods is not None and mask.mods.score_mod is not None:
        s = _modified(jnp.where(seen, s, jnp.zeros_like(s)), mask, operands.data)
        seen = seen & shown_by(s)
    if operands.factors is not None:
        s = s + _low_rank(operands.factors, batch, heads)
    if operands.bias is not None:
        seen = seen & shown_by(operands.bias)
        s = s + jnp.where(seen, operands.bias, jnp.zeros_like(operands.bias)).astype(wide)
    # A key that is not finite makes the rows that see it NaN, and no others.
    usable = jnp.swapaxes(finite, 1, 2)[:, :, None, None, :]
    s = jnp.where(usable, s.reshape(grouped), jnp.nan).reshape(s.shape)
    s = jnp.where(seen, s, lowest(wide))
    m = jnp.max(s, axis=-1, keepdims=True, initial=lowest(wide))
    if operands.sinks is not None:
        m = jnp.maximum(m, operands.sinks.astype(wide)[None, :, None, None])
    m = jax.lax.stop_gradient(m)
    p = jnp.where(seen, jnp.exp(s - m), jnp.zeros_like(s))
    total = jnp.sum(p, axis=-1, keepdims=True)
    if operands.sinks is not None:
        total = total + jnp.exp(operands.sinks.astype(wide)[None, :, None, None] - m)
    some = total != 0
    total = jnp.where(some, total, jnp.ones_like(total))
    p = p / total
    if mask.dropout is not None:
        kept = _kept(mask, batch, heads, plan.dropout_rate)
        p = jnp.where(kept, p, jnp.zeros_like(p)) / (1 - plan.dropout_rate)
    out = jnp.einsum("bkgts,bske->btkge", p.reshape(grouped), value, precision=highest)
    logs = jnp.where(some, m + jnp.log(total), lowest(wide))[..., 0]
    out, logs = out.reshape(batch, length, heads, -1), jnp.swapaxes(logs, 1, 2)
    if valid is not None:
        out = jnp.where(valid[..., None, None], out, jnp.zeros_like(out))
        logs = jnp.where(valid[..., None], logs, lowest(wide))
    # Rounding may lead a mean of values out of their type; the gradient is that of the mean.
    out_type = plan.output(operands.query.dtype)
    largest = float(jnp.finfo(out_type).max)
    out = out + jax.lax.stop_gradient(jnp.clip(out, -largest, largest) - out)
    return out.astype(out_type), logs


def _seen(mask: Mask, data: Data, batch: int, heads: int) -> Bool[Array, "B N T S"]:
    """[B, N, T, S] bool."""
    length, keys = mask.query_length, mask.key_length

    def one(head: Mask, data: Data, rows: Array, columns: Array) -> Array:
        seen = head.visible(rows[:, None], columns[None])
        array = head.tile_array(0, length, 0, keys, 1, data)
        return seen if array is None else seen & array

    return _per_head(one, mask, data, batch, heads)


def _modified(s: Float[Array, "B N T S"], mask: Mask, data: Data) -> Float[Array, "B N T S"]:
    """The scores as the caller's function changes them."""
    at = ((0, mask.query_length), (0, mask.key_length))

    def one(head: Mask, data: Data, s: Array) -> Array:
        assert head.mods is not None
        data = head.mods.data.beside(data).tile(*at, 1, transposed=False)
        return head.mods.scored(s, head.mods.place(*at, 1, transposed=False), data)

    def of(b: Array, h: Array, s: Array) -> Array:
        return one(mask.head(b, h, 1), data.one_head(b, h, 1), s)

    entries, heads = (jnp.arange(x, dtype=jnp.int32) for x in s.shape[:2])
    return jax.vmap(jax.vmap(of, (None, 0, 0)), (0, None, 0))(entries, heads, s)


def _low_rank(factors: Factors, batch: int, heads: int) -> Float[Array, "B N T S"]:
    """[B, N, T, S] the bias that the factors make; NaN of those that are not finite."""
    whole = [jnp.broadcast_to(x, (batch, heads, *x.shape[2:])) for x in (factors.q, factors.k)]
    q, k = (jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x)) for x in whole)
    product = jnp.einsum("bnrt,bnrs->bnts", q, k, precision=jax.lax.Precision.HIGHEST)
    of_q, of_k = (jnp.all(jnp.isfinite(x), axis=2) for x in whole)
    product = product * factors.scale[:, :, None, None]
    return jnp.where(of_q[..., None] & of_k[..., None, :], product, jnp.nan)


def _kept(mask: Mask, batch: int, heads: int, rate: float) -> Bool[Array, "B N T S"]:
    """[B, N, T, S] bool: the weights that dropout keeps."""

    def one(head: Mask, data: Data, rows: Array, columns: Array) -> Array:
        assert head.dropout is not None
        del data
        if head.dropout_origin is not None:
            rows, columns = rows + head.dropout_origin[0], columns + head.dropout_origin[1]
        return _dropout.kept(head.dropout, 1, rows, columns, rate)

    return _per_head(one, mask, Data(), batch, heads)


def _per_head(
    one: Callable[[Mask, Data, Array, Array], Array],
    mask: Mask,
    data: Data,
    batch: int,
    heads: int,
) -> Array:
    """``one(mask, data, places of queries, places of keys)`` of every query head."""
    lengths = (mask.query_length, mask.key_length)
    rows, columns = (jnp.arange(x, dtype=jnp.int32) for x in lengths)

    def of(b: Array, h: Array) -> Array:
        return one(mask.head(b, h, 1), data.one_head(b, h, 1), rows, columns)

    index = (jnp.arange(batch, dtype=jnp.int32), jnp.arange(heads, dtype=jnp.int32))
    return jax.vmap(jax.vmap(of, (None, 0)), (0, None))(*index)
