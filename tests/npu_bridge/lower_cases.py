"""Functions that are lowered, what they are called with, and how exact their results must be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

R, W = 16, 64  # rows and columns of most tiles
FLOATS = {"float32": np.float32, "float16": np.float16}


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
            turned = lax.transpose(row, (1, 0))  # a row as a column, and back
            return {
                "column": x - column, "row": x * row, "outer": column * row,
                "turned": x + lax.transpose(turned * 2, (1, 0)),
            }  # fmt: skip

    @case(f"unary {_dtype}", drawn(R, W, _type), drawn(R, W, _type, 0.1, 4), error=4)
    def _(x: Any, y: Any) -> dict[str, Any]:
        return {
            "exp": jnp.exp(x), "log": jnp.log(y), "sqrt": jnp.sqrt(y), "abs": jnp.abs(x),
            "neg": -x, "tanh": jnp.tanh(x),
            "clamp": lax.clamp(x.dtype.type(-0.5), x, x.dtype.type(0.75)),
            "clamp by tiles": lax.clamp(-y, x, y), "stop": lax.stop_gradient(x) * y,
            "square": jnp.square(x),
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
        x = jnp.where(y > 1, number, x)  # equal to the numbers in places
        x = jnp.where(y < -1, x.dtype.type(0.5), x)
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


def of_caller(function: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """A function whose equations are a caller's: their whole numbers have spans."""
    function.__name__ = "score_mod"
    return jax.jit(function)


@case("fractions of functions", drawn(R, W), drawn(R, W, np.float32, 0.1, 4), 2, error=6)
@of_caller
def _(x: Any, y: Any, index: Any) -> dict[str, Any]:
    beyond = jnp.where(y > 2, jnp.inf, x)
    return {
        "exp2": jnp.exp2(x), "logistic": jax.nn.sigmoid(x), "rsqrt": lax.rsqrt(y),
        "third power": x**3, "inverse": 1 / y**2, "root": y**0.5, "sign": jnp.sign(x),
        "floor": jnp.floor(x), "ceil": jnp.ceil(x), "round": jnp.round(x * 4),
        "finite": jnp.where(jnp.isfinite(beyond), x, 7.0), "one": x**0 + y**1,
        "cut": (x * 3).astype(jnp.int32).astype(jnp.float32),
        "true": (x > 0).astype(x.dtype) + (x * 2 > y).astype(jnp.int32).astype(x.dtype),
        "not zero": jnp.where((jnp.floor(x)).astype(bool), x, y),
        "number": x * jnp.square(index.astype(jnp.float32)) + jnp.abs(1.5 - index.astype(x.dtype)),
    }  # fmt: skip


@case("conditions of functions", drawn(R, W), drawn(R, W), 3, error=0.25)
@of_caller
def _(x: Any, y: Any, index: Any) -> dict[str, Any]:
    rows = lax.broadcasted_iota(jnp.int32, (R, 1), 0)
    columns = lax.broadcasted_iota(jnp.int32, (1, W), 1)
    bits, margin, number = x > y, columns <= rows, index == 3
    conditions = {
        "not bits": ~bits,
        "not margin": ~margin,
        "not number": ~number | margin,
        "xor": bits ^ margin,
        "xor of numbers": (number ^ (index > 7)) & bits,
        "equal": bits == (x > 0),
        "not equal": margin != (columns > 20),
        "chosen": jnp.where(bits, margin, x > 0),
        "chosen by a number": jnp.where(number, margin, bits),
        "chosen by margins": jnp.where(margin, columns > rows - 3, number),
        "a constant chosen": jnp.where(bits, True, margin),
    }
    return {name: jnp.where(mask, x, -y) for name, mask in conditions.items()}


LARGE = RANDOM.integers(-(2**30), 2**30, (R, 1)).astype(np.int32)
NEAR = (LARGE + RANDOM.integers(-2, 3, (R, 1))).astype(np.int32)
ROW = RANDOM.integers(-(2**30), 2**30, (1, W)).astype(np.int32)


@case("whole numbers of functions", drawn(R, W), LARGE, NEAR, ROW, 2**30 + 1, error=0.25)
@of_caller
def _(x: Any, large: Any, near: Any, row: Any, number: Any) -> dict[str, Any]:
    rows = lax.broadcasted_iota(jnp.int32, (R, 1), 0)
    columns = lax.broadcasted_iota(jnp.int32, (1, W), 1)
    apart = rows - columns
    whole = {
        "quotient": columns // 7 - rows // 5,
        "below zero": apart // 3,
        "remainder": apart % 3 + columns % 16,
        "cut": lax.div(apart, 3) + lax.div(apart, 4),
        "left": lax.rem(apart, 5) + lax.rem(columns, 7),
        "bits": (columns >> 3) + (columns & 7) + (7 & rows) + (apart >> 1),
        "times": (rows << 2) + rows**2 + jnp.sign(apart) + lax.clamp(2, columns, 9),
        "of data": jnp.abs(large - near) + jnp.sign(near - large) + jnp.clip(row, -3, 5),
        "of numbers": jnp.maximum(number - large - number + near, -5) + (number + rows - number),
        "scalars": columns * ((number >> 29) + (number & 1) + ((number >> 2) << 1) // 2**20)
        + (number % 7) + (1 - number) % 7 + (1 - number) // 2**28 + lax.rem(number, 5),
        "chosen": jnp.where(large > near, large, near) - near + jnp.where(rows > 3, rows, 7),
        "squares beyond float32": (rows + 5000) ** 2 - (rows + 4999) * (rows + 5001),
    }  # fmt: skip
    conditions = {
        "in order": large < near,
        "at most": large <= near,
        "at least": near >= large,
        "the same": (near == large) | (near != row),
        "beside an index": (near > columns) & (large != columns) & (columns >= row),
        "beside a number": (near < number) | (row == number) | (number > large),
        "beside a large one": near >= 2**29 + 1,
    }
    found = {name: x * v.astype(jnp.float32) for name, v in whole.items()}
    return found | {name: jnp.where(mask, x, -x) for name, mask in conditions.items()}
