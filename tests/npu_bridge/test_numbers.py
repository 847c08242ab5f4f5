"""Numbers of a call: their values here are those that C++ computes."""

from __future__ import annotations

import math
import re
import shutil
import subprocess

import numpy as np
import pytest

import npu_bridge
from npu_bridge import project
from npu_bridge.expressions import HELPERS, Scalar, evaluate, plus, prelude, times
from npu_bridge.numbers import tiling, values_of
from npu_bridge.program import build
from pasa_jax import Schedule

COMPILER = shutil.which("g++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs g++")

EXPRESSIONS = [
    "Min(7, 3) + Max(-2, 1) * 4",
    "Div(17, 5) + Mod(17, 5) + CeilDiv(17, 5)",
    "(17 + 4) / 5 * 2",
    "Pick(3 >= 2, 5, 6) + Pick(3 == 2, 5, 6)",
    "(3 > 2) & (2 != 2) | (1 <= 1)",
    "int64_t(3) * 1000000000 * 7",
    "MinFloat(0.5f, 1.25f) * MaxFloat(2.0f, 1e-05f)",
    "PickFloat(1 < 0, 0.5f, static_cast<float>(7) / static_cast<float>(2))",
    "0.1f + 0.2f",
    "(-(3)) + number",
    "scale * static_cast<float>(number)",
]


@needs_compiler
def test_expressions_have_the_values_that_cpp_gives_them(tmp_path):
    assert {name for x in EXPRESSIONS for name in HELPERS if name in x} == set(HELPERS)
    lines = [f'printf("%.17g\\n", double({x}));' for x in EXPRESSIONS]
    head = "#include <cstdint>\n#include <cstdio>\n#define __aicore__\n"
    names = "int32_t number = 11; float scale = 0.1f;"
    (tmp_path / "x.cpp").write_text(
        "\n".join([head, prelude(), "int main() {", names, *lines, "}"])
    )
    command = [COMPILER, "-std=c++17", tmp_path / "x.cpp", "-o", tmp_path / "x"]
    subprocess.run(command, check=True)
    said = subprocess.run([tmp_path / "x"], capture_output=True, text=True, check=True)
    given = {"number": 11, "scale": np.float32(0.1)}
    for x, theirs in zip(EXPRESSIONS, said.stdout.split(), strict=True):
        ours = evaluate(x, given)
        assert np.float32(ours) == np.float32(theirs), x


def test_known_numbers_are_computed_at_once():
    assert (times(3, 4), times("t", 1), times("t", 0), times("t", 2)) == (12, "t", 0, "(t) * 2")
    assert (plus(3, 4), plus(0, "t"), plus("t", 0), plus("t", 2)) == (7, "t", "t", "t + 2")


def test_a_number_is_written_in_its_type():
    assert Scalar(0.5).text("half") == "half(0.5f)"
    assert Scalar(0.1).text("float") == "0.10000000149011612f"
    assert Scalar(-math.inf).text("float") == "-INFINITY"
    assert Scalar("n1").text("half") == "static_cast<half>(n1)"
    assert Scalar(1.0).text("bfloat16_t") == "ToBfloat16(1.0f)"
    assert Scalar(0x3C00).text("uint16_t") == "uint16_t(0x3c00)"


_SIZES = {"batch": 2, "heads": 6, "kv_heads": 3, "queries": 300, "keys": 700}


@needs_compiler
@pytest.mark.parametrize("decode", [False, True])
def test_the_tiling_is_that_of_the_host(decode, tmp_path):
    schedule = Schedule(block_q=128, block_kv=256, target="ascend_910b")
    kernel = npu_bridge.kernel(
        head_dim=64, value_head_dim=128, shift="reference", decode=decode, schedule=schedule
    )
    sizes = _SIZES | ({"queries": 1} if decode else {})
    program = build(kernel)
    for name, text in project.files(program).items():
        if name in ("tiling.h", "make_tiling.h"):
            (tmp_path / name).write_text(text)
    members = re.findall(r"^    \w+ (\w+);", project.files(program)["tiling.h"], re.MULTILINE)
    lines = [f'printf("{m} %.9g\\n", double(t.{m}));' for m in members]
    call = ", ".join(str(x) for x in (*list(sizes.values()), 7))
    (tmp_path / "x.cpp").write_text(
        '#include <cstdio>\n#include "make_tiling.h"\nint main() {\nPasaTiling t;\n'
        f"if (PasaMakeTiling(t, {call})) return 1;\n" + "\n".join(lines) + "\n}\n"
    )
    command = [COMPILER, "-std=c++17", tmp_path / "x.cpp", "-o", tmp_path / "x"]
    subprocess.run(command, check=True)
    said = subprocess.run([tmp_path / "x"], capture_output=True, text=True, check=True)
    theirs = {name: float(x) for name, x in (line.split() for line in said.stdout.splitlines())}
    ours = tiling(kernel, **sizes, cores=7)
    at = 0
    for array in program.workspace:
        assert theirs.pop(f"{array.name}Offset") == at, array.name
        at += -(-ours.elements(array) * array.itemsize // 512) * 512
    assert theirs.pop("workspaceBytes") == at
    assert theirs.pop("scale") == pytest.approx(ours.scale)
    assert theirs == {name: getattr(ours, name) for name in theirs}
    numbers = values_of(kernel, ours)
    assert numbers["items"] == (2 * 3 * ours.parts if decode else 2 * 6 * 3)
    assert numbers["queries"] == (1 if decode else 300)
