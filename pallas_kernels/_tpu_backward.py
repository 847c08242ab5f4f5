"""The backward pass on TPUs (Mosaic): which kernels compute it, and what they cannot.

Where the rows of a head fit VMEM one kernel computes all gradients (`_tpu_backward_head`).
Otherwise rows and keys come tile by tile (`_tpu_backward_streamed`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from pallas_kernels._common import block_refusal, lists_shape
from pallas_kernels._tpu_backward_blocks import Sizes, bias_copies
from pallas_kernels._tpu_backward_head import gradients_by_head
from pallas_kernels._tpu_backward_streamed import streamed_gradients
from pallas_kernels._tpu_lists import LISTED, tiles_at_once
from pasa_jax.core import tile
from pasa_jax.core.mask import Mask
from pasa_jax.core.operands import Operands, Result
from pasa_jax.core.plan import Plan

if TYPE_CHECKING:
    from pasa_jax.core.shapes import Float

Array = jax.Array

# A bias's gradient is written for every batch entry and key head, and then summed over those that
# share the bias. What is written may be so many times as large as the bias, or as the queries. More
# would take the memory that tiles are there to save.
_BIAS_COPIES = 8

# So many tiles beside functions or a bias of low rank are computed without a loop: each has a long
# body, which takes time to compile.
_LONG_BODIES = 4


def refusal(operands: Operands, mask: Mask, plan: Plan, vmem: int) -> str | None:
    """None, or the reason why the kernels cannot compute a call's gradients.

    Arguments:
      vmem: bytes that a program may use.
    """
    sizes, bias = Sizes.of(operands, mask, plan, vmem), operands.bias
    if bias is not None:
        copies = bias_copies(operands)
        if copies * bias.size > _BIAS_COPIES * max(bias.size, operands.query.size):
            return f"the gradient of the bias, which heads share, would be written {copies} times"
        if sizes.streamed:
            return "rows that come tile by tile have no gradient of a bias"
    if sizes.bytes > vmem:
        return f"a tile with its gradients wants {sizes.bytes} bytes of VMEM's {vmem}"
    if sizes.streamed:
        heads, tiles = lists_shape(mask, sizes.groups), max(sizes.query_tiles, sizes.key_tiles)
        if tiles_at_once(heads, tiles) == 0:
            wanted = heads[0] * heads[1] * (tiles + 2)
            return f"the lists of one tile of each head are {wanted} numbers; SMEM holds {LISTED}"
    return block_refusal(mask, sizes.block_q, sizes.block_kv)


def adapt(operands: Operands, mask: Mask, plan: Plan, sizes: Sizes) -> Plan:
    """The plan of the kernels: scores less their row's maximum, in float32, in their own tiles."""
    schedule = replace(plan.schedule, block_q=sizes.block_q, block_kv=sizes.block_kv)
    unroll = sizes.query_tiles
    if mask.mods is not None or operands.factors is not None:
        unroll = min(unroll, _LONG_BODIES)
    if sizes.listed:
        unroll = 1
    return replace(
        plan,
        shift="bound",
        precision=replace(plan.precision, probabilities="float32"),
        schedule=replace(schedule, unroll=unroll),
        dialect=tile.Dialect(base_two=True, exponential=None, contracts=False),
    )


def gradients(
    operands: Operands,
    mask: Mask,
    plan: Plan,
    result: Result,
    d_out: Float[Array, "B T N E"],
    d_lse: Float[Array, "B T N"] | None,
    vmem: int,
) -> Operands:
    """The kernels' own gradients.

    Arguments:
      vmem: bytes that a program may use.
    """
    sizes = Sizes.of(operands, mask, plan, vmem)
    kernel_plan = adapt(operands, mask, plan, sizes)
    kernels = streamed_gradients if sizes.streamed else gradients_by_head
    found = kernels(operands, mask, kernel_plan, sizes, result, d_out, d_lse, vmem)
    cotangents = found.operands(operands)
    if operands.sinks is None:
        return cotangents
    return cotangents._replace(sinks=_of_sinks(operands, mask, plan, result, d_out, d_lse))


def _of_sinks(
    operands: Operands,
    mask: Mask,
    plan: Plan,
    result: Result,
    d_out: Float[Array, "B T N E"],
    d_lse: Float[Array, "B T N"] | None,
) -> Float[Array, " N"]:
    """The sinks' gradient, which needs no scores."""
    assert operands.sinks is not None
    d_o, out, rest = (x.astype(jnp.float32) for x in (d_out, result.out, result.remainder))
    delta = jnp.sum(d_o * (out + rest), axis=-1)
    delta = delta if d_lse is None else delta - d_lse
    numerics = plan.numerics(mask.key_length)
    weight = tile.sink_weight(operands.sinks, result.m, result.l, numerics, None)
    used = mask.row_valid()
    used = result.l != 0 if used is None else (result.l != 0) & used[..., None]
    total = jnp.sum(jnp.where(used, -weight * delta, 0), axis=(0, 1))
    return total.astype(operands.sinks.dtype)
