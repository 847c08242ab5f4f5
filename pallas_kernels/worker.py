"""The process that holds the compilers for `aot`: it compiles one job after another."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from pasa_jax.core.target import KIB, TARGETS

# The chips that can be compiled for.
COMPILED = tuple(name for name, x in TARGETS.items() if x.topology is not None or x.gpu is not None)


_PARTS = ("tpu", "cycles", "gpu")  # what is dumped where


_GPU_CONFIG = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {shared_per_core} shared_memory_per_block_optin: {optin}
  threads_per_core_limit: {threads} core_count: {cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {l2} clock_rate_ghz: {clock_ghz}
  device_memory_size: {memory} registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} minor: {minor} {feature} }}
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation" device_address_bits: 64 name: "{product}"
  driver_version: "13.0.0" runtime_version: "12.9.0" compile_time_toolkit_version: "12.9.0"
  dnn_version: "9.10.0" }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{product}"
"""


_PTX = re.compile(
    r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma|ex2|cvt)\.[a-z0-9_:.]+"
    r"|\b(?:fma|mul|add|sub|max|min)(?:\.rn|\.ftz)*\.f32\b"
)


@dataclass(frozen=True)
class Report:
    """What a compiler made of one call.

    Arguments:
      seconds: that it took to compile.
      error: why it did not, or "".
      float64: whether anything in it is computed in float64.
      cycles: the TPU compiler's estimate per kernel or fusion; empty where it has none.
      bundles, fills, spills: of the Pallas kernel: instruction words, and how many of them load
        and store registers that did not fit. On a GPU the latter are bytes.
      registers, shared: of the Pallas kernel on a GPU: per thread, and bytes per block.
      instructions: how often PTX instructions that matter stand in the Pallas kernel.
      kernels: on a GPU, registers, shared, fills, spills and instructions of each Pallas kernel by
        name; what stands above is the largest of each (of instructions the sum).
    """

    target: str
    seconds: float = 0.0
    error: str = ""
    float64: bool = False
    cycles: dict[str, int] = field(default_factory=dict)
    bundles: int = 0
    fills: int = 0
    spills: int = 0
    registers: int = 0
    shared: int = 0
    instructions: dict[str, int] = field(default_factory=dict)
    kernels: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def total_cycles(self) -> int:
        """Of the whole jitted call; 0 where the compiler gave no estimate."""
        return sum(self.cycles.values())


def device(target: str) -> Any:
    """A device of the kind of ``target``, good for compiling only."""
    topology, gpu = TARGETS[target].topology, TARGETS[target].gpu
    if topology is not None:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    assert gpu is not None
    return topologies.get_topology_desc(
        platform="cuda", topology_name=target, target_config=gpu_config(target), topology="1x1x1"
    ).devices[0]


def gpu_config(target: str) -> str:
    """What XLA is told of a GPU that is not here."""
    gpu = TARGETS[target].gpu
    assert gpu is not None
    return _GPU_CONFIG.format(
        **asdict(gpu),
        optin=gpu.shared_per_core - KIB,
        threads=2048 if gpu.shared_per_core > 128 * KIB else 1536,
        feature="feature_extension: ACCELERATED_FEATURES" if gpu.accelerated else "",
    )


def gpu_mesh(target: str, **axes: int) -> jax.sharding.AbstractMesh:
    """A mesh of GPUs that are not here, with the sizes of its axes by name."""
    gpu = TARGETS[target].gpu
    assert gpu is not None
    # JAX 0.12 knows GPUs by name, the RTX 5090 not; the RTX PRO 6000 has its architecture.
    name = "NVIDIA RTX PRO 6000" if target == "rtx5090" else gpu.product
    device = jax.sharding.AbstractDevice(name, gpu.cores, "gpu")
    types = (jax.sharding.AxisType.Auto,) * len(axes)
    sizes, names = tuple(axes.values()), tuple(axes)
    return jax.sharding.AbstractMesh(sizes, names, types, abstract_device=device)


def as_if_on(target: str) -> contextlib.AbstractContextManager[Any]:
    """Names the GPU that Triton is lowered for; newer versions of JAX ask for one."""
    if TARGETS[target].gpu is None:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(gpu_mesh(target))


def _compile(job: dict[str, Any], dump: Path) -> Report:
    for part in _PARTS:
        shutil.rmtree(dump / part, ignore_errors=True)
        (dump / part).mkdir()
    module, name = job["function"].split(":")
    target = job["target"]
    sharding = jax.sharding.SingleDeviceSharding(device(target))

    def array(shape: Any, dtype: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype), sharding=sharding)

    start = time.perf_counter()
    x64 = jax.enable_x64(True) if job["x64"] else contextlib.nullcontext()
    try:
        with x64, as_if_on(target):
            make = getattr(importlib.import_module(module), name)
            function, arguments = make(array, **job["arguments"])
            lowered = jax.jit(function).lower(*arguments)
            lowered.compile()
    except Exception as error:  # a compiler's refusal is a result
        return Report(target, error=f"{type(error).__name__}: {' '.join(str(error).split())}"[:500])
    seconds = round(time.perf_counter() - start, 2)
    float64 = re.search(r"\bx?f64\b", lowered.as_text()) is not None
    read = _read_tpu if TARGETS[target].topology is not None else _read_gpu
    return Report(target, seconds, float64=float64, **read(dump, target))


def _read_tpu(dump: Path, target: str) -> dict[str, Any]:
    del target
    cycles = {}
    for path in (dump / "cycles").glob("*.textproto"):
        match = re.search(r"estimated_cycles: (\d+)", path.read_text())
        if match:
            cycles[path.name.removesuffix("_static_llo_profile.textproto")] = int(match[1])
    rows: list[list[int]] = []
    for path in (dump / "tpu").glob("*pasa_tpu*utilization.txt"):
        _, _, table = path.read_text().partition("UTILIZATION:\n")
        rows += [[int(x) for x in line.split()] for line in table.splitlines() if line]
    fills, spills = (sum(row[column] for row in rows) for column in (6, 8))
    return {"cycles": cycles, "bundles": len(rows), "fills": fills, "spills": spills}


def _read_gpu(dump: Path, target: str) -> dict[str, Any]:
    gpu = TARGETS[target].gpu
    assert gpu is not None
    kernels = {}
    for path in (dump / "gpu").glob("*.ptx"):
        text = path.read_text()
        entry = re.search(r"entry (pasa_gpu\w*)", text)
        if entry is None:
            continue
        name = entry[1]
        kernels[name] = {"instructions": dict(Counter(_PTX.findall(text)))}
        kernels[name] |= _assembled(path, gpu.architecture)
        sizes = [
            int(size)
            for dumped in (dump / "gpu").glob(f"*{name}.*triton-to-llvm*")
            for size in re.findall(r"ttg\.shared = (\d+)", dumped.read_text())
        ]
        kernels[name]["shared"] = max(sizes, default=0)
    figures: dict[str, Any] = {"kernels": kernels}
    for name in ("registers", "shared", "fills", "spills"):
        figures[name] = max((x[name] for x in kernels.values()), default=0)
    figures["instructions"] = dict(
        sum((Counter(x["instructions"]) for x in kernels.values()), Counter())
    )
    return figures


def _assembled(path: Path, architecture: str) -> dict[str, int]:
    """What ptxas says of the PTX at ``path``: registers per thread, and bytes of them spilt."""
    command = [_ptxas(), "-v", f"-arch={architecture}", str(path), "-o", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    used = re.search(r"Used (\d+) registers", said)
    figures = {"registers": int(used[1]) if used else 0}
    for name, what in (("spills", "stores"), ("fills", "loads")):
        figures[name] = sum(int(x) for x in re.findall(rf"(\d+) bytes spill {what}", said))
    return figures


def _ptxas() -> str:
    """The assembler: the machine's own, or that of the wheel nvidia-cuda-nvcc-cu12."""
    own = shutil.which("ptxas")
    if own:
        return own
    nvidia = importlib.import_module("nvidia")
    for place in nvidia.__path__:
        for path in Path(place).glob("*/bin/ptxas"):
            return str(path)
    raise FileNotFoundError("ptxas is not installed: pip install pasa-jax[aot]")


def _end_with(parent: int) -> None:
    """Ends this process when ``parent`` has gone, which may be in the middle of a compilation."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _serve(dump: Path, jobs: Iterator[str]) -> None:
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # the compilers print there
    for line in jobs:
        print(json.dumps(asdict(_compile(json.loads(line), dump))), file=answers, flush=True)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), iter(sys.stdin))
