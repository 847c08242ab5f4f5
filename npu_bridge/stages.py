"""The tile functions traced, and cut where a matrix product stands between them.

Nothing here computes attention: `pasa_jax`'s walk and tile functions are called with tracers of one
slab of rows. What comes out is a step of the loop as products for the cube unit and stretches of
equations for the vector unit, and the loop bounds as expressions of the kernel's numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr

from npu_bridge.ir import C_TYPES, Node
from npu_bridge.lowering import Equation, Lowering, Scalar, Value, Var, flatten
from pasa_jax.core import tile
from pasa_jax.core.errors import LoweringError
from pasa_jax.core.mask import Index, Mask
from pasa_jax.core.plan import Plan
from pasa_jax.core.precision import Precision
from pasa_jax.core.schedule import Schedule
from pasa_jax.core.walk import Walk

Array = jax.Array
# Columns of q·κ and of P's row sums, all equal: a block of float32. (The cube unit multiplies
# by twice as many at least; the vector cores read these.)
COLUMNS = 8
_INT = jax.ShapeDtypeStruct((), jnp.int32)
_MANY = 2**20  # blocks of keys that a static length stands for; the true one comes at run time


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """What one emitted kernel computes; batch, heads and lengths come at run time.

    Arguments:
      head_dim, value_head_dim: D and E.
      dtype: of query, key, value and output, "float16" or "bfloat16".
      shift: "none", "paper", "mean" or "reference".
      is_causal, causal_alignment, window, logits_soft_cap: as `dot_product_attention` takes them.
      bias: which of the axes [B, N, T, S] a bias has, as a string like "1NTS"; None: no bias.
      lengths: whether each batch entry has a length of its own for its keys.
      return_lse: whether the log-sum-exp is written too.
      decode: one query (T = 1): the query heads of a key head are the rows of a tile, and the keys
        of a head are split over several cores, whose states are merged.
    """

    head_dim: int
    value_head_dim: int
    dtype: str
    shift: str
    precision: Precision
    schedule: Schedule
    is_causal: bool = False
    causal_alignment: str = "top_left"
    window: tuple[int, int] | None = None
    logits_soft_cap: float | None = None
    beta: float | None = None
    bias: str | None = None
    lengths: bool = False
    return_lse: bool = False
    decode: bool = False

    @functools.cached_property
    def plan(self) -> Plan:
        # The vector unit multiplies and adds apart.
        return Plan(
            shift=self.shift,
            precision=self.precision,
            schedule=self.schedule,
            logits_soft_cap=self.logits_soft_cap,
            beta=self.beta,
            scale=self.head_dim**-0.5 if self.shift == "paper" else None,
            explicit_precision=True,
            dialect=tile.Dialect(
                contracts=False,
                narrow_sums=False,
                sum_columns=COLUMNS if self.sums_multiplied else 0,
            ),
        )

    @property
    def sums_multiplied(self) -> bool:
        """Whether the cube unit adds up P, in float32: the vector unit is what takes longest."""
        return self.precision.statistics == "float32"

    @functools.cached_property
    def numerics(self) -> tile.Numerics:
        return self.plan.numerics(self.schedule.block_kv)

    def mask(self, queries: Index, keys: Index) -> Mask:
        """The mask of one batch entry, its lengths known at run time only."""
        return Mask(
            query_length=queries,  # type: ignore[arg-type]  # used in sums alone
            key_length=self.schedule.block_kv * _MANY,
            is_causal=self.is_causal,
            causal_alignment=self.causal_alignment,
            window=self.window,
            key_lengths=keys,  # type: ignore[arg-type]
        )

    @property
    def masked(self) -> bool:
        """Whether the place of a tile may decide what is seen in it, beyond the last key."""
        return self.is_causal or self.window is not None

    def walk(self, rows: int, queries: Index, keys: Index, **parts: Any) -> TracedWalk:
        return TracedWalk(
            mask=self.mask(queries, keys),
            plan=self.plan,
            numerics=self.numerics,
            groups=rows if self.decode else 1,
            block_q=1 if self.decode else rows,
            value_size=self.value_head_dim,
            parts=parts,
        )


@dataclass(frozen=True, kw_only=True)
class TracedWalk(Walk):
    """One slab of rows of the kernel, made of tracers."""

    parts: dict[str, Any] = field(default_factory=dict)

    def query(self, start: Index) -> tile.QueryTile:
        # As `tile.query_tile` leaves it: the factor is in the query already.
        return tile.QueryTile(self.parts["query"], jnp.ones((1, 1), self.numerics.product), None)

    def key(self, j: Index, value_gain: Array | None = None) -> tile.KeyTile:
        assert value_gain is None
        p = self.parts
        return tile.KeyTile(
            p["key"], p["value"], None, p.get("kappa"), p.get("weights"), p.get("raw")
        )

    def key_start(self, j: Index) -> Index:
        return j * self.block_kv

    def bias(self, start: Index, j: Index) -> Array | None:
        return self.parts.get("bias")

    def array(self, start: Index, j: Index) -> Array | None:
        return None

    def sinks(self) -> Array | None:
        return None


# Traces.


@dataclass(frozen=True)
class Trace:
    """A traced function with named inputs and outputs."""

    equations: list[Equation]
    inputs: dict[str, Var]
    outputs: dict[str, Any]  # Var or Scalar


def trace(function: Callable[..., dict[str, Any]], shapes: dict[str, Any]) -> Trace:
    """``function(**shapes)`` as equations."""
    names = list(shapes)
    out_names: list[str] = []

    def called(*args: Any) -> list[Any]:
        found = function(**dict(zip(names, args, strict=True)))
        out_names[:] = [name for name, x in found.items() if x is not None]
        return [x for x in found.values() if x is not None]

    closed: ClosedJaxpr = jax.make_jaxpr(called)(*shapes.values())
    inputs, equations, outputs = flatten(closed)
    named = dict(zip(names, inputs, strict=True))
    return Trace(equations, named, dict(zip(out_names, outputs, strict=True)))


def key_range(kernel: Kernel) -> tuple[list[Node], dict[str, str]]:
    """The key tiles that the queries from ``start`` on see, as the mask itself says it: statements
    and the names of lo, full_lo, full_hi, hi. Numbers: start, queries, keys.
    """
    rows = 1 if kernel.decode else kernel.schedule.block_q

    def found(start: Array, queries: Array, keys: Array) -> dict[str, Any]:
        mask = kernel.mask(queries, keys)
        r = mask.key_range(start, start + rows, kernel.schedule.block_kv)
        return {name: jnp.asarray(x, jnp.int32) for name, x in r._asdict().items()}

    traced = trace(found, {"start": _INT, "queries": _INT, "keys": _INT})
    inputs: dict[Var, Value] = {v: Scalar(n) for n, v in traced.inputs.items()}
    low = Lowering(1, _no_memory, inputs, prefix="at")
    low.lower(traced.equations)
    values = {name: low.value(x) for name, x in traced.outputs.items()}
    return low.body, {name: str(x.value) for name, x in values.items()}  # type: ignore[union-attr]


def _no_memory(*_: Any) -> Any:
    raise LoweringError("the bounds of the loop over keys are not numbers alone")


def queries(kernel: Kernel, rows: int) -> Trace:
    """The query rows with everything folded in that must be before the product."""

    def scaled(query: Array, scale: Array) -> dict[str, Any]:
        gain = kernel.plan.gain(scale)
        return {"scaled": tile.query_tile(query, gain, None, kernel.numerics).q}

    dtype = jnp.dtype(kernel.dtype)
    query = jax.ShapeDtypeStruct((rows, kernel.head_dim), dtype)
    return trace(scaled, {"query": query, "scale": jax.ShapeDtypeStruct((), jnp.float32)})


def key_total(kernel: Kernel, rows: int) -> Trace:
    """The sum of a slab of keys, added to ``total`` [1, D]."""

    def found(key: Array, total: Array) -> dict[str, Any]:
        wide = tile.wide_type(key.dtype)
        return {"total": total + jnp.sum(key.astype(wide), axis=0, keepdims=True)}

    key = jax.ShapeDtypeStruct((rows, kernel.head_dim), jnp.dtype(kernel.dtype))
    total = jax.ShapeDtypeStruct((1, kernel.head_dim), jnp.float32)
    return trace(found, {"key": key, "total": total})


def kappa(kernel: Kernel) -> Trace:
    """κ of a block from the sum of its keys and their number."""

    def found(total: Array, count: Array) -> dict[str, Any]:
        return {"kappa": tile.mean_key(total, count, jnp.dtype(kernel.dtype))}

    total = jax.ShapeDtypeStruct((1, kernel.head_dim), jnp.float32)
    return trace(found, {"total": total, "count": jax.ShapeDtypeStruct((), jnp.float32)})


def shifted_keys(kernel: Kernel, rows: int) -> Trace:
    """K' of a slab of keys."""

    def found(key: Array, kappa: Array) -> dict[str, Any]:
        return {"shifted": tile.key_tile(key, key, None, kernel.numerics, kappa=kappa).k}

    dtype = jnp.dtype(kernel.dtype)
    key = jax.ShapeDtypeStruct((rows, kernel.head_dim), dtype)
    return trace(found, {"key": key, "kappa": jax.ShapeDtypeStruct((1, kernel.head_dim), dtype)})


@dataclass(frozen=True)
class Product:
    """A product for the cube unit.

    Arguments:
      left: "query", or the name of the value that the vector unit hands over.
      right: "key", "kappa" or "value".
      dtype: the C++ type in which its result is handed over.
      minus: whether a column that the vector unit hands over is taken off it, in float32.
    """

    name: str
    left: str
    right: str
    columns: int
    dtype: str
    minus: bool = False


@dataclass(frozen=True)
class Stage:
    """A stretch for the vector unit."""

    equations: list[Equation]
    inputs: dict[str, Var]
    outputs: dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One key tile: products and the vector stages between them.

    Arguments:
      products: by what they multiply with: "key", "raw", "kappa", "value", "ones".
      refer: from the first scores to the row reference that is taken off the second ones, in two
        halves "high" and "low" of the inputs' type; None but for the shift "reference".
      softmax: from the scores to the probabilities, m, l and f.
      accumulate: the output.
      carried: columns that a stage takes over from the one before.
    """

    products: dict[str, Product]
    refer: Stage | None
    softmax: Stage
    accumulate: Stage
    carried: tuple[str, ...]


_PRODUCTS = {
    "key": "scores",
    "raw": "shifted",
    "kappa": "offsets",
    "value": "update",
    "ones": "sums",
}
_STATE = ("m", "l", "o", "f")


def step(kernel: Kernel, rows: int, *, masked: bool) -> Step:
    """The loop's body on one slab: `Walk.fold`, cut at its products."""
    n, d, e = kernel.schedule.block_kv, kernel.head_dim, kernel.value_head_dim
    dtype, stat = jnp.dtype(kernel.dtype), kernel.numerics.statistics
    column = jax.ShapeDtypeStruct((rows, 1), stat)
    shapes: dict[str, Any] = {
        "query": jax.ShapeDtypeStruct((rows, d), dtype),
        "key": jax.ShapeDtypeStruct((n, d), dtype),
        "value": jax.ShapeDtypeStruct((n, e), dtype),
        "m": column,
        "l": column,
        "o": jax.ShapeDtypeStruct((rows, e), jnp.dtype(kernel.precision.accumulator)),
        "f": column,
        **dict.fromkeys(("start", "queries", "keys", "j", "t"), _INT),
    }
    if kernel.shift == "reference":
        shapes["raw"] = jax.ShapeDtypeStruct((n, d), dtype)
    if kernel.shift in ("mean", "reference"):
        shapes["kappa"] = jax.ShapeDtypeStruct((COLUMNS, d), dtype)
    if kernel.shift == "paper":
        shapes["weights"] = jax.ShapeDtypeStruct((n, 1), jnp.float32)
    if kernel.bias is not None:
        shapes["bias"] = jax.ShapeDtypeStruct((rows, n), dtype)

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

    return _cut(trace(fold, shapes))


def _cut(traced: Trace) -> Step:
    names = {var: name for name, var in traced.inputs.items()}
    found = _find_products(traced, names)
    products, results = found.products, found.results
    vector = [e for e in traced.equations if e.output not in found.inside]
    level, last = _levels(traced, found.waits)
    known = {**names, **results}
    pure = _pure(vector, set(results) | {traced.inputs[n] for n in _STATE})
    outputs = {n: x for n, x in traced.outputs.items() if x is not traced.inputs.get(n)}
    for x in outputs.values():
        if isinstance(x, Scalar):
            raise LoweringError("a state of the softmax is a plain number")
    handed = {  # level -> what the vector unit gives the cube at its end, by name
        at: {n: x for x, n in found.given.items() if level.get(x, 1) == at} for at in range(1, last)
    }
    carried: dict[str, Var] = {}
    for at in range(2, last + 1):  # columns that are used in a later stage than they are made in
        for eqn in (e for e in vector if level[e.output] == at and e.output not in pure):
            for x in eqn.inputs:
                early = isinstance(x, Var) and x not in known and level[x] < at
                if not early or x in pure or x in carried.values():
                    continue
                if x.aval.shape[-1:] != (1,):
                    raise LoweringError(f"only columns are kept for a later stage, not {x.aval}")
                carried[f"factor{len(carried) + 1}"] = x
    taken = {var: name for name, var in carried.items()}
    stages = []
    for at in range(1, last + 1):
        body = [e for e in vector if level[e.output] == at or e.output in pure]
        wanted = {n: x for n, x in outputs.items() if level.get(x, 1) == at}
        wanted |= {n: x for n, x in carried.items() if level[x] == at}
        wanted |= handed.get(at, {})
        before = {x: n for x, n in taken.items() if level[x] < at}
        stages.append(_stage(body, {**known, **before}, wanted))
    refer = stages[0] if last == 3 else None
    return Step(products, refer, stages[-2], stages[-1], tuple(carried))


@dataclass(frozen=True)
class _Products:
    """The products of a step.

    Arguments:
      results: the variables that they result in, by the products' names.
      given: what the vector unit hands over for them, by name.
      waits: result -> what must be computed before it can be multiplied, or None.
      inside: what the cube unit computes.
    """

    products: dict[str, Product] = field(default_factory=dict)
    results: dict[Var, str] = field(default_factory=dict)
    given: dict[Var, str] = field(default_factory=dict)
    waits: dict[Var, Var | None] = field(default_factory=dict)
    inside: set[Var] = field(default_factory=set)


def _find_products(traced: Trace, names: dict[Var, str]) -> _Products:
    found = _Products()
    for eqn in traced.equations:
        if eqn.primitive != "dot_general" or eqn.output.aval.shape[1] == 1:
            continue
        left, right = eqn.inputs
        if isinstance(right, Scalar):
            name = "ones" if right.value == 1 else ""
        else:
            name = names.get(right, "")
        if name not in _PRODUCTS:
            raise LoweringError(
                "the cube unit multiplies with keys, κ or values as they lie in memory; "
                f"a product with something computed comes from {eqn.source}"
            )
        out, waits = eqn.output, left if left not in names else None
        found.inside.add(out)
        minus = _minus(out, traced.equations) if name == "raw" else None
        if minus is not None:
            out, halves = minus
            waits = halves[0]
            found.given.update(zip(halves, ("high", "low"), strict=True))
        result, dtype = _rounded(out, traced.equations)
        found.inside.update((out, result))
        found.waits[result] = waits
        found.results[result] = _PRODUCTS[name]
        if left not in names:
            found.given[left] = "p"
        found.products[name] = Product(
            _PRODUCTS[name],
            names.get(left, "p"),
            name,
            result.aval.shape[1],
            C_TYPES[dtype],
            minus is not None,
        )
    return found


def _minus(product: Var, equations: list[Equation]) -> tuple[Var, tuple[Var, Var]] | None:
    """What a product is after a column is taken off it, and that column's two halves."""
    made = {e.output: e for e in equations}
    uses = [e for e in equations if product in e.inputs]
    if len(uses) != 1 or uses[0].primitive != "sub":
        return None
    column = made.get(uses[0].inputs[1])
    if column is None or column.primitive != "add":
        return None
    halves = [made[x] for x in column.inputs if x in made]
    if len(halves) != 2 or any(h.primitive != "convert_element_type" for h in halves):
        return None
    high, low = (h.inputs[0] for h in halves)
    return uses[0].output, (high, low)


def _levels(traced: Trace, waits: dict[Var, Var | None]) -> tuple[dict[Any, int], int]:
    """In which stage each variable is known, and how many stages there are: a product's result
    comes a stage after what it waits for. A state that the last stage makes is read there.
    """
    level: dict[Any, int] = dict.fromkeys(traced.inputs.values(), 1)
    last = 1
    for _ in range(2 * len(_STATE)):
        for eqn in traced.equations:
            if eqn.output in waits:
                x = waits[eqn.output]
                level[eqn.output] = 1 if x is None else level.get(x, 1) + 1
            else:
                level[eqn.output] = max([level.get(x, 1) for x in eqn.inputs], default=1)
        last = max(level.values())
        for name in _STATE:
            made = level.get(traced.outputs[name], 1)
            level[traced.inputs[name]] = last if made == last > 1 else 1
    return level, last


def _pure(vector: list[Equation], impure: set[Any]) -> set[Any]:
    """What depends on neither product nor state (the mask): each stage makes its own."""
    found: set[Any] = set()
    for eqn in vector:
        if any(x in impure for x in eqn.inputs if isinstance(x, Var)):
            impure.add(eqn.output)
        else:
            found.add(eqn.output)
    return found


def _stage(body: list[Equation], known: dict[Var, str], outputs: dict[str, Any]) -> Stage:
    """A stage with what it reads from outside; equations that nothing needs are left out."""
    needed = {x for x in outputs.values() if isinstance(x, Var)}
    kept: list[Equation] = []
    for eqn in reversed(body):
        if eqn.output in needed:
            kept.append(eqn)
            needed.update(x for x in eqn.inputs if isinstance(x, Var))
    inputs = {known[x]: x for x in needed if x in known}
    return Stage(kept[::-1], dict(sorted(inputs.items())), outputs)


def _rounded(var: Var, equations: list[Equation]) -> tuple[Var, str]:
    """The variable and type in which a product leaves the cube unit: rounded on the way out if all
    that is done with it is that.
    """
    uses = [e for e in equations if var in e.inputs]
    if len(uses) == 1 and uses[0].primitive == "convert_element_type":
        dtype = str(uses[0].output.aval.dtype)
        if dtype in ("float16", "bfloat16"):
            return uses[0].output, dtype
    return var, str(var.aval.dtype)


_PARTIAL = ("m", "l", "o")  # of a state that is settled


def _state_shapes(kernel: Kernel, rows: int, *, settled: bool) -> dict[str, Any]:
    stat = jnp.dtype(jnp.float32) if settled else kernel.numerics.statistics
    acc = jnp.dtype(jnp.float32 if settled else kernel.precision.accumulator)
    column = jax.ShapeDtypeStruct((rows, 1), stat)
    o = jax.ShapeDtypeStruct((rows, kernel.value_head_dim), acc)
    return {"m": column, "l": column, "o": o, "f": column}


def _needed(traced: Trace) -> Trace:
    """The trace without what its outputs do not need."""
    kept = _stage(traced.equations, {v: n for n, v in traced.inputs.items()}, traced.outputs)
    return replace(traced, equations=kept.equations)


def settle(kernel: Kernel, rows: int) -> Trace:
    """m, l and o of a slab that has seen some keys, to be merged, in float32."""

    def found(m: Array, l: Array, o: Array, f: Array) -> dict[str, Any]:  # noqa: E741
        state = tile.settle(tile.State(m, l, o, f), kernel.numerics)
        return {name: getattr(state, name) for name in _PARTIAL}

    return _needed(trace(found, _state_shapes(kernel, rows, settled=False)))


def merge(kernel: Kernel, rows: int) -> Trace:
    """The state over the keys of two settled ones; the other's names have a 2."""
    one = _state_shapes(kernel, rows, settled=True)
    shapes = {n: one[n] for n in _PARTIAL} | {f"{n}2": one[n] for n in _PARTIAL}

    def found(**x: Array) -> dict[str, Any]:
        zero = jnp.zeros_like(x["m"])
        a, b = (tile.State(x[f"m{n}"], x[f"l{n}"], x[f"o{n}"], zero) for n in ("", "2"))
        state = tile.merge(a, b, kernel.numerics)
        return {name: getattr(state, name) for name in _PARTIAL}

    return _needed(trace(found, shapes))


def close(kernel: Kernel, rows: int) -> Trace:
    """The output and the log-sum-exp of a slab that has seen all its keys."""

    def found(m: Array, l: Array, o: Array, f: Array) -> dict[str, Any]:  # noqa: E741
        walk = kernel.walk(rows, 0, 0)
        plain = tile.QueryTile(o, jnp.ones((1, 1)), None)
        done = walk.close(0, plain, tile.State(m, l, o, f))
        out, _ = walk.rounded(done.out, jnp.dtype(kernel.dtype))
        return {"out": out, "lse": done.lse if kernel.return_lse else None}

    return _needed(trace(found, _state_shapes(kernel, rows, settled=kernel.decode)))
