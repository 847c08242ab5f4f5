"""`return_statistics`: against the whole score matrix in NumPy, and under jit."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax import REASONS, SHIFTS, dot_product_attention
from tests.cases import CASES, TILES, visible
from tests.thin import some

BEHIND = replace(TILES, target="ascend_910b")


def collect(arrays, schedule=TILES, **keywords):
    call = jax.jit(
        lambda a: dot_product_attention(**a, **keywords, schedule=schedule, return_statistics=True)
    )
    out, found = call(arrays)
    return out, found


@pytest.mark.parametrize(
    "name", some(["full", "causal", "lengths", "mask", "biased", "one query"], 3, 1)
)
def test_against_the_whole_matrix(name):
    case = CASES[name]
    arrays = case.arrays("float16")
    out, found = collect(arrays, **case.keywords)
    np.testing.assert_array_equal(
        out, dot_product_attention(**arrays, **case.keywords, schedule=TILES)
    )
    q, k = (np.asarray(arrays[x], np.float64) for x in ("query", "key"))
    k = np.repeat(k, case.n // case.k, axis=2)
    scores = np.einsum("btnd,bsnd->bnts", q, k) * case.d**-0.5
    seen = visible(case.b, case.t, case.s, arrays, case.keywords)
    seen = np.broadcast_to(seen, scores.shape)
    largest = np.where(seen, np.abs(scores), 0).max((2, 3))
    np.testing.assert_allclose(found.max_score, largest, rtol=1e-3)
    assert np.all(np.asarray(found.overflow_share) == 0)
    assert np.all(np.asarray(found.guard_bound) >= largest * 0.999)
    assert np.all(np.abs(np.asarray(found.resonance)) <= 1)
    assert found.shift.dtype == jnp.int32
    assert {SHIFTS[i] for i in np.asarray(found.shift).ravel()} == {"reference"}


def test_overflow_share_counts_what_plain_storage_loses():
    x = jnp.zeros((1, 4, 1, 4), jnp.float16).at[..., 0].set(300.0)
    x = x.at[0, 0].multiply(jnp.float16(0.01))
    _, found = collect({"query": x, "key": x, "value": x}, scale=1.0)
    # Three of the four queries and keys give 90 000; the rest stay small.
    np.testing.assert_allclose(found.overflow_share, [[9 / 16]])
    np.testing.assert_allclose(found.max_score, [[90_000]], rtol=1e-3)


def test_bias_and_spread_of_the_keys():
    case = CASES["biased"]
    arrays = case.arrays("float16")
    _, found = collect(arrays)
    k = np.asarray(arrays["key"], np.float64)
    mean = k.mean(axis=1)
    spread = np.sqrt(np.square(k - mean[:, None]).sum(-1).mean(1))
    np.testing.assert_allclose(found.key_bias[:, ::2], np.linalg.norm(mean, axis=-1), rtol=1e-3)
    np.testing.assert_allclose(found.key_spread[:, ::2], spread, rtol=1e-3)


@pytest.mark.parametrize("sign", [1, -1])
def test_resonance_is_signed(sign):
    wave = jnp.asarray(np.sin(0.5 * np.arange(16)), jnp.float16)
    x = jnp.broadcast_to(wave, (1, 8, 1, 16))
    _, found = collect({"query": x, "key": jnp.float16(sign) * x, "value": x})
    np.testing.assert_allclose(found.resonance, [[sign]], atol=1e-3)


def test_the_choice_behind_the_rounding_is_per_key_head():
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((1, 64, 2, 32)) for _ in range(2))
    k[:, :, 1] += 10
    q[:, :, 1] += 2
    q, k = (jnp.asarray(x, jnp.float16) for x in (q, k))
    _, found = collect({"query": q, "key": k, "value": k}, BEHIND)
    assert [SHIFTS[i] for i in np.asarray(found.shift)[0]] == ["none", "mean"]
    assert "not make the scores smaller" in REASONS[int(found.reason[0, 0])]
    assert float(found.max_stored[0, 1]) < 0.5 * float(found.max_score[0, 1])
    assert "shift mean: rounded products" in found.describe(1, batch=0)


def test_keys_biased_away_from_the_queries_are_left_alone_unless_far():
    """Their offset brings the largest scores nearer to 0, where 16-bit numbers are finest."""
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((1, 64, 3, 32)) for _ in range(2))
    q += 2
    for head, bias in enumerate((0.5, -0.5, -5)):  # o/σ is 2.5, −2.5 and −25
        k[:, :, head] += bias
    q, k = (jnp.asarray(x, jnp.float16) for x in (q, k))
    for scale in (1.0, -1.0):
        _, found = collect({"query": q, "key": scale * k, "value": k, "scale": scale}, BEHIND)
        assert [SHIFTS[i] for i in np.asarray(found.shift)[0]] == ["mean", "none", "mean"]


def test_unbatched_statistics_lack_the_batch_axis():
    arrays = {k: v[0] for k, v in CASES["full"].arrays("float32").items()}
    out, lse, found = dot_product_attention(**arrays, return_residual=True, return_statistics=True)
    assert (out.ndim, lse.ndim, found.max_score.shape) == (3, 2, (4,))
    assert found.describe(0).startswith("max |score|")


@pytest.mark.full
def test_guard_exponent_is_zero_in_ordinary_data_and_not_beyond():
    arrays = CASES["full"].arrays("float16")
    _, found = collect(arrays, shift="mean")
    assert np.all(np.asarray(found.guard_exponent) == 0)
    huge = {k: v * jnp.float16(3000) for k, v in arrays.items()}
    _, found = collect(huge, shift="mean")
    assert np.all(np.asarray(found.guard_exponent) > 0)
    assert np.all(np.asarray(found.max_stored) <= 2.0**14)
    assert np.all(np.asarray(found.max_score) > 65504)
