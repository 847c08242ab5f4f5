"""What the two kernels have in common: refusals, inputs, outputs, and the repair of a result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from pasa_jax.core.errors import BackendUnsupported
from pasa_jax.core.heads import heads_at_once, varying
from pasa_jax.core.mask import Mask
from pasa_jax.core.mods import Data, Mods
from pasa_jax.core.operands import Operands, Result, Wanted
from pasa_jax.core.plan import Plan
from pasa_jax.core.prepare import HeadFacts, prepare
from pasa_jax.core.visits import Visits, tile_kinds, tile_sight
from pasa_jax.implementations import lax as _lax

Array = jax.Array
Ref = Any

_REPAIR_ROWS = 128  # of a tile


def refusal(operands: Operands, mask: Mask, plan: Plan, no_float64: str) -> str | None:
    """None, or the reason why neither kernel can run the call.

    Arguments:
      no_float64: the reason for float64.
    """
    if mask.dropout is not None:
        return "it has no dropout"
    if str(operands.query.dtype) == "float64":
        return no_float64
    given = () if mask.mods is None else jax.tree.leaves(mask.mods.data.beside(operands.data))
    for x in given:
        if str(x.dtype) not in ("float32", "int32", "bool"):
            return f"what its functions are given must be float32, int32 or bool, not {x.dtype}"
    if 0 in operands.query.shape or 0 in operands.key.shape or 0 in operands.value.shape:
        return "there is nothing to compute"
    return None


def block_refusal(mask: Mask, block_q: int, block_kv: int) -> str | None:
    """None, or the reason why tiles of this size cannot go through a block mask."""
    if mask.kinds is None:
        return None
    tile, length = (block_q, block_kv), (mask.query_length, mask.key_length)
    for side, whole, size in zip(tile, length, mask.block_size, strict=True):
        if size % side and size < whole:
            return f"a block mask's blocks {mask.block_size} must be multiples of its tiles {tile}"
    return None


class Lists(NamedTuple):
    """`Visits` of every head as a kernel reads them, None where nothing is listed."""

    order: Any = None  # [B|1, heads|1, tiles, tiles of the other side] int32
    partial: Any = None  # [B|1, heads|1, tiles] int32
    count: Any = None  # [B|1, heads|1, tiles] int32
    asks: Any = None  # as order, where a block mask's function is asked


def lists_of(
    mask: Mask,
    block_q: int,
    block_kv: int,
    groups: int,
    *,
    by_key: bool = False,
    backward: bool = False,
) -> Lists:
    """The lists of the tiles that every head visits.

    Arguments:
      groups: query heads that share their tiles.
      by_key: the query tiles of each key tile, not the key tiles of each query tile.
      backward: a tile with rows beyond the last one is masked.
    """
    kinds = mask.kinds

    def of(b: Array, h: Array) -> Lists:
        one = mask.head(b, h, groups)
        sight = tile_sight(one, block_q, block_kv)
        if backward:
            inside = (jnp.arange(len(sight.some)) + 1) * block_q <= one.valid_queries()
            sight = sight._replace(whole=sight.whole & inside[:, None])
        visits, asks = Visits.of(sight.transposed if by_key else sight), None
        if kinds is not None and mask.mods is not None and mask.mods.block_mod is not None:
            tiles = tile_kinds(one, block_q, block_kv)
            asks = visits.asks(tiles.T if by_key else tiles)
        return Lists(*visits, asks)

    return heads_at_once(of, *lists_shape(mask, groups))


def lists_shape(mask: Mask, groups: int) -> tuple[int, int]:
    """(B|1, K|1): of how many batch entries and key heads `lists_of` tells apart."""
    by_entry = (
        mask.query_segments,
        mask.query_positions,
        mask.key_positions,
        mask.query_lengths,
        mask.key_lengths,
        mask.kinds,
    )
    heads = 1 if mask.kinds is None else max(1, mask.kinds.shape[1] // groups)
    return max((len(x) for x in by_entry if x is not None), default=1), heads


def rows_of(o: Operands, mask: Mask, rows: slice) -> tuple[Operands, Mask]:
    """Operands and a mask that hold some of the queries alone; the mask's lengths stay."""

    def cut(x: Array | None, axis: int) -> Array | None:
        if x is None or x.shape[axis] == 1:
            return x
        return x[(slice(None),) * axis + (rows,)]

    def cut_data(data: Data) -> Data:
        return data._replace(query=jax.tree.map(lambda x: cut(x, 2), data.query))

    factors, mods = o.factors, mask.mods
    operands = o._replace(
        query=cut(o.query, 1),
        bias=cut(o.bias, 2),
        factors=None if factors is None else factors._replace(q=cut(factors.q, 3)),
        data=cut_data(o.data),
    )
    return operands, replace(
        mask,
        query_segments=cut(mask.query_segments, 1),
        query_positions=cut(mask.query_positions, 1),
        array=cut(mask.array, 2),
        mods=None if mods is None else replace(mods, data=cut_data(mods.data)),
    )


def given_data(mask: Mask, operands: Operands) -> Data:
    """What the functions of the caller are given, in types that kernels have."""
    if mask.mods is None:
        return Data()
    data = mask.mods.data.beside(operands.data)
    return jax.tree.map(lambda x: x.astype(jnp.int32) if x.dtype == jnp.bool_ else x, data)


def as_given(mods: Mods, data: Data) -> Data:
    """The data of a tile, in the types in which the caller gave them.

    Arguments:
      mods: of `without_arrays`, whose data are these types.
    """

    def cast(x: Array, dtype: Any) -> Array:
        return x != 0 if dtype == jnp.bool_ else x

    return Data(
        *(
            tuple(cast(x, dtype) for x, dtype in zip(part, types, strict=True))
            for part, types in zip(data, mods.data, strict=True)
        )
    )


def floating(data: Data, types: Data) -> Data:
    """The leaves of ``data`` that have a gradient, None for the others.

    Arguments:
      types: those of the mask of `without_arrays`.
    """
    return Data(
        *(
            tuple(leaf if dtype is None else None for leaf, dtype in zip(*pair, strict=True))
            for pair in zip(data, types, strict=True)
        )
    )


def known(x: Array) -> Array:
    """x, zeros where it is not finite: there it is hidden, or has made the gradients NaN."""
    return jnp.where(x * 0 == 0, x, jnp.zeros_like(x))


def narrowed(x: Array | None) -> Array | None:
    """x with float64 as float32, the widest type that kernels have."""
    return x.astype(jnp.float32) if x is not None and x.dtype == jnp.float64 else x


def of_heads(
    o: Operands,
    mask: Mask,
    plan: Plan,
    block_q: int,
    look: Callable[[Operands, HeadFacts], Any],
) -> Any:
    """``look(operands, facts)`` of every key head, stacked [B, K, …]; `prepare` finds the facts."""
    heads = o.key.shape[2]
    groups = o.query.shape[2] // heads

    def of(b: Array, h: Array) -> Any:
        one = o.head(b, h)
        of_head = mask.head(b, h, groups)
        arrays = (one.query, one.key, one.value, one.scale)
        return look(one, prepare(*arrays, of_head, plan, block_q))

    return heads_at_once(of, len(o.key), heads)


def without_arrays(mask: Mask) -> Mask:
    """The mask that a kernel is traced with.

    Its walk asks the mask only whether there are segments and an array, and reads them from the
    refs. `bound` adds the lengths.
    """

    def present(x: Array | None) -> Any:
        return None if x is None else ()

    return replace(
        mask,
        query_lengths=None,
        key_lengths=None,
        query_segments=present(mask.query_segments),
        key_segments=present(mask.key_segments),
        query_positions=present(mask.query_positions),
        key_positions=present(mask.key_positions),
        array=present(mask.array),
        kinds=present(mask.kinds),
        mods=None if mask.mods is None else _with_types(mask.mods),
    )


def _with_types(mods: Mods) -> Mods:
    """``mods`` with the types of its data in their place; None: float32."""
    types = Data(*(tuple(None if x is None else x.dtype for x in part) for part in mods.data))
    return replace(mods, data=types, entries=None, heads=None)


def bound(mask: Mask, query_length: Ref | None, key_length: Ref | None, *at: Array) -> Mask:
    """``mask`` with the lengths of a program's batch entry, read from the refs."""
    place = at or ...

    def read(ref: Ref | None) -> Array | None:
        return None if ref is None else ref[place]

    return replace(mask, query_lengths=read(query_length), key_lengths=read(key_length))


class Outputs(NamedTuple):
    """A kernel's outputs, as far as they are wanted, in axes as the kernel lays them out.

    TPU: [B, K, G, T, E], columns [B, K, G, 1, T], the flag [B, K, query tiles, 1, 128].
    GPU: [B, T, N, E], columns [B, T, N], the flag [B, N, query tiles].
    """

    out: Any  # on a TPU float32 for float16
    flag: Any  # 0 where all is right; on a TPU else NaN
    lse: Any = None
    m: Any = None
    l: Any = None  # noqa: E741
    remainder: Any = None  # as out; on a TPU None for float16

    @staticmethod
    def of(wanted: Wanted, out: Any, flag: Any, column: Any, remainder: Any) -> Outputs:
        """The outputs that are ``wanted``, each made like one of these.

        Arguments:
          out, flag, remainder: for the outputs of that name.
          column: for lse, m and l.
        """
        if wanted == "residuals":
            return Outputs(out, flag, column, column, column, remainder)
        return Outputs(out, flag, column if wanted == "lse" else None)


def shape_maker(*inputs: Any) -> Callable[..., jax.ShapeDtypeStruct]:
    """Makes shapes of outputs that vary over the mesh axes over which the inputs vary."""
    varies = jax.typeof(varying(jnp.zeros(()), inputs)).manual_axis_type
    return partial(jax.ShapeDtypeStruct, manual_axis_type=varies)


@cache
def _only_on(platform: str) -> Primitive:
    """The identity where a program is lowered for ``platform``; elsewhere an error.

    The error says what Pallas' own compiler does not: what is wrong, and the way out.
    """
    primitive = Primitive(f"only_on_{platform}")
    primitive.def_abstract_eval(lambda x: x)
    batching.primitive_batchers[primitive] = lambda args, axes: (primitive.bind(*args), axes[0])

    def refuse(*_: Any) -> Any:
        raise BackendUnsupported(
            f"`implementation`: this Pallas kernel must be compiled for {platform}, and the "
            "program is lowered for another platform. Name 'lax', leave the name out (then 'lax' "
            "takes over elsewhere), or pass interpret=True to run the kernel step by step."
        )

    mlir.register_lowering(primitive, refuse)
    mlir.register_lowering(primitive, lambda _, x: [x], platform=platform)
    return primitive


def only_on(platform: str, x: Array) -> Array:
    """x, in a program that must be compiled for ``platform``."""
    return _only_on(platform).bind(x)


def repaired(
    kernel: Callable[..., tuple[Result, Array]],
    operands: Operands,
    mask: Mask,
    plan: Plan,
    wanted: Wanted,
    platform: str,
) -> Result:
    """The result of ``kernel``; where that says something is wrong, the result of the lax walk.

    Arguments:
      platform: what JAX calls the kernel's machines.
      kernel: returns a result, and [] bool, whether something in it is not finite or not certain.
    """
    if not plan.interpret:
        operands = operands._replace(query=only_on(platform, operands.query))
    result, bad = kernel(operands, mask, plan, wanted=wanted)
    residuals = wanted == "residuals"
    if residuals:
        result = result._replace(by_lax=bad)

    def again(carry: tuple[Array, Result]) -> tuple[Array, Result]:
        del carry
        guarded = _lax.forward(operands, mask, repairing(plan), wanted=wanted)
        if residuals:
            guarded = guarded._replace(by_lax=jnp.ones_like(bad))
        return varying((jnp.zeros_like(bad), guarded), (operands, mask))

    # A loop, not a cond: under vmap a cond would always compute both sides.
    return lax.while_loop(lambda carry: carry[0], again, (bad, result))[1]


def repaired_backward(
    kernel: Callable[..., Operands],
    operands: Operands,
    mask: Mask,
    plan: Plan,
    result: Result,
    d_out: Array,
    d_lse: Array | None,
    platform: str,
) -> Operands:
    """The cotangents of ``kernel``, or those of the lax walk.

    The lax walk has the last word where it computed ``result``, whose statistics are then in units
    of the guard, and where a cotangent of ``kernel`` is not finite.

    Arguments:
      kernel, platform: the kernel's backward pass, and what JAX calls its machines.
    """
    if not plan.interpret:
        operands = operands._replace(query=only_on(platform, operands.query))
    found = kernel(operands, mask, plan, result, d_out, d_lse)
    finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(found)]
    bad = result.by_lax | ~jnp.all(jnp.stack(finite))

    def again(carry: tuple[Array, Operands]) -> tuple[Array, Operands]:
        del carry
        guarded = _lax.backward(operands, mask, repairing(plan), result, d_out, d_lse)
        return varying((jnp.zeros_like(bad), guarded), (operands, mask, d_out))

    start = varying((bad, found), (operands, mask, d_out))
    return lax.while_loop(lambda carry: carry[0], again, start)[1]


def repairing(plan: Plan) -> Plan:
    """The plan of the lax walk that repairs: forward and backward, since guards depend on it.

    It is seldom run: it should compile fast and need little memory.
    """
    schedule = replace(plan.schedule, block_q=_REPAIR_ROWS, unroll=1, batch_heads=False)
    return replace(plan.unproved, schedule=schedule)
