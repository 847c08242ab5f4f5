"""Checks of single values that several packages make. (`errors.check_choice` is another.)"""

from __future__ import annotations

import math
from typing import Any, TypeGuard

import numpy as np

from pasa_jax.core.errors import wrong

_FAR = 2**30  # of a window: beyond any sequence, and sums with it fit int32


def is_real(x: Any) -> TypeGuard[float]:
    """Whether x is a real number of Python or NumPy."""
    return isinstance(x, (int, float, np.integer, np.floating)) and not isinstance(x, bool)


def is_size(x: Any) -> bool:
    """Whether x is a non-negative int of Python or NumPy."""
    return isinstance(x, (int, np.integer)) and not isinstance(x, bool) and int(x) >= 0


def flag(name: str, value: bool) -> bool:
    """``value``, which must be a bool."""
    if not isinstance(value, (bool, np.bool_)):
        raise wrong(name, "be True or False", repr(value))
    return bool(value)


def positive(name: str, value: float) -> float:
    """``value``, which must be a positive, finite number."""
    if not is_real(value) or not 0 < value < math.inf:
        raise wrong(name, "be a positive, finite number", repr(value))
    return float(value)


def window(given: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """A local window as (left, right); None where there is none."""
    if given is None:
        return None
    pair = tuple(given) if isinstance(given, (tuple, list)) else (given, given)
    if len(pair) != 2 or not all(is_size(w) for w in pair):
        raise wrong("local_window_size", "be a non-negative int or a pair of them", repr(given))
    return min(int(pair[0]), _FAR), min(int(pair[1]), _FAR)
