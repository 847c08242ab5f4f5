"""Runs a kernel's program in NumPy, by the meanings of its instructions.

This needs no compiler. Instructions are executed one after another, as the program has them, so
races between pipes are not seen here: they are the emulator's to find (npu_bridge/emulator).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from npu_bridge.cores.context import Core
from npu_bridge.dtypes import ITEMSIZE, NUMPY
from npu_bridge.execution import Block, CoreRun, Names, run_together
from npu_bridge.expressions import Expr, Scalar, evaluate
from npu_bridge.interface import arguments, sizes
from npu_bridge.ir import Instruction, Slice
from npu_bridge.layout import VECTOR_CORES
from npu_bridge.numbers import Tiling, tiling, values_of
from npu_bridge.program import Program

_UNWRITTEN = 0xFF  # every byte of memory that nothing has written: NaN in each floating type


@dataclass
class Memories:
    """A core's memories as bytes, and the numbers in scope: a `npu_bridge.ir.Machine`.

    Arguments:
      local: by "UB", "L1" and so on.
      shared: arrays in global memory, by name.
    """

    local: dict[str, np.ndarray]
    shared: dict[str, np.ndarray]
    names: Mapping[str, Any] = field(default_factory=dict)

    def array(self, place: Slice) -> np.ndarray:
        b = place.buffer
        if b.alias is not None:
            raw = self.array(b.alias).view(np.uint8)
        elif b.memory == "GM":
            raw = self.shared[b.name]
        else:
            assert b.address is not None, b.name
            raw = self.local[b.memory][b.address : b.address + b.bytes]
        start = self.number(place.offset) * ITEMSIZE[place.dtype]
        whole = (len(raw) - start) // ITEMSIZE[place.dtype] * ITEMSIZE[place.dtype]
        if start < 0 or whole < 0:
            raise IndexError(f"{place} begins outside of its {len(raw)} bytes")
        return raw[start : start + whole].view(NUMPY[place.dtype])

    def number(self, x: Expr | Scalar) -> Any:
        value = x.value if isinstance(x, Scalar) else x
        return evaluate(value, self.names) if isinstance(value, str) else value


class NumpyRun(CoreRun):
    """A core with its memories."""

    def __init__(self, core: Core, members: dict[str, Any], shared: dict[str, np.ndarray]) -> None:
        super().__init__(core, members)
        local = {m.name: np.full(m.capacity, _UNWRITTEN, np.uint8) for m in core.memories.values()}
        self.memories = Memories(local, shared)

    def execute(self, node: Instruction, names: Names) -> None:
        self.memories.names = names
        node.run(self.memories)


class _Numbers:
    """An array in global memory as the scalar unit reads it."""

    def __init__(self, raw: np.ndarray, dtype: np.dtype) -> None:
        self.raw, self.dtype = raw, dtype

    def GetValue(self, index: int) -> Any:
        number = self.raw.view(self.dtype)[index]
        return int(number) if self.dtype.kind in "iu" else number


def run(
    program: Program,
    inputs: Mapping[str, np.ndarray],
    *,
    cores: int = 1,
    scale: float | None = None,
) -> dict[str, np.ndarray]:
    """What a call computes: "output" [B, T, N, E], and "lse" [B, T, N] if the kernel has it
    (packed: without B).

    Arguments:
      inputs: every array that the kernel takes, by name (BTNH); `npu_bridge.emulation.constants`
        gives those of the shift "paper".
      cores: cube cores, each with its two vector cores.
      scale: of the scores; None: 1/√D.
    """
    kernel = program.kernel
    batch, heads, kv_heads, queries, keys = sizes(kernel, inputs)
    given = tiling(
        kernel, batch=batch, heads=heads, kv_heads=kv_heads, queries=queries, keys=keys,
        cores=cores, scale=scale,
    )  # fmt: skip
    shapes = {
        "output": (*inputs["query"].shape[:-1], kernel.value_head_dim),
        "lse": inputs["query"].shape[:-1],
    }
    shared = _shared(program, inputs, given, shapes)
    numbers = values_of(kernel, given)
    numbers["scale"] = np.float32(numbers["scale"])
    arrays = [buffer for part in program.parts for buffer in part.globals.values()]
    types = {buffer.name: NUMPY[buffer.dtype] for buffer in arrays}
    numbers |= {name: _Numbers(raw, types[name]) for name, raw in shared.items()}
    with np.errstate(all="ignore"):
        for part in program.parts:
            blocks = [_block(part, numbers, i, shared) for i in range(cores)]
            run_together(blocks)
            if not any(run.members.get("damagedCores") for run in blocks[0].runs):
                break
    types = arguments(kernel)
    return {
        name: shared[name].view(NUMPY[types[name]]).reshape(shape)
        for name, shape in shapes.items()
        if name in types
    }


def _shared(
    program: Program,
    inputs: Mapping[str, np.ndarray],
    given: Tiling,
    shapes: dict[str, tuple[int, ...]],
) -> dict[str, np.ndarray]:
    """Global memory, as bytes: inputs, outputs and the workspace."""
    types = arguments(program.kernel)
    sizes = {a.name: given.elements(a) * a.itemsize for a in program.workspace}
    for name, dtype in types.items():
        if name in shapes:
            sizes[name] = int(np.prod(shapes[name])) * ITEMSIZE[dtype]
    shared = {name: np.full(size, _UNWRITTEN, np.uint8) for name, size in sizes.items()}
    for name, dtype in types.items():
        if name not in shapes:
            array = np.ascontiguousarray(np.asarray(inputs[name]).astype(NUMPY[dtype]))
            shared[name] = array.reshape(-1).view(np.uint8)
    return shared


def _block(
    program: Program, numbers: dict[str, Any], core: int, shared: dict[str, np.ndarray]
) -> Block:
    """A cube core and its vector cores, with the numbers that they are given by."""
    half = program.kernel.schedule.block_q // VECTOR_CORES
    numbers = {**numbers, "core": core}
    vectors = [
        {
            **numbers,
            "vectorCore": core * VECTOR_CORES + i,
            "vectorCores": VECTOR_CORES * numbers["cores"],
            "firstRow": i * half,
        }
        for i in range(VECTOR_CORES)
    ]
    return Block(
        NumpyRun(program.cube, numbers, shared),
        [NumpyRun(program.vector, members, shared) for members in vectors],
    )
