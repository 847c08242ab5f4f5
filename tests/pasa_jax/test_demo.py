"""The demo's model and claims on a short text, and the command line."""

import inspect
import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax import models
from pasa_jax.evidence import demo
from pasa_jax.models import metrics
from tests.weights import needs_smollm2


@pytest.fixture(scope="module")
def loaded():
    return models.load("smollm2")


@pytest.fixture(scope="module")
def model(loaded):
    return loaded.model


@pytest.fixture(scope="module")
def tokens(loaded):
    return jnp.asarray(loaded.tokenizer.encode(inspect.getsource(textwrap)).ids[:256])[None]


def scheme(name):
    return next(s for s in demo.schemes() if s.name == name)


def divergences(model, tokens, bias, *names):
    true, *found = (
        demo.log_probabilities(model, tokens, demo.in_model(scheme(name), bias))
        for name in ("float32", *names)
    )
    return [metrics.divergence(true, x) for x in found]


@needs_smollm2
class TestClaims:
    @pytest.mark.full
    def test_auto_is_as_good_as_float32_scores(self, model, tokens):
        base, ours = divergences(
            model, tokens, None, "float16 inputs, float32 scores", "auto float16"
        )
        assert ours <= 1.5 * base

    @pytest.mark.full
    def test_biased_keys_break_plain_float16_and_not_auto(self, model, tokens):
        bias, heads = demo.choose_bias(model, tokens)
        assert len(heads) == demo.BIASED_HEADS
        plain, base, ours = divergences(
            model,
            tokens,
            bias,
            "plain float16, unscaled",
            "float16 inputs, float32 scores",
            "auto float16",
        )
        assert np.isnan(plain)
        assert ours <= 1.5 * base
        # Softmax does not see the constant in real arithmetic: nor, nearly, in float32.
        true, biased = (
            demo.log_probabilities(model, tokens, demo.in_model(scheme("float32"), b))
            for b in (None, bias)
        )
        assert metrics.divergence(true, biased) < 1e-4


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "pasa_jax", *arguments], capture_output=True, text=True, check=False
    )


def test_explain_on_the_command_line():
    done = command("explain", "--target", "ascend_910b", "--causal")
    assert done.returncode == 0
    assert "shift           none or mean: ascend_910b rounds the product" in done.stdout


def test_a_wrong_call_is_one_line():
    done = command("explain", "--kv-heads", "3")
    assert done.returncode == 2
    assert done.stderr == (
        "error: `key` must have a number of heads that divides query's 8; got 3.\n"
    )


def test_the_tables_and_the_report_are_plain_data():
    rows = [{"scheme": "x", "perplexity": float("nan"), "divergence": 1e-3}]
    report = {
        "tokens": 1,
        "text": "t",
        "as trained": rows,
        "biased": rows,
        "benchmark": [{"case": "a, b", "auto": 0.1}],
    }
    assert [t.row_count for t in demo.tables(report)] == [1, 1, 1]
    json.dumps(report)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed: apt install make")
def test_each_command_installs_what_it_needs():
    def commands(job):
        root = Path(__file__).parents[2]
        return subprocess.check_output(["make", "-nB", job], cwd=root, text=True)

    assert "'.[demo]'" in commands("demo")
    assert "'.[test]'" not in commands("demo")
    for job in ("test", "check", "report", "npu-cost"):
        assert "'.[test]'" in commands(job)
