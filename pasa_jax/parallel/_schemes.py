"""The schemes: what the devices of a sequence exchange, for a call in the local form."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from pasa_jax.call.backends import BACKENDS, Choice, Implementation, choose
from pasa_jax.call.statistics import Statistics, collect
from pasa_jax.core.errors import wrong
from pasa_jax.core.mask import Mask
from pasa_jax.core.mods import Data
from pasa_jax.core.operands import Factors, Operands
from pasa_jax.core.plan import Plan
from pasa_jax.parallel import _part
from pasa_jax.parallel._line import Line
from pasa_jax.parallel._part import Where
from pasa_jax.parallel._ring import Ring, apart, ring_attention

Array = jax.Array
Outputs = tuple[Array, Array | None]
SCHEMES = ("all_gather", "ulysses", "ring", "ring_ulysses")


@dataclass(frozen=True)
class Job:
    """What is asked of the devices.

    Arguments:
      implementation: as `dot_product_attention` takes it.
      plan: not adapted yet.
      lse: whether the log-sum-exp is wanted too.
    """

    implementation: Implementation
    plan: Plan
    lse: bool

    def chosen(self, operands: Operands, mask: Mask) -> Choice:
        """Who computes a part."""
        return choose(self.implementation, operands, mask, self.plan)

    def compute(self, operands: Operands, mask: Mask) -> Outputs:
        """Output and log-sum-exp of a part that has all the keys."""
        chosen = self.chosen(operands, mask)
        return BACKENDS[chosen.name].run(
            operands, mask, chosen.plan, lse=self.lse, anywhere=self.implementation is None
        )


def all_gather(line: Line, job: Job, operands: Operands, mask: Mask) -> Outputs:
    """Every device has all keys and values."""
    moving, told = _part.of_keys(operands, mask)
    axes = _part.axes_of_keys(moving, told)
    moving, told = jax.tree.map(line.gather, (moving, told), axes)
    keys = moving.key.shape[1]
    given, mask = _part.with_moving(operands, moving), _part.with_told(mask, told, keys)
    start = line.index() * mask.query_length
    where = Where(start, jnp.int32(0), 0 if line.size == 1 else None, keys)
    return job.compute(*_part.seen_by_part(given, mask, where))


def ring(line: Line, job: Job, operands: Operands, mask: Mask) -> Outputs:
    """Keys and values travel."""
    where = Where(0, 0, apart(mask, line.size, 0)[0], mask.key_length * line.size)
    given = _part.columns(operands, mask.key_length, where)
    chosen = job.chosen(*_part.seen_by_part(given, mask, where))
    job_of_ring = Ring(line, chosen.name, chosen.plan, job.implementation is None)
    outputs: Any = ring_attention(job_of_ring, operands, mask)
    out, lse = outputs
    return out, lse if job.lse else None


def ulysses(line: Line, job: Job, operands: Operands, mask: Mask) -> Outputs:
    """Every device has all queries and keys of some heads."""
    operands, mask = some_heads(line, operands, mask)
    here = Where(jnp.int32(0), jnp.int32(0), 0, mask.key_length)
    return some_queries(line, *job.compute(*_part.seen_by_part(operands, mask, here)))


def ring_ulysses(outer: Line, inner: Line, job: Job, operands: Operands, mask: Mask) -> Outputs:
    """Groups of devices share the heads, and keys travel from group to group."""
    operands, mask = some_heads(inner, operands, mask)
    return some_queries(inner, *ring(outer, job, operands, mask))


def some_heads(line: Line, operands: Operands, mask: Mask) -> tuple[Operands, Mask]:
    """From the device's part of the sequence to its share of the heads, with the line's parts."""
    check_heads(operands.query.shape[2], line.size)
    key, value = (repeated(x, line.size) for x in (operands.key, operands.value))
    return _with_all_parts(line, operands._replace(key=key, value=value), mask, line.exchange)


def all_heads(line: Line, operands: Operands, mask: Mask) -> tuple[Operands, Mask]:
    """From the device's part of the sequence to the line's parts."""
    return _with_all_parts(line, operands, mask, None)


def _with_all_parts(
    line: Line, operands: Operands, mask: Mask, exchange: Callable[..., Array] | None
) -> tuple[Operands, Mask]:
    """The line's parts of the sequence; of some heads where it can ``exchange`` them for those."""
    o, mods = operands, mask.mods

    def of_heads(x: Array, axis: int = 1) -> Array:
        return x if exchange is None or x.shape[axis] == 1 else line.share(x, axis)

    def of_parts(x: Array, heads: int, length: int) -> Array:
        if exchange is None or x.shape[heads] == 1:
            return line.gather(x, length)
        return exchange(x, heads, length)

    def of_pairs(x: Array | None) -> Array | None:
        if x is None:
            return None
        return of_heads(x) if x.shape[2] == 1 else of_parts(x, 1, 2)

    def of_last(x: Array) -> Array:
        return of_parts(x, 1, x.ndim - 1)

    def of_sequence(x: Array | None) -> Array | None:
        return None if x is None else line.gather(x, 1)

    def of_data(data: Data) -> Data:
        query, key = (jax.tree.map(of_last, x) for x in (data.query, data.key))
        return Data(query, key, jax.tree.map(of_heads, data.head))

    factors = o.factors
    if factors is not None:
        factors = Factors(of_last(factors.q), of_last(factors.k), of_heads(factors.scale))
    query, key, value = (of_parts(x, 2, 1) for x in (o.query, o.key, o.value))
    operands = Operands(
        query=query,
        key=key,
        value=value,
        bias=of_pairs(o.bias),
        sinks=None if o.sinks is None else of_heads(o.sinks, 0),
        scale=o.scale,
        factors=factors,
        data=of_data(o.data),
    )
    if mods is not None:
        assert mods.heads is not None
        mods = replace(mods, data=of_data(mods.data), heads=of_heads(mods.heads, 0))
    mask = replace(
        mask,
        query_length=query.shape[1],
        key_length=key.shape[1],
        query_segments=of_sequence(mask.query_segments),
        key_segments=of_sequence(mask.key_segments),
        query_positions=of_sequence(mask.query_positions),
        key_positions=of_sequence(mask.key_positions),
        array=of_pairs(mask.array),
        kinds=None if mask.kinds is None else of_heads(mask.kinds),
        mods=mods,
        dropout=None if mask.dropout is None else of_heads(mask.dropout),
    )
    return operands, mask


def some_queries(line: Line, out: Array, lse: Array | None) -> Outputs:
    """Outputs of all queries and some heads as those of the device's queries and all heads."""
    return line.exchange(out, 1, 2), None if lse is None else line.exchange(lse, 1, 2)


def repeated(x: Array, devices: int) -> Array:
    """Keys or values with so many heads that the devices divide them."""
    heads = x.shape[2]
    return x if heads % devices == 0 else jnp.repeat(x, shared_heads(heads, devices) // heads, 2)


def shared_heads(heads: int, devices: int) -> int:
    """How many key heads there are after `repeated`."""
    return math.lcm(heads, devices)


def check_heads(heads: int, devices: int) -> None:
    """Raises unless the devices can share the query heads."""
    if heads % devices:
        allowed = f"have a number of heads that {devices} devices divide, for 'ulysses'"
        way_out = (
            "Take the scheme 'ring' or 'all_gather', or 'ring_ulysses' with fewer devices that "
            "share heads (ulysses_devices)."
        )
        raise wrong("query", allowed, heads, way_out)


def statistics_of(line: Line, job: Job, operands: Operands, mask: Mask) -> Statistics:
    """The statistics over the whole sequence, [B, N] each, by one more pass.

    Devices share the heads where they divide them; else each looks at all.
    """
    shared = operands.query.shape[2] % line.size == 0
    operands, mask = (some_heads if shared else all_heads)(line, operands, mask)
    here = Where(jnp.int32(0), jnp.int32(0), 0, mask.key_length)
    given, mask = _part.seen_by_part(operands, mask, here)
    found = collect(given, mask, job.chosen(given, mask).plan)
    together = line.put_together if shared else line.same
    return jax.tree.map(together, found)
