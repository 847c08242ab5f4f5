"""Checks of values that were read from a file. Errors name the field; `inside` adds the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pasa_jax.core.checks import is_real
from pasa_jax.core.errors import wrong

LARGEST = 2**31 - 1  # of a size; products of two still fit the 64 bits of an array's shape
_FLOAT32 = float(np.finfo(np.float32).max)
_SHOWN = 200


@contextmanager
def inside(what: Path | str) -> Iterator[None]:
    """A context that puts ``what`` before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def integer(name: str, value: Any, least: int = 1) -> int:
    """``value``, an int from ``least`` to `LARGEST`; True and False are refused."""
    is_int = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_int or not least <= value <= LARGEST:
        raise wrong(name, f"be an int from {least} to {LARGEST}", brief(value))
    return int(value)


def rope_base(name: str, value: Any) -> float:
    """θ, a float; below 1 the last pairs of a head would turn faster than the first."""
    if not (is_real(value) and 1 <= value <= _FLOAT32):
        raise wrong(name, "be a number of at least 1 and finite in float32", brief(value))
    return float(value)


def epsilon(name: str, value: Any) -> float:
    """The number that a norm adds to a mean square, as a float."""
    if not (is_real(value) and 0 < value <= 1):
        raise wrong(name, "be a number above 0 and at most 1", brief(value))
    return float(value)


def flag(name: str, value: Any) -> bool:
    """``value``, a bool; None is False."""
    if value is not None and not isinstance(value, bool):
        raise wrong(name, "be true or false", brief(value))
    return bool(value)


def brief(value: Any) -> str:
    """The repr of ``value``, cut where it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
