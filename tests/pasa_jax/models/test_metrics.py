"""Against the definitions, written out."""

import jax.numpy as jnp
import numpy as np

from pasa_jax.models import metrics

P = np.array([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]])


def test_perplexity():
    tokens = [[0, 2, 1]]  # 2 follows with 0.25, 1 with 0.8
    found = metrics.perplexity(jnp.log(P), tokens)
    assert np.isclose(found, (0.25 * 0.8) ** -0.5)


def test_divergence():
    q = np.roll(P, 1, axis=-1)
    found = metrics.divergence(jnp.log(P), jnp.log(q))
    assert np.isclose(found, np.mean(np.sum(P * np.log(P / q), axis=-1)), rtol=1e-5)
    assert metrics.divergence(jnp.log(P), jnp.log(P)) == 0


def test_log_probabilities():
    logits = jnp.log(P) + jnp.array([3.0, -2.0, 0.0])[:, None]
    np.testing.assert_allclose(metrics.log_probabilities(logits), np.log(P), atol=1e-6)
    assert metrics.log_probabilities(logits.astype(jnp.float16)).dtype == jnp.float32
