"""Calls whose arrays have a sharding in their types: meshes with axes of type Explicit.

Batch entries and heads are independent, so under `jax.shard_map` every device computes those that
it holds, and the result is sharded like the query. A sharded sequence or head size is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pasa_jax.core.errors import wrong
from pasa_jax.core.mask import Mask
from pasa_jax.core.mods import Mods
from pasa_jax.core.operands import Operands

Array = jax.Array
Axes = Any  # what a PartitionSpec has for one axis of an array: None, a name, or a tuple of names
# The axes of a result: of the output, of one number per row, of one number per head.
OUTPUT, ROWS, HEADS = ("b", "t", "n", "e"), ("b", "t", "n"), ("b", "n")


class Placement(NamedTuple):
    """The mesh of a call, and which of its axes the batch and the heads are sharded over."""

    mesh: Any
    batch: Axes
    heads: Axes

    @staticmethod
    def of(operands: Operands, mask: Mask) -> Placement | None:
        """None: no axis of the operands is sharded over an axis of type Explicit.

        Raises:
          ValueError: an axis other than batch and heads is sharded, or two arrays disagree.
        """
        arrays = {"query": operands.query, "key": operands.key, "value": operands.value}
        optional = {"bias": operands.bias, "mask": mask.array}
        named = {**arrays, **{k: x for k, x in optional.items() if x is not None}}
        specs = {name: _spec(x) for name, x in named.items()}
        if not any(axis for spec in specs.values() for axis in spec):
            return None
        for name, spec in specs.items():
            first, second = (2, 3) if name in optional else (1, 3)
            if spec[first] or spec[second]:
                way_out = (
                    "Reshard it, take pasa_jax.parallel.attention_fn, which cuts the sequence too, "
                    "or split the work with jax.shard_map and merge partial results."
                )
                allowed = "be sharded over its batch and its heads alone"
                raise wrong(name, allowed, str(jax.typeof(named[name])), way_out)
        batch = _agreed({name: spec[0] for name, spec in specs.items()})
        places = {name: spec[1 if name in optional else 2] for name, spec in specs.items()}
        mesh = next(_mesh(named[name]) for name, spec in specs.items() if any(spec))
        return Placement(mesh, batch, _agreed(places))

    def spec(self, axes: tuple[str, ...], shape: tuple[int, ...] | None = None) -> PartitionSpec:
        """The sharding of an array with axes "b", "n" and others; not along axes of size 1."""
        place = {"b": self.batch, "n": self.heads}
        single = [shape is not None and shape[i] == 1 for i in range(len(axes))]
        return PartitionSpec(
            *(None if one else place.get(a) for a, one in zip(axes, single, strict=True))
        )

    def put(self, x: Array | None, *axes: str) -> Any:
        """x sharded as the call is."""
        if x is None:
            return None
        spec = self.spec(axes, x.shape)
        if _spec(x) == tuple(spec):
            return x
        return jax.reshard(x, NamedSharding(self.mesh, spec))

    def put_by_head(self, x: Array) -> Array:
        """x [B|1, N|1, …] sharded as the call is."""
        return self.put(x, "b", "n", *"lr"[: x.ndim - 2])

    def put_mods(self, mods: Mods | None) -> Mods | None:
        """What the functions of the caller are given, sharded as the call is."""
        if mods is None:
            return None
        return replace(
            mods,
            data=jax.tree.map(self.put_by_head, mods.data),
            entries=self.put(mods.entries, "b"),
            heads=self.put(mods.heads, "n"),
        )


def sharded(
    compute: Callable[[Operands, Mask], Any],
    operands: Operands,
    mask: Mask,
    results: Any,
) -> Any:
    """``compute(operands, mask)``; on an Explicit mesh every device computes the part it holds.

    Arguments:
      results: a tree of `OUTPUT`, `ROWS` and `HEADS`, one for each result of ``compute``.
    """
    place = Placement.of(operands, mask)
    if place is None:
        return compute(operands, mask)
    tiled = ("b", "n", "t", "s")
    o = operands
    placed = Operands(
        query=place.put(o.query, "b", "t", "n", "d"),
        key=place.put(_per_shard(o.key, place), "b", "s", "n", "d"),
        value=place.put(_per_shard(o.value, place), "b", "s", "n", "e"),
        bias=place.put(o.bias, *tiled),
        sinks=place.put(o.sinks, "n"),
        scale=place.put(o.scale),
        factors=jax.tree.map(place.put_by_head, o.factors),
        data=jax.tree.map(place.put_by_head, o.data),
    )
    fields = {
        "query_lengths": place.put(mask.query_lengths, "b"),
        "key_lengths": place.put(mask.key_lengths, "b"),
        "query_segments": place.put(mask.query_segments, "b", "t"),
        "key_segments": place.put(mask.key_segments, "b", "s"),
        "query_positions": place.put(mask.query_positions, "b", "t"),
        "key_positions": place.put(mask.key_positions, "b", "s"),
        "kinds": place.put(mask.kinds, *tiled),
        "mods": place.put_mods(mask.mods),
        "array": place.put(mask.array, *tiled),
        "dropout": place.put(mask.dropout, "b", "n", "two"),
    }
    leaves = jax.tree.map(place.spec, results, is_leaf=lambda x: x in (OUTPUT, ROWS, HEADS))
    run = jax.shard_map(
        lambda operands, fields: compute(operands, replace(mask, **fields)),
        mesh=place.mesh,
        in_specs=jax.tree.map(_spec_of, (placed, fields)),
        out_specs=leaves,
        axis_names=set(_explicit(place.mesh)),
    )
    return run(placed, fields)


def _explicit(mesh: Any) -> tuple[str, ...]:
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in types if kind == AxisType.Explicit)


def _mesh(x: Array) -> Any:
    """The mesh that x is sharded over, with its devices where x is no tracer."""
    placed = None if isinstance(x, Tracer) else x.sharding
    return placed.mesh if isinstance(placed, NamedSharding) else jax.typeof(x).sharding.mesh


def _spec_of(x: Array) -> PartitionSpec:
    return PartitionSpec(*_spec(x))


def _spec(x: Array) -> tuple[Axes, ...]:
    spec = tuple(jax.typeof(x).sharding.spec)
    return spec + (None,) * (x.ndim - len(spec))


def _agreed(places: dict[str, Axes]) -> Axes:
    """The mesh axes over which the arrays are sharded along one axis; None: none is."""
    sharded = {name: axes for name, axes in places.items() if axes}
    if not sharded:
        return None
    (first, axes), *others = sharded.items()
    for name, other in others:
        if other != axes:
            allowed = f"be sharded over {axes!r}, as {first} is"
            raise wrong(name, allowed, repr(other), "jax.reshard one of them.")
    return axes


def _per_shard(x: Array, place: Placement) -> Array:
    """Keys or values [B, S, K, D] with at least as many heads as shards.

    A head that belongs to several shards is repeated.
    """
    names = place.heads if isinstance(place.heads, tuple) else (place.heads,)
    shards = math.prod(place.mesh.shape[name] for name in names if name is not None)
    heads = x.shape[2]
    if heads % shards == 0:
        return x
    if shards % heads:
        allowed = f"have a number of heads that divides or is divided by {shards}, the shards"
        raise wrong("key", allowed, heads)
    return jnp.repeat(x, shards // heads, axis=2)
