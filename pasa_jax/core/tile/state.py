"""The state of the online softmax: begun, settled, merged, finished (eq. 10, 13, 14)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from pasa_jax.core.tile.arrays import Guard, beside, divided, tempered
from pasa_jax.core.tile.numerics import Numerics, Storage, lowest

if TYPE_CHECKING:
    from pasa_jax.core.shapes import Column, Float

Array = jax.Array


class State(NamedTuple):
    """A partial result of the online softmax over the keys seen so far."""

    m: Array  # [R, 1] running maximum, without inva·f
    l: Array  # noqa: E741  [R, 1] running sum
    o: Array  # [R, E] running output, not normalised
    f: Array  # [R, 1] F, the paper's running mean of s̄'; 0 for the other shifts


def initial_state(rows: int, value_size: int, numerics: Numerics) -> State:
    """The state before any key (eq. 10)."""
    stat = numerics.statistics
    column = numerics.column_shape(rows)
    out = (value_size, rows) if numerics.dialect.transposed else (rows, value_size)
    return State(
        m=jnp.full(column, lowest(stat), stat),
        l=jnp.zeros(column, stat),
        o=jnp.zeros(out, jnp.dtype(numerics.precision.accumulator)),
        f=jnp.zeros(column, stat),
    )


def settle(state: State, numerics: Numerics) -> State:
    """The state in the product's type, inva·F added to m: it can be merged or finished."""
    wide = numerics.product
    state = State(*(x.astype(wide) for x in state))
    if numerics.storage is not Storage.PAPER:
        return state
    m = state.m + wide.type(numerics.inva) * state.f  # the product alone may leave float16
    m = jnp.where(state.l > 0, m, jnp.full_like(m, lowest(wide)))
    return state._replace(m=m, f=jnp.zeros_like(m))


def merge(a: State, b: State, numerics: Numerics, guard: Guard | None = None) -> State:
    """The state over the keys of both settled states, for split keys and rings (eq. 13)."""
    m = jnp.maximum(a.m, b.m)
    of_a, of_b = (numerics.exp(tempered(x.m - m, guard)) for x in (a, b))
    return State(m, of_a * a.l + of_b * b.l, beside(of_a) * a.o + beside(of_b) * b.o, a.f)


def add_sink(state: State, sink: Column, numerics: Numerics, guard: Guard | None) -> State:
    """The settled state with one more key of score ``sink`` [R, 1] and value zero."""
    wide = state.m.dtype
    sink = divided(sink.astype(wide) * wide.type(numerics.unit), guard)
    no_value = State(sink, jnp.ones_like(state.l), jnp.zeros_like(state.o), state.f)
    return merge(state, no_value, numerics, guard)


def finish(
    state: State,
    numerics: Numerics,
    guard: Guard | None,
    value_gain: Float[Array, ""] | None = None,
) -> tuple[Float[Array, "R E"], Column]:
    """Output [R, E] and log-sum-exp [R, 1] of a settled state (eq. 14).

    A row that saw no key gives output 0 and the lowest finite log-sum-exp. With dropout the output
    is divided by the share of the weights that is kept.

    Arguments:
      value_gain: [] what `key_tile` multiplied the values by, or None.
    """
    seen = state.m != lowest(state.m.dtype)
    some = (state.l != 0) & (seen | (state.l != state.l))  # NaN is something
    l = jnp.where(some, state.l, jnp.ones_like(state.l))  # noqa: E741
    out = state.o / beside(l.astype(state.o.dtype))
    out = jnp.where(beside(some), out, jnp.zeros_like(out))
    if value_gain is not None:
        out = out / value_gain.astype(out.dtype)
    if numerics.kept_share != 1:
        out = out * out.dtype.type(1 / numerics.kept_share)
    floor = lowest(state.m.dtype)
    m = tempered(state.m, guard) * l.dtype.type(1 / numerics.unit)
    if guard is not None:
        m = m * guard.beyond.astype(m.dtype)
    lse = jnp.clip(m, m.dtype.type(floor), m.dtype.type(-floor)) + jnp.log(l)
    return out, jnp.where(some, lse, jnp.full_like(lse, floor))


def rounded(
    out: Float[Array, "*shape"], dtype: jnp.dtype, *, clip: bool
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """``out`` rounded to ``dtype``, and the rounding error.

    Arguments:
      clip: whether a mean of values that is rounded up may not leave their type.
    """
    if clip:
        largest = out.dtype.type(jnp.finfo(dtype).max)
        out = jnp.clip(out, -largest, largest)
    narrow = out.astype(dtype)
    return narrow, (out - narrow.astype(out.dtype)).astype(dtype)


def sink_weight(
    sink: Column,
    m: Column,
    l: Column,  # noqa: E741
    numerics: Numerics,
    guard: Guard | None,
) -> Column:
    """The probability that a finished row (m and l as in `gradients`) gives its sink, [R, 1]."""
    gap = divided(sink.astype(m.dtype) * m.dtype.type(numerics.unit), guard) - m
    return numerics.exp(tempered(gap, guard)) / jnp.where(l != 0, l, jnp.ones_like(l))
