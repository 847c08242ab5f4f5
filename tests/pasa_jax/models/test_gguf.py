"""GGUF files: Llama's and Qwen2's, quantized and not, with their tokenizers."""

import dataclasses
import struct
import unicodedata

import jax
import numpy as np
import pytest
from flax import nnx

from pasa_jax import models
from pasa_jax._extras import require
from pasa_jax.models import Decoder, _gguf_file, decoder
from tests.pasa_jax.models import answers
from tests.pasa_jax.models.directories import CONFIG, LLAMA, tensors, write, write_gguf
from tests.thin import some

gguf = pytest.importorskip("gguf", reason='pip install "pasa-jax[models]"')
forward = jax.jit(Decoder.__call__)


def same(one, other):
    """The same config, but for ε, which is float32 in a GGUF file, and the same parameters."""
    assert one.config == dataclasses.replace(other.config, epsilon=1e-6)
    for x, y in zip(*(jax.tree.leaves(nnx.state(m)) for m in (one, other)), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [False, True])
def test_it_is_the_model_of_the_directory(family, tied, tmp_path):
    config = CONFIG | {"model_type": family, "tie_word_embeddings": tied}
    weights = tensors(config)
    if tied:
        del weights["lm_head.weight"]
    write(tmp_path, config, weights)
    write_gguf(tmp_path / "model.gguf", config, weights)
    same(decoder.load(tmp_path), decoder.load_gguf(tmp_path / "model.gguf"))


WIDE = CONFIG | {"hidden_size": 256, "intermediate_size": 256, "vocab_size": 64}
# Where in a block the two bytes of each float16 scale are, of types that gguf cannot quantize to.
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
SCALES |= {"IQ4_NL": (0,), "IQ4_XS": (0,)}
QUANTIZED = ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", *SCALES)


def packed(kind, x, rng):
    """Blocks of ``kind``: the matrix ``x``, or, where gguf cannot quantize it, any."""
    if kind.name not in SCALES:
        return gguf.quants.quantize(x, kind)
    size, count = gguf.GGML_QUANT_SIZES[kind][1], x.size // gguf.GGML_QUANT_SIZES[kind][0]
    blocks = rng.integers(0, 256, (count, size), np.uint8)
    for at in SCALES[kind.name]:
        scale = rng.uniform(0.0005, 0.001, (count, 1)).astype(np.float16)
        blocks[:, at : at + 2] = scale.view(np.uint8)
    return blocks.reshape(len(x), -1)


def quantized(config, name):
    """(tensors as they are stored, their types, the same in float32): matrices of one type."""
    rng = np.random.default_rng(1)
    kind = gguf.GGMLQuantizationType[name]
    stored = tensors(config)
    matrices = {key for key, x in stored.items() if x.ndim == 2}
    stored |= {key: packed(kind, 0.1 * stored[key], rng) for key in matrices}
    true = {
        key: gguf.quants.dequantize(x, kind) if key in matrices else x for key, x in stored.items()
    }
    return stored, lambda key: kind if key in matrices else None, true


@pytest.mark.parametrize("name", some(QUANTIZED, 4))
def test_a_quantized_qwen2(name, tmp_path):
    stored, kind, true = quantized(WIDE, name)
    write(tmp_path, WIDE, true)
    write_gguf(tmp_path / "model.gguf", WIDE, stored, kind)
    one, other = decoder.load(tmp_path), decoder.load_gguf(tmp_path / "model.gguf")
    same(one, other)
    tokens = np.arange(24)[None] % 64
    logits = forward(one, tokens)
    np.testing.assert_array_equal(logits, forward(other, tokens))
    assert np.std(logits) > 0.1


ANY = sorted(kind.name for kind in gguf.quants._type_traits)


@pytest.mark.parametrize("name", ANY)
def test_any_bytes_are_blocks(name, tmp_path):
    """Scales that are infinite or NaN give such weights, and no warning."""
    kind = gguf.GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(2).integers(0, 256, 400 * size, np.uint8)
    data[: 4 * size] = [0, 0x7C] * (2 * size)  # float16's infinity
    (tmp_path / "blocks").write_bytes(data)
    blocks = _gguf_file.Tensor(tmp_path / "blocks", kind, (200, 2 * block), 0, 400 * size)
    found = blocks.value()
    assert (found.shape, found.dtype) == ((200, 2 * block), np.float32)


def write_quantized(path, family):
    """A file in 8 bits, and its config."""
    config = WIDE | {"model_type": family}
    stored, kind, _ = quantized(config, "Q8_0")
    if family == "qwen2":  # biases that matter
        stored = {k: 3 * x if k.endswith("bias") else x for k, x in stored.items()}
    write_gguf(path, config, stored, kind)
    return path, config


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_logits_as_torchs_from_the_same_file(family, tmp_path):
    """Hugging Face's own reader of GGUF, which knows whose rows are permuted."""
    path, _ = write_quantized(tmp_path / "model.gguf", family)
    true = answers.recorded(f"gguf: {family}")
    ours = forward(decoder.load_gguf(path), answers.GGUF_TOKENS)
    np.testing.assert_allclose(ours, true, atol=1e-4)
    assert true.std() > 0.1


class TestRefused:
    def test_another_architecture(self, tmp_path):
        write_gguf(tmp_path / "model.gguf", CONFIG | {"model_type": "falcon"}, {})
        with pytest.raises(ValueError, match="architecture 'qwen2' or 'llama'; got 'falcon'"):
            models.load(tmp_path / "model.gguf")

    def test_scaled_rotary_positions(self, tmp_path):
        scaled = {"llama__rope__scaling__type": "yarn"}
        write_gguf(tmp_path / "model.gguf", LLAMA, tensors(LLAMA), **scaled)
        with pytest.raises(ValueError, match=r"`llama\.rope\.scaling\.type` must be 'none'"):
            decoder.load_gguf(tmp_path / "model.gguf")

    def test_an_unknown_tensor(self, tmp_path):
        weights = tensors(LLAMA) | {"rope_freqs.weight": np.ones(2, np.float32)}
        write_gguf(tmp_path / "model.gguf", LLAMA, weights)
        with pytest.raises(
            ValueError, match=r"`path` must hold no tensor .* got rope_freqs\.weight"
        ):
            decoder.load_gguf(tmp_path / "model.gguf")

    def test_another_tokenizer(self, tmp_path):
        other = {"tokenizer__ggml__pre": "llama-bpe"}
        write_gguf(tmp_path / "model.gguf", LLAMA, tensors(LLAMA), **other)
        allowed = r"tokenizer\.ggml\.pre is 'smollm' or 'qwen2'; got 'llama-bpe'"
        with pytest.raises(ValueError, match=allowed):
            models.load(tmp_path / "model.gguf")

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"a \.gguf file is needed"):
            decoder.load_gguf(tmp_path / "model.gguf")

    def test_a_part_of_each_head_turned(self, tmp_path):
        path = tmp_path / "model.gguf"
        write_gguf(path, CONFIG, tensors(CONFIG))
        add_fields(path, field("qwen2.rope.dimension_count", 4, 2))
        with pytest.raises(ValueError, match=r"dimension_count` must be the head size 4; got 2"):
            decoder.load_gguf(path)


def field(name, kind, value):
    """A number among the fields of a file; ``kind`` 4 is uint32, 6 float32."""
    key = name.encode()
    return struct.pack(f"<Q{len(key)}sI{'If'[kind == 6]}", len(key), key, kind, value)


def add_fields(path, *fields):
    """Writes more of them in front of the others of a file; what they add is aligned."""
    data = path.read_bytes()
    count = struct.unpack_from("<Q", data, 16)[0] + len(fields) + 1
    more = b"".join(fields)
    name = b"padding"
    size = -(len(more) + 8 + len(name) + 4 + 8) % 32
    more += struct.pack("<Q7sIQ", len(name), name, 8, size) + bytes(size)
    path.write_bytes(data[:16] + struct.pack("<Q", count) + more + data[24:])


class TestTokenizer:
    TEXT = answers.PIECES

    def write(self, path, pre):
        """Every byte is a token, and one that stands for no text; two merges."""
        byte_level = require("tokenizers", "models").pre_tokenizers.ByteLevel
        tokens = [*sorted(byte_level.alphabet()), "in", "Ġn", "<|im_end|>"]
        kinds = [1] * (len(tokens) - 1) + [3]
        names = {"tokens": tokens, "merges": ["i n", "Ġ n"], "token_type": kinds, "pre": pre}
        fields = {f"tokenizer__ggml__{name}": value for name, value in names.items()}
        config = CONFIG | {"vocab_size": len(tokens)}
        write_gguf(path, config, tensors(config), **fields)
        return tokens

    @pytest.mark.parametrize("pre", ["smollm", "qwen2"])
    def test_round_trip_and_a_token_without_text(self, pre, tmp_path):
        tokens = self.write(tmp_path / "model.gguf", pre)
        found = models.load(tmp_path / "model.gguf").tokenizer
        ids = found.encode(self.TEXT).ids
        assert tokens.index("<|im_end|>") in ids
        said = found.decode(ids, skip_special_tokens=False)
        text = unicodedata.normalize("NFC", self.TEXT) if pre == "qwen2" else self.TEXT
        assert said == text

    def test_qwen2s_pieces_are_hugging_faces(self, tmp_path):
        self.write(tmp_path / "model.gguf", "qwen2")
        ours = models.load(tmp_path / "model.gguf").tokenizer
        text = ours.normalizer.normalize_str(self.TEXT)
        pieces = ours.pre_tokenizer.pre_tokenize_str(text)
        assert [[x, list(at)] for x, at in pieces] == answers.recorded("pieces")

    def test_merges_of_no_use(self, tmp_path):
        fields = {"tokens": ["a", "b"], "merges": ["a c"], "pre": "qwen2"}
        fields = {f"tokenizer__ggml__{name}": value for name, value in fields.items()}
        write_gguf(tmp_path / "model.gguf", CONFIG, tensors(CONFIG), **fields)
        with pytest.raises(ValueError, match=r"model\.gguf: `tokenizer\.ggml\.merges`: "):
            models.load(tmp_path / "model.gguf")
