"""Heads on which ways to multiply queries and keys in few bits are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from examples.neighbours._shared import smollm2_heads
from pasa_jax.evidence.keys import kinds

Doubles = NDArray[np.float64]
# (queries, keys) [T, D] of one head -> scores [T, S], up to a constant of each row.
Scheme = Callable[[Doubles, Doubles], NDArray]
ALIKE = 6  # heads whose queries are nearly equal: all rows of one have one error
SMOLLM2, MEDIAN, WORST = "SmolLM2", "SmolLM2, median", "SmolLM2, worst"


class Head(NamedTuple):
    """One head: queries, keys and values [T, D], numbers of float16 held in float64, as a kernel is
    given them; queries are not yet divided by √D.
    """

    name: str
    query: Doubles
    key: Doubles
    value: Doubles
    is_causal: bool = False


def head(name: str, *arrays: NDArray, is_causal: bool = False) -> Head:
    """The head whose arrays are rounded to float16."""
    q, k, v = (x.astype(np.float16).astype(np.float64) for x in arrays)
    return Head(name, q, k, v, is_causal)


def synthetic(tokens: int, size: int) -> Iterator[Head]:
    """The kinds of `pasa_jax.evidence.keys`, and four more; values of mean 0."""
    rng = np.random.default_rng(1)
    value = rng.standard_normal((tokens, size))
    for kind in kinds(tokens, size):
        yield head(*kind, value)
    shape = (2, tokens, size)
    signs = rng.choice([-1.0, 1.0], size)
    q, k = rng.standard_normal(shape)
    yield head(
        "bias drifts, -200 to 200", q, k + np.linspace(-200, 200, tokens)[:, None] * signs, value
    )
    for _ in range(ALIKE):
        q, k = rng.standard_normal(shape)
        yield head(
            "bias 20, of queries too", q + 20 * signs, k + 20 * rng.permutation(signs), value
        )
        yield head("PASA's: uniform at 30", *rng.uniform(29.5, 30.5, shape), value)
    rare = 10 * rng.standard_normal(shape) * (rng.random(shape) < 1e-3)
    yield head("FA3's: 0.1 % outliers", *(rng.standard_normal(shape) + rare), value)


def of_smollm2(tokens: int, every: int = 1) -> Iterator[Head]:
    """The first query head of each key head of SmolLM2's layers, on a text, causal.

    Arguments:
      every: each so many layers; 0: none.
    """
    if not every:
        return
    of_layers = (x[::every] for x in smollm2_heads(tokens))
    for q, k, v in zip(*of_layers, strict=True):
        for n, (key, value) in enumerate(zip(k, v, strict=True)):
            query = q[n * len(q) // len(k)]
            yield head(SMOLLM2, query, key, value, is_causal=True)


def blocks(x: NDArray, rows: int) -> NDArray:
    """[T/rows, rows, D] of x [T, D]."""
    return x.reshape(-1, rows, x.shape[-1])


def mean_of_blocks(x: NDArray, rows: int) -> NDArray:
    """[T, D] the mean of each block of rows, at each of its rows."""
    return np.repeat(blocks(x, rows).mean(axis=1), rows, axis=0)


def mean_where_shorter(x: NDArray, rows: int) -> NDArray:
    """`mean_of_blocks` for rows that are shorter without it, 0 for the others: the key of an
    attention sink is short, and its block's mean would lengthen it.
    """
    mean = mean_of_blocks(x, rows)
    shorter = np.linalg.norm(x - mean, axis=1) < np.linalg.norm(x, axis=1)
    return np.where(shorter[:, None], mean, 0)


def output(scores: NDArray, head: Head) -> NDArray:
    """softmax(scores)·V, in the type of the scores."""
    if head.is_causal:
        scores = np.where(np.tri(*scores.shape, dtype=bool), scores, -np.inf)
    with np.errstate(invalid="ignore"):  # infinite scores give NaN, which is a result
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
    return p @ head.value.astype(p.dtype) / p.sum(axis=1, keepdims=True)


def true_output(head: Head) -> Doubles:
    """Of the formula in float64."""
    return output(head.query @ head.key.T / np.sqrt(head.key.shape[-1]), head)


def rms_error(found: NDArray, true: Doubles) -> float:
    """The root mean square of the error over that of the output."""
    return float(np.linalg.norm(found - true) / np.linalg.norm(true))


def errors(schemes: Mapping[str, Scheme], heads: Iterable[Head]) -> dict[str, dict[str, float]]:
    """By scheme, then by the heads' name: the mean `rms_error` of their outputs against float64; of
    SmolLM2's the median and the largest.

    Softmax, P and V are in float32 whatever the scheme: what differs is how Q·Kᵀ is formed.
    """
    found: dict[str, dict[str, list[float]]] = {name: {} for name in schemes}
    for head in heads:
        query, true = head.query / np.sqrt(head.query.shape[-1]), true_output(head)
        for name, scheme in schemes.items():
            out = output(scheme(query, head.key).astype(np.float32), head)
            found[name].setdefault(head.name, []).append(rms_error(out, true))
    return {name: _summary(of_heads) for name, of_heads in found.items()}


def _summary(errors: dict[str, list[float]]) -> dict[str, float]:
    real = errors.pop(SMOLLM2, None)
    means = {name: float(np.mean(x)) for name, x in errors.items()}
    return means | ({} if real is None else {MEDIAN: float(np.median(real)), WORST: max(real)})
