"""Names for failures whose cause is known, so that they do not hide new ones.

Each is a name and a test of a failure. A defect that is repaired is taken off the list.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.fuzz.check import Failure

KNOWN: dict[str, Callable[[Failure], bool]] = {}


def name_of(failure: Failure) -> str | None:
    """The name of the first known defect that explains a failure, or None."""
    return next((name for name, explains in KNOWN.items() if explains(failure)), None)
