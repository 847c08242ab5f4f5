"""Kernels with masks and scores as functions, against the plain formula and lax."""

from __future__ import annotations

import functools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import npu_bridge
from npu_bridge import emulation, functions, interface, interpreter, project, stages
from npu_bridge.cores import tile
from npu_bridge.expressions import Scalar
from npu_bridge.lower import Vector, conditions, whole
from npu_bridge.program import build
from pasa_jax import Precision, Schedule
from pasa_jax.core.errors import LoweringError
from pasa_jax.core.mods import Mods
from pasa_jax.core.tile import Numerics
from tests import gallery
from tests.npu_bridge.functions_cases import CASES, Case, Sizes, plain, scores
from tests.thin import only

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="g++ is not installed: apt install g++"
)
# How far the output may be from the plain formula: scores of 16 bits are off by so much.
SCHEDULE = Schedule(block_q=128, block_kv=128, target="ascend_910b")
BOUNDS = {"float16": 3e-3, "bfloat16": 2.5e-2}


def interpreted(kernel: npu_bridge.Kernel, inputs: dict[str, Any]) -> np.ndarray:
    arrays = {name: np.asarray(x) for name, x in inputs.items()}
    return interpreter.run(build(kernel), arrays, cores=3)["output"].astype(np.float64)


def error(case: Case, inputs: dict[str, Any], output: np.ndarray) -> float:
    """The largest difference from the plain formula."""
    return float(np.abs(output - plain(case, inputs)).max())


_OFTEN = ("causal", "window", "prefix", "documents", "dilated", "positions", "ALiBi", "soft cap")


@pytest.mark.parametrize("name", only(_OFTEN, CASES))
def test_output_is_that_of_the_plain_formula(name: str) -> None:
    case = CASES[name]
    dtype = "bfloat16" if list(CASES).index(name) % 4 == 1 else "float16"
    kernel = case.kernel(head_dim=64, dtype=dtype)
    inputs = case.inputs(kernel)
    assert error(case, inputs, interpreted(kernel, inputs)) < BOUNDS[dtype]


# Faults of the lowering, each of which the comparison above must show.


def fresh(case: Case) -> Case:
    """The case with functions that no trace knows yet."""

    def renewed(function: Any) -> Any:
        return functools.wraps(function)(lambda *x, **data: function(*x, **data))

    mods = {n: renewed(f) for n, f in case.options.items() if n in functions.MODS}
    return replace(case, options={**case.options, **mods})


def _first_head(patch: pytest.MonkeyPatch) -> None:
    place = tile._place_of
    patch.setattr(tile, "_place_of", lambda *x: place(*x).replace("+ head", "+ 0"))


def _first_entry(patch: pytest.MonkeyPatch) -> None:
    place = tile._place_of
    patch.setattr(tile, "_place_of", lambda *x: place(*x).replace("(entry)", "(0)"))


def _late_key(patch: pytest.MonkeyPatch) -> None:
    place = Mods.place

    def moved(self: Mods, *x: Any, **options: Any) -> Any:
        found = place(self, *x, **options)
        return found._replace(kv=found.kv + 1)

    patch.setattr(Mods, "place", moved)


def _later_slab(patch: pytest.MonkeyPatch) -> None:
    place = tile._place_of
    patch.setattr(tile, "_place_of", lambda *x: place(*x).replace("+ first", "+ start"))


def _no_slope(patch: pytest.MonkeyPatch) -> None:
    read = tile.Tile._input
    patch.setattr(
        tile.Tile, "_input", lambda s, n: Scalar(0.0) if n == "head_data_0" else read(s, n)
    )


def _inverted(patch: pytest.MonkeyPatch) -> None:
    shows = Mods.shows
    patch.setattr(Mods, "shows", lambda *x: ~shows(*x))


def _not_negated(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(conditions, "negated", lambda to, x: x)


def _as_float32(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(whole, "of_one_type", lambda to, eqn, *x: tuple(_cast(to, v, "float") for v in x))
    patch.setattr(whole, "_any_size", lambda x: False)


def _cast(to: Any, x: Any, dtype: str) -> Any:
    return to.cast(x, dtype, "cast") if isinstance(x, Vector) else x


def _rounded_quotient(patch: pytest.MonkeyPatch) -> None:
    rounded = whole.rounded
    patch.setattr(whole, "rounded", lambda to, x, mode, *more: rounded(to, x, "RINT", *more))


def _offset_kept(patch: pytest.MonkeyPatch) -> None:
    """The function is given scores less what the shift takes off."""
    patch.setattr(Numerics, "needs_scores", property(lambda self: False))


# Fault -> what it is shown by, and how large the offset of the keys is.
FAULTS: dict[str, tuple[Any, str, float]] = {
    "data of the first head": (_first_head, "ALiBi", 0),
    "data of the first batch entry": (_first_entry, "documents", 0),
    "positions one late": (_late_key, "window", 0),
    "data of the first slab": (_later_slab, "tokens", 0),
    "a slope dropped": (_no_slope, "ALiBi", 0),
    "a mask inverted": (_inverted, "causal", 0),
    "a condition not negated": (_not_negated, "mixed", 0),
    "int32 in float32": (_as_float32, "positions", 0),
    "a quotient rounded": (_rounded_quotient, "neighbourhood", 0),
    "an offset not given back": (_offset_kept, "soft cap", 1),
}


_OFTEN_FAULTS = (
    "data of the first head",
    "positions one late",
    "a slope dropped",
    "a mask inverted",
    "int32 in float32",
)


@pytest.mark.parametrize("name", only(_OFTEN_FAULTS, FAULTS))
def test_a_fault_is_shown(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault, shown_by, mean = FAULTS[name]
    case = fresh(CASES[shown_by])
    kernel = case.kernel(head_dim=64)
    inputs = case.inputs(kernel, mean=mean)
    if mean:
        assert error(case, inputs, interpreted(kernel, inputs)) < BOUNDS["float16"]
    fault(monkeypatch)
    case = fresh(case)
    kernel = case.kernel(head_dim=64)
    assert not error(case, inputs, interpreted(kernel, inputs)) < 3 * BOUNDS["float16"]


# Emitted, compiled and executed.


def executed(
    case: Case,
    kernel: npu_bridge.Kernel,
    inputs: dict[str, Any],
    place: Path,
    flags: tuple[str, ...] = ("-O1",),
    policies: tuple[str, ...] = ("round_robin", "random 1", "delay AIV PIPE_V"),
) -> None:
    """Asserts that the emulator has no complaint, and that the output is lax's and the formula's.

    Arguments:
      flags: of the compiler.
      policies: orders in which the pipes take turns.
    """
    npu_bridge.emit(kernel, place)
    assert npu_bridge.check(place, kernel) == []
    program = emulation.compiled(place, flags=flags)
    found = npu_bridge.run(place, inputs, kernel=kernel, program=program, policies=policies)
    assert found.complaints == []
    assert found.error <= found.tolerance
    # Rows of one key show a rounding of their score: in bfloat16 ours are within 2.5e-3 of the
    # formula, lax's within 3.2e-3. The paper's row means are multiplied by Inva (eq. 5) before they
    # are given back: 1.9e-3 and 1.5e-3.
    times = 4 if kernel.shift == "paper" else 1
    assert found.lse_error <= times * {"float16": 1e-3, "bfloat16": 2**-8}[kernel.dtype]
    assert error(case, inputs, found.output) < BOUNDS[kernel.dtype]


@needs_compiler
def test_executed_on_the_emulator(tmp_path: Path) -> None:
    sizes = Sizes(batch=2, heads=2, queries=20, keys=150)
    case = replace(CASES["ALiBi in documents"], sizes=sizes)
    kernel = case.kernel(head_dim=64)
    executed(case, kernel, case.inputs(kernel), tmp_path, ("-O0",), ("round_robin",))


@pytest.mark.npu_full
@needs_compiler
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", CASES)
def test_every_case_on_the_emulator(name: str, dtype: str, tmp_path: Path) -> None:
    case = CASES[name]
    kernel = case.kernel(dtype=dtype, block_kv=256)
    executed(case, kernel, case.inputs(kernel), tmp_path)


SHIFTS = {
    "none": {},
    "auto": {},
    "reference": {},
    "paper": {"precision": Precision(scores="float16", probabilities="float16")},
    "bound": {"dtype": "bfloat16"},
}


@pytest.mark.npu_full
@needs_compiler
@pytest.mark.parametrize("name", ["documents", "ALiBi in documents", "soft cap"])
@pytest.mark.parametrize("shift", SHIFTS)
def test_every_shift_on_the_emulator(name: str, shift: str, tmp_path: Path) -> None:
    case = CASES[name]
    if shift == "bound" and "score_mod" in case.options:
        with pytest.raises(ValueError, match="beside a score_mod"):
            case.kernel(shift=shift, **SHIFTS[shift])
        return
    kernel = case.kernel(shift=shift, **SHIFTS[shift])
    executed(case, kernel, case.inputs(kernel), tmp_path)


# Cases whose scores leave float16, or whose key and value at a place that no row sees are not
# finite.
DAMAGED = {
    "ALiBi in documents": ({"amplitude": 600.0}, 200),
    "soft cap": ({"amplitude": 600.0}, None),
    "prefix": ({}, 190),
}


def damaged(name: str, **options: Any) -> tuple[Case, npu_bridge.Kernel, dict[str, Any]]:
    """A kernel with repair and inputs that need it."""
    case, (drawn, hidden) = CASES[name], DAMAGED[name]
    kernel = case.kernel(repair=True, **options)
    inputs = case.inputs(kernel, **drawn)
    if hidden is not None:
        for n, x in (("key", np.nan), ("value", np.inf)):
            inputs[n] = inputs[n].at[:, hidden].set(x)
    return case, kernel, inputs


def apart(lse: Any, name: str, inputs: dict[str, Any]) -> float:
    """How far the log-sum-exps are from the formula's, relative to the largest score: the scores
    are so large that a row has one weight, and are rounded to 11 bits.
    """
    case = CASES[name]
    finite = inputs | {n: jnp.nan_to_num(inputs[n]) for n in ("key",)}
    exact = scores(case, finite).max(-1).swapaxes(1, 2)
    return float(np.abs(np.asarray(lse) - exact).max() / np.abs(exact).max())


@pytest.mark.full
def test_what_is_not_right_is_computed_again() -> None:
    name = "ALiBi in documents"
    _, kernel, inputs = damaged(name, head_dim=64)
    arrays = {n: np.asarray(x) for n, x in inputs.items()}
    found = interpreter.run(build(kernel), arrays, cores=3)
    assert np.isfinite(found["output"]).all()
    assert apart(found["lse"], name, inputs) < 2**-10
    found = interpreter.run(build(replace(kernel, repair=False)), arrays, cores=3)
    assert not apart(found["lse"], name, inputs) < 1


@pytest.mark.npu_full
@needs_compiler
@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_not_right_on_the_emulator(name: str, tmp_path: Path) -> None:
    _, kernel, inputs = damaged(name)
    npu_bridge.emit(kernel, tmp_path)
    found = npu_bridge.run(tmp_path, inputs, kernel=kernel, policies=("round_robin",))
    assert found.complaints == []
    assert np.isfinite(found.output).all()
    if found.lse is None:
        assert found.error <= found.tolerance
    else:
        assert apart(found.lse, name, inputs) < 2**-10


@pytest.mark.npu_full
@needs_compiler
def test_offset_keys_are_as_exact_as_in_lax(tmp_path: Path) -> None:
    """What the shift takes off is given back before a function sees the scores."""
    case = CASES["ALiBi in documents"]
    kernel = case.kernel()
    inputs = case.inputs(kernel, mean=30.0, amplitude=0.5)
    npu_bridge.emit(kernel, tmp_path)
    found = npu_bridge.run(tmp_path, inputs, kernel=kernel, policies=("round_robin",))
    lax = np.asarray(emulation.expected(kernel, inputs)[0], np.float64)
    exact = plain(case, inputs)
    ours, theirs = (np.sqrt(np.mean((x - exact) ** 2)) for x in (found.output, lax))
    assert ours <= 1.25 * theirs + 1e-4


# What a folder says of its functions.


def test_a_folder_names_functions_of_modules(tmp_path: Path) -> None:
    case = CASES["documents"]
    plainly = replace(case, options={"mask_mod": gallery.document_mod})
    kernel = plainly.kernel(head_dim=64)
    npu_bridge.emit(kernel, tmp_path)
    described = json.loads((tmp_path / "kernel.json").read_text())["functions"]
    assert described == {
        "mask_mod": "tests.gallery:document_mod",
        "score_mod": None,
        "block_mod": None,
        "q_data": {"document": "int32:BT"},
        "kv_data": {"document": "int32:BS"},
        "head_data": None,
    }
    assert project.read_description(tmp_path) == kernel
    assert npu_bridge.check(tmp_path) == []


def test_a_folder_of_a_closure_needs_its_kernel(tmp_path: Path) -> None:
    kernel = CASES["prefix"].kernel(head_dim=64)
    npu_bridge.emit(kernel, tmp_path)
    with pytest.raises(ValueError, match=r"`kernel` must be given: kernel.json cannot name "):
        npu_bridge.check(tmp_path)
    assert npu_bridge.check(tmp_path, kernel) == []
    other = CASES["causal"].kernel(head_dim=64)
    with pytest.raises(ValueError, match=r"`kernel` must be what .* was emitted from; got another"):
        npu_bridge.check(tmp_path, other)


def test_inputs_are_named_by_part_and_place() -> None:
    kernel = CASES["positions"].kernel(head_dim=64)
    axes = {name: interface.argument(kernel, name).shape for name in interface.inputs(kernel)}
    assert axes == {
        "query": "[B, T, N, D]",
        "key": "[B, S, K, D]",
        "value": "[B, S, K, E]",
        "q_data_0": "[B, T]",
        "kv_data_0": "[B, S]",
        "kv_data_1": "[S]",
    }
    assert interface.argument(kernel, "kv_data_1").dtype == "uint8"


def test_quotients_limit_the_length() -> None:
    assert stages.longest(CASES["causal"].kernel(head_dim=64)) == 2**24
    assert stages.longest(CASES["neighbourhood"].kernel(head_dim=64)) == 2**21
    text = project.files(build(CASES["neighbourhood"].kernel(head_dim=64)))["make_tiling.h"]
    assert f"queryLength > {2**21}" in text


# What is refused.


def _gathered(score, b, h, q, kv, head_data):
    return score + jnp.take(head_data[0], jnp.clip(q - kv, 0, 7))


def _looked_up(b, h, q, kv, kv_data):
    return kv_data[kv[0, 0], 0] == 1


def _sine(score, b, h, q, kv):
    return score + jnp.sin(q.astype(score.dtype))


def _halved(b, h, q, kv, kv_data):
    return kv_data // 2 == q // 2


def _by_head(b, h, q, kv):
    return q % (h + 1) == kv % 2


INT = jax.ShapeDtypeStruct((2, 300), jnp.int32)
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "a gather": (
        {"score_mod": _gathered, "head_data": [jax.ShapeDtypeStruct((4,), jnp.float32)]},
        "the primitive 'gather' has no instruction; it comes from `score_mod`",
        "give the whole as a bias (bias='BNTS')",
    ),
    "a slice": (
        {"mask_mod": _looked_up, "kv_data": INT},
        "only whole rows are sliced; it comes from `mask_mod`",
        "give the whole as a mask (mask='BNTS')",
    ),
    "a sine": (
        {"score_mod": _sine},
        "the primitive 'sin' has no instruction; it comes from `score_mod`",
        "give it as q_data, kv_data or head_data",
    ),
    "a quotient of data": (
        {"mask_mod": _halved, "kv_data": INT},
        "floor_divide of whole numbers: they are exact for indices and a known",
        "it comes from `mask_mod`",
    ),
    "a remainder by the head": (
        {"mask_mod": _by_head},
        "rem of whole numbers: they are exact for indices and a known positive number",
        "it comes from `mask_mod`",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_instructions_is_refused(name: str) -> None:
    options, begins, says = REFUSED[name]
    with pytest.raises(LoweringError) as refused:
        npu_bridge.kernel(head_dim=64, schedule=SCHEDULE, **options)
    text = str(refused.value)
    assert text.startswith(begins)
    assert says in text
    assert f"{__file__}:" in text


SAME = {"score_mod": gallery.same}
WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"q_data": INT},
        "`q_data` must be None without a mask_mod, a score_mod or a block mask that has one; got "
        "something else.",
    ),
    (
        {"mask_mod": 3},
        "`mask_mod` must be a function mask_mod(b, h, q, kv) -> bool; got 3.",
    ),
    (
        {"mask_mod": lambda b, h, q, kv: q - kv},
        "`mask_mod` must be a function mask_mod(b, h, q, kv) -> bool; got a result of type int32.",
    ),
    (
        {**SAME, "q_data": jax.ShapeDtypeStruct((300,), jnp.float16)},
        "`q_data` must hold float32, int32 or bool; got float16. Cast it: other types have no "
        "instructions for what a function may do.",
    ),
    (
        {**SAME, "kv_data": jax.ShapeDtypeStruct((1, 2, 3, 4), jnp.float32)},
        "`kv_data` must have leaves [S] or [B, S] or [B, N, S], with 1 for an axis to broadcast; "
        "got (1, 2, 3, 4).",
    ),
    (
        {**SAME, "shift": "bound", "dtype": "bfloat16"},
        "`shift` must be another than 'bound' beside a score_mod; got 'bound'. A function may "
        "return anything, so nothing bounds its scores. Use 'auto'.",
    ),
    *(
        (
            {**SAME, name: True},
            f"`{name}` must be False beside a mask_mod or a score_mod; got True. {way}",
        )
        for name, way in (
            ("packed", "Give sequences as ids in q_data and kv_data: mask_mod can compare them."),
            ("decode", "The rows of its tiles are query heads, not queries. Use decode=False."),
        )
    ),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_argument(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        npu_bridge.kernel(**{"head_dim": 64, "schedule": SCHEDULE, **options})


def test_bound_beside_a_mask_mod_is_mean() -> None:
    options = {"shift": "bound", "dtype": "bfloat16"}
    kernel = CASES["causal"].kernel(head_dim=64, **options)
    assert kernel.shift == "mean"
    assert kernel.precision.scores == "float16"
