"""What each shift, in each 16-bit type, and each format of a cache would cost a call: measured on
some of its rows.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from pasa_jax.core.mask import Mask
from pasa_jax.core.operands import Operands
from pasa_jax.core.plan import Plan
from pasa_jax.core.precision import Precision
from pasa_jax.evidence.plain import numpy_attention
from pasa_jax.implementations import lax as _lax
from pasa_jax.serving import as_stored

Array = jax.Array
DTYPES = ("float16", "bfloat16")
# Scores stored in float32: only the cast of the inputs to 16 bits loses anything.
FLOAT32_SCORES = "float32 scores"
# Scores stored unscaled, as eager model code does; and the shifts.
EAGER = "eager"
ATTENTIONS = (EAGER, "none", "paper", "mean", "reference")

# How a cache may store keys and values.
FORMATS = ("bfloat16", "int8", "float8_e4m3", "float8_e5m2")

Errors = dict[str, dict[str, NDArray]]


class Costs(NamedTuple):
    """Relative errors of a call's output, each [N]."""

    errors: Errors  # by type and form
    formats: dict[str, NDArray]  # by the format of a cache


def measure_costs(operands: Operands, mask: Mask, plan: Plan, entry: int, rows: int) -> Costs:
    """Relative error of the output by type and form, and by the format of a cache, each [N].

    The root mean square error against float64 on the inputs as they are, cast included, divided by
    the root mean square of what the exact output has beside the mean of the values: a mean that
    all values share would hide errors of the attention weights.

    Arguments:
      entry: the batch entry that is looked at.
      rows: how many of its queries, evenly spaced.
    """
    sample, shown = _sample(operands, mask, entry, rows)
    exact, scale_of_errors = _exact(sample, shown, plan)

    def of(out: NDArray) -> NDArray:
        return _rms(out.astype(np.float64) - exact) / scale_of_errors

    errors: Errors = {}
    for dtype in DTYPES:
        errors[dtype] = {}
        for form in (FLOAT32_SCORES, *ATTENTIONS):
            out = _output(form, dtype, sample, shown, plan)
            if out is not None:
                errors[dtype][form] = of(out)
    formats = {name: of(_cached(name, sample, shown, plan)) for name in FORMATS}
    return Costs(errors, formats)


def _cached(format: str, sample: Operands, shown: Mask, plan: Plan) -> NDArray:
    """The output [R, N, E] where keys and values are what a cache of the format gives back, and
    all else is exact.
    """
    k, v = as_stored(format, jnp.asarray(sample.key), jnp.asarray(sample.value))
    return _plain(sample._replace(key=k, value=v), shown, plan, None)


def _sample(operands: Operands, mask: Mask, entry: int, rows: int) -> tuple[Operands, Mask]:
    """Batch entry ``entry`` with some of its queries, and what they see as an array."""
    length = operands.query.shape[1]
    at = np.unique(np.linspace(0, length - 1, min(rows, length)).round().astype(np.int32))
    seen = _seen(mask, jnp.asarray(at), operands.query.shape[2], entry)
    bias = operands.bias
    if bias is not None:
        bias = bias[entry if len(bias) > 1 else 0][None]
        bias = bias[:, :, at] if bias.shape[2] > 1 else bias
    sample = operands._replace(
        query=operands.query[entry, at][None],
        key=operands.key[entry][None],
        value=operands.value[entry][None],
        bias=bias,
    )
    return sample, Mask(query_length=len(at), key_length=mask.key_length, array=seen[None])


def _seen(mask: Mask, at: Array, heads: int, entry: int) -> Array:
    """[N, R, S] bool of the queries at the positions ``at``."""
    columns = jnp.arange(mask.key_length, dtype=jnp.int32)[None]

    def one(head: Array, row: Array) -> Array:
        of_head = mask.head(entry, head, 1)
        seen = of_head.visible(row.reshape(1, 1), columns)
        array = of_head.tile_array(row, 1, 0, mask.key_length, 1)
        return (seen if array is None else seen & array)[0]

    every = jnp.arange(heads, dtype=jnp.int32)
    return jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))(every, at)


def _exact(sample: Operands, shown: Mask, plan: Plan) -> tuple[NDArray, NDArray]:
    """The output [R, N, E] in float64, and what errors of each head are divided by, [N]."""
    exact = _plain(sample, shown, plan, None)
    keys = np.asarray(shown.array)[0].any(axis=1)  # [N, S]
    values = np.asarray(sample.value, np.float64)[0]
    groups = exact.shape[1] // values.shape[1]
    totals = [values[keys[n], n // groups].sum(axis=0) for n in range(exact.shape[1])]
    around = _rms(exact - np.stack(totals) / np.maximum(keys.sum(axis=1), 1)[:, None])
    return exact, np.where(around > 0, around, np.maximum(_rms(exact), np.finfo(float).tiny))


def _rms(x: NDArray) -> NDArray:
    return np.sqrt(np.mean(np.square(x), axis=(0, 2)))


def _output(form: str, dtype: str, sample: Operands, shown: Mask, plan: Plan) -> NDArray | None:
    """The output [R, N, E] of one form; None where the shift cannot be had."""
    with warnings.catch_warnings():  # a cast that overflows gives NaN in the end, which is reported
        warnings.simplefilter("ignore", RuntimeWarning)
        q, k, v = (
            jnp.asarray(np.asarray(x).astype(jnp.dtype(dtype)))
            for x in (sample.query, sample.key, sample.value)
        )
    cast = sample._replace(query=q, key=k, value=v)
    if form in (EAGER, FLOAT32_SCORES):
        out = _plain(cast, shown, plan, jnp.dtype(dtype if form == EAGER else "float32"))
        return out.astype(jnp.dtype(dtype))
    plan = replace(plan, shift=form, precision=Precision.named(dtype), beta=None, dropout_rate=0.0)
    if form == "paper":
        if sample.scale == 0:  # which its matrix is divided by
            return None
        plan = replace(plan, scale=float(sample.scale))
    return np.asarray(_walked(plan, cast, shown)[0], np.float32)


# It computes few rows, so nearly all of its time is compilation.
@partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
def _walked(plan: Plan, operands: Operands, mask: Mask) -> Array:
    return _lax.forward(operands, mask, plan, wanted="out").out


def _plain(o: Operands, shown: Mask, plan: Plan, store: np.dtype | None) -> NDArray:
    """The plain formula, [R, N, E]: in float64, or with scores and weights stored in ``store``."""
    return numpy_attention(
        *(np.asarray(x)[0] for x in (o.query, o.key, o.value)),
        scale=float(o.scale),
        bias=None if o.bias is None else np.asarray(o.bias)[0],
        visible=np.asarray(shown.array)[0],
        logits_soft_cap=plan.logits_soft_cap,
        sinks=None if o.sinks is None else np.asarray(o.sinks),
        store=store,
    )
