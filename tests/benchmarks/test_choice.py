"""The benchmark of `auto`'s choice, on few heads."""

import numpy as np
import pytest

from tests.scripts import load_script
from tests.weights import needs_smollm2


@pytest.mark.full
@needs_smollm2
def test_auto_is_about_the_better_one(capsys):
    found = load_script("benchmarks", "choice").main(tokens=192, step=10)
    mean = {name: np.exp(np.mean(np.log(ratio))) for name, ratio in found.items()}
    assert mean["auto"] < 1.06
    assert mean["mean"] > 1.15  # on these heads, most of which have keys biased away
    assert "27 heads" in capsys.readouterr().out
