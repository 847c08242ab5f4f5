"""The correction by every γ-th row."""

import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax import dot_product_attention
from pasa_jax.sparse import delta_correction
from tests.pasa_jax.sparse.draws import arrays, attention, relative
from tests.thin import some_tuples


@pytest.mark.parametrize(
    ("t", "s", "gamma", "last"), some_tuples([(45, 61, 7, 5), (50, 50, 8, 0), (9, 9, 4, 9)])
)
def test_the_difference_of_a_row_is_spread_to_those_after_it(t, s, gamma, last):
    q, k, v = arrays(t, s, b=2)
    rng = np.random.default_rng(3)
    sparse_out = rng.standard_normal((2, t, 2, 8)).astype(np.float32)
    out = delta_correction(jnp.asarray(sparse_out), q, k, v, gamma, last=last)
    dense = attention(q, k, v)
    row = np.arange(t) // gamma * gamma
    wanted = sparse_out + (dense - sparse_out)[:, row]
    wanted[:, t - last :] = dense[:, t - last :]
    assert relative(out, wanted) < 1e-5


@pytest.mark.full
def test_by_default_the_remainder_and_a_block_are_dense():
    t, gamma = 300, 64
    q, k, v = arrays(t, t, n=1)
    zero = jnp.zeros(q.shape, jnp.float32)
    out, dense = delta_correction(zero, q, k, v, gamma), attention(q, k, v)
    last = t % gamma + 128
    assert np.allclose(out[:, -last:], dense[:, -last:], atol=1e-5)
    assert np.allclose(out[:, -last - 1], dense[:, 64], atol=1e-5)
    assert t - last - 1 - 64 < gamma
    few = delta_correction(zero[:, :100], q[:, :100], k[:, :100], v[:, :100], gamma)
    assert np.allclose(few, dense[:, :100], atol=1e-5)


@pytest.mark.full
def test_it_keeps_the_type_and_takes_options_of_attention():
    q, k, v = arrays(40, 40, dtype="bfloat16")
    options = {"scale": 0.1, "sinks": jnp.zeros(2, jnp.float32), "implementation": "lax"}
    dense = dot_product_attention(q, k, v, is_causal=True, **options)
    out = delta_correction(jnp.zeros_like(dense), q, k, v, 1, last=0, **options)
    assert out.dtype == jnp.bfloat16
    assert np.array_equal(out, dense)


@pytest.mark.full
def test_neighbours_alike_gain_and_neighbours_unlike_lose():
    """A difference of correlation c leaves √(2 − 2c) of the error."""
    t, gamma = 128, 16
    q, k, v = arrays(t, t, n=1, d=16)
    dense = attention(q, k, v)
    rng = np.random.default_rng(5)
    for correlation in (0.0, 0.99):
        common = np.repeat(rng.standard_normal((t // gamma, 16)), gamma, axis=0)
        own = rng.standard_normal((t, 16))
        lost = np.sqrt(correlation) * common + np.sqrt(1 - correlation) * own
        sparse_out = (dense - lost[None, :, None]).astype(np.float32)
        out = delta_correction(jnp.asarray(sparse_out), q, k, v, gamma, last=0)
        ratio = np.linalg.norm(out - dense) / np.linalg.norm(sparse_out - dense)
        assert ratio == pytest.approx(np.sqrt((2 - 2 * correlation) * (1 - 1 / gamma)), rel=0.1)
