"""Whole kernels run in NumPy, by the meanings of their instructions, equal lax and the emulator."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import npu_bridge
from npu_bridge import emulation, interpreter
from npu_bridge.instructions import Unary
from npu_bridge.ir import For, Node
from npu_bridge.program import build
from pasa_jax import Precision, Schedule
from tests.thin import some

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")
_SCHEDULE = Schedule(block_q=128, block_kv=128, target="ascend_910b")
_ODD = {"queries": 100, "keys": 300}
# Options of the kernel and sizes of the call.
KERNELS = {
    "mean, causal, log-sum-exp": ({"is_causal": True, "return_lse": True}, _ODD),
    "none, bias of bfloat16": ({"shift": "none", "dtype": "bfloat16", "bias": "11TS"}, _ODD),
    "paper, all float16": ({"shift": "paper", "precision": "paper"}, _ODD),
    "reference, lengths": (
        {
            "shift": "reference",
            "precision": Precision(scores="float16", probabilities="float16"),
            "lengths": True,
        },
        {"batch": 2, "queries": 40, "keys": 200},
    ),
    "decode": ({"decode": True, "return_lse": True}, {"keys": 300, "heads": 6, "kv_heads": 2}),
    "packed, causal": (
        {"packed": True, "is_causal": True, "return_lse": True},
        {"queries": (60, 0, 130), "keys": (60, 5, 300)},
    ),
}


def problem(name: str):
    options, sizes = KERNELS[name]
    kernel = npu_bridge.kernel(head_dim=64, schedule=_SCHEDULE, **options)
    inputs = emulation.problem(kernel, **sizes)
    arrays = {n: np.asarray(x) for n, x in inputs.items()}
    return kernel, inputs, arrays | emulation.constants(kernel, arrays["key"].shape[1])


@pytest.mark.parametrize("name", some(KERNELS, 2))
def test_output_is_that_of_lax(name):
    kernel, inputs, arrays = problem(name)
    got = interpreter.run(build(kernel), arrays, cores=3)
    want, lse = emulation.expected(kernel, inputs)
    tolerance = 2 * _eps(kernel.dtype)
    top = np.abs(np.asarray(inputs["value"], np.float64)).max()
    error = np.abs(got["output"].astype(np.float64) - np.asarray(want, np.float64)).max()
    assert error <= tolerance * top
    if kernel.return_lse:
        np.testing.assert_allclose(got["lse"], np.asarray(lse), atol=1e-3)


def _eps(dtype: str) -> float:
    return {"float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]


@needs_compiler
@pytest.mark.npu_full
def test_output_is_that_of_the_emulator(tmp_path: Path):
    kernel, inputs, arrays = problem("none, bias of bfloat16")
    npu_bridge.emit(kernel, tmp_path)
    compiled = emulation.compiled(tmp_path, flags=("-O0",))
    theirs = emulation.run(tmp_path, inputs, program=compiled, policies=("round_robin",))
    assert theirs.ok, theirs.complaints
    ours = interpreter.run(build(kernel), arrays, cores=2)
    difference = np.abs(ours["output"].astype(np.float64) - theirs.output.astype(np.float64))
    # C++ and NumPy may compute the last bit of exp differently.
    assert difference.max() <= _eps(kernel.dtype)
    assert np.mean(difference == 0) > 0.99


def test_a_wrong_instruction_gives_a_wrong_output():
    kernel, inputs, arrays = problem("mean, causal, log-sum-exp")
    program = build(kernel)
    for function in program.vector.functions:
        for body in (x.body for x in function.body if isinstance(x, For)):
            body[:] = [replace(x, name="Abs") if _is_exp(x) else x for x in body]
    got = interpreter.run(program, arrays)
    want, _ = emulation.expected(kernel, inputs)
    error = np.abs(got["output"].astype(np.float64) - np.asarray(want, np.float64)).max()
    assert error > 0.05


def _is_exp(node: Node) -> bool:
    return isinstance(node, Unary) and node.name == "Exp"
