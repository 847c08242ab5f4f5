"""A model trained by Muon and by AdamW while its attention scores grow past float16.

    python -m examples.neighbours.muon [--output out]

Muon (arXiv 2502.16982) makes each update of a matrix orthogonal, so that queries and keys grow in
all directions at once, and scores grow with them; where no norm on queries and keys holds them,
models trained by Muon are reported to reach logits beyond 1000 (Kimi K2, arXiv 2507.20534).

Model, data and step are those of examples/training.py: float32 parameters, attention on 16-bit
arrays. A small model's scores stay far below float16's 65504 in 1,000 steps, so ``RATE`` multiplies
the updates of the kernels of queries and keys. The soft cap is c·tanh(s/c).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from flax import nnx
from optax.contrib import MuonDimensionNumbers

from examples import training
from examples.neighbours import _shared
from pasa_jax import dot_product_attention
from pasa_jax.plugins.nnx import attention_fn

Array = jax.Array
CAP = 50.0  # of scaled scores, as Gemma 2 has it
RATE = 30.0  # of queries' and keys' updates
LARGEST = 65504.0  # float16's
seen: list[Array] = []  # what `probing` leaves while a function is traced


def plain(query: Array, key: Array, value: Array, *, cap: float | None = None, **_: Any) -> Array:
    """Eager code with unscaled scores [B, N, T, T] in the inputs' type, causal."""
    store = query.dtype
    s = jnp.einsum("btnd,bsnd->bnts", query, key, preferred_element_type=jnp.float32).astype(store)
    s = s * jnp.asarray(query.shape[-1] ** -0.5, store)
    if cap is not None:
        s = jnp.asarray(cap, store) * jnp.tanh(s / jnp.asarray(cap, store))
    s = jnp.where(jnp.tril(jnp.ones(s.shape[-2:], bool)), s, jnp.finfo(store).min)
    p = jax.nn.softmax(s.astype(jnp.float32)).astype(store)
    return jnp.einsum("bnts,bsnd->btnd", p, value, preferred_element_type=jnp.float32).astype(store)


RUNS: dict[str, training.AttentionFn] = {
    "float32": training.in_type("float32", plain),
    "plain float16": training.in_type("float16", plain),
    "shifts, float16": training.in_type("float16", attention_fn()),
    "plain float16, capped": training.in_type("float16", partial(plain, cap=CAP)),
    "shifts, float16, capped": training.in_type("float16", attention_fn(logits_soft_cap=CAP)),
}


def matrices(params: Any) -> Any:
    """Which axes of each kernel are inputs and which outputs; None: AdamW's."""

    def of(path: Any, x: Array) -> MuonDimensionNumbers | None:
        names = [str(getattr(step, "key", "")) for step in path]
        if "kernel" not in names or "head" in names:
            return None
        inputs = 2 if "out" in names else 1  # of attention: [N, D, W]; others [W, …]
        axes = tuple(range(x.ndim))
        return MuonDimensionNumbers(axes[:inputs], axes[inputs:])

    return jax.tree.map_with_path(of, params)


def optimizer(name: str, rate: float) -> optax.GradientTransformation:
    """AdamW or Muon, whose updates of queries' and keys' kernels are ``rate`` times as long."""
    base = {
        "AdamW": partial(optax.adamw, 2e-3),
        "Muon": partial(optax.contrib.muon, 0.02, muon_weight_dimension_numbers=matrices),
    }[name]()

    def of(path: Any, x: Array) -> str:
        names = {str(getattr(step, "key", "")) for step in path}
        return "raised" if names & {"query", "key"} else "as it is"

    raised: dict[Any, Any] = {"raised": optax.scale(rate), "as it is": optax.identity()}
    return optax.chain(
        base, optax.transforms.partition(raised, partial(jax.tree.map_with_path, of))
    )


def probing(query: Array, key: Array, value: Array, **_: Any) -> Array:
    """Attention in float32 that leaves max |q·k| of the call in ``seen``."""
    out, statistics = dot_product_attention(
        query, key, value, is_causal=True, return_statistics=True
    )
    seen.append(jnp.max(statistics.max_score) * query.shape[-1] ** 0.5)
    return out


@partial(jax.jit, static_argnums=0)
def largest_product(probe: Any, state: Any, text: Array) -> Array:
    """max |q·k| over layers, heads and places, of a model whose attention is `probing`."""
    seen.clear()
    nnx.merge(probe, state)(text)
    return jnp.max(jnp.stack(seen))


def train(
    run: str, optimizer: optax.GradientTransformation, data: np.ndarray, **sizes: int
) -> tuple[np.ndarray, np.ndarray]:
    """The losses [steps], and max |q·k| before each part of ``data`` [parts, steps, B, T + 1]."""
    make = partial(training.LanguageModel, length=data.shape[-1] - 1, **sizes)
    model = make(RUNS[run], rngs=nnx.Rngs(0))
    graph, state = nnx.split((model, nnx.Optimizer(model, optimizer, wrt=nnx.Param)))
    probe, _ = nnx.split(make(probing, rngs=nnx.Rngs(0)))

    @jax.jit
    def part(state: Any, texts: Array) -> tuple[Any, Array]:
        def step(state: Any, text: Array) -> tuple[Any, Array]:
            pair = nnx.merge(graph, state)
            loss = training.train_step(*pair, text[:, :-1], text[:, 1:])
            return nnx.state(pair), loss

        return jax.lax.scan(step, state, texts)

    losses, largest = [], []
    for texts in jnp.asarray(data):
        params = nnx.state(nnx.merge(graph, state)[0], nnx.Param)
        largest.append(largest_product(probe, params, texts[0, :, :-1]))
        state, lost = part(state, texts)
        losses.append(lost)
    return np.concatenate(losses), np.asarray(largest)


def main(
    output: Path = Path("out"), steps: int = 1000, length: int = 64, width: int = 32
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Prints the table, saves the picture; losses [steps] and max |q·k| [20] of each run."""
    data = training.batches(steps, 4, length).reshape(20, steps // 20, 4, length + 1)
    runs = [("Muon", 1.0, "float32"), ("AdamW", RATE, "plain float16")]
    runs += [("Muon", RATE, name) for name in RUNS]
    found, rows = {}, []
    figure, ((left, right),) = _shared.picture(columns=2)
    for name, rate, run in runs:
        title = f"{name} ×{rate:g}, {run}"
        losses, largest = found[title] = train(
            run, optimizer(name, rate), data, layers=1, width=width, heads=2
        )
        broken = np.flatnonzero(~np.isfinite(losses))
        known = largest[np.isfinite(largest)]
        rows.append((
            title, known[0], known[-1], str(broken[0]) if len(broken) else "–",
            float(losses[-steps // 10 :].mean()),
        ))  # fmt: skip
        left.semilogy(np.arange(len(known)) * data.shape[1], known, label=title)
        right.plot(losses.reshape(20, -1).mean(axis=1), label=title)
    columns = ("run", "max |q·k| at first", "at last", "NaN from step", "loss of the last tenth")
    _shared.show(f"{steps} steps", columns, rows)
    left.axhline(LARGEST, color="red", linestyle="--", linewidth=1)
    left.set(xlabel="step", title="max |q·k|; red: float16's largest")
    right.set(xlabel=f"{data.shape[1]} steps", title="loss, nats a byte")
    left.legend(fontsize="x-small")
    _shared.save(figure, output, "muon")
    return found


if __name__ == "__main__":
    typer.run(main)
