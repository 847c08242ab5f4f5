"""A fixed slice of the fuzzer, and that its oracle is the formula of `tests.cases`."""

import numpy as np
import pytest

from pasa_jax import Precision, Schedule
from tests.cases import exact
from tests.fuzz import calls, check, fuzz, known, oracle
from tests.fuzz.calls import Call, Signature
from tests.thin import only

pytestmark = pytest.mark.usefixtures("optimized")
TILES = Schedule(block_q=16, block_kv=16)
SLICE = {
    "float16, everything at once": (
        Signature(
            dtype="float16", b=2, t=17, s=33, n=4, k=2, d=8, e=3,
            static={"schedule": TILES, "implementation": "lax", "is_causal": True,
                    "causal_alignment": "bottom_right", "logits_soft_cap": 30.0},
            extra={"bias": ((4, 1, 33), "float32"), "sinks": ((4,), "float32"),
                   "query_seq_lengths": ((2,), "int32"), "key_value_seq_lengths": ((2,), "int8"),
                   "scale": ((), "float32")},
        ),
        True,
    ),
    "bfloat16, mean, rounded products": (
        Signature(
            dtype="bfloat16", b=1, t=17, s=31, n=2, k=1, d=16, e=16,
            static={"schedule": Schedule(block_q=16, block_kv=16, target="ascend_910b"),
                    "implementation": "lax", "shift": "mean", "local_window_size": (7, 3)},
            extra={"mask": ((1, 2, 1, 31), "bool")},
        ),
        True,
    ),
    "float32, fields of Precision": (
        Signature(
            dtype="float32", b=1, t=16, s=40, n=1, k=1, d=8, e=8,
            static={"schedule": TILES, "implementation": "lax", "shift": "auto",
                    "precision": Precision(scores="float16", probabilities="bfloat16")},
            extra={"query_segments": ((1, 16), "int32"), "key_segments": ((1, 40), "int32")},
        ),
        False,
    ),
    "float32, by parts": (
        Signature(
            dtype="float32", b=2, t=9, s=40, n=2, k=1, d=8, e=8, cuts=(7, 30),
            static={"schedule": TILES, "implementation": "lax", "shift": "bound"},
            extra={"key_value_seq_lengths": ((2,), "uint8"), "sinks": ((2,), "float32")},
        ),
        True,
    ),
    "bfloat16, positions, blocks, functions and factors": (
        Signature(
            dtype="bfloat16", b=2, t=17, s=40, n=2, k=1, d=8, e=8,
            static={"schedule": TILES, "implementation": "lax", "is_causal": True,
                    "mask_mod": "stairs", "block": (8, 5)},
            extra={"q_positions": ((1, 17), "int32"), "kv_positions": ((2, 40), "int32"),
                   "kinds": ((1, 2, 3, 8), "int8"), "q_factors": ((2, 17, 2), "float32"),
                   "k_factors": ((40, 2), "float32")},
        ),
        True,
    ),
}  # fmt: skip
SHARED = ("is_causal", "causal_alignment", "logits_soft_cap")


@pytest.mark.parametrize(
    "name",
    only(
        [x for x in SLICE if x not in ("float32, by parts", "bfloat16, mean, rounded products")],
        SLICE,
    ),
)
def test_slice(name):
    signature, gradient = SLICE[name]
    tally = check.Tally()
    fuzz.checked(signature, np.random.default_rng(1), tally, data=16, gradient=gradient)
    new = [fuzz._line(f, 0) for f in tally.failures if known.name_of(f) is None]
    assert not new, "\n".join(new)
    assert tally.outputs >= 16


def test_oracle_is_the_formula_of_the_cases():
    """Two formulas that were written apart."""
    signature = SLICE["float16, everything at once"][0]
    rng = np.random.default_rng(3)
    call = calls.draw_call(signature, rng, hard=False)
    arrays = {k: v for k, v in call.arrays.items() if k not in ("sinks", "bias", "scale")}
    arrays["bias"] = np.zeros((4, 1, 33), np.float32)
    call = Call(signature, arrays, {})
    keywords = {k: v for k, v in signature.static.items() if k in SHARED}
    for name, full in (("query_seq_lengths", 17), ("key_value_seq_lengths", 33)):
        keywords[name] = np.clip(arrays[name].astype(int), 0, full)
    arrays = {k: v for k, v in arrays.items() if k in ("query", "key", "value")}
    out, lse = exact(arrays, keywords)
    true = oracle.truth(call)
    np.testing.assert_allclose(true.out.swapaxes(1, 2), out, atol=1e-12)
    seen = np.isfinite(lse)
    np.testing.assert_allclose(true.lse.swapaxes(1, 2)[seen], lse[seen], atol=1e-10)
