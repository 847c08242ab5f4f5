"""The errors to expect are those that the forms have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax import Precision, dot_product_attention
from pasa_jax.call.api import canonical
from pasa_jax.diagnostics import inspect
from pasa_jax.diagnostics._forms import ATTENTIONS, DTYPES, FLOAT32_SCORES, _exact, _sample
from pasa_jax.evidence.plain import float64_attention, plain_attention
from tests.thin import some

RNG = np.random.default_rng(1)
FORMS = (FLOAT32_SCORES, *ATTENTIONS)


def draw(length, heads, size, bias=0.0):
    return jnp.asarray(RNG.standard_normal((1, length, heads, size)) + bias, jnp.float32)


BIASED = draw(96, 4, 32, 20), draw(96, 2, 32, 25), draw(96, 2, 16, 3)


@pytest.fixture(scope="module")
def errors():
    """Of a biased causal call, on 64 of its rows."""
    report = inspect(dot_product_attention, *BIASED, is_causal=True)
    return report.calls[0].errors


def relative(out, exact):
    """By head, as `measure_errors` defines it for a causal call over all its keys."""
    mean = np.repeat(np.asarray(BIASED[2])[0].mean(axis=0), 2, axis=0)

    def rms(x):
        return np.sqrt(np.mean(np.square(x), axis=(0, 2)))

    at = np.linspace(0, 95, 64).round().astype(int)
    exact = exact[0, at]
    return rms(np.asarray(out, np.float64)[0, at] - exact) / rms(exact - mean)


@pytest.mark.full
@pytest.mark.parametrize("dtype", some(DTYPES))
def test_they_are_the_public_functions(errors, dtype):
    exact = float64_attention(*BIASED, is_causal=True)
    narrow = [x.astype(dtype) for x in BIASED]
    for form in ("none", "mean", "reference"):
        out = dot_product_attention(*narrow, is_causal=True, shift=form, implementation="lax")
        np.testing.assert_allclose(errors[dtype][form], relative(out, exact), rtol=0.1)
    wide = Precision.named("float32")
    out = dot_product_attention(*narrow, is_causal=True, shift="none", precision=wide)
    np.testing.assert_allclose(errors[dtype]["float32 scores"], relative(out, exact), rtol=0.1)
    out = plain_attention(*narrow, scores=dtype, prescaled=False, is_causal=True)
    np.testing.assert_allclose(errors[dtype]["eager"], relative(out, exact), rtol=0.3)


@pytest.mark.full
def test_the_shifts_repair_what_plain_storage_loses(errors):
    found = {form: errors["float16"][form].max() for form in FORMS}
    assert found["none"] > 5 * found["mean"]
    assert found["mean"] < 2 * found["float32 scores"]
    assert found["reference"] < 1.1 * found["float32 scores"]


def report_of(q, k, v, **options):
    """Of the shapes of `BIASED`, so that the forms are compiled once."""
    return inspect(dot_product_attention, q, k, v, **options)


def test_overflow_is_nan_in_eager_code_alone():
    report = report_of(draw(96, 4, 32, 60), draw(96, 2, 32, 60), draw(96, 2, 16))
    found = report.calls[0].errors["float16"]
    assert np.isnan(found["eager"]).all()
    assert all(np.isfinite(found[form]).all() for form in FORMS if form != "eager")
    assert sorted(report.overflowing) == report.inaccurate("float16") == [(0, n) for n in range(4)]


def test_the_cast_alone_may_be_too_much():
    report = report_of(4 * draw(96, 4, 32), draw(96, 2, 32, 300), draw(96, 2, 16))
    assert report.calls[0].cast_costs_much("bfloat16").all()
    assert report.advice[-1].startswith(
        "In 4 of 4 heads the cast of query, key and value to bfloat16 costs more than 1 % by itself"
    )


def test_what_each_format_of_a_cache_would_cost():
    """A bias costs bfloat16 much, and 8 bits less their mean nothing."""
    q, k, v = (np.tile(draw(96, 1, size), (1, 1, n, 1)) for size, n in ((32, 4), (32, 2), (16, 2)))
    found = report_of(q, k + np.float32([0, 300])[:, None], v).calls[0].formats
    assert found["bfloat16"][3] > 10 * found["bfloat16"][0]
    for format in ("int8", "float8_e4m3", "float8_e5m2"):
        np.testing.assert_allclose(found[format][2:], found[format][:2], rtol=0.2)
    assert found["int8"].max() < 0.03 < found["float8_e5m2"].min()


CASES = {
    "bias": {"bias": jnp.asarray(RNG.standard_normal((1, 4, 20, 30)), jnp.float32)},
    "shared bias": {"bias": jnp.asarray(RNG.standard_normal((1, 1, 1, 30)), jnp.float32)},
    "hiding bias": {"bias": jnp.where(jnp.arange(30) % 2 == 0, 0.0, -jnp.inf)[None, None, None]},
    "cap": {"logits_soft_cap": 2.0},
    "sinks": {"sinks": jnp.asarray([0.0, 1.0, -1.0, 3.0])},
    "window": {"local_window_size": (5, 3)},
    "segments": {"segment_ids": (jnp.arange(20)[None] // 7, jnp.arange(30)[None] // 7)},
    "nothing seen": {"key_value_seq_lengths": jnp.asarray([0])},
    "scale": {"scale": 0.4},
}


@pytest.mark.parametrize("name", CASES)
def test_exact_is_the_reference(name):
    q, k, v = draw(20, 4, 8), draw(30, 2, 8), draw(30, 2, 6)
    call = canonical(q, k, v, **CASES[name])
    sample, shown = _sample(call.operands, call.mask, 0, 8)
    found, _ = _exact(sample, shown, call.plan)
    out = dot_product_attention(q, k, v, **CASES[name], implementation="reference")
    at = np.unique(np.linspace(0, 19, 8).round().astype(int))
    np.testing.assert_allclose(found, np.asarray(out)[0, at], atol=2e-6)


@pytest.mark.full
def test_without_a_scale_there_is_no_matrix_of_the_paper():
    found = report_of(*BIASED, scale=0.0).calls[0].errors["float16"]
    assert set(FORMS) - set(found) == {"paper"}


def test_no_rows_is_no_errors():
    x = draw(8, 2, 8)
    report = inspect(dot_product_attention, x, x, x, error_rows=0)
    assert report.calls[0].errors == {}
    assert not report.calls[0].inaccurate("float16").any()
    assert "relative error" not in jax.tree.leaves(report.as_dict()["calls"][0]["errors"])
