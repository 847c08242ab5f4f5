"""Names for failures whose cause is known, so that they do not hide new ones.

Each is a name and a test of a failure. A defect that is repaired is taken off the list.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from tests.fuzz.bounds import arithmetic
from tests.fuzz.check import Failure


def _largest(f: Failure, name: str) -> float:
    x = np.abs(f.call.arrays[name].astype(float))
    return float(np.max(np.where(np.isfinite(x), x, 0), initial=0))


def _mixed_keys(f: Failure) -> bool:
    """K' = M·K leaves the keys' type, which is at most twice as large as 1/α times a key."""
    a = arithmetic(f.call.signature)
    return a.shifts == ("paper",) and _largest(f, "key") > 0.01 * float(jnp.finfo(a.dtype).max)


def _divided_sink(f: Failure) -> bool:
    """sink/2^e is below float32's least number."""
    huge = _largest(f, "query") * _largest(f, "key") > 1e60
    return "sinks" in f.call.arrays and huge


def _narrow_sum(f: Failure) -> bool:
    """A tile that a row does not see is summed before it is weighted by 0."""
    a = arithmetic(f.call.signature)
    block = f.call.signature.schedule.block_kv
    return a.precision.accumulator == "float16" and block * _largest(f, "value") > 6e4


def _padding_of_reference(f: Failure) -> bool:
    x, a = f.call.signature, f.call.arrays
    spoiled = not np.all(np.isfinite(a["query"].astype(float)))
    return x.static["implementation"] == "reference" and f.what.startswith("d ") and spoiled


def _clipped_reference(f: Failure) -> bool:
    """The gradient goes through the clip of an output at its type's largest number."""
    x = f.call.signature
    large = _largest(f, "value") > 0.9 * float(jnp.finfo(x.dtype).max)
    return x.static["implementation"] == "reference" and f.what.startswith("d ") and large


def _unshifted_block(f: Failure) -> bool:
    """Keys that nobody sees, zeroed, are asked whether a shifted block stays in range."""
    a = arithmetic(f.call.signature)
    shifts = not {"mean", "mean_past"}.isdisjoint(a.shifts) or not a.reach
    return shifts and _largest(f, "key") > 0.45 * float(jnp.finfo(a.dtype).max)


KNOWN: dict[str, Callable[[Failure], bool]] = {
    "keys near their largest number mixed by paper": _mixed_keys,
    "a sink divided by a huge guard": _divided_sink,
    "unseen values summed in a float16 accumulator": _narrow_sum,
    "the reference's gradient through its clip": _clipped_reference,
    "a block that is not shifted because of unseen keys": _unshifted_block,
    "NaN in padding queries of the reference's gradient": _padding_of_reference,
}


def name_of(failure: Failure) -> str | None:
    """The name of the first known defect that explains a failure, or None."""
    return next((name for name, explains in KNOWN.items() if explains(failure)), None)
