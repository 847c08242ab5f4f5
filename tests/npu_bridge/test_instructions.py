"""Each instruction: its text is what the emulator computes as its meaning says, bit by bit.

The instructions of the vector unit that equations are lowered to are compared in `test_lower`; here
are the copies, the cube unit and the forms that only the cores use.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from npu_bridge.dtypes import NUMPY
from npu_bridge.expressions import Scalar
from npu_bridge.instructions import (
    Binary,
    Cast,
    Compare,
    DataCopy,
    Duplicate,
    FirstBlocks,
    Fixpipe,
    LoadData,
    MatrixIn,
    Mmad,
    RowsIn,
    RowsOut,
    Unary,
)
from npu_bridge.ir import Barrier, Buffer, Let, Node
from npu_bridge.rates import Rates
from pasa_jax.core.errors import LoweringError
from tests.npu_bridge.parts import COMPILER, Part, compiled

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="the emulator needs g++")
PARTS: dict[str, Part] = {}


def drawn(count: int, dtype: str, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-2, 2, count).astype(NUMPY[dtype])


def in_order(*nodes: Node) -> list[Node]:
    """Each node begins when the one before has ended."""
    return [x for node in nodes for x in (node, Barrier("ALL"))]


def gm(name: str, dtype: str) -> Buffer:
    return Buffer(name, "GM", dtype, 0)


def copies(dtype: str) -> Part:
    """Every copy: there and back, with gaps, with a pitch, blocks of rows, and within UB."""
    x, y, z = (
        Buffer(name, "UB", dtype, 1024, address=2048 * 2 * i) for i, name in enumerate("xyz")
    )
    source = gm("source", dtype)
    each = 32 // NUMPY[dtype].itemsize
    nodes: list[Node] = [
        Let("rows", "Min(7, 5)"),
        Let("wide", "rows * 4 + 1"),
        Duplicate(x.at(), Scalar(1), 1024),
        Duplicate(y.at(), Scalar(2), 1024),
        # Five rows of 48 that lie 64 apart, one behind the other.
        RowsIn(x.at(), source.at(64), "rows", 48, 16),
        DataCopy(y.at(0, 240), x.at(0, 240), 240),
        # Three rows of 21, each at the start of one of 64.
        RowsIn(z.at(), source.at(), 3, "wide", "64 - wide", 64),
        FirstBlocks(y.at(512), source.at(32), 4, 2),
        RowsOut(gm("rowsOut", dtype).at(), y.at(), "rows", 20, "rows - 1"),
        DataCopy(gm("out", dtype).at(64), y.at(0, 768), 768),
        DataCopy(gm("padded", dtype).at(), z.at(0, 2 * each), 2 * each),
    ]
    outputs = {"rowsOut": (5 * 24, dtype), "out": (832, dtype), "padded": (2 * each, dtype)}
    return Part(in_order(*nodes), [x, y, z], {"source": drawn(1024, dtype)}, outputs, {})


def product(dtype: str, rows_of_right: bool, out: str) -> Part:
    """c = a·b + a·b of [128, 64]·[64, 32] through every memory of the cube unit, as cores do it.

    Arguments:
      rows_of_right: whether b lies as [64, 32], else as [32, 64].
    """
    left = Buffer("left", "L1", dtype, 128 * 64, address=0)
    right = Buffer("right", "L1", dtype, 64 * 32, address=left.bytes)
    a = Buffer("a", "L0A", dtype, 128 * 64, address=0)
    b = Buffer("b", "L0B", dtype, 64 * 32, address=0)
    c = Buffer("c", "L0C", "float", 128 * 32, address=0)
    shape, stride = ((64, 32), "40") if rows_of_right else ((32, 64), "64")
    nodes: list[Node] = [
        MatrixIn(left.at(), gm("source", dtype).at(), 128, 64, "64 + wide"),
        MatrixIn(right.at(), gm("other", dtype).at(), *shape, stride),
    ]
    nodes += [LoadData(a.at(i * 1024, 1024), left.at(i * 256), 4, 8) for i in range(8)]
    for i in range(4):
        if rows_of_right:
            nodes.append(LoadData(b.at(i * 512, 512), right.at(i * 256), 2, 4, transposed=True))
        else:
            nodes.append(LoadData(b.at(i * 512, 512), right.at(i * 512), 2, 1))
    nodes += [
        Mmad(c.at(), a.at(), b.at(), 128, 32, 64, "wide == 8"),
        Mmad(c.at(), a.at(), b.at(), 128, 32, 64, "false"),
        Fixpipe(gm("product", out).at(16), c.at(), 128, 32, 48),
    ]
    inputs = {"source": drawn(128 * 72, dtype), "other": drawn(64 * 64, dtype, 1)}
    outputs = {"product": (128 * 48, out)}
    return Part(in_order(*nodes), [left, right, a, b, c], inputs, outputs, {"wide": 8}, cube=True)


for _dtype in ("half", "bfloat16_t", "float"):
    PARTS[f"copies of {_dtype}"] = copies(_dtype)
for _dtype in ("half", "bfloat16_t"):
    for _by_rows in (False, True):
        for _out in (_dtype, "float"):
            PARTS[f"{_dtype}, {_out}, {_by_rows}"] = product(_dtype, _by_rows, _out)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return compiled(list(PARTS.values()), tmp_path_factory.mktemp("instructions"))


@needs_compiler
@pytest.mark.parametrize("name", PARTS)
def test_the_meaning_is_the_emulators(name, program, tmp_path):
    part = PARTS[name]
    theirs = part.emulated(program, list(PARTS).index(name), tmp_path)
    for output, ours in part.interpreted().items():
        assert np.any(ours.astype(np.float32) != 0)
        np.testing.assert_array_equal(ours.view(np.uint8), theirs[output].view(np.uint8), output)


def test_a_product_is_that_of_numpy():
    part = PARTS["half, float, True"]
    a = part.inputs["source"].reshape(128, 72)[:, :64].astype(np.float32)
    b = part.inputs["other"][: 64 * 40].reshape(64, 40)[:, :32].astype(np.float32)
    got = part.interpreted()["product"].reshape(128, 48)[:, 16:]
    np.testing.assert_allclose(got, 2 * a @ b, rtol=1e-5, atol=1e-5)


UB = {name: Buffer(name, "UB", name, 64) for name in ("half", "bfloat16_t", "float", "uint16_t")}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda b: Unary("Exp", b["bfloat16_t"].at(), b["bfloat16_t"].at(), 64),
            "Exp takes half or float on this chip, not bfloat16_t (impl/basic_api/dav_c220/"
            "kernel_operator_vec_unary_impl.h:46)",
        ),
        (
            lambda b: Binary("And", b["half"].at(), b["half"].at(), b["half"].at(), 64),
            "And takes int16_t or uint16_t on this chip, not half (impl/basic_api/dav_c220/"
            "kernel_operator_vec_binary_impl.h:391)",
        ),
        (
            lambda b: Cast(b["half"].at(), b["bfloat16_t"].at(), 64),
            "Cast takes (half, int8_t) or (half, uint8_t) or (half, int16_t) or (half, float) or "
            "(float, bfloat16_t) or (int32_t, bfloat16_t) on this chip, not (half, bfloat16_t) "
            "(impl/basic_api/dav_c220/kernel_operator_vec_vconv_impl.h:975)",
        ),
        (
            lambda b: Compare("GE", b["uint16_t"].at(), b["bfloat16_t"].at(), Scalar(0), 128),
            "CompareScalar takes (uint8_t, half) or (uint8_t, float) or (uint8_t, int32_t) on "
            "this chip, not (uint8_t, bfloat16_t) (impl/basic_api/dav_c220/"
            "kernel_operator_vec_cmp_impl.h:219)",
        ),
        (
            lambda b: Mmad(b["float"].at(), b["float"].at(), b["float"].at(), 16, 16, 16, "true"),
            "Mmad is written here for half or bfloat16_t, not float",
        ),
    ],
    ids=["exp", "and", "cast", "compare", "product"],
)
def test_a_type_that_the_chip_does_not_have_is_refused(make: Any, message: str):
    with pytest.raises(LoweringError) as error:
        make(UB)
    assert str(error.value) == message


def test_time_follows_from_the_instruction():
    half, wide, rates = UB["half"], UB["float"], Rates()
    exp = [Unary("Exp", b.at(), b.at(), 64) for b in (half, wide)]
    assert [x.work for x in exp] == [128, 256]
    assert [x.cycles(x.work, rates) for x in exp] == [rates.head + 4, rates.head + 2]
    out = DataCopy(gm("out", "half").at(), half.at(), 64)
    assert (out.pipe, out.work) == ("MTE3", 128)
    assert out.cycles(128, rates) == rates.copy_head + 128 / rates.from_ub
