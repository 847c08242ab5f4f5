"""The benchmark on a smaller copy: the targets, and the all-float16 paper mode's numbers."""

import numpy as np
import pytest

from pasa_jax.evidence import accuracy
from pasa_jax.evidence.accuracy import BASELINE, Case, evaluate, ratios

# Relative RMSE of all-float16 PASA against float64, uniform, V like K, S = 1280, D = 128: an
# independent NumPy emulation of the published algorithm.
PUBLISHED = {
    (0, 0.5): (7.8e-4, 8.0e-4),
    (0, 20): (8.7e-3, 2.4e-2),
    (10, 0.5): (1.9e-3, 2.0e-3),
    (20, 10): (2.6e-2, 2.8e-2),
    (20, 20): (3.3e-2, 3.7e-2),
    (30, 0.5): (3.0e-3, 3.2e-3),
    (30, 20): (3.5e-2, 3.8e-2),
}


@pytest.mark.full
def test_all_float16_paper_mode_reproduces_the_published_algorithm():
    names = ("paper 0.9375", "paper 0.9845")
    cases = [Case("uniform", *x) for x in PUBLISHED]
    records = evaluate(cases, "float16", heads=16, seq=1280, names=names)
    for record, expected in zip(records, PUBLISHED.values(), strict=True):
        for name, value in zip(names, expected, strict=True):
            found = record["errors"][name]["plain"]
            assert found == pytest.approx(value, rel=0.15), (record["case"], name)


def test_targets_on_zero_mean_values():
    cases = list(accuracy.zero_mean_grid())[::6]
    names = (
        BASELINE,
        "paper 0.9845",
        "mean",
        "reference",
        "auto",
        "auto, rounded products",
    )
    found = ratios(evaluate(cases, "float16", heads=4, seq=1280, names=names))
    mean = {name: ratio["geometric mean"] for name, ratio in found.items()}
    assert 1.1 <= mean["paper 0.9845"] <= 1.5
    assert mean["mean"] <= 0.12
    assert mean["reference"] <= 0.025
    assert mean["auto"] <= 0.03
    assert mean["auto, rounded products"] <= 0.13
    assert max(found[n]["worst"] for n in ("auto", "auto, rounded products")) <= 1.2


@pytest.mark.full
def test_bfloat16_gains_as_much():
    cases = list(accuracy.zero_mean_grid())[::4]
    names = (BASELINE, "mean", "auto", "auto, rounded products")
    found = ratios(evaluate(cases, "bfloat16", heads=2, seq=640, names=names))
    assert found["auto"]["geometric mean"] <= 0.03
    assert found["mean"]["geometric mean"] <= 0.2
    assert max(found[n]["worst"] for n in ("auto", "auto, rounded products")) <= 1.2


def test_unscaled_storage_loses_the_share_it_should():
    record, *_ = evaluate(
        [Case("uniform", 30, 0.5)], "float16", heads=1, seq=256, names=("unscaled", "auto")
    )
    assert record["errors"]["unscaled"]["non_finite"] == 1
    assert record["errors"]["auto"]["non_finite"] == 0
    assert np.isnan(record["errors"]["unscaled"]["plain"])


@pytest.mark.full
def test_the_report_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(accuracy, "HARD_CASES", accuracy.HARD_CASES[3:4])
    monkeypatch.setattr(accuracy, "grid", lambda: iter([Case("hybrid", 10, 5)]))
    monkeypatch.setattr(
        accuracy, "zero_mean_grid", lambda: iter([Case("uniform", 5, 1, "zero mean")])
    )
    report = accuracy.main(tmp_path, heads=1, seq=256)
    assert (tmp_path / "accuracy.json").stat().st_size > 1000
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert set(report["paper"]) == {"float16", "bfloat16"}
    assert "geometric mean" in capsys.readouterr().out
