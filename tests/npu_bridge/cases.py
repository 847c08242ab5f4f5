"""Kernels that are emitted, executed and compared with lax, and the problems that they run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import npu_bridge
from pasa_jax import Precision, Schedule

HALF = Precision(scores="float16", probabilities="float16")
TILES = Precision(scores="float16", probabilities="float16", exponential="float16")


@dataclass(frozen=True)
class Case:
    """A kernel by its options, and sizes of a problem.

    Arguments:
      full: whether it is too long for every run of the suite (`make npu-full`).
    """

    options: dict[str, Any]
    sizes: dict[str, Any] = field(default_factory=dict)
    block_kv: int = 256
    full: bool = False

    def kernel(self) -> npu_bridge.Kernel:
        schedule = Schedule(block_q=128, block_kv=self.block_kv, target="ascend_910b")
        return npu_bridge.kernel(schedule=schedule, **self.options)


_BOUND = {"shift": "bound", "dtype": "bfloat16"}
_ODD = {"queries": 200, "keys": 600}
_PACKED = {"queries": (70, 0, 200, 33, 60), "keys": (70, 5, 300, 0, 20)}  # of each sequence
CASES: dict[str, Case] = {
    # Those of every run are not repaired: their text is half as long.
    "mean, causal": Case({"is_causal": True, "repair": False}, {"queries": 300, "keys": 300}, 512),
    "mean, float32 arithmetic": Case({"precision": HALF}, _ODD, full=True),
    "reference, causal": Case({"shift": "reference", "is_causal": True}, _ODD, full=True),
    "reference, lengths, log-sum-exp": Case(
        {"shift": "reference", "precision": HALF, "lengths": True, "return_lse": True},
        {"batch": 2, "queries": 300, "keys": 700},
        full=True,
    ),
    "reference, bias": Case({"shift": "reference", "bias": "11TS"}, _ODD, full=True),
    "none": Case({"shift": "none"}, _ODD, full=True),
    "paper, all float16": Case({"shift": "paper", "precision": "paper"}, _ODD, full=True),
    "paper, float32 statistics": Case({"shift": "paper", "precision": HALF}, _ODD, full=True),
    "float32 hand-over": Case({"precision": Precision(probabilities="float16")}, _ODD, full=True),
    "bottom right, longer keys": Case(
        {"is_causal": True, "causal_alignment": "bottom_right"},
        {"queries": 200, "keys": 700},
        full=True,
    ),
    "bottom right, longer queries": Case(
        {"is_causal": True, "causal_alignment": "bottom_right", "return_lse": True},
        {"queries": 300, "keys": 200},
        full=True,
    ),
    "window": Case({"local_window_size": (100, 50)}, {"queries": 300, "keys": 700}, full=True),
    "lengths, log-sum-exp": Case(
        {"lengths": True, "return_lse": True},
        {"batch": 3, "queries": 100, "keys": 600},
        full=True,
    ),
    "bias": Case({"bias": "BNTS"}, _ODD, full=True),
    "bias, broadcast, paper": Case(
        {"bias": "11TS", "shift": "paper", "precision": HALF}, {"batch": 2, **_ODD}, full=True
    ),
    "mask": Case({"mask": "B1TS"}, {"batch": 2, **_ODD}, full=True),
    "mask, bias, causal, bfloat16": Case(
        {"mask": "1NTS", "bias": "B1TS", "is_causal": True, "dtype": "bfloat16"}, _ODD, full=True
    ),
    "segments, mask, sinks, log-sum-exp": Case(
        {
            "segments": True,
            "mask": "11TS",
            "sinks": True,
            "return_lse": True,
            "repair": False,
        },
        {"batch": 2, **_ODD},
    ),
    "segments, causal, reference": Case(
        {"segments": True, "is_causal": True, "shift": "reference"}, _ODD, full=True
    ),
    "segments, lengths, window, paper": Case(
        {
            "segments": True,
            "lengths": True,
            "local_window_size": (300, 300),
            "shift": "paper",
            "precision": HALF,
        },
        {"batch": 2, **_ODD},
        full=True,
    ),
    "sinks": Case({"sinks": True, "return_lse": True, "is_causal": True}, _ODD, full=True),
    "decode, sinks": Case(
        {"decode": True, "sinks": True, "lengths": True, "return_lse": True},
        {"batch": 2, "keys": 500, "heads": 20, "kv_heads": 2},
        128,
        full=True,
    ),
    "auto, causal": Case(
        {"shift": "auto", "is_causal": True}, {"queries": 300, "keys": 600}, full=True
    ),
    "auto, lengths, bfloat16, 4 query heads a key head": Case(
        {"shift": "auto", "lengths": True, "dtype": "bfloat16", "return_lse": True},
        {"batch": 2, "heads": 8, "kv_heads": 2, **_ODD},
        full=True,
    ),
    "soft cap": Case({"logits_soft_cap": 3.0}, _ODD, full=True),
    "bfloat16": Case({"dtype": "bfloat16"}, _ODD, full=True),
    "8 query heads a key head": Case(
        {"is_causal": True}, {"heads": 8, "kv_heads": 1, "queries": 130, "keys": 300}, full=True
    ),
    "decode, split keys": Case(
        {
            "decode": True,
            "is_causal": True,
            "causal_alignment": "bottom_right",
            "lengths": True,
            "return_lse": True,
            "repair": False,
        },
        {"batch": 3, "keys": 900, "heads": 20, "kv_heads": 1},
        128,
        full=True,
    ),
    "decode, split keys, paper": Case(
        {"decode": True, "shift": "paper", "precision": "paper"},
        {"keys": 600, "heads": 4, "kv_heads": 4},
        full=True,
    ),
    "one query, not split": Case({}, {"queries": 1, "keys": 1500, "heads": 4}, 512, full=True),
    "one key": Case({}, {"queries": 3, "keys": 1}, full=True),
    "head size 64": Case({"head_dim": 64}, _ODD, 512, full=True),
    "head size 192": Case({"head_dim": 192, "is_causal": True}, _ODD, full=True),
    "head size 256": Case({"head_dim": 256}, _ODD, full=True),
    "value head size 64": Case({"value_head_dim": 64}, _ODD, full=True),
    "4096 keys": Case({"is_causal": True}, {"queries": 1024, "keys": 4096, "heads": 1}, 512, True),
    "reference, bfloat16": Case(
        {"shift": "reference", "dtype": "bfloat16", "is_causal": True}, _ODD, full=True
    ),
    "packed": Case({"packed": True, "return_lse": True, "head_dim": 64}, _PACKED, 128, full=True),
    "packed, bottom right, window, sinks, bfloat16": Case(
        {
            "packed": True,
            "is_causal": True,
            "causal_alignment": "bottom_right",
            "local_window_size": (90, 20),
            "sinks": True,
            "return_lse": True,
            "dtype": "bfloat16",
        },
        _PACKED,
        full=True,
    ),
    "packed, grouped heads, soft cap, none": Case(
        {"packed": True, "shift": "none", "logits_soft_cap": 3.0},
        {"queries": (300, 1, 128, 0), "keys": (700, 256, 0, 9), "heads": 4, "kv_heads": 2},
        full=True,
    ),
    "packed, causal, reference": Case(
        {"packed": True, "is_causal": True, "shift": "reference", "return_lse": True},
        {**_PACKED, "heads": 4, "kv_heads": 2},
        full=True,
    ),
    "bias, bfloat16": Case({"bias": "11TS", "dtype": "bfloat16"}, _ODD, full=True),
    "bound": Case({**_BOUND}, _ODD, full=True),
    "bound, causal, log-sum-exp": Case(
        {**_BOUND, "is_causal": True, "return_lse": True}, {"queries": 300, "keys": 300}, 128, True
    ),
    "bound, lengths, bottom right": Case(
        {**_BOUND, "is_causal": True, "causal_alignment": "bottom_right", "lengths": True},
        {"batch": 3, "queries": 200, "keys": 700},
        full=True,
    ),
    "bound, window, sinks": Case(
        {**_BOUND, "local_window_size": (100, 50), "sinks": True},
        {"queries": 300, "keys": 700, "heads": 4},
        128,
        True,
    ),
    "bound, more than 16 blocks": Case(
        {**_BOUND, "head_dim": 64}, {"queries": 100, "keys": 5000, "heads": 1}, full=True
    ),
    "bound, output that does not stay": Case(
        {**_BOUND, "head_dim": 256, "value_head_dim": 192}, _ODD, full=True
    ),
}
