"""`Functions`: the caller's `mask_mod` and `score_mod` of a kernel, and the arrays they are given.

They are traced with the tile functions, so each of their primitives becomes instructions. What they
are given comes when the kernel runs: one argument of the kernel for each leaf of their data.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pasa_jax.core.errors import wrong
from pasa_jax.core.mods import Data, Mods
from pasa_jax.core.mods_checks import check_mask_mod, check_score_mod

Array = jax.Array
PARTS = ("q_data", "kv_data", "head_data")
MODS = ("mask_mod", "score_mod", "block_mod")
_DTYPES = ("float32", "int32", "bool")
# The axes of a leaf of each part by its rank; each but the last may be 1.
_AXES = {
    "q_data": ("T", "BT", "BNT"),
    "kv_data": ("S", "BS", "BNS"),
    "head_data": ("N", "BN"),
}


@dataclass(frozen=True)
class Leaf:
    """An array of the functions' data.

    Arguments:
      name: of the kernel's argument: its part and number, "q_data_0".
      axes: letters, 1 where it is broadcast: "BT", "1NS", "N".
      dtype: "float32", "int32" or "bool".
    """

    name: str
    axes: str
    dtype: str

    @property
    def part(self) -> str:
        """The keyword in which it is given."""
        return self.name.rsplit("_", 1)[0]

    @property
    def traced(self) -> jnp.dtype:
        """The type that a trace has: bools are bytes in memory."""
        return jnp.dtype("uint8" if self.dtype == "bool" else self.dtype)

    def tile_shape(self, rows: int, keys: int) -> tuple[int, ...]:
        """Of what a tile reads of it."""
        return {"q_data": (rows, 1), "kv_data": (1, keys), "head_data": ()}[self.part]

    def __str__(self) -> str:
        return f"{self.dtype}:{self.axes}"


@dataclass(frozen=True)
class Functions:
    """The functions of a kernel.

    Arguments:
      mask_mod, score_mod: as `pasa_jax.dot_product_attention` takes them, or None.
      block_mod: the function of a block mask, asked in its partial blocks alone; or None.
      leaves: of all data, in the order of `PARTS`.
      trees: how the leaves of each part are put together; None where it is not given.
    """

    mask_mod: Callable[..., Any] | None
    score_mod: Callable[..., Any] | None
    block_mod: Callable[..., Any] | None
    leaves: tuple[Leaf, ...]
    trees: tuple[Any, Any, Any]

    def mods(self, entry: Array, head: Array) -> Mods:
        """As one head's tiles call them."""
        return Mods(
            mask_mod=_called("mask_mod", self.mask_mod),
            score_mod=_called("score_mod", self.score_mod),
            block_mod=_called("block_mask", self.block_mod),
            trees=self.trees,
            entries=entry,
            heads=head.reshape(1),
        )

    def data(self, arrays: Mapping[str, Any]) -> Data:
        """The leaves by part, of arrays by the leaves' names; bools are told from bytes."""

        def made(leaf: Leaf) -> Any:
            x = jnp.asarray(arrays[leaf.name])
            x = x.reshape(1, 1) if x.ndim == 0 else x
            return x != 0 if leaf.dtype == "bool" else x

        return Data(*(tuple(made(x) for x in self.leaves if x.part == part) for part in PARTS))

    def given(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The keywords of `dot_product_attention`, of the kernel's inputs by name."""
        keywords: dict[str, Any] = {name: getattr(self, name) for name in MODS[:2]}
        for part, tree in zip(PARTS, self.trees, strict=True):
            if tree is not None:
                own = [inputs[x.name] for x in self.leaves if x.part == part]
                keywords[part] = jax.tree.unflatten(tree, own)
        return keywords


def inputs_of(
    *, q_data: Any = None, kv_data: Any = None, head_data: Any = None
) -> dict[str, Array]:
    """Data of functions as a kernel's inputs by name: ``q_data_0`` and so on.

    Arguments:
      q_data, kv_data, head_data: pytrees of arrays as `pasa_jax.dot_product_attention` takes them.
    """
    data = zip(PARTS, (q_data, kv_data, head_data), strict=True)
    return {
        f"{part}_{i}": jnp.asarray(x)
        for part, tree in data
        for i, x in enumerate(jax.tree.leaves(tree))
    }


def functions_of(
    mask_mod: Any,
    score_mod: Any,
    q_data: Any,
    kv_data: Any,
    head_data: Any,
    block_mod: Any = None,
) -> Functions | None:
    """The functions of a kernel; None where there are none.

    Raises:
      ValueError: an argument is not one that a kernel can take.
    """
    given = dict(zip(PARTS, (q_data, kv_data, head_data), strict=True))
    if mask_mod is None and score_mod is None and block_mod is None:
        for name, x in given.items():
            if x is not None:
                allowed = "be None without a mask_mod, a score_mod or a block mask that has one"
                raise wrong(name, allowed, "something else")
        return None
    leaves: list[Leaf] = []
    trees = []
    for name, x in given.items():
        arrays, tree = jax.tree.flatten(x)
        leaves += [_leaf(name, i, array) for i, array in enumerate(arrays)]
        trees.append(None if x is None else tree)
    of = (trees[0], trees[1], trees[2])
    found = Functions(mask_mod, score_mod, block_mod, tuple(leaves), of)
    shapes = {x.name: jax.ShapeDtypeStruct((), jnp.dtype(x.dtype)) for x in leaves}
    data = Data(*(tuple(shapes[x.name] for x in leaves if x.part == part) for part in PARTS))
    mods = Mods(mask_mod=mask_mod, score_mod=score_mod, trees=found.trees, data=data)
    if mask_mod is not None:
        check_mask_mod("mask_mod", mods)
    if block_mod is not None:
        check_mask_mod("block_mask.mask_mod", replace(mods, mask_mod=block_mod))
    if score_mod is not None:
        check_score_mod(mods, jnp.float32)
    return found


def _leaf(part: str, number: int, given: Any) -> Leaf:
    x = given if hasattr(given, "shape") and hasattr(given, "dtype") else np.asarray(given)
    dtype = str(jax.dtypes.canonicalize_dtype(x.dtype))
    if dtype not in _DTYPES:
        way = "Cast it: other types have no instructions for what a function may do."
        raise wrong(part, "hold float32, int32 or bool", dtype, way)
    names = {len(axes): axes for axes in _AXES[part]}
    if len(x.shape) not in names:
        allowed = " or ".join(f"[{', '.join(axes)}]" for axes in _AXES[part])
        raise wrong(part, f"have leaves {allowed}, with 1 for an axis to broadcast", x.shape)
    own = names[len(x.shape)]
    last = len(own) - (part != "head_data")  # T and S are not broadcast
    axes = "".join("1" if n == 1 and i < last else own[i] for i, n in enumerate(x.shape))
    return Leaf(f"{part}_{number}", axes, dtype)


def _called(name: str, function: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """The function under a name of ours, by which a trace tells whose equations are its."""
    if function is None:
        return None

    @functools.wraps(function)
    def called(*arguments: Any, **data: Any) -> Any:
        return function(*arguments, **data)

    called.__name__ = name
    return jax.jit(called)


# As text.


def describe(functions: Functions) -> dict[str, Any]:
    """The functions by "module:name" and their data's types and axes, as JSON has them; None for a
    function or a tree of data that cannot be found again by that.
    """
    texts: dict[str, Any] = {name: _name_of(getattr(functions, name)) for name in MODS}
    for part, tree in zip(PARTS, functions.trees, strict=True):
        own = [str(x) for x in functions.leaves if x.part == part]
        texts[part] = None if tree is None else _plain(jax.tree.unflatten(tree, own))
    return texts


def _name_of(function: Any) -> str | None:
    """ "module:name" of a function that stands at a module's top."""
    if function is None:
        return None
    module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
    there = getattr(sys.modules.get(module), name, None)
    return f"{module}:{name}" if there is function and module != "__main__" else "?"


def _plain(x: Any) -> Any:
    """Dicts and lists as they are, tuples as lists, and "?" for what JSON does not hold."""
    if isinstance(x, dict) and all(isinstance(key, str) for key in x):
        return {key: _plain(value) for key, value in x.items()}
    if type(x) in (list, tuple):
        return [_plain(value) for value in x]
    return x if x is None or isinstance(x, str) else "?"


def read(texts: dict[str, Any]) -> Functions | None:
    """What `describe` has written.

    Raises:
      ValueError: it cannot be found again.
    """
    unknown = [name for name, x in texts.items() if "?" in jax.tree.leaves(x)]
    if unknown:
        allowed = f"be given: kernel.json cannot name the {unknown[0]}"
        way = "Pass what npu_bridge.kernel returned, or let the function stand in a module."
        raise wrong("kernel", allowed, "None", way)
    mods = [None if texts[name] is None else found(name, texts[name]) for name in MODS]
    q_data, kv_data, head_data = (jax.tree.map(shaped, texts[part]) for part in PARTS)
    return functions_of(mods[0], mods[1], q_data, kv_data, head_data, mods[2])


def found(argument: str, name: str) -> Callable[..., Any]:
    """The function called "module:name".

    Raises:
      ValueError: there is none.
    """
    module, _, own = name.partition(":")
    try:
        return getattr(importlib.import_module(module), own)
    except (ImportError, AttributeError, ValueError) as error:
        raise wrong(argument, "be a function's module:name", f"{name!r} ({error})") from None


def shaped(text: str) -> jax.ShapeDtypeStruct:
    """An array of "dtype:axes", whose sizes stand for those of a call."""
    dtype, _, axes = text.partition(":")
    if dtype not in _DTYPES or not axes or not set(axes) <= set("BNTS1"):
        allowed = "be dtype:axes, as in int32:BT, with float32, int32 or bool"
        raise wrong("data", allowed, repr(text))
    return jax.ShapeDtypeStruct(tuple(1 if x == "1" else 2 for x in axes), jnp.dtype(dtype))
