"""Texts against Hugging Face's `generate`, and one text against a batch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pasa_jax
from pasa_jax.core import bits
from pasa_jax.models import Decoder, _generate, decoder
from pasa_jax.serving import PagedCache
from tests.pasa_jax.models.answers import LENGTHS, PROMPTS, recorded, write_decoder
from tests.pasa_jax.models.test_decoder import SMALL


@pytest.fixture(scope="module")
def model():
    return Decoder(SMALL, rngs=nnx.Rngs(0))


def test_token_for_token_as_torch(tmp_path):
    expected = recorded("text")
    found = decoder.load(write_decoder(tmp_path, "qwen2")).generate(PROMPTS, 16, lengths=LENGTHS)
    assert np.asarray(found).tolist() == expected.tolist()
    assert len(np.unique(expected)) > 8  # no text that repeats itself


@pytest.mark.full
def test_a_batch_gives_what_each_alone_gives():
    model = Decoder(SMALL, dtype="float16", rngs=nnx.Rngs(0))
    together = np.asarray(model.generate(PROMPTS, 8, lengths=LENGTHS))
    alone = model.generate(PROMPTS[2:, : LENGTHS[2]], 8)
    assert together[2].tolist() == alone[0].tolist()


@pytest.fixture(scope="module")
def free(model):
    return np.asarray(model.generate(PROMPTS, 8, lengths=LENGTHS))


def test_what_pads_a_prompt_does_not_matter(model, free):
    other = np.where(np.arange(11) < LENGTHS[:, None], PROMPTS, (PROMPTS + 7) % 50)
    assert model.generate(other, 8, lengths=LENGTHS).tolist() == free.tolist()


def test_tokens_are_told_as_they_come(model, free):
    told = []

    def on_token(count, tokens, ended):
        told.append((count, tokens.tolist(), ended.tolist()))

    end = int(free[0, 2])
    found = np.asarray(model.generate(PROMPTS, 8, lengths=LENGTHS, eos=end, on_token=on_token))
    jax.effects_barrier()
    assert [count for count, *_ in told] == list(range(len(told)))
    assert (
        np.asarray([tokens for _, tokens, _ in told]).T.tolist() == found[:, : len(told)].tolist()
    )
    first = next(i for i, token in enumerate(found[0]) if token == end)
    assert [ended[0] for *_, ended in told] == [i >= first for i in range(len(told))]


def test_on_token_must_be_a_function(model):
    with pytest.raises(ValueError, match="`on_token` must be a function or None; got 3"):
        model.generate(PROMPTS, 8, on_token=3)


def test_the_cache_gives_what_reading_again_gives(model, free):
    def attention(q, k, v, layer):
        return pasa_jax.dot_product_attention(q, k, v, is_causal=True)

    found = model.generate(PROMPTS, 8, lengths=LENGTHS, attention=attention)
    assert found.tolist() == free.tolist()


def test_many_sequences_in_one_row_of_a_paged_cache():
    model = Decoder(SMALL, dtype="bfloat16", rngs=nnx.Rngs(0))
    heads = (SMALL.kv_heads, SMALL.head_dim, "bfloat16")
    cache = PagedCache.empty(3, 4096, 4, 16, *heads, layers=SMALL.layers)
    stored = cache.pages.key.nbytes + cache.pages.value.nbytes

    @partial(jax.jit, donate_argnames="cache")
    def step(model, blocks, cache, tokens, counts):
        cache, batch = cache.grown(counts, total=len(tokens))
        states, cache = model.paged_step(tokens, cache, batch, blocks)
        return model.logits(states[batch.last]), cache

    blocks, row = bits.stored_tree(model.blocks), np.zeros(12, np.int32)
    step = step.lower(model, blocks, cache, row, np.zeros(3, np.int32)).compile()
    memory = step.memory_analysis()
    assert memory.alias_size_in_bytes > stored  # written in place,
    assert memory.temp_size_in_bytes < stored // 4  # and never copied
    read, expected = np.zeros(3, int), np.asarray(model(PROMPTS))
    for counts in [(4, 0, 5), (1, 6, 1), (1, 1, 1)]:
        parts = [p[r : r + c] for p, r, c in zip(PROMPTS, read, counts, strict=True)]
        row[: sum(counts)] = np.concatenate(parts)
        logits, cache = step(model, blocks, cache, row, np.asarray(counts, np.int32))
        read += counts
        for b in np.flatnonzero(counts):
            error = np.abs(logits[b] - expected[b, read[b] - 1]).max()
            assert error < 0.05 * np.abs(expected[b]).max()
    assert cache.length.tolist() == read.tolist()


@pytest.mark.full
def test_after_an_end_comes_nothing_else(model, free):
    ends = (int(free[0, 4]), int(free[1, 2]))
    found = np.asarray(model.generate(PROMPTS, 8, lengths=LENGTHS, eos=ends))
    for row, whole in zip(found, free, strict=True):
        stop = np.flatnonzero(np.isin(whole, ends))
        length = stop[0] + 1 if len(stop) else len(whole)
        assert row[:length].tolist() == whole[:length].tolist()
        assert (row[length:] == ends[0]).all()
    assert (found != free).any()


def test_samples_follow_the_distribution():
    logits = jnp.array([1.0, 2.0, 0.0, -1.0])
    found = _generate.choose(jnp.tile(logits, (4000, 1)), 0.7, jax.random.key(3))
    share = np.bincount(np.asarray(found), minlength=4) / 4000
    np.testing.assert_allclose(share, jax.nn.softmax(logits / 0.7), atol=0.03)


@pytest.mark.full
def test_samples_follow_the_key(model):
    texts = [
        model.generate(PROMPTS, 8, temperature=2.0, key=jax.random.key(i)).tolist()
        for i in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]


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
