"""Orders of tokens in which every device has as much to do beside a causal mask.

In the natural order the first device's queries see few keys and the last one's see all. A
permutation of the tokens, with their positions, balances that. It is applied once, where data are
loaded: to tokens, labels, loss masks, positions and segments alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np

from pasa_jax.core.errors import wrong
from pasa_jax.core.mods import call

Tree = TypeVar("Tree")


def zigzag(x: Tree, devices: int, *, axis: int = 1) -> Tree:
    """The tokens in zigzag: of 2·devices pieces, device r gets pieces r and 2·devices − 1 − r.

    Arguments:
      x: an array, or a tree of arrays, of NumPy or JAX; each has tokens along ``axis``, as many as
        2·devices divides, and not sharded over axes of type Explicit.
      devices: over which the sequence is cut.

    Raises:
      ValueError: the length is not divided.

    >>> print(*zigzag(np.arange(8), 2, axis=0))
    0 1 6 7 2 3 4 5
    """
    return _taken(x, axis, devices, 2, _zigzag)


def inverse_zigzag(x: Tree, devices: int, *, axis: int = 1) -> Tree:
    """The tokens in their natural order, from `zigzag`.

    >>> print(*inverse_zigzag(zigzag(np.arange(8), 2, axis=0), 2, axis=0))
    0 1 2 3 4 5 6 7
    """
    return _taken(x, axis, devices, 2, lambda n, d: np.argsort(_zigzag(n, d)))


def striped(x: Tree, devices: int, *, axis: int = 1) -> Tree:
    """The tokens dealt out: token t goes to device t mod devices.

    Arguments: as of `zigzag`; ``devices`` divides the length.

    >>> print(*striped(np.arange(8), 2, axis=0))
    0 2 4 6 1 3 5 7
    """
    return _taken(x, axis, devices, 1, _striped)


def inverse_striped(x: Tree, devices: int, *, axis: int = 1) -> Tree:
    """The tokens in their natural order, from `striped`.

    >>> print(*inverse_striped(striped(np.arange(8), 2, axis=0), 2, axis=0))
    0 1 2 3 4 5 6 7
    """
    return _taken(x, axis, devices, 1, lambda n, d: np.argsort(_striped(n, d)))


def _zigzag(length: int, devices: int) -> np.ndarray:
    pieces = np.arange(length).reshape(2 * devices, -1)
    return np.stack([pieces[:devices], pieces[::-1][:devices]], axis=1).reshape(-1)


def _striped(length: int, devices: int) -> np.ndarray:
    return np.arange(length).reshape(-1, devices).T.reshape(-1)


def _taken(
    tree: Any, axis: int, devices: int, pieces: int, order: Callable[[int, int], np.ndarray]
) -> Any:
    if not isinstance(devices, int) or devices < 1:
        raise wrong("devices", "be a positive int", repr(devices))

    def take(x: Any) -> Any:
        if not -x.ndim <= axis < x.ndim:
            raise wrong("axis", f"be an axis of x, which has {x.ndim}", axis)
        length = x.shape[axis]
        if length % (pieces * devices):
            allowed = f"have a number of tokens that {pieces * devices} divides"
            way_out = "Pad it in the loader, and hide the padding by key_value_seq_lengths."
            raise wrong("x", allowed, length, way_out)
        return x.take(order(length, devices), axis=axis)

    return jax.tree.map(take, tree)


@dataclass(frozen=True)
class _ByPosition:
    function: Callable[..., Any]

    def __call__(self, *arguments: Any, q_data: Any, kv_data: Any, head_data: Any = None) -> Any:
        *first, _, _ = arguments
        positions = (q_data["position"], kv_data["position"])
        data = {"q_data": q_data, "kv_data": kv_data, "head_data": head_data}
        return call(self.function, *first, *positions, **data)


def by_position(function: Callable[..., Any]) -> Callable[..., Any]:
    """A mask_mod or score_mod that gets positions in place of indices.

    Indices count in the arrays as they are given, permuted or not. The call passes the positions
    as ``q_data={"position": [T], …}`` and ``kv_data={"position": [S], …}``, whose other entries the
    function gets too.

    >>> causal = by_position(lambda b, h, q, kv: kv <= q)
    >>> causal(0, 0, 5, 6, q_data={"position": 9}, kv_data={"position": 8})
    True
    """
    return _ByPosition(function)
