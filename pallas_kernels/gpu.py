"""The forward pass as a Pallas kernel for NVIDIA GPUs, through Triton.

Only this module and `_gpu_walk` use Triton: JAX has deprecated it since 0.11 in favour of Mosaic
GPU. A program of the grid (query tile, head, batch) reads its tiles out of the arrays as the user
laid them out, [B, L, N, D], and folds them with the tile functions and the walk of `pasa_jax`.

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
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels._common import (
    Outputs,
    bound,
    narrowed,
    of_heads,
    refusal,
    repaired,
    shape_maker,
    without_arrays,
)
from pallas_kernels._gpu_walk import Inputs, PointerWalk, Specs, block_specs, side
from pasa_jax.core import tile
from pasa_jax.core.mask import Mask
from pasa_jax.core.operands import Operands, Result, Wanted
from pasa_jax.core.plan import Plan
from pasa_jax.core.prepare import HeadFacts
from pasa_jax.implementations import lax as _lax

Array = jax.Array
Ref = Any


_DIALECT = tile.Dialect(base_two=True, running_maximum=True, sums_unrounded=True)


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
    if plan.shift == "paper" or "float16" in (precision.statistics, precision.accumulator):
        return "it keeps float32 statistics, and does not mix keys by the matrix of 'paper'"
    if plan.storage is tile.Storage.LAGGING:
        return "'reference' needs a float32 product: use the shift 'mean', or products='float32'"
    for name, length in (("block_q", mask.query_length), ("block_kv", mask.key_length)):
        block = getattr(schedule, name)
        if block < length and block != side(block):
            return f"schedule.{name} must be a power of two of at least 16, and is {block}"
    return None


def forward(operands: Operands, mask: Mask, plan: Plan, *, wanted: Wanted) -> Result:
    """Attention of all heads; `repaired` says when the lax walk computes it again."""
    return repaired(kernel, operands, mask, plan, wanted, "cuda")


def no_backward(operands: Operands, mask: Mask, plan: Plan) -> str | None:
    """None, or the reason why the backward pass is left to the lax walk."""
    return "it has none"


backward = _lax.backward


def kernel(operands: Operands, mask: Mask, plan: Plan, *, wanted: Wanted) -> tuple[Result, Array]:
    """The kernel's own result, and [] bool: whether something in it may not be right."""
    schedule = plan.schedule
    # The schedule's blocks were cut to the problem; Triton's are powers of two, and masked.
    schedule = replace(schedule, block_q=side(schedule.block_q), block_kv=side(schedule.block_kv))
    plan = replace(plan, schedule=schedule)
    specs = Specs.of(operands, plan)
    inputs = _inputs(operands, mask, plan, specs)
    # These hold for Triton alone, not for XLA, which runs the repair and the gradient. (Triton does
    # contract, which is harmless below `LARGEST_SCORE`; beyond, the result is repaired.)
    exp2 = jnp.exp2 if plan.interpret else _exp2
    dialect = replace(plan.dialect, contracts=False, flat=True, exp2=exp2)
    kernel_plan = replace(plan, dialect=dialect)
    (b, t, n, _), e = operands.query.shape, operands.value.shape[-1]
    out_type = operands.query.dtype
    shape = shape_maker(operands, mask)
    rows = specs.padded(t, "rows")
    out, column = shape((b, t, n, e), out_type), shape((b, t, n), jnp.float32)
    flag = shape((b, n, specs.query_tiles), jnp.float32)
    out_block = pl.BlockSpec((None, rows, None, specs.padded_value), lambda i, n, b: (b, 0, n, 0))
    flag_block = pl.BlockSpec((None, None, specs.query_tiles), lambda i, n, b: (b, n, 0))
    column_block = pl.BlockSpec((None, rows, None), lambda i, n, b: (b, 0, n))
    call = pl.pallas_call(
        partial(
            _kernel, mask=without_arrays(mask), plan=kernel_plan, specs=specs, out_type=out_type
        ),
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

    mask = bound(mask, refs.query_lengths, refs.key_lengths)
    walk = PointerWalk(
        mask=mask,
        plan=plan,
        numerics=plan.numerics(mask.key_length),
        groups=1,
        block_q=specs.block_q,
        value_size=specs.padded_value,
        refs=refs,
        specs=specs,
    )
    start = i * specs.block_q
    query = walk.query(start)
    state, _ = walk.absorb(start, query, walk.begin())
    done = walk.close(start, query, state)
    fine = walk.in_range(query, done.m, done.l)
    # 0 where all is right; NaN where something is not finite (a sum passes NaN on); else 1.
    outs.flag[i] = jnp.sum(done.out * 0) + (~fine).astype(jnp.float32)

    rounded, remainder = walk.rounded(done.out, out_type)
    t, e = mask.query_length, specs.value_size
    columns = lax.broadcasted_iota(jnp.int32, (1, specs.padded_value), 1)
    inside = jnp.broadcast_to((walk.positions(start) < t) & (columns < e), rounded.shape)
    for ref, x in ((outs.out, rounded), (outs.remainder, remainder)):
        if ref is not None:
            view = ref.at[pl.ds(start, specs.block_q), pl.ds(jnp.int32(0), specs.padded_value)]
            plgpu.store(view, x, mask=inside)
    in_rows = lax.broadcasted_iota(jnp.int32, (specs.block_q,), 0) < t - start
    for ref, x in ((outs.lse, done.lse), (outs.m, done.m), (outs.l, done.l)):
        if ref is not None:
            view = ref.at[pl.ds(start, specs.block_q)]
            plgpu.store(view, x, mask=in_rows)


def _inputs(o: Operands, mask: Mask, plan: Plan, specs: Specs) -> Inputs:
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
        query_lengths=mask.query_lengths,
        key_lengths=mask.key_lengths,
    )
    if o.key.dtype != jnp.float16:  # whose products cannot leave float32
        largest = jnp.max(jnp.abs(o.key.astype(jnp.float32)), axis=(1, 3))
        inputs = inputs._replace(largest_key=largest)
    if not plan.storage.uses_kappa and not plan.rounds_products:
        return inputs
    return _prepared(inputs, o, mask, plan, specs)


def _prepared(inputs: Inputs, o: Operands, mask: Mask, plan: Plan, specs: Specs) -> Inputs:
    """``inputs`` with keys shifted, and the guard's powers where products are in float16."""
    n = plan.schedule.block_kv

    def look(one: Operands, facts: HeadFacts) -> tuple[Array, HeadFacts]:
        key = tile.zero_unusable(one.key, facts.usable[:, None])
        if facts.kappa is None:
            return key, facts

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
    if not plan.rounds_products:
        return inputs
    guard = None if facts.guard is None else tile.Guard(*map(rows, facts.guard))
    return inputs._replace(guard=guard, value_gain=facts.value_gain)


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
