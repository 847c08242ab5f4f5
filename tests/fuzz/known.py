"""Names for failures whose cause is known, so that they do not hide new ones.

Each is a name and a test of a failure. A defect that is repaired is taken off the list.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from tests.fuzz import oracle
from tests.fuzz.bounds import arithmetic
from tests.fuzz.check import Failure


def _narrow_lengths(f: Failure) -> bool:
    x, arrays = f.call.signature, f.call.arrays
    full = {"query_seq_lengths": x.t, "key_value_seq_lengths": x.s}
    return any(
        name in arrays and np.iinfo(arrays[name].dtype).max < size for name, size in full.items()
    )


def _padding_and_moved_tiles(f: Failure) -> bool:
    x = f.call.signature
    rows = max(1, min(x.schedule.block_q // (x.n // x.k), x.t))
    return "query_seq_lengths" in f.call.arrays and f.what.startswith("d ") and x.t % rows > 0


def _bias(f: Failure) -> np.ndarray | None:
    bias = f.call.arrays.get("bias")
    return None if bias is None or bias.dtype == np.int32 else bias.astype(float)


def _hiding_bias_and_padding(f: Failure) -> bool:
    bias = _bias(f)
    hides = bias is not None and bool(np.any(np.isneginf(bias)))
    return hides and "query_seq_lengths" in f.call.arrays and f.what.startswith("d ")


def _lowest_bias(f: Failure) -> bool:
    bias = _bias(f)
    low = bias is not None and float(jnp.finfo(f.call.arrays["bias"].dtype).min)
    return bias is not None and bool(np.any(bias == low))


def _nan_bias(f: Failure) -> bool:
    bias = _bias(f)
    return bias is not None and bool(np.any(np.isnan(bias)))


def _integer_bias(f: Failure) -> bool:
    return f.kind == "raised" and f.call.arrays.get("bias", np.zeros(0)).dtype == np.int32


def _behind(f: Failure) -> bool:
    return not arithmetic(f.call.signature).reach


def _reference_and_bias(f: Failure) -> bool:
    bias = _bias(f)
    large = bias is not None and bool(np.any(np.abs(np.where(np.isfinite(bias), bias, 0)) > 100))
    return _behind(f) and "reference" in arithmetic(f.call.signature).shifts and large


def _factor(f: Failure) -> float:
    x = f.call.signature
    return abs(float(f.call.arrays.get("scale", x.static.get("scale", x.d**-0.5))))


def _scaled_query(f: Failure) -> bool:
    top = float(jnp.finfo(f.call.signature.dtype).max)
    query = np.abs(np.nan_to_num(f.call.arrays["query"].astype(float), posinf=0)).max()
    return _behind(f) and _factor(f) * query > top


def _huge_scale(f: Failure) -> bool:
    return _factor(f) >= 1e20


def _unseen_bounds(f: Failure) -> bool:
    """A key or value that the row does not see is far larger than those that it sees."""
    with np.errstate(all="ignore"):
        true = oracle.truth(f.call)
        for y in (true.k, true.v):
            size = np.abs(y).max(-1)[:, :, None, :]
            largest = np.max(size, axis=-1, keepdims=True)
            mine = np.max(np.where(true.seen, size, 0), axis=-1, keepdims=True)
            if np.any(true.seen.any(-1, keepdims=True) & (largest > 64 * mine) & (largest > 1e4)):
                return True
    return False


def _cut_exponent(f: Failure) -> bool:
    return (
        f.what == "log-sum-exp"
        and f.call.signature.dtype != "float16"
        and (abs(f.true) > 1e30 or abs(f.found) > 1e30)
    )


KNOWN: dict[str, Callable[[Failure], bool]] = {
    "narrow integer lengths": _narrow_lengths,
    "gradients of padding in a tile that is moved back": _padding_and_moved_tiles,
    "bias of -inf with query lengths": _hiding_bias_and_padding,
    "bias of the lowest finite number": _lowest_bias,
    "NaN in a bias": _nan_bias,
    "integer bias": _integer_bias,
    "reference behind the rounding with a large bias": _reference_and_bias,
    "scaled query beyond its type behind the rounding": _scaled_query,
    "huge scale": _huge_scale,
    "log-sum-exp where the exponent is cut": _cut_exponent,
    "bounds of keys and values that the row does not see": _unseen_bounds,
}


def name_of(failure: Failure) -> str | None:
    """The name of the first known defect that explains a failure, or None."""
    return next((name for name, explains in KNOWN.items() if explains(failure)), None)
