"""Our prediction of the emitted kernel beside Huawei's performance model of a flash attention.

    python benchmarks/npu_model.py --model-python PATH --output out/npu_model.json

PATH is the Python of an environment with `pip install msopmodeling` (it pins its numpy). One head,
T = S = 4096, D = 128, float16, 910B1; rows are the keys that are handed over at once. Their model
knows float32 hand-over only. Both are models: neither was compared with a chip here.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import npu_bridge
from npu_bridge.rates import Rates
from npu_bridge.tables import NAMED
from pasa_jax import Schedule

BLOCKS = (128, 256, 512, 1024)
OURS = ("none, float32 hand-over", "none, float16 tiles", "mean, float16 tiles", "bound, bfloat16")
_WORKER = """
import json, sys, tilesim
root = list(tilesim.__path__)[0]
sys.path.insert(0, root)
from api.operator_api.op_latency_predict import op_latency_predict
latencies = {}
for blocks in (1, 2, 4, 8):
    tiles = {"t_s1c": 128, "t_s1v": 64, "t_d1": 128, "t_d2": 128, "t_dv": 128, "t_s2c": 128,
             "t_s2v": 128, "n_s2": blocks}
    shape = [1, 4096, 1, 128]
    said = op_latency_predict({
        "op_name": "FlashAttention", "input_shapes": [shape] * 3, "output_shapes": [shape],
        "input_precision": ["FLOAT16", "FLOAT16"], "output_precision": ["FLOAT16"],
        "aic_core_num": 24, "aiv_core_num": 48, "backend_type": "eng",
        "accelerator": root + "/core/config/arc_config/910B1/910B1.yaml",
        "extra_param": {"tuning_candidates": [tiles]}})
    said = said[0] if isinstance(said, tuple) else said
    parts = said["component_latency"]
    latencies[128 * blocks] = {"total": said["latency"], "cube": parts["CUBE"],
                               "fixpipe": parts["FIXPIPE"], "vector": parts["VEC"]}
print("RESULT" + json.dumps(latencies))
"""


def theirs(python: Path) -> dict[int, dict[str, float]]:
    """Microseconds by keys per hand-over, as Huawei's model says."""
    command = [str(python.absolute()), "-c", _WORKER]
    with tempfile.TemporaryDirectory() as place:  # it leaves a trace of megabytes where it runs
        said = subprocess.run(command, cwd=place, capture_output=True, text=True, check=True)
    line = next(x for x in said.stdout.splitlines() if x.startswith("RESULT"))
    return {int(n): x for n, x in json.loads(line.removeprefix("RESULT")).items()}


def ours(name: str, block: int) -> dict[str, float]:
    """The same of the emitted kernel."""
    shift, precision = NAMED[name]
    schedule = Schedule(block_q=128, block_kv=block, target="ascend_910b")
    dtype = precision.probabilities
    kernel = npu_bridge.kernel(shift=shift, precision=precision, schedule=schedule, dtype=dtype)
    cost = npu_bridge.cost(kernel, queries=4096, heads=1, items=None)
    per_cycle = 1e6 / Rates().clock
    busy = {"cube": "AIC M", "fixpipe": "AIC FIX", "vector": "AIV V"}
    parts = {name: cost.busy[pipe] * per_cycle for name, pipe in busy.items()}
    return {"total": cost.seconds * 1e6, **parts}


def main(
    model_python: Annotated[Path | None, typer.Option(help="Python with msopmodeling.")] = None,
    output: Annotated[Path | None, typer.Option(help="Also write every figure there.")] = None,
) -> None:
    """Prints microseconds of both models."""
    microseconds: dict[str, dict[int, dict[str, float]]] = {}
    if model_python is not None:
        microseconds["Huawei's model, float32 hand-over"] = theirs(model_python)
    for name in OURS:
        microseconds[f"ours: {name}"] = {block: ours(name, block) for block in BLOCKS}
    table = Table("kernel", "keys a tile", "total", "cube", "fixpipe", "vector")
    for name, blocks in microseconds.items():
        for block, parts in blocks.items():
            figures: list[Any] = [f"{parts[x]:.0f}" for x in ("total", "cube", "fixpipe", "vector")]
            table.add_row(name, str(block), *figures)
    Console(width=120).print(table)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(microseconds, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
