"""The tiles of one program on a GPU, loaded through Triton's pointers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels._common import Lists, as_given, bound
from pallas_kernels._gpu_inputs import HeadRef, Inputs, Specs, side
from pasa_jax.core import tile
from pasa_jax.core.mask import Index, Mask, div
from pasa_jax.core.mods import Data, Place
from pasa_jax.core.operands import Factors
from pasa_jax.core.plan import Plan
from pasa_jax.core.tile.arrays import dot
from pasa_jax.core.walk import Listed, Walk

Array = jax.Array
Ref = Any


# Triton computes product·gain − maximum with a single rounding. Up to this score that is only more
# exact; beyond, a row's largest score may be far from its own maximum.
LARGEST_SCORE = 2.0**24


# Products of float32 operands on the matrix units, in three products of TF32. The gradients of
# float16 inputs fit no float16; TF32 has its fraction and float32's range.
_TF32_X3 = lax.DotAlgorithmPreset.TF32_TF32_F32_X3


# Bound on a product that leaves float32 room for sums of it.
_LARGEST_PRODUCT = 2.0**126


@dataclass(frozen=True, kw_only=True)
class PointerWalk(Walk):
    """One program: its tiles are loaded through refs, with zeros outside the arrays."""

    refs: Inputs
    specs: Specs

    @classmethod
    def of(cls, refs: Inputs, mask: Mask, plan: Plan, specs: Specs, **fields: Any) -> Self:
        """The walk of the program that reads ``refs``."""
        return cls(
            mask=bound(mask, refs.query_lengths, refs.key_lengths),
            plan=plan,
            numerics=plan.numerics(mask.key_length),
            groups=1,
            block_q=specs.block_q,
            value_size=specs.padded_value,
            refs=refs,
            specs=specs,
            **fields,
        )

    def load(self, ref: Ref, row: tuple[Index, int, int], column: tuple[Index, int, int]) -> Array:
        """A tile of ref [L|1, W|1]; zeros outside the array.

        Arguments:
          row, column: where it starts, its length, and the array's length.
        """
        slices, shape, inside = [], [], None
        for axis, (at, count, total) in enumerate((row, column)):
            if ref.shape[axis] == 1:
                at, count, total = 0, 1, 1
            slices.append(pl.ds(jnp.int32(at), count))  # of one type, under x64 too
            shape.append(count)
            if total % count:
                along = (count, 1) if axis == 0 else (1, count)
                within = at + lax.broadcasted_iota(jnp.int32, along, axis) < total
                inside = within if inside is None else inside & within
        view = ref.at[tuple(slices)]
        if inside is None:
            return plgpu.load(view)
        return plgpu.load(view, mask=jnp.broadcast_to(inside, shape), other=0)

    def column(self, ref: Ref, start: Index, count: int, total: int) -> Array:
        """[count] of ref [L] at ``start``; zeros outside the array's ``total``."""
        view = ref.at[(pl.ds(start, count),)]
        if total % count == 0:
            return plgpu.load(view)
        inside = start + lax.broadcasted_iota(jnp.int32, (count,), 0) < total
        return plgpu.load(view, mask=inside, other=0)

    def rows_at(self, start: Index) -> tuple[Index, int, int]:
        return start, self.block_q, self.mask.query_length

    def keys_at(self, j: Index) -> tuple[Index, int, int]:
        return self.key_start(j), self.block_kv, self.mask.key_length

    def key_start(self, j: Index) -> Index:
        return j * self.block_kv

    @property
    def along_size(self) -> tuple[int, int, int]:
        return 0, self.specs.padded_size, self.specs.size

    @property
    def along_value(self) -> tuple[int, int, int]:
        return 0, self.specs.padded_value, self.specs.value_size

    def query(self, start: Index) -> tile.QueryTile:
        q = self.load(self.refs.query, self.rows_at(start), self.along_size)
        if self.mask.query_lengths is not None:
            q = tile.zero_unusable(q, self.in_use(start))
        guard = None
        if self.refs.guard is not None:
            columns = tile.Guard(*(self.column(x, *self.rows_at(start)) for x in self.refs.guard))
            guard = columns._replace(
                down=columns.down[:, None], rest=columns.rest[:, None], gain=columns.gain[:, None]
            )
        scale = self.refs.scale[0].astype(self.numerics.product)
        query = tile.query_tile(q, scale, guard, self.numerics)
        if self.refs.value_gain is None:
            return query
        return query._replace(value_gain=self.refs.value_gain[div(start, self.block_q)])

    def key(self, j: Index, value_gain: Array | None = None) -> tile.KeyTile:
        k = self.load(self.refs.key, self.keys_at(j), self.along_size)
        v = self.load(self.refs.value, self.keys_at(j), self.along_value)
        if value_gain is not None:
            v = v * value_gain.astype(v.dtype)
        kappa = None
        if self.refs.kappa is not None:
            kappa = self.load(self.refs.kappa, (j, 1, 1), self.along_size)
            kappa = jnp.broadcast_to(kappa, (side(1), self.specs.padded_size))
        scale = None
        if self.refs.key_scale is not None:
            scale = self.column(self.refs.key_scale, *self.keys_at(j))[None]
        return tile.KeyTile(k, v, None, kappa, scale=scale)

    def store(self, ref: Ref, x: Array, *place: tuple[Index, int, int]) -> None:
        """Writes a tile x into ref [L, W], or a column x into ref [L], as far as the array reaches.

        Arguments:
          place: along each axis where it starts, its length, and the array's length.
        """
        inside = jnp.ones(x.shape, bool)
        for axis, (start, _, total) in enumerate(place):
            inside &= start + lax.broadcasted_iota(jnp.int32, x.shape, axis) < total
        view = ref.at[tuple(pl.ds(jnp.int32(start), count) for start, count, _ in place)]
        plgpu.store(view, x, mask=inside)

    def bias(self, start: Index, j: Index) -> Array | None:
        return None if self.refs.bias is None else self._tile_of(self.refs.bias, start, j)

    def _tile_of(self, ref: Ref, start: Index, j: Index) -> Array:
        x = self.load(ref, self.rows_at(start), self.keys_at(j))
        return jnp.broadcast_to(x, (self.block_q, self.block_kv))

    def array(self, start: Index, j: Index, asks: Array | None = None) -> Array | None:
        seen = None
        if self.refs.query_segments is not None:
            q = self.column(self.refs.query_segments, *self.rows_at(start))
            k = self.column(self.refs.key_segments, *self.keys_at(j))
            seen = q[:, None] == k[None, :]
        if self.refs.query_positions is not None:
            q = self.column(self.refs.query_positions, *self.rows_at(start))
            k = self.column(self.refs.key_positions, *self.keys_at(j))
            seen = _both(seen, self.mask.by_position(q[:, None], k[None, :]))
        if self.refs.array is not None:
            array = self._tile_of(self.refs.array, start, j).astype(jnp.int32) != 0
            seen = _both(seen, array)
        mods = self.mask.mods
        if mods is None or (mods.mask_mod is None and mods.block_mod is None):
            return seen
        place, data = self.place(start, j), self.data(start, j)
        shape = (self.block_q, self.block_kv)
        if mods.mask_mod is not None:
            shown = jnp.broadcast_to(mods.shows(mods.mask_mod, place, data), shape)
            seen = _both(seen, shown)
        if mods.block_mod is not None and asks is not None:
            shown = mods.shows(mods.block_mod, place, data)
            seen = _both(seen, jnp.broadcast_to(shown | ~asks, shape))
        return seen

    def visits(self, start: Index) -> Listed | None:
        return self._listed(self.refs.lists, div(start, self.block_q))

    def row_visits(self, j: Index) -> Listed | None:
        return self._listed(self.refs.row_lists, j)

    @staticmethod
    def _listed(lists: Lists | None, i: Index) -> Listed | None:
        if lists is None:
            return None

        def asks(t: Index) -> Array:
            return scalar(lists.asks, i, t) != 0

        return Listed(
            lambda t: scalar(lists.order, i, t),
            scalar(lists.partial, i),
            scalar(lists.count, i),
            None if lists.asks is None else asks,
        )

    def modified(self, start: Index, j: Index) -> tile.Modify | None:
        mods = self.mask.mods
        if mods is None or mods.score_mod is None:
            return None
        place, data = self.place(start, j), self.data(start, j)
        return lambda score: mods.scored(score, place, data)

    def low_rank(self, start: Index, j: Index) -> Array | None:
        if self.refs.factors is None:
            return None
        of = self.factors(start, j)
        return thin_product(of.q, of.k) * of.scale

    def factors(self, start: Index, j: Index) -> Factors:
        """The factors of a tile [R, block_q] and [R, n], and their number."""
        factors = self.refs.factors
        q = self.load(factors.q, self.along_rank, self.rows_at(start))
        k = self.load(factors.k, self.along_rank, self.keys_at(j))
        return Factors(q, k, scalar(factors.scale))

    @property
    def along_rank(self) -> tuple[int, int, int]:
        return 0, self.specs.padded(self.specs.rank, "rank"), self.specs.rank

    def place(self, start: Index, j: Index) -> Place:
        """Where the elements of a tile stand."""
        b, h = (jnp.full((1, 1), scalar(x)) for x in (self.refs.entries, self.refs.heads))
        row = start + lax.broadcasted_iota(jnp.int32, (self.block_q, 1), 0)
        column = self.key_start(j) + lax.broadcasted_iota(jnp.int32, (1, self.block_kv), 1)
        return Place(b, h, row, column)

    def data(self, start: Index, j: Index) -> Data:
        """What the functions are given at a tile."""
        assert self.mask.mods is not None
        query, key, head = self.numbers(start, j)
        data = Data(
            tuple(x[:, None] for x in query),
            tuple(x[None, :] for x in key),
            tuple(jnp.full((1, 1), x) for x in head),
        )
        return as_given(self.mask.mods, data)

    def numbers(self, start: Index, j: Index) -> Data:
        """The data of a tile: [block_q], [n] and []."""
        return Data(
            tuple(self.column(x, *self.rows_at(start)) for x in self.refs.query_data),
            tuple(self.column(x, *self.keys_at(j)) for x in self.refs.key_data),
            tuple(scalar(x) for x in self.refs.head_data),
        )

    def sinks(self) -> Array | None:
        if self.refs.sinks is None:
            return None
        return jnp.full((self.block_q,), self.refs.sinks[...])

    def in_range(self, query: tile.QueryTile, m: Array, l: Array) -> Array:  # noqa: E741
        """[] bool: whether all products stay in float32 and all scores below `LARGEST_SCORE`."""
        fine = jnp.max(jnp.where(l > 0, jnp.abs(m), jnp.zeros_like(m))) < LARGEST_SCORE
        if self.refs.largest_key is None:
            return fine
        largest = jnp.max(jnp.abs(query.q.astype(jnp.float32))) * self.refs.largest_key[...]
        gain = jnp.maximum(jnp.abs(self.refs.scale[0]) * self.numerics.unit, 1)
        return fine & (largest * gain * query.q.shape[1] < _LARGEST_PRODUCT)


def scalar(ref: Ref, *place: Index) -> Array:
    """One number of a ref."""
    if not place and not isinstance(ref, HeadRef):
        return ref[...]
    return plgpu.load(ref.at[tuple(jnp.int32(i) for i in place)])


def thin_product(q: Array, k: Array) -> Array:
    """[block_q, n] of factors [R, block_q] and [R, n]."""
    return dot(q, k, (0, 0), q.dtype)


def _both(a: Array | None, b: Array) -> Array:
    return b if a is None else a & b


def for_triton(plan: Plan) -> Plan:
    """``plan`` with tiles as Triton has them, and the forms that suit Triton alone.

    They are not for XLA, which runs the repair. (Triton does contract, which is harmless below
    `LARGEST_SCORE`; beyond, the result is repaired.) The schedule's blocks were cut to the problem;
    Triton's are powers of two, and masked.
    """
    schedule = plan.schedule
    schedule = replace(schedule, block_q=side(schedule.block_q), block_kv=side(schedule.block_kv))
    dialect = replace(plan.dialect, contracts=False, flat=True)
    if not plan.interpret:
        dialect = replace(dialect, exp2=_exp2, narrow=_narrow, float16_gradients=_TF32_X3)
    return replace(plan, schedule=schedule, dialect=dialect)


def _exp2(x: Array) -> Array:
    """2^x; two at a time where x is float16."""
    if x.dtype != jnp.float16:
        return jnp.exp2(x)
    (powers,) = plgpu.elementwise_inline_asm(
        "ex2.approx.f16x2 $0, $1;",
        args=[x],
        constraints="=r,r",
        pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    return powers


def _narrow(x: Array, dtype: jnp.dtype) -> Array:
    """x rounded to ``dtype``; two at a time from float32 to 16 bits.

    Left to itself Triton rounds one at a time what is also widened again.
    """
    if x.dtype != jnp.float32 or dtype == jnp.float32:
        return x.astype(dtype)
    (narrow,) = plgpu.elementwise_inline_asm(
        f"cvt.rn.{'f16' if dtype == jnp.float16 else 'bf16'}x2.f32 $0, $2, $1;",
        args=[x],
        constraints="=r,r,r",
        pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, dtype)],
    )
    return narrow
