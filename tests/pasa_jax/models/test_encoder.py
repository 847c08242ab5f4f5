"""The encoder against Hugging Face's in torch, on random and on MiniLM's real weights."""

import json
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pasa_jax import models
from pasa_jax.models import _files, encoder
from tests.pasa_jax.models import answers
from tests.weights import needs_minilm

safetensors = pytest.importorskip("safetensors.numpy")

hidden_states = nnx.jit(lambda model, *arrays: model(*arrays))
embed = nnx.jit(
    lambda model, tokens, lengths, attention: model.embed(tokens, lengths, attention=attention),
    static_argnums=3,
)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A directory with a small random model."""
    return answers.write_encoder(tmp_path_factory.mktemp("small"))


def text(seed):
    return jnp.asarray(answers.text(seed)), jnp.asarray(answers.TEXT_LENGTHS)


def test_equals_hugging_face(small):
    tokens, lengths = text(1)
    types = jnp.asarray(answers.token_types())
    ours = np.asarray(hidden_states(encoder.load(small), tokens, lengths, types))
    true = answers.recorded("states: padded")
    for i, length in enumerate(answers.TEXT_LENGTHS):
        np.testing.assert_allclose(ours[i, :length], true[i, :length], atol=2e-5)


def test_all_tokens_of_type_0_and_no_padding_by_default(small):
    ours = hidden_states(encoder.load(small), text(2)[0])
    np.testing.assert_allclose(ours, answers.recorded("states: 2"), atol=2e-5)


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 0.01), ("bfloat16", 0.06)])
def test_narrow_weights(small, dtype, bound):
    narrow = encoder.load(small, dtype)
    states = hidden_states(narrow, text(3)[0])
    assert states.dtype == dtype
    assert {leaf.dtype for _, leaf in nnx.to_flat_state(nnx.state(narrow))} == {jnp.dtype(dtype)}
    true = answers.recorded("states: 3")
    assert 0 < np.abs(states.astype(jnp.float32) - true).max() < bound


def test_another_attention_is_called_with_the_layer(small):
    seen = []

    def uniform(query, key, value, lengths, layer):
        seen.append((query.shape, layer.shape, lengths))
        return jnp.where(layer == 1, jnp.nan, value)

    tokens, lengths = text(4)
    out = encoder.load(small)(tokens, lengths, attention=uniform)
    assert np.isnan(out).all()  # layer 1 is among those that ran
    assert len(seen) == 1  # one trace for all layers
    assert seen[0][:2] == ((3, 24, 4, 8), ())
    assert seen[0][2] is lengths


def test_sentence_of_no_words(small):
    tokens, _ = text(5)
    lengths = jnp.asarray([0, 3, 24])
    out = encoder.load(small).embed(tokens, lengths, attention=lambda q, k, v, *_: v)
    np.testing.assert_allclose(jnp.linalg.norm(out, axis=-1), [0, 1, 1], atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (jnp.zeros((1, 25), jnp.int32),),
            "`tokens` must hold at most the model's 24 positions; got 25. Cut the text.",
        ),
        ((jnp.zeros((1, 4)),), "`tokens` must be [B, T] integers; got (1, 4) float32."),
        (
            (jnp.zeros((2, 4), jnp.int32), jnp.ones(3, jnp.int32)),
            "`lengths` must be [2], one a text; got (3,).",
        ),
        (
            (jnp.zeros((2, 4), jnp.int32), None, jnp.zeros((4,), jnp.int32)),
            "`token_types` must be (2, 4), as `tokens`; got (4,).",
        ),
    ],
)
def test_wrong_calls(small, arguments, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011  the whole message is compared
        encoder.load(small)(*arguments)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "be 'gelu': nothing else is implemented; got 'relu'."),
        ({"position_embedding_type": "relative_key"}, "be 'absolute'"),
        ({"is_decoder": True}, "be False"),
        ({"model_type": "roberta"}, "be 'bert'"),
        ({"hidden_size": None}, "`config.hidden_size` must be given; got none."),
        ({"num_attention_heads": 5}, "`heads` must divide the width 32; got 5."),
    ],
)
def test_refused_configs(change, message):
    config = {**answers.BERT, "model_type": "bert", **change}
    config = {name: value for name, value in config.items() if value is not None}
    with pytest.raises(ValueError) as error:  # noqa: PT011
        encoder.EncoderConfig.from_hf(config)
    assert message in str(error.value)
    assert next(iter(change)).removeprefix("num_attention_") in str(error.value)


def test_what_a_config_leaves_out_is_as_in_hugging_face():
    whole = answers.recorded("config: bert, whole")
    short = {**answers.BERT, "model_type": "bert"}
    assert encoder.EncoderConfig.from_hf(short) == encoder.EncoderConfig.from_hf(whole)


def test_unknown_type_of_weights(small):
    with pytest.raises(ValueError, match="`dtype` must be one of 'float32', 'float16', 'bfloat16'"):
        encoder.load(small, jnp.int8)


QUERY = "encoder.layer.2.attention.self.query.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda tensors: tensors.pop(QUERY),
            f"`directory` must hold the tensor {QUERY}; got none of that name.",
        ),
        (
            lambda tensors: tensors.update(extra=np.zeros(1, np.float32)),
            "`directory` must hold no tensor that the model has no place for; got extra. "
            "The config and the weights must be of one model.",
        ),
        (
            lambda tensors: tensors.update({QUERY: np.zeros((32, 31), np.float32)}),
            f"`directory` must hold {QUERY} of shape (32, 32); got (32, 31).",
        ),
    ],
)
def test_wrong_tensors(small, tmp_path, edit, message):
    tensors = _files.read_tensors(small)
    edit(tensors)
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    config = (small / "config.json").read_text(encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps(json.loads(config)), encoding="utf-8")
    with pytest.raises(ValueError) as error:  # noqa: PT011
        encoder.load(tmp_path)
    assert str(error.value) == message


# all-MiniLM-L6-v2.


@pytest.fixture(scope="module")
def minilm():
    """(model, tokens, lengths) of the sentences."""
    tokens, lengths = map(jnp.asarray, answers.minilm_tokens())
    return encoder.load(models.find("minilm")), tokens, lengths


@needs_minilm
def test_minilm_equals_hugging_face(minilm):
    found = embed(*minilm, encoder.attend)
    np.testing.assert_allclose(found, answers.recorded("minilm"), atol=2e-6)


@needs_minilm
def test_minilm_in_float16_attention(minilm):
    """And in bfloat16: tests/examples/test_networks.py."""
    model, tokens, lengths = minilm
    narrow = embed(model, tokens, lengths, partial(encoder.attend, dtype="float16"))
    wide = embed(model, tokens, lengths, encoder.attend)
    assert np.any(narrow != wide)
    assert np.all(np.linalg.norm(narrow - wide, axis=-1) ** 2 / 2 < 3e-7)  # 1 − cosine


@needs_minilm
def test_minilm_does_not_see_padding(minilm):
    model, tokens, lengths = minilm
    batch = embed(model, tokens, lengths, encoder.attend)
    other = jnp.where(jnp.arange(tokens.shape[1]) < lengths[:, None], tokens, 1234)
    np.testing.assert_array_equal(batch, embed(model, other, lengths, encoder.attend))
    shortest = int(jnp.argmin(lengths))
    alone = tokens[shortest : shortest + 1, : int(lengths[shortest])]
    alone = embed(model, alone, None, encoder.attend)
    np.testing.assert_allclose(alone[0], batch[shortest], atol=1e-6)


@needs_minilm
def test_minilm_knows_what_is_meant(minilm):
    model, tokens, lengths = minilm
    vectors = embed(model, tokens, lengths, encoder.attend)
    near = np.asarray(vectors @ vectors.T)
    assert min(near[0, 1], near[2, 3]) > 0.3 + near[:2, 2:].max()
