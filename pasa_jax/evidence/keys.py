"""Keys of several kinds, on which ways to store or multiply them are compared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Kind(NamedTuple):
    """Queries and keys [T, D] of one head, in float64."""

    name: str
    query: NDArray[np.float64]
    key: NDArray[np.float64]


def rotated(x: NDArray, base: float = 1e4) -> NDArray:
    """x [T, D] with rotary positions."""
    size = x.shape[-1]
    angle = np.arange(len(x))[:, None] * base ** (-np.arange(0, size, 2) / size)
    first, second = np.split(x, 2, axis=-1)
    turned = (
        first * np.cos(angle) - second * np.sin(angle),
        second * np.cos(angle) + first * np.sin(angle),
    )
    return np.concatenate(turned, axis=-1)


def kinds(tokens: int, size: int) -> Iterator[Kind]:
    """Biased, biased before they are rotated, and heavy-tailed keys."""
    rng = np.random.default_rng(0)
    q, noise = rng.standard_normal((2, tokens, size))
    signs = rng.choice([-1.0, 1.0], size)
    for bias in (0, 50, 200):
        yield Kind(f"bias {bias}", q, noise + bias * signs)
    for name, pair in (("a fast", 1), ("a slow", size // 2 - 1)):
        bias = np.zeros(size)
        bias[[pair, pair + size // 2]] = 200
        yield Kind(f"bias 200 in {name} pair, rotated", rotated(q), rotated(noise + bias))
    heavy = rng.standard_t(2, (tokens, size))
    yield Kind("heavy-tailed (Student's t, 2)", q, heavy)
