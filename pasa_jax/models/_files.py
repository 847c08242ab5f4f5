"""Reads a Hugging Face model directory: config.json, *.safetensors, tokenizer.json."""

from __future__ import annotations

import errno
import json
import stat
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from pasa_jax._extras import require
from pasa_jax.core.errors import wrong
from pasa_jax.models._checks import brief, inside

EXTRA = "models"
_JSON_BYTES = 2**24  # the index of 100 000 tensors has half of it; parsed, it takes 20 times that
_JSON_DEPTH = 64
# The types that safetensors can read into NumPy; its floats of 8 bits and fewer it cannot.
_INTS = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")
_DTYPES = (*_INTS, "F16", "BF16", "F32", "F64", "C64")


def read_config(directory: Path) -> dict[str, Any]:
    """config.json.

    Raises:
      FileNotFoundError: it is not there.
      ValueError: it is no JSON object in UTF-8, is large or deeply nested, or no regular file.
    """
    return _object(_existing(directory, "config.json"))


def read_tensors(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor of every *.safetensors file, by name, in the type it is stored in.

    Raises:
      FileNotFoundError: there is no such file, or one that the index names is missing.
      ValueError: a file is damaged or no regular file, or the index names one that does not
        stand in the directory. Links to regular files are followed.
      ModuleNotFoundError: the extra is not installed.
    """
    tensors = {}
    for path in _shards(directory):
        with inside(path):
            tensors |= _tensors(path)
    return tensors


def read_tokenizer(directory: Path) -> Any:
    """The `tokenizers.Tokenizer` of tokenizer.json.

    Raises:
      FileNotFoundError: it is not there.
      ValueError: it is damaged or no regular file.
      ModuleNotFoundError: the extra is not installed.
    """
    tokenizers = require("tokenizers", EXTRA)
    path = _existing(directory, "tokenizer.json")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # that package raises no narrower one
        raise ValueError(f"{path}: no tokenizer can be read: {error}") from error


def regular(path: Path, missing: str) -> Path:
    """``path``, a regular file or a link to one: anything else might be read without end.

    Raises:
      FileNotFoundError: it is not there; ``missing`` is the message.
      ValueError: it is something else.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(missing) from error
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise wrong(str(path), "be a regular file, or a link to one", "a link to itself") from error
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFDIR: "a directory", stat.S_IFSOCK: "a socket"}
        seen = kinds.get(stat.S_IFMT(mode), "a device")
        raise wrong(str(path), "be a regular file, or a link to one", seen)
    return path


def _tensors(path: Path) -> dict[str, np.ndarray]:
    safetensors = require("safetensors", EXTRA)
    tensors = {}
    try:
        # Not framework="numpy", which has no bfloat16 in safetensors 0.5.
        with safetensors.safe_open(path, framework="flax") as file:
            for name in file.keys():  # noqa: SIM118  not a dict
                dtype = file.get_slice(name).get_dtype()
                if dtype not in _DTYPES:
                    raise wrong(name, f"be of a type among {', '.join(_DTYPES)}", dtype)
                tensors[name] = np.asarray(file.get_tensor(name))
    except safetensors.SafetensorError as error:
        raise ValueError(f"no safetensors can be read: {error}") from error
    return tensors


def _shards(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.exists():
        names = _indexed(_object(regular(index, "")), index)
    else:
        names = sorted(path.name for path in directory.glob("*.safetensors"))
    return [_existing(directory, name) for name in names or ["model.safetensors"]]


def _indexed(index: dict[str, Any], path: Path) -> list[str]:
    """The files of a ``weight_map``, each once."""
    with inside(path):
        files = index.get("weight_map")
        if not isinstance(files, dict):
            raise wrong("weight_map", "be an object of file names", brief(files))
        for tensor, name in files.items():
            if not _is_plain(name):
                allowed = "be the name of a .safetensors file in the same directory"
                raise wrong(f"weight_map.{tensor}", allowed, brief(name))
        return sorted(set(files.values()))


def _is_plain(name: Any) -> bool:
    """Whether ``name`` is a file name that cannot lead out of the directory, on any system."""
    if not isinstance(name, str) or not name.isprintable() or len(name.encode()) > 255:
        return False
    is_one = PurePosixPath(name).name == name == PureWindowsPath(name).name
    return is_one and name.endswith(".safetensors")


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    with inside(path):
        if (size := path.stat().st_size) > _JSON_BYTES:
            raise wrong("the file", f"have at most {_JSON_BYTES} bytes", size)
        value = _parsed(path.read_bytes())
        if not isinstance(value, dict):
            raise wrong("the JSON", "be an object", brief(value))
        return value


def _parsed(text: bytes) -> Any:
    """The parsed JSON; raises if it is so deep that recursive code could fail on it."""
    allowed = f"be nested at most {_JSON_DEPTH} deep"
    try:
        value = json.loads(text.decode("utf-8"))
    except RecursionError:
        raise wrong("the JSON", allowed, "more than can be read") from None
    if (depth := _depth(value)) > _JSON_DEPTH:
        raise wrong("the JSON", allowed, depth)
    return value


def _depth(value: Any) -> int:
    """How deep lists and dicts are nested."""
    level, depth = [value], 0
    while level := [x for x in level if isinstance(x, (dict, list))]:
        level = [child for x in level for child in (x.values() if isinstance(x, dict) else x)]
        depth += 1
    return depth


def _existing(directory: Path, name: str) -> Path:
    missing = (
        f"{directory} has no {name}: a Hugging Face model directory with config.json, "
        "*.safetensors and tokenizer.json is needed."
    )
    return regular(directory / name, missing)
