"""Emitted kernels are executed on the host emulator and compared with lax."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import npu_bridge
from npu_bridge import emulation
from npu_bridge.layout import FLAGS
from pasa_jax import Precision, Schedule
from tests.npu_bridge.cases import CASES, Case
from tests.npu_bridge.mutants import Mutant, with_switches

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="g++ is not installed: apt install g++"
)
ROUND_ROBIN = ("round_robin",)


def _cases() -> list[object]:
    return [
        pytest.param(case, id=name, marks=[pytest.mark.npu_full] if case.full else [])
        for name, case in CASES.items()
    ]


@needs_compiler
@pytest.mark.parametrize("case", _cases())
def test_output_is_that_of_lax(case: Case, tmp_path: Path) -> None:
    kernel = case.kernel()
    npu_bridge.emit(kernel, tmp_path)
    assert npu_bridge.check(tmp_path) == []
    program = emulation.compiled(tmp_path)
    inputs = emulation.problem(kernel, **case.sizes)
    policies = ("round_robin", "random 1", "delay AIV PIPE_V")
    found = emulation.run(tmp_path, inputs, program=program, policies=policies)
    assert found.complaints == []
    assert found.error <= found.tolerance
    # K − κ, scores and P are rounded, and not all as lax rounds them. In bfloat16 the largest error
    # against exact attention is 1e-3, of lax too (the packed window of 91 keys: 9.2e-4, lax 1.1e-3;
    # between the two 1.7e-3).
    assert found.lse_error <= {"float16": 1e-3, "bfloat16": 2**-9}[kernel.dtype]
    if kernel.shift == "none":
        return  # which has nothing against a bias
    # Biased keys, whose scores of 10 000 plain float16 would store to within 4. A score may be
    # rounded the other way where float32 sums are formed in another order, so it is the error
    # against exact attention that must be lax's.
    inputs = emulation.problem(kernel, mean=30.0, amplitude=0.5, **case.sizes)
    found = emulation.run(tmp_path, inputs, program=program, policies=ROUND_ROBIN)
    assert found.complaints == []
    exact = _exact(kernel, inputs)
    lax = np.asarray(emulation.expected(kernel, inputs)[0], np.float64)
    ours, theirs = (np.sqrt(np.mean((x - exact) ** 2)) for x in (found.output, lax))
    assert ours <= 1.25 * theirs + 1e-4


def _exact(kernel: npu_bridge.Kernel, inputs: dict[str, Any]) -> np.ndarray:
    """Attention in float32 from the whole score matrix."""
    wide = {n: x.astype(jnp.float32) if x.dtype == kernel.dtype else x for n, x in inputs.items()}
    plain = replace(
        kernel, shift="none", beta=None, precision=Precision(), schedule=Schedule(target="cpu")
    )
    return np.asarray(emulation.expected(plain, wide)[0], np.float64)


def _damaged(inputs: dict[str, Any], *keys: int) -> dict[str, Any]:
    """The inputs with keys and values that are not finite at these places of entry 0, head 0."""
    wide = {n: np.array(inputs[n], np.float32) for n in ("key", "value")}
    for i, at in enumerate(keys):
        wide[("key", "value")[i % 2]][0, at, 0, i % 7] = (np.nan, np.inf)[i // 2 % 2]
    return {**inputs, **{n: jnp.asarray(x, inputs[n].dtype) for n, x in wide.items()}}


_LARGE = {"amplitude": 600.0}
# Options, sizes, keys that are not finite, whether it is too long for every run.
_REPAIRED: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[int, ...], bool]] = {
    "causal, keys that are not finite": (
        {"is_causal": True, "return_lse": True},
        {"queries": 300, "keys": 400},
        (150, 290, 350, 390),
        False,
    ),
    "scores beyond float16": ({}, {"queries": 200, "keys": 600, **_LARGE}, (), True),
    "none, causal, values that are not finite": (
        {"shift": "none", "is_causal": True},
        {"queries": 300, "keys": 400},
        (390, 290),
        True,
    ),
    "decode, lengths, sinks, large": (
        {"decode": True, "lengths": True, "sinks": True, "return_lse": True},
        {"batch": 2, "keys": 600, "heads": 6, "kv_heads": 2, **_LARGE},
        (520, 530),
        True,
    ),
    "window, mask, segments, bfloat16": (
        {"local_window_size": (100, 60), "mask": "B1TS", "segments": True, "dtype": "bfloat16"},
        {"batch": 2, "queries": 200, "keys": 600},
        (150, 300),
        True,
    ),
}


@needs_compiler
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.npu_full] if full else [])
        for name, (*_, full) in _REPAIRED.items()
    ],
)
def test_what_is_not_finite_spoils_no_row_that_does_not_see_it(name: str, tmp_path: Path) -> None:
    options, sizes, keys, _ = _REPAIRED[name]
    kernel = Case(options).kernel()
    npu_bridge.emit(kernel, tmp_path)
    assert npu_bridge.check(tmp_path) == []
    inputs = emulation.problem(kernel, **sizes)
    if "lengths" in inputs:
        inputs["lengths"] = jnp.asarray([500, 250], jnp.int32)
    inputs = _damaged(inputs, *keys)
    found = emulation.run(tmp_path, inputs, policies=ROUND_ROBIN)
    assert found.ok, found.complaints
    seen = np.isnan(np.asarray(emulation.expected(kernel, inputs)[0], np.float32))
    np.testing.assert_array_equal(np.isnan(found.output), seen)
    assert not seen.all()
    # Without the repair it is not so: the test can fail.
    plain = tmp_path / "plain"
    npu_bridge.emit(replace(kernel, repair=False), plain)
    spoiled = emulation.run(plain, inputs, policies=ROUND_ROBIN)
    assert not np.array_equal(np.isnan(spoiled.output), seen)


@pytest.mark.npu_full
@needs_compiler
def test_a_packed_sequence_that_is_not_finite_touches_no_other(tmp_path: Path) -> None:
    case = CASES["packed"]
    kernel = case.kernel()
    npu_bridge.emit(kernel, tmp_path)
    program = emulation.compiled(tmp_path)
    inputs = emulation.problem(kernel, **case.sizes)
    sound = emulation.run(tmp_path, inputs, program=program, policies=ROUND_ROBIN)
    begin = int(inputs["keyOffsets"][2])
    inputs["key"] = inputs["key"].at[begin + 3].set(jnp.nan)
    found = emulation.run(tmp_path, inputs, program=program, policies=ROUND_ROBIN)
    assert found.ok, found.complaints
    first, end = (int(inputs["queryOffsets"][i]) for i in (2, 3))
    assert np.isnan(found.output[first:end]).all()  # which see the key, all of them
    others = np.r_[:first, end : len(sound.output)]
    assert np.isfinite(found.output[others]).all()
    np.testing.assert_array_equal(found.output[others], sound.output[others])


@pytest.mark.npu_full
@needs_compiler
def test_packed_sequences_are_those_of_the_unpacked_kernel(tmp_path: Path) -> None:
    """Bit by bit, so what lax differs by has nothing to do with packing."""
    case = CASES["packed, bottom right, window, sinks, bfloat16"]
    kernel = replace(case.kernel(), repair=False)
    npu_bridge.emit(kernel, tmp_path / "packed")
    npu_bridge.emit(replace(kernel, packed=False), tmp_path / "apart")
    inputs = emulation.problem(kernel, **case.sizes)
    together = emulation.run(tmp_path / "packed", inputs, policies=ROUND_ROBIN)
    program = emulation.compiled(tmp_path / "apart")
    bounds = [np.asarray(inputs[f"{n}Offsets"]) for n in ("query", "key")]
    compared = 0
    for q, q_end, k, k_end in zip(*(y for x in bounds for y in (x[:-1], x[1:])), strict=True):
        if q == q_end or k == k_end:
            continue
        part = {n: inputs[n][None, k:k_end] for n in ("key", "value")}
        part |= {"query": inputs["query"][None, q:q_end], "sinks": inputs["sinks"]}
        alone = emulation.run(tmp_path / "apart", part, program=program, policies=ROUND_ROBIN)
        assert together.complaints == alone.complaints == []
        np.testing.assert_array_equal(together.output[q:q_end], alone.output[0])
        assert together.lse is not None
        assert alone.lse is not None
        np.testing.assert_array_equal(together.lse[q:q_end], alone.lse[0])
        compared += 1
    assert compared == 3


@pytest.mark.npu_full
@needs_compiler
def test_what_a_bound_does_not_prove_is_as_by_mean(tmp_path: Path) -> None:
    """Heads with and without a proof in one call."""
    kernel = CASES["bound"].kernel()
    npu_bridge.emit(kernel, tmp_path)
    inputs = emulation.problem(kernel, queries=300, keys=600, heads=3, kv_heads=3)
    inputs["query"] = inputs["query"] * jnp.asarray([1, 60, 1], jnp.bfloat16)[:, None]
    found = emulation.run(tmp_path, inputs, policies=("round_robin", "random 1"))
    assert found.ok, found.complaints
    by = {
        shift: np.asarray(emulation.expected(replace(kernel, shift=shift), inputs)[0], np.float32)
        for shift in ("bound", "mean")
    }
    for head, shift, other in ((0, "bound", "mean"), (1, "mean", ""), (2, "bound", "mean")):
        same = {n: np.mean(found.output[:, :, head] == x[:, :, head]) for n, x in by.items()}
        assert same[shift] > 0.95
        assert not other or same[other] < 0.8


@pytest.mark.full
@needs_compiler
def test_every_order_of_the_pipes_gives_the_same_bytes(tmp_path: Path) -> None:
    case = CASES["lengths, log-sum-exp"]
    npu_bridge.emit(case.kernel(), tmp_path)
    inputs = emulation.problem(case.kernel(), **case.sizes)
    found = npu_bridge.run(tmp_path, inputs, policies=("all",), cores=3)
    assert found.ok, found.complaints
    assert len(found.report["policies"]) > 10


def test_emission_is_deterministic(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        npu_bridge.emit(npu_bridge.kernel(is_causal=True), tmp_path / folder)
    for path in sorted((tmp_path / "a").rglob("*")):
        if path.is_file():
            other = tmp_path / "b" / path.relative_to(tmp_path / "a")
            assert path.read_bytes() == other.read_bytes()


class TestMutants:
    """Every small defect in the emitted text is found by the emulator or in the numbers."""

    # Of those that are not, why they change nothing. Each is a part of a line or of the line's
    # function; what is listed here and found nevertheless does not matter.
    EQUIVALENT = (
        ("PipeBarrier<PIPE_ALL>", "SyncAll begins with it, as its header says"),
        ("PipeBarrier<PIPE_V>", "flags or a later barrier order the same instructions"),
        ("PipeBarrier<PIPE_M>", "the last product of a sum is ordered by its flag"),
        ("Duplicate(queryIn", "rows beyond T are not stored"),
        ("Duplicate(rowsIn", "finite values beyond the last key meet P = 0"),
        ("Duplicate(keysIn", "any finite κ is valid, and keys beyond S are masked"),
        ("-3.4028234663852886e+38f, SELMODE", "the lowest number plus an offset is the lowest"),
        ("Select(margin", "a row without keys has the quotient 0/1"),
        ("quotient, 0.0f, SELMODE", "a row without keys has the quotient 0/1"),
    )
    # And of the careful kernel and of the look for damage, as expressions.
    EQUIVALENT_CAREFUL = (
        (r"^LocalTensor<float> .*, 8\);", "one number, in a buffer as long as a block"),
        (r", 64, 1, \{1, 1, 1,", "one repeat, which has no next"),
        (r"Duplicate\((keys|values)In", "rows beyond `valid` do not count, whatever they hold"),
        (r"Duplicate\(kappaOut", "q·κ of blocks behind the last is not read"),
        (r"Select\(chosen, .* number, 1\.0f", "a finite value of such a key meets P = 0 or NaN"),
        (r"Select\(chosen, .* abs, 0\.0f", "a query that is not finite has no finite result"),
        (r"Select\(chosen, .* quotient, mul,", "a row without keys is computed again, to the same"),
        (
            r"Select\(chosen_9, .* valuesIn,",
            "they enter the gain alone: 1 below 2^94, so in float16",
        ),
        (r"TENSOR_TENSOR_MODE, 1\);", "that gain, each in place: none is taken in float16"),
        (r"Select\(chosen_10, .* keysIn,", "chosen_11 hides the same keys"),
        (
            r"Select\(chosen_11, .* abs_6,",
            "|κ| counts too: a larger guard, exact but for subnormals",
        ),
        (
            r"Select\(chosen_[345], .*MODE, 32\);",
            "guards of 2^64 and 2^32: no float16 score needs one",
        ),
    )

    @needs_compiler
    @pytest.mark.parametrize(
        "stride", [197, pytest.param(1, marks=pytest.mark.npu_full)], ids=["some", "all"]
    )
    def test_all_are_found(
        self, stride: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        options = {**_MUTATED, "local_window_size": (480, 0)}
        kernel = replace(Case(options).kernel(), repair=False)
        mutants, _ = _emitted_with_switches(kernel, tmp_path)
        inputs = emulation.problem(
            kernel, batch=2, queries=300, keys=900, heads=1, kv_heads=1, mean=3.0
        )
        inputs["lengths"] = jnp.asarray([900, 100], jnp.int32)  # full, cut and empty tiles
        # As many as there is time for; of cross-core flags more.
        of_flags = max(1, stride // 40)
        chosen = [
            m for m in mutants if m.number % (of_flags if "CrossCore" in m.kind else stride) == 0
        ]
        assert {m.kind for m in mutants} >= {"dropped SetFlag", "swapped strides", "shrunk buffer"}
        survivors = _survivors(chosen, tmp_path, inputs, monkeypatch)
        unexplained = [m for m in survivors if not any(e in m.text for e, _ in self.EQUIVALENT)]
        assert unexplained == []
        assert stride > 1 or len(survivors) <= 0.05 * len(chosen)

    @pytest.mark.npu_full
    @needs_compiler
    def test_all_of_the_careful_kernel_are_found(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kernel = Case(_MUTATED, block_kv=128).kernel()
        mutants, source = _emitted_with_switches(kernel, tmp_path)
        names = ("void Look(", "void Absorb(", "class CarefulCubeCore")
        look, end, begins = (source[: source.index(name)].count("\n") for name in names)
        chosen = [m for m in mutants if look < m.line <= end or m.line > begins]
        assert 0.5 * len(mutants) < len(chosen) < 0.8 * len(mutants)
        survivors = _survivors(chosen, tmp_path, _spoiled(kernel), monkeypatch)
        known = (
            *(re.escape(e) for e, _ in self.EQUIVALENT),
            *(e for e, _ in self.EQUIVALENT_CAREFUL),
        )
        unexplained = [m for m in survivors if not any(re.search(e, m.text) for e in known)]
        assert unexplained == []
        assert len(survivors) <= 0.1 * len(chosen)


_MUTATED: dict[str, Any] = {
    "head_dim": 192,
    "value_head_dim": 64,
    "is_causal": True,
    "causal_alignment": "bottom_right",
    "lengths": True,
    "return_lse": True,
}


def _emitted_with_switches(kernel: npu_bridge.Kernel, folder: Path) -> tuple[list[Mutant], str]:
    """Emits a project whose kernel has all its mutants in it: these, and the text without them."""
    npu_bridge.emit(kernel, folder)
    path = folder / "pasa_attention.cpp"
    source = path.read_text()
    text, mutants = with_switches(source)
    path.write_text(text)
    return mutants, source


def _spoiled(kernel: npu_bridge.Kernel) -> dict[str, Any]:
    """Inputs by which query tiles are damaged: scores beyond float16, and keys and values that are
    not finite, seen by some rows and not by others.
    """
    inputs = emulation.problem(kernel, batch=2, queries=200, keys=300, heads=1, kv_heads=1)
    inputs["lengths"] = jnp.asarray([300, 20], jnp.int32)  # the second: less than is loaded at once
    query, key, value = (np.array(inputs[n], np.float32) for n in ("query", "key", "value"))
    # Rows and a key of numbers that are all as large as the largest: the scores reach their bound.
    query[0, :60] = 2.0 ** (np.arange(60) % 15)[:, None, None]
    key[0] *= 200
    key[0, 20] = 200
    # κ of a block beyond what it may be. Later queries do not see it: so large scores could be
    # rounded the other way.
    key[0, 128:256, 0, 9] += 30000
    query[0, :128, 0, 9], query[0, 128:, 0, 9] = 2.0**-10, 0
    value[0] *= 100
    key[0, 270, 0, 3] = key[1, 14, 0, 7] = np.nan
    value[0, 280, 0, 5] = value[1, 12, 0, 2] = np.inf
    value[1, 200, 0, 1] = np.nan  # beyond the last key
    arrays = {"query": query, "key": key, "value": value}
    return {**inputs, **{n: jnp.asarray(x, kernel.dtype) for n, x in arrays.items()}}


def _survivors(
    chosen: list[Mutant], folder: Path, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> list[Mutant]:
    """Those of the mutants that neither the emulator nor the numbers show. Prints them."""
    monkeypatch.setenv("MUTANT", "0")
    program = emulation.compiled(folder)
    out, lse = emulation.expected(emulation.read_description(folder), inputs)
    want = (np.asarray(out), np.asarray(lse))

    def run() -> emulation.Run | None:
        try:
            return emulation.run(folder, inputs, program=program, policies=ROUND_ROBIN, want=want)
        except npu_bridge.EmulationError:
            return None  # a crash is found too

    sound = run()
    assert sound is not None
    assert sound.ok, sound.complaints
    assert sound.lse is not None
    output, sums = sound.output, sound.lse

    def unnoticed(mutant: Mutant) -> bool:
        monkeypatch.setenv("MUTANT", str(mutant.number))
        found = run()
        if found is None or not found.ok or found.lse is None:
            return False
        pairs = ((found.output, output), (found.lse, sums))
        return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)

    survivors = [m for m in chosen if unnoticed(m)]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} found; not:")
    for mutant in survivors:
        print(f"  {mutant}")
    return survivors


@needs_compiler
@pytest.mark.skipif(
    "ASCEND_HOME_PATH" not in os.environ,
    reason="compiles against CANN's headers: install CANN and set ASCEND_HOME_PATH",
)
def test_compiles_against_cann(tmp_path: Path) -> None:
    import subprocess

    npu_bridge.emit(npu_bridge.kernel(), tmp_path)
    command = ["cmake", "-S", str(tmp_path), "-B", str(tmp_path / "build")]
    subprocess.run(command, check=True)
    subprocess.run(
        ["cmake", "--build", str(tmp_path / "build"), "--target", "pasa_attention_check"],
        check=True,
    )


def test_cross_core_flags_are_free_ones() -> None:
    assert len(set(FLAGS.values())) == len(FLAGS)
    assert max(FLAGS.values()) <= 10  # from 11 on they are SyncAll's
