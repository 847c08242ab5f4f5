"""The numbers of a call, against the plain formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax import dot_product_attention
from pasa_jax.diagnostics import inspect

RNG = np.random.default_rng(0)


def draw(length, heads, size, *, bias=0.0, batch=2):
    return RNG.standard_normal((batch, length, heads, size)).astype(np.float32) + bias


def look(q, k, v, **options):
    """The one call of the public function."""
    arrays = (jnp.asarray(x) for x in (q, k, v))
    report = inspect(dot_product_attention, *arrays, error_rows=0, **options)
    assert len(report.calls) == 1
    return report.calls[0]


def products(q, k):
    """[B, N, T, S] q·k in float64."""
    k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
    return np.einsum("btnd,bsnd->bnts", q.astype(np.float64), k.astype(np.float64))


Q, K, V = draw(37, 4, 16), draw(53, 2, 16), draw(53, 2, 8)
LENGTHS = np.array([41, 12])
CAUSAL = np.arange(53)[None] <= np.arange(37)[:, None]
THIRD = np.arange(53) % 3 == 0
SOME = {
    "is_causal": True,
    "key_value_seq_lengths": jnp.asarray(LENGTHS),
    "mask": jnp.asarray(THIRD[None, None, None]),
}
SEEN = {
    "all": ({}, np.ones((2, 1, 37, 53), bool)),
    "some": (SOME, CAUSAL & THIRD & (np.arange(53) < LENGTHS[:, None, None, None])),
}


@pytest.mark.parametrize("name", SEEN)
def test_products_scores_and_phases_are_those_of_the_pairs_that_are_seen(name):
    options, seen = SEEN[name]
    loud = K.copy()
    loud[:, 3] *= 30_000  # a key that both masks show
    call = look(Q, loud, V, **options)
    s = products(Q, loud)
    seen = np.broadcast_to(seen, s.shape)
    size = np.where(seen, np.abs(s), 0)
    np.testing.assert_allclose(call.max_product, size.max(axis=(0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(call.max_score, size.max(axis=(0, 2, 3)) / 4, rtol=1e-5)
    for found, factor in ((call.product_share, 1), (call.score_share, 1 / 4)):
        lost = (size * factor >= 65520).sum(axis=(2, 3)) / seen.sum(axis=(2, 3))
        np.testing.assert_allclose(found, lost.mean(axis=0), rtol=1e-5)
    assert call.overflows.all()
    assert call.product_share.min() > 0
    norms = np.linalg.norm(Q, axis=-1).transpose(0, 2, 1)[..., None]
    of_keys = np.repeat(np.linalg.norm(loud, axis=-1), 2, axis=2).transpose(0, 2, 1)[:, :, None]
    phases = np.rad2deg(np.arccos(s / norms / of_keys))
    for n in range(4):
        shares = [np.histogram(phases[b, n][seen[b, n]], np.arange(0, 181, 10))[0] for b in (0, 1)]
        shares = np.mean([share / share.sum() for share in shares], axis=0)
        np.testing.assert_allclose(call.phases[n], shares, atol=2e-3)


def test_bias_and_spread_by_head_and_channel():
    keys = K + np.where(np.arange(16) == 5, 100, 0)
    call = look(Q, keys, V)
    mean = np.repeat(keys.mean(axis=1), 2, axis=1)
    np.testing.assert_allclose(call.key_mean, mean.mean(axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(call.key_bias, np.linalg.norm(mean, axis=-1).max(axis=0), rtol=1e-5)
    spread = np.repeat(keys.std(axis=1), 2, axis=1)
    np.testing.assert_allclose(call.key_spread, spread.mean(axis=0), rtol=1e-3)
    np.testing.assert_allclose(call.query_mean, Q.mean(axis=(0, 1)), atol=1e-5)
    assert call.shifts_if_rounded.all()
    assert not look(Q, K, V).shifts_if_rounded.any()


@pytest.mark.parametrize("phase", [5, 95, 175])
def test_the_phase_of_waves_is_their_phase(phase):
    channel = np.arange(16) * 2 * np.pi * 3 / 16
    q = np.broadcast_to(np.sin(channel), Q.shape).astype(np.float32)
    k = np.broadcast_to(np.sin(channel + np.deg2rad(phase)), K.shape).astype(np.float32)
    call = look(q, k, V)
    assert call.phases[0].argmax() == phase // 10
    assert call.phases[0].max() == pytest.approx(1)
    np.testing.assert_allclose(call.resonance, np.cos(np.deg2rad(phase)), atol=1e-5)


def test_what_is_hidden_does_not_matter():
    keys = K.copy()
    keys[0, 41:], keys[1, 12:] = np.nan, np.inf
    clean, dirty = look(Q, np.nan_to_num(keys, posinf=1), V, **SOME), look(Q, keys, V, **SOME)
    for field in ("max_product", "max_stored", "phases", "key_mean", "key_spread", "key_bias"):
        np.testing.assert_array_equal(getattr(dirty, field), getattr(clean, field))
    assert dirty.not_finite == clean.not_finite == (0, 0, 0)


def test_what_is_seen_and_not_finite():
    q, k = Q.copy(), K.copy()
    q[0, 0, 1], k[:, 3] = np.inf, np.nan
    call = look(q, k, V, **SOME)
    # One of 37 queries in one of 4 heads and 2 entries; one of 13 keys that are seen, and of 4.
    assert call.not_finite == pytest.approx((1 / 37 / 4 / 2, (1 / 13 + 1 / 4) / 2, 0))


def test_what_is_stored_after_the_shift():
    call = look(*(jnp.asarray(x, jnp.float16) for x in (Q + 60, K + 90, V)))
    assert call.dtype == "float16"
    assert call.overflows.all()
    assert call.auto.startswith("reference: ")
    assert call.max_stored.max() < 0.05 * call.max_score.min()


def test_margin():
    call = look(Q, K, V)
    np.testing.assert_allclose(call.margin, 65504 / call.max_product)
    assert not call.overflows.any()


@pytest.mark.full
def test_float64(x64):
    call = look(*(x.astype(np.float64) for x in (Q, K, V)))
    assert call.dtype == "float64"
    size = np.abs(products(Q, K)).max(axis=(0, 2, 3))
    np.testing.assert_allclose(call.max_product, size, rtol=1e-5)


def test_a_scale_of_zero():
    call = look(Q, K, V, scale=0.0)
    assert call.max_score.max() == 0
    assert call.max_product.min() > 0


def test_no_queries_is_no_call():
    empty = jnp.zeros((1, 0, 2, 8))
    with pytest.raises(ValueError, match="`model` must call dot_product_attention of"):
        inspect(dot_product_attention, empty, empty, empty)


def test_jit_is_on_again_afterwards():
    look(Q, K, V)
    assert not jax.config.jax_disable_jit
