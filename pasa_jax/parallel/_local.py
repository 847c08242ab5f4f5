"""The functions for use inside `jax.shard_map`: each device passes its part of the sequence."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from pasa_jax.call import checks
from pasa_jax.call.api import dot_product_attention
from pasa_jax.call.arguments import Arguments, Call
from pasa_jax.core.errors import check_choice, wrong
from pasa_jax.core.low_rank import LowRankBias
from pasa_jax.core.mask import Mask
from pasa_jax.core.operands import Operands
from pasa_jax.core.schedule import Schedule
from pasa_jax.core.tile import wide_type
from pasa_jax.parallel import _schemes
from pasa_jax.parallel._line import Line
from pasa_jax.parallel._schemes import SCHEMES, Job

Array = jax.Array
Axes = str | tuple[str, ...]


def all_gather(*args: Any, axis_name: Axes, **kwargs: Any) -> Any:
    """Attention inside `jax.shard_map` over a sequence that devices share: each gathers K and V.

    Arguments: those of `dot_product_attention`, as far as they belong to the device. T and S are
    the device's parts, of the same size on each, in the order of the devices; and

      bias, mask: the device's rows and all columns, broadcastable to [B, N, T, S·devices].
      query_seq_lengths, key_value_seq_lengths: valid lengths of the whole sequences.
      q_positions, kv_positions, segment_ids, q_data, kv_data, the factors of a `LowRankBias`: of
        the device's tokens. Without positions, tokens stand in their natural order.
      mask_mod, score_mod: get the places in the whole sequences.
      block_mask: refused; `attention_fn` takes one.
      axis_name: the name, or the names, of the mesh axes over which the sequence is cut.

    Returns: what `dot_product_attention` returns, of the device's queries.

    Raises: what `dot_product_attention` raises.
    """
    return _attend("all_gather", axis_name, None, args, kwargs)


def ulysses(*args: Any, axis_name: Axes, **kwargs: Any) -> Any:
    """`all_gather`, by an exchange: each device gets all tokens of some heads, and back.

    Arguments: as in `all_gather`. The devices must divide N; key heads are repeated where they do
    not divide K.
    """
    return _attend("ulysses", axis_name, None, args, kwargs)


def ring(*args: Any, axis_name: Axes, **kwargs: Any) -> Any:
    """`all_gather`, while K and V travel round: no device ever has more than two parts of them.

    Arguments: as in `all_gather`.
    """
    return _attend("ring", axis_name, None, args, kwargs)


def ring_ulysses(
    *args: Any, axis_name: Axes, ulysses_devices: int | None = None, **kwargs: Any
) -> Any:
    """`all_gather`, by rings of groups: neighbours share the heads, K and V travel between groups.

    Arguments: as in `all_gather`, and

      axis_name: two axes, of which the second is the group, or one that is split.
      ulysses_devices: the devices of a group where there is one axis.
    """
    return _attend("ring_ulysses", axis_name, ulysses_devices, args, kwargs)


def _attend(scheme: str, names: Axes, ulysses_devices: int | None, args: Any, kwargs: Any) -> Any:
    given = bound(*args, **kwargs)
    line = Line.over(names)
    call = local_call(given, line)
    if call.empty:
        raise wrong("query", "have tokens and keys on each device", call.operands.query.shape)
    job = Job(given.implementation, call.plan, lse=given.return_residual)
    lines = lines_of(scheme, line, names, ulysses_devices)
    results = attend(lines, job, call.operands, call.mask, stats=given.return_statistics)
    parts = [jax.tree.map(call.unbatch, x) for x in results if x is not None]
    return parts[0] if len(parts) == 1 else tuple(parts)


def bound(*args: Any, **kwargs: Any) -> Arguments:
    """The arguments of `dot_product_attention`, defaults included."""
    found = inspect.signature(dot_product_attention).bind(*args, **kwargs)
    found.apply_defaults()
    return Arguments(**found.arguments)


def lines_of(
    scheme: str, line: Line, names: Axes, ulysses_devices: int | None
) -> tuple[str, tuple[Line, ...]]:
    """The scheme, and the lines of devices that it goes along."""
    check_choice("scheme", scheme, SCHEMES)
    if scheme != "ring_ulysses":
        return scheme, (line,)
    names = (names,) if isinstance(names, str) else tuple(names)
    if ulysses_devices is not None:
        return scheme, (line, *line.split(ulysses_devices))
    if len(names) != 2:
        allowed = "be given for 'ring_ulysses', unless the sequence has two axes of the mesh"
        raise wrong("ulysses_devices", allowed, None)
    return scheme, (line, *(Line.over(name) for name in names))


def attend(
    lines: tuple[str, tuple[Line, ...]],
    job: Job,
    operands: Operands,
    mask: Mask,
    *,
    stats: bool = False,
) -> tuple[Array, Array | None, Any]:
    """Output, log-sum-exp and statistics of a call in the local form."""
    scheme, (line, *groups) = lines
    mask = aligned(line, mask)
    *shape, size = operands.value.shape
    if size == 0:  # the weights still have a log-sum-exp
        operands = operands._replace(value=jnp.zeros((*shape, 1), operands.value.dtype))
    if scheme == "ring_ulysses":
        outer, inner = groups
        out, lse = _schemes.ring_ulysses(outer, inner, job, operands, mask)
    else:
        out, lse = getattr(_schemes, scheme)(line, job, operands, mask)
    of_heads = None
    if stats:
        of_heads = _schemes.statistics_of(line, job, *jax.lax.stop_gradient((operands, mask)))
    return out[..., :size], lse, of_heads


def aligned(line: Line, mask: Mask) -> Mask:
    """The mask aligned at the top left: another alignment becomes positions."""
    if mask.causal_alignment == "top_left":
        return mask
    top_left = replace(mask, causal_alignment="top_left")
    if not (mask.is_causal or mask.window is not None):
        return top_left
    whole_queries, whole_keys = (
        n * line.size if given is None else given
        for n, given in (
            (mask.query_length, mask.query_lengths),
            (mask.key_length, mask.key_lengths),
        )
    )
    offset = whole_keys - whole_queries
    if isinstance(offset, int):
        if offset == 0:
            return top_left
        offset = jnp.full(1, offset, jnp.int32)
    index = line.index()
    rows, keys = (
        index * n + jnp.arange(n, dtype=jnp.int32) for n in (mask.query_length, mask.key_length)
    )
    return replace(top_left, query_positions=rows[None] + offset[:, None], key_positions=keys[None])


def local_call(given: Arguments, line: Line) -> Call:
    """The call in the local form, of arguments in it.

    Raises:
      ValueError: an argument is wrong.
    """
    if given.block_mask is not None:
        way_out = "`pasa_jax.parallel.attention_fn` takes one."
        raise wrong("block_mask", "be None inside of shard_map", "something else", way_out)
    dense = None if isinstance(given.bias, LowRankBias) else given.bias
    call = Call.of(
        replace(
            given,
            bias=None if dense is not None else given.bias,
            mask=None,
            query_seq_lengths=None,
            key_value_seq_lengths=None,
        )
    )
    q, k, v = call.operands[:3]
    whole: Any = [
        jax.ShapeDtypeStruct((x.shape[0], x.shape[1] * line.size, *x.shape[2:]), x.dtype)
        for x in (q, k, v)
    ]
    whole_q, whole_k, whole_v = whole
    full = (q.shape[0], q.shape[2], q.shape[1], whole_k.shape[1])
    schedule: Any = checks.schedule(
        given.schedule, whole_q, whole_k, whole_v, call.mask.is_causal, call.mask.window
    )
    assert isinstance(schedule, Schedule)
    operands = call.operands._replace(bias=checks.bias(dense, full, wide_type(q.dtype)))
    mask = replace(
        call.mask,
        array=checks.mask(given.mask, full),
        query_lengths=checks.lengths("query_seq_lengths", given.query_seq_lengths, whole_q),
        key_lengths=checks.lengths("key_value_seq_lengths", given.key_value_seq_lengths, whole_k),
    )
    if q.shape[1] == 1 and line.size > 1 and (operands.bias is not None or mask.array is not None):
        allowed = "have at least two tokens on each device beside a bias or a mask"
        raise wrong("query", allowed, 1)
    return replace(call, operands=operands, mask=mask, plan=replace(call.plan, schedule=schedule))
