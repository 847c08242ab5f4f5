"""A kernel as the projects around it see it: arguments, chip, the constants of 'paper'."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax.numpy as jnp
import numpy as np

from npu_bridge.dtypes import C_TYPES, ITEMSIZE
from npu_bridge.specification import Kernel
from npu_bridge.stages import longest
from pasa_jax.core.errors import PlanError
from pasa_jax.core.shifts import optimal_beta, paper_matrix
from pasa_jax.core.target import TARGETS, find_target

# The letters of a shape in the names of `PasaRun` and make_tiling.h.
LETTERS = {
    "B": "run.batch",
    "T": "run.queryLength",
    "S": "run.keyLength",
    "N": "run.heads",
    "K": "run.kvHeads",
    "D": "PASA_HEAD_DIM",
    "E": "PASA_VALUE_HEAD_DIM",
    "n": "PASA_BLOCK_KV",
    "P": "(run.batch + 1)",
    "Q": "((run.queryLength + PASA_BLOCK_Q - 1) / PASA_BLOCK_Q)",
    "V": "((run.keyLength + PASA_BLOCK_KV - 1) / PASA_BLOCK_KV + 1)",
}
# What stands for a letter that is not one of the call's sizes.
_SPELLED = {"P": "B + 1", "Q": "query tiles", "V": "key tiles + 1"}
_SHAPES = {
    "query": "BTND",
    "key": "BSKD",
    "value": "BSKE",
    "lengths": "B",
    "querySegments": "BT",
    "keySegments": "BS",
    "sinks": "N",
    "matrices": "2nn",
    "weights": "2n",
    "output": "BTNE",
    "lse": "BTN",
}
_PACKED_SHAPES = {
    "query": "TND",
    "key": "SKD",
    "value": "SKE",
    "queryOffsets": "P",
    "keyOffsets": "P",
    "output": "TNE",
    "lse": "TN",
}
_NOTES = {
    "query": "",
    "key": "",
    "value": "",
    "bias": "added to the scores",
    "mask": "1 where a query sees a key, else 0",
    "querySegments": "a query sees the keys of its own segment",
    "keySegments": "",
    "sinks": "score of one more key of each head, whose value is 0",
    "lengths": "how many keys of each batch entry count",
    "queryOffsets": "where the queries of each sequence begin, and T",
    "keyOffsets": "where its keys begin, and S",
    "visits": "of each query tile: how many key tiles it visits; twice each, + 1 if seen whole",
    "matrices": "the matrix of 'paper' for full blocks and for the last; see paper_constants.h",
    "weights": "share of each key in the row mean; see paper_constants.h",
    "output": "",
    "lse": "log-sum-exp of the scores",
}
# Of a C++ type: the plain type, the names of CANN's enumerations behind ge::DT_ and ACL_.
_TYPES = {
    "half": ("float16", "FLOAT16", "FLOAT16"),
    "bfloat16_t": ("bfloat16", "BF16", "BF16"),
    "float": ("float32", "FLOAT", "FLOAT"),
    "int32_t": ("int32", "INT32", "INT32"),
    "uint8_t": ("uint8", "UINT8", "UINT8"),
}


@dataclass(frozen=True)
class Argument:
    """An array argument of the kernel.

    Arguments:
      dtype: its plain name, "float16".
      shape: letters of `LETTERS` and digits, as text.
      count: its elements, in C++.
      source: "file" for an input of the call, "constant" for one of the kernel, "output".
    """

    name: str
    dtype: str
    ge: str
    acl: str
    itemsize: int
    axes: str
    shape: str
    count: str
    source: str
    note: str


_OUTPUTS = ("output", "lse")
_CONSTANTS = ("matrices", "weights")  # inputs that belong to the kernel, not to the call


def arguments(kernel: Kernel) -> dict[str, str]:
    """The array arguments of a kernel and their C++ types, as the kernel declares them."""
    dtype = C_TYPES[kernel.dtype]
    types = {"query": dtype, "key": dtype, "value": dtype, "output": dtype}
    if kernel.return_lse:
        types["lse"] = "float"
    if kernel.bias is not None:
        types["bias"] = dtype
    if kernel.mask_axes is not None:
        types["mask"] = "uint8_t"
    if kernel.segments:
        types |= {"querySegments": "int32_t", "keySegments": "int32_t"}
    if kernel.sinks:
        types["sinks"] = "float"
    if kernel.lengths:
        types["lengths"] = "int32_t"
    if kernel.functions is not None:
        types |= {x.name: C_TYPES[x.dtype] for x in kernel.functions.leaves}
    if kernel.visits is not None:
        types["visits"] = "int32_t"
    if kernel.packed:
        types |= {"queryOffsets": "int32_t", "keyOffsets": "int32_t"}
    if kernel.shift == "paper":
        types |= {"matrices": dtype, "weights": "float"}
    return types


def passed(kernel: Kernel) -> list[str]:
    """The names of the array arguments in the order in which they are passed: outputs last."""
    names = list(arguments(kernel))
    return [n for n in names if n not in _OUTPUTS] + [n for n in names if n in _OUTPUTS]


def inputs(kernel: Kernel) -> list[str]:
    """The names of the arrays that a call gives."""
    return [n for n in arguments(kernel) if n not in (*_OUTPUTS, *_CONSTANTS)]


def argument(kernel: Kernel, name: str) -> Argument:
    """How the projects describe the kernel's argument ``name``."""
    shapes = _SHAPES | _PACKED_SHAPES if kernel.packed else _SHAPES
    own = {} if kernel.functions is None else {x.name: x.axes for x in kernel.functions.leaves}
    own |= {"bias": kernel.bias, "mask": kernel.mask_axes, "visits": f"{kernel.visits}QV"}
    axes = own.get(name, shapes.get(name))
    assert axes is not None
    c_type = arguments(kernel)[name]
    dtype, ge, acl = _TYPES[c_type]
    source = "output" if name in _OUTPUTS else "constant" if name in _CONSTANTS else "file"
    return Argument(
        name=name,
        dtype=dtype,
        ge=f"ge::DT_{ge}",
        acl=f"ACL_{acl}",
        itemsize=ITEMSIZE[c_type],
        axes=axes,
        shape=f"[{', '.join(_SPELLED.get(x, x) for x in axes)}]",
        count=" * ".join(LETTERS.get(letter, letter) for letter in axes),
        source=source,
        note=_NOTES.get(name, "data of the functions"),
    )


def sizes(kernel: Kernel, inputs: Mapping[str, Any]) -> tuple[int, int, int, int, int]:
    """B, N, K, T and S of a call; of packed sequences, T and S are the totals."""
    query, key = inputs["query"].shape, inputs["key"].shape
    if kernel.packed:
        return len(inputs["queryOffsets"]) - 1, query[1], key[1], query[0], key[0]
    return query[0], query[2], key[2], query[1], key[1]


def values(kernel: Kernel) -> dict[str, Any]:
    """What the templates of the projects need beside the kernel's own values.

    Raises:
      PlanError: CANN has no project of this kind for the schedule's target.
    """
    target = kernel.schedule.target
    chip = find_target(target).ascend
    if chip is None:
        names = ", ".join(name for name, x in TARGETS.items() if x.ascend is not None)
        raise PlanError(f"`schedule.target` must be one of {names}; got {target}")
    arch, units, soc = chip.architecture, chip.units, chip.product
    described = [argument(kernel, name) for name in passed(kernel)]
    inputs = [a for a in described if a.source != "output"]
    info = jnp.finfo(kernel.dtype)
    return {
        "arrays": described,
        "inputs": inputs,
        "outputs": [a for a in described if a.source == "output"],
        "letters": LETTERS,
        "op": "PasaAttention",
        "arch": arch,
        "units": units,
        "soc": soc,
        "dtype": kernel.dtype,
        "fraction_bits": info.nmant,
        "exponent_bias": int(info.maxexp) - 1,
        "places": _numbered("at", 0, len(described) + 2),
        "input_tensors": _numbered("tensors", 0, len(inputs)),
        "output_tensors": _numbered("tensors", len(inputs), len(described)),
        "data": [a for a in inputs if a.name not in _NOTES],
        "longest": longest(kernel),
        "table": paper_table(kernel) if kernel.shift == "paper" else None,
    }


def _numbered(name: str, first: int, end: int) -> str:
    return ", ".join(f"{name}[{i}]" for i in range(first, end))


def paper_table(kernel: Kernel) -> dict[str, list[str]]:
    """The two numbers of M and the weight for a last block of t = 0 … n − 1 keys, as C++ text.

    t = 0 stands for a full block. They are those of `paper_blocks`, whose n × n matrices hold no
    others; making all of those takes eleven seconds for n = 512.
    """
    return _paper_table(
        kernel.schedule.block_kv, kernel.beta, kernel.plan.scale or 1.0, kernel.dtype
    )


@lru_cache(maxsize=8)
def _paper_table(n: int, beta: float | None, scale: float, dtype: str) -> dict[str, list[str]]:
    beta = optimal_beta(n) if beta is None else beta
    full, inva = paper_matrix(np.ones(n, bool), beta, scale, np.dtype(np.float16))
    diagonal, off, weights = [full[0, 0]], [full[0, 1]], [np.float32(1 / n)]
    for t in range(1, n):
        tail, tail_inva = paper_matrix(np.ones(t, bool), beta, scale, np.dtype(np.float16))
        diagonal.append(tail[0, 0])
        off.append(tail[0, -1] if t > 1 else np.float16(0))  # one key: nothing off the diagonal
        weights.append(np.float32(tail_inva / inva / t))
    return {
        "DIAGONAL": [f"0x{x:04x}" for x in _bits(diagonal, dtype)],
        "OFF_DIAGONAL": [f"0x{x:04x}" for x in _bits(off, dtype)],
        "WEIGHT": [f"{x!s}f" for x in weights],
    }


def _bits(numbers: list[Any], dtype: str) -> list[int]:
    rounded = np.asarray(numbers, np.float32).astype(jnp.dtype(dtype))
    return [int(x) for x in rounded.view(np.uint16)]
