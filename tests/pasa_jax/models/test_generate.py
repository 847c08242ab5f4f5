"""Texts against Hugging Face's `generate`, and one text against a batch."""

import jax
import numpy as np
import pytest
from flax import nnx

import pasa_jax
from pasa_jax.models import Decoder, decoder
from tests.pasa_jax.models import hf
from tests.pasa_jax.models.test_decoder import SMALL

RNG = np.random.default_rng(1)
PROMPTS = RNG.integers(0, 50, (3, 11))
LENGTHS = np.array([11, 1, 6])


@pytest.fixture(scope="module")
def model():
    return Decoder(SMALL, rngs=nnx.Rngs(0))


@hf.needs_torch
@pytest.mark.parametrize("family", ["Qwen2", "Llama"])
def test_token_for_token_as_torch(family, tmp_path):
    theirs = hf.random_model(family)
    theirs.save_pretrained(tmp_path)
    expected = hf.greedy(theirs, PROMPTS, 16, LENGTHS)
    found = decoder.load(tmp_path).generate(PROMPTS, 16, lengths=LENGTHS)
    assert np.asarray(found).tolist() == expected.tolist()
    assert len(np.unique(expected)) > 8  # no text that repeats itself


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_batch_gives_what_each_alone_gives(dtype):
    model = Decoder(SMALL, dtype=dtype, rngs=nnx.Rngs(0))
    together = np.asarray(model.generate(PROMPTS, 8, lengths=LENGTHS))
    for row, prompt, length in zip(together, PROMPTS, LENGTHS, strict=True):
        alone = model.generate(prompt[None, :length], 8)
        assert row.tolist() == alone[0].tolist()


def test_what_pads_a_prompt_does_not_matter(model):
    other = np.where(np.arange(11) < LENGTHS[:, None], PROMPTS, (PROMPTS + 7) % 50)
    one, another = (model.generate(x, 6, lengths=LENGTHS) for x in (PROMPTS, other))
    assert one.tolist() == another.tolist()


def test_the_cache_gives_what_reading_again_gives(model):
    def attention(q, k, v, layer):
        return pasa_jax.dot_product_attention(q, k, v, is_causal=True)

    expected = model.generate(PROMPTS, 8, lengths=LENGTHS, attention=attention)
    assert model.generate(PROMPTS, 8, lengths=LENGTHS).tolist() == expected.tolist()


def test_after_an_end_comes_nothing_else(model):
    free = np.asarray(model.generate(PROMPTS, 10, lengths=LENGTHS))
    ends = (int(free[0, 4]), int(free[1, 2]))
    found = np.asarray(model.generate(PROMPTS, 10, lengths=LENGTHS, eos=ends))
    for row, whole in zip(found, free, strict=True):
        stop = np.flatnonzero(np.isin(whole, ends))
        length = stop[0] + 1 if len(stop) else 10
        assert row[:length].tolist() == whole[:length].tolist()
        assert (row[length:] == ends[0]).all()
    assert (found != free).any()


def test_sampling_follows_the_distribution(model):
    prompt = np.repeat(PROMPTS[:1], 4000, axis=0)
    found = model.generate(prompt, 1, temperature=0.7, key=jax.random.key(3))
    share = np.bincount(np.asarray(found)[:, 0], minlength=50) / 4000
    true = jax.nn.softmax(model(PROMPTS[:1])[0, -1] / 0.7)
    assert np.abs(share - np.asarray(true)).sum() < 0.15
    assert true.max() < 0.8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "`max_new_tokens` must be a positive int; got 0."),
        (
            {"max_new_tokens": 22},
            "`max_new_tokens` must be at most 21, what max_length = 32 leaves after the prompt; "
            "got 22.",
        ),
        ({"lengths": [1, 2]}, "`lengths` must be integers of shape [B] = [3]; got int32[2]."),
        (
            {"lengths": np.array([1, 0, 12])},
            "`lengths` must be in [1, 11], the length of `tokens`; got [1, 0, 12].",
        ),
        (
            {"temperature": -1.0},
            "`temperature` must be a finite number of at least 0; got -1.0.",
        ),
        (
            {"temperature": 1.0},
            "`key` must be given to sample; got None. jax.random.key(seed) makes one.",
        ),
    ],
)
def test_wrong_calls(model, arguments, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011  the whole sentence is compared
        model.generate(PROMPTS, **{"max_new_tokens": 4} | arguments)
    assert str(error.value) == message
