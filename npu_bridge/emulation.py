"""Compiles the sources of an emitted project with g++ and runs them on the host emulator."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pasa_jax
from npu_bridge import lists
from npu_bridge.interface import passed, sizes
from npu_bridge.project import read_description
from npu_bridge.specification import Kernel
from pasa_jax.core.errors import EmulationError

EMULATOR = Path(__file__).parent / "emulator"
POLICIES = ("round_robin", "random 1", "all")


@dataclass(frozen=True)
class Run:
    """The result of a run.

    Arguments:
      output: [B, T, N, E]; lse: [B, T, N] or None. Packed: without B.
      complaints: of the emulator.
      instructions: how many of each pipe were executed.
      error: largest |output − lax's|, over the largest |value|.
      tolerance: what it may be: two roundings of the output's type, one on each side.
    """

    output: np.ndarray
    lse: np.ndarray | None
    complaints: list[str]
    instructions: dict[str, int]
    error: float
    lse_error: float
    tolerance: float
    report: dict[str, Any] = field(repr=False, default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.complaints and self.error <= self.tolerance


def compiled(folder: Path, *, to: Path | None = None, flags: tuple[str, ...] = ("-O1",)) -> Path:
    """The program that g++ makes of the sources in ``folder``.

    Raises:
      EmulationError: there is no g++, or it refuses the sources; with what it says.
    """
    if shutil.which("g++") is None:
        raise EmulationError("g++ is not installed: the emulator needs it (apt install g++)")
    program = (to or folder) / "emulate"
    # What narrows in braces is an error to CANN's compiler, a clang; to g++ a warning.
    strict = ("-std=c++17", "-Werror=narrowing")
    command = ["g++", *strict, *flags, f"-I{EMULATOR}", str(folder / "emulate.cpp")]
    said = subprocess.run(
        [*command, "-o", str(program)], capture_output=True, text=True, check=False
    )
    if said.returncode:
        raise EmulationError(f"g++ refuses the sources in {folder}:\n{said.stderr[:4000]}")
    return program


def problem(
    kernel: Kernel,
    *,
    batch: int = 1,
    heads: int = 2,
    kv_heads: int = 1,
    queries: int | Sequence[int] = 128,
    keys: int | Sequence[int] = 512,
    mean: float = 0.0,
    amplitude: float = 1.0,
    seed: int = 0,
) -> dict[str, jax.Array]:
    """Random inputs as the paper's benchmark draws them: uniform around ``mean``.

    Arguments:
      queries, keys: T and S. Of a packed kernel, those of each sequence, or of all ``batch`` ones.
    """
    offsets: dict[str, jax.Array] = {}
    if kernel.packed:
        lengths = [(x,) * batch if isinstance(x, int) else x for x in (queries, keys)]
        named = zip(("queryOffsets", "keyOffsets"), lengths, strict=True)
        offsets = {name: jnp.asarray([0, *np.cumsum(x)], jnp.int32) for name, x in named}
        batch, (queries, keys) = 1, (sum(x) for x in lengths)
    assert isinstance(queries, int)
    assert isinstance(keys, int)
    queries = 1 if kernel.decode else queries
    rng = np.random.default_rng(seed)
    shapes = {
        "query": (batch, queries, heads, kernel.head_dim),
        "key": (batch, keys, kv_heads, kernel.head_dim),
        "value": (batch, keys, kv_heads, kernel.value_head_dim),
    }
    inputs = {
        name: jnp.asarray(
            rng.uniform(-1, 1, shape[kernel.packed :]) * amplitude + mean * (name != "value"),
            kernel.dtype,
        )
        for name, shape in shapes.items()
    }
    inputs |= offsets
    if kernel.bias is not None:
        size = {"B": batch, "N": heads, "T": queries, "S": keys, "1": 1}
        shape = tuple(size[axis] for axis in kernel.bias)
        inputs["bias"] = jnp.asarray(rng.normal(0, 2, shape), kernel.dtype)
    if kernel.mask_axes is not None:
        size = {"B": batch, "N": heads, "T": queries, "S": keys, "1": 1}
        shape = tuple(size[axis] for axis in kernel.mask_axes)
        inputs["mask"] = jnp.asarray(rng.random(shape) < 0.7)
    if kernel.segments:
        for name, length in (("querySegments", queries), ("keySegments", keys)):
            cuts = np.sort(rng.integers(0, length, (batch, 3)), axis=1)[:, :, None]
            inputs[name] = jnp.asarray(np.sum(np.arange(length) >= cuts, axis=1) - 2**30, jnp.int32)
    if kernel.sinks:
        inputs["sinks"] = jnp.asarray(rng.normal(0, 2, heads), jnp.float32)
    if kernel.functions is not None:
        size = {"B": batch, "N": heads, "T": queries, "S": keys, "1": 1}
        for leaf in kernel.functions.leaves:
            inputs[leaf.name] = _drawn(rng, tuple(size[x] for x in leaf.axes), leaf.dtype)
    if kernel.visits is not None:
        axes = zip(kernel.visits, (batch, heads), strict=True)
        shape = tuple(1 if x == "1" else size for x, size in axes)
        inputs["visits"] = lists.drawn(kernel, rng, shape, queries, keys)
    if kernel.lengths:
        lengths = rng.integers(1, keys + 1, batch)
        inputs["lengths"] = jnp.asarray(lengths, jnp.int32)
    return inputs


def _drawn(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Data of functions: bools, small whole numbers or normal ones."""
    if dtype == "float32":
        return jnp.asarray(rng.standard_normal(shape), dtype)
    numbers = rng.random(shape) < 0.7 if dtype == "bool" else rng.integers(0, 4, shape)
    return jnp.asarray(numbers, dtype)


def expected(kernel: Kernel, inputs: dict[str, jax.Array], scale: float | None = None) -> Any:
    """What "lax" computes on the same schedule and precision: output and log-sum-exp."""
    if kernel.packed:
        return _expected_packed(kernel, inputs, scale)
    return pasa_jax.dot_product_attention(
        inputs["query"],
        inputs["key"],
        inputs["value"],
        bias=inputs.get("bias"),
        mask=inputs.get("mask"),
        segment_ids=_segments(inputs),
        sinks=inputs.get("sinks"),
        scale=scale,
        is_causal=kernel.is_causal,
        causal_alignment=kernel.causal_alignment,
        local_window_size=kernel.window,
        key_value_seq_lengths=inputs.get("lengths"),
        logits_soft_cap=kernel.logits_soft_cap,
        **({} if kernel.functions is None else kernel.functions.given(inputs)),
        block_mask=lists.block_mask(kernel, inputs),
        shift=kernel.shift,
        beta=kernel.beta,
        precision=kernel.precision,
        schedule=kernel.schedule,
        implementation="lax",
        return_residual=True,
    )


def _expected_packed(
    kernel: Kernel, inputs: dict[str, jax.Array], scale: float | None
) -> tuple[jax.Array, jax.Array]:
    """The same, sequence by sequence."""
    alone, results = replace(kernel, packed=False), []
    starts = (np.asarray(inputs[f"{name}Offsets"]) for name in ("query", "key"))
    for q, q_end, k, k_end in zip(*(y for x in starts for y in (x[:-1], x[1:])), strict=True):
        if q == q_end:
            continue
        part = {n: inputs[n][None, k:k_end] for n in ("key", "value")}
        if k == k_end:  # a key that does not count: there are no arrays without any
            part = {n: jnp.zeros((1, 1, *x.shape[2:]), x.dtype) for n, x in part.items()}
            part["lengths"] = jnp.zeros(1, jnp.int32)
        part["query"] = inputs["query"][None, q:q_end]
        if "sinks" in inputs:
            part["sinks"] = inputs["sinks"]
        results.append(expected(alone, part, scale))
    output, lse = (jnp.concatenate([x[i][0] for x in results]) for i in range(2))
    return output, lse


def _segments(inputs: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array] | None:
    if "querySegments" not in inputs:
        return None
    return inputs["querySegments"], inputs["keySegments"]


def run(
    folder: Path,
    inputs: dict[str, jax.Array] | None = None,
    *,
    kernel: Kernel | None = None,
    program: Path | None = None,
    cores: int = 2,
    scale: float | None = None,
    policies: tuple[str, ...] = POLICIES,
    want: tuple[Any, Any] | None = None,
) -> Run:
    """Runs an emitted project on the emulator and compares with lax.

    Arguments:
      want: what `expected` gives, if it is known already.
      inputs: by the names of the kernel's arguments, BTNH (packed: TNH); default random ones.
      kernel: what was emitted, where its functions do not stand in modules.
      program: what `compiled` made; None: compile now.
      cores: cube cores, each with its two vector cores.
      policies: orders in which the pipes take turns; see emulator/README.md.

    Raises:
      EmulationError: the sources do not compile, or the emulator itself failed.
    """
    kernel = read_description(folder, kernel)
    inputs = problem(kernel) if inputs is None else inputs
    wanted: Any = expected(kernel, inputs, scale) if want is None else want
    want_out, want_lse = wanted
    with tempfile.TemporaryDirectory(prefix="pasa_npu_") as place:
        work = Path(place)
        program = compiled(folder, to=work) if program is None else program
        results = _executed(program, kernel, inputs, cores, scale, policies, work)
    output = _read(results["output"], want_out.shape, kernel.dtype)
    lse = None
    if "lse" in results:
        lse = results["lse"].view(np.float32).reshape(want_lse.shape)
    values = np.abs(np.asarray(inputs["value"], np.float64))
    top = float(np.max(values, where=np.isfinite(values), initial=0)) or 1.0
    error = _difference(output, np.asarray(want_out, np.float64)) / top
    report = results["report"]
    return Run(
        output=output,
        lse=lse,
        complaints=[str(x) for x in report["complaints"]],
        instructions=report["instructions"],
        error=error,
        lse_error=0.0 if lse is None else _difference(lse, np.asarray(want_lse, np.float64)),
        tolerance=2 * float(jnp.finfo(kernel.dtype).eps),
        report=report,
    )


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference; infinite where one is NaN and the other is not."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    both = np.isnan(a) & np.isnan(b)
    different = np.where(both | (a == b), 0.0, np.abs(a - b))
    return float(np.max(np.where(np.isnan(different), np.inf, different), initial=0))


def _bytes(x: jax.Array) -> bytes:
    return np.ascontiguousarray(np.asarray(x)).tobytes()


def _read(raw: np.ndarray, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return np.asarray(raw.view(jnp.dtype(dtype)).reshape(shape).astype(np.float32))


def constants(kernel: Kernel, keys: int) -> dict[str, np.ndarray]:
    """Arrays that belong to the kernel, not to the call."""
    if kernel.shift != "paper":
        return {}
    blocks = kernel.plan.paper_blocks(keys)
    n, tail = kernel.schedule.block_kv, keys % kernel.schedule.block_kv
    # The tail lies at the start of its block here, at the end of the last n keys in lax.
    order = np.roll(np.arange(n), tail) if tail else np.arange(n)
    tail_matrix = blocks.tail_matrix[np.ix_(order, order)]
    tail_weights = blocks.tail_weights[order, 0]
    return {
        "matrices": np.stack([blocks.matrix, tail_matrix]).astype(jnp.dtype(kernel.dtype)),
        "weights": np.stack([blocks.weights[:, 0], tail_weights]).astype(np.float32),
    }


def _executed(
    program: Path,
    kernel: Kernel,
    inputs: dict[str, jax.Array],
    cores: int,
    scale: float | None,
    policies: tuple[str, ...],
    work: Path,
) -> dict[str, Any]:
    numbers = (*sizes(kernel, inputs), cores)
    keys = numbers[4]
    factor = repr(float(np.float32(kernel.head_dim**-0.5 if scale is None else scale)))
    said = subprocess.run(
        [str(program), "tiling", *map(str, numbers), factor, str(work / "tiling")],
        capture_output=True,
        text=True,
        check=False,
    )
    if said.returncode:
        raise EmulationError(f"the project's tiling refuses the sizes: {said.stderr.strip()}")
    arrays: dict[str, bytes] = {name: _bytes(x) for name, x in inputs.items()}
    arrays |= {name: x.tobytes() for name, x in constants(kernel, keys).items()}
    lines = [f"blocks {cores}", f"report {work / 'report.json'}"]
    for name in passed(kernel):
        if name in arrays:
            (work / name).write_bytes(arrays[name])
            lines.append(f"arg {name} in {len(arrays[name])} {work / name}")
    item = jnp.dtype(kernel.dtype).itemsize
    size = int(np.prod(inputs["query"].shape[:-1]))
    outputs = {"output": size * kernel.value_head_dim * item}
    if kernel.return_lse:
        outputs["lse"] = size * 4
    lines += [f"arg {name} out {n} {work / name}" for name, n in outputs.items()]
    lines.append(f"arg workspace workspace {int(said.stdout)}")
    lines.append(f"arg tiling in {(work / 'tiling').stat().st_size} {work / 'tiling'}")
    lines += [f"policy {p}" for p in policies]
    (work / "job").write_text("\n".join(lines) + "\n")
    ran = subprocess.run(
        [str(program), str(work / "job")], capture_output=True, text=True, check=False
    )
    if not (work / "report.json").exists():
        raise EmulationError(f"the emulator stopped: {ran.stderr.strip()[:2000]}")
    results: dict[str, Any] = {
        name: np.frombuffer((work / name).read_bytes(), np.uint8).copy() for name in outputs
    }
    return {**results, "report": json.loads((work / "report.json").read_text())}
