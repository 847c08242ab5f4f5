"""Fast Sinkhorn beside the whole matrix, scipy and POT."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.neighbours import sinkhorn


@pytest.mark.full
def test_products_and_gradients_are_those_of_the_matrix(x64):
    differences = sinkhorn.differences(16, 0.1)
    assert differences.pop("gradient by differences") < 1e-6
    assert max(differences.values()) < 1e-12


@pytest.mark.parametrize("logs", [True, False])
def test_the_product_and_its_gradient(x64, logs):
    """Beside exp(−κ|i − j|) written in NumPy."""
    v, at = np.random.default_rng(0).random(37), np.arange(37)
    true = np.log(np.exp(-0.3 * np.abs(at[:, None] - at)) @ v)
    out = sinkhorn.recursions(jnp.asarray(np.log(v)), jnp.asarray(0.3), logs=logs)
    np.testing.assert_allclose(out, true, rtol=0, atol=1e-12)

    def weighted(product):
        return lambda g, kappa: jnp.vdot(product(g, kappa), jnp.sin(jnp.arange(37.0)))

    ways = (partial(sinkhorn.recursions, logs=logs), sinkhorn.dense)
    inputs = jnp.asarray(np.log(v)), jnp.asarray(0.3)
    ours, whole = (jax.jit(jax.grad(weighted(way), argnums=(0, 1)))(*inputs) for way in ways)
    for mine, other in zip(ours, whole, strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-12)


def test_distances(x64):
    """II finds the distance, I what the entropy adds, and only logarithms survive a small ε."""
    distances = sinkhorn.distances(24, 300)
    true = distances["scipy"]
    assert abs(distances["II, ε=0.1"] / true - 1) < 1e-3
    assert distances["I, ε=0.1"] > 1.5 * true
    np.testing.assert_allclose(distances["I, ε=0.1"], distances["I in logs, ε=0.1"], rtol=1e-11)
    assert np.isnan(distances["I, ε=0.0001"])
    assert np.isfinite(distances["I in logs, ε=0.0001"])


def test_a_plan_has_the_sums_that_were_asked_for(x64):
    a, b = sinkhorn.masses(48)
    f, g, slope = sinkhorn.solve(a, b, jnp.asarray(0.05), 200, True, sinkhorn.recursions)
    apart = np.abs(np.arange(48)[:, None] - np.arange(48)).astype(float)
    plan = np.exp(f[:, None] - slope * apart + g)
    np.testing.assert_allclose(plan.sum(axis=0), b, atol=1e-12)
    np.testing.assert_allclose(plan.sum(axis=1), a, atol=1e-4)
    assert np.isclose(sinkhorn.cost(f, g, slope), (plan * apart).sum(), rtol=1e-10)


@pytest.mark.full
def test_beside_pot():
    pytest.importorskip("ot", reason='pip install "pasa-jax[test-full]"')
    with jax.enable_x64(True):
        distances = sinkhorn.distances(128, 500)
    np.testing.assert_allclose(distances["POT"], distances["scipy"], rtol=1e-9)
    np.testing.assert_allclose(distances["POT, ε=0.1"], distances["I, ε=0.1"], rtol=1e-9)
    assert abs(distances["II, ε=0.1"] / distances["POT"] - 1) < 1e-3


@pytest.mark.full
def test_all_of_it(optimized, tmp_path, capsys):
    found = sinkhorn.main(tmp_path)
    assert found["exponents"]["I"] < 1.2
    assert found["exponents"]["I in logs"] < 1.2
    assert found["exponents"]["dense"] > 1.5
    assert found["differences"]["I in logs"] < 1e-12
    assert abs(found["W1"]["II, ε=0.1"] / found["W1"]["scipy"] - 1) < 1e-3
    assert (tmp_path / "sinkhorn.png").stat().st_size > 10_000
    assert "time ∝ N^" in capsys.readouterr().out
