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
from pasa_jax.core.operands import Operands, Result, Wanted
from pasa_jax.core.plan import Plan
from pasa_jax.core.prepare import HeadFacts, prepare
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
    if mask.query_positions is not None or mask.kinds is not None or mask.mods is not None:
        return "it has no positions, block masks and functions"
    if operands.factors is not None:
        return "it has no bias of low rank"
    if str(operands.query.dtype) == "float64":
        return no_float64
    if 0 in operands.query.shape or 0 in operands.key.shape or 0 in operands.value.shape:
        return "there is nothing to compute"
    return None


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
        array=present(mask.array),
    )


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


def shape_maker(operands: Operands, mask: Mask) -> Callable[..., jax.ShapeDtypeStruct]:
    """Makes shapes of outputs that vary over the mesh axes over which the inputs vary."""
    varies = jax.typeof(varying(jnp.zeros(()), (operands, mask))).manual_axis_type
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
        operands = operands._replace(query=_only_on(platform).bind(operands.query))
    result, bad = kernel(operands, mask, plan, wanted=wanted)
    residuals = wanted == "residuals"
    if residuals:
        result = result._replace(by_lax=bad)

    def again(carry: tuple[Array, Result]) -> tuple[Array, Result]:
        del carry
        guarded = _lax.forward(operands, mask, _repairing(plan), wanted=wanted)
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
        operands = operands._replace(query=_only_on(platform).bind(operands.query))
    found = kernel(operands, mask, plan, result, d_out, d_lse)
    finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(found)]
    bad = result.by_lax | ~jnp.all(jnp.stack(finite))

    def again(carry: tuple[Array, Operands]) -> tuple[Array, Operands]:
        del carry
        guarded = _lax.backward(operands, mask, _repairing(plan), result, d_out, d_lse)
        return varying((jnp.zeros_like(bad), guarded), (operands, mask, d_out))

    start = varying((bad, found), (operands, mask, d_out))
    return lax.while_loop(lambda carry: carry[0], again, start)[1]


def _repairing(plan: Plan) -> Plan:
    """The plan of the lax walk that repairs: forward and backward, since guards depend on it.

    It is seldom run: it should compile fast and need little memory.
    """
    schedule = replace(plan.schedule, block_q=_REPAIR_ROWS, unroll=1, batch_heads=False)
    return replace(plan.unproved, schedule=schedule)
