"""The ring: keys and values travel from device to device, the results of the parts are merged.

At hop h a device has the keys of the device h places before it. They are sent on before they are
used. The backward pass sends them round again, and their gradients with them, in float32; queries,
outputs and the queries' gradients stay. Nothing but a device's own parts is kept in between.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pasa_jax.call.backends import BACKENDS
from pasa_jax.call.differentiation import reduced
from pasa_jax.call.partial import Partial, merge
from pasa_jax.core import tile
from pasa_jax.core.heads import varying
from pasa_jax.core.mask import Mask
from pasa_jax.core.operands import Operands, Result
from pasa_jax.core.plan import Plan
from pasa_jax.implementations.head_walk import add_at
from pasa_jax.parallel import _part
from pasa_jax.parallel._line import Line
from pasa_jax.parallel._part import Moving, Told, Where

Array = jax.Array


@dataclass(frozen=True)
class Ring:
    """The static part of a ring.

    Arguments:
      backend: the implementation's name.
      plan: adapted to it.
      anywhere: as in `Backend.passes`.
    """

    line: Line
    backend: str
    plan: Plan
    anywhere: bool


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def ring_attention(ring: Ring, operands: Operands, mask: Mask) -> tuple[Array, Array]:
    """The output in the inputs' type, and the log-sum-exp, of a call in the local form."""
    return _forward(ring, operands, mask)[0]


def _forward(ring: Ring, operands: Operands, mask: Mask) -> tuple[tuple[Array, Array], Any]:
    moving, told = _part.of_keys(operands, mask)
    fixed = operands._replace(sinks=None)
    wide, rows = tile.wide_type(operands.query.dtype), operands.query.shape[:3]
    nothing = Partial(
        o=jnp.zeros((*rows, operands.value.shape[3]), wide),
        l=jnp.zeros(rows, wide),
        m=jnp.full(rows, tile.lowest(wide), wide),
    )
    total = varying(nothing, (operands, mask, ring.line.index()))
    for hop in range(ring.line.size):
        following = _sent(ring, hop, (moving, told))
        work = partial(_merged, ring, hop, (moving, told), fixed)
        total = _at_hop(ring, hop, mask, work, total)
        moving, told = _after(total.m, following)
    out, lse = total.output(operands.sinks)
    valid = _valid(ring, mask)
    if valid is not None:  # a sink gives padding weight
        out = jnp.where(valid[..., None, None], out, jnp.zeros_like(out))
        lse = jnp.where(valid[..., None], lse, tile.lowest(lse.dtype))
    promises = ring.plan.promises_finite
    out, rest = tile.rounded(out, operands.query.dtype, clip=promises)
    return (out, lse), (operands, mask, out, rest, lse)


def _merged(
    ring: Ring,
    hop: int,
    keys: tuple[Moving, Told],
    fixed: Operands,
    distance: int | None,
    mask: Mask,
    total: Partial,
) -> Partial:
    """``total`` with the part of a hop."""
    where = _where(ring, hop, mask, keys[0])
    out, lse = _attend_part(ring, distance, fixed, mask, *keys, where)
    return varying(merge(total, Partial.of(out, lse, None)), total)


def _sent(ring: Ring, hop: int, parts: Any) -> Any:
    """The keys of the next hop, if there is one, sent before those of this hop are used."""
    return ring.line.rotate(parts) if hop + 1 < ring.line.size else parts


def _after(work: Array, tree: Any) -> Any:
    """The arrays, but not before ``work`` is done: else all parts could be sent at once.

    (Compilers for CPUs drop `lax.optimization_barrier`.)
    """
    one = work[(0,) * work.ndim]
    never = (one < -1) & (one > 1)
    return jax.tree.map(lambda x: jnp.where(never, jnp.zeros_like(x), x), tree)


def _at_hop(ring: Ring, hop: int, mask: Mask, work: Any, total: Any) -> Any:
    """``work(distance, mask, total)`` at the distance at which queries and keys stand in this hop;
    ``total`` where none sees another. Two distances occur: the ring has an end.

    It is always a branch: what it allocates is allocated then, and not for all hops at once.
    """
    index, branches = ring.line.index(), []
    for distance in apart(mask, ring.line.size, hop):
        if distance is None or sees_any(mask, distance):
            branches.append(partial(work, *_simplest(mask, distance)))
        else:
            branches.append(lambda total: total)
    if len(branches) == 1:
        branches.append(lambda total: total)
        return lax.cond(index < ring.line.size, *branches, total)
    return lax.cond(index >= hop, *branches, total)


# Traced once for all hops at which a device sees as much.
@partial(jax.jit, static_argnums=(0, 1))
def _attend_part(
    ring: Ring,
    distance: int | None,
    fixed: Operands,
    mask: Mask,
    moving: Moving,
    told: Told,
    where: tuple[Array, Array],
) -> tuple[Array, Array]:
    """Output in float32 and log-sum-exp of queries and keys that start at ``where``."""
    plan = replace(ring.plan, wide_output=True)
    given, seen = _part_of(ring, distance, fixed, mask, moving, told, where)
    forward, _ = BACKENDS[ring.backend].passes(given, seen, plan, anywhere=ring.anywhere)
    result = forward(given, seen, plan, wanted="lse")
    return result.out, result.lse


def _part_of(
    ring: Ring,
    distance: int | None,
    fixed: Operands,
    mask: Mask,
    moving: Moving,
    told: Told,
    where: tuple[Array, Array],
) -> tuple[Operands, Mask]:
    keys = moving.key.shape[1]
    at = Where(*where, distance, keys * ring.line.size)
    given = _part.columns(_part.with_moving(fixed, moving), keys, at)
    return _part.seen_by_part(given, _part.with_told(mask, told, keys), at)


def _simplest(mask: Mask, distance: int | None) -> tuple[int | None, Mask]:
    """The distance and the mask; without causality and window where they hide nothing."""
    if distance is None or not sees_all(mask, distance):
        return distance, mask
    return 0, replace(mask, is_causal=False, window=None)


def apart(mask: Mask, devices: int, hop: int) -> tuple[int | None, ...]:
    """How far the queries stand from the keys of a hop: on the devices from ``hop`` on, and on the
    others, if that matters. None: it is known on the device alone.
    """
    length = mask.query_length
    if not (mask.is_causal or mask.window is not None):
        return (0,)
    if mask.query_positions is not None or mask.key_length != length:
        return (None,)
    return (hop * length,) if hop == 0 else (hop * length, (hop - devices) * length)


def sees_any(mask: Mask, distance: int) -> bool:
    """Whether a query may see a key of a part, by causality and window."""
    left, right = mask.reach()
    last = mask.query_length - 1 + distance
    ahead = right is None or last + right >= 0
    return ahead and (left is None or distance - left <= mask.key_length - 1)


def sees_all(mask: Mask, distance: int) -> bool:
    """Whether every query sees every key of a part, by causality and window."""
    left, right = mask.reach()
    last = mask.query_length - 1 + distance
    behind = left is None or last - left <= 0
    return behind and (right is None or distance + right >= mask.key_length - 1)


def _where(ring: Ring, hop: int, mask: Mask, moving: Moving) -> tuple[Array, Array]:
    """The places in the whole at which the queries and the keys of a hop start."""
    index = ring.line.index()
    source = (index - hop) % ring.line.size
    return index * mask.query_length, source * moving.key.shape[1]


def _valid(ring: Ring, mask: Mask) -> Array | None:
    """[B, T] bool of this device's queries, or None: all are."""
    if mask.query_lengths is None:
        return None
    places = ring.line.index() * mask.query_length + jnp.arange(mask.query_length, dtype=jnp.int32)
    return places < mask.query_lengths[:, None]


def _backward(ring: Ring, residuals: Any, cotangents: tuple[Array, Array]) -> tuple[Operands, None]:
    operands, mask, out, rest, lse = residuals
    d_out, d_lse = cotangents
    wide = lse.dtype
    live = lse != tile.lowest(wide)
    unit = ring.plan.numerics(operands.key.shape[1]).unit
    m = jnp.where(live, lse, jnp.zeros_like(lse))
    result = Result(
        out=out,
        lse=lse,
        m=m * wide.type(unit),
        l=live.astype(wide),
        remainder=rest,
        whole=m,
    )
    # Sent again: the compiler would keep what was sent first in the forward pass.
    moving, told = _after(d_out, _part.of_keys(operands, mask))
    like = (operands, mask, d_out, d_lse, ring.line.index())
    fixed = varying(operands._replace(sinks=None), like)  # summed over devices at the end alone
    result = _marked(ring, result, like)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, wide), (_without_keys(fixed), moving))
    of_fixed, none = varying(zeros, like)
    first, of_moving = moving, none
    for hop in range(ring.line.size):
        following = _sent(ring, hop, (moving, told))
        arriving = ring.line.rotate(of_moving) if hop > 0 else none  # while this hop computes
        work = partial(_summed, ring, hop, (moving, told), fixed, (result, d_out, d_lse))
        of_fixed, found = _at_hop(ring, hop, mask, work, (of_fixed, none))
        moving, told = _after(of_fixed.query, following)
        # Not before the next keys are here: else schedulers send these with the gradients, after
        # the hop's work and not under it.
        if hop + 1 < ring.line.size:
            found = _after(moving.value, _after(moving.key, found))
        of_moving = jax.tree.map(jnp.add, arriving, found)
    of_moving = jax.tree.map(lambda x, like: x.astype(like.dtype), of_moving, first)
    of_moving = ring.line.rotate(of_moving)  # home
    total = _part.with_moving(of_fixed, of_moving)
    if operands.sinks is not None:
        total = total._replace(sinks=_of_sinks(operands.sinks, result, live, d_out, d_lse))
    total = jax.tree.map(lambda x, like: x.astype(like.dtype), total, operands)
    return jax.tree.map(reduced, total, operands), None


def _summed(
    ring: Ring,
    hop: int,
    keys: tuple[Moving, Told],
    fixed: Operands,
    of_result: tuple[Result, Array, Array],
    distance: int | None,
    mask: Mask,
    total: tuple[Operands, Moving],
) -> tuple[Operands, Moving]:
    """``total`` with the cotangents of a hop."""
    arrays = (fixed, mask, *keys, _where(ring, hop, mask, keys[0]), *of_result)
    return varying(_gradients_of_part(ring, distance, total, *arrays), total)


@partial(jax.jit, static_argnums=(0, 1))
def _gradients_of_part(
    ring: Ring,
    distance: int | None,
    total: tuple[Operands, Moving],
    fixed: Operands,
    mask: Mask,
    moving: Moving,
    told: Told,
    where: tuple[Array, Array],
    result: Result,
    d_out: Array,
    d_lse: Array,
) -> tuple[Operands, Moving]:
    """``total`` with the cotangents of what stays and of what moves, from one part."""
    given, seen = _part_of(ring, distance, fixed, mask, moving, told, where)
    _, backward = BACKENDS[ring.backend].passes(given, seen, ring.plan, anywhere=ring.anywhere)
    found = backward(given, seen, ring.plan, result, d_out, d_lse)
    if mask.mods is not None:  # without the places
        data = found.data._replace(query=found.data.query[:-1], key=found.data.key[:-1])
        found = found._replace(data=data)
    of_fixed, of_moving = total
    if found.bias is not None and of_fixed.bias is not None:
        bias = found.bias.astype(of_fixed.bias.dtype)
        at = 0 if bias.shape == of_fixed.bias.shape else where[1]
        of_fixed = of_fixed._replace(bias=add_at(of_fixed.bias, bias, (0, 0, 0, at)))
        found = found._replace(bias=jnp.zeros((1, 1, 1, 1), bias.dtype))
    parts = (_without_keys(found), _part.of_keys(found, mask)[0])
    return jax.tree.map(lambda x, y: x + y.astype(x.dtype), (of_fixed, of_moving), parts)


def _marked(ring: Ring, result: Result, like: Any) -> Result:
    """The result as a kernel's backward pass takes it: its lax walk is asked where there is a guard
    in the kernel's own arithmetic.
    """
    if not BACKENDS[ring.backend].is_kernel:
        return result
    guarded = jnp.bool_(ring.plan.precision.products == "float16")
    return result._replace(by_lax=varying(guarded, like))


def _without_keys(operands: Operands) -> Operands:
    """What stays on the device."""
    factors = operands.factors
    if factors is not None:
        factors = factors._replace(k=None)
    data = operands.data._replace(key=())
    return operands._replace(key=None, value=None, factors=factors, data=data)


def _of_sinks(sinks: Array, result: Result, live: Array, d_out: Array, d_lse: Array) -> Array:
    """[N] the cotangent of the sinks, which have no value."""
    wide = result.lse.dtype
    gap = jnp.where(live, sinks.astype(wide) - result.lse, tile.lowest(wide))
    out = result.out.astype(wide) + result.remainder.astype(wide)
    delta = jnp.sum(d_out.astype(wide) * out, axis=-1) - d_lse
    return -jnp.sum(jnp.exp(gap) * jnp.where(live, delta, 0), axis=(0, 1))


ring_attention.defvjp(_forward, _backward)
