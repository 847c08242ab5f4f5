"""Products of 8-bit integers, beside the same call in float32 with twice the channels.

With q̂ and k̂ what the codes of q and of k − κ stand for, S = (q̂·k̂ + q·κ)/α is the product of
[q̂, q] and [k̂, κ], which any call computes in float32.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax import Precision, Schedule, dot_product_attention, explain
from pasa_jax.core.errors import BackendUnsupported
from pasa_jax.evidence import plain
from pasa_jax.evidence.keys import kinds
from pasa_jax.plugins import KVCache
from tests.cases import CASES, TILES, exact, visible
from tests.thin import only, some


def in_8_bits(x):
    """What codes of x [..., D] stand for, in NumPy."""
    scale = np.abs(x).max(-1, keepdims=True) / 127
    return np.round(x / np.where(scale == 0, 1, scale)) * scale


def block_means(key, seen, n, dtype):
    """κ of every key [B, S, K, D]: the mean of those of its block that some query sees."""
    means = np.zeros_like(key)
    for b in range(len(key)):
        for start in range(0, key.shape[1], n):
            some = np.flatnonzero(seen[b, start : start + n]) + start
            if len(some):
                mean = np.asarray(key[b, some].mean(0, dtype=np.float64), np.float32)
                means[b, start : start + n] = np.asarray(jnp.asarray(mean, dtype), np.float32)
    return means


def twice_the_channels(arrays, keywords, n):
    """The call in float32 that has the scores of products of 8 bits."""
    dtype = arrays["query"].dtype
    q, k, v = (np.asarray(arrays[x], np.float32) for x in ("query", "key", "value"))
    seen = visible(len(q), q.shape[1], k.shape[1], arrays, keywords).any(axis=(1, 2))
    mean = block_means(k, seen, n, dtype)
    new = {
        "query": np.concatenate([in_8_bits(q), q], -1),
        "key": np.concatenate([in_8_bits(k - mean), mean], -1),
        "value": v,
    }
    return arrays | new, {"scale": q.shape[-1] ** -0.5} | keywords


def check(name, dtype, **options):
    case = CASES[name]
    arrays = case.arrays(dtype)
    found = dot_product_attention(
        **arrays, **case.keywords, **options, precision="int8", return_residual=True
    )
    n = options["schedule"].fitted(32, case.s).block_kv
    true_out, true_lse = exact(*twice_the_channels(arrays, case.keywords, n))
    bound = {"float32": 2e-4, "bfloat16": 2e-2, "float16": 3e-3}[dtype]
    assert found[0].dtype == dtype
    np.testing.assert_allclose(np.asarray(found[0], np.float64), true_out, atol=bound, rtol=bound)
    seen = np.isfinite(true_lse)
    np.testing.assert_allclose(np.asarray(found[1])[seen], true_lse[seen], atol=5 * bound)


@pytest.mark.parametrize("name", some(CASES, 3))
def test_lax(name):
    check(name, "float32", schedule=TILES)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", only(["biased"], ["biased", "causal", "sinks"]))
def test_16_bits(name, dtype):
    check(name, dtype, schedule=TILES)


@pytest.mark.parametrize("chip", ["tpu_v5e", "tpu_v6e", "h100"])
@pytest.mark.parametrize("name", only(["biased"], ["biased", "causal", "sinks", "lengths", "bias"]))
def test_kernels(name, chip):
    keys = 16 if chip == "h100" else 128
    schedule = Schedule(block_q=32, block_kv=keys, target=chip)
    kernel = "pallas_gpu" if chip == "h100" else "pallas_tpu"
    check(name, "float32", schedule=schedule, implementation=kernel, interpret=True)


@pytest.mark.parametrize("kind", list(kinds(512, 64)), ids=lambda kind: kind.name)
def test_error(kind):
    """Beside float64, and beside codes of keys that have kept their mean."""
    v = np.random.default_rng(1).standard_normal((512, 64))
    arrays = [jnp.asarray(x[None, :, None], jnp.float32) for x in (kind.query, kind.key, v)]
    rounded = [np.asarray(x, np.float64)[0] for x in arrays]
    true = plain.numpy_attention(*rounded)
    largest = np.abs(true).max()
    found = dot_product_attention(*arrays, precision="int8", schedule=Schedule(block_kv=128))
    plain_codes = plain.numpy_attention(in_8_bits(rounded[0]), in_8_bits(rounded[1]), rounded[2])
    error = np.abs(np.asarray(found)[0] - true).max() / largest
    of_plain = np.abs(plain_codes - true).max() / largest
    if kind.name == "bias 200 in a fast pair, rotated":  # its mean is 0, and 8 bits are too few
        assert error > 0.3
        return
    assert error < (0.3 if "heavy" in kind.name else 0.03)
    if kind.name in ("bias 50", "bias 200", "bias 200 in a slow pair, rotated"):
        assert error < of_plain / 4


def test_huge_and_missing_numbers():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 40, 1, 16)).astype(np.float32) for _ in range(3))
    huge = [jnp.asarray(x * 1e30, jnp.bfloat16) for x in (q, k)]
    call = jax.jit(lambda *x: dot_product_attention(*x, precision="int8", schedule=TILES))
    assert np.all(np.isfinite(np.asarray(call(*huge, jnp.asarray(v, jnp.bfloat16)), np.float32)))
    hidden = np.arange(40) < 30
    options = {"mask": hidden[None, None, None]}
    spoilt = np.where(hidden[:, None, None], k, np.nan)
    usual, found = (
        dot_product_attention(q, x, v, precision="int8", schedule=TILES, **options)
        for x in (np.where(hidden[:, None, None], k, 0), spoilt)
    )
    np.testing.assert_array_equal(found, usual)  # a hidden key is in no mean
    seen = np.where(np.arange(40)[:, None, None] == 7, np.nan, k)
    assert np.all(np.isnan(call(q, seen, v)))
    q[0, 3] = np.nan
    out = np.asarray(call(q, k, v))
    assert np.all(np.isnan(out[0, 3]))
    assert np.all(np.isfinite(np.delete(out, 3, 1)))
    zeros = np.zeros_like(q)
    np.testing.assert_allclose(call(zeros, zeros, v)[0, 0], v[0].mean(0), atol=1e-6)


def test_transformations():
    q, k, v = CASES["biased"].arrays("float32").values()
    call = jax.jit(lambda *x: dot_product_attention(*x, precision="int8", schedule=TILES))
    by_vmap = jax.vmap(lambda *x: dot_product_attention(*x, precision="int8", schedule=TILES))
    np.testing.assert_allclose(by_vmap(q, k, v), call(q, k, v), atol=1e-6)


def test_explain():
    x = jnp.zeros((1, 64, 2, 16), jnp.bfloat16)
    told = str(explain(x, x, x, precision="int8"))
    assert "products='int8'" in told
    assert "keys lose their block's mean before they are rounded to 8 bits" in told


X = jnp.ones((1, 16, 1, 16), jnp.float32)
REFUSED = {
    "a shift": ({"shift": "reference"}, "`shift` must be 'auto' or 'mean'"),
    "scores": (
        {"precision": Precision(scores="bfloat16", products="int8")},
        '`precision` must have scores="float32"',
    ),
    "rounded products": (
        {"schedule": Schedule(target="ascend_910b")},
        '`precision` must have products="float32" where the target rounds products',
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        dot_product_attention(X, X, X, **{"precision": "int8"} | options)


def test_refused_by_name():
    call = {"precision": "int8"}
    with pytest.raises(ValueError, match="`precision` must have products of another type than int"):
        jax.grad(lambda q: dot_product_attention(q, X, X, **call).sum())(X)
    with pytest.raises(BackendUnsupported, match="not in 8 bits"):
        dot_product_attention(X, X, X, implementation="reference", **call)
    cache = KVCache.empty(1, 32, 1, 16, "float32").append(X, X)
    with pytest.raises(ValueError, match="`precision` must have other products than int8"):
        cache.attend(X[:, :1], **call)


@pytest.mark.parametrize("chip", ["tpu_v5e", "h100"])
def test_integers_are_what_is_multiplied(chip):
    """The program has a product of int8 that adds up in int32, and no other of queries and keys."""
    schedule = Schedule(block_q=64, block_kv=64 if chip == "h100" else 128, target=chip)
    kernel = "pallas_gpu" if chip == "h100" else "pallas_tpu"
    x = jnp.zeros((1, 128, 1, 128), jnp.bfloat16)
    jaxpr = jax.make_jaxpr(
        lambda q, k, v: dot_product_attention(
            q, k, v, precision="int8", schedule=schedule, implementation=kernel
        )
    )(x, x, x)
    assert "preferred_element_type=int32" in str(jaxpr)
