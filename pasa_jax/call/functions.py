"""The functions of a call: `mask_mod`, `score_mod` and a block mask's, with their data."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import jax.numpy as jnp

from pasa_jax.core.errors import wrong
from pasa_jax.core.mods import Data, Mods
from pasa_jax.core.mods_checks import check_mask_mod, check_score_mod, data_of

if TYPE_CHECKING:
    from pasa_jax.call.arguments import Arguments


def mods_of(
    given: Arguments, full: tuple[int, int, int, int], wide: jnp.dtype
) -> tuple[Mods | None, Data]:
    """The functions of a call, None where there are none, and their data that have a gradient.

    Arguments:
      full: B, N, T and S.
      wide: the type of the scores that ``score_mod`` gets.
    """
    names = ("q_data", "kv_data", "head_data")
    block_mod = None if given.block_mask is None else given.block_mask.mask_mod
    if given.mask_mod is None and given.score_mod is None and block_mod is None:
        for name in names:
            if getattr(given, name) is not None:
                allowed = "be None without a mask_mod, a score_mod or a block mask that has one"
                raise wrong(name, allowed, "something else")
        return None, Data()
    data, trees = data_of(given.q_data, given.kv_data, given.head_data, full)
    mods = Mods(
        mask_mod=given.mask_mod,
        block_mod=block_mod,
        score_mod=given.score_mod,
        trees=trees,
        data=data,
        entries=jnp.arange(full[0], dtype=jnp.int32),
        heads=jnp.arange(full[1], dtype=jnp.int32),
    )
    if given.mask_mod is not None:
        check_mask_mod("mask_mod", mods)
    if block_mod is not None:
        check_mask_mod("block_mask.mask_mod", replace(mods, mask_mod=block_mod))
    if given.score_mod is not None:
        check_score_mod(mods, wide)
    floating, others = data.split(lambda x: jnp.issubdtype(x.dtype, jnp.floating))
    return replace(mods, data=others), floating
