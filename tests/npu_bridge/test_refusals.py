"""What npu_bridge refuses, and how: the argument, what is allowed, what was seen, the way out."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import npu_bridge
from npu_bridge import emulation, project
from npu_bridge.functions import shaped
from npu_bridge.program import build
from npu_bridge.specification import Kernel
from pasa_jax.core.errors import EmulationError, PlanError
from pasa_jax.core.precision import Precision
from pasa_jax.core.schedule import Schedule
from tests import gallery

main = pytest.importorskip("npu_bridge.__main__", reason="the command line needs typer").main

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")
SCHEDULE = Schedule(block_q=128, block_kv=128, target="ascend_910b")
HALF = Precision.named("float16")
EQUAL_TYPES = (
    "`precision.probabilities` must be the type of the values, since the cube unit multiplies "
    "equal types; got "
)
NO_AXES = "It has the axes [B, N, T, S], and packed sequences have no T and S of their own."

# Arguments of `kernel` -> the whole message.
WRONG = [
    ({"target": "a100"}, "`target` must be one of '910b', '910_93'; got 'a100'."),
    ({"dtype": "float32"}, "`dtype` must be one of 'float16', 'bfloat16'; got 'float32'."),
    (
        {"shift": "sage"},
        "`shift` must be one of 'none', 'paper', 'mean', 'reference', 'auto', 'bound'; got 'sage'.",
    ),
    (
        {"dropout_rate": 0.1},
        "`dropout_rate` must be 0: emitted kernels do not drop weights; got 0.1. Train with "
        "pasa_jax.dot_product_attention, which drops weights.",
    ),
    ({"bias": "NTS"}, "`bias` must be one of 'BNTS', '1NTS', 'B1TS', '11TS'; got 'NTS'."),
    ({"beta": 0.9}, "`beta` must be given with shift='paper' only; got 0.9."),
    ({"beta": 1.5, "shift": "paper"}, "`beta` must lie strictly between 0 and 1; got 1.5."),
    (
        {"causal_alignment": "left"},
        "`causal_alignment` must be one of 'top_left', 'bottom_right'; got 'left'.",
    ),
    *(
        (
            {"local_window_size": window},
            f"`local_window_size` must be a non-negative int or a pair of them; got {window}.",
        )
        for window in (-1, (1, 2, 3), (4, -4))
    ),
    *(
        (
            {"logits_soft_cap": cap},
            f"`logits_soft_cap` must be a positive, finite number; got {cap}.",
        )
        for cap in (-1.0, 0.0, float("inf"))
    ),
    (
        {"precision": "half"},
        "`precision` must be one of 'float16', 'bfloat16', 'float32', 'float64', 'paper', "
        "'int8'; "
        "got 'half'.",
    ),
    (
        {"precision": "float64"},
        "`precision.scores` must be one of 'float16', 'bfloat16', 'float32'; got 'float64'.",
    ),
    (
        {"precision": replace(HALF, statistics="float64")},
        "`precision.statistics` must be one of 'float16', 'float32'; got 'float64'.",
    ),
    (
        {"precision": replace(HALF, exponential="bfloat16")},
        "`precision.exponential` must be one of 'float16', 'float32'; got 'bfloat16'.",
    ),
    (
        {"precision": replace(HALF, exponential="cubic")},
        "`precision.exponential` must be one of 'float16', 'float32'; got 'cubic'.",
    ),
    (
        {"precision": replace(HALF, products="float16")},
        "`precision.products` must be one of 'float32'; got 'float16'.",
    ),
    (
        {"shift": "bound"},
        "`dtype` must be 'bfloat16' for shift='bound', whose weights have not float16's range; got "
        "'float16'. Use shift='mean'.",
    ),
    (
        {"shift": "bound", "dtype": "bfloat16", "bias": "11TS"},
        "`bias` must not be given for shift='bound', whose proof looks at positions alone; got "
        "'11TS'. Use shift='mean'.",
    ),
    (
        {"shift": "bound", "dtype": "bfloat16", "precision": "bfloat16"},
        "`precision` must be None for shift='bound', which stores scores in float16 and P in "
        "bfloat16; got 'bfloat16'.",
    ),
    (
        {"schedule": replace(SCHEDULE, target="cpu")},
        "`schedule.target` must be 'ascend_910b'; got cpu.",
    ),
    ({"precision": "float32"}, EQUAL_TYPES + "float32 and float16"),
    ({"dtype": "bfloat16", "precision": HALF}, EQUAL_TYPES + "float16 and bfloat16"),
    *(
        ({name: size}, f"`{name}` must be 64, 128, 192 or 256; got {size}")
        for name, size in (("head_dim", 96), ("head_dim", 0), ("value_head_dim", 320))
    ),
    (
        {"schedule": replace(SCHEDULE, block_q=64)},
        "`schedule.block_q` must be 128, the rows of a cube tile; got 64",
    ),
    *(
        (
            {"packed": True, name: given},
            f"`{name}` must not be given for a packed kernel; got {given!r}. {why}",
        )
        for name, given, why in (
            ("bias", "11TS", NO_AXES),
            ("mask", "11TS", NO_AXES),
            ("segments", True, "The offsets say already which keys a query sees."),
            ("lengths", True, "The offsets say already how many keys a sequence has."),
            ("decode", True, "Use packed=False: with one query each, the sequences are a batch."),
        )
    ),
    (
        {"packed": True, "shift": "paper"},
        "`shift` must not be 'paper' for a packed kernel; got 'paper'. Its matrix knows one last "
        "block, and each sequence has its own. Use 'mean'.",
    ),
    (
        {"schedule": replace(SCHEDULE, block_kv=200)},
        "`schedule.block_kv` must be a multiple of 128; got 200",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[str(list(w[0])) for w in WRONG])
def test_a_wrong_argument(arguments, message):
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}$"):
        npu_bridge.kernel(**{"schedule": SCHEDULE, **arguments})


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("310p", "its cube and vector units are coupled and it has no Fixpipe"),
        ("950", "its L0C reaches the vector unit directly"),
    ],
)
def test_a_chip_that_is_not_supported(target, reason):
    with pytest.raises(PlanError) as error:
        npu_bridge.kernel(target=target)
    assert str(error.value).startswith(f"`target` {target!r} is not supported: {reason}")
    assert str(error.value).endswith("Use '910b'.")


# What does not fit.

LARGE = Kernel(
    head_dim=256,
    value_head_dim=256,
    dtype="bfloat16",
    shift="mean",
    precision=Precision.named("bfloat16"),
    schedule=replace(SCHEDULE, block_kv=512),
    bias="BNTS",
    return_lse=True,
)


@pytest.mark.parametrize("block_kv", [512, 1024])
def test_what_does_not_fit_says_what_would(block_kv):
    schedule = replace(SCHEDULE, block_kv=block_kv)
    with pytest.raises(PlanError) as error:
        build(replace(LARGE, schedule=schedule))
    text = str(error.value)
    found = re.fullmatch(
        r"(?:a tile of 128 × \d+|\w+) wants (\d+) bytes of UB; there are (\d+)(?: left)?\. "
        r"block_kv = (\d+) would fit\.",
        text,
    )
    assert found is not None, text
    assert int(found[1]) > int(found[2])
    nearest = int(found[3])
    build(replace(LARGE, schedule=replace(schedule, block_kv=nearest)))
    with pytest.raises(PlanError):
        build(replace(LARGE, schedule=replace(schedule, block_kv=nearest + 128)))


def test_rows_beyond_a_repeat_stride():
    schedule = replace(SCHEDULE, block_kv=4096)
    kernel = replace(LARGE, head_dim=64, value_head_dim=64, dtype="float16", precision=HALF)
    with pytest.raises(PlanError, match=r"\. block_kv = \d+ would fit\.$"):
        build(replace(kernel, schedule=schedule, bias=None))


# The tiling's and the runner's refusals, and the command line, on one emitted project.

PAPER = {
    "head_dim": 64,
    "shift": "paper",
    "precision": HALF,
    "schedule": SCHEDULE,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("refusals")
    npu_bridge.emit(npu_bridge.kernel(**PAPER), place)
    return place


@pytest.fixture(scope="module")
def program(folder, tmp_path_factory):
    return emulation.compiled(folder, to=tmp_path_factory.mktemp("program"), flags=("-O0",))


AT_LEAST = "every size must be at least 1"
SIZES = {"batch": 1, "heads": 2, "kvHeads": 1, "queries": 20, "keys": 200, "cores": 2}


@needs_compiler
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        *(({name: 0}, AT_LEAST) for name in SIZES),
        ({"keys": -5}, AT_LEAST),
        (
            {"heads": 3, "kvHeads": 2},
            "the number of query heads must be a multiple of the number of key heads",
        ),
        *(
            ({name: 2**24 + 1}, "at most 2^24 queries and keys: positions are compared in float32")
            for name in ("queries", "keys")
        ),
        (
            {"heads": 1024, "kvHeads": 1024},
            "the number of key heads times the head size must be below 65536",
        ),
        ({"scale": 0.25}, "the shift 'paper' holds 1/sqrt(D) in its matrix: no other scale"),
        ({}, None),
        ({"heads": 1023, "kvHeads": 1023}, None),
        ({"queries": 2**24}, None),
    ],
)
def test_the_tiling_refuses(program, tmp_path, changed, message):
    values = [str(x) for x in {**SIZES, "scale": 0.125, **changed}.values()]
    said = subprocess.run(
        [program, "tiling", *values, tmp_path / "tiling"], capture_output=True, text=True
    )
    assert said.stderr.strip() == (message or "")
    assert said.returncode == (2 if message else 0)


@needs_compiler
def test_the_runner_passes_the_tilings_refusal_on(folder, program):
    kernel = project.read_description(folder)
    inputs = emulation.problem(kernel, queries=8, keys=8)
    with pytest.raises(EmulationError, match="tiling refuses the sizes: every size must be at"):
        emulation.run(folder, inputs, program=program, cores=0, want=(np.zeros(1), None))


@needs_compiler
@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("PipeBarrier<PIPE_V>", "PipeBarrier<PIPE_W>", "PIPE_W"),
        ("false, row == 0}", "false, (row == 0) & slot}", "narrowing conversion"),
    ],
)
def test_sources_that_do_not_compile(folder, tmp_path, old, new, said):
    shutil.copytree(folder, tmp_path / "edited")
    path = tmp_path / "edited" / "pasa_attention.cpp"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(EmulationError, match=rf"g\+\+ refuses the sources in .*(.|\n)*{said}"):
        emulation.compiled(tmp_path / "edited", flags=("-fsyntax-only",))


def test_without_a_compiler(folder, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(EmulationError, match=r"^g\+\+ is not installed: .* \(apt install g\+\+\)$"):
        emulation.compiled(folder)


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command line in this process; gives its exit code and what it said."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["npu_bridge", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert "Traceback" not in said.out + said.err
        return ended.value.code or 0, said.out, said.err

    return run


SMALL = ("--head-dim", 64, "--block-kv", 128)
FILES = ("--query", "query.npy", "--key", "key.npy", "--value", "value.npy")
RUN = ("--queries", 8, "--keys", 130, "--heads", 1, "--cores", 1)


@needs_compiler
def test_emit_check_run(command, folder, program, tmp_path, monkeypatch):
    options = (*SMALL, "--shift", "paper", "--precision", "float16")
    code, out, _ = command("emit", "--out", tmp_path, *options)
    assert code == 0
    source = tmp_path / "pasa_attention.cpp"
    assert source.read_text() == (folder / source.name).read_text()  # what `program` was made of
    assert {Path(line).name for line in out.splitlines()} >= {"pasa_attention.cpp", "kernel.json"}
    assert command("check", tmp_path)[:2] == (0, "0 findings\n")
    output, compiled = tmp_path / "output.npy", emulation.compiled
    monkeypatch.setattr(emulation, "compiled", lambda *a, **k: program)
    code, out, _ = command("run", tmp_path, *RUN, "--output", output)
    assert code == 0
    assert re.search(r"largest difference from lax .*, 0 complaints, \d+ instructions", out)
    assert np.load(output).shape == (1, 8, 1, 64)

    head, tail = source.read_text().split("void Softmax(", 1)
    before, after = tail.split("Exp(", 1)
    at = before.rindex("PipeBarrier<PIPE_V>();")
    source.write_text(f"{head}void Softmax({before[:at]}//{before[at:]}Exp({after}")
    code, out, _ = command("check", tmp_path)
    assert code == 1
    assert "pasa_attention.cpp is not what this version emits" in out
    # The command compiles with -O1, which takes twice as long.
    monkeypatch.setattr(emulation, "compiled", lambda *a, **k: compiled(*a, **k, flags=("-O0",)))
    code, out, _ = command("run", tmp_path, *RUN)
    assert code == 1
    assert "0 complaints" not in out


# Options of `emit` beyond those above -> the arguments of `kernel`.
EMITTED = {
    "mask and segments": (
        ("--mask", "B1TS", "--segments", "--no-repair", "--causal", "--bottom-right"),
        {
            "mask": "B1TS",
            "segments": True,
            "repair": False,
            "is_causal": True,
            "causal_alignment": "bottom_right",
        },
    ),
    "packed": (
        ("--packed", "--sinks", "--lse", "--local-window-size", 90, 20),
        {"packed": True, "sinks": True, "return_lse": True, "local_window_size": (90, 20)},
    ),
    "auto": (("--shift", "auto", "--lengths"), {"shift": "auto", "lengths": True}),
    "functions": (
        (
            *("--mask-mod", "tests.gallery:document_mod"),
            *("--score-mod", "tests.gallery:alibi_mod"),
            *("--q-data", "document:int32:BT", "--kv-data", "document:int32:1S"),
            *("--head-data", "slope:float32:N"),
        ),
        {
            "mask_mod": gallery.document_mod,
            "score_mod": gallery.alibi_mod,
            "q_data": {"document": shaped("int32:BT")},
            "kv_data": {"document": shaped("int32:1S")},
            "head_data": {"slope": shaped("float32:N")},
        },
    ),
}


@pytest.mark.parametrize("name", EMITTED)
def test_emit_takes_what_a_kernel_takes(command, tmp_path, name):
    options, arguments = EMITTED[name]
    code, _, _ = command("emit", "--out", tmp_path, *SMALL, *options)
    assert code == 0
    kernel = npu_bridge.kernel(head_dim=64, schedule=SCHEDULE, **arguments)
    assert project.read_description(tmp_path) == kernel


@pytest.mark.full
@needs_compiler
def test_a_packed_project_runs(command, tmp_path, monkeypatch):
    code, _, _ = command("emit", "--out", tmp_path, *SMALL, "--packed", "--lse", "--no-repair")
    assert code == 0
    compiled, output = emulation.compiled, tmp_path / "output.npy"
    monkeypatch.setattr(emulation, "compiled", lambda *a, **k: compiled(*a, **k, flags=("-O0",)))
    code, out, _ = command("run", tmp_path, *RUN, "--batch", 3, "--output", output)
    assert code == 0
    assert ", 0 complaints, " in out
    kernel = project.read_description(tmp_path)
    inputs = emulation.problem(kernel, batch=3, queries=8, keys=130, heads=1)
    want, _ = emulation.expected(kernel, inputs)
    np.testing.assert_allclose(np.load(output), want, atol=2 * 2**-10)
    code, _, err = command("run", tmp_path, *FILES)
    assert code == 2
    said = re.sub(r"\s*│?\n\s*│?\s*", " ", err)
    assert "takes queryOffsets, keyOffsets too, which have no option here" in said


def test_plan_and_list(command):
    code, out, _ = command("plan", *SMALL)
    assert code == 0
    assert out.startswith("Schedule: 128 queries x 128 keys a tile")
    assert "scoresIn: S' of a slab, 2 slots" in out
    code, out, _ = command("list")
    assert code == 0
    assert "targets: 910b, 910_93" in out
    assert "primitives: abs, add, and" in out


@pytest.mark.full
def test_cost(command):
    code, out, _ = command("cost", "--queries", 1024, "--head-dim", 64)
    assert code == 0
    assert "TFLOP/s" in out
    assert len(re.findall(r"^│ 1024 ", out, re.MULTILINE)) >= 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["emit"], "Missing option '--out'"),
        (["nothing"], "No such command 'nothing'"),
        (["emit", "--out", "x", "--target", "950"], "`target` '950' is not supported"),
        (["emit", "--out", "x", "--target", "tpu"], "`target` must be one of '910b', '910_93'"),
        (["emit", "--out", "x", "--head-dim", "96", "--block-kv", "128"], "`head_dim` must be 64,"),
        (["emit", "--out", "x", "--head-dim", "many"], "Invalid value for '--head-dim'"),
        (["emit", "--out", "/dev/null/x", *SMALL], "Not a directory: '/dev/null/x'"),
        (["plan", "--shift", "sage"], "`shift` must be one of 'none', 'paper', 'mean',"),
        (["plan", "--block-kv", "200"], "`schedule.block_kv` must be a multiple of 128; got 200"),
        (["emit", "--out", "x", "--mask-mod", "tests.gallery:no"], "`mask_mod` must be a functio"),
        (["emit", "--out", "x", "--score-mod", "sine"], "module:name; got 'sine'"),
        (
            ["emit", "--out", "x", "--q-data", "id:int8:T"],
            "`data` must be dtype:axes, as in int32:BT, with float32, int32 or bool; got 'int8:T'",
        ),
        (["run", "nowhere"], "No such file or directory: 'nowhere/kernel.json'"),
        (["cost", "--queries", "0"], "Invalid value for '--queries'"),
    ],
)
def test_a_wrong_command_line(command, arguments, message):
    code, _, err = command(*arguments)
    assert code == 2
    assert message in re.sub(r"\s*│?\n\s*│?\s*", " ", err)


def test_inputs_are_given_all_or_none(command, folder):
    code, _, err = command("run", folder, "--query", "query.npy")
    assert code == 2
    assert "give --query, --key and --value, or none of them" in err


def test_check_of_a_folder_that_holds_no_project(command, tmp_path):
    code, out, _ = command("check", tmp_path)
    assert code == 1
    assert "there is no pasa_attention.cpp in" in out
