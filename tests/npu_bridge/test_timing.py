"""Predicted times."""

from __future__ import annotations

from dataclasses import replace

import pytest

import npu_bridge
from npu_bridge.tables import NAMED
from pasa_jax import Schedule


def test_sixteen_bit_hand_over_is_faster() -> None:
    def seconds(name: str) -> float:
        shift, precision = NAMED[name]
        kernel = npu_bridge.kernel(shift=shift, precision=precision)
        return npu_bridge.cost(kernel, queries=2048, heads=24).seconds

    assert seconds("mean, float16 tiles") < seconds("mean, float32 hand-over")


def test_a_shift_costs_little() -> None:
    none, mean = (
        npu_bridge.cost(npu_bridge.kernel(shift=shift), queries=4096, heads=24).seconds
        for shift in ("none", "mean")
    )
    assert none < mean < 1.05 * none


@pytest.mark.full
def test_a_fixed_reference_is_faster_than_a_maximum() -> None:
    bound = npu_bridge.kernel(shift="bound", dtype="bfloat16")
    mean = replace(bound, shift="mean")
    costs = [npu_bridge.cost(k, queries=4096, heads=24).seconds for k in (bound, mean)]
    assert costs[0] < costs[1]


def test_skipped_tiles_cost_nothing() -> None:
    full = npu_bridge.cost(npu_bridge.kernel(), queries=8192, heads=24)
    causal = npu_bridge.cost(npu_bridge.kernel(is_causal=True), queries=8192, heads=24)
    assert 0.45 < causal.seconds / full.seconds < 0.7


def test_no_pipe_is_busier_than_there_is_time() -> None:
    found = npu_bridge.cost(npu_bridge.kernel(), queries=2048, heads=24)
    assert set(found.busy) == {f"AIC {p}" for p in ("MTE2", "MTE1", "M", "FIX")} | {
        f"AIV {p}" for p in ("S", "MTE2", "V", "MTE3")
    }
    assert all(0 < t <= 1.05 * found.cycles for t in found.busy.values())


def test_the_cube_unit_multiplies_what_the_problem_says() -> None:
    found = npu_bridge.cost(npu_bridge.kernel(shift="none"), queries=4096, heads=24, items=None)
    products = 24 * 2 * 4096 * 4096 * 128 / 24  # of one of 24 cores
    least = products / 16**3
    assert least <= found.busy["AIC M"] < 1.3 * least  # heads of instructions, and P's sums


@pytest.mark.parametrize("batch", [1, 4, 8])  # whose sequences' tiles begin at different places
def test_packed_sequences_take_as_long_as_a_batch(batch: int) -> None:
    schedule = Schedule(block_q=128, block_kv=512, target="ascend_910b")
    apart, packed = (
        npu_bridge.cost(
            npu_bridge.kernel(packed=packed, is_causal=True, schedule=schedule),
            batch=batch,
            queries=4096,
            heads=24,
        ).seconds
        for packed in (False, True)
    )
    assert 0.98 * apart < packed < 1.05 * apart
