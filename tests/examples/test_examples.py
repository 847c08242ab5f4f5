"""Each example, small."""

import importlib.util
from pathlib import Path

import numpy as np

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_find_the_overflow(capsys):
    errors = load("find_the_overflow").main(length=64, heads=2)
    assert np.isnan(errors["plain"]).tolist() == [False, True]
    assert np.all(errors["ours"] < 2e-3)
    assert "head 1: max |score|" in capsys.readouterr().out


def test_every_example_is_tested():
    assert {p.stem for p in EXAMPLES.glob("*.py")} == {"find_the_overflow"}
