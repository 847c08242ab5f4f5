"""A `Program` as files: the kernel's source, its tiling, and the projects around them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from npu_bridge import functions, interface, numbers
from npu_bridge.cores.context import Core
from npu_bridge.expressions import prelude
from npu_bridge.facts.text import problems
from npu_bridge.ir import Buffer, render
from npu_bridge.layout import POSITIONS
from npu_bridge.program import Program
from npu_bridge.specification import Kernel
from pasa_jax.core.errors import LoweringError, wrong
from pasa_jax.core.precision import Precision
from pasa_jax.core.schedule import Schedule

NAME = "pasa_attention"
_COMMENTS = {
    "AIC": ("CubeCore", "The cube core: products, ahead of the vector cores."),
    "AIV": ("VectorCore", "A vector core: half of the rows of each tile."),
}


def files(program: Program) -> dict[str, str]:
    """Path -> text of the direct-launch project and, in package/, of the operator package.

    Raises:
      LoweringError: a kernel would call what the chip does not have.
    """
    env = Environment(
        loader=PackageLoader("npu_bridge"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    values = _values(program)
    templates = {
        f"{NAME}.cpp": "kernel.cpp.j2",
        "tiling.h": "tiling.h.j2",
        "make_tiling.h": "make_tiling.h.j2",
        "emulate.cpp": "emulate.cpp.j2",
        **_projects(program.kernel),
    }
    texts = {
        path: env.get_template(template).render(values) for path, template in templates.items()
    }
    entry = f"package/op_kernel/{NAME}.cpp"  # which includes the kernel
    wrong = problems(texts[f"{NAME}.cpp"] + texts[entry])
    if wrong:
        raise LoweringError(f"the kernel would call what the chip does not have: {wrong[0]}")
    texts["kernel.json"] = describe(program.kernel)
    return texts


def _projects(kernel: Kernel) -> dict[str, str]:
    """Path -> template of what stands around the kernel."""
    templates = {
        "host.h": "host.h.j2",
        "main.cpp": "main.cpp.j2",
        "CMakeLists.txt": "CMakeLists.txt.j2",
        "README.md": "README.md.j2",
        # A package carries its kernel's sources, so it has them once more.
        f"package/op_kernel/{NAME}_kernel.h": "kernel.cpp.j2",
        "package/op_kernel/tiling.h": "tiling.h.j2",
        "package/op_kernel/make_tiling.h": "make_tiling.h.j2",
    }
    if kernel.shift == "paper":
        templates["paper_constants.h"] = "paper_constants.h.j2"
    for path in (
        "CMakeLists.txt",
        "CMakePresets.json",
        "op_host/CMakeLists.txt",
        f"op_host/{NAME}.cpp",
        "op_kernel/CMakeLists.txt",
        f"op_kernel/{NAME}.cpp",
        "examples/CMakeLists.txt",
        "examples/aclnn_call.cpp",
    ):
        template = path.replace(NAME, "operator" if "host" in path else "entry")
        templates[f"package/{path}"] = f"package/{template}.j2"
    return templates


def write(program: Program, folder: Path) -> list[Path]:
    """Writes the project; what stands there under the same names is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in files(program).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        written.append(path)
    return written


def describe(kernel: Kernel) -> str:
    """What the kernel computes, as JSON: enough to compute it again, if its functions stand in
    modules.
    """
    options = asdict(replace(kernel, functions=None))
    del options["functions"]
    if kernel.visits is None:
        del options["visits"]
    if kernel.functions is not None:
        options["functions"] = functions.describe(kernel.functions)
    return json.dumps(options, indent=2, sort_keys=True) + "\n"


def read_description(folder: Path, kernel: Kernel | None = None) -> Kernel:
    """The kernel that an emitted project says it is.

    Arguments:
      kernel: it, where its functions do not stand in modules.

    Raises:
      ValueError: the project is of another kernel, or does not say of which.
    """
    if kernel is not None:
        if (folder / "kernel.json").read_text() != describe(kernel):
            raise wrong("kernel", f"be what {folder} was emitted from", "another")
        return kernel
    options = json.loads((folder / "kernel.json").read_text())
    options["precision"] = Precision(**options["precision"])
    options["schedule"] = Schedule(**options["schedule"])
    if options["window"] is not None:
        options["window"] = tuple(options["window"])
    if "functions" in options:
        options["functions"] = functions.read(options["functions"])
    return Kernel(**options)


def _values(program: Program) -> dict[str, Any]:
    k = program.kernel
    array_arguments = interface.passed(k)
    names = [*array_arguments, "workspace", "tiling"]
    return {
        "name": NAME,
        "title": _title(k),
        "summary": summary(program),
        "prelude": prelude(),
        "flags": program.flags,
        "block_q": k.schedule.block_q,
        "block_kv": k.schedule.block_kv,
        "d": k.head_dim,
        "e": k.value_head_dim,
        "scale": f"{k.head_dim**-0.5!r}f",
        "paper": k.shift == "paper",
        "decode": k.decode,
        "packed": k.packed,
        "visits": k.visits is not None,
        "parameters": _listed([f"GM_ADDR {n}" for n in names]),
        "core_parameters": _listed([*(f"GM_ADDR {n}" for n in names[:-1]), "TilingPointer tiling"]),
        "arrays_and_workspace": ", ".join(names[:-1]),
        "arguments": ", ".join(names),
        "workspace": program.workspace,
        "kernel_numbers": numbers.kernel_numbers(k),
        "host": {number.name: number.text for number in numbers.host_numbers(k)},
        "cores": [
            _core(core, part, array_arguments) for part in program.parts for core in part.cores
        ],
        "repaired": program.careful is not None,
        **interface.values(k),
    }


def _listed(parameters: list[str]) -> str:
    """Parameters, a few to a line."""
    lines = [", ".join(parameters[i : i + 4]) for i in range(0, len(parameters), 4)]
    return (",\n" + " " * 8).join(lines)


def _core(core: Core, program: Program, arguments: list[str]) -> dict[str, Any]:
    name, comment = _COMMENTS[core.kind]
    if program.kernel.careful:
        name, comment = f"Careful{name}", f"{comment} For the tiles that are computed again."
    vector = core.kind == "AIV"
    places = [
        {
            "name": g.name,
            "dtype": g.dtype,
            "source": g.name
            if g.name in arguments
            else f"workspace + this->tiling->{g.name}Offset",
        }
        for g in program.globals.values()
    ]
    return {
        "name": name,
        "comment": comment,
        "vector": vector,
        "index": "GetBlockIdx() / 2" if vector else "GetBlockIdx()",
        "body": render(core.body, 0),
        "functions": [
            {
                "name": f.name,
                "comment": f.comment,
                "parameters": ", ".join(f"int32_t {p}" for p in f.parameters),
                "lines": render(f.body, 0),
                "buffers": [_declared(b) for b in f.buffers],
            }
            for f in core.functions
        ],
        "counters": core.counters,
        "globals": places,
        "repaired": program.careful is not None,
        "buffers": [_declared(b) for m in core.memories.values() for b in m.buffers],
    }


def _declared(b: Buffer) -> str:
    position = POSITIONS[b.memory]
    count = b.count * b.slots
    note = f"  // {b.note}" if b.note else ""
    made = f"LocalTensor<{b.dtype}>(TPosition::{position}, {b.address}, {count})"
    return f"LocalTensor<{b.dtype}> {b.name} = {made};{note}"


def _title(k: Kernel) -> str:
    words = [f"Attention with the shift '{k.shift}'", f"{k.dtype}", f"D = {k.head_dim}"]
    if k.is_causal:
        words.append(f"causal ({k.causal_alignment})")
    if k.packed:
        words.append("packed sequences")
    if k.visits is not None:
        words.append("key tiles of lists")
    if k.functions is not None:
        for name in functions.MODS:
            function = getattr(k.functions, name)
            if function is not None:
                words.append(f"{name} {getattr(function, '__name__', 'of the caller')}")
    return ", ".join(words) + f", for {k.schedule.target}."


def summary(program: Program) -> list[str]:
    """The schedule and the buffer map, as lines."""
    k, s = program.kernel, program.kernel.schedule
    lines = [
        f"Schedule: {s.block_q} queries x {s.block_kv} keys a tile, {program.rows} rows a slab of "
        "a vector core.",
        f"Types: scores {k.precision.scores}, probabilities {k.precision.probabilities}, "
        f"statistics {k.precision.statistics}, output before it is normalised "
        f"{k.precision.accumulator}.",
        "",
        "Buffers (bytes, address):",
    ]
    for core, careful in ((c, p.kernel.careful) for p in program.parts for c in p.cores):
        again = " for tiles that are computed again" if careful else ""
        for memory in core.memories.values():
            lines.append(f"  {memory.name}{again}: {memory.used} of {memory.capacity}")
            for b in memory.buffers:
                twice = f", {b.slots} slots" if b.slots > 1 else ""
                lines.append(f"    {b.address:>6} {b.bytes:>6} {b.name}: {b.note}{twice}")
            if memory.scratch:
                lines.append(f"    {memory.staying:>6} {memory.scratch:>6} values of one slab")
    return lines
