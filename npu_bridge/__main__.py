"""``python -m npu_bridge``: emit, run, plan, cost, list, check."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import npu_bridge
from npu_bridge import _api, functions, interface
from pasa_jax.core.errors import EmulationError, LoweringError
from pasa_jax.core.schedule import TUNED

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ImportError:
    sys.exit("the command line needs typer and rich: pip install 'pasa-jax[npu]'")

app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)
console = Console(width=None if sys.stdout.isatty() else 120)

Target = Annotated[str, typer.Option(help="910b or 910_93.")]
HeadDim = Annotated[int, typer.Option(help="D: 64, 128, 192 or 256.")]
ValueDim = Annotated[int | None, typer.Option("--value-head-dim", help="E; default D.")]
Dtype = Annotated[str, typer.Option(help="float16 or bfloat16.")]
Shift = Annotated[str, typer.Option(help="none, paper, mean, reference, auto or bound.")]
Causal = Annotated[bool, typer.Option("--causal", help="Query i sees keys up to i.")]
BottomRight = Annotated[
    bool, typer.Option("--bottom-right", help="The last query stands at the last key.")
]
Window = Annotated[
    tuple[int, int] | None, typer.Option(help="Keys to the left and to the right of a query.")
]
SoftCap = Annotated[float | None, typer.Option(help="c of c·tanh(s/c).")]
Bias = Annotated[str | None, typer.Option(help="Axes of a bias: BNTS, 1NTS, B1TS or 11TS.")]
MaskAxes = Annotated[str | None, typer.Option("--mask", help="Axes of a mask of bytes, likewise.")]
Segments = Annotated[
    bool, typer.Option("--segments", help="A query sees the keys of its own segment.")
]
Sinks = Annotated[bool, typer.Option("--sinks", help="Each head has one more key, of value 0.")]
Packed = Annotated[
    bool, typer.Option("--packed", help="Sequences one after another; offsets say where each is.")
]
Repair = Annotated[
    bool,
    typer.Option("--repair/--no-repair", help="Whether what is not finite is computed again."),
]
Lengths = Annotated[bool, typer.Option("--lengths", help="Each batch entry has its own keys.")]
Decode = Annotated[
    bool, typer.Option("--decode", help="One query; its keys are split over the cores.")
]
Lse = Annotated[bool, typer.Option("--lse", help="Also write the log-sum-exp.")]
MaskMod = Annotated[
    str | None, typer.Option(help="MODULE:FUNCTION of mask_mod(b, h, q, kv) -> bool.")
]
ScoreMod = Annotated[
    str | None, typer.Option(help="MODULE:FUNCTION of score_mod(score, b, h, q, kv) -> score.")
]
_ENTRY = "An entry of the dict {}: NAME:DTYPE:AXES, like id:int32:{}; repeatable."
QData = Annotated[list[str], typer.Option(help=_ENTRY.format("q_data", "BT"))]
KvData = Annotated[list[str], typer.Option(help=_ENTRY.format("kv_data", "BS"))]
HeadData = Annotated[list[str], typer.Option(help=_ENTRY.format("head_data", "N"))]
PrecisionOf = Annotated[
    str | None, typer.Option(help="float16, bfloat16, paper (all float16), or scores32.")
]
BlockQ = Annotated[int, typer.Option(help="Queries of a tile: 128.")]
BlockKv = Annotated[int | None, typer.Option(help="Keys of a tile; default the fastest that fits.")]


def _kernel(**options: Any) -> npu_bridge.Kernel:
    from pasa_jax import Precision, Schedule

    block_q, block_kv = options.pop("block_q"), options.pop("block_kv")
    bottom_right = options.pop("bottom_right")
    options |= _functions(options)
    if options["precision"] == "scores32":
        options["precision"] = Precision(probabilities=options["dtype"])
    schedule = None
    if block_kv is not None or block_q != 128:
        target = _api.TARGETS.get(options["target"], "ascend_910b")
        schedule = Schedule(block_q=block_q, block_kv=block_kv or 512, target=target)
    return npu_bridge.kernel(
        schedule=schedule,
        causal_alignment="bottom_right" if bottom_right else "top_left",
        **options,
    )


def _functions(options: dict[str, Any]) -> dict[str, Any]:
    """The functions and the data that the options name."""
    given: dict[str, Any] = {}
    for name in functions.MODS[:2]:
        text = options.get(name)
        given[name] = None if text is None else functions.found(name, text)
    for part in functions.PARTS:
        entries = [x.partition(":") for x in options.get(part) or ()]
        given[part] = {name: functions.shaped(text) for name, _, text in entries} or None
    return given


@app.command()
def emit(
    out: Annotated[Path, typer.Option(help="Folder of the project.")],
    target: Target = "910b",
    head_dim: HeadDim = 128,
    value_head_dim: ValueDim = None,
    dtype: Dtype = "float16",
    shift: Shift = "mean",
    is_causal: Causal = False,
    bottom_right: BottomRight = False,
    local_window_size: Window = None,
    logits_soft_cap: SoftCap = None,
    bias: Bias = None,
    mask: MaskAxes = None,
    segments: Segments = False,
    sinks: Sinks = False,
    lengths: Lengths = False,
    return_lse: Lse = False,
    packed: Packed = False,
    decode: Decode = False,
    repair: Repair = True,
    mask_mod: MaskMod = None,
    score_mod: ScoreMod = None,
    q_data: QData = [],  # noqa: B006
    kv_data: KvData = [],  # noqa: B006
    head_data: HeadData = [],  # noqa: B006
    precision: PrecisionOf = None,
    block_q: BlockQ = 128,
    block_kv: BlockKv = None,
) -> None:
    """Writes a project; batch, heads and lengths come when it runs."""
    options = {name: x for name, x in locals().items() if name != "out"}
    for path in npu_bridge.emit(_kernel(**options), out):
        console.print(str(path), highlight=False)


@app.command()
def run(
    folder: Annotated[Path, typer.Argument(help="An emitted project, edited or not.")],
    query: Annotated[Path | None, typer.Option(help=".npy, [B, T, N, D]")] = None,
    key: Annotated[Path | None, typer.Option(help=".npy, [B, S, K, D]")] = None,
    value: Annotated[Path | None, typer.Option(help=".npy, [B, S, K, E]")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the output there, .npy")] = None,
    batch: Annotated[int, typer.Option(help="B of random inputs; packed: sequences.")] = 1,
    queries: Annotated[int, typer.Option(help="T of random inputs; packed: of each.")] = 200,
    keys: Annotated[int, typer.Option(help="S of random inputs; packed: of each.")] = 700,
    heads: Annotated[int, typer.Option(help="N of random inputs.")] = 2,
    kv_heads: Annotated[int, typer.Option(help="K of random inputs.")] = 1,
    cores: Annotated[int, typer.Option(help="Cube cores.")] = 2,
) -> None:
    """Runs a project's sources on the host emulator and compares with lax; exits 0 only if the
    emulator has no complaint and the numbers agree."""
    import jax.numpy as jnp
    import numpy as np

    from npu_bridge import emulation as runner

    given = {"query": query, "key": key, "value": value}
    if any(given.values()) and not all(given.values()):
        raise typer.BadParameter("give --query, --key and --value, or none of them")
    kernel = runner.read_description(folder)
    if query is not None:
        _check_files(kernel)
        inputs = {n: jnp.asarray(np.load(p), kernel.dtype) for n, p in given.items() if p}
    else:
        inputs = runner.problem(
            kernel, batch=batch, queries=queries, keys=keys, heads=heads, kv_heads=kv_heads
        )
    done = npu_bridge.run(folder, inputs, cores=cores)
    if output is not None:
        np.save(output, done.output)
    for complaint in done.complaints:
        console.print(complaint, style="red", highlight=False)
    console.print(
        f"largest difference from lax {done.error:.2e} of the largest value (allowed "
        f"{done.tolerance:.2e}), {len(done.complaints)} complaints, "
        f"{sum(done.instructions.values())} instructions",
        highlight=False,
    )
    raise typer.Exit(0 if done.ok else 1)


def _check_files(kernel: npu_bridge.Kernel) -> None:
    """Raises where the kernel takes more than query, key and value."""
    more = [a for a in interface.inputs(kernel) if a not in ("query", "key", "value")]
    if more:
        raise typer.BadParameter(
            f"this kernel takes {', '.join(more)} too, which have no option here: call "
            "npu_bridge.run, or leave out --query, --key and --value for random inputs"
        )


@app.command()
def plan(
    target: Target = "910b",
    head_dim: HeadDim = 128,
    value_head_dim: ValueDim = None,
    dtype: Dtype = "float16",
    shift: Shift = "mean",
    is_causal: Causal = False,
    precision: PrecisionOf = None,
    block_q: BlockQ = 128,
    block_kv: BlockKv = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the pipeline there, .png")] = None,
) -> None:
    """Prints where every buffer lies; draws what each pipe does when."""
    options = {name: x for name, x in locals().items() if name != "picture"}
    kernel = _kernel(**options, bottom_right=False)
    console.print(npu_bridge.plan(kernel), highlight=False)
    if picture is not None:
        from npu_bridge.draw import pipeline

        pipeline(npu_bridge.cost(kernel, queries=2048), picture)
        console.print(str(picture), highlight=False)


@app.command()
def cost(
    queries: Annotated[list[int], typer.Option(help="T = S.", min=1)] = [4096, 16384],  # noqa: B006
    heads: Annotated[int, typer.Option(help="N.", min=1)] = 24,
    head_dim: HeadDim = 128,
    is_causal: Causal = False,
    mask_mod: MaskMod = None,
    score_mod: ScoreMod = None,
    q_data: QData = [],  # noqa: B006
    kv_data: KvData = [],  # noqa: B006
    head_data: HeadData = [],  # noqa: B006
) -> None:
    """Prints the predicted time of each way to compute, at its best block."""
    from npu_bridge.tables import table

    of = functions.functions_of(**_functions(locals()))
    columns, rows = table(
        queries, heads=heads, head_dim=head_dim, is_causal=is_causal, functions=of
    )
    output = Table(*columns)
    for row in rows:
        output.add_row(*row)
    console.print(output)


@app.command()
def tune(
    output: Annotated[Path, typer.Option(help="The table, .json")] = TUNED / "ascend_910b.json",
) -> None:
    """Writes the table of predicted schedules that `Schedule.for_target` reads."""
    import json
    from datetime import UTC, datetime

    from npu_bridge.tables import tuned_table

    table = tuned_table(datetime.now(UTC).date().isoformat())
    output.write_text(json.dumps(table, indent=1) + "\n")
    console.print(str(output), highlight=False)


@app.command("list")
def list_() -> None:
    """Prints what can be emitted."""
    from npu_bridge.lower import RULES

    console.print(f"targets: {', '.join(_api.TARGETS)}", highlight=False)
    console.print(f"shifts: {', '.join(_api.SHIFTS)}", highlight=False)
    console.print(f"types: {', '.join(_api.DTYPES)}; head sizes 64, 128, 192, 256", highlight=False)
    console.print(f"primitives: {', '.join(sorted(RULES))}", highlight=False)


@app.command()
def check(folder: Annotated[Path, typer.Argument(help="An emitted project.")]) -> None:
    """Checks a project's text without running it; exits 0 if nothing is wrong."""
    findings = npu_bridge.check(folder)
    for line in findings:
        console.print(line, style="red", highlight=False)
    console.print(f"{len(findings)} findings", highlight=False)
    raise typer.Exit(1 if findings else 0)


def main() -> None:
    """Exits 2, with one message, where the call is wrong."""
    try:
        app()
    except (ValueError, OSError, EmulationError, LoweringError) as error:
        Console(stderr=True, soft_wrap=True).print(str(error), style="red", highlight=False)
        sys.exit(2)


if __name__ == "__main__":
    main()
