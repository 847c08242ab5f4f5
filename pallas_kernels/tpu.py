"""The forward pass as a Pallas kernel for TPUs (Mosaic).

A program of the grid (batch, key head, query tiles, chunk of keys) folds key tiles that lie in VMEM
with the tile functions and the walk of `pasa_jax`. One chunk holds all keys of a head, if they fit.
The kernel has no guard against overflow and does not look for keys that are not finite. Where a
result is not finite, or the size of queries and keys says that a product may have left float32, the
lax walk computes the whole call again.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import _tpu_backward
from pallas_kernels._common import (
    Lists,
    Outputs,
    block_refusal,
    lists_of,
    refusal,
    repaired,
    repaired_backward,
    rows_of,
    shape_maker,
    without_arrays,
)
from pallas_kernels._tpu_inputs import LANES, Cuts, inputs_of
from pallas_kernels._tpu_lists import TileList, steps_of, tiles_at_once
from pallas_kernels._tpu_program import (
    AGAIN,
    needs_blocks,
    run_listed,
    run_program,
    scratch_shapes,
)
from pallas_kernels._tpu_walk import Specs, places_of, vmem
from pasa_jax.core import tile
from pasa_jax.core.heads import varying
from pasa_jax.core.mask import Mask
from pasa_jax.core.operands import Operands, Result, Wanted
from pasa_jax.core.plan import Plan
from pasa_jax.core.target import MIB, find_target

Array = jax.Array
Ref = Any


def adapt(plan: Plan) -> Plan:
    """``plan`` adapted to a TPU.

    `auto` takes fixed references, scores in float32, unless the caller named a precision. (A named
    one is never changed; `supports` refuses what Mosaic does not have: float16, and arithmetic in
    bfloat16 on chips before v6e.)
    """
    target = find_target(plan.schedule.target)
    if not plan.explicit_precision:
        precision = plan.precision
        if plan.shift == "auto" and not plan.modified:
            plan = replace(plan, shift="bound")
        if plan.shift in ("auto", "bound") or precision.scores not in target.vector_types:
            narrow = precision.probabilities == "bfloat16"
            probabilities = "bfloat16" if narrow else "float32"
            precision = replace(precision, scores="float32", probabilities=probabilities)
        plan = replace(plan, precision=precision)
    narrow = plan.precision.scores == "bfloat16" and "bfloat16" in target.vector_types
    narrow_sums = plan.precision.probabilities == "bfloat16"
    dialect = tile.Dialect(
        base_two=True,
        exponential="bfloat16" if narrow else None,
        running_maximum=True,
        matrix_columns=target.matrix_columns if narrow_sums else 0,
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
    if specs.listed and plan.shift == "mean_past":
        return "'mean_past' needs the keys in order, which lists of tiles do not keep"
    kinds = mask.kinds
    if kinds is not None and kinds.shape[1] > 1 and specs.groups > 1:
        return "query heads that share keys must share a block mask too"
    reason = block_refusal(mask, specs.block_q, specs.block_kv)
    if reason is not None:
        return reason
    tiled = (mask.array, mask.query_segments, mask.query_positions, operands.bias)
    tiled += (*jax.tree.leaves((mask.mods, operands.factors)),)
    if specs.key_tiles > 1 and specs.block_kv % LANES and any(x is not None for x in tiled):
        return f"block_kv must be a multiple of {LANES} beside a bias, an array or data"
    limit = vmem(plan)
    if specs.bytes > limit:
        return f"a tile with its queries and keys wants {specs.bytes} bytes of VMEM's {limit}"
    return None


def forward(operands: Operands, mask: Mask, plan: Plan, *, wanted: Wanted) -> Result:
    """Attention of all heads; `repaired` says when the lax walk computes it again."""
    return repaired(_kernels, operands, mask, plan, wanted, "tpu")


def no_backward(operands: Operands, mask: Mask, plan: Plan) -> str | None:
    """None, or the reason why the backward pass is left to the lax walk."""
    return _tpu_backward.refusal(operands, mask, plan, vmem(plan))


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
    return _tpu_backward.gradients(operands, mask, plan, result, d_out, d_lse, vmem(plan))


def kernel(operands: Operands, mask: Mask, plan: Plan, *, wanted: Wanted) -> tuple[Result, Array]:
    """The kernel's own result, and [] bool: whether something in it is not finite or not proved."""
    plan = _fitting(operands, mask, plan)
    result, flags = _call(operands, mask, plan, wanted)
    return result, jnp.any(flags != 0)


def _kernels(operands: Operands, mask: Mask, plan: Plan, *, wanted: Wanted) -> tuple[Result, Array]:
    """The result of the kernel, in which query tiles without a proof are computed by a second one,
    and [] bool: whether something in it is not finite.
    """
    plan = _fitting(operands, mask, plan)
    result, flags = _call(operands, mask, plan, wanted)
    if plan.storage is tile.Storage.BOUND:
        result, flags = _rest(operands, mask, plan, wanted, result, flags)
    return result, jnp.any(jnp.isnan(flags))


def _fitting(operands: Operands, mask: Mask, plan: Plan) -> Plan:
    """``plan`` with a running maximum where references would need what is not known first: all
    keys of a head, which may come in parts, which blocks a row sees, or a bias.
    """
    in_parts = Specs.of(operands, mask, plan).in_parts
    if in_parts or not mask.interval_known or operands.factors is not None or plan.modified:
        return plan.unproved
    return plan


def _rest(
    operands: Operands, mask: Mask, plan: Plan, wanted: Wanted, result: Result, flags: Array
) -> tuple[Result, Array]:
    """``result`` and flags with the query tiles computed anew that are not proved."""
    plan = plan.unproved
    plan = replace(plan, schedule=replace(plan.schedule, tiles_per_program=1))
    specs = Specs.of(operands, mask, plan)
    todo = (flags == AGAIN)[:, :, : specs.query_tiles]
    # [B, T, N]
    rows = jnp.repeat(todo, specs.block_q, axis=2)[:, :, : mask.query_length]
    rows = jnp.swapaxes(jnp.repeat(rows, specs.groups, axis=1), 1, 2)

    def compute(carry: tuple[Array, Result, Array]) -> tuple[Array, Result, Array]:
        _, old, old_flags = carry
        new, new_flags = _call(operands, mask, plan, wanted, todo)

        def chosen(new: Array, old: Array) -> Array:
            return jnp.where(rows if new.ndim == 3 else rows[..., None], new, old)

        flags = jnp.where(todo, new_flags, old_flags)
        done = (jnp.zeros_like(carry[0]), jax.tree.map(chosen, new, old), flags)
        return varying(done, (operands, mask))

    # A loop, not a cond: under vmap a cond would always compute both sides.
    flags = flags[:, :, : specs.query_tiles]
    start = varying((jnp.any(todo), result, flags), (operands, mask))
    _, result, flags = lax.while_loop(lambda carry: carry[0], compute, start)
    return result, flags


def _call(
    operands: Operands, mask: Mask, plan: Plan, wanted: Wanted, todo: Array | None = None
) -> tuple[Result, Array]:
    """The kernel's result, and a flag for each query tile [B, K, tiles]: 0 where all is right, NaN
    where something is not finite or not certain, `AGAIN`.

    Arguments:
      todo: [B, K, tiles] bool, the tiles to compute; the others hold anything. None: all.
    """
    specs = Specs.of(operands, mask, plan)
    if not specs.listed:
        return _program(operands, mask, plan, wanted, todo=todo)
    lists = lists_of(mask, specs.block_q, specs.block_kv, specs.groups)
    batch, heads, tiles, columns = lists.order.shape
    at_once = max(1, tiles_at_once((batch, heads), columns))
    found = []
    for first in range(0, tiles, at_once):
        rows = slice(first * specs.block_q, (first + at_once) * specs.block_q)
        some = jax.tree.map(lambda x: x[:, :, first : first + at_once], lists)  # noqa: B023
        part = rows_of(operands, mask, rows) if at_once < tiles else (operands, mask)
        found.append(_program(*part, plan, wanted, lists=some, first=rows.start))
    if len(found) == 1:
        return found[0]
    results, flags = zip(*found, strict=True)
    result = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *results)
    return result, jnp.concatenate(flags, axis=2)


def _program(
    operands: Operands,
    mask: Mask,
    plan: Plan,
    wanted: Wanted,
    *,
    todo: Array | None = None,
    lists: Lists | None = None,
    first: int = 0,
) -> tuple[Result, Array]:
    """`_call` as one program.

    Arguments:
      lists: the lists of its query tiles, where it goes through lists.
      first: its first row. The operands and the mask's arrays hold only its rows; the mask's
        lengths are those of the whole.
    """
    specs = Specs.of(operands, mask, plan)
    inputs = inputs_of(operands, mask, transposed=specs.transposed)
    if todo is not None:
        inputs = inputs._replace(todo=todo.astype(jnp.int32))
    # Mosaic never contracts. XLA, which runs the repair and the gradient, may.
    dialect = replace(plan.dialect, contracts=False, transposed=specs.transposed)
    kernel_plan = replace(plan, dialect=dialect)
    out_type = plan.output(operands.query.dtype)
    half = out_type == jnp.float16
    kernel_type = jnp.dtype(jnp.float32) if half else out_type
    (b, t), e = operands.query.shape[:2], operands.value.shape[-1]
    heads = (b, specs.heads, specs.groups)
    shape = shape_maker(operands, mask)
    out = shape((*heads, t, e), kernel_type)
    column = shape((*heads, 1, t), jnp.float32)
    flag = shape((b, specs.heads, specs.query_tiles, 1, LANES), jnp.float32)
    out_block = pl.BlockSpec(
        (1, 1, specs.groups, specs.rows, e), lambda b, h, i, *_: (b, h, 0, i, 0)
    )
    column_block = pl.BlockSpec(
        (1, 1, specs.groups, 1, specs.rows), lambda b, h, i, *_: (b, h, 0, 0, i)
    )
    flag_block = pl.BlockSpec((1, 1, specs.tiles, 1, LANES), lambda b, h, i, *_: (b, h, i, 0, 0))
    scratch = scratch_shapes(specs, kernel_plan, operands.key.shape[-1], e)
    # What the first program of a head finds out is for the others: they follow it on its core.
    follows = needs_blocks(plan) and specs.programs > 1
    tiles = None if lists is None else TileList.of(lists)
    list_shape = None if tiles is None else tiles.shape
    sides = {"b": 1, "k": 1, "rows": specs.rows, "keys": specs.chunk_tiles * specs.block_kv}
    cuts = Cuts(sides, places_of(specs, mask, list_shape), specs.transposed)
    steps = specs.chunks if lists is None else steps_of(lists, interpret=plan.interpret)
    body = partial(
        run_program if tiles is None else partial(run_listed, list_shape=list_shape),
        mask=without_arrays(mask),
        plan=kernel_plan,
        specs=specs,
        out_type=out_type,
        first=first,
    )
    call = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0 if tiles is None else 1,
            grid=(b, specs.heads, specs.programs, steps),
            in_specs=(cuts.inputs(inputs),),
            out_specs=Outputs.of(
                wanted, out_block, flag_block, column_block, None if half else out_block
            ),
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=Outputs.of(wanted, out, flag, column, None if half else out),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(
                "parallel",
                "parallel",
                "arbitrary" if follows else "parallel",
                "arbitrary",
            ),
            vmem_limit_bytes=min(vmem(plan), specs.bytes + specs.bytes // 4 + 8 * MIB),
        ),
        interpret=pltpu.InterpretParams() if plan.interpret else False,
        name="pasa_tpu",
    )
    with jax.enable_x64(False):  # Pallas' compilers have no 64-bit loop counters
        outs = call(inputs) if tiles is None else call(tiles.numbers, inputs)

    def rows(x: Array | None) -> Any:  # [B, K, G, T, E] -> [B, T, N, E]
        return None if x is None else jnp.swapaxes(x.reshape(b, -1, *x.shape[3:]), 1, 2)

    def statistics(x: Array | None) -> Array | None:  # [B, K, G, 1, T] -> [B, T, N]
        return None if x is None else jnp.swapaxes(x.reshape(b, -1, t), 1, 2)

    out, remainder = rows(outs.out), rows(outs.remainder)
    if half:
        out, remainder = tile.rounded(out, out_type, clip=plan.promises_finite)
    result = Result(out, statistics(outs.lse), statistics(outs.m), statistics(outs.l), remainder)
    return result.only(wanted), outs.flag[:, :, :, 0, 0]
