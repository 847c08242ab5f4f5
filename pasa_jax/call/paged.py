"""A call over keys in pages: its options checked, and the walk as one compiled operation."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pasa_jax.call import checks
from pasa_jax.call.observe import announce, is_observed
from pasa_jax.call.page_backends import BACKENDS, choose
from pasa_jax.core.checks import flag, is_size, window
from pasa_jax.core.errors import check_choice, wrong
from pasa_jax.core.mask import Mask
from pasa_jax.core.operands import Operands
from pasa_jax.core.packed import FORMATS, Store
from pasa_jax.core.plan import Plan
from pasa_jax.core.precision import FLOATS, Precision
from pasa_jax.core.schedule import Schedule
from pasa_jax.core.target import target_of_device
from pasa_jax.core.tile import rounded
from pasa_jax.implementations.page_walk import Call, Queries, Sequences, in_order

Array = jax.Array
# The options of `dot_product_attention` that a call over pages has.
OPTIONS = (
    "scale",
    "local_window_size",
    "logits_soft_cap",
    "sinks",
    "shift",
    "beta",
    "precision",
    "implementation",
    "interpret",
)


def of_new_cache(
    sizes: dict[str, Any], dtype: Any, format: str | None, schedule: Schedule | None, length: int
) -> tuple[str, Schedule]:
    """The type of a new cache by name, and its schedule: by default that of the device.

    Arguments:
      sizes: by the names of their arguments, head_dim and value_head_dim among them.
      format: a name of `FORMATS`, or None.
      length: the most keys of a sequence.

    Raises:
      ValueError: a size, a type, a format or a schedule that is not allowed.
    """
    for name, size in sizes.items():
        if not is_size(size) or size < 1:
            raise wrong(name, "be a positive int", repr(size))
    dtype = str(jnp.dtype(dtype))
    if dtype not in FLOATS:
        raise wrong("dtype", f"be one of {', '.join(FLOATS)}", dtype)
    if format is not None:
        check_choice("format", format, tuple(FORMATS))
    if schedule is None:
        device = jax.devices()[0]
        schedule = Schedule.for_target(
            target_of_device(device.platform, device.device_kind),
            head_dim=sizes["head_dim"],
            value_head_dim=sizes["value_head_dim"],
            dtype=dtype,
            length=length,
            is_causal=True,
        )
    elif not isinstance(schedule, Schedule):
        raise wrong("schedule", "be a pasa_jax.Schedule or None", repr(schedule))
    return dtype, schedule


def attend(
    pages: Store,
    query: Array,
    sequences: Sequences,
    schedule: Schedule,
    most: int,
    *,
    scale: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    logits_soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    shift: str = "auto",
    beta: float | None = None,
    precision: str | Precision | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """Output [tokens, N, E] of query's type and log-sum-exp [tokens, N] of the last tokens of each
    sequence; each sees itself and the tokens before it.

    Arguments:
      query: [tokens, N, D].
      most: no sequence has more queries.
      implementation: "pallas_tpu", "pallas_gpu" or "lax"; None: the kernel for the schedule's
        target, if it supports the call, in programs for such chips; else the lax walk.
      others: as in `pasa_jax.dot_product_attention`.

    Raises:
      ValueError: a wrong shape, type or option.
      BackendUnsupported: ``implementation`` cannot run the call.
    """
    kv_heads, size = pages.key.shape[1], pages.key.shape[3]
    if query.ndim != 3 or query.shape[2] != size or query.shape[1] % kv_heads:
        allowed = f"be [tokens, N, {size}] with N a multiple of the cache's {kv_heads} key heads"
        raise wrong("query", allowed, query.shape)
    if str(query.dtype) != pages.dtype:
        way_out = "Cast one of them."
        raise wrong("query", f"be of the cache's type {pages.dtype}", query.dtype, way_out)
    if shift == "bound":
        way_out = "Its bounds would be read from all keys at every step."
        raise wrong("shift", "be another than 'bound' in a cache", "'bound'", way_out)
    scale, number = checks.scale(scale, query)
    resolved = checks.precision(precision, pages.dtype, shift, schedule.target)
    if resolved.eight_bits:
        way_out = "A cache packs keys when they are written: ask for `format`."
        raise wrong("precision", "have other products than int8 in a cache", "'int8'", way_out)
    plan = Plan(
        shift=shift,
        precision=resolved,
        logits_soft_cap=None if logits_soft_cap is None else checks.soft_cap(logits_soft_cap),
        schedule=schedule,
        beta=beta,
        scale=number,
        explicit_precision=precision is not None,
        interpret=flag("interpret", interpret),
    )
    checks.shift(plan)
    queries = Queries(query, checks.sinks(sinks, query.shape[1]), scale)
    call = Call(pages, queries, sequences, most, window(local_window_size))
    if is_observed():
        _announce(call, plan)
    name, plan = choose(implementation, call, plan)
    with jax.disable_jit(False):
        return _compiled(*call, plan, name, implementation is None)


def _announce(call: Call, plan: Plan) -> None:
    """Passes the call to the observer, as one of whole arrays."""
    pages, queries, one = call.arrays
    table = jnp.clip(one.table, 0, pages.count - 1)
    most = table.shape[1] * pages.page_size
    key, value = in_order(pages, table, one.length, one.row)
    token = one.first[:, None] + jnp.arange(call.most, dtype=jnp.int32)
    query = jnp.asarray(queries.query).at[token].get(mode="clip")
    mask = Mask(
        query_length=call.most,
        key_length=most,
        is_causal=True,
        causal_alignment="bottom_right",
        window=call.window,
        query_lengths=one.count,
        key_lengths=jnp.minimum(one.length, most),
    )
    announce(Operands(query, key, value, None, queries.sinks, queries.scale), mask, plan)


@partial(jax.jit, static_argnums=(3, 4, 5, 6, 7), inline=True)
def _compiled(
    pages: Store,
    queries: Queries,
    sequences: Sequences,
    most: int,
    reach: tuple[int, int] | None,
    plan: Plan,
    name: str,
    anywhere: bool,
) -> tuple[Array, Array]:
    call = Call(pages, queries, sequences, most, reach)
    found = BACKENDS[name].run(call, plan, anywhere=anywhere)
    out, _ = rounded(found.out, queries.query.dtype, clip=plan.promises_finite)
    return out, found.lse
