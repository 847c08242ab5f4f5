"""The checks of the caller's functions and of what they are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pasa_jax.core.errors import wrong
from pasa_jax.core.mods import Data, Mods, Place, call

Array = jax.Array
Trees = tuple[Any, Any, Any]


def data_of(
    q_data: Any, kv_data: Any, head_data: Any, full: tuple[int, int, int, int]
) -> tuple[Data, Trees]:
    """The leaves as [B|1, N|1, T], [B|1, N|1, S] and [B|1, N|1], and how they are put together.

    Arguments:
      full: B, N, T and S.

    Raises:
      ValueError: a leaf has another shape, or no numbers.
    """
    b, n, t, s = full
    parts, trees = [], []
    for name, given, length in (
        ("q_data", q_data, t),
        ("kv_data", kv_data, s),
        ("head_data", head_data, None),
    ):
        leaves, tree = jax.tree.flatten(given)
        parts.append(tuple(_leaf(name, x, b, n, length) for x in leaves))
        trees.append(None if given is None else tree)
    return Data(*parts), (trees[0], trees[1], trees[2])


def _leaf(name: str, given: Any, b: int, n: int, length: int | None) -> Array:
    x = jnp.asarray(given)
    if x.dtype != jnp.bool_ and not jnp.issubdtype(x.dtype, jnp.number):
        raise wrong(name, "hold numbers", str(x.dtype))
    own = () if length is None else (length,)
    if length is None:
        letters = "[N] or [B, N]"
        x = x[None] if x.ndim == 1 else x
    else:
        letter = "T" if name == "q_data" else "S"
        letters = f"[{letter}], [B, {letter}] or [B, N, {letter}], {letter} = {length},"
        x = x[None] if x.ndim == 1 else x
        x = x[:, None] if x.ndim == 2 else x
    fits = x.ndim == 2 + len(own) and x.shape[2:] == own
    if not fits or x.shape[0] not in (1, b) or x.shape[1] not in (1, n):
        allowed = f"have leaves {letters} with B = {b} or 1 and N = {n} or 1"
        raise wrong(name, allowed, f"{jnp.shape(given)}")
    return x


def check_mask_mod(name: str, mods: Mods) -> None:
    """Raises unless ``mods.mask_mod`` is an elementwise function to bool."""

    def asked(place: Place, data: Data) -> Array:
        assert mods.mask_mod is not None
        return jnp.asarray(call(mods.mask_mod, *place, **mods.given(data)))

    _check(name, mods.mask_mod, asked, "mask_mod(b, h, q, kv) -> bool", mods, jnp.bool_)


def check_score_mod(mods: Mods, dtype: Any) -> None:
    """Raises unless ``mods.score_mod`` is an elementwise function of scores of ``dtype``."""

    def asked(place: Place, data: Data) -> Array:
        assert mods.score_mod is not None
        score = jnp.zeros((2, 3), dtype)
        return jnp.asarray(call(mods.score_mod, score, *place, **mods.given(data)))

    wanted = "score_mod(score, b, h, q, kv) -> score"
    _check("score_mod", mods.score_mod, asked, wanted, mods, jnp.floating)


def _check(
    name: str, given: Any, asked: Callable[..., Array], wanted: str, mods: Mods, kind: Any
) -> None:
    if not callable(given):
        raise wrong(name, f"be a function {wanted}", repr(given))
    index = [jax.ShapeDtypeStruct(x, jnp.int32) for x in ((1, 1), (2, 1), (2, 1), (1, 3))]
    small = ((2, 1), (1, 3), (2, 1))
    data = Data(
        *(
            tuple(None if x is None else jax.ShapeDtypeStruct(shape, x.dtype) for x in part)
            for part, shape in zip(mods.data, small, strict=True)
        )
    )
    jaxpr, out = jax.make_jaxpr(asked, return_shape=True)(Place(*index), data)
    if jaxpr.consts:
        held = ", ".join(f"{x.dtype}{list(x.shape)}" for x in jaxpr.consts)
        way_out = (
            "Pass what belongs to queries, keys or heads as q_data, kv_data or head_data, which "
            "the function is given by name; a number may be a Python number."
        )
        raise wrong(name, "hold no arrays of its own", f"one that holds {held}", way_out)
    try:
        fits = jnp.broadcast_shapes(out.shape, (2, 3)) == (2, 3)
    except ValueError:
        fits = False
    if not fits:
        allowed = "be elementwise: its result must broadcast as its arguments do"
        raise wrong(name, allowed, f"{out.shape} for indices [2, 1] and [1, 3]")
    if not jnp.issubdtype(out.dtype, kind):
        raise wrong(name, f"be a function {wanted}", f"a result of type {out.dtype}")
