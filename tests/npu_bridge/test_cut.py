"""The loop's body cut at its products, and what follows from a tile function that changes."""

from __future__ import annotations

import shutil
from typing import Any

import jax
import numpy as np
import pytest

from npu_bridge import cut, emulation, project, stages
from npu_bridge.program import build
from npu_bridge.specification import Kernel
from pasa_jax.core import tile
from pasa_jax.core.errors import LoweringError
from pasa_jax.core.precision import Precision
from pasa_jax.core.schedule import Schedule
from pasa_jax.core.tile import arrays, softmax

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")
HALF = Kernel(
    head_dim=64,
    value_head_dim=64,
    dtype="float16",
    shift="none",
    precision=Precision.named("float16"),
    schedule=Schedule(block_q=128, block_kv=128, target="ascend_910b"),
)


def test_a_product_with_something_computed_is_refused(monkeypatch):
    scores = tile.scores

    def doubled(query: Any, key: Any, *rest: Any, **named: Any) -> Any:
        return scores(query, key._replace(k=key.k + key.k), *rest, **named)

    monkeypatch.setattr(tile, "scores", doubled)
    with pytest.raises(LoweringError) as error:
        cut.step(HALF, 16, masked=False)
    assert str(error.value).startswith(
        "the cube unit multiplies with keys, κ or values as they lie in memory; a product with "
        f"something computed comes from {arrays.__file__}:"
    )


# One mathematics: what changes in a tile function changes in the kernel.


def _forget() -> None:
    """Forgets what was traced before a tile function changed."""
    jax.clear_caches()
    for function in (cut.step, *vars(stages).values()):
        if hasattr(function, "cache_clear"):
            function.cache_clear()


@pytest.mark.full
@needs_compiler
def test_a_changed_tile_function_changes_the_kernel(monkeypatch, tmp_path):
    plain, probabilities = project.files(build(HALF)), tile.probabilities
    inputs = emulation.problem(HALF, queries=40, keys=150)
    before = emulation.expected(HALF, inputs)

    def squared(*arguments: Any) -> Any:
        p = probabilities(*arguments)
        return p * p

    monkeypatch.setattr(softmax, "probabilities", squared)
    _forget()
    try:
        program = build(HALF)
        changed = project.files(program)
        assert {n for n in plain if plain[n] != changed[n]} == {
            "pasa_attention.cpp", "package/op_kernel/pasa_attention_kernel.h",
        }  # fmt: skip
        project.write(program, tmp_path)
        compiled = emulation.compiled(tmp_path, flags=("-O0",))
        policies = ("round_robin",)
        done = emulation.run(tmp_path, inputs, program=compiled, policies=policies)
    finally:
        _forget()
    assert done.complaints == []
    assert done.error <= done.tolerance
    assert np.abs(done.output - np.asarray(before[0], np.float32)).max() > 10 * done.tolerance
