"""Lowering: every primitive is emitted, run on the emulator and in NumPy, and compared with jax's
own result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from npu_bridge.barriers import with_barriers
from npu_bridge.cores import prepare
from npu_bridge.dtypes import C_TYPES, NUMPY
from npu_bridge.expressions import Scalar
from npu_bridge.instructions import RowsIn, RowsOut
from npu_bridge.ir import Buffer, SetFlag, WaitFlag
from npu_bridge.lower import RULES, Lowering, Vector, flatten
from npu_bridge.lower.ranges import marked
from npu_bridge.lower.scalars import SCALAR_RULES
from npu_bridge.memory import Memory
from pasa_jax.core.errors import LoweringError
from tests.npu_bridge.lower_cases import CASES, Case, R, W
from tests.npu_bridge.parts import COMPILER, Part, compiled

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="the emulator needs g++")


# Emitting and running them.


@dataclass
class Lowered:
    """A case as a program, with the shapes of its results.

    Arguments:
      error: why it could not be lowered.
    """

    part: Part | None
    shapes: dict[str, tuple[int, int]]
    primitives: set[str]
    error: Exception | None = None


def lowered_case(it: Case) -> Lowered:
    """Loads, the lowered equations, stores; the results are called out0, out1, …"""
    shapes = [_shaped(x) for x in it.inputs]
    variables, equations, outputs = flatten(jax.make_jaxpr(it.function)(*shapes))
    equations = marked(equations, {})
    names = sorted(jax.eval_shape(it.function, *shapes))  # as jax orders a dict
    ub = Memory.of("ascend_910b", "UB")
    part = Part([], [], {}, {}, {})
    ramp = ub.stay("ramp", "float", W)
    part.local.append(ramp)
    part.nodes += prepare.ramp(ub, ramp).body
    inputs: dict[Any, Any] = {}
    for i, (var, x) in enumerate(zip(variables, it.inputs, strict=True)):
        if not isinstance(x, np.ndarray):
            part.numbers[f"number{i}"] = x
            inputs[var] = Scalar(f"number{i}")
            continue
        buffer = ub.stay(f"in{i}", C_TYPES[str(x.dtype)], x.size)
        source = Buffer(f"from{i}", "GM", buffer.dtype, x.size)
        part.local.append(buffer)
        part.inputs[source.name] = x
        part.nodes.append(RowsIn(buffer.at(), source.at(), 1, x.size, 0))
        inputs[var] = Vector(buffer.at(), *x.shape)
    made: list[Buffer] = []

    def allocate(name: str, dtype: str, count: int) -> Buffer:
        made.append(Buffer(f"{name}_{len(made)}", "UB", dtype, count))
        return made[-1]

    low = Lowering(allocate, inputs, ramp=ramp)
    low.lower(equations)
    stores, results = [], {}
    for i, (name, x) in enumerate(zip(names, outputs, strict=True)):
        value = low.value(x)
        assert isinstance(value, Vector), (name, value)
        to = Buffer(f"out{i}", "GM", value.dtype, value.size)
        part.outputs[to.name] = value.size, value.dtype
        stores.append(RowsOut(to.at(), value.place, 1, value.size, 0))
        results[name] = value.rows, value.width
    part.local += ub.place([*low.body, *stores], ub.staying)
    ub.check("a test")
    part.nodes += [SetFlag("MTE2", "V", 0), WaitFlag("MTE2", "V", 0), *with_barriers(low.body)]
    part.nodes += [SetFlag("V", "MTE3", 0), WaitFlag("V", "MTE3", 0), *stores]
    return Lowered(part, results, {e.primitive for e in equations})


def _shaped(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.ShapeDtypeStruct((), jnp.int32 if isinstance(x, int) else jnp.float32)


@pytest.fixture(scope="module")
def parts() -> dict[str, Lowered]:
    found = {}
    for name, it in CASES.items():
        try:
            found[name] = lowered_case(it)
        except Exception as error:  # of this case alone: its test says so
            found[name] = Lowered(None, {}, set(), error)
    return found


@pytest.fixture(scope="module")
def program(parts, tmp_path_factory):
    return compiled([x.part for x in parts.values()], tmp_path_factory.mktemp("lower"))


@pytest.fixture(scope="module")
def wanted() -> dict[str, dict[str, np.ndarray]]:
    """What jax computes, all in one compilation."""
    inputs = {name: tuple(map(jnp.asarray, it.inputs)) for name, it in CASES.items()}
    quickly = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

    def all_of(x: Any) -> Any:
        return {name: it.function(*x[name]) for name, it in CASES.items()}

    found = jax.jit(all_of, compiler_options=quickly)(inputs)
    return jax.tree.map(np.asarray, found)


def close(name: str, parts: dict[str, Lowered], got: dict[str, np.ndarray], wanted: Any) -> None:
    """Asserts that the results of a case are those of jax."""
    part, shapes = parts[name].part, parts[name].shapes
    assert part is not None
    for i, (output, shape) in enumerate(shapes.items()):
        want = wanted[name][output]
        dtype = NUMPY[part.outputs[f"out{i}"][1]]
        assert np.issubdtype(want.dtype, np.integer) or want.dtype == dtype, output
        ours, wide = got[f"out{i}"].reshape(shape).astype(np.float64), want.astype(np.float64)
        wide = wide.reshape(-1, want.shape[-1])
        if want.ndim == 1:
            wide = wide.T
        tolerance = CASES[name].error * float(jnp.finfo(dtype).eps) * max(1, np.abs(wide).max())
        np.testing.assert_allclose(
            np.broadcast_to(ours, wide.shape), wide, rtol=0, atol=tolerance, err_msg=output
        )


@pytest.mark.parametrize("name", CASES)
def test_interpreted_as_jax_computes(name, parts, wanted):
    if parts[name].error is not None:
        raise parts[name].error
    close(name, parts, parts[name].part.interpreted(), wanted)


@needs_compiler
@pytest.mark.parametrize("name", CASES)
def test_lowered_as_jax_computes(name, parts, program, wanted, tmp_path):
    if parts[name].error is not None:
        raise parts[name].error
    part = parts[name].part
    got = part.emulated(program, list(CASES).index(name), tmp_path)
    close(name, parts, got, wanted)
    # The meanings of the instructions are the emulator's, bit by bit: but for the last bit of exp
    # and log, which the libraries of C++ and NumPy compute.
    for output, ours in part.interpreted().items():
        theirs = got[output]
        if "unary" in name:
            eps = 2 * float(jnp.finfo(ours.dtype).eps)
            np.testing.assert_allclose(
                ours.astype(np.float64), theirs.astype(np.float64), rtol=eps, atol=0
            )
        else:
            np.testing.assert_array_equal(ours.view(np.uint8), theirs.view(np.uint8), output)


def test_every_rule_has_a_case(parts):
    errors = {name: it.error for name, it in parts.items() if it.error is not None}
    assert errors == {}
    assert set().union(*(it.primitives for it in parts.values())) >= set(RULES)
    assert set(SCALAR_RULES) <= set(RULES)


# What is refused.


def lowered(function: Callable[..., Any], *shapes: Any) -> Lowering:
    """``function`` lowered on tiles and numbers of the kernel, nothing placed."""
    specs = [jax.ShapeDtypeStruct(s, jnp.float32) if isinstance(s, tuple) else s for s in shapes]
    variables, equations, _ = flatten(jax.make_jaxpr(function)(*specs))
    inputs: dict[Any, Any] = {}
    for i, (var, spec) in enumerate(zip(variables, specs, strict=True)):
        if spec.shape:
            buffer = Buffer(f"in{i}", "UB", C_TYPES[str(spec.dtype)], spec.shape[0] * spec.shape[1])
            inputs[var] = Vector(buffer.at(), *spec.shape)
        else:
            inputs[var] = Scalar(f"number{i}")
    ramp = Buffer("ramp", "UB", "float", W)
    low = Lowering(lambda name, dtype, count: Buffer(name, "UB", dtype, count), inputs, ramp=ramp)
    low.lower(equations)
    return low


def _sine(x: Any) -> Any:
    y = x * 2
    return jnp.sin(y)


def _sorted(x: Any) -> Any:
    return jnp.sort(x, axis=1)


def _order(x: Any) -> Any:
    return jnp.argsort(x, axis=1)  # two results


def _looped(x: Any) -> Any:
    return lax.fori_loop(0, 3, lambda i, y: y + 1.0, x)


@pytest.mark.parametrize(
    ("function", "primitive", "line"),
    [(_sine, "sin", 2), (_sorted, "sort", 1), (_order, "sort", 1), (_looped, "scan", 1)],
    ids=["sin", "sort", "argsort", "loop"],
)
def test_an_unknown_primitive_is_named_with_its_line(function, primitive, line):
    with pytest.raises(LoweringError) as error:
        lowered(function, (R, W))
    line += function.__code__.co_firstlineno
    assert str(error.value).startswith(
        f"the primitive {primitive!r} has no instruction; it comes from {__file__}:{line}"
    )
    assert str(error.value).endswith(f"Known are {', '.join(sorted(RULES))}.")


NUMBER = jax.ShapeDtypeStruct((), jnp.float32)
REFUSED = {
    "two axes": (lambda x: lax.reduce_max(x, (0, 1)), [(R, W)], r"axes \(0, 1\) of \(16, 64\)"),
    "rows that do not halve": (lambda x: lax.reduce_sum(x, (0,)), [(24, W)], "24 rows are not f"),
    "too many rows": (lambda x: lax.reduce_sum(x, (1,)), [(256, W)], "256 rows are not reduced"),
    "columns left over": (lambda x: lax.reduce_sum(x, (1,)), [(R, 100)], "100 columns are no mult"),
    "part of a block": (lambda x: lax.reduce_sum(x, (1,)), [(R, 12)], "12 float is not whole"),
    "part of a block, broadcast": (lambda x, c: x - c, [(R, 12), (R, 1)], "12 float is not whole"),
    "rows by eights": (lambda x, c: x - c, [(12, W), (12, 1)], "12 rows cannot be spread"),
    "one in memory": (lambda x, c: x - c, [(R, W), (1, 1)], "one number in memory"),
    "another axis": (
        lambda x: lax.reduce_max(x, (1,))[None, :] + lax.slice_in_dim(x, 0, 1),
        [(W, W)],
        "64 × 1 numbers laid along another axis",
    ),
    "every other row": (lambda x: x[::2], [(R, W)], r"has no instruction|strides \(2, 1\)"),
    "some columns": (lambda x: lax.slice_in_dim(x, 0, 8, axis=1), [(R, W)], "only whole rows"),
    "a matrix": (lambda x, y: x @ y, [(R, W), (W, W)], "a tile by one column only"),
    "conditions in order": (lambda x, y: (x > 0) < (y > 0), [(R, W)] * 2, "lt of conditions"),
    "a third power": (lambda x: x**0.3, [(R, W)], "a power is a whole number that Python knows"),
    "rounded away from 0": (lambda x: lax.round(x), [(R, W)], "rounded to even only"),
    "bits of numbers": (
        lambda x: x * (lax.iota(jnp.int32, W)[None, :] ^ 5).astype(jnp.float32),
        [(R, W)],
        "the bits of whole numbers have no xor",
    ),
    "a type without instructions": (
        lambda x: x.astype(jnp.int8),
        [(R, W)],
        "numbers of type int8 have no instructions",
    ),
    "exp of a number": (lambda x, s: x * jnp.exp(s), [(R, W), NUMBER], "exp of a number"),
    "tanh of a number": (lambda x, s: x * jnp.tanh(s), [(R, W), NUMBER], "tanh of a number"),
    "indices shifted": (
        lambda x: x * (lax.iota(jnp.int32, W)[None, :] >> 1).astype(jnp.float32),
        [(R, W)],
        "shift_right_arithmetic of whole numbers: they are exact",
    ),
    "indices divided": (
        lambda x: x * lax.div(lax.iota(jnp.int32, W)[None, :], 3).astype(jnp.float32),
        [(R, W)],
        "div of whole numbers: they are exact",
    ),
    "a tile of indices": (
        lambda x: x + lax.broadcasted_iota(jnp.float32, (R, W), 1),
        [(R, W)],
        "an index over",
    ),
    "rounding": (lambda x: lax.reduce_precision(x, 5, 10), [(R, W)], "'reduce_precision'"),
    "rows as columns": (lambda x: lax.reshape(x, (W, R)), [(R, W)], "16 × 64 numbers as 64 × 16"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_lowered_is_refused_with_its_line(name):
    function, shapes, message = REFUSED[name]
    with pytest.raises(LoweringError, match=message) as error:
        lowered(function, *shapes)
    assert f"it comes from {__file__}:" in str(error.value)
