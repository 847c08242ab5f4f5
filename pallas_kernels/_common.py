"""What both kernels need around them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from pasa_jax.core.errors import BackendUnsupported
from pasa_jax.core.heads import varying
from pasa_jax.core.mask import Mask
from pasa_jax.core.operands import Operands, Result, Wanted
from pasa_jax.core.plan import Plan
from pasa_jax.implementations import lax as _lax

Array = jax.Array
Ref = Any

_ROWS = 128


def narrowed(x: Array | None) -> Array | None:
    """float64 as float32, the widest type that kernels have; scores have no more either."""
    return x.astype(jnp.float32) if x is not None and x.dtype == jnp.float64 else x


def without_arrays(mask: Mask) -> Mask:
    """The mask that a kernel is traced with: a walk asks it only whether segments and array are
    there, and reads them from the refs; `bound` gives it its lengths.
    """

    def there(x: Array | None) -> Any:
        return None if x is None else ()

    return replace(
        mask,
        query_lengths=None,
        key_lengths=None,
        query_segments=there(mask.query_segments),
        key_segments=there(mask.key_segments),
        array=there(mask.array),
    )


def bound(mask: Mask, query_length: Ref | None, key_length: Ref | None, *at: Array) -> Mask:
    """``mask`` with the lengths of a program's batch entry, in SMEM or behind a pointer."""
    place = at or ...

    def read(ref: Ref | None) -> Array | None:
        return None if ref is None else ref[place]

    return replace(mask, query_lengths=read(query_length), key_lengths=read(key_length))


@cache
def _only_on(platform: str) -> Primitive:
    """x as it is, where a program is lowered for ``platform``; elsewhere the error that Pallas'
    compiler would not put into words.
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


_flags: list[Array] | None = None


@contextlib.contextmanager
def without_repair() -> Iterator[list[Array]]:
    """While a call is traced: nothing is repaired, and what would have asked for it is listed."""
    global _flags
    _flags = []
    try:
        yield _flags
    finally:
        _flags = None


def repaired(
    kernel: Callable[..., tuple[Result, Array]],
    operands: Operands,
    mask: Mask,
    plan: Plan,
    wanted: Wanted,
    platform: str,
) -> Result:
    """What ``kernel`` gives, or where it says that something is wrong, what the lax walk gives,
    which has the guard.

    Arguments:
      platform: what JAX calls the kernel's machines.
      kernel: gives a result and [] bool, whether something in it is not finite or not certain.
    """
    if not plan.interpret:
        operands = operands._replace(query=_only_on(platform).bind(operands.query))
    found, bad = kernel(operands, mask, plan, wanted=wanted)
    if _flags is not None:
        _flags.append(bad)
        return found
    # Seldom run: small to compile and in memory matter more than fast.
    schedule = replace(plan.schedule, block_q=_ROWS, unroll=1, batch_heads=False)

    def again(carry: tuple[Array, Result]) -> tuple[Array, Result]:
        del carry
        careful = _lax.forward(operands, mask, replace(plan, schedule=schedule), wanted=wanted)
        return varying((jnp.zeros_like(bad), careful), (operands, mask))

    # A loop, not a cond: under vmap a cond would always compute both sides.
    return lax.while_loop(lambda carry: carry[0], again, (bad, found))[1]
