"""Fast Sinkhorn I and II (arXiv 2202.10042, 2206.09049): optimal transport on a line in O(N).

    python -m examples.neighbours.sinkhorn [--output out]

The kernel exp(−|i − j|·h/ε) of points h apart is what a two-sided ALiBi of slope κ = h/ε makes of
scores that are all 0. Its product with v needs no matrix: with λ = e^(−κ),

    p_{i+1} = λ·p_i + v_{i+1},   q_i = λ·(q_{i+1} + v_{i+1}),   K·v = p + q.

In logarithms, log(K·e^g) is the log-sum-exp of attention with that bias and g added to the scores.
Fast Sinkhorn I scales K's rows and columns in turn until the plan diag(e^f)·K·diag(e^g) has the
wanted sums. II multiplies the kernel by the plan at each iteration (the inexact proximal point
method): the plan stays diag·λ^(ℓ|i − j|)·diag, and its cost tends to that of ε = 0.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import itertools
import re
import tarfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from jax import lax
from scipy.stats import wasserstein_distance

from examples.neighbours import _shared
from pasa_jax import dot_product_attention

Array = jax.Array
# (g [N], κ []) -> log(K·e^g) [N]
LogProduct = Callable[[Array, Array], Array]


@partial(jax.jit, static_argnames="logs")
def recursions(g: Array, kappa: Array, *, logs: bool = True) -> Array:
    """log(K·e^g) [N] by the two recursions: sums of logarithms, or of e^g as it is."""
    if logs:
        plus, times, v, rate, nothing = jnp.logaddexp, jnp.add, g, -kappa, jnp.finfo(g.dtype).min
    else:
        plus, times, v, rate, nothing = jnp.add, jnp.multiply, jnp.exp(g), jnp.exp(-kappa), 0

    def after(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        return times(left[0], right[0]), plus(times(left[1], right[0]), right[1])

    both = jnp.stack([v, v[::-1]])
    p, above = lax.associative_scan(after, (jnp.full_like(both[:1], rate), both), axis=1)[1]
    q = times(jnp.append(above[-2::-1], jnp.full_like(v[:1], nothing)), rate)  # no diagonal
    return plus(p, q) if logs else jnp.log(p + q)


def dense(g: Array, kappa: Array) -> Array:
    """The same from the whole matrix."""
    at = jnp.arange(g.size)
    return jax.nn.logsumexp(g - kappa * jnp.abs(at[:, None] - at).astype(g.dtype), axis=1)


def attention(g: Array, kappa: Array) -> Array:
    """The same as the log-sum-exp of this library's attention: O(N²), without the matrix."""

    def alibi(score: Any, b: Any, h: Any, q: Any, kv: Any, *, kv_data: Any, head_data: Any) -> Any:
        return score - head_data * jnp.abs(q - kv).astype(score.dtype) + kv_data

    options = {"score_mod": alibi, "kv_data": g, "head_data": kappa[None], "return_residual": True}
    return dot_product_attention(*[jnp.zeros((g.size, 1, 1), g.dtype)] * 3, **options)[1][:, 0]


LINEAR = partial(recursions, logs=False)


@partial(jax.jit, static_argnums=(3, 4, 5))
def solve(
    a: Array, b: Array, kappa: Array, iterations: int, proximal: bool, multiply: LogProduct
) -> tuple[Array, Array, Array]:
    """f, g [N] of the plan diag(e^f)·λ^(ℓ|i−j|)·diag(e^g), and ℓ·κ.

    Arguments:
      a, b: [N] masses, each of sum 1.
      proximal: False: Fast Sinkhorn I, ℓ = 1. True: II, ℓ = 1, 2, …; an iteration starts with
        the factors of the columns that the one before ended with.
    """
    log_a, log_b = (jnp.log(jnp.maximum(x, 1e-300)) for x in (a, b))

    def step(carry: tuple[Array, Array], count: Array) -> tuple[tuple[Array, Array], Array]:
        g, change = carry
        slope = kappa * count if proximal else kappa
        f = log_a - multiply(g + change if proximal else g, slope)
        new = log_b - multiply(f, slope)
        return (new, new - g), f

    counts = 1 + jnp.arange(iterations).astype(a.dtype)
    (g, _), rows = lax.scan(step, (jnp.zeros_like(b), jnp.zeros_like(b)), counts)
    return rows[-1], g, kappa * (iterations if proximal else 1)


@jax.jit
def cost(f: Array, g: Array, slope: Array) -> Array:
    """Σ |i − j|·plan_ij in O(N): minus the derivative of the plan's sum by the slope."""
    return -jax.grad(lambda slope: jnp.sum(jnp.exp(f + recursions(g, slope))))(slope)


def masses(points: int) -> list[Array]:
    """[points] twice: where in the sources of two modules the word self stands."""
    sources = [inspect.getsource(module) for module in (argparse, tarfile)]
    places = [[m.start() / len(s) for m in re.finditer(r"\bself\b", s)] for s in sources]
    return [jnp.asarray(np.histogram(x, points, (0, 1))[0] / len(x)) for x in places]


def distances(points: int, iterations: int) -> dict[str, float]:
    """W1 of the two masses on [0, 1] by each way, and the true one."""
    a, b = masses(points)
    at = np.linspace(0, 1, points, endpoint=False)
    found = {"scipy": float(wasserstein_distance(at, at, a, b))}
    ways = {"I": (False, LINEAR), "I in logs": (False, recursions), "II": (True, recursions)}
    for epsilon, (name, way) in itertools.product((1e-1, 1e-2, 1e-4), ways.items()):
        plan = solve(a, b, jnp.asarray(1 / points / epsilon), iterations, *way)
        found[f"{name}, ε={epsilon:g}"] = float(cost(*plan)) / points
    if importlib.util.find_spec("ot") is not None:
        import ot  # pyright: ignore[reportMissingImports]

        x, y = np.flatnonzero(a), np.flatnonzero(b)  # it divides by the masses
        given = np.asarray(a)[x], np.asarray(b)[y], np.abs(x[:, None] - y) / points
        plan = ot.sinkhorn(*given, 0.1, numItermax=iterations, stopThr=0, warn=False)
        found |= {"POT": float(ot.emd2(*given)), "POT, ε=0.1": float(np.sum(given[2] * plan))}
    return found


def differences(points: int, kappa: float) -> dict[str, float]:
    """Largest relative difference from the whole matrix: of products, of gradients."""
    rng = np.random.default_rng(0)
    g, slope = jnp.asarray(rng.standard_normal(points)), jnp.asarray(kappa)
    ways = {"I": LINEAR, "I in logs": recursions, "attention": attention}
    true = dense(g, slope)
    found = {name: float(jnp.abs(jnp.expm1(f(g, slope) - true)).max()) for name, f in ways.items()}

    def dual(a: Array, multiply: LogProduct = recursions) -> Array:
        f, g, _ = solve(a, b, slope, 20, False, multiply)
        return jnp.vdot(a, f) + jnp.vdot(b, g)

    a, b = masses(points)
    a = (a + 1 / points) / 2  # no mass is 0, where the logarithm has no derivative
    ours, whole = (jax.grad(dual)(a, way) for way in (recursions, dense))
    found["gradient"] = float(jnp.abs(ours - whole).max() / jnp.abs(whole).max())
    step = 1e-5 * a * rng.standard_normal(points)
    change = (dual(a + step) - dual(a - step)) / 2 / jnp.vdot(ours, step)
    return found | {"gradient by differences": float(jnp.abs(change - 1))}


def seconds(run: LogProduct, points: int, repeats: int = 5) -> float:
    """The median time of a product, compiled before."""
    inputs = jnp.linspace(-1, 1, points), jnp.asarray(0.01)
    compiled, times = jax.jit(run), []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        compiled(*inputs).block_until_ready()
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))


def main(
    output: Path = Path("out"), points: int = 512, iterations: int = 500, largest: int = 1_000_000
) -> dict[str, dict[str, float]]:
    """Prints the tables, saves the picture, returns what was measured; all in float64."""
    figure, ((left, right),) = _shared.picture(columns=2)
    with jax.enable_x64(True):
        found = {"differences": differences(128, 0.01), "W1": distances(points, iterations)}
        found["exponents"] = {}
        for name, run in {"I": LINEAR, "I in logs": recursions, "dense": dense}.items():
            sizes = np.geomspace(*((500, 4000) if run is dense else (1000, largest)), 3).astype(int)
            times = [seconds(run, n) for n in sizes]
            power = found["exponents"][name] = float(np.polyfit(np.log(sizes), np.log(times), 1)[0])
            left.loglog(sizes, times, "o-", label=f"{name}: N^{power:.2f}")
            rows = zip(map(str, sizes), times, strict=True)
            _shared.show(f"{name}: time ∝ N^{power:.2f}", ("points", "seconds of K·v"), rows)
        for name, mass in zip(("argparse", "tarfile"), masses(points), strict=True):
            right.plot(np.cumsum(mass), label=name)
    left.set(xlabel="points", ylabel="seconds of K·v")
    right.set(xlabel="place in the source", title="W1: the area between", ylabel="share of “self”")
    left.legend()
    right.legend()
    _shared.show("Difference from the matrix", ("of", "is"), found["differences"].items())
    title = f"W1 of two modules' places of self: {points} points, {iterations} iterations"
    rows = ((way, x, x / found["W1"]["scipy"] - 1) for way, x in found["W1"].items())
    _shared.show(title, ("way", "W1", "over scipy's, − 1"), rows)
    _shared.save(figure, output, "sinkhorn")
    return found


if __name__ == "__main__":
    typer.run(main)
