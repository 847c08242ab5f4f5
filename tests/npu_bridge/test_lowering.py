"""Lowering: every primitive is emitted, run on the emulator and compared with jax's own result."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from npu_bridge import emulation, project, stages
from npu_bridge.emulation import EMULATOR
from npu_bridge.ir import (
    C_TYPES,
    ITEMSIZE,
    PRELUDE,
    Barrier,
    Buffer,
    For,
    Instruction,
    Slice,
    render,
    walk,
    with_barriers,
)
from npu_bridge.lowering import RULES, SCALAR_RULES, Lowering, Scalar, Vector, flatten
from npu_bridge.memory import Memory
from npu_bridge.program import build
from npu_bridge.stages import Kernel
from pasa_jax.core import tile
from pasa_jax.core.errors import LoweringError
from pasa_jax.core.precision import Precision
from pasa_jax.core.schedule import Schedule
from pasa_jax.core.tile import arrays, softmax

COMPILER = shutil.which("g++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="the emulator needs g++")
R, W = 16, 64  # rows and columns of most tiles
FLOATS = {"float32": np.float32, "float16": np.float16}


# The cases.


@dataclass(frozen=True)
class Case:
    """A function of arrays and numbers of the kernel, and what it is called with.

    Arguments:
      function: gives a dict of arrays; conditions inside it only.
      inputs: [rows, width] arrays, or numbers that only the kernel knows.
      error: allowed, in units of the result type's eps times its largest number.
    """

    function: Callable[..., dict[str, Any]]
    inputs: tuple[Any, ...]
    error: float = 2.0


CASES: dict[str, Case] = {}
RANDOM = np.random.default_rng(0)


def case(name: str, *inputs: Any, error: float = 2.0) -> Callable[..., Any]:
    def added(function: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        CASES[name] = Case(function, inputs, error)
        return function

    return added


def drawn(rows: int, width: int, dtype: Any = np.float32, low: float = -2, high: float = 2) -> Any:
    return RANDOM.uniform(low, high, (rows, width)).astype(dtype)


ARITHMETIC = {
    "add": jnp.add,
    "sub": jnp.subtract,
    "mul": jnp.multiply,
    "div": lax.div,
    "max": jnp.maximum,
    "min": jnp.minimum,
}


def _arithmetic(op: Any, x: Any, y: Any, column: Any, row: Any, number: Any) -> dict[str, Any]:
    number = number.astype(x.dtype)
    shape = x.shape
    wide = {"x": x, "column": column, "row": row, "number": number}
    wide = {name: jnp.broadcast_to(v, shape) for name, v in wide.items()}
    constant, power = (jnp.full(shape, v, x.dtype) for v in (0.75, 2.0))
    return {
        "tile, tile": op(x, y),
        "tile, column": op(x, wide["column"]),
        "column, tile": op(wide["column"], y),
        "tile, row": op(x, wide["row"]),
        "row, tile": op(wide["row"], y),
        "row, column": op(wide["row"], wide["column"]),
        "column, row": op(wide["column"], wide["row"]),
        "tile, constant": op(x, constant),
        "tile, power of two": op(x, power),
        "constant, tile": op(constant, y),
        "tile, number": op(x, wide["number"]),
        "number, tile": op(wide["number"], y),
        "column, constant": op(column, jnp.full(column.shape, 0.75, x.dtype)),
        "constant, row": op(jnp.full(row.shape, 0.75, x.dtype), row),
    }


for _dtype, _type in FLOATS.items():
    for _name, _op in ARITHMETIC.items():
        _parts = [drawn(r, w, _type, 0.5, 2) for r, w in ((R, W + 0), (R, W), (R, 1), (1, W))]
        _parts[0] = (_parts[0] - _type(1.2)).astype(_type)
        case(f"{_name} {_dtype}", *_parts, 1.375)(
            lambda *a, op=_op: _arithmetic(op, *a),
        )
    for _width in (128, 512):

        @case(
            f"broadcasts {_width} {_dtype}",
            *(drawn(*s, _type) for s in ((R, _width), (R, 1), (1, _width))),
        )
        def _(x: Any, column: Any, row: Any) -> dict[str, Any]:
            return {"column": x - column, "row": x * row, "outer": column * row}

    @case(f"unary {_dtype}", drawn(R, W, _type), drawn(R, W, _type, 0.1, 4), error=4)
    def _(x: Any, y: Any) -> dict[str, Any]:
        return {
            "exp": jnp.exp(x), "log": jnp.log(y), "sqrt": jnp.sqrt(y), "abs": jnp.abs(x),
            "neg": -x, "tanh": jnp.tanh(x),
            "clamp": lax.clamp(x.dtype.type(-0.5), x, x.dtype.type(0.75)),
            "clamp by tiles": lax.clamp(-y, x, y), "stop": lax.stop_gradient(x) * y,
        }  # fmt: skip

    for _width in (8, 16, 64, 128, 512):

        @case(f"reductions of {_width} {_dtype}", drawn(R, _width, _type), error=12)
        def _(x: Any) -> dict[str, Any]:
            top, total = lax.reduce_max(x, (1,)), lax.reduce_sum(x, (1,))
            found = {"max": top[:, None], "sum": lax.reshape(total, (R, 1))}
            found["max again"] = jnp.squeeze(top[:, None], 1) + total
            if x.shape[1] * x.dtype.itemsize % 32 == 0:  # rows are whole blocks
                found["rows' max"] = lax.reduce_max(x, (0,))[None, :]
                found["rows' sum"] = lax.reduce_sum(x, (0,))[None, :]
            return found

    @case(
        f"odd reductions {_dtype}", *(drawn(*s, _type) for s in ((8, 32), (1, W), (R, 1))), error=12
    )
    def _(x: Any, row: Any, column: Any) -> dict[str, Any]:
        wide = jnp.broadcast_to(column, (R, W))
        return {
            "32": lax.reduce_sum(x, (1,))[:, None],
            "one row": lax.reduce_sum(row, (0,))[None, :],
            "a column counts as often": lax.reduce_sum(wide, (1,))[:, None],
            "its maximum": lax.reduce_max(wide, (1,))[:, None],
        }

    @case(
        f"comparisons {_dtype}", *(drawn(*s, _type) for s in ((R, W), (R, W), (R, 1), (1, W))), 0.25
    )
    def _(x: Any, y: Any, column: Any, row: Any, number: Any) -> dict[str, Any]:
        number = number.astype(x.dtype)
        y = jnp.where(x > y, x, y)  # equal in places
        found = {}
        for op in (jnp.equal, jnp.not_equal, jnp.less, jnp.greater, jnp.less_equal):
            found[op.__name__] = jnp.where(op(x, y), x, -y)
        found["constant on the left"] = jnp.where(lax.gt(jnp.full_like(x, 0.5), x), x, y)
        found["number on the left"] = jnp.where(lax.ge(jnp.broadcast_to(number, x.shape), x), x, y)
        found["number"] = jnp.where(x > number, x, y)
        for name, other in {"column": column, "row": row}.items():
            found[name] = jnp.where(x >= other, x, y)
            found[f"{name} on the left"] = jnp.where(other < x, x, y)
        found["column, row"] = jnp.where(column < row, x, y)
        return found

    @case(
        f"choices {_dtype}", *(drawn(*s, _type) for s in ((R, W), (R, W), (R, 1), (1, W))), 3, 0.5
    )
    def _(x: Any, y: Any, column: Any, row: Any, index: Any, number: Any) -> dict[str, Any]:
        tile_mask, column_mask = x > y, column > 0
        number, zero = number.astype(x.dtype), x.dtype.type(0)
        return {
            "tile, number": jnp.where(tile_mask, x, zero),
            "number, tile": jnp.where(tile_mask, zero, x),
            "numbers": jnp.where(tile_mask, x.dtype.type(1), zero),
            "kernel's number": jnp.where(tile_mask, number, x),
            "column": jnp.where(tile_mask, column, x),
            "row": jnp.where(tile_mask, x, row),
            "column's mask": jnp.where(column_mask, x, y),
            "column's mask of columns": jnp.where(column_mask, column, -column),
            "number decides": jnp.where(index > 2, x, y),
            "number decides otherwise": jnp.where(index > 3, x, row),
            "number decides on a number": jnp.where(index > 2, x, zero),
        }

    @case(f"conditions {_dtype}", *(drawn(*s, _type) for s in ((R, W), (R, W), (R, 1))), 3)
    def _(x: Any, y: Any, column: Any, start: Any) -> dict[str, Any]:
        rows = start + lax.broadcasted_iota(jnp.int32, (R, 1), 0)
        columns = lax.broadcasted_iota(jnp.int32, (1, W), 1)
        causal, window = rows >= columns, columns > rows - 5
        bits, narrow = x > y, column > 0
        conditions = {
            "margin": causal,
            "margin, strict": columns < rows,
            "at most": columns <= rows,
            "equal": jnp.broadcast_to(columns, (R, W)) == rows,
            "margins and": causal & window,
            "margins or": causal | (columns > 40),
            "row of margins": columns < 7,
            "column of margins": rows > 7,
            "bits and": bits & (x > 0),
            "bits or": bits | (x > 0),
            "bits and margin": bits & causal,
            "margin or bits": causal | bits,
            "column's bits and bits": narrow & bits,
            "bits or column's bits": bits | narrow,
            "column's bits and margin": narrow & causal,
            "column's margin or bits": (rows > 7) | bits,
            "number and bits": (start > 2) & bits,
            "number or margin": (start > 3) | causal,
            "constant": causal & np.bool_(True),
        }
        return {name: jnp.where(mask, x, -y) for name, mask in conditions.items()}


@case("bits that are used twice", drawn(R, W), drawn(R, 1))
def _(x: Any, column: Any) -> dict[str, Any]:
    some = column > 0
    return {"column": jnp.where(some, column, 0 * column), "tile": jnp.where(some, x, -x)}


@case("casts", *(drawn(R, W, t) for t in (np.float32, np.float16, jnp.bfloat16)))
def _(x: Any, half: Any, bfloat: Any) -> dict[str, Any]:
    return {
        f"{v.dtype} to {to.__name__}": v.astype(to)
        for v in (x, half, bfloat)
        for to in (jnp.float32, jnp.float16, jnp.bfloat16)
        if v.dtype != to
    }


@case("indices", drawn(R, W), 13)
def _(x: Any, start: Any) -> dict[str, Any]:
    rows = lax.broadcasted_iota(jnp.int32, (R, 1), 0)
    columns = start + lax.iota(jnp.int32, W)[None, :]
    return {
        "rows": rows.astype(jnp.float32),
        "columns": columns.astype(jnp.float32),
        "both": x * (rows - columns).astype(jnp.float32),
        "half": columns.astype(jnp.float16),
        "largest": x + jnp.maximum(columns - 20, rows).astype(jnp.float32),
    }


@case("numbers of the kernel", drawn(R, W), 13, 0.75)
def _(x: Any, index: Any, scale: Any) -> dict[str, Any]:
    whole = {
        "shift": index >> 2,
        "quotient": lax.div(index, np.int32(5)),
        "sum": index + 2 * index - 3,
        "bounds": jnp.minimum(jnp.maximum(index, 20), 30),
        "choice": jnp.where(index > 5, index, -index),
        "negative": -index,
        "and": jnp.where((index > 5) & (index < 12), 1, 2),
        "or": jnp.where((index > 50) | (index == 13), 1, 2),
        "not equal": jnp.where((index != 13) | (index <= 2) | (index >= 40), 1, 2),
    }
    found = {name: x * v.astype(jnp.float32) for name, v in whole.items()}
    found["largest of fractions"] = x * jnp.maximum(scale, 0.5)
    found["least of fractions"] = x * jnp.minimum(scale, 0.5)
    found["fractions"] = x * jnp.where(index > 5, scale, -scale) / (scale + 1.0)
    return found


@case(
    "products with a column",
    drawn(R, 128),
    drawn(128, 1),
    drawn(R, 64, np.float16),
    drawn(64, 1, np.float16),
    error=12,
)
def _(x: Any, w: Any, half: Any, v: Any) -> dict[str, Any]:
    return {
        "float32": x @ w,
        "float16 in float32": jnp.dot(half, v, preferred_element_type=jnp.float32),
    }


@case("slices", drawn(R, W), drawn(R, 1))
def _(x: Any, column: Any) -> dict[str, Any]:
    return {
        "first": lax.slice_in_dim(x, 0, 8),
        "second": lax.slice_in_dim(x, 8, 16) * 2,
        "together": lax.slice_in_dim(x, 0, 8) + lax.slice_in_dim(x, 8, 16),
        "of a column": lax.slice_in_dim(column, 8, 16) * lax.slice_in_dim(x, 8, 16),
    }


# Emitting and running them.


@dataclass
class Emitted:
    """A case as C++, with the bytes that it reads and where its results lie in what it writes."""

    text: str = ""
    reads: bytes = b""
    places: dict[str, tuple[int, Vector]] = field(default_factory=dict)
    size: int = 0
    primitives: set[str] = field(default_factory=set)
    error: Exception | None = None


def _globally(dtype: str, name: str, offset: int) -> str:
    return f"At<{dtype}>({name}, {offset})"


def emitted(number: int, it: Case) -> Emitted:
    """One function of the test kernel: loads, the lowered equations, stores."""
    closed = jax.make_jaxpr(it.function)(*(_shaped(x) for x in it.inputs))
    names = list(jax.eval_shape(it.function, *(_shaped(x) for x in it.inputs)))
    names.sort()  # as jax orders a dict
    variables, equations, outputs = flatten(closed)
    ub, found = Memory.of("ascend_910b", "UB"), Emitted()
    found.primitives = {e.primitive for e in equations}
    lines, inputs = [], {}
    for i, (var, x) in enumerate(zip(variables, it.inputs, strict=True)):
        if not isinstance(x, np.ndarray):
            kind = "int32_t" if isinstance(x, int) else "float"
            lines.append(f"const {kind} number{i} = {x};")
            inputs[var] = Scalar(f"number{i}")
            continue
        dtype = C_TYPES[str(x.dtype)]
        buffer = ub.keep(f"in{i}", dtype, x.size)
        inputs[var] = Vector(buffer.at(), *x.shape)
        lines.append(_tensor(buffer))
        lines.append(
            _copy(buffer.name, _globally(dtype, "from", len(found.reads)), dtype, x.nbytes, True)
        )
        found.reads += x.tobytes() + bytes(-x.nbytes % 32)
    made: list[Buffer] = []

    def allocate(name: str, dtype: str, count: int) -> Buffer:
        made.append(Buffer(f"{name}_{len(made)}", "UB", dtype, count))
        return made[-1]

    low = Lowering(R, allocate, inputs)
    low.lower(equations)
    stores = []
    for name, x in zip(names, outputs, strict=True):
        value = low.value(x)
        assert isinstance(value, Vector), (name, value)
        found.places[name] = found.size, value
        to = _globally(value.dtype, "to", found.size)
        size = value.size * ITEMSIZE[value.dtype]
        stores.append(
            Instruction(_copy(to, str(value.place), value.dtype, size), "MTE3", (), (value.place,))
        )
        found.size += -(-size // 32) * 32
    placed = ub.place([*low.body, *stores], ub.kept)
    ub.check("a test")
    lines += [
        *map(_tensor, placed),
        "SetFlag<HardEvent::MTE2_V>(0);",
        "WaitFlag<HardEvent::MTE2_V>(0);",
        *render(with_barriers(low.body), 0),
        "SetFlag<HardEvent::V_MTE3>(0);",
        "WaitFlag<HardEvent::V_MTE3>(0);",
        *render(stores, 0),
    ]
    head = f"void case{number}(GM_ADDR from, GM_ADDR to) {{"
    found.text = "\n    ".join([head, *lines]) + "\n}\n"
    return found


def _shaped(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.ShapeDtypeStruct((), jnp.int32 if isinstance(x, int) else jnp.float32)


def _tensor(b: Buffer) -> str:
    return f"LocalTensor<{b.dtype}> {b.name}(TPosition::VECCALC, {b.address}, {b.count});"


def _copy(to: str, source: str, dtype: str, size: int, load: bool = False) -> str:
    pad = f", DataCopyPadExtParams<{dtype}>()" if load else ""
    text = f"DataCopyPad({to}, {source}, DataCopyExtParams{{1, {size}, 0, 0, 0}}{pad})"
    return f"{text};" if load else text


SOURCE = """\
#include <cstdlib>
#include "kernel_operator.h"
#include "main.h"
using namespace AscendC;
namespace {
%s
template <class T>
GlobalTensor<T> At(GM_ADDR address, int offset) {
    GlobalTensor<T> tensor;
    tensor.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(address + offset));
    return tensor;
}
%s
using Part = void (*)(GM_ADDR, GM_ADDR);
const Part kParts[] = {%s};
Part part;
void kernel(GM_ADDR from, GM_ADDR to) {
    if (ASCEND_IS_AIV && GetBlockIdx() == 0) part(from, to);
}
}  // namespace
int main(int argc, char** argv) {
    part = kParts[std::atoi(argv[2])];
    return emulate(argc, argv, kernel);
}
"""


@pytest.fixture(scope="module")
def parts() -> dict[str, Emitted]:
    found = {}
    for i, (name, it) in enumerate(CASES.items()):
        try:
            found[name] = emitted(i, it)
        except Exception as error:  # of this case alone: its test says so
            found[name] = Emitted(f"void case{i}(GM_ADDR, GM_ADDR) {{}}\n", error=error)
    return found


@pytest.fixture(scope="module")
def program(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lowering")
    texts = [x.text for x in parts.values()]
    names = ", ".join(f"case{i}" for i in range(len(texts)))
    (folder / "cases.cpp").write_text(SOURCE % (PRELUDE, "\n".join(texts), names))
    # The cases are small: compiling costs more than running.
    command = [COMPILER, "-std=c++17", "-O0", f"-I{EMULATOR}", folder / "cases.cpp"]
    subprocess.run([*command, "-o", folder / "cases"], check=True)
    return folder / "cases"


@pytest.fixture(scope="module")
def wanted() -> dict[str, dict[str, np.ndarray]]:
    """What jax computes, all in one compilation."""
    inputs = {name: tuple(map(jnp.asarray, it.inputs)) for name, it in CASES.items()}
    quickly = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

    def all_of(x: Any) -> Any:
        return {name: it.function(*x[name]) for name, it in CASES.items()}

    found = jax.jit(all_of, compiler_options=quickly)(inputs)
    return jax.tree.map(np.asarray, found)


@needs_compiler
@pytest.mark.parametrize("name", CASES)
def test_lowered_as_jax_computes(name, parts, program, wanted, tmp_path):
    it = parts[name]
    if it.error is not None:
        raise it.error
    (tmp_path / "from").write_bytes(it.reads)
    job = [
        "blocks 1", f"report {tmp_path / 'report'}", "policy round_robin", "policy random 1",
        f"arg from in {len(it.reads)} {tmp_path / 'from'}",
        f"arg to out {it.size} {tmp_path / 'to'}",
    ]  # fmt: skip
    (tmp_path / "job").write_text("\n".join(job))
    subprocess.run([program, tmp_path / "job", str(list(CASES).index(name))], check=False)
    assert json.loads((tmp_path / "report").read_text())["complaints"] == []
    raw = (tmp_path / "to").read_bytes()
    for output, (at, value) in it.places.items():
        want = wanted[name][output]
        size = value.size * ITEMSIZE[value.dtype]
        dtype = next(n for n, c in C_TYPES.items() if c == value.dtype)
        assert np.issubdtype(want.dtype, np.integer) or want.dtype == jnp.dtype(dtype), output
        got = np.frombuffer(raw[at : at + size], jnp.dtype(dtype)).reshape(value.rows, value.width)
        got, wide = got.astype(np.float64), want.astype(np.float64).reshape(-1, want.shape[-1])
        if want.ndim == 1:
            wide = wide.T
        tolerance = CASES[name].error * float(jnp.finfo(dtype).eps) * max(1, np.abs(wide).max())
        np.testing.assert_allclose(
            np.broadcast_to(got, wide.shape), wide, rtol=0, atol=tolerance, err_msg=output
        )


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
    low = Lowering(R, lambda name, dtype, count: Buffer(name, "UB", dtype, count), inputs)
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
    "a fraction cut": (lambda x: x.astype(jnp.int32), [(R, W)], "not cut to whole ones"),
    "a condition as a number": (lambda x: (x > 0).astype(jnp.float32), [(R, W)], "not converted"),
    "conditions compared": (lambda x, y: (x > 0) == (y > 0), [(R, W)] * 2, "eq of conditions"),
    "a choice of conditions": (
        lambda x, y: jnp.where(jnp.where(x > y, x > 0, y > 0), x, y),
        [(R, W)] * 2,
        "select_n of conditions",
    ),
    "exp of a number": (lambda x, s: x * jnp.exp(s), [(R, W), NUMBER], "exp of a number"),
    "tanh of a number": (lambda x, s: x * jnp.tanh(s), [(R, W), NUMBER], "tanh of a number"),
    "indices shifted": (
        lambda x: x * (lax.iota(jnp.int32, W)[None, :] >> 1).astype(jnp.float32),
        [(R, W)],
        "only indices are shifted",
    ),
    "indices divided": (
        lambda x: x * lax.div(lax.iota(jnp.int32, W)[None, :], 3).astype(jnp.float32),
        [(R, W)],
        "whole numbers are divided only",
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


HALF = Kernel(
    head_dim=64,
    value_head_dim=64,
    dtype="float16",
    shift="none",
    precision=Precision.named("float16"),
    schedule=Schedule(block_q=128, block_kv=128, target="ascend_910b"),
)


def test_a_product_with_something_computed_is_refused(monkeypatch):
    scores = tile.scores

    def doubled(query: Any, key: Any, *rest: Any, **named: Any) -> Any:
        return scores(query, key._replace(k=key.k + key.k), *rest, **named)

    monkeypatch.setattr(tile, "scores", doubled)
    with pytest.raises(LoweringError) as error:
        stages.step(HALF, 16, masked=False)
    assert str(error.value).startswith(
        "the cube unit multiplies with keys, κ or values as they lie in memory; a product with "
        f"something computed comes from {arrays.__file__}:"
    )


# One mathematics: what changes in a tile function changes in the kernel.


@needs_compiler
def test_a_changed_tile_function_changes_the_kernel(monkeypatch, tmp_path):
    plain, probabilities = project.files(build(HALF)), tile.probabilities
    inputs = emulation.problem(HALF, queries=40, keys=150)
    before = emulation.expected(HALF, inputs)

    def squared(*arguments: Any) -> Any:
        p = probabilities(*arguments)
        return p * p

    monkeypatch.setattr(softmax, "probabilities", squared)
    jax.clear_caches()
    try:
        program = build(HALF)
        changed = project.files(program)
        assert {n for n in plain if plain[n] != changed[n]} == {
            "pasa_attention.cpp", "package/op_kernel/pasa_attention_kernel.h",
        }  # fmt: skip
        project.write(program, tmp_path)
        compiled = emulation.compiled(tmp_path, flags=("-O0",))
        policies = ("round_robin",)
        done = emulation.run(tmp_path, inputs, program=compiled, policies=policies)
    finally:
        jax.clear_caches()
    assert done.complaints == []
    assert done.error <= done.tolerance
    assert np.abs(done.output - np.asarray(before[0], np.float32)).max() > 10 * done.tolerance


# Barriers and places, by brute force.

NUMBERWISE, OTHER = ("Add", "Muls", "Exp", "Select"), ("Cast", "WholeReduceSum<float>", "Brcb")


def random_program(seed: int, slices: bool) -> list[Any]:
    """Straight-line instructions, some of them loops; each value is written before it is read."""
    rng = np.random.default_rng(seed)
    made: list[Buffer] = []
    nodes: list[Any] = []
    for i in range(int(rng.integers(3, 30))):
        count = int(rng.choice([8, 16, 64, 128]))
        recent = made[-6:]
        chosen = rng.permutation(len(recent))[: int(rng.integers(0, 3))]
        reads = tuple(_part(rng, recent[j], slices) for j in chosen)
        name = str(rng.choice(NUMBERWISE + OTHER))
        if name in NUMBERWISE:  # as the lowering makes them: of one size
            reads = tuple(s for s in reads if s.buffer.count == count or not slices)
        again = made and rng.random() < 0.15
        buffer = recent[-1] if again else Buffer(f"x{i}", "UB", "float", count)
        if not again:
            made.append(buffer)
        writes = (_part(rng, buffer, slices and bool(again)),)
        node: Any = Instruction(f"{name}({buffer.name})", "V", writes, reads)
        if rng.random() < 0.2:
            node = For("lane", 0, 2, [node])
        nodes.append(node)
    return nodes


def _part(rng: Any, buffer: Buffer, slices: bool) -> Slice:
    if not slices or rng.random() < 0.5:
        return buffer.at()
    start = int(rng.integers(0, buffer.count))
    if rng.random() < 0.2:
        return buffer.at("lane")  # may be anywhere
    return buffer.at(start, int(rng.integers(1, buffer.count - start + 1)))


def touched(slices: tuple[Slice, ...]) -> set[int]:
    """Every byte that slices may touch."""
    found: set[int] = set()
    for s in slices:
        assert s.buffer.address is not None
        first, count = (s.offset, s.count) if isinstance(s.offset, int) else (0, s.buffer.count)
        start = s.buffer.address + 4 * first
        found |= set(range(start, start + 4 * count))
    return found


def dependent(a: Any, b: Any) -> bool:
    wrote, read = (
        {x for i in walk([a]) for x in touched(getattr(i, k, ()))} for k in ("writes", "reads")
    )
    writes, reads = (
        {x for i in walk([b]) for x in touched(getattr(i, k, ()))} for k in ("writes", "reads")
    )
    return bool(writes & (wrote | read) or reads & wrote)


@pytest.mark.parametrize("seed", range(40))
def test_a_barrier_stands_before_what_depends(seed):
    nodes = random_program(seed, slices=True)
    Memory("UB", 1 << 20).place(nodes, 0)
    found = with_barriers(nodes)
    assert [x for x in found if not isinstance(x, Barrier)] == nodes
    since: list[Any] = []
    for i, node in enumerate(found):
        if isinstance(node, Barrier):
            # ... and nowhere else.
            assert any(dependent(x, found[i + 1]) for x in since)
            since = []
            continue
        assert not any(dependent(x, node) for x in since)
        since.append(node)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("lent", [False, True])
def test_no_place_is_taken_while_it_is_in_use(seed, lent):
    """Every byte that is read holds what was last written to it under that name."""
    nodes = random_program(seed, slices=False)
    memory = Memory("UB", 1 << 20)
    kept = memory.keep("kept", "float", 64)
    spare = (kept.at(),) if lent else ()
    if lent:
        middle = [x for x in walk(nodes) if isinstance(x, Instruction)][len(nodes) // 2]
        middle.reads += (kept.at(),)
    placed = memory.place(nodes, memory.kept, spare)
    assert all(b.address is not None and b.address % 32 == 0 for b in placed)
    assert memory.used == max([b.address + b.bytes for b in placed], default=memory.kept)
    owner: dict[int, Buffer] = dict.fromkeys(range(kept.bytes), kept)
    for node in walk(nodes):
        if not isinstance(node, Instruction):
            continue
        for s in node.reads:
            if s.buffer.address is not None or s.buffer.alias is not None:
                assert all(owner.get(x) is s.buffer for x in where(s.buffer)), node.text
        for s in node.writes:
            numberwise = node.text.startswith(NUMBERWISE)
            others = [r.buffer for r in node.reads if r.buffer is not s.buffer]
            for other in others:
                same = where(other) == where(s.buffer)
                apart = not set(where(other)) & set(where(s.buffer))
                assert apart or (numberwise and same)
            owner |= dict.fromkeys(where(s.buffer), s.buffer)


def where(b: Buffer) -> range:
    """The bytes of a buffer, wherever it is a name for."""
    if b.alias is not None:
        return where(b.alias.buffer)
    assert b.address is not None
    return range(b.address, b.address + 4 * b.count)
