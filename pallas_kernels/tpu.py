"""The forward pass as a Pallas kernel for TPUs (Mosaic).

A program of the grid (batch, key head, query tile) folds the key tiles of its head, all of which
lie in VMEM, with the tile functions and the walk of `pasa_jax`. The kernel has no guard against
overflow and does not look for keys that are not finite. Where a result is not finite, or the size
of queries and keys says that a product may have left float32, the lax walk computes the whole call
again. In ordinary data the only cost is to find the largest key.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import _tpu_backward
from pallas_kernels._common import (
    Outputs,
    bound,
    narrowed,
    of_heads,
    refusal,
    repaired,
    repaired_backward,
    shape_maker,
    without_arrays,
)
from pallas_kernels._float16 import to_bits
from pallas_kernels._tpu_walk import LANES, Inputs, RefWalk, Specs, block_specs
from pasa_jax.core import tile
from pasa_jax.core.mask import Index, Mask
from pasa_jax.core.operands import Operands, Result, Wanted
from pasa_jax.core.plan import Plan
from pasa_jax.core.target import MIB, find_target

Array = jax.Array
Ref = Any


# The share of VMEM that a program may use. XLA has arrays of its own in the rest. The compiler is
# given no more than the call needs, and some for registers that do not fit.
_VMEM_SHARE = 0.75


def adapt(plan: Plan) -> Plan:
    """``plan`` adapted to a TPU.

    Mosaic has no float16, and chips before v6e do not compute in bfloat16: unless the caller named
    a precision, scores are then stored in float32. (A named one is never changed; `supports`
    refuses it.)
    """
    target = find_target(plan.schedule.target)
    precision = plan.precision
    if not plan.explicit_precision and precision.scores not in target.vector_types:
        probabilities = "float32" if precision.scores == "float16" else precision.probabilities
        plan = replace(
            plan, precision=replace(precision, scores="float32", probabilities=probabilities)
        )
    narrow = plan.precision.scores == "bfloat16" and "bfloat16" in target.vector_types
    dialect = tile.Dialect(
        base_two=True,
        exponential="bfloat16" if narrow else None,
        running_maximum=True,
        matrix_columns=target.matrix_columns if plan.precision.probabilities == "bfloat16" else 0,
    )
    return replace(plan, dialect=dialect)


def supports(operands: Operands, mask: Mask, plan: Plan) -> str | None:
    """None, or the reason why the kernel cannot run the call."""
    precision = plan.precision
    stored = (precision.scores, precision.probabilities)
    reason = refusal(operands, mask, plan, "TPUs have no float64")
    if reason is not None:
        return reason
    if "float16" in (*stored, precision.statistics, precision.accumulator):
        return "Mosaic has no float16: store scores in bfloat16 or float32"
    if plan.shift == "paper":
        return "the shift 'paper' multiplies float16 matrices, which Mosaic refuses"
    specs = Specs.of(operands, mask, plan)
    tiled = (mask.array, mask.query_segments, operands.bias)
    if specs.key_tiles > 1 and specs.block_kv % LANES and any(x is not None for x in tiled):
        return f"block_kv must be a multiple of {LANES} beside a bias, an array or segments"
    limit = _vmem(plan)
    if specs.bytes > limit:
        return f"a head's keys and values and a tile want {specs.bytes} bytes of VMEM's {limit}"
    return None


def _vmem(plan: Plan) -> int:
    """Bytes of VMEM that a program may use."""
    return int(find_target(plan.schedule.target).memories["VMEM"] * _VMEM_SHARE)


def forward(operands: Operands, mask: Mask, plan: Plan, *, wanted: Wanted) -> Result:
    """Attention of all heads; `repaired` says when the lax walk computes it again."""
    return repaired(kernel, operands, mask, plan, wanted, "tpu")


def no_backward(operands: Operands, mask: Mask, plan: Plan) -> str | None:
    """None, or the reason why the backward pass is left to the lax walk."""
    return _tpu_backward.refusal(operands, mask, plan, _vmem(plan))


def backward(
    operands: Operands,
    mask: Mask,
    plan: Plan,
    result: Result,
    d_out: Array,
    d_lse: Array | None,
) -> Operands:
    """Cotangents of the operands, as `repaired_backward` says."""
    return repaired_backward(backward_kernel, operands, mask, plan, result, d_out, d_lse, "tpu")


def backward_kernel(
    operands: Operands,
    mask: Mask,
    plan: Plan,
    result: Result,
    d_out: Array,
    d_lse: Array | None,
) -> Operands:
    """The kernel's own cotangents."""
    return _tpu_backward.gradients(operands, mask, plan, result, d_out, d_lse, _vmem(plan))


def kernel(operands: Operands, mask: Mask, plan: Plan, *, wanted: Wanted) -> tuple[Result, Array]:
    """The kernel's own result, and [] bool: whether something in it is not finite."""
    specs = Specs.of(operands, mask, plan)
    inputs = _inputs(operands, mask, plan, specs)
    # Mosaic never contracts. XLA, which runs the repair and the gradient, may.
    kernel_plan = replace(plan, dialect=replace(plan.dialect, contracts=False))
    out_type = operands.query.dtype
    half = out_type == jnp.float16
    kernel_type = jnp.dtype(jnp.float32) if half else out_type
    (b, t), e = operands.query.shape[:2], operands.value.shape[-1]
    heads = (b, specs.heads, specs.groups)
    shape = shape_maker(operands, mask)
    out = shape((*heads, t, e), kernel_type)
    column = shape((*heads, 1, t), jnp.float32)
    flag = shape((b, specs.heads, specs.query_tiles, 1, LANES), jnp.float32)
    out_block = pl.BlockSpec(
        (1, 1, specs.groups, specs.block_q, e), lambda b, h, i: (b, h, 0, i, 0)
    )
    column_block = pl.BlockSpec(
        (1, 1, specs.groups, 1, specs.block_q), lambda b, h, i: (b, h, 0, 0, i)
    )
    flag_block = pl.BlockSpec((1, 1, 1, 1, LANES), lambda b, h, i: (b, h, i, 0, 0))

    call = pl.pallas_call(
        partial(
            _kernel, mask=without_arrays(mask), plan=kernel_plan, specs=specs, out_type=out_type
        ),
        grid=(b, specs.heads, specs.query_tiles),
        in_specs=(block_specs(inputs, specs),),
        out_specs=Outputs.of(
            wanted, out_block, flag_block, column_block, None if half else out_block
        ),
        out_shape=Outputs.of(wanted, out, flag, column, None if half else out),
        scratch_shapes=[pltpu.VMEM((1, operands.key.shape[-1]), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel"),
            vmem_limit_bytes=min(_vmem(plan), specs.bytes + specs.bytes // 4 + 8 * MIB),
        ),
        interpret=pltpu.InterpretParams() if plan.interpret else False,
        name="pasa_tpu",
    )
    with jax.enable_x64(False):  # Pallas' compilers have no 64-bit loop counters
        outs = call(inputs)

    def rows(x: Array | None) -> Any:  # [B, K, G, T, E] -> [B, T, N, E]
        return None if x is None else jnp.swapaxes(x.reshape(b, -1, *x.shape[3:]), 1, 2)

    def statistics(x: Array | None) -> Array | None:  # [B, K, G, 1, T] -> [B, T, N]
        return None if x is None else jnp.swapaxes(x.reshape(b, -1, t), 1, 2)

    out, remainder = rows(outs.out), rows(outs.remainder)
    if half:
        out, remainder = tile.rounded(out, out_type, clip=plan.promises_finite)
    result = Result(out, statistics(outs.lse), statistics(outs.m), statistics(outs.l), remainder)
    return result.only(wanted), jnp.any(jnp.isnan(outs.flag))


def _kernel(
    refs: Inputs, *rest: Ref, mask: Mask, plan: Plan, specs: Specs, out_type: jnp.dtype
) -> None:
    b, h, i = (pl.program_id(axis) for axis in range(3))
    *out_refs, largest_key = rest
    outs = Outputs(*out_refs)

    mask = bound(mask, refs.query_lengths, refs.key_lengths, b)
    walk = RefWalk(
        mask=mask,
        plan=plan,
        numerics=plan.numerics(mask.key_length),
        groups=specs.groups,
        block_q=specs.block_q,
        value_size=refs.value.shape[-1],
        refs=refs,
        head=h,
        largest_key=largest_key,
    )
    starts = walk.static_starts(specs.query_tiles)
    if starts is None:
        _query_tile(walk, i * specs.block_q, outs, out_type)
    for c, start in enumerate(starts or ()):
        pl.when(i == c)(partial(_query_tile, walk, start, outs, out_type))


def _query_tile(walk: RefWalk, start: Index, outs: Outputs, out_type: jnp.dtype) -> None:
    walk.largest_key[...] = jnp.zeros_like(walk.largest_key)
    query = walk.query(start)
    state, _ = walk.absorb(start, query, walk.begin())
    done = walk.close(start, query, state)
    # 0, or NaN where something in the tile is not finite or a product may have left float32. (A sum
    # passes NaN on; a maximum need not.)
    zero = jnp.sum(jnp.sum(done.out * 0, axis=0, keepdims=True), axis=1, keepdims=True)
    zero = zero + jnp.where(walk.in_range(query), 0.0, jnp.nan)
    outs.flag[0, 0, 0] = jnp.broadcast_to(zero, (1, LANES))

    out, remainder = done.out, done.out
    if out_type != jnp.float16:  # float16 is rounded outside of the kernel
        out, remainder = walk.rounded(out, out_type)
    for ref, x in ((outs.out, out), (outs.remainder, remainder)):
        if ref is not None:
            ref[0, 0] = x.reshape(walk.groups, walk.block_q, -1)
    for ref, x in ((outs.lse, done.lse), (outs.m, done.m), (outs.l, done.l)):
        if ref is not None:
            ref[0, 0] = x.reshape(walk.groups, 1, walk.block_q)


def _grouped(x: Array, heads: int) -> Array:
    """[B, T, N, D] -> [B, K, G, T, D]."""
    x = jnp.swapaxes(x, 1, 2)
    return x.reshape(x.shape[0], heads, -1, *x.shape[2:])


def _inputs(o: Operands, mask: Mask, plan: Plan, specs: Specs) -> Inputs:
    def per_head(x: Array | None) -> Array | None:
        if x is None:
            return None
        split = (1, 1) if x.shape[1] == 1 else (specs.heads, specs.groups)
        return x.reshape(x.shape[0], *split, *x.shape[2:])

    return Inputs(
        query=to_bits(_grouped(o.query, specs.heads)),
        key=to_bits(jnp.swapaxes(o.key, 1, 2)),
        value=to_bits(jnp.swapaxes(o.value, 1, 2)),
        scale=o.scale.astype(jnp.float32).reshape(1),
        kappa=_kappa(o, mask, plan, specs) if plan.storage.uses_kappa else None,
        bias=per_head(narrowed(o.bias)),
        sinks=narrowed(o.sinks),
        array=per_head(None if mask.array is None else mask.array.astype(jnp.int8)),
        query_segments=None if mask.query_segments is None else mask.query_segments[..., None],
        key_segments=None if mask.key_segments is None else mask.key_segments[:, None],
        query_lengths=mask.query_lengths,
        key_lengths=mask.key_lengths,
    )


def _kappa(o: Operands, mask: Mask, plan: Plan, specs: Specs) -> Array:
    """[B, K, tiles, 16, D] κ of every key tile, in as many equal rows as a matrix unit needs."""
    kappa = of_heads(o, mask, plan, specs.block_q, lambda _, facts: facts.kappa)
    return to_bits(jnp.repeat(kappa[:, :, :, None], 16, axis=3))
