"""Small programs of one core, run both on the C++ emulator and in NumPy."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from npu_bridge.cores.context import Core
from npu_bridge.dtypes import NUMPY
from npu_bridge.emulation import EMULATOR
from npu_bridge.expressions import prelude
from npu_bridge.interpreter import NumpyRun
from npu_bridge.ir import Buffer, Node, render
from npu_bridge.layout import POSITIONS
from npu_bridge.memory import Memory

COMPILER = shutil.which("g++")
_TARGET = "ascend_910b"
_SOURCE = """\
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
bool cube;
void kernel(GM_ADDR from, GM_ADDR to) {
    if (!(cube ? ASCEND_IS_AIC : ASCEND_IS_AIV && GetBlockIdx() == 0)) return;
    InitSocState();
    part(from, to);
    PipeBarrier<PIPE_ALL>();
}
}  // namespace
int main(int argc, char** argv) {
    part = kParts[std::atoi(argv[2])];
    cube = argv[3][0] == '1';
    return emulate(argc, argv, kernel);
}
"""


@dataclass
class Part:
    """A program of one core.

    Arguments:
      local: buffers on the chip, all of which have an address.
      inputs: arrays in global memory, by the name of their `Buffer` there.
      outputs: number of elements and C++ type of what it writes there, likewise.
      numbers: that only the kernel knows.
      cube: whether the cube core runs it.
    """

    nodes: list[Node]
    local: list[Buffer]
    inputs: dict[str, np.ndarray]
    outputs: dict[str, tuple[int, str]]
    numbers: dict[str, Any]
    cube: bool = False

    def _places(self) -> tuple[dict[str, int], dict[str, int], int, int]:
        """Bytes at which inputs and outputs begin, and how many there are."""
        sizes = {name: x.nbytes for name, x in self.inputs.items()}
        ends = {name: n * NUMPY[dtype].itemsize for name, (n, dtype) in self.outputs.items()}
        return _laid(sizes)[0], _laid(ends)[0], _laid(sizes)[1], _laid(ends)[1]

    def text(self, number: int) -> str:
        """As a C++ function."""
        froms, tos, _, _ = self._places()
        types = {name: _c_type(x.dtype) for name, x in self.inputs.items()}
        types |= {name: dtype for name, (_, dtype) in self.outputs.items()}
        lines = [
            f"const {'int32_t' if isinstance(x, int) else 'float'} {name} = {x};"
            for name, x in self.numbers.items()
        ]
        for side, places in (("from", froms), ("to", tos)):
            lines += [
                f"GlobalTensor<{types[n]}> {n} = At<{types[n]}>({side}, {at});"
                for n, at in places.items()
            ]
        lines += [
            f"LocalTensor<{b.dtype}> {b.name}(TPosition::{POSITIONS[b.memory]}, {b.address}, "
            f"{b.count * b.slots});"
            for b in self.local
        ]
        head = f"void part{number}(GM_ADDR from, GM_ADDR to) {{"
        return "\n    ".join([head, *lines, *render(self.nodes, 0)]) + "\n}\n"

    def emulated(self, program: Path, number: int, work: Path) -> dict[str, np.ndarray]:
        """What the emulator computes; it must have no complaint."""
        froms, tos, size, out = self._places()
        given = bytearray(size)
        for name, at in froms.items():
            given[at : at + self.inputs[name].nbytes] = self.inputs[name].tobytes()
        (work / "from").write_bytes(given)
        job = [
            "blocks 1", f"report {work / 'report'}", "policy round_robin", "policy random 1",
            f"arg from in {size} {work / 'from'}", f"arg to out {out} {work / 'to'}",
        ]  # fmt: skip
        (work / "job").write_text("\n".join(job))
        cube = "1" if self.cube else "0"
        subprocess.run([program, work / "job", str(number), cube], check=False)
        assert json.loads((work / "report").read_text())["complaints"] == []
        raw = (work / "to").read_bytes()
        return {
            name: np.frombuffer(raw, NUMPY[dtype], n, tos[name])
            for name, (n, dtype) in self.outputs.items()
        }

    def interpreted(self) -> dict[str, np.ndarray]:
        """What NumPy computes."""
        memories = {m: Memory.of(_TARGET, m) for m in POSITIONS}
        core = Core("AIC" if self.cube else "AIV", memories, (), [], self.nodes)
        shared = {n: np.frombuffer(x.tobytes(), np.uint8).copy() for n, x in self.inputs.items()}
        for name, (n, dtype) in self.outputs.items():
            shared[name] = np.full(n * NUMPY[dtype].itemsize, 0xFF, np.uint8)
        numbers = {n: x if isinstance(x, int) else np.float32(x) for n, x in self.numbers.items()}
        with np.errstate(all="ignore"):
            assert list(NumpyRun(core, numbers, shared).program()) == []
        return {name: shared[name].view(NUMPY[dtype]) for name, (_, dtype) in self.outputs.items()}


def _c_type(dtype: np.dtype) -> str:
    return next(name for name, x in NUMPY.items() if x == dtype)


def _laid(sizes: dict[str, int]) -> tuple[dict[str, int], int]:
    """Where each begins, at whole blocks, and the end of the last."""
    places, at = {}, 0
    for name, size in sizes.items():
        places[name] = at
        at += -(-size // 32) * 32
    return places, at


def compiled(parts: list[Part | None], folder: Path) -> Path:
    """One program of all parts; of those that are None nothing."""
    texts = [
        f"void part{i}(GM_ADDR, GM_ADDR) {{}}\n" if x is None else x.text(i)
        for i, x in enumerate(parts)
    ]
    names = ", ".join(f"part{i}" for i in range(len(parts)))
    (folder / "parts.cpp").write_text(_SOURCE % (prelude(), "\n".join(texts), names))
    # The parts are small: compiling costs more than running.
    command = [COMPILER, "-std=c++17", "-O0", f"-I{EMULATOR}", folder / "parts.cpp"]
    subprocess.run([*command, "-o", folder / "parts"], check=True)
    return folder / "parts"
