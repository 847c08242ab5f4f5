"""The benchmark of sparse attention, on short texts: its claims, and that they can fail."""

import jax
import pytest

from tests.scripts import load_script
from tests.weights import needs_smollm2

METHODS = ("sink_window", "sink_window, delta", "vertical_slash", "xattention")


@pytest.fixture(scope="module")
def bench():
    return load_script("benchmarks", "sparse")


@pytest.mark.full
@needs_smollm2
def test_the_claims_hold_on_short_texts(bench, capsys):
    with jax.numpy_dtype_promotion("standard"):
        found = bench.main(tokens=2048, block=64, rounds=1, model_tokens=256)
    assert list(found) == ["local", "narrow", "needle", "induction", "noise", "SmolLM2"]
    for figures in found.values():
        assert figures["dense"][:2] == (1.0, 0.0)
        assert all(0 < x.kept <= 1.1 for x in figures.values())
    shown = capsys.readouterr().out
    assert "| needle | xattention |" in shown
    assert "All 9 claims hold." in shown


def figures(bench):
    """Errors that the claims allow."""
    errors = {
        "local": (0.0, 0.0, 0.0, 0.0),
        "narrow": (0.0, 0.0, 0.0, 0.6),
        "needle": (1.0, 0.1, 0.0, 1.0),
        "induction": (1.0, 1.4, 0.0, 0.0),
        "noise": (1.0, 1.0, 0.5, 0.1),
    }
    kept = {"noise": (0.1, 0.1, 0.5, 0.9)}
    return {
        task: {
            name: bench.Measured(share, error, 1.0)
            for name, share, error in zip(METHODS, kept.get(task, (0.2,) * 4), x, strict=True)
        }
        for task, x in errors.items()
    }


@pytest.mark.parametrize(
    ("task", "method", "kept", "error", "claim"),
    [
        ("local", "xattention", 0.2, 0.3, "local keys"),
        ("local", "sink_window", 0.5, 0.0, "local keys"),
        ("narrow", "xattention", 0.2, 0.1, "drops the block before"),
        ("needle", "xattention", 0.2, 0.1, "XAttention and the window lose it"),
        ("needle", "vertical_slash", 0.2, 1.0, "columns find it"),
        ("needle", "sink_window, delta", 0.2, 0.9, "the correction helps"),
        ("induction", "vertical_slash", 0.9, 0.0, "diagonals find it"),
        ("induction", "sink_window, delta", 0.2, 1.0, "the correction harms"),
        ("noise", "vertical_slash", 0.3, 0.1, "white noise"),
        ("noise", "xattention", 0.5, 0.5, "white noise"),
    ],
)
def test_each_claim_can_fail(bench, task, method, kept, error, claim):
    found = figures(bench)
    bench.check(found)
    found[task][method] = bench.Measured(kept, error, 1.0)
    with pytest.raises(AssertionError, match=claim):
        bench.check(found)
