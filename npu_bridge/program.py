"""The program of a kernel: what the cube core and its two vector cores do, and when.

A core's work is a list of items, one query tile of one head each. For each item the cube core makes
scores ahead of the vector cores, which turn them into probabilities; it then multiplies these with
the values, and the vector cores add the product to the output. What passes between them lies in
global memory (the workspace), a few tiles deep, and cross-core flags say when it is there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from npu_bridge.cores.context import Context, Core
from npu_bridge.cores.cube import cube_core
from npu_bridge.cores.vector import vector_core
from npu_bridge.ir import Buffer
from npu_bridge.layout import FLAGS, SLABS, SUB, Slabs
from npu_bridge.numbers import Array, shared
from npu_bridge.specification import Kernel
from pasa_jax.core.errors import PlanError


@dataclass
class Program:
    """An emitted kernel before it is text.

    Arguments:
      rows: of a slab of a vector core.
      globals: the arrays in global memory, by name: arguments, then the workspace.
      workspace: its arrays, those of ``careful`` included.
      careful: what runs afterwards for the query tiles whose result is not finite.
    """

    kernel: Kernel
    rows: int
    cube: Core
    vector: Core
    globals: dict[str, Buffer]
    workspace: list[Array]
    flags: dict[str, int]
    careful: Program | None = None

    @property
    def parts(self) -> tuple[Program, ...]:
        """The programs that run one after the other."""
        return (self,) if self.careful is None else (self, self.careful)

    @property
    def cores(self) -> tuple[Core, Core]:
        return self.cube, self.vector


def build(kernel: Kernel, *, careful: bool = True) -> Program:
    """The program of a kernel, with the tallest slabs that fit, and with P·V double-buffered if
    that fits too.

    Arguments:
      careful: False: without the kernel for damaged tiles, which takes no time where none is.

    Raises:
      PlanError: no slab fits; the message says which memory, how much and what would fit.
    """
    check(kernel)
    program = _fitting(kernel)
    if not (careful and kernel.repaired):
        return program
    again = _fitting(kernel.carefully)
    arrays, names = shared(program.workspace, again.workspace)
    if any(name != called for name, called in names.items()):
        again = _fitting(kernel.carefully, names)
    return replace(program, workspace=arrays, careful=again)


def _fitting(kernel: Kernel, names: dict[str, str] | None = None) -> Program:
    """The program with the tallest slabs that fit."""
    failed: PlanError | None = None
    for slabs in SLABS:
        try:
            return _built(kernel, slabs, names)
        except PlanError as error:
            failed = error
    raise PlanError(f"{failed}. {_nearest(kernel)}")


def check(kernel: Kernel) -> None:
    """Raises where a kernel is not one that can be built, whatever its memories."""
    n, q = kernel.schedule.block_kv, kernel.schedule.block_q
    if q != SUB:
        raise PlanError(f"`schedule.block_q` must be {SUB}, the rows of a cube tile; got {q}")
    if n % SUB:
        raise PlanError(f"`schedule.block_kv` must be a multiple of {SUB}; got {n}")
    for name in ("head_dim", "value_head_dim"):
        size = getattr(kernel, name)
        if size % 64 or not 0 < size <= 256:
            raise PlanError(f"`{name}` must be 64, 128, 192 or 256; got {size}")
    if kernel.precision.probabilities != kernel.dtype:
        raise PlanError(
            "`precision.probabilities` must be the type of the values, since the cube unit "
            f"multiplies equal types; got {kernel.precision.probabilities} and {kernel.dtype}"
        )


def _built(kernel: Kernel, slabs: Slabs, names: dict[str, str] | None = None) -> Program:
    """The program with these slabs, if they fit."""
    c = Context.of(kernel, slabs, names)
    vector, cube = vector_core(c), cube_core(c)
    for core in (vector, cube):
        for memory in core.memories.values():
            memory.check(f"a tile of {c.block_q} × {c.n}")
    left_out = {"CENTRE_READY": c.kernel.bounded} | dict.fromkeys(
        ("REFERENCE_READY", "SHIFTED_READY"), c.refers
    )
    flags = {name: number for name, number in FLAGS.items() if left_out.get(name, True)}
    return Program(kernel, slabs.rows, cube, vector, c.globals, c.workspace, flags)


def _nearest(kernel: Kernel) -> str:
    """The next smaller block of keys that fits, as a sentence."""
    for smaller in range(kernel.schedule.block_kv - SUB, 0, -SUB):
        schedule = replace(kernel.schedule, block_kv=smaller)
        try:
            _built(replace(kernel, schedule=schedule), SLABS[-1])
        except PlanError:
            continue
        return f"block_kv = {smaller} would fit."
    return "No smaller block_kv fits either."
