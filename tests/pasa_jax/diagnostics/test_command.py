"""`python -m pasa_jax inspect`: a model directory and a text to a report."""

import json

import pytest
from typer.testing import CliRunner

from pasa_jax.__main__ import app
from tests.pasa_jax.models.directories import CONFIG, tensors, write

pytest.importorskip("safetensors", reason='pip install "pasa-jax[models]"')
tokenizers = pytest.importorskip("tokenizers", reason='pip install "pasa-jax[models]"')


@pytest.fixture
def directory(tmp_path):
    """A Qwen2 of two layers, the keys of whose second have a large bias."""
    weights = tensors(CONFIG)
    for name in ("q", "k"):
        weights[f"model.layers.1.self_attn.{name}_proj.bias"][:] = 300
    write(tmp_path, CONFIG, weights)
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(20)}, unk_token="w0")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text(" ".join(f"w{i % 20}" for i in range(90)))
    return tmp_path


def run(directory, *options, text="text.txt"):
    arguments = [str(directory), str(directory / text), "--output", str(directory / "out")]
    return CliRunner().invoke(app, ["inspect", *arguments, *options])


def test_a_directory_and_a_text(directory):
    done = run(directory, "--tokens", "40", "--error-rows", "0")
    assert done.exit_code == 0, done.output
    assert "4 of 8 heads overflow float16, in Block.attention[1] (call 1)" in " ".join(
        done.output.split()
    )
    report = json.loads((directory / "out" / "report.json").read_text())
    assert [call["shapes"][0] for call in report["calls"]] == [[1, 40, 4, 4]] * 2
    assert [call["name"] for call in report["calls"]] == [f"Block.attention[{i}]" for i in range(2)]
    assert (directory / "out" / "report.html").stat().st_size > 10_000


def test_what_cannot_be_read(directory):
    (directory / "empty.txt").write_text("")
    for options, text, message in (
        ((), "empty.txt", "`text` must hold at least one token; got the empty"),
        (("--tokens", "80"), "text.txt", "`tokens` must be at most the model's 64; got 80."),
    ):
        done = run(directory, *options, text=text)
        assert message in str(done.exception)
    assert run(directory, text="none.txt").exit_code == 2
    (directory / "tokenizer.json").unlink()
    assert "`source` must hold a tokenizer.json" in str(run(directory).exception)
