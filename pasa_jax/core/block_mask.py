"""Masks as functions of the positions, and the blocks of a T × S mask that they leave to compute.

`create_block_mask` asks a function once for every pair of positions, block by block, and keeps for
each block whether it is hidden, partly seen or seen whole. The names and the arrays are those of
PyTorch's FlexAttention.

>>> def causal(b, h, q, kv):
...     return q >= kv
>>> block_mask = create_block_mask(causal, None, None, 512, 512)
>>> block_mask
BlockMask(1 × 1 heads, 512 × 512 in blocks of 128 × 128, 37.50 % hidden)
▒░░░
█▒░░
██▒░
███▒
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike

from pasa_jax.core.checks import is_size
from pasa_jax.core.errors import wrong
from pasa_jax.core.mods import Data, MaskMod, Mods, call
from pasa_jax.core.mods_checks import check_mask_mod, data_of

Array = jax.Array
_LARGEST = 2**24  # pairs of positions that a function is asked for at once
_PICTURE = 32  # rows and columns of a picture


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class BlockMask:
    """Which blocks of a T × S mask are seen: for each row of blocks two lists of columns.

    Arguments:
      kv_num_blocks: [B|1, N|1, rows] int32, how many blocks of a row are partly seen.
      kv_indices: [B|1, N|1, rows, columns] int32, which; what follows their number has no meaning.
      full_kv_num_blocks, full_kv_indices: likewise the blocks that are seen whole; no block is in
        both lists.
      lengths: T and S.
      block_size: queries and keys of a block.
      mask_mod: asked in blocks that are partly seen; None: they are seen as if whole.
    """

    kv_num_blocks: Array
    kv_indices: Array
    full_kv_num_blocks: Array
    full_kv_indices: Array
    lengths: tuple[int, int] = field(metadata={"static": True})
    block_size: tuple[int, int] = field(metadata={"static": True})
    mask_mod: MaskMod | None = field(default=None, metadata={"static": True})

    @staticmethod
    def from_kinds(
        kinds: ArrayLike,
        lengths: tuple[int, int],
        block_size: int | tuple[int, int] = 128,
        mask_mod: MaskMod | None = None,
    ) -> BlockMask:
        """The mask of which ``kinds`` [B|1, N|1, rows, columns] says for each block whether it is
        hidden (0), partly seen (1) or seen whole (2); bool: partly seen or not.
        """
        size = _block_size(block_size)
        kinds = jnp.asarray(kinds).astype(jnp.int8)
        (t, s), blocks = lengths, _blocks(lengths, size)
        if kinds.ndim != 4 or kinds.shape[2:] != blocks:
            raise wrong("kinds", f"be [B|1, N|1, {blocks[0]}, {blocks[1]}]", f"{kinds.shape}")
        return BlockMask(*_lists(kinds == 1), *_lists(kinds == 2), (t, s), size, mask_mod)

    @staticmethod
    def from_kv_blocks(
        kv_num_blocks: ArrayLike,
        kv_indices: ArrayLike,
        full_kv_num_blocks: ArrayLike | None = None,
        full_kv_indices: ArrayLike | None = None,
        *,
        lengths: tuple[int, int] | None = None,
        block_size: int | tuple[int, int] = 128,
        mask_mod: MaskMod | None = None,
    ) -> BlockMask:
        """The mask of these lists, as FlexAttention has them.

        Arguments:
          lengths: T and S; default: whole blocks.

        Raises:
          ValueError: the arrays' shapes do not fit each other.
        """
        size = _block_size(block_size)
        number, index = (jnp.asarray(x, jnp.int32) for x in (kv_num_blocks, kv_indices))
        if index.ndim != 4 or number.shape != index.shape[:3]:
            allowed = "be [B|1, N|1, rows, columns], and kv_num_blocks without its last axis"
            raise wrong("kv_indices", allowed, f"{index.shape} beside {number.shape}")
        if (full_kv_num_blocks is None) != (full_kv_indices is None):
            raise wrong("full_kv_indices", "be given with full_kv_num_blocks", "one of the two")
        full = (jnp.zeros_like(number), jnp.zeros_like(index))
        if full_kv_num_blocks is not None and full_kv_indices is not None:
            full = (jnp.asarray(x, jnp.int32) for x in (full_kv_num_blocks, full_kv_indices))
        full_number, full_index = full
        if full_index.shape != index.shape or full_number.shape != number.shape:
            raise wrong("full_kv_indices", f"be {list(index.shape)}", f"{full_index.shape}")
        rows, columns = index.shape[2:]
        if lengths is None:
            lengths = (rows * size[0], columns * size[1])
        if (rows, columns) != _blocks(lengths, size):
            allowed = f"be of {rows} and {columns} blocks of {size}"
            raise wrong("lengths", allowed, lengths)
        t, s = lengths
        return BlockMask(number, index, full_number, full_index, (t, s), size, mask_mod)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """B or 1, N or 1, T and S."""
        b, n = self.kv_num_blocks.shape[:2]
        return b, n, *self.lengths

    @property
    def is_concrete(self) -> bool:
        """Whether its arrays hold numbers: they are not traced."""
        return not any(isinstance(x, Tracer) for x in jax.tree.leaves(self))

    @property
    def kinds(self) -> Array:
        """[B|1, N|1, rows, columns] int8 as `from_kinds` takes them."""
        partial = _marked(self.kv_num_blocks, self.kv_indices)
        return jnp.maximum(partial, 2 * _marked(self.full_kv_num_blocks, self.full_kv_indices))

    @property
    def q_lists(self) -> tuple[Array, Array, Array, Array]:
        """The same lists by key blocks: for each column, which rows see it partly, and wholly."""
        kinds = jnp.swapaxes(self.kinds, 2, 3)
        return (*_lists(kinds == 1), *_lists(kinds == 2))

    def to_dense(self) -> Array:
        """[B|1, N|1, rows, columns] int32: 1 where a block is seen, in part or whole."""
        return (self.kinds != 0).astype(jnp.int32)

    def sparsity(self) -> float:
        """How many of the blocks are hidden, in percent."""
        seen = self._numbers() != 0
        return 100.0 * (1.0 - float(seen.mean())) if seen.size else 100.0

    def _numbers(self) -> np.ndarray:
        """`kinds` in NumPy, where a program is traced too."""
        with jax.ensure_compile_time_eval():
            return np.asarray(self.kinds)

    def __repr__(self) -> str:
        (b, n, t, s), (q, k) = self.shape, self.block_size
        head = f"BlockMask({b} × {n} heads, {t} × {s} in blocks of {q} × {k}"
        if not self.is_concrete:
            return f"{head})"
        return f"{head}, {self.sparsity():.2f} % hidden)\n{self.picture()}"

    def picture(self, b: int = 0, h: int = 0) -> str:
        """The blocks of one head: █ seen whole, ▒ in part, ░ hidden; large ones drawn together."""
        kinds = self._numbers()[b, h]
        steps = [max(1, math.ceil(x / _PICTURE)) for x in kinds.shape]
        padded = np.pad(
            kinds, [(0, -x % s) for x, s in zip(kinds.shape, steps, strict=True)], "edge"
        )
        rows, columns = (x // s for x, s in zip(padded.shape, steps, strict=True))
        tiles = padded.reshape(rows, steps[0], columns, steps[1]).swapaxes(1, 2)
        tiles = tiles.reshape(rows, columns, -1)
        marks = np.where(tiles.max(-1) == 0, "░", np.where(tiles.min(-1) == 2, "█", "▒"))
        return "\n".join("".join(row) for row in marks)


def create_block_mask(
    mask_mod: MaskMod,
    B: int | None,
    N: int | None,
    T: int,
    S: int,
    block_size: int | tuple[int, int] = 128,
    *,
    q_data: Any = None,
    kv_data: Any = None,
    head_data: Any = None,
) -> BlockMask:
    """Asks ``mask_mod`` for every pair of positions, in O(T + S) memory.

    Without data the answer is computed where the program is traced, and is constant in it.

    Arguments:
      mask_mod: mask_mod(b, h, q, kv) -> bool, elementwise; see `dot_product_attention`.
      B, N: batch entries and query heads; None: all are alike, and b and h are 0.
      T, S: lengths.
      block_size: of queries and keys, one number or two.
      q_data, kv_data, head_data: as `dot_product_attention` takes them.

    Raises:
      ValueError: an argument is wrong, or ``mask_mod`` is no such function.
    """
    for name, x in (("B", B), ("N", N), ("T", T), ("S", S)):
        if x is not None and not (is_size(x) and x > 0):
            raise wrong(name, "be a positive number", repr(x))
    size, full = _block_size(block_size), (B or 1, N or 1, T, S)
    data, trees = data_of(q_data, kv_data, head_data, full)
    mods = Mods(mask_mod=mask_mod, trees=trees, data=data)
    check_mask_mod("mask_mod", mods)
    constant = not jax.tree.leaves(data)
    with jax.ensure_compile_time_eval() if constant else contextlib.nullcontext():
        kinds = _kinds(mods, full, size)
        return BlockMask.from_kinds(kinds, (T, S), size, mask_mod)


def and_masks(*mask_mods: MaskMod) -> MaskMod:
    """The function that is true where all are."""
    return _together(jnp.logical_and, True, mask_mods)


def or_masks(*mask_mods: MaskMod) -> MaskMod:
    """The function that is true where one is."""
    return _together(jnp.logical_or, False, mask_mods)


def _together(join: Callable[..., Array], of_none: bool, mods: tuple[MaskMod, ...]) -> MaskMod:
    for mod in mods:
        if not callable(mod):
            raise wrong("mask_mods", "be functions", repr(mod))

    def joined(b: Array, h: Array, q: Array, kv: Array, **data: Any) -> Array:
        seen: Any = jnp.asarray(of_none)
        for mod in mods:
            seen = join(seen, call(mod, b, h, q, kv, **data))
        return seen

    return joined


def _block_size(given: int | tuple[int, int]) -> tuple[int, int]:
    pair = tuple(given) if isinstance(given, (tuple, list)) else (given, given)
    if len(pair) != 2 or not all(is_size(x) and x > 0 for x in pair):
        raise wrong("block_size", "be a positive number or a pair of them", repr(given))
    return int(pair[0]), int(pair[1])


def _blocks(lengths: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """How many blocks there are of rows and of columns."""
    return -(-lengths[0] // size[0]), -(-lengths[1] // size[1])


def _lists(marked: Array) -> tuple[Array, Array]:
    """[…, rows, columns] bool -> how many of each row are marked, and which, in ascending order."""
    order = jnp.argsort(~marked, axis=-1, stable=True).astype(jnp.int32)
    return jnp.sum(marked, axis=-1, dtype=jnp.int32), order


def _marked(number: Array, index: Array) -> Array:
    """int8 [B|1, N|1, rows, columns]: 1 for what the lists name."""
    columns = index.shape[-1]
    place = jnp.arange(columns, dtype=jnp.int32)
    index = jnp.where(place < number[..., None], index, columns)  # out of bounds: dropped
    b, h, row, _ = jnp.ogrid[: index.shape[0], : index.shape[1], : index.shape[2], :1]
    return jnp.zeros(index.shape, jnp.int8).at[b, h, row, index].set(1, mode="drop")


def _kinds(mods: Mods, full: tuple[int, int, int, int], size: tuple[int, int]) -> Array:
    """[B, N, rows, columns] int8 by asking ``mods.mask_mod``."""
    batch, heads, length, keys = full
    rows, columns = _blocks((length, keys), size)
    together = max(1, min(columns, _LARGEST // (size[0] * size[1])))  # blocks of a row
    parts = -(-columns // together)
    data = Data(
        *(
            tuple(jnp.pad(x, ((0, 0), (0, 0), (0, more))) if more else x for x in part)
            for part, more in zip(
                mods.data,
                (rows * size[0] - length, parts * together * size[1] - keys, 0),
                strict=True,
            )
        )
    )
    padded = replace(
        mods,
        data=data,
        entries=jnp.arange(batch, dtype=jnp.int32),
        heads=jnp.arange(heads, dtype=jnp.int32),
    )

    def ask(index: Array) -> Array:
        b, h, i, c = index
        mod = padded.one_head(b, h, 1)
        at = ((i * size[0], size[0]), (c * together * size[1], together * size[1]))
        place = mod.place(*at, 1, transposed=False)
        assert mod.mask_mod is not None
        seen = mod.shows(mod.mask_mod, place, mod.data.tile(*at, 1, transposed=False))
        inside = (place.q < length) & (place.kv < keys)
        seen, inside = (jnp.broadcast_to(x, (size[0], at[1][1])) for x in (seen, inside))
        shape = (size[0], together, size[1])
        some = jnp.any((seen & inside).reshape(shape), axis=(0, 2))
        whole = jnp.all((seen | ~inside).reshape(shape), axis=(0, 2))
        return some.astype(jnp.int8) + (some & whole).astype(jnp.int8)

    index = jnp.stack(
        jnp.meshgrid(
            *(jnp.arange(x, dtype=jnp.int32) for x in (batch, heads, rows, parts)), indexing="ij"
        ),
        axis=-1,
    )
    kinds = lax.map(ask, index.reshape(-1, 4))
    return kinds.reshape(batch, heads, rows, parts * together)[..., :columns]
