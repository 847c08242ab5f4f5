"""What stands in a Hugging Face model directory: config.json, *.safetensors, tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from pasa_jax._extras import require

EXTRA = "models"


def read_config(directory: Path) -> dict[str, Any]:
    """config.json.

    Raises:
      FileNotFoundError: it is not there.
    """
    return json.loads(_existing(directory, "config.json").read_text(encoding="utf-8"))


def read_tensors(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor of every *.safetensors file, by name, in the type it is stored in.

    Raises:
      FileNotFoundError: there is no such file, or one that the index names is missing.
      ModuleNotFoundError: the extra is not installed.
    """
    safe_open = require("safetensors", EXTRA).safe_open
    tensors = {}
    for path in _shards(directory):
        with safe_open(path, framework="flax") as file:  # numpy's framework has no bfloat16
            for name in file.keys():  # noqa: SIM118  not a dict
                tensors[name] = np.asarray(file.get_tensor(name))
    return tensors


def read_tokenizer(directory: Path) -> Any:
    """The `tokenizers.Tokenizer` of tokenizer.json.

    Raises:
      FileNotFoundError: it is not there.
      ModuleNotFoundError: the extra is not installed.
    """
    tokenizers = require("tokenizers", EXTRA)
    return tokenizers.Tokenizer.from_file(str(_existing(directory, "tokenizer.json")))


def _shards(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return [_existing(directory, name) for name in names]
    found = sorted(directory.glob("*.safetensors"))
    return found or [_existing(directory, "model.safetensors")]


def _existing(directory: Path, name: str) -> Path:
    path = directory / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory} has no {name}: a Hugging Face model directory with config.json, "
            "*.safetensors and tokenizer.json is needed."
        )
    return path
