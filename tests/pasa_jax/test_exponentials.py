"""Exponentials by a polynomial: what they are, and attention with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax import Precision, Schedule, dot_product_attention
from pasa_jax.core.tile.exponentials import COEFFICIENTS, polynomial_exp2
from tests.cases import CASES, exact
from tests.thin import only, some

ERRORS = {"cubic": 7.5e-5, "quadratic": 1.73e-3}
DEGREES = sorted(ERRORS)


@pytest.mark.parametrize("degree", DEGREES)
def test_powers_have_the_published_errors(degree):
    x = np.linspace(-125.5, 127.4, 500_001, dtype=np.float32)
    for computed in (polynomial_exp2, jax.jit(polynomial_exp2, static_argnums=1)):
        found = np.asarray(computed(jnp.asarray(x), degree), np.float64)
        error = np.abs(found / np.exp2(x.astype(np.float64)) - 1).max()
        assert 0.95 * ERRORS[degree] < error < ERRORS[degree]


@pytest.mark.parametrize("degree", DEGREES)
def test_no_polynomial_of_its_degree_is_better(degree):
    """Chebyshev: the error is largest in n + 2 places, with signs in turn."""
    f = np.linspace(0, 1, 100_001)
    coefficients = COEFFICIENTS[degree]
    error = np.polynomial.polynomial.polyval(f, coefficients) / np.exp2(f) - 1
    inner = 1 + np.flatnonzero(np.diff(np.sign(np.diff(error))))
    peaks = error[[0, *inner, -1]]
    assert len(peaks) == len(coefficients) + 1
    assert np.all(peaks[1:] * peaks[:-1] < 0)
    np.testing.assert_allclose(np.abs(peaks), ERRORS[degree], rtol=5e-3)


@pytest.mark.parametrize("degree", DEGREES)
def test_powers_outside_of_the_range(degree):
    x = jnp.asarray([-jnp.inf, -3.4e38, -127, 128, 3e38, jnp.inf, jnp.nan], jnp.float32)
    found = jax.jit(polynomial_exp2, static_argnums=1)(x, degree)
    np.testing.assert_array_equal(found, [0, 0, 0, jnp.inf, jnp.inf, jnp.inf, jnp.nan])


@pytest.mark.parametrize("degree", DEGREES)
def test_the_fault_of_a_missing_last_coefficient_is_seen(monkeypatch, degree):
    from pasa_jax.core.tile import exponentials

    x = jnp.linspace(-2, 0, 1001, dtype=jnp.float32)
    *rest, last = exponentials._CENTRED[degree]
    monkeypatch.setitem(exponentials._CENTRED, degree, [*rest, last * 1.02])
    found = np.asarray(polynomial_exp2(x, degree), np.float64)
    assert np.abs(found / np.exp2(np.asarray(x, np.float64)) - 1).max() > 1.02 * ERRORS[degree]


@pytest.mark.parametrize("degree", only(["cubic"], DEGREES))
@pytest.mark.parametrize(
    "name", some(["biased", "causal", "mask", "sinks", "no key at all", "soft cap, causal, biased"])
)
@pytest.mark.parametrize("shift", only(["mean"], ["auto", "none", "mean", "reference", "bound"]))
def test_attention_of_lax(degree, name, shift):
    arrays, keywords = CASES[name].arrays("float32"), CASES[name].keywords
    precision = Precision(exponential=degree)
    found = dot_product_attention(
        **arrays, **keywords, precision=precision, shift=shift, implementation="lax"
    )
    true, _ = exact(arrays, keywords)
    error = np.abs(np.asarray(found, np.float64) - true).max() / max(np.abs(true).max(), 1)
    assert error < 2 * ERRORS[degree]  # numerator and denominator
    if name != "no key at all":
        assert error > 1e-6  # it is the polynomial that was used


@pytest.mark.parametrize("kernel", only(["pallas_gpu"], ["pallas_tpu", "pallas_gpu"]))
def test_attention_of_kernels(kernel):
    arrays, keywords = CASES["causal"].arrays("float32"), CASES["causal"].keywords
    target = {"pallas_tpu": "tpu_v6e", "pallas_gpu": "h100"}[kernel]
    options = {
        "implementation": kernel,
        "interpret": True,
        "schedule": Schedule(block_q=32, block_kv=16, target=target),
    }
    true, _ = exact(arrays, keywords)
    precision = Precision(exponential="cubic")
    found = dot_product_attention(**arrays, **keywords, precision=precision, **options)
    error = np.abs(np.asarray(found, np.float64) - true).max() / np.abs(true).max()
    assert 5e-6 < error < 2 * ERRORS["cubic"]


@pytest.mark.full
def test_gradients():
    arrays = CASES["causal"].arrays("float32")

    def loss(precision, query, key, value):
        out = dot_product_attention(query, key, value, is_causal=True, precision=precision)
        return jnp.sum(jnp.sin(out))

    of_exact, of_cubic = (
        jax.grad(lambda a, p: loss(p, **a))(arrays, precision)
        for precision in (Precision(), Precision(exponential="cubic"))
    )
    for name, true in of_exact.items():
        error = float(jnp.abs(of_cubic[name] - true).max() / jnp.abs(true).max())
        assert 1e-6 < error < 1e-3, name


def test_they_are_off_by_default_and_change_no_other_program():
    x = jax.ShapeDtypeStruct((1, 64, 2, 16), jnp.float32)

    def text(**options):
        def attend(q, k, v):
            return dot_product_attention(q, k, v, implementation="lax", **options)

        return jax.jit(attend).lower(x, x, x).as_text()

    assert text() == text(precision=Precision())
    assert "shift_left" not in text()
    assert "shift_left" in text(precision=Precision(exponential="cubic"))


def test_what_cannot_have_them_says_so():
    with pytest.raises(
        ValueError, match=r"`precision\.exponential` must be one of .*'cubic', 'quad"
    ):
        Precision(exponential="quartic")
