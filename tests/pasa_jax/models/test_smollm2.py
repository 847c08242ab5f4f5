"""Real weights: SmolLM2-135M-Instruct."""

import inspect
import textwrap

import jax
import numpy as np
import pytest

from pasa_jax import models
from pasa_jax.models import metrics
from tests.weights import needs_smollm2

pytestmark = needs_smollm2
TEXT = inspect.getsource(textwrap)


@pytest.fixture(scope="module")
def loaded():
    return models.load("smollm2")


def test_tokenizer_gives_the_text_back(loaded):
    ids = loaded.tokenizer.encode(TEXT).ids
    assert loaded.tokenizer.decode(ids) == TEXT
    assert 2 < len(TEXT) / len(ids) < 5


def test_it_predicts_python(loaded):
    tokens = np.asarray(loaded.tokenizer.encode(TEXT).ids[:256])[None]
    forward = jax.jit(models.Decoder.__call__)
    true = metrics.log_probabilities(forward(loaded.model, tokens))
    assert 5 < metrics.perplexity(true, tokens) < 40
    # The same weights on shuffled text: no language left to predict.
    shuffled = np.random.default_rng(0).permutation(tokens[0])[None]
    lost = metrics.log_probabilities(forward(loaded.model, shuffled))
    assert metrics.perplexity(lost, shuffled) > 300
