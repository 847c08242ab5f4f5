"""The lists of key tiles that the query tiles of a kernel with a block mask visit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from npu_bridge.specification import Kernel
from pasa_jax.core.block_mask import BlockMask
from pasa_jax.core.errors import wrong


def visits(kernel: Kernel, block_mask: BlockMask) -> np.ndarray:
    """See `npu_bridge.visits`."""
    if kernel.visits is None:
        raise wrong("kernel", "have a block_mask", "one without")
    tile = (kernel.schedule.block_q, kernel.schedule.block_kv)
    fits = all(size % own == 0 for size, own in zip(block_mask.block_size, tile, strict=True))
    axes = zip(kernel.visits, block_mask.shape[:2], strict=True)
    alike = all(n == 1 for axis, n in axes if axis == "1")
    if not fits or not alike:
        allowed = f"have the axes {kernel.visits!r} and blocks that are multiples of {tile}"
        seen = f"{block_mask.shape[:2]} and blocks of {block_mask.block_size}"
        raise wrong("block_mask", allowed, seen)
    places = [
        np.arange(-(-length // own)) * own // size
        for length, own, size in zip(block_mask.lengths, tile, block_mask.block_size, strict=True)
    ]
    return _listed(np.asarray(block_mask.kinds)[:, :, places[0]][..., places[1]])


def _listed(kinds: np.ndarray) -> np.ndarray:
    """[…, tiles + 1] of the kinds of all tiles […, tiles]."""
    seen = kinds != 0
    order = np.argsort(~seen, axis=-1, kind="stable")
    marked = 2 * order + (np.take_along_axis(kinds, order, axis=-1) == 2)
    return np.concatenate([seen.sum(-1, keepdims=True), marked], axis=-1).astype(np.int32)


def block_mask(kernel: Kernel, inputs: Mapping[str, Any]) -> BlockMask | None:
    """What the input ``visits`` says, as lax takes it; None where the kernel has none."""
    if kernel.visits is None:
        return None
    lists = np.asarray(inputs["visits"])
    count, marked = lists[..., :1], lists[..., 1:]
    kinds = np.zeros(marked.shape, np.int8)
    listed = np.arange(marked.shape[-1]) < count
    *at, _ = np.nonzero(listed)
    kinds[(*at, marked[listed] // 2)] = 1 + marked[listed] % 2
    lengths = (inputs["query"].shape[1], inputs["key"].shape[1])
    size = (kernel.schedule.block_q, kernel.schedule.block_kv)
    mod = None if kernel.functions is None else kernel.functions.block_mod
    return BlockMask.from_kinds(kinds, lengths, size, mod)


def drawn(
    kernel: Kernel, rng: np.random.Generator, shape: tuple[int, ...], queries: int, keys: int
) -> Any:
    """Lists of random kinds of tiles."""
    tiles = (-(-queries // kernel.schedule.block_q), -(-keys // kernel.schedule.block_kv))
    return jnp.asarray(_listed(rng.integers(0, 3, (*shape, *tiles))))
