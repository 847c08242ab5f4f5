"""Compiles for chips that are not there, and reads what the compilers say about it.

libtpu compiles for every TPU and estimates its cycles; JAX's CUDA plugin compiles Triton kernels
to PTX, which ptxas turns into machine code. Neither needs a chip. The compilers take their
settings from the environment when they load, so they run in a process of their own, a `Compiler`.
Install them with `pip install pasa-jax[aot]`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels._common import without_repair
from pasa_jax import Precision, Schedule, dot_product_attention
from pasa_jax.core.errors import check_choice
from pasa_jax.core.target import KIB, find_target

# The names under which libtpu knows the chips.
TPU_TOPOLOGIES = {
    "tpu_v5e": "v5e:2x2",
    "tpu_v5p": "v5p:2x2x1",
    "tpu_v6e": "v6e:2x2",
    "tpu_7x": "tpu7x:2x2x1",
}


@dataclass(frozen=True)
class Gpu:
    """What XLA must be told of a GPU that is not there (NVIDIA's data sheets)."""

    name: str
    major: int
    minor: int
    cores: int
    shared_per_core: int
    l2: int
    memory: int
    bandwidth: int
    clock_ghz: float
    accelerated: bool = False  # whether the architecture's own instructions may be used ("sm_90a")

    @property
    def architecture(self) -> str:
        return f"sm_{self.major}{self.minor}" + ("a" if self.accelerated else "")


_MIB, _GB = 1024 * KIB, 10**9
GPUS = {
    "a100": Gpu(
        "NVIDIA A100-SXM4-80GB", 8, 0, 108, 164 * KIB, 40 * _MIB, 80 * _GB, 2039 * _GB, 1.41
    ),
    "rtx4090": Gpu(
        "NVIDIA GeForce RTX 4090", 8, 9, 128, 100 * KIB, 72 * _MIB, 24 * _GB, 1008 * _GB, 2.52
    ),
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3", 9, 0, 132, 228 * KIB, 50 * _MIB, 80 * _GB, 3352 * _GB, 1.98, True
    ),
    "b200": Gpu(
        "NVIDIA B200", 10, 0, 148, 228 * KIB, 126 * _MIB, 180 * _GB, 8000 * _GB, 1.965, True
    ),
    "rtx5090": Gpu(
        "NVIDIA GeForce RTX 5090",
        12,
        0,
        170,
        100 * KIB,
        96 * _MIB,
        32 * _GB,
        1792 * _GB,
        2.41,
        True,
    ),
}
_GPU_CONFIG = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {shared_per_core} shared_memory_per_block_optin: {optin}
  threads_per_core_limit: {threads} core_count: {cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {l2} clock_rate_ghz: {clock_ghz}
  device_memory_size: {memory} registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} minor: {minor} {feature} }}
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation" device_address_bits: 64 name: "{name}"
  driver_version: "13.0.0" runtime_version: "12.9.0" compile_time_toolkit_version: "12.9.0"
  dnn_version: "9.10.0" }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""


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

    @property
    def total_cycles(self) -> int:
        """Of the whole jitted call; 0 where the compiler gave no estimate."""
        return sum(self.cycles.values())


# What is compiled.

MakeArray = Callable[[Any, str], jax.ShapeDtypeStruct]


def attention(
    array: MakeArray,
    *,
    batch: int = 1,
    queries: int = 1024,
    keys: int | None = None,
    heads: int = 8,
    kv_heads: int | None = None,
    head_dim: int = 128,
    dtype: str = "bfloat16",
    arrays: dict[str, tuple[Any, str]] | None = None,
    schedule: dict[str, Any],
    precision: dict[str, str] | str | None = None,
    gradient: bool = False,
    head_major: bool = False,
    repair: bool = True,
    **keywords: Any,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The public function on a kernel, and its arguments.

    Arguments:
      array: makes an argument of a shape and a type.
      arrays: further array arguments by name: shape and type.
      schedule: the fields of a `Schedule`.
      precision: as the public function takes it, or the fields of a `Precision`.
      gradient: compile the gradient of the output's sum instead.
      head_major: operands and output lie [B, N, T, D], as other Pallas kernels take them.
      repair: with the lax walk that runs again where the kernel's result is not finite. (Compilers
        count what hardly ever runs; without it, the test for it is still there.)
      keywords: of `dot_product_attention`.
    """
    kind = find_target(schedule["target"]).kind
    options: dict[str, Any] = {"implementation": f"pallas_{kind}", "schedule": Schedule(**schedule)}
    if precision is not None:
        options["precision"] = precision if isinstance(precision, str) else Precision(**precision)

    def turned(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x, 1, 2) if head_major else x

    def attend(q: Any, k: Any, v: Any, further: dict[str, Any]) -> Any:
        with contextlib.nullcontext() if repair else without_repair() as flags:
            found = dot_product_attention(
                turned(q), turned(k), turned(v), **further, **keywords, **options
            )
        found = turned(found) if head_major else found
        return found if repair else (found, flags)

    def total(*args: Any) -> jax.Array:
        return jnp.sum(attend(*args).astype(jnp.float32))

    def operand(length: int, n: int) -> jax.ShapeDtypeStruct:
        shape = (batch, n, length, head_dim) if head_major else (batch, length, n, head_dim)
        return array(shape, dtype)

    kv = (keys or queries, kv_heads or heads)
    args = (operand(queries, heads), operand(*kv), operand(*kv))
    further = {name: array(*x) for name, x in (arrays or {}).items()}
    return jax.grad(total, (0, 1, 2)) if gradient else attend, (*args, further)


# The process that compiles.


class Compiler:
    """A process with the compilers in it; a crash of one costs a restart.

    Arguments:
      limit: seconds that one compilation may take. (Some take minutes and all of the memory.)

    >>> with Compiler() as compiler:  # doctest: +SKIP
    ...     compiler("pallas_kernels.aot:attention", "tpu_v6e", schedule={"target": "tpu_v6e"})
    """

    def __init__(self, limit: float = 300) -> None:
        self._limit = limit
        self._dump = Path(tempfile.mkdtemp(prefix="pasa_aot_"))
        self._worker: subprocess.Popen[str] | None = None
        self._estimates = True

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop()
        shutil.rmtree(self._dump, ignore_errors=True)

    def __call__(
        self, function: str, target: str, *, x64: bool = False, **arguments: Any
    ) -> Report:
        """Compiles for ``target`` what ``function`` ("module:name") makes of the arguments.

        It is called with a maker of arguments and returns a function and what to call it with.
        """
        check_choice("target", target, (*TPU_TOPOLOGIES, *GPUS))
        job = {"function": function, "target": target, "x64": x64, "arguments": arguments}
        for estimates in (True, False):  # the estimator itself may take the process with it
            line = self._ask(job, estimates)
            if line:
                return Report(**json.loads(line))
            self._stop()
            if line is None:
                return Report(target, error=f"not compiled within {self._limit:.0f} seconds")
        said = (self._dump / "stderr").read_text().strip().splitlines()
        return Report(target, error=f"the compiler crashed: {' '.join(said[-3:])}"[:500])

    def _ask(self, job: dict[str, Any], estimates: bool) -> str | None:
        """The worker's answer; "" if it died, None if it took too long."""
        if self._worker is None or self._estimates != estimates:
            self._stop()
            with (self._dump / "stderr").open("w") as stderr:
                self._worker = subprocess.Popen(
                    [sys.executable, "-m", "pallas_kernels.aot", str(self._dump)],
                    env=_environment(self._dump, estimates),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    text=True,
                )
            self._estimates = estimates
        assert self._worker.stdin is not None
        assert self._worker.stdout is not None
        try:
            print(json.dumps(job), file=self._worker.stdin, flush=True)
        except BrokenPipeError:
            return ""
        ready, _, _ = select.select([self._worker.stdout], [], [], self._limit)
        return self._worker.stdout.readline() if ready else None

    def _stop(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            with contextlib.suppress(BrokenPipeError), self._worker:
                pass  # closes the pipes and waits
            self._worker = None


def _environment(dump: Path, estimates: bool) -> dict[str, str]:
    paths = [path for path in sys.path if path]  # the worker imports what its caller can
    libtpu = [
        f"--xla_jf_dump_to={dump}/tpu",
        "--xla_jf_dump_llo_text=true",
        "--xla_jf_dump_llo_pass_label_regex=.*final_hlo-static-per.*",
    ]
    if estimates:
        libtpu.append(f"--xla_jf_dump_static_llo_profile_to={dump}/cycles")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "JAX_PLATFORMS": "cpu",
        # No metadata server is asked, and several processes may hold the library at once.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "LIBTPU_INIT_ARGS": " ".join(libtpu),
        "XLA_FLAGS": f"--xla_dump_to={dump}/gpu --xla_dump_emitter_re=.*",
    }


# Inside that process.

_PARTS = ("tpu", "cycles", "gpu")  # what is dumped where


def device(target: str) -> Any:
    """A device of the kind of ``target``, good for compiling only."""
    from jax.experimental import topologies

    if target in TPU_TOPOLOGIES:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=TPU_TOPOLOGIES[target]
        ).devices[0]
    gpu = GPUS[target]
    config = _GPU_CONFIG.format(
        **asdict(gpu),
        optin=gpu.shared_per_core - KIB,
        threads=2048 if gpu.shared_per_core > 128 * KIB else 1536,
        feature="feature_extension: ACCELERATED_FEATURES" if gpu.accelerated else "",
    )
    return topologies.get_topology_desc(
        platform="cuda", topology_name=target, target_config=config, topology="1x1x1"
    ).devices[0]


def gpu_mesh(target: str, **axes: int) -> jax.sharding.AbstractMesh:
    """A mesh of GPUs that are not here, with the sizes of its axes by name."""
    gpu = GPUS[target]
    # JAX 0.12 knows GPUs by name, the RTX 5090 not; the RTX PRO 6000 has its architecture.
    name = "NVIDIA RTX PRO 6000" if target == "rtx5090" else gpu.name
    device = jax.sharding.AbstractDevice(name, gpu.cores, "gpu")
    types = (jax.sharding.AxisType.Auto,) * len(axes)
    sizes, names = tuple(axes.values()), tuple(axes)
    return jax.sharding.AbstractMesh(sizes, names, types, abstract_device=device)


def as_if_on(target: str) -> contextlib.AbstractContextManager[Any]:
    """Names the GPU that Triton is lowered for; newer versions of JAX ask for one."""
    if target not in GPUS:
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
    except Exception as error:  # every refusal is a result
        return Report(target, error=f"{type(error).__name__}: {' '.join(str(error).split())}"[:500])
    seconds = round(time.perf_counter() - start, 2)
    float64 = re.search(r"\bx?f64\b", lowered.as_text()) is not None
    read = _read_tpu if target in TPU_TOPOLOGIES else _read_gpu
    return Report(target, seconds, float64=float64, **read(dump, target))


def _read_tpu(dump: Path, target: str) -> dict[str, Any]:
    del target
    cycles = {}
    for path in (dump / "cycles").glob("*.textproto"):
        found = re.search(r"estimated_cycles: (\d+)", path.read_text())
        if found:
            cycles[path.name.removesuffix("_static_llo_profile.textproto")] = int(found[1])
    rows: list[list[int]] = []
    for path in (dump / "tpu").glob("*pasa_tpu*utilization.txt"):
        _, _, table = path.read_text().partition("UTILIZATION:\n")
        rows += [[int(x) for x in line.split()] for line in table.splitlines() if line]
    fills, spills = (sum(row[column] for row in rows) for column in (6, 8))
    return {"cycles": cycles, "bundles": len(rows), "fills": fills, "spills": spills}


_PTX = re.compile(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma|ex2)\.[a-z0-9_:.]+")


def _read_gpu(dump: Path, target: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in (dump / "gpu").glob("*pasa_gpu*triton-to-llvm*"):
        sizes = re.findall(r"ttg\.shared = (\d+)", path.read_text())
        found["shared"] = max((int(x) for x in sizes), default=0)
    for path in (dump / "gpu").glob("*.ptx"):
        text = path.read_text()
        if "entry pasa_gpu" not in text:
            continue
        found["instructions"] = dict(Counter(_PTX.findall(text)))
        command = [
            _ptxas(),
            "-v",
            f"-arch={GPUS[target].architecture}",
            str(path),
            "-o",
            os.devnull,
        ]
        said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
        used = re.search(r"Used (\d+) registers", said)
        found["registers"] = int(used[1]) if used else 0
        for name, what in (("spills", "stores"), ("fills", "loads")):
            found[name] = sum(int(x) for x in re.findall(rf"(\d+) bytes spill {what}", said))
    return found


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
