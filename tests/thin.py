"""Which values of a parameter `make test` runs; `make test-full` runs the others."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def some(values: Iterable[Any], every: int = 3, start: int = 0) -> list[Any]:
    """Values of one parameter: every ``every``-th, from ``start`` on, in `make test`."""
    return [_marked((x,), i % every == start) for i, x in enumerate(values)]


def only(often: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """Values of one parameter: those in ``often`` in `make test`."""
    return [_marked((x,), x in often) for x in values]


def some_tuples(values: Iterable[tuple[Any, ...]], every: int = 3, start: int = 0) -> list[Any]:
    """`some` for several parameters at once."""
    return [_marked(x, i % every == start) for i, x in enumerate(values)]


def _marked(values: tuple[Any, ...], often: bool) -> Any:
    return pytest.param(*values, marks=() if often else pytest.mark.full)
