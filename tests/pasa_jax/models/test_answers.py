"""torch is asked again, and must say what is recorded."""

import json

import numpy as np
import pytest

from tests.pasa_jax.models import answers

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def asked():
    for name in ("torch", "transformers"):
        pytest.importorskip(name, reason='pip install "pasa-jax[test-full]"')
    return answers.ask()


def test_nothing_is_missing(asked):
    assert set(answers._recorded()) == set(asked)


def test_numbers(asked):
    for name, x in asked.items():
        if isinstance(x, np.ndarray):
            narrow = name.endswith("16")
            bound = 0.05 if narrow else 2e-5  # sums in another order, on another processor
            np.testing.assert_allclose(answers.recorded(name), x, atol=bound, err_msg=name)


def test_texts(asked):
    def lasting(x):
        """Without what names a version of the library."""
        return {k: v for k, v in x.items() if "version" not in k} if isinstance(x, dict) else x

    for name, x in asked.items():
        if name != "versions" and not isinstance(x, np.ndarray):
            written = json.loads(json.dumps(x))
            assert lasting(answers.recorded(name)) == lasting(written), name
