"""Attention as Pallas kernels for NVIDIA GPUs, through Triton; `_gpu_backward` is the gradient.

Only this module and the `_gpu_` modules use Triton: JAX has deprecated it since 0.11 in favour of
Mosaic GPU. A program of the grid (query tile, head, batch) reads its tiles out of the arrays as
the user laid them out, [B, L, N, D], and folds them with the tile functions and the walk of
`pasa_jax`.

What a kernel would repeat for every query tile is done once before it: `mean` is taken off the
keys, and with float16 products the guard's powers of two are computed. With float32 products the
kernel has no guard. Where a result is not finite, or scores are so large that rounding could have
spoilt them, the lax walk computes the whole call again.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels._common import (
    Outputs,
    block_refusal,
    lists_of,
    refusal,
    repaired,
    repaired_backward,
    shape_maker,
    without_arrays,
)
from pallas_kernels._gpu_backward import gradients as backward_kernel
from pallas_kernels._gpu_inputs import Inputs, Specs, block_specs, inputs_of, side
from pallas_kernels._gpu_walk import PointerWalk, for_triton
from pasa_jax.core import tile
from pasa_jax.core.mask import Mask
from pasa_jax.core.operands import Operands, Result, Wanted
from pasa_jax.core.plan import Plan

Array = jax.Array
Ref = Any


_DIALECT = tile.Dialect(base_two=True, running_maximum=True, whole_maximum=True)


def adapt(plan: Plan) -> Plan:
    """``plan`` adapted to a GPU.

    Scores never leave the registers, so unless the caller names a precision they stay in float32;
    only the probabilities are rounded, for the product.
    """
    if not plan.explicit_precision and plan.precision.scores in ("float16", "bfloat16"):
        plan = replace(plan, precision=replace(plan.precision, scores="float32"))
    return replace(plan, dialect=_DIALECT)


def supports(operands: Operands, mask: Mask, plan: Plan) -> str | None:
    """None, or the reason why the kernel cannot run the call."""
    schedule, precision = plan.schedule, plan.precision
    reason = refusal(
        operands, mask, plan, "it has no float64: the matrix units of most GPUs do not"
    )
    if reason is not None:
        return reason
    if plan.shift == "bound":
        return "the shift 'bound' is on 'lax' and 'pallas_tpu' alone"
    if plan.shift == "paper" or "float16" in (precision.statistics, precision.accumulator):
        return "it keeps float32 statistics, and does not mix keys by the matrix of 'paper'"
    if plan.storage is tile.Storage.LAGGING:
        return "'reference' needs a float32 product: use the shift 'mean', or products='float32'"
    for name, length in (("block_q", mask.query_length), ("block_kv", mask.key_length)):
        block = getattr(schedule, name)
        if block < length and block != side(block):
            return f"schedule.{name} must be a power of two of at least 16, and is {block}"
    return block_refusal(mask, side(schedule.block_q), side(schedule.block_kv))


def forward(operands: Operands, mask: Mask, plan: Plan, *, wanted: Wanted) -> Result:
    """Attention of all heads; `repaired` says when the lax walk computes it again."""
    return repaired(kernel, operands, mask, plan, wanted, "cuda")


def no_backward(operands: Operands, mask: Mask, plan: Plan) -> str | None:
    """None, or the reason why the backward pass is left to the lax walk."""
    if operands.bias is not None:
        return "it has no gradient of a bias"
    if operands.factors is not None:  # the kernels have it
        return "the gradients of factors take the compiler minutes"
    plan = for_triton(plan)
    schedule = plan.schedule.backward(operands.query.dtype, same_blocks=plan.storage.uses_kappa)
    return block_refusal(mask, schedule.block_q, schedule.block_kv)


def backward(
    operands: Operands,
    mask: Mask,
    plan: Plan,
    result: Result,
    d_out: Array,
    d_lse: Array | None,
) -> Operands:
    """Cotangents of the operands; `repaired_backward` says when the lax walk computes them."""
    return repaired_backward(backward_kernel, operands, mask, plan, result, d_out, d_lse, "cuda")


def kernel(operands: Operands, mask: Mask, plan: Plan, *, wanted: Wanted) -> tuple[Result, Array]:
    """The kernel's own result, and [] bool: whether something in it may not be right."""
    plan = for_triton(plan)
    specs = Specs.of(operands, plan)
    inputs = inputs_of(operands, mask, plan, specs)
    if mask.listed:
        inputs = inputs._replace(lists=lists_of(mask, specs.block_q, specs.block_kv, 1))
    (b, t, n, _), e = operands.query.shape, operands.value.shape[-1]
    out_type = plan.output(operands.query.dtype)
    shape = shape_maker(operands, mask)
    rows = specs.padded(t, "rows")
    out, column = shape((b, t, n, e), out_type), shape((b, t, n), jnp.float32)
    flag = shape((b, n, specs.query_tiles), jnp.float32)
    out_block = pl.BlockSpec((None, rows, None, specs.padded_value), lambda i, n, b: (b, 0, n, 0))
    flag_block = pl.BlockSpec((None, None, specs.query_tiles), lambda i, n, b: (b, n, 0))
    column_block = pl.BlockSpec((None, rows, None), lambda i, n, b: (b, 0, n))
    call = pl.pallas_call(
        partial(_kernel, mask=without_arrays(mask), plan=plan, specs=specs, out_type=out_type),
        grid=(specs.query_tiles, n, b),
        in_specs=(block_specs(inputs, specs),),
        out_specs=Outputs.of(wanted, out_block, flag_block, column_block, out_block),
        out_shape=Outputs.of(wanted, out, flag, column, out),
        compiler_params=plgpu.CompilerParams(
            num_warps=plan.schedule.warps, num_stages=plan.schedule.stages
        ),
        interpret=plan.interpret,
        name="pasa_gpu",
    )
    with jax.enable_x64(False):  # Pallas' compilers have no 64-bit loop counters
        outs = call(inputs)
    result = Result(outs.out, outs.lse, outs.m, outs.l, outs.remainder)
    return result.only(wanted), jnp.any(outs.flag != 0)


def _kernel(
    refs: Inputs, *rest: Ref, mask: Mask, plan: Plan, specs: Specs, out_type: jnp.dtype
) -> None:
    i = pl.program_id(0)
    outs = Outputs(*rest)

    walk = PointerWalk.of(refs, mask, plan, specs)
    start = i * specs.block_q
    query = walk.query(start)
    state, _ = walk.absorb(start, query, walk.begin())
    done = walk.close(start, query, state)
    fine = walk.in_range(query, done.m, done.l)
    # 0 where all is right; NaN where something is not finite (a sum passes NaN on); else 1.
    outs.flag[i] = jnp.sum(done.out * 0) + (~fine).astype(jnp.float32)

    rounded, remainder = walk.rounded(done.out, out_type)
    for ref, x in ((outs.out, rounded), (outs.remainder, remainder)):
        if ref is not None:
            walk.store(ref, x, walk.rows_at(start), walk.along_value)
    for ref, x in ((outs.lse, done.lse), (outs.m, done.m), (outs.l, done.l)):
        if ref is not None:
            walk.store(ref, x, walk.rows_at(start))
