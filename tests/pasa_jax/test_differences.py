"""Calls of jax.nn's function and ours side by side: equal, or a row of the table in docs/api.md."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pasa_jax

API = Path(__file__).parents[2] / "docs" / "api.md"
rng = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def bias_with(x, *where):
    return jnp.zeros((1, 1, 6, 5)).at[(0, 0, *where)].set(x)


def lengths(*x, dtype="int32"):
    return {"key_value_seq_lengths": jnp.asarray(x, dtype)}


Q, K, V = normal(2, 6, 4, 8), normal(2, 5, 2, 8), normal(2, 5, 2, 8)
QKV = (Q, K, V)
LOWEST = float(jnp.finfo(jnp.float32).min)
EQUAL = {
    "T = 0": ((Q[:, :0], K, V), {}),
    "S = 0": ((Q, K[:, :0], V[:, :0]), {}),
    "B = 0": ((Q[:0], K[:0], V[:0]), {}),
    "unbatched": (tuple(x[0] for x in QKV), {}),
    "bias of integers": ((*QKV, jnp.ones((1, 1, 6, 5), jnp.int32)), {}),
    "NaN in a bias": ((*QKV, bias_with(jnp.nan, 1, 1)), {}),
    "infinite bias": ((*QKV, bias_with(jnp.inf, 1, 1)), {}),
    "lengths beyond the end": (QKV, lengths(99, 3)),
    "no valid query": (QKV, {"query_seq_lengths": jnp.asarray([0, 6], jnp.int32)}),
    "scale as an array": (QKV, {"scale": jnp.float32(0.3)}),
    "scale of 0": (QKV, {"scale": 0}),
    "xla": (QKV, {"implementation": "xla"}),
    "wide window": (QKV, {"local_window_size": 2**20}),
    "lists": (tuple(x.tolist() for x in QKV), {}),
}
# Both refuse these.
REFUSED = {
    "mask of floats": ((*QKV, None, normal(1, 1, 6, 5)), {}),
    "mask of integers": ((*QKV, None, jnp.ones((1, 1, 6, 5), jnp.int32)), {}),
    "lengths of floats": (QKV, lengths(2, 3, dtype="float32")),
    "types that differ": ((Q, K.astype(jnp.bfloat16), V), {}),
    "heads": ((Q, normal(2, 5, 3, 8), normal(2, 5, 3, 8)), {}),
    "layouts that differ": ((Q[0], K, V), {}),
    "five axes of bias": ((*QKV, normal(1, 2, 4, 6, 5)), {}),
    "eight bits": (tuple(x.astype(jnp.float8_e4m3fn) for x in QKV), {}),
    "no head size": ((Q[..., :0], K[..., :0], V), {}),
    "complex scale": (QKV, {"scale": 1j}),
}
# A row of the table, and a call that shows it.
DIFFERENT = {
    "a query that sees no key": ((*QKV, None, jnp.zeros((1, 1, 6, 5), bool)), {}),
    "value head size": ((Q, K, normal(2, 5, 2, 3)), {}),
    "bias of −∞ in a whole row": ((*QKV, bias_with(-jnp.inf, 2)), {}),
    "bias of the lowest finite number of its type": ((*QKV, bias_with(LOWEST, 2)), {}),
    "bias of bool": ((*QKV, jnp.ones((1, 1, 6, 5), bool)), {}),
    "integer or complex query, key and value": (tuple(x.astype(jnp.int32) for x in QKV), {}),
    "negative window": (QKV, {"local_window_size": (-1, 2)}),
    "negative lengths": (QKV, lengths(-2, 3)),
    "lengths": (QKV, lengths(2, 3, dtype="int8")),
    "scale that is not finite, or complex": (QKV, {"scale": np.inf}),
    "flags": (QKV, {"is_causal": 1}),
    '`implementation="cudnn"` without a cuDNN': (QKV, {"implementation": "cudnn"}),
    "NaN in a key or value that a row does not see": (
        (Q, K.at[:, 4].set(jnp.nan), V.at[:, 4].set(jnp.nan)),
        {"is_causal": True},
    ),
    "a visible key or value that is not finite": ((Q, K, V.at[:, 2, 0, 0].set(jnp.inf)), {}),
}
# Rows whose difference is one of type or transformation: tested in test_jax_nn.py.
ELSEWHERE = {"log-sum-exp", "float16 on the CPU"}


def result(function, arguments, keywords):
    """The output, or None where the call is refused."""
    try:
        with jax.numpy_dtype_promotion("standard"):
            out = function(*arguments, **keywords)
    except (ValueError, TypeError, RuntimeError):
        return None
    return np.asarray(out, np.complex128)


def both(call):
    functions = (jax.nn.dot_product_attention, pasa_jax.dot_product_attention)
    return [result(function, *call) for function in functions]


def same(theirs, ours):
    if theirs is None or ours is None:
        return theirs is ours
    return theirs.shape == ours.shape and np.allclose(theirs, ours, atol=3e-6, equal_nan=True)


@pytest.mark.parametrize("name", EQUAL)
def test_equal(name):
    theirs, ours = both(EQUAL[name])
    assert theirs is not None
    assert same(theirs, ours)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_both(name):
    assert both(REFUSED[name]) == [None, None]


@pytest.mark.parametrize("name", DIFFERENT)
def test_different(name):
    assert not same(*both(DIFFERENT[name]))


def test_every_difference_is_a_row_of_the_table_and_every_row_a_difference():
    section = API.read_text().split("## Where it differs")[1].split("\n## ")[0]
    table = [line for line in section.splitlines() if line.startswith("| ")]
    rows = {line.split(" | ")[0].removeprefix("| ") for line in table[2:]}  # below the heading
    assert rows == {*DIFFERENT, *ELSEWHERE}
