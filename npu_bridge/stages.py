"""The tile functions of `pasa_jax`, traced on one slab of rows.

Nothing here computes attention: the walk and the tile functions are called with tracers. What comes
out are equations, and the bounds of the loop over keys as expressions of the kernel's numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr

from npu_bridge.expressions import Scalar
from npu_bridge.ir import Node
from npu_bridge.lower import Equation, Lowering, Value, Var, flatten
from npu_bridge.lower.ranges import EXACT_DIVISIONS, inexact, marked
from npu_bridge.lower.rules import origin, way_out
from npu_bridge.specification import Array, Kernel
from pasa_jax.core import choice, tile
from pasa_jax.core.errors import LoweringError

_INT = jax.ShapeDtypeStruct((), jnp.int32)
_FLOAT = jax.ShapeDtypeStruct((), jnp.float32)


# A kernel is built with several slabs until one fits: what depends on neither is traced once.
_once = lru_cache(maxsize=64)


@dataclass(frozen=True)
class Trace:
    """A traced function with named inputs and outputs.

    Arguments:
      outputs: `Var` or `Scalar`.
    """

    equations: list[Equation]
    inputs: dict[str, Var]
    outputs: dict[str, Any]

    @property
    def shared(self) -> set[Var]:
        """The inputs that are numbers, which a whole tile shares."""
        return {x for x in self.inputs.values() if not x.aval.shape}

    def needed(self) -> Trace:
        """The trace without the equations that no output needs."""
        return replace(self, equations=needed(self.equations, self.outputs)[0])


def needed(equations: list[Equation], outputs: dict[str, Any]) -> tuple[list[Equation], set[Var]]:
    """The equations that the outputs need, and every variable in them."""
    variables = {x for x in outputs.values() if isinstance(x, Var)}
    result: list[Equation] = []
    for eqn in reversed(equations):
        if eqn.output in variables:
            result.append(eqn)
            variables.update(x for x in eqn.inputs if isinstance(x, Var))
    return result[::-1], variables


def trace(function: Callable[..., dict[str, Any]], shapes: dict[str, Any]) -> Trace:
    """``function(**shapes)`` as equations."""
    names = list(shapes)
    out_names: list[str] = []

    def called(*args: Any) -> list[Any]:
        result = function(**dict(zip(names, args, strict=True)))
        out_names[:] = [name for name, x in result.items() if x is not None]
        return [x for x in result.values() if x is not None]

    closed: ClosedJaxpr = jax.make_jaxpr(called)(*shapes.values())
    inputs, equations, outputs = flatten(closed)
    named = dict(zip(names, inputs, strict=True))
    return Trace(equations, named, dict(zip(out_names, outputs, strict=True)))


# The bounds of the loop over keys.


# How the bounds are called in the emitted source: of all key tiles that are seen, and of those
# that are seen whole.
_BOUNDS = {"lo": "seenBegin", "hi": "seenEnd", "full_lo": "wholeBegin", "full_hi": "wholeEnd"}


def key_range(kernel: Kernel) -> tuple[list[Node], dict[str, str]]:
    """The key tiles that the queries from ``start`` on see, as the mask itself says it: statements
    and the names of lo, full_lo, full_hi, hi. Numbers: start, queries, keys.
    """
    rows = 1 if kernel.decode else kernel.schedule.block_q

    def bounds(start: Array, queries: Array, keys: Array) -> dict[str, Any]:
        mask = kernel.mask(queries, keys)
        r = mask.key_range(start, start + rows, kernel.schedule.block_kv)
        return {name: jnp.asarray(x, jnp.int32) for name, x in r._asdict().items()}

    traced = trace(bounds, {"start": _INT, "queries": _INT, "keys": _INT})
    inputs: dict[Var, Value] = {v: Scalar(n) for n, v in traced.inputs.items()}
    names = {x: _BOUNDS[n] for n, x in traced.outputs.items() if isinstance(x, Var)}
    low = Lowering(_no_memory, inputs, names=names, prefix="bound")
    low.lower(traced.equations)
    values = {name: low.value(x) for name, x in traced.outputs.items()}
    return low.body, {name: str(x.value) for name, x in values.items()}  # type: ignore[union-attr]


def _no_memory(*_: Any) -> Any:
    raise LoweringError("the bounds of the loop over keys are not numbers alone")


# Before the loop.


@_once
def queries(kernel: Kernel, rows: int) -> Trace:
    """The query rows as they are multiplied: every factor that a score has is in them."""

    def scaled(query: Array, scale: Array) -> dict[str, Any]:
        gain = kernel.plan.gain(scale)
        return {"scaled": tile.query_tile(query, gain, None, kernel.numerics).q}

    query = jax.ShapeDtypeStruct((rows, kernel.head_dim), jnp.dtype(kernel.dtype))
    return trace(scaled, {"query": query, "scale": _FLOAT})


@_once
def key_total(kernel: Kernel, rows: int) -> Trace:
    """A slab of keys, added to ``total`` row by row."""

    def added(key: Array, total: Array) -> dict[str, Any]:
        return {"total": total + key.astype(tile.wide_type(key.dtype))}

    key = jax.ShapeDtypeStruct((rows, kernel.head_dim), jnp.dtype(kernel.dtype))
    total = jax.ShapeDtypeStruct((rows, kernel.head_dim), jnp.float32)
    return trace(added, {"key": key, "total": total})


@_once
def kappa(kernel: Kernel, rows: int) -> Trace:
    """κ of a block from sums of its keys and their number."""

    def mean(total: Array, count: Array, chosen: Array | None = None) -> dict[str, Any]:
        whole = jnp.sum(total, axis=0, keepdims=True)
        if chosen is not None:  # 1 or 0
            whole = whole * chosen
        return {"kappa": tile.mean_key(whole, count, jnp.dtype(kernel.dtype))}

    total = jax.ShapeDtypeStruct((rows, kernel.head_dim), jnp.float32)
    shapes = {"total": total, "count": _FLOAT}
    return trace(mean, shapes | ({"chosen": _FLOAT} if kernel.chooses else {}))


@_once
def shifted_keys(kernel: Kernel, rows: int) -> Trace:
    """K' of a slab of keys."""

    def shifted(key: Array, kappa: Array) -> dict[str, Any]:
        return {"shifted": tile.key_tile(key, key, None, kernel.numerics, kappa=kappa).k}

    dtype = jnp.dtype(kernel.dtype)
    key = jax.ShapeDtypeStruct((rows, kernel.head_dim), dtype)
    return trace(shifted, {"key": key, "kappa": jax.ShapeDtypeStruct((1, kernel.head_dim), dtype)})


# What `auto` chooses by (core/choice.py).


@_once
def moments(kernel: Kernel, rows: int) -> Trace:
    """A slab of queries or keys and its squares, added to ``total`` and ``square`` row by row."""

    def added(x: Array, total: Array, square: Array) -> dict[str, Any]:
        wide = x.astype(jnp.float32)
        return {"total": total + wide, "square": square + wide * wide}

    x = jax.ShapeDtypeStruct((rows, kernel.head_dim), jnp.dtype(kernel.dtype))
    wide = jax.ShapeDtypeStruct((rows, kernel.head_dim), jnp.float32)
    return trace(added, {"x": x, "total": wide, "square": wide})


@_once
def moment_rows(kernel: Kernel, rows: int) -> Trace:
    """``total`` and ``square`` summed over the rows."""

    def summed(total: Array, square: Array) -> dict[str, Any]:
        sums = {"total": total, "square": square}
        return {n: jnp.sum(x, axis=0, keepdims=True) for n, x in sums.items()}

    wide = jax.ShapeDtypeStruct((rows, kernel.head_dim), jnp.float32)
    return trace(summed, {"total": wide, "square": wide})


@_once
def moment_tiles(kernel: Kernel, rows: int) -> Trace:
    """``total`` and ``square`` of several tiles with those of more, whose names have a 2."""

    def added(**x: Array) -> dict[str, Any]:
        return {n: x[n] + x[f"{n}2"] for n in ("total", "square")}

    wide = jax.ShapeDtypeStruct((rows, kernel.head_dim), jnp.float32)
    return trace(added, dict.fromkeys(("total", "square", "total2", "square2"), wide))


@_once
def spread(kernel: Kernel) -> Trace:
    """κ of a block and Σ(k − κ)² by channel over its ``count`` keys, from the sums of ``looked`` of
    them and of their squares.
    """

    def found(total: Array, square: Array, count: Array, looked: Array) -> dict[str, Any]:
        mean = tile.mean_key(total, looked, jnp.dtype(jnp.float32))
        apart = jnp.maximum(square - mean * total, 0) * (count / looked)
        return {"kappa": mean.astype(kernel.dtype), "spread": apart}

    row = _row(kernel.head_dim)
    return trace(found, {"total": row, "square": row, "count": _FLOAT, "looked": _FLOAT})


def _mean_and_variance(total: Array, square: Array, count: Array) -> tuple[Array, Array]:
    mean = total * (1 / count)
    return mean, jnp.maximum(square * (1 / count) - mean * mean, 0)


@_once
def choice_of_block(kernel: Kernel) -> Trace:
    """What a block adds to ``offset``, ``power`` and ``around`` [1, 1]."""

    def added(
        kappa: Array, spread: Array, total: Array, square: Array, count: Array,
        offset: Array, power: Array, around: Array,
    ) -> dict[str, Any]:  # fmt: skip
        mean, var = _mean_and_variance(total, square, count)
        of, squared = choice.of_block(kappa.astype(jnp.float32), mean.T, var.T)
        apart = spread @ (mean * mean + var).T
        return {"offset": offset + of, "power": power + squared, "around": around + apart}

    one = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    row = _row(kernel.head_dim)
    kappa = jax.ShapeDtypeStruct((1, kernel.head_dim), jnp.dtype(kernel.dtype))
    shapes = {"kappa": kappa, "spread": row, "total": row, "square": row, "count": _FLOAT}
    return trace(added, shapes | dict.fromkeys(("offset", "power", "around"), one))


@_once
def chosen(kernel: Kernel) -> Trace:
    """1 where κ is taken off the keys of a head, else 0, from the sums over its blocks."""

    def decided(
        offset: Array, power: Array, around: Array, blocks: Array, keys: Array, scale: Array
    ) -> dict[str, Any]:
        towards = offset * (jnp.where(scale < 0, -1.0, 1.0) / blocks)
        pays = choice.pays(power * (1 / blocks), around * (1 / jnp.maximum(keys, 1.0)), towards)
        return {"chosen": jnp.where(pays, 1.0, 0.0)}

    one = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    sums: dict[str, Any] = dict.fromkeys(("offset", "power", "around"), one)
    return trace(decided, sums | dict.fromkeys(("blocks", "keys", "scale"), _FLOAT))


# Before the careful kernel's loop.


def _usable(key: Array, value: Array, valid: Array) -> Array:
    """[R, 1] bool: there are a key and a value, and they are finite."""

    def finite(x: Array) -> Array:
        wide, largest = x.astype(jnp.float32), float(jnp.finfo(x.dtype).max)
        beyond = jnp.where(jnp.abs(wide) <= largest, 0.0, 1.0)  # NaN is not at most anything
        return jnp.max(beyond, axis=1, keepdims=True) < 0.5

    rows = lax.broadcasted_iota(jnp.int32, (key.shape[0], 1), 0)
    return finite(key) & finite(value) & (rows < valid)


def _slab_shapes(kernel: Kernel, rows: int) -> dict[str, Any]:
    dtype = jnp.dtype(kernel.dtype)
    return {
        "key": jax.ShapeDtypeStruct((rows, kernel.head_dim), dtype),
        "value": jax.ShapeDtypeStruct((rows, kernel.value_head_dim), dtype),
        "valid": _INT,
    }


def _row(size: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, size), jnp.float32)


@_once
def usable_total(kernel: Kernel, rows: int) -> Trace:
    """Sum and number of the usable keys of a slab, added to ``total`` and ``count`` [1, D]."""

    def added(key: Array, value: Array, valid: Array, total: Array, count: Array) -> dict[str, Any]:
        usable = _usable(key, value, valid)
        kept = tile.zero_unusable(key.astype(jnp.float32), usable)
        ones = jnp.where(usable, jnp.ones_like(kept), jnp.zeros_like(kept))
        return {
            "total": total + jnp.sum(kept, axis=0, keepdims=True),
            "count": count + jnp.sum(ones, axis=0, keepdims=True),
        }

    d = kernel.head_dim
    return trace(added, {**_slab_shapes(kernel, rows), "total": _row(d), "count": _row(d)}).needed()


@_once
def usable_kappa(kernel: Kernel) -> Trace:
    """κ of a block from the sum and the number of its usable keys; 0 where the sum is infinite."""

    def mean(total: Array, count: Array) -> dict[str, Any]:
        kappa = tile.mean_key(total, count, jnp.dtype(jnp.float32))
        fits = jnp.abs(kappa) <= float(jnp.finfo(kernel.dtype).max) / 4
        return {"kappa": jnp.where(fits, kappa, 0.0).astype(kernel.dtype)}

    return trace(mean, {"total": _row(kernel.head_dim), "count": _row(kernel.head_dim)}).needed()


@_once
def usable_keys(kernel: Kernel, rows: int) -> Trace:
    """K' of a slab, NaN where a key is not usable; the largest magnitudes so far, by column."""
    narrow = kernel.dtype == "float16"

    def shifted(
        key: Array, value: Array, valid: Array, kappa: Array, keyTop: Array, valueTop: Array
    ) -> dict[str, Any]:
        usable = _usable(key, value, valid)
        made = tile.key_tile(key, value, usable, kernel.numerics, kappa=kappa)
        plain = tile.zero_unusable(key, usable).astype(jnp.float32)
        size = jnp.abs(plain - kappa.astype(jnp.float32))
        if not narrow:  # products with the keys themselves may leave float32
            size = jnp.maximum(size, jnp.abs(plain))
        size = tile.zero_unusable(size, usable)
        values = jnp.abs(made.v.astype(jnp.float32))
        return {
            "shifted": made.k,
            "keyTop": jnp.maximum(keyTop, jnp.max(size, axis=0, keepdims=True)),
            "valueTop": jnp.maximum(valueTop, jnp.max(values, axis=0, keepdims=True)),
        }

    d, e = kernel.head_dim, kernel.value_head_dim
    shapes = {
        **_slab_shapes(kernel, rows),
        "kappa": jax.ShapeDtypeStruct((1, d), jnp.dtype(kernel.dtype)),
        "keyTop": _row(d),
        "valueTop": _row(e),
    }
    return trace(shifted, shapes).needed()


# Values up to 2^94 can be summed over 2^31 of them in float32.
_SUMMABLE = 2.0**94


@_once
def bounds_of_head(kernel: Kernel) -> Trace:
    """The largest magnitude of a head's keys, and the factor that keeps sums of its values in
    range, each as one number.
    """

    def bounds(keyTop: Array, valueTop: Array) -> dict[str, Any]:
        top = jnp.max(valueTop, axis=1, keepdims=True)
        gain = 1 / tile.power_above(top * (1 / _SUMMABLE))
        return {"keyBound": jnp.max(keyTop, axis=1, keepdims=True), "valueGain": gain}

    shapes = {"keyTop": _row(kernel.head_dim), "valueTop": _row(kernel.value_head_dim)}
    return trace(bounds, shapes).needed()


@_once
def guarded_queries(kernel: Kernel, rows: int) -> Trace:
    """Query rows as they are multiplied, divided by their guard, and the guard [R, 1]."""
    stored = kernel.precision.scores

    def guarded(query: Array, scale: Array, keyBound: Array) -> dict[str, Any]:
        rows = query.astype(jnp.float32) * scale
        size = jnp.abs(rows)
        largest = float(jnp.finfo(jnp.float32).max)
        top = jnp.max(jnp.where(size <= largest, size, 0.0), axis=1, keepdims=True)
        scaled, guard = tile.guard_by_size(rows, top, keyBound, kernel.dtype, stored)
        return {"scaled": scaled, "guard": guard}

    query = jax.ShapeDtypeStruct((rows, kernel.head_dim), jnp.dtype(kernel.dtype))
    return trace(guarded, {"query": query, "scale": _FLOAT, "keyBound": _FLOAT}).needed()


@_once
def usable_values(kernel: Kernel, rows: int) -> Trace:
    """The values of a slab, 0 where a key is not usable, times the head's gain."""

    def kept(key: Array, value: Array, valid: Array, gain: Array) -> dict[str, Any]:
        usable = _usable(key, value, valid)
        made = tile.zero_unusable(value, usable).astype(jnp.float32) * gain
        return {"values": made.astype(value.dtype)}

    return trace(kept, {**_slab_shapes(kernel, rows), "gain": _FLOAT}).needed()


# The loop's body.


@_once
def loop_body(kernel: Kernel, rows: int, *, masked: bool) -> Trace:
    """One key tile on one slab: `Walk.fold`."""
    traced = _body(kernel, rows, masked=masked)
    if kernel.functions is None:
        return traced
    return replace(traced, equations=_with_spans(kernel, traced, longest(kernel)))


def _body(kernel: Kernel, rows: int, *, masked: bool) -> Trace:
    n, d, e = kernel.schedule.block_kv, kernel.head_dim, kernel.value_head_dim
    dtype = jnp.dtype(kernel.dtype)
    shapes: dict[str, Any] = {
        "query": jax.ShapeDtypeStruct((rows, d), dtype),
        "key": jax.ShapeDtypeStruct((n, d), dtype),
        "value": jax.ShapeDtypeStruct((n, e), dtype),
        **_state_shapes(kernel, rows, settled=False),
        **dict.fromkeys(("start", "queries", "keys", "j", "t"), _INT),
    }
    if kernel.shift == "reference":
        shapes["raw"] = jax.ShapeDtypeStruct((n, d), dtype)
    if kernel.bounded:
        shapes["reference"] = jax.ShapeDtypeStruct((rows, 1), jnp.float32)
    if kernel.form in ("mean", "reference", "bound"):
        shapes["kappa"] = jax.ShapeDtypeStruct((1, d), dtype)
    if kernel.shift == "paper":
        shapes["weights"] = jax.ShapeDtypeStruct((n, 1), jnp.float32)
    if kernel.bias is not None:
        shapes["bias"] = jax.ShapeDtypeStruct((rows, n), dtype)
    if masked:
        shapes |= _shown_shapes(kernel, rows)
    if kernel.careful:
        shapes["guard"] = jax.ShapeDtypeStruct((rows, 1), jnp.float32)
    shapes |= _asked_shapes(kernel, rows)

    def fold(
        m: Array, l: Array, o: Array, f: Array, start: Array, queries: Array, keys: Array,  # noqa: E741
        j: Array, t: Array, **parts: Any,
    ) -> dict[str, Any]:  # fmt: skip
        walk = kernel.walk(rows, queries, keys, **parts)
        seen = walk.seen(start, j) if masked else None
        state = tile.State(m, l, o, f)
        carry = (state, t.astype(jnp.float32))
        new, _ = walk.fold(start, walk.query(start), j, seen, carry)
        return new._asdict()

    return trace(fold, shapes)


def _asked_shapes(kernel: Kernel, rows: int) -> dict[str, Any]:
    """What the caller's functions are given."""
    if kernel.functions is None:
        return {}
    n = kernel.schedule.block_kv
    leaves = kernel.functions.leaves
    shapes = {x.name: jax.ShapeDtypeStruct(x.tile_shape(rows, n), x.traced) for x in leaves}
    return {"entry": _INT, "head": _INT, "whole": _INT, **shapes}


def _with_spans(kernel: Kernel, traced: Trace, length: int) -> list[Equation]:
    """The equations with the spans of whole numbers in calls of so many queries and keys. What an
    index is beyond the last query or key does not matter.
    """
    n = kernel.schedule.block_kv
    spans = {"start": (0, length - 1 - kernel.schedule.block_q), "j": (0, length // n - 1)}
    return marked(traced.equations, {traced.inputs[name]: x for name, x in spans.items()})


@_once
def longest(kernel: Kernel) -> int:
    """The most queries or keys for which every index that the kernel computes is exact in float32:
    a power of two.

    Raises:
      LoweringError: there is none; it names what is not exact.
    """
    if kernel.functions is None:
        return 2**24
    traced = _body(kernel, kernel.schedule.block_q // 2, masked=True)
    lengths = [2**power for power in range(24, 12, -1)]
    wrong = [inexact(_with_spans(kernel, traced, length), traced.shared) for length in lengths]
    if None in wrong:
        return lengths[wrong.index(None)]
    found = wrong[-1]
    assert found is not None
    raise LoweringError(
        f"{found.primitive} of whole numbers: {EXACT_DIVISIONS}; "
        f"{origin(found.source, found.function)}. {way_out(found.function)}".rstrip()
    )


def _shown_shapes(kernel: Kernel, rows: int) -> dict[str, Any]:
    """What hides keys by data."""
    n = kernel.schedule.block_kv
    shapes: dict[str, Any] = {}
    if kernel.mask_axes is not None:
        shapes["mask"] = jax.ShapeDtypeStruct((rows, n), jnp.uint8)
    if kernel.segments:
        shapes["querySegments"] = jax.ShapeDtypeStruct((rows, 1), jnp.int32)
        shapes["keySegments"] = jax.ShapeDtypeStruct((1, n), jnp.int32)
    return shapes


# After the loop.

_SETTLED = ("m", "l", "o")  # what a state has whose f is in its m


def _state_shapes(kernel: Kernel, rows: int, *, settled: bool) -> dict[str, Any]:
    stat = jnp.dtype(jnp.float32) if settled else kernel.numerics.statistics
    acc = jnp.dtype(jnp.float32 if settled else kernel.precision.accumulator)
    column = jax.ShapeDtypeStruct((rows, 1), stat)
    o = jax.ShapeDtypeStruct((rows, kernel.value_head_dim), acc)
    return {"m": column, "l": column, "o": o, "f": column}


@_once
def settle(kernel: Kernel, rows: int) -> Trace:
    """m, l and o of a slab that has seen some keys, to be merged, in float32."""

    def settled(m: Array, l: Array, o: Array, f: Array) -> dict[str, Any]:  # noqa: E741
        state = tile.settle(tile.State(m, l, o, f), kernel.numerics)
        return {name: getattr(state, name) for name in _SETTLED}

    return trace(settled, _state_shapes(kernel, rows, settled=False)).needed()


@_once
def merge(kernel: Kernel, rows: int) -> Trace:
    """The state over the keys of two settled ones; the other's names have a 2."""
    one = _state_shapes(kernel, rows, settled=True)
    shapes = {n: one[n] for n in _SETTLED} | {f"{n}2": one[n] for n in _SETTLED}
    if kernel.careful:
        shapes["guard"] = one["m"]

    def merged(**x: Array) -> dict[str, Any]:
        zero = jnp.zeros_like(x["m"])
        a, b = (tile.State(x[f"m{n}"], x[f"l{n}"], x[f"o{n}"], zero) for n in ("", "2"))
        walk = kernel.walk(rows, 0, 0, query=x["o"], **{n: x[n] for n in x if n == "guard"})
        state = tile.merge(a, b, kernel.numerics, walk.query(0).guard)
        return {name: getattr(state, name) for name in _SETTLED}

    return trace(merged, shapes).needed()


@_once
def close(kernel: Kernel, rows: int) -> Trace:
    """The output and the log-sum-exp of a slab that has seen all its keys."""

    def closed(m: Array, l: Array, o: Array, f: Array, **parts: Array) -> dict[str, Any]:  # noqa: E741
        walk = kernel.walk(rows, 0, 0, query=o, **parts)
        done = walk.close(0, walk.query(0), tile.State(m, l, o, f))
        out, _ = walk.rounded(done.out, jnp.dtype(kernel.dtype))
        return {"out": out, "lse": done.lse if kernel.return_lse else None}

    shapes = _state_shapes(kernel, rows, settled=kernel.decode)
    if kernel.careful:
        shapes |= {"guard": jax.ShapeDtypeStruct((rows, 1), jnp.float32), "valueGain": _FLOAT}
    if kernel.sinks:
        shapes["sinks"] = jax.ShapeDtypeStruct((rows, 1), jnp.float32)
    return trace(closed, shapes).needed()


@_once
def damage(kernel: Kernel, rows: int) -> Trace:
    """What is wrong with a slab whose keys have been seen, added to ``total`` and ``core`` [1, 1]:
    0, or NaN where o or l are not finite, or where a row has no weights although it sees a key by
    its position.
    """

    def added(
        l: Array, o: Array, total: Array, core: Array, first: Array, queries: Array, keys: Array,  # noqa: E741
        valid: Array,
    ) -> dict[str, Any]:  # fmt: skip
        l = l.astype(jnp.float32)  # noqa: E741
        empty = 0 / l
        if _may_see_nothing(kernel):
            row = lax.broadcasted_iota(jnp.int32, l.shape, 0)
            place = jnp.zeros_like(row) if kernel.decode else first + row
            lo, hi = kernel.mask(queries, keys).key_interval(place)
            empty = jnp.where((row < valid) & (lo < hi), empty, l * 0)
        sums = jnp.sum(o.astype(jnp.float32), axis=0, keepdims=True)
        found = jnp.sum(sums, axis=1, keepdims=True) * 0 + jnp.sum(empty, axis=0, keepdims=True)
        return {"total": total + found, "core": core + found}

    state = _state_shapes(kernel, rows, settled=kernel.decode)
    shapes = {
        "l": state["l"],
        "o": state["o"],
        **{n: _row(1) for n in ("total", "core")},
        **dict.fromkeys(("first", "queries", "keys", "valid"), _INT),
    }
    return trace(added, shapes).needed()


def _may_see_nothing(kernel: Kernel) -> bool:
    """Whether a row of a call with keys may see none of them by its position."""
    shifted = kernel.is_causal and kernel.causal_alignment == "bottom_right"
    some = kernel.lengths or kernel.packed  # either may have no keys at all
    return some or kernel.window is not None or shifted or kernel.decode
