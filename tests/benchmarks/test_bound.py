"""The benchmark of the shift "bound", on few tokens."""

import pytest

from tests.scripts import load_script
from tests.weights import needs_smollm2


@pytest.mark.full
@needs_smollm2
def test_nearly_every_head_is_proved_and_as_exact(capsys):
    figures = load_script("benchmarks", "bound").main(tokens=192, step=10)
    assert min(figures["shares"].values()) > 0.98
    for ratios in figures["ratios"].values():
        assert max(ratios) <= 1.15
    assert "270 heads proved" in capsys.readouterr().out
