"""The bytes of a GGUF file: fields and tensors by name, every length checked before it is used.

The format is https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, little-endian, version 2
or 3. The reader of the package ``gguf`` trusts lengths, and makes an object of every array item.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pasa_jax._extras import require
from pasa_jax.core.errors import wrong
from pasa_jax.models._checks import brief

EXTRA = "models"
# The types of fields: numbers by the codes of `struct`, strings and arrays.
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_FIELDS, _MOST_TENSORS = 2**12, 2**16
MOST_ITEMS = 2**20


class Text(NamedTuple):
    """A string that is decoded when it is asked for."""

    data: memoryview

    def value(self) -> str:
        return str(self.data, "utf-8")


class Array(NamedTuple):
    """An array whose items are made when they are asked for."""

    kind: int
    count: int
    data: memoryview

    def value(self) -> list[Any]:
        if self.count > MOST_ITEMS:
            raise ValueError(f"an array has more than {MOST_ITEMS} items: {self.count}")
        if self.kind == _STRING:
            cursor = _Cursor(self.data)
            return [str(cursor.string(), "utf-8") for _ in range(self.count)]
        return list(struct.unpack(f"<{self.count}{_SCALARS[self.kind]}", self.data))


class Tensor(NamedTuple):
    """Blocks of bytes in a file, which stand for an array of ``shape``, the last axis packed."""

    path: Path
    kind: Any  # a gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    size: int

    def value(self) -> np.ndarray:
        """float32, read anew: a file that changes later changes no model."""
        gguf = require("gguf", EXTRA)
        data = np.fromfile(self.path, np.uint8, self.size, offset=self.offset)
        rows = data.reshape(*self.shape[:-1], -1)
        with np.errstate(all="ignore"):  # scales of any 16 bits, infinite ones too
            return np.asarray(gguf.quants.dequantize(rows, self.kind), np.float32)


class File(NamedTuple):
    """``fields`` by name: numbers, bools, `Text` and `Array`; ``tensors`` by name."""

    fields: dict[str, Any]
    tensors: dict[str, Tensor]


def read(path: Path) -> File:
    """The fields and the places of the tensors of a file.

    Raises:
      ValueError: it is damaged, or has what is not read here, by name.
      ModuleNotFoundError: the extra is not installed.
    """
    data = np.memmap(path, mode="r")
    cursor = _Cursor(data.data)
    tensors, fields = _counts(cursor)
    values = dict(_unique(_field(cursor) for _ in range(fields)))
    infos = dict(_unique(_info(cursor) for _ in range(tensors)))
    alignment = values.get("general.alignment", 32)
    if alignment not in [2**i for i in range(20)]:
        raise wrong("general.alignment", "be a power of two below a million", brief(alignment))
    start = -(-cursor.at // alignment) * alignment
    return File(values, _placed(path, infos, start, len(data), alignment))


class _Cursor:
    """Walks over bytes, and never past their end."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.at = 0

    def take(self, size: int) -> memoryview:
        if size > len(self.data) - self.at:
            raise ValueError(f"the file ends within the {size} bytes from byte {self.at} on")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def string(self) -> memoryview:
        return self.take(self.number("Q"))

    def name(self) -> str:
        size = self.number("Q")
        if not 1 <= size <= 2**10:
            raise ValueError(f"a name must have 1 to {2**10} bytes; got {size} at byte {self.at}")
        return str(self.take(size), "utf-8")


def _counts(cursor: _Cursor) -> tuple[int, int]:
    """(tensors, fields)."""
    if (magic := bytes(cursor.take(4))) != b"GGUF":
        raise wrong("magic", "be b'GGUF'", magic)
    if (version := cursor.number("I")) not in (2, 3):
        raise wrong("version", "be 2 or 3, little-endian", version)
    tensors, fields = cursor.number("Q"), cursor.number("Q")
    for name, seen, most in (
        ("the number of tensors", tensors, _MOST_TENSORS),
        ("the number of fields", fields, _MOST_FIELDS),
    ):
        if seen > most:
            raise wrong(name, f"be at most {most}", seen)
    return tensors, fields


def _field(cursor: _Cursor) -> tuple[str, Any]:
    name, kind = cursor.name(), cursor.number("I")
    if kind in _SCALARS:
        return name, cursor.number(_SCALARS[kind])
    if kind == _STRING:
        return name, Text(cursor.string())
    if kind == _ARRAY:
        return name, _array(cursor, name)
    raise wrong(name, "be of one of GGUF's 13 types", kind)


def _array(cursor: _Cursor, name: str) -> Array:
    kind, count = cursor.number("I"), cursor.number("Q")
    if kind in _SCALARS:
        return Array(kind, count, cursor.take(count * struct.calcsize(_SCALARS[kind])))
    if kind != _STRING:
        raise wrong(name, "be an array of numbers, bools or strings", f"the type {kind}")
    start = cursor.at
    for _ in range(count):  # ends with the bytes, for each item has 8 of them
        cursor.string()
    return Array(kind, count, cursor.data[start : cursor.at])


def _info(cursor: _Cursor) -> tuple[str, tuple[Any, tuple[int, ...], int]]:
    """Name, and the type, shape and offset of a tensor."""
    name, axes = cursor.name(), cursor.number("I")
    if not 1 <= axes <= 4:
        raise wrong(name, "have 1 to 4 axes", axes)
    shape = tuple(cursor.number("Q") for _ in range(axes))[::-1]
    kind = _kind(name, cursor.number("I"))
    block = require("gguf", EXTRA).GGML_QUANT_SIZES[kind][0]
    if 0 in shape or shape[-1] % block:
        raise wrong(name, f"have rows of blocks of {block}, and no empty axis", list(shape))
    return name, (kind, shape, cursor.number("Q"))


def _kind(name: str, number: int) -> Any:
    """The type of a tensor, if it can be dequantized."""
    gguf = require("gguf", EXTRA)
    names = {kind.value: kind for kind in gguf.GGMLQuantizationType}
    kind = names.get(number)
    try:
        size = gguf.GGML_QUANT_SIZES[kind][1]
        gguf.quants.dequantize(np.zeros((1, size), np.uint8), kind)
    except (KeyError, NotImplementedError):
        known = kind.name if kind is not None else f"type {number}"
        raise wrong(name, "be of a type that the package gguf dequantizes", known) from None
    return kind


def _placed(
    path: Path,
    infos: dict[str, tuple[Any, tuple[int, ...], int]],
    start: int,
    length: int,
    alignment: int,
) -> dict[str, Tensor]:
    """The tensors at their places, which do not overlap: no more is read than the file has."""
    sizes = require("gguf", EXTRA).GGML_QUANT_SIZES
    tensors, end = {}, start
    for name, (kind, shape, offset) in sorted(infos.items(), key=lambda item: item[1][2]):
        block, size = sizes[kind]
        first, count = start + offset, math.prod(shape) // block * size
        if first < end or first % alignment or first + count > length:
            allowed = f"stand at a multiple of {alignment} from byte {end} on, and end by {length}"
            raise wrong(name, allowed, f"{count} bytes from {first} on")
        tensors[name] = Tensor(path, kind, shape, first, count)
        end = first + count
    return {name: tensors[name] for name in infos}


def _unique(items: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    seen = set()
    for name, value in items:
        if name in seen:
            raise wrong(name, "be there once", "another one")
        seen.add(name)
        yield name, value
