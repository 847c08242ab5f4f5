"""A small language model trained with attention in float32 and in 16 bits: the same losses.

    python examples/training.py [curves.png]      # about 2 minutes
    python examples/training.py --mesh 2,2,2      # on simulated devices, beside one

Every run starts from the same weights and sees the same batches, bytes of Python's standard
library. Parameters, optimizer and all other layers are float32. 16-bit are the query, key and value
that attention is given, the scores and probabilities it stores, its output, and in the backward
pass the gradients of those four arrays. The loss is multiplied by 1024, and the gradients of the
parameters divided by it, lest float16 lose small ones on the way.

Two more runs have a constant in one more channel of every query and key, as the biases of real
models put into a few. It adds 81920 to each q·k, which softmax does not see and float16 cannot
hold.

With ``--mesh`` batch, heads with hidden units, and tokens are cut over the axes of a mesh: data,
tensor and sequence. `parallel.attention_fn` is the attention; all else is JAX's own, from where
parameters and tokens lie. The losses are those of one device.
"""

import argparse
import ast
import inspect
import math
import tarfile
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pasa_jax import parallel
from pasa_jax.evidence.plain import plain_attention
from pasa_jax.plugins.nnx import attention_fn

Array = jax.Array
AttentionFn = Callable[..., Array]

SOURCES = (argparse, ast, inspect, tarfile, typing)
SCALE = 1024.0
BIAS = 256.0, 320.0  # of queries and keys: exact in 16 bits, their product is beyond float16
AXES = "data", "tensor", "sequence"
# The axes of kernel and bias that lie on the mesh's axis tensor; None: the sum over it is needed.
CUT = {
    **{layer: {"kernel": 1, "bias": 0} for layer in ("query", "key", "value", "up", "head")},
    **{layer: {"kernel": 0, "bias": None} for layer in ("out", "down")},
}


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
def train_step(
    model: LanguageModel, optimizer: nnx.Optimizer, text: Array, following: Array
) -> Array:
    """One step of the optimizer; the loss before it, in nats a byte."""

    def loss(model: LanguageModel) -> Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(model(text), following)
        return SCALE * losses.mean()

    scaled, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, jax.tree.map(lambda gradient: gradient / SCALE, gradients))
    return scaled / SCALE


def train(
    attention: AttentionFn, data: np.ndarray, mesh: Mesh | None = None, **sizes: int
) -> np.ndarray:
    """The loss at each step, [steps]."""
    model = LanguageModel(attention, length=data.shape[2] - 1, rngs=nnx.Rngs(0), **sizes)
    if mesh is not None:
        nnx.update(model, jax.tree.map_with_path(place(mesh), nnx.state(model, nnx.Param)))
    optimizer = nnx.Optimizer(model, optax.adam(2e-3), wrt=nnx.Param)
    tokens = None if mesh is None else NamedSharding(mesh, PartitionSpec("data", "sequence"))
    losses = []
    for text in data:
        # Shifted before it is cut: the next byte may lie on another device.
        pair = jax.device_put((text[:, :-1], text[:, 1:]), tokens)
        losses.append(train_step(model, optimizer, *pair))
    return np.array(losses)


def place(mesh: Mesh) -> Callable[[Any, Array], Array]:
    """A function of a parameter's path and the parameter, which puts it on the mesh."""

    def put(path: Any, x: Array) -> Array:
        *_, layer, name = [str(step.key) for step in path if hasattr(step, "key")]
        cut = CUT.get(layer, {}).get(name)
        axes = [] if cut is None else [*[None] * cut, "tensor"]
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

    return put


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


def beside_one_device(
    shape: tuple[int, ...] = (2, 2, 2),
    steps: int = 30,
    *,
    scheme: str = "ring",
    dtypes: tuple[str, ...] = ("float32", "float16"),
    batch: int = 8,
    length: int = 128,
    layers: int = 2,
    width: int = 96,
    heads: int = 4,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Prints the losses of one device and of a mesh, and returns both for each type, [steps]."""
    sizes = {"layers": layers, "width": width, "heads": heads}
    mesh = jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    attend = parallel.attention_fn(
        mesh, batch="data", heads="tensor", sequence="sequence", scheme=scheme
    )
    over_mesh = attention_fn(attention=attend)
    data, curves = batches(steps, batch, length), {}
    for dtype in dtypes:
        one = train(in_type(dtype, attention_fn()), data, None, **sizes)
        many = train(in_type(dtype, over_mesh), data, mesh, **sizes)
        curves[dtype] = one, many
        far = np.abs(one - many).max()
        print(f"{dtype}, {mesh.size} devices beside one: the losses are at most {far:.1e} apart")
        for step in sorted({*range(0, steps, max(1, steps // 6)), steps - 1}):
            print(f"{step:6}{one[step]:12.6f}{many[step]:12.6f}")
    return curves


def command(
    plot: Annotated[Path | None, typer.Argument(help="Where to draw the curves.")] = None,
    mesh: Annotated[str, typer.Option(help="Devices of data, tensor, sequence: 2,2,2.")] = "",
    scheme: Annotated[str, typer.Option(help="Of the mesh's attention.")] = "ring",
) -> None:
    """Trains on one device in several types; or, with --mesh, on simulated devices beside one."""
    if not mesh:
        main(plot=plot)
        return
    shape = tuple(int(x) for x in mesh.split(","))
    jax.config.update("jax_num_cpu_devices", math.prod(shape))
    beside_one_device(shape, scheme=scheme)


if __name__ == "__main__":
    typer.run(command)
