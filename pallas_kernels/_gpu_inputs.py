"""What a program on a GPU reads: sizes of tiles, the arrays, and what is done to them before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels._common import Lists, given_data, narrowed, of_heads
from pasa_jax.core import tile
from pasa_jax.core.mask import Index, Mask
from pasa_jax.core.operands import Factors, Operands
from pasa_jax.core.plan import Plan
from pasa_jax.core.prepare import HeadFacts

Array = jax.Array
Ref = Any


def side(n: int) -> int:
    """The side of a tile that holds n. Triton's are powers of two, at least 16 in a product."""
    return max(16, pl.next_power_of_2(n))


@dataclass(frozen=True)
class Specs:
    """Grid and block sizes of one call, derived from its schedule.

    Arguments:
      block_q, block_kv: positions and keys of a tile.
      size, value_size: D and E, and `padded_size` and `padded_value` rounded up to powers of two,
        as Triton's tiles must be.
      rank: R of a bias of low rank, or 0.
    """

    block_q: int
    block_kv: int
    query_tiles: int
    size: int
    value_size: int
    padded_size: int
    padded_value: int
    rank: int

    @staticmethod
    def of(o: Operands, plan: Plan) -> Specs:
        length = o.query.shape[1]
        block_q = plan.schedule.block_q
        return Specs(
            block_q,
            plan.schedule.block_kv,
            -(-length // block_q),
            size := o.query.shape[-1],
            value_size := o.value.shape[-1],
            side(size),
            side(value_size),
            0 if o.factors is None else o.factors.q.shape[2],
        )

    def padded(self, n: int, axis: str) -> int:
        """Length n of an axis, padded to whole tiles; "1" marks one that may be broadcast."""
        tiles = {
            "rows": self.block_q,
            "keys": self.block_kv,
            "size": self.padded_size,
            "value": self.padded_value,
        }
        if axis == "rank":
            return side(n)
        unit = 1 if n == 1 and axis.endswith("1") else tiles.get(axis.removesuffix("1"), 1)
        return -(-n // unit) * unit


class Inputs(NamedTuple):
    """The kernels' inputs: arrays outside, refs of one program's batch entry and head inside."""

    query: Any  # [B, T, N, D]                                      inside: [T, D]
    key: Any  # [B, S, K, D], shifted; or codes of 8 bits           [S, D]
    value: Any  # [B, S, K, E]                                      [S, E]
    scale: Any  # [1]                                               [1]
    largest_key: Any = None  # [B, K] of the keys as they are       []
    kappa: Any = None  # [B, tiles, K, D]                           [tiles, D]
    value_gain: Any = None  # [B, K, query tiles]                   [query tiles]
    guard: Any = None  # tile.Guard of [B, T, N]                    [T]
    key_scale: Any = None  # [B, K, S]                              [S]
    bias: Any = None  # [B|1, N|1, T|1, S|1]                        [T|1, S|1]
    sinks: Any = None  # [N]                                        []
    array: Any = None  # [B|1, N|1, T|1, S|1] int8                  [T|1, S|1]
    query_segments: Any = None  # [B, T]                            [T]
    key_segments: Any = None  # [B, S]                              [S]
    query_positions: Any = None  # [B|1, T]                         [T]
    key_positions: Any = None  # [B|1, S]                           [S]
    query_lengths: Any = None  # [B]                                []
    key_lengths: Any = None  # [B]                                  []
    factors: Any = None  # Factors of [B|1, N|1, R, T|S]            [R, T|S], []
    # Of the functions of the caller: the numbers of batch entry and head, and `Data`.
    entries: Any = None  # [B]                                      []
    heads: Any = None  # [N]                                        []
    query_data: Any = None  # each [B|1, N|1, T]                    [T]
    key_data: Any = None  # each [B|1, N|1, S]                      [S]
    head_data: Any = None  # each [B|1, N|1]                        []
    # `Lists` [B|1, N|1, …]: key tiles of query tiles; and query tiles of key tiles.
    lists: Any = None
    row_lists: Any = None
    # Of the backward pass alone.
    raw_key: Any = None  # [B, S, K, D], None: ``key``              [S, D]
    d_out: Any = None  # [B, T, N, E]                               [T, E]
    m: Any = None  # [B, T, N]                                      [T]
    l: Any = None  # noqa: E741  [B, T, N], 0: without gradient     [T]
    delta: Any = None  # [B, T, N]                                  [T]


# The axes of each: "b" batch, "n" and "k" heads, and the names of `Specs.padded`.
_TILED = ("b", "n", "rows1", "keys1")
_COLUMN = ("b", "rows", "n")
_LIST = ("b", "n", "tiles", "tiles")
_LISTS = Lists(_LIST, _LIST[:3], _LIST[:3], _LIST)
AXES = Inputs(
    query=("b", "rows", "n", "size"),
    key=("b", "keys", "k", "size"),
    value=("b", "keys", "k", "value"),
    scale=("one",),
    largest_key=("b", "k"),
    kappa=("b", "tiles", "k", "size"),
    value_gain=("b", "k", "tiles"),
    guard=_COLUMN,
    key_scale=("b", "k", "keys"),
    bias=_TILED,
    sinks=("n",),
    array=_TILED,
    query_segments=("b", "rows"),
    key_segments=("b", "keys"),
    query_positions=("b", "rows"),
    key_positions=("b", "keys"),
    query_lengths=("b",),
    key_lengths=("b",),
    factors=Factors(("b", "n", "rank", "rows"), ("b", "n", "rank", "keys"), ("b", "n")),
    entries=("b",),
    heads=("n",),
    query_data=("b", "n", "rows"),
    key_data=("b", "n", "keys"),
    head_data=("b", "n"),
    lists=_LISTS,
    row_lists=_LISTS,
    raw_key=("b", "keys", "k", "size"),
    d_out=("b", "rows", "n", "value"),
    m=_COLUMN,
    l=_COLUMN,
    delta=_COLUMN,
)


def block_specs(x: Inputs, specs: Specs, *, by_key_head: bool = False) -> Inputs:
    """The arrays of a program's batch entry and head, each as one block.

    In Triton a ref is a pointer. The arrays are padded to whole tiles, so that any tile may be
    sliced; loads and stores are masked.

    Arguments:
      by_key_head: the grid is (·, key head, batch), not (·, query head, batch). What query heads
        have then keeps an axis of the G query heads; `of_query_head` picks one of them.
    """
    groups = x.query.shape[2] // x.key.shape[2]

    def block(shape: tuple[int, ...], axes: tuple[str, ...]) -> pl.BlockSpec:
        def length(n: int, axis: str) -> int | None:
            if axis == "n" and by_key_head:
                return min(n, groups)
            return None if axis in "bnk" else specs.padded(n, axis)

        def index(i: Array, h: Array, b: Array) -> tuple[Any, ...]:
            del i
            place = {"b": b, "n": h, "k": h if by_key_head else lax.div(h, jnp.int32(groups))}
            return tuple(
                place.get(axis, 0) if n > 1 else 0 for n, axis in zip(shape, axes, strict=True)
            )

        return pl.BlockSpec(tuple(map(length, shape, axes)), index)

    return _with_axes(lambda array, axes: block(array.shape, axes), x)


def _with_axes(f: Callable[[Any, tuple[str, ...]], Any], x: Inputs) -> Inputs:
    """f(leaf, axes) of every leaf of x."""

    def one(field: Any, axes: Any) -> Any:
        if isinstance(axes, (Factors, Lists)):  # a field whose parts have axes of their own
            if field is None:
                return None
            return type(axes)(*map(one, field, axes))
        return jax.tree.map(lambda leaf: f(leaf, axes), field)

    return Inputs(*map(one, x, AXES))


@dataclass(frozen=True)
class HeadRef:
    """One head of a ref that holds several, to be loaded from as a ref of that head."""

    ref: Ref
    axis: int
    head: Index

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.ref.shape
        return (*shape[: self.axis], *shape[self.axis + 1 :])

    @property
    def at(self) -> HeadRef:
        return self

    def __getitem__(self, place: tuple[Any, ...]) -> Any:
        head = jnp.int32(self.head if self.ref.shape[self.axis] > 1 else 0)
        return self.ref.at[(*place[: self.axis], head, *place[self.axis :])]


def of_query_head(refs: Inputs, g: Index) -> Inputs:
    """The refs of query head g of a program's key head, see `block_specs`."""

    def one(ref: Ref, axes: tuple[str, ...]) -> Any:
        if "n" not in axes:
            return ref
        axis = [a for a in axes if a not in "bk"].index("n")
        return HeadRef(ref, axis, g)

    return _with_axes(one, refs)


def inputs_of(o: Operands, mask: Mask, plan: Plan, specs: Specs) -> Inputs:
    inputs = Inputs(
        query=o.query,
        key=o.key,
        value=o.value,
        scale=o.scale.astype(jnp.float32).reshape(1),
        bias=narrowed(o.bias),
        sinks=narrowed(o.sinks),
        array=None if mask.array is None else mask.array.astype(jnp.int8),
        query_segments=mask.query_segments,
        key_segments=mask.key_segments,
        query_positions=mask.query_positions,
        key_positions=mask.key_positions,
        query_lengths=mask.query_lengths,
        key_lengths=mask.key_lengths,
        factors=o.factors,
    )
    if mask.mods is not None:
        data = given_data(mask, o)
        inputs = inputs._replace(
            entries=mask.mods.entries,
            heads=mask.mods.heads,
            query_data=data.query,
            key_data=data.key,
            head_data=data.head,
        )
    if o.key.dtype != jnp.float16:  # whose products cannot leave float32
        largest = jnp.max(jnp.abs(o.key.astype(jnp.float32)), axis=(1, 3))
        inputs = inputs._replace(largest_key=largest)
    if not plan.storage.uses_kappa and not plan.rounds_products:
        return inputs
    return _prepared(inputs, o, mask, plan, specs)


def _prepared(inputs: Inputs, o: Operands, mask: Mask, plan: Plan, specs: Specs) -> Inputs:
    """``inputs`` with keys shifted, or in 8 bits, and the guard's powers where products are in
    float16.
    """
    n = plan.schedule.block_kv

    def look(one: Operands, facts: HeadFacts) -> tuple[Array, HeadFacts]:
        key = tile.zero_unusable(one.key, facts.usable[:, None])
        if facts.kappa is None:
            return key, facts
        if facts.codes is not None:
            return facts.codes.codes, facts

        def shifted(k: Array, kappa: Array) -> Array:
            return tile.key_tile(k, k, None, plan.numerics(len(key)), kappa=kappa[None]).k

        tiles = jnp.pad(key, ((0, -len(key) % n), (0, 0))).reshape(-1, n, key.shape[1])
        flat = jax.vmap(shifted)(tiles, facts.kappa).reshape(-1, key.shape[1])
        return flat[: len(key)], facts

    key, facts = of_heads(o, mask, plan, specs.block_q, look)

    def rows(x: Array) -> Array:  # [B, K, T, G] -> [B, T, N]
        return jnp.moveaxis(x, 1, 2).reshape(x.shape[0], x.shape[2], -1)

    inputs = inputs._replace(key=jnp.swapaxes(key, 1, 2))
    if facts.kappa is not None:
        inputs = inputs._replace(kappa=jnp.swapaxes(facts.kappa, 1, 2))
    if facts.codes is not None:
        inputs = inputs._replace(key_scale=facts.codes.scale[..., 0])
    if not plan.rounds_products:
        return inputs
    guard = None if facts.guard is None else tile.Guard(*map(rows, facts.guard))
    return inputs._replace(guard=guard, value_gain=facts.value_gain)
