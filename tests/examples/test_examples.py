"""Each example, small."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.examples import EXAMPLES, load


def test_find_the_overflow(capsys):
    errors = load("find_the_overflow").main(length=64, heads=2)
    assert np.isnan(errors["plain"]).tolist() == [False, True]
    assert np.all(errors["ours"] < 2e-3)
    assert "head 1: max |score|" in capsys.readouterr().out


@pytest.mark.filterwarnings("default")
def test_flax_inline_einsum():
    with jax.numpy_dtype_promotion("standard"):
        errors = load("flax_inline_einsum").main(length=128, width=32)
    assert np.isnan(errors["EinsumAttention float16"])
    assert errors["EinsumAttention bfloat16"] > 0.1
    assert errors["PasaAttention float16"] < 1e-3
    assert errors["PasaAttention bfloat16"] < 1e-2


def test_low_rank_bias(capsys):
    found = load("low_rank_bias").main(width=6, length=36, heads=2, ranks=(2, 30))
    for name, by_rank in found.items():
        (few, coarse), (most, fine) = by_rank[2], by_rank[30]
        assert 0.3 < few < 0.8 < most <= 1 + 1e-9, name
        assert fine < coarse / 2, name
    assert found["Swin, noise 0.0"][30][1] < 2e-3
    assert capsys.readouterr().out.count("rank  30") == 4


@pytest.mark.full
@pytest.mark.filterwarnings("default")
def test_keras_on_jax(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")  # which keras reads when it is imported
    pytest.importorskip("keras", reason='pip install "pasa-jax[test-full]"')
    with jax.numpy_dtype_promotion("standard"):
        differences = load("keras_on_jax").main(length=32)
    assert differences["float16"] < 2e-3
    assert differences["bfloat16"] < 2e-2


def test_every_example_is_tested():
    tests = "".join(p.read_text(encoding="utf-8") for p in Path(__file__).parent.glob("test_*.py"))
    assert {p.stem for p in EXAMPLES.glob("*.py")} == set(re.findall(r'\bload\("(\w+)"\)', tests))
