"""Files that must not be read: outside of the directory, not regular, out of range, or damaged."""

import json
import os
import struct

import numpy as np
import pytest

from pasa_jax import models
from pasa_jax.models import DecoderConfig, _files, _gguf_file, decoder, encoder
from tests.pasa_jax.models.directories import CONFIG, tensors, write, write_gguf
from tests.pasa_jax.models.fuzz import FIELDS, gguf_bytes, infos, safetensors_bytes

pytest.importorskip("safetensors", reason='pip install "pasa-jax[models]"')
pytest.importorskip("gguf", reason='pip install "pasa-jax[models]"')
INDEX = "model.safetensors.index.json"


@pytest.fixture
def directory(tmp_path):
    inner = tmp_path / "model"
    inner.mkdir()
    write(inner, CONFIG, tensors(CONFIG))
    return inner


def refused(source, *words):
    with pytest.raises(ValueError) as error:  # noqa: PT011  every word is looked for
        models.load(source)
    for word in words:
        assert word in str(error.value)


class TestIndex:
    def index(self, directory, name):
        (directory / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))

    @pytest.mark.parametrize(
        "name",
        [
            "../outside.safetensors",
            "{outside}",
            "..",
            "sub/../model.safetensors",
            "sub/model.safetensors",
            "..\\outside.safetensors",
            "C:outside.safetensors",
            "model.bin",
            "a\0.safetensors",
            "\ud800.safetensors",
            "x" * 300 + ".safetensors",
            3,
            None,
            ["model.safetensors"],
        ],
    )
    def test_files_outside_and_names_that_are_none(self, name, directory):
        outside = directory.parent / "outside.safetensors"
        (directory / "model.safetensors").rename(outside)
        (directory / "sub").mkdir()
        self.index(directory, str(outside) if name == "{outside}" else name)
        way_out = "be the name of a .safetensors file in the same directory"
        refused(directory, INDEX, "`weight_map.model.norm.weight`", way_out)

    def test_links_as_in_a_cache_of_hugging_face(self, directory):
        blobs = directory.parent / "blobs"
        blobs.mkdir()
        for i, name in enumerate(("config.json", "model.safetensors")):
            (directory / name).rename(blobs / str(i))
            (directory / name).symlink_to(f"../blobs/{i}")
        self.index(directory, "model.safetensors")
        assert models.load(directory).model.config == DecoderConfig.from_hf(CONFIG)

    @pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": 1}', "[]"])
    def test_no_map(self, text, directory):
        (directory / INDEX).write_text(text)
        refused(directory, INDEX, "must be an object")

    def test_a_file_that_is_not_there(self, directory):
        self.index(directory, "model-00001-of-00002.safetensors")
        with pytest.raises(FileNotFoundError, match=r"has no model-00001-of-00002\.safetensors"):
            models.load(directory)


class TestKinds:
    NAMES = ("config.json", "model.safetensors", INDEX, "tokenizer.json", "model.gguf")

    def put(self, directory, name, make):
        path = directory / name
        path.unlink(missing_ok=True)
        make(path)
        return path if name == "model.gguf" else directory

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize(
        ("make", "kind"),
        [
            (os.mkfifo, "a FIFO"),
            (os.mkdir, "a directory"),
            (lambda path: path.symlink_to("/dev/zero"), "a device"),
        ],
    )
    def test_not_regular(self, name, make, kind, directory):
        source = self.put(directory, name, make)
        refused(source, name, "must be a regular file, or a link to one", f"got {kind}.")

    def test_a_link_to_itself(self, directory):
        source = self.put(directory, "config.json", lambda path: path.symlink_to(path.name))
        refused(source, "config.json", "a link to itself")


def text(directory, name, value):
    """config.json with one value as it is written here."""
    marked = json.dumps(CONFIG | {name: "@here@"})
    (directory / "config.json").write_text(marked.replace('"@here@"', value))


SIZES = [name for name, value in CONFIG.items() if isinstance(value, int)] + ["head_dim"]
NO_SIZE = ["0", "-1", "2147483648", "1" + "0" * 400, "16.0", '"16"', "[16]", "{}", "true", "NaN"]


class TestConfig:
    @pytest.mark.parametrize("name", SIZES)
    @pytest.mark.parametrize("value", NO_SIZE)
    def test_sizes(self, name, value, directory):
        text(directory, name, value)
        refused(directory, "config.json", f"`{name}` must be an int from 1 to 2147483647; got ")

    @pytest.mark.parametrize(
        "value", ["NaN", "0", "-1", "0.5", "Infinity", "1e400", "1e39", "null", '"10000"', "true"]
    )
    @pytest.mark.parametrize("newer", [False, True])
    def test_theta(self, value, newer, directory):
        if newer:
            text(directory, "rope_parameters", f'{{"rope_theta": {value}}}')
        else:
            text(directory, "rope_theta", value)
        allowed = "`rope_theta` must be a number of at least 1 and finite in float32; got "
        refused(directory, "config.json", allowed)

    @pytest.mark.parametrize("value", ["NaN", "0", "-1e-6", "1.5", "Infinity", '"1e-6"', "[]"])
    def test_epsilon(self, value, directory):
        text(directory, "rms_norm_eps", value)
        refused(directory, "config.json", "`rms_norm_eps` must be a number above 0 and at most 1")

    @pytest.mark.parametrize(
        ("name", "value", "allowed"),
        [
            ("tie_word_embeddings", '"false"', "be true or false"),
            ("attention_bias", "1", "be true or false"),
            ("use_sliding_window", '"no"', "be true or false"),
            ("rope_scaling", "[]", "be one object without others in it"),
            ("rope_parameters", '{"full_attention": {"rope_theta": 5}}', "be one object without"),
            ("layer_types", "7", "be 'full_attention' throughout"),
            ("layer_types", "[[1], {}, 2]", "be 'full_attention' throughout"),
            ("hidden_act", "[]", "be 'silu'"),
            ("model_type", "[]", "have a model_type among qwen2, llama, bert"),
            ("model_type", "{}", "have a model_type among qwen2, llama, bert"),
        ],
    )
    def test_other_types(self, name, value, allowed, directory):
        text(directory, name, value)
        refused(directory, "config.json", name, allowed)

    def test_a_window_of_a_string(self, directory):
        window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": "all"}
        (directory / "config.json").write_text(json.dumps(CONFIG | window))
        refused(directory, "config.json", "`max_window_layers` must be an int from 0")

    @pytest.mark.parametrize(
        ("data", "word"),
        [
            (b"", "Expecting value"),
            (b"[]", "be an object"),
            (b'"' + b"x" * 10_000 + b'"', "be an object"),
            (b'{"a": ', "Expecting value"),
            (b"\xff\xfe{}", "utf-8"),
            (b"9" * 5000, "4300 digits"),
            (b"[" * 100 + b"]" * 100, "nested at most 64 deep; got 100"),
            (b"[" * 100_000 + b"]" * 100_000, "nested at most 64 deep; got more"),
            (b" " * (2**24 + 1), "have at most 16777216 bytes"),
        ],
    )
    def test_no_json(self, data, word, directory):
        (directory / "config.json").write_bytes(data)
        with pytest.raises(ValueError) as error:  # noqa: PT011
            models.load(directory)
        assert str(error.value).startswith(f"{directory / 'config.json'}: ")
        assert word in str(error.value)
        assert len(str(error.value)) < 1000

    def test_without_a_file(self):
        sizes = {"vocabulary": 50, "width": 32, "hidden": 48, "layers": 2, "heads": 4}
        sizes |= {"kv_heads": 2, "head_dim": 8, "max_length": 32}
        DecoderConfig(**sizes)
        for name in sizes:
            with pytest.raises(ValueError, match=f"`{name}` must be an int from 1"):
                DecoderConfig(**sizes | {name: 0})
        with pytest.raises(ValueError, match="`rope_base` must be a number of at least 1"):
            DecoderConfig(**sizes, rope_base=float("nan"))
        with pytest.raises(ValueError, match="`epsilon` must be a number above 0"):
            DecoderConfig(**sizes, epsilon=-1.0)

    def test_of_an_encoder(self, directory):
        config = CONFIG | {"model_type": "bert"}
        for name, value in {"vocab_size": 0, "num_attention_heads": 0, "hidden_size": [16]}.items():
            (directory / "config.json").write_text(json.dumps(config | {name: value}))
            refused(directory, "config.json", f"`config.{name}` must be an int from 1")
        (directory / "config.json").write_text(json.dumps(config | {"layer_norm_eps": "1"}))
        refused(directory, "config.json", "`config.layer_norm_eps` must be a number above 0")
        with pytest.raises(ValueError, match="`layers` must be an int from 1"):
            encoder.EncoderConfig(
                vocabulary=1, max_length=1, types=1, layers=0, heads=1, width=1, hidden=1, epsilon=1
            )


class TestSafetensors:
    @pytest.mark.parametrize(
        ("header", "data", "words"),
        [
            (b"[" * 1000, b"", ["no safetensors can be read"]),
            (b"\xff", b"", ["no safetensors can be read"]),
            ({}, b"more", ["no safetensors can be read"]),
            (
                {"a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}},
                b"00",
                ["`a` must be of a type among", "got F8_E4M3"],
            ),
            ({"a": {"dtype": "F32", "shape": [2**62, 0], "data_offsets": [0, 0]}}, b"", []),
            ({"a": {"dtype": "F32", "shape": [1] * 99, "data_offsets": [0, 4]}}, b"0000", []),
        ],
    )
    def test_headers(self, header, data, words, directory):
        (directory / "model.safetensors").write_bytes(safetensors_bytes(header, data))
        refused(directory, "model.safetensors: ", *words)

    def test_an_empty_file(self, directory):
        (directory / "model.safetensors").write_bytes(b"")
        refused(directory, "model.safetensors: no safetensors can be read")


def test_a_tokenizer_that_is_none(directory):
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    refused(directory, "tokenizer.json: no tokenizer can be read")


class TestGguf:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("qwen2.block_count", 0),
            ("qwen2.embedding_length", "16"),
            ("qwen2.attention.head_count", [4, 4]),
            ("qwen2.attention.head_count", 0),
            ("qwen2.attention.head_count_kv", -1),
            ("qwen2.context_length", 2**40),
            ("qwen2.feed_forward_length", True),
            ("qwen2.vocab_size", 0),
            ("qwen2.rope.freq_base", float("nan")),
            ("qwen2.rope.freq_base", 0.0),
            ("qwen2.attention.layer_norm_rms_epsilon", 0.0),
            ("qwen2.rope.scaling.type", 1),
            ("general.architecture", 3),
            ("general.alignment", 3),
            ("tokenizer.ggml.tokens", 3),
            ("tokenizer.ggml.tokens", [1]),
            ("tokenizer.ggml.merges", ["x"]),
            ("tokenizer.ggml.token_type", ["x"]),
            ("tokenizer.ggml.pre", b"\xff"),
        ],
    )
    def test_fields(self, name, value, tmp_path):
        path = tmp_path / "model.gguf"
        path.write_bytes(gguf_bytes(FIELDS | {name: value}, infos(tensors(CONFIG))))
        refused(path, "model.gguf: ", f"`{name}`")

    @pytest.mark.parametrize("name", ["general.architecture", "qwen2.block_count"])
    def test_missing_fields(self, name, tmp_path):
        path = tmp_path / "model.gguf"
        fields = {key: value for key, value in FIELDS.items() if key != name}
        path.write_bytes(gguf_bytes(fields, infos(tensors(CONFIG))))
        refused(path, "model.gguf: ", f"`{name}` must ", "got None")

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({1: 99}, "be of a type that the package gguf dequantizes; got type 99"),
            ({1: 26}, "be of a type that the package gguf dequantizes; got I32"),
            ({1: 12}, "have rows of blocks of 256"),
            ({0: [2**40, 2**40]}, "and end by"),
            ({0: [0, 16]}, "no empty axis"),
            ({0: [1] * 5}, "have 1 to 4 axes"),
            ({2: 1}, "stand at a multiple of 32"),
            ({2: 0}, "stand at a multiple of 32 from byte"),
        ],
    )
    def test_tensors(self, change, words, tmp_path):
        about, name = infos(tensors(CONFIG)), "output.weight"
        for i, value in change.items():
            about[name][i] = value
        path = tmp_path / "model.gguf"
        path.write_bytes(gguf_bytes(FIELDS, about))
        refused(path, "model.gguf: `", words)

    @pytest.mark.parametrize("data", [b"", b"GGUF", b"GGML" + bytes(20), b"GGUF" + bytes(20)])
    def test_no_gguf(self, data, tmp_path):
        path = tmp_path / "model.gguf"
        path.write_bytes(data)
        refused(path, "model.gguf: ")

    def test_an_array_of_arrays(self, tmp_path):
        path = tmp_path / "model.gguf"
        nested = (9, struct.pack("<IQ", 9, 1) + struct.pack("<IQ", 5, 0))
        path.write_bytes(gguf_bytes(FIELDS | {"x": nested}, infos(tensors(CONFIG))))
        refused(path, "model.gguf: `x` must be an array of numbers, bools or strings")

    def test_too_many_fields(self, tmp_path):
        path = tmp_path / "model.gguf"
        more = {f"f{i}": True for i in range(5000)}  # objects of which take more than the file
        path.write_bytes(gguf_bytes(FIELDS | more, infos(tensors(CONFIG))))
        refused(path, "model.gguf: `the number of fields` must be at most 4096; got 5017")

    def test_a_field_that_is_there_twice(self, tmp_path):
        path = tmp_path / "model.gguf"
        whole = gguf_bytes(FIELDS, infos(tensors(CONFIG)))
        path.write_bytes(whole.replace(b"qwen2.context_length", b"qwen2.context_lengtx"))
        refused(path, "`qwen2.context_length` must be an int")
        path.write_bytes(whole.replace(b"qwen2.rope.freq_base", b"qwen2.context_length"))
        refused(path, "`qwen2.context_length` must be there once")

    def test_it_is_what_the_package_gguf_reads(self, tmp_path):
        import gguf

        path = tmp_path / "model.gguf"
        names = {"tokenizer__ggml__pre": "qwen2", "tokenizer__ggml__scores": [0.5, -1.0]}
        write_gguf(path, CONFIG, tensors(CONFIG), **names)
        ours, theirs = _gguf_file.read(path), gguf.GGUFReader(path)
        read = {name: x.contents() for name, x in theirs.fields.items() if name[:5] != "GGUF."}
        lazy = (_gguf_file.Text, _gguf_file.Array)
        fields = {n: x.value() if isinstance(x, lazy) else x for n, x in ours.fields.items()}
        assert fields == read
        assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
        for tensor in theirs.tensors:
            np.testing.assert_array_equal(ours.tensors[tensor.name].value(), tensor.data)

    def test_a_file_that_changes_later_changes_no_model(self, tmp_path):
        path = tmp_path / "model.gguf"
        path.write_bytes(gguf_bytes(FIELDS, infos(tensors(CONFIG))))
        model = decoder.load_gguf(path)
        before = np.array(model.embedding[...])
        with path.open("r+b") as file:
            file.write(bytes(path.stat().st_size))
        np.testing.assert_array_equal(model.embedding[...], before)


def test_configs_are_read_as_utf_8(directory):
    (directory / "config.json").write_bytes(json.dumps(CONFIG | {"é": "ü"}).encode())
    assert _files.read_config(directory)["é"] == "ü"
