"""The examples of whole models, small."""

import re

import jax
import numpy as np
import pytest

from tests.examples import load
from tests.weights import needs_smollm2


@pytest.mark.full
@pytest.mark.filterwarnings("default")
def test_qwen2_in_float16(capsys):
    for name in ("torch", "transformers", "safetensors"):
        pytest.importorskip(name, reason='pip install "pasa-jax[test-full]"')
    sizes = {"length": 32, "layers": 2, "vocabulary": 128, "new_tokens": 3}
    with jax.numpy_dtype_promotion("standard"):  # Flax's own attention needs it
        rows = load("qwen2_in_float16").main(**sizes, dtypes=["float16"])
    rows = {row["model"]: row for row in rows}
    assert rows["torch float16, eager"]["nan"] == 1
    wide = rows["ours float16, float32 scores"]["divergence"]
    assert rows["ours float16, PASA"]["divergence"] < min(1.5 * wide, 2e-3)
    assert rows["ours float16, Flax's attention"]["divergence"] > 100 * wide
    assert rows["ours float16, PASA"]["same"] >= rows["ours float16, float32 scores"]["same"]
    assert "100.0%      nan" in capsys.readouterr().out


@pytest.mark.full
@needs_smollm2
def test_inspect_smollm2(tmp_path, capsys):
    report = load("inspect_smollm2").main(tokens=48, error_rows=0, output=tmp_path)
    assert len(report.calls) == 30
    biased = re.findall(r"'layer': (\d+), 'key head': (\d)", capsys.readouterr().out)
    expected = [(int(layer), 3 * int(head) + g) for layer, head in biased for g in range(3)]
    assert len(expected) == 9
    # A head that is biased goes beyond float16 in one query of ten, so in this text or nearly.
    assert set(report.overflowing) <= set(expected)
    loudest = sorted(
        ((c.max_product[n], i, n) for i, c in enumerate(report.calls) for n in range(9))
    )
    assert {(i, n) for _, i, n in loudest[-9:]} == set(expected)
    assert (tmp_path / "report.html").exists()


@pytest.mark.full
@needs_smollm2
def test_smollm2(capsys):
    found = load("smollm2").main(tokens=64, new_tokens=2, dtypes=["float32", "float16"])
    assert np.isclose(found["float16"], found["float32"], rtol=2e-3)
    assert found["float32"] < 100
    assert capsys.readouterr().out.count("Paris") == 2


@pytest.mark.full
@needs_smollm2
def test_generate(capsys):
    rate = load("generate").main("The capital of France is", tokens=6, dtype="float32")
    said = capsys.readouterr().out
    assert said.startswith("The capital of France is Paris.")
    assert "6 tokens" in said
    assert rate > 0
