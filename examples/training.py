"""A small language model trained with attention in float32 and in 16 bits: the same losses.

    python examples/training.py [curves.png]    # about 2 minutes

Every run starts from the same weights and sees the same batches, bytes of Python's standard
library. Parameters, optimizer and all other layers are float32. 16-bit are the query, key and value
that attention is given, the scores and probabilities it stores, its output, and in the backward
pass the gradients of those four arrays. The loss is multiplied by 1024, and the gradients of the
parameters divided by it, lest float16 lose small ones on the way.

Two more runs have a constant in one more channel of every query and key, as the biases of real
models put into a few. It adds 81920 to each q·k, which softmax does not see and float16 cannot
hold.
"""

import argparse
import ast
import inspect
import sys
import tarfile
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from pasa_jax.evidence.plain import plain_attention
from pasa_jax.plugins.nnx import attention_fn

Array = jax.Array
AttentionFn = Callable[..., Array]

SOURCES = (argparse, ast, inspect, tarfile, typing)
SCALE = 1024.0
BIAS = 256.0, 320.0  # of queries and keys: exact in 16 bits, their product is beyond float16


def in_type(dtype: str, attention: AttentionFn, biased: bool = False) -> AttentionFn:
    """``attention`` on inputs cast to ``dtype``, as a flax module calls it; float32 comes back."""

    def cast(query: Array, key: Array, value: Array, **arguments: Any) -> Array:
        if biased:
            query, key = (
                jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)], constant_values=constant)
                for x, constant in zip((query, key), BIAS, strict=True)
            )
        narrow = (x.astype(dtype) for x in (query, key, value))
        return attention(*narrow, **arguments).astype(jnp.float32)

    return cast


def plain(query: Array, key: Array, value: Array, *, is_causal: bool, **_: Any) -> Array:
    """The einsum of eager model code: scores stored in the inputs' type, then scaled."""
    scores = str(query.dtype)
    return plain_attention(query, key, value, scores=scores, prescaled=False, is_causal=is_causal)


RUNS: dict[str, AttentionFn] = {
    "float32": in_type("float32", plain),
    "PASA, bfloat16": in_type("bfloat16", attention_fn()),
    "PASA, float16": in_type("float16", attention_fn()),
    "biased: PASA, float16": in_type("float16", attention_fn(), biased=True),
    "biased: plain, float16": in_type("float16", plain, biased=True),
}


class Block(nnx.Module):
    """Attention and feed-forward, each after a norm and with its residual."""

    def __init__(self, width: int, heads: int, attention: AttentionFn, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(
            heads, width, attention_fn=attention, decode=False, rngs=rngs
        )
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = x + self.attention(self.norms[0](x), is_causal=True)
        return x + self.down(jax.nn.gelu(self.up(self.norms[1](x))))


class LanguageModel(nnx.Module):
    """Bytes [B, T] to the logits of the next ones, [B, T, 256]."""

    def __init__(
        self,
        attention: AttentionFn,
        *,
        layers: int,
        width: int,
        heads: int,
        length: int,
        rngs: nnx.Rngs,
    ) -> None:
        self.bytes = nnx.Embed(256, width, rngs=rngs)
        self.positions = nnx.Embed(length, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, attention, rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 256, rngs=rngs)

    def __call__(self, text: Array) -> Array:
        x = self.bytes(text) + self.positions(jnp.arange(text.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def batches(steps: int, batch: int, length: int) -> np.ndarray:
    """Random pieces of a few standard modules, [steps, batch, length + 1] int32."""
    text = b"".join(Path(inspect.getfile(module)).read_bytes() for module in SOURCES)
    data = np.frombuffer(text, np.uint8)
    starts = np.random.default_rng(0).integers(0, len(data) - length, (steps, batch, 1))
    return data[starts + np.arange(length + 1)].astype(np.int32)


@nnx.jit
def train_step(model: LanguageModel, optimizer: nnx.Optimizer, text: Array) -> Array:
    """One step of the optimizer; the loss before it, in nats a byte."""

    def loss(model: LanguageModel) -> Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(model(text[:, :-1]), text[:, 1:])
        return SCALE * losses.mean()

    scaled, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, jax.tree.map(lambda gradient: gradient / SCALE, gradients))
    return scaled / SCALE


def train(attention: AttentionFn, data: np.ndarray, **sizes: int) -> np.ndarray:
    """The loss at each step, [steps]."""
    model = LanguageModel(attention, length=data.shape[2] - 1, rngs=nnx.Rngs(0), **sizes)
    optimizer = nnx.Optimizer(model, optax.adam(2e-3), wrt=nnx.Param)
    return np.array([train_step(model, optimizer, jnp.asarray(text)) for text in data])


def draw(curves: dict[str, np.ndarray], path: Path) -> None:
    """The curves, and how far they lie from float32's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, losses in curves.items():
        left.plot(losses, label=name)
        right.semilogy(np.abs(losses - curves["float32"]), label=name)
    left.set(xlabel="step", ylabel="loss, nats a byte")
    right.set(xlabel="step", ylabel="distance from float32")
    left.legend()
    figure.savefig(path)


def main(
    steps: int = 300,
    plot: Path | None = None,
    *,
    batch: int = 8,
    length: int = 128,
    layers: int = 2,
    width: int = 96,
    heads: int = 3,
) -> dict[str, np.ndarray]:
    """Prints the losses side by side, draws them if asked to, and returns each run's [steps]."""
    data = batches(steps, batch, length)
    curves = {
        name: train(attention, data, layers=layers, width=width, heads=heads)
        for name, attention in RUNS.items()
    }
    print(f"{'step':>6}" + "".join(f"{name:>24}" for name in curves))
    for step in sorted({*range(0, steps, max(1, steps // 6)), steps - 1}):
        print(f"{step:6}" + "".join(f"{losses[step]:24.4f}" for losses in curves.values()))
    far = [np.abs(losses - curves["float32"]).max() for losses in curves.values()]
    print("   far" + "".join(f"{distance:24.1e}" for distance in far))
    if plot is not None:
        draw(curves, plot)
    return curves


if __name__ == "__main__":
    main(plot=Path(sys.argv[1]) if len(sys.argv) > 1 else None)
