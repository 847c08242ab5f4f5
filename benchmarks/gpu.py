"""Speed and error of the GPU kernel beside the attention that people use on GPUs now.

    python benchmarks/gpu.py --output out/gpu.json
    python benchmarks/gpu.py --length 2048 --head-dim 128 --rounds 50

Needs a CUDA GPU and `pip install "jax[cuda12]"`; tokamax and torch take part where they are
installed. B = 1 and 8 heads up to S = T = 8192, then fewer, so that every case has work for a whole
chip. Every round calls each contender once, in an order that changes; what is shown is the median,
TFLOP/s of 4·S·T·D·N (half of that under a causal mask), the ratio to cuDNN, and the error relative
to the largest output against float64 in 64 rows. "biased" is the paper's data: uniform around 30
with amplitude 0.5. Prints numbers and asserts nothing.
"""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from pasa_jax import Precision, dot_product_attention
from pasa_jax.evidence.plain import numpy_attention

BATCH = 1
LENGTHS = [1024, 2048, 4096, 8192, 16384, 32768]
ROWS = 64  # whose error is measured
CUDNN = "jax.nn cudnn"
HALF = Precision(scores="float16", probabilities="float16", products="float16")

Attention = Callable[[Any, Any, Any], Any]


@dataclass(frozen=True)
class Case:
    """One self-attention."""

    length: int
    head_dim: int
    dtype: str
    causal: bool
    data: str

    @property
    def heads(self) -> int:
        return max(1, min(8, 8 * 8192 // self.length))

    @property
    def flops(self) -> float:
        whole = 4.0 * self.length**2 * self.head_dim * self.heads * BATCH
        return whole / 2 if self.causal else whole

    def arrays(self) -> list[np.ndarray]:
        """Query, key and value, [B, S, N, D] in float32, as rounded to the type."""
        rng = np.random.default_rng(0)
        shape = (BATCH, self.length, self.heads, self.head_dim)
        v = rng.standard_normal(shape, np.float32)
        if self.data == "biased":
            q, k = (rng.uniform(29.5, 30.5, shape).astype(np.float32) for _ in range(2))
        else:
            q, k = (rng.standard_normal(shape, np.float32) for _ in range(2))
        return [np.asarray(jnp.asarray(x, self.dtype).astype(jnp.float32)) for x in (q, k, v)]


def contenders(case: Case) -> dict[str, Attention]:
    """What is installed and takes the case."""

    def ours(**options: Any) -> Attention:
        return jax.jit(
            lambda q, k, v: dot_product_attention(
                q, k, v, is_causal=case.causal, implementation="pallas_gpu", **options
            )
        )

    def jax_nn(implementation: Any) -> Attention:
        return jax.jit(
            lambda q, k, v: jax.nn.dot_product_attention(
                q, k, v, is_causal=case.causal, implementation=implementation
            )
        )

    calls = {"ours": ours()}
    if case.dtype == "float16":
        calls["ours, float16 products, mean"] = ours(precision=HALF, shift="mean")
        half = Precision(probabilities="float16", exponential="float16")
        calls["ours, float16 exponentials"] = ours(precision=half)
    calls[CUDNN] = jax_nn("cudnn")
    if case.length <= 8192:  # it keeps all scores
        calls["jax.nn xla"] = jax_nn("xla")
    calls["jax's Pallas kernel"] = jax.jit(_stock(case))
    if importlib.util.find_spec("tokamax"):
        tokamax = importlib.import_module("tokamax")
        calls["tokamax"] = jax.jit(
            lambda q, k, v: tokamax.dot_product_attention(q, k, v, is_causal=case.causal)
        )
    if importlib.util.find_spec("torch"):
        calls["torch SDPA"] = _torch(case)
    return calls


def _stock(case: Case) -> Attention:
    from jax.experimental.pallas.ops.gpu import attention

    def forward(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        scale = 1 / math.sqrt(case.head_dim)
        return attention.mha(q, k, v, segment_ids=None, sm_scale=scale, causal=case.causal)

    return forward


def _torch(case: Case) -> Attention:
    torch = importlib.import_module("torch")
    functional = importlib.import_module("torch.nn.functional")

    def forward(*arrays: jax.Array) -> Any:
        q, k, v = (torch.utils.dlpack.from_dlpack(x).transpose(1, 2) for x in arrays)
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=case.causal)
        torch.cuda.synchronize()
        return jnp.asarray(out.transpose(1, 2).float().cpu().numpy())

    return forward


def exact(case: Case, arrays: list[np.ndarray], rows: np.ndarray) -> np.ndarray:
    """[rows, N, D] in float64."""
    q, k, v = (x[0] for x in arrays)
    visible = np.arange(case.length) <= rows[:, None] if case.causal else None
    return numpy_attention(q[rows], k, v, visible=visible)


@dataclass
class Result:
    """Of one contender in one case."""

    contender: str
    seconds: float | None = None
    tflops: float | None = None
    error: float | None = None
    fails: str | None = None


def measure(case: Case, rounds: int) -> list[Result]:
    """Every contender's result, interleaved."""
    arrays = case.arrays()
    operands = [jnp.asarray(x, case.dtype) for x in arrays]
    rows = np.sort(np.random.default_rng(1).integers(0, case.length, ROWS))
    true = exact(case, arrays, rows)
    calls, results = {}, {}
    for name, call in contenders(case).items():
        results[name] = Result(name)
        try:
            out = np.asarray(call(*operands)[0, rows].astype(jnp.float32), np.float64)
        except Exception as error:  # a contender that cannot run the case is a result
            results[name].fails = f"{type(error).__name__}: {str(error).splitlines()[0]}"[:200]
            continue
        results[name].error = float(np.abs(out - true).max() / np.abs(true).max())
        calls[name] = call
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for r in range(rounds):
        names = list(calls)
        for name in names[r % len(names) :] + names[: r % len(names)]:
            start = time.perf_counter()
            jax.block_until_ready(calls[name](*operands))
            seconds[name].append(time.perf_counter() - start)
    for name, taken in seconds.items():
        results[name].seconds = statistics.median(taken)
        results[name].tflops = case.flops / statistics.median(taken) / 1e12
    return list(results.values())


def main(
    length: Annotated[list[int], typer.Option(help="S = T.")] = LENGTHS,
    head_dim: Annotated[list[int], typer.Option(help="D.")] = [64, 128],  # noqa: B006
    dtype: Annotated[list[str], typer.Option(help="Types.")] = ["float16", "bfloat16"],  # noqa: B006
    rounds: Annotated[int, typer.Option(help="Calls of each contender.")] = 30,
    output: Annotated[Path | None, typer.Option(help="Write every figure there as JSON.")] = None,
) -> None:
    """Prints the table; fails where there is no CUDA GPU."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        typer.echo(f"this machine's first device is {device.device_kind}: a CUDA GPU is needed")
        raise typer.Exit(2)
    columns = ("S", "D", "type", "mask", "data", "contender", "µs", "TFLOP/s", "/ cuDNN", "error")
    table, records = Table(*columns), []
    for n, d, t, causal, data in product(
        length, head_dim, dtype, (False, True), ("normal", "biased")
    ):
        case = Case(n, d, t, causal, data)
        results = measure(case, rounds)
        cudnn = next((r.tflops for r in results if r.contender == CUDNN), None)
        for r in results:
            records.append({**asdict(case), **asdict(r)})
            figures = [r.fails or "", "", "", ""]
            if r.seconds is not None and r.tflops is not None:
                ratio = f"{r.tflops / cudnn:.2f}" if cudnn else ""
                figures = [f"{1e6 * r.seconds:.0f}", f"{r.tflops:.0f}", ratio, f"{r.error:.1e}"]
            table.add_row(
                str(n), str(d), t, "causal" if causal else "full", data, r.contender, *figures
            )
    versions = {name: version(name) for name in ("jax", "jaxlib", "numpy")}
    console = Console(width=150)
    console.print(table)
    console.print(f"{device.device_kind}, {datetime.now(UTC).date()}, {versions}")
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        head = {"date": datetime.now(UTC).date().isoformat(), "device": device.device_kind}
        output.write_text(json.dumps({**head, "versions": versions, "results": records}, indent=1))


if __name__ == "__main__":
    typer.run(main)
