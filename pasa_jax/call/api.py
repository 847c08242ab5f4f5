"""The public functions: `dot_product_attention` and `explain`."""

from __future__ import annotations

import dataclasses
import inspect
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pasa_jax.call import statistics
from pasa_jax.call.backends import BACKENDS, Choice, Implementation, choose
from pasa_jax.call.explicit import HEADS, OUTPUT, ROWS, sharded
from pasa_jax.call.observe import announce
from pasa_jax.core import dropout as _dropout
from pasa_jax.core.errors import check_choice, wrong
from pasa_jax.core.mask import Mask
from pasa_jax.core.operands import Operands
from pasa_jax.core.precision import FLOATS, Precision
from pasa_jax.core.prepare import Plan
from pasa_jax.core.schedule import Schedule
from pasa_jax.core.shifts import SHIFTS, check_beta, optimal_beta
from pasa_jax.core.target import target_of_device
from pasa_jax.core.tile import lowest, wide_type

Array = jax.Array
SegmentIds = ArrayLike | tuple[ArrayLike, ArrayLike]


def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: Implementation = None,
    return_residual: bool = False,
    causal_alignment: str = "top_left",
    segment_ids: SegmentIds | None = None,
    logits_soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    shift: str = "auto",
    beta: float | None = None,
    precision: str | Precision | None = None,
    schedule: Schedule | None = None,
    return_statistics: bool = False,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    dropout_broadcast: bool = False,
    interpret: bool = False,
) -> Any:
    r"""softmax(scale · Q·Kᵀ + bias) · V, with scores stored in 16 bits that cannot overflow.

    A drop-in for `jax.nn.dot_product_attention`: same positional arguments, names, layouts and
    defaults. Letters: B batch, T query length, S key length, N query heads, K key heads (N is a
    multiple of K), D head size, E value head size.

    Arguments:
      query: [B, T, N, D] or [T, N, D]; float16, bfloat16, float32, or float64 under x64.
      key: [B, S, K, D] or [S, K, D], of query's type.
      value: [B, S, K, E] or [S, K, E], of query's type; E may differ from D.
      bias: broadcastable to [B, N, T, S], added to the scaled scores; floating or integers. −inf,
        or the lowest finite number of its type (as masks of Hugging Face hold), hides a key.
      mask: bool, broadcastable to [B, N, T, S], True where the query sees the key.
      scale: factor of the scores; default 1/√D. A real number that float32 (float64 for float64
        inputs) can hold, or a scalar array.
      is_causal: query i sees keys up to i (see ``causal_alignment``).
      query_seq_lengths, key_value_seq_lengths: [B] integers; positions beyond are padding, and
        their outputs are 0. Clipped to [0, T] and [0, S].
      local_window_size: (left, right), or one int for both: keys from i − left to i + right.
      implementation: None = the best that supports the call; a name = that one or an error; a
        sequence of names = the first of them that can. ``"pallas_tpu"``, ``"pallas_gpu"``,
        ``"lax"`` or ``"reference"``. jax.nn's own names work too: ``"xla"`` is ``"lax"``, and
        ``"cudnn"`` is ``("pallas_gpu", "lax")``.
      return_residual: also return the log-sum-exp of the scores, float32 (float64 for float64)
        and differentiable. (jax.nn returns it in the inputs' type, without a gradient.)
      causal_alignment: ``"top_left"`` (jax.nn: query 0 stands at key 0) or ``"bottom_right"``
        (FlashAttention: the last query stands at the last key). Places the window too.
      segment_ids: [B, T] integers for self-attention, or a pair ([B, T], [B, S]); a query sees
        the keys of its own segment.
      logits_soft_cap: c > 0: scores become c·tanh(s/c) before bias and mask.
      sinks: [N] scores of one more key a head, with value 0: they only take up weight.
      shift: ``"auto"``, ``"none"``, ``"paper"``, ``"mean"``, ``"mean_past"`` or
        ``"reference"``; see `pasa_jax.shifts`. All but ``"none"`` and the setting ``"paper"`` of
        ``precision`` promise finite outputs for finite inputs (the implementation of the name
        ``"reference"``: while scores fit float32).
      beta: β in (0, 1) of the shift ``"paper"``; default `optimal_beta` of the schedule's block.
      precision: a `Precision` or its name; None stores scores and probabilities in the inputs'
        type, and the statistics and the output before normalisation in float32.
      schedule: tile sizes and target; default that of the device. Its ``block_kv``, ``target``,
        the shift and β change the numbers within rounding, everything else
        the speed and the order of float32 sums.
      return_statistics: also return `Statistics` of the scores, per head (one more pass).
      dropout_rate: the share of the weights, in [0, 1), that is set to 0; the others are divided by
        1 − rate, and the log-sum-exp is that of all. ``"lax"`` and ``"reference"`` have it, and
        drop the same weights whatever the schedule.
      dropout_key: a key of `jax.random`; without effect at rate 0. What is dropped depends on it,
        the batch entry, the head and the two positions alone: under vmap and shard_map, where
        batch entries are numbered anew, give each part a key of its own.
      dropout_broadcast: drop the same pairs of positions in every batch entry and head.
      interpret: run the Pallas kernel that ``implementation`` names step by step on whatever device
        there is, to test with; ``schedule`` must be for the kernel's chip. Slow.

    Returns:
      The output [B, T, N, E] (or [T, N, E]) of query's type; with ``return_residual`` and/or
      ``return_statistics`` a tuple (output, log-sum-exp [B, T, N], statistics) of those asked
      for. A query that sees no key gives 0 and the lowest finite log-sum-exp (jax.nn averages
      all values). What stands in a key or value that a query does not see never reaches its
      output, NaN included; one that it does see and that is not finite makes its row NaN.

    Raises:
      ValueError: an argument is wrong; the message names it, what is allowed and what was seen.
      ScheduleError: ``schedule`` does not fit its target's memories.
      BackendUnsupported: no implementation asked for can run the call.

    Source: Cheng et al., arXiv 2503.01873; docs/algorithm.md has the equations.

    >>> import jax.numpy as jnp
    >>> x = jnp.full((1, 4, 2, 64), 300.0, jnp.float16)  # every score is 720000
    >>> bool(jnp.all(dot_product_attention(x, x, x, is_causal=True) == 300))
    True
    """
    call = _canonical(
        query,
        key,
        value,
        bias,
        mask,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        causal_alignment=causal_alignment,
        segment_ids=segment_ids,
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
        shift=shift,
        beta=beta,
        precision=precision,
        schedule=schedule,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        dropout_broadcast=dropout_broadcast,
        interpret=interpret,
    )
    chosen = choose(implementation, call.operands, call.mask, call.plan)
    wanted = (return_residual, return_statistics)
    if call.empty:
        found = _empty(call.operands, chosen.plan, *wanted)
    else:
        announce(call.operands, call.mask, chosen.plan)
        run = partial(_run, chosen, implementation is None, *wanted)
        found = sharded(run, call.operands, call.mask, _Results.places(*wanted))
    results = [jax.tree.map(call.unbatch, x) for x in found if x is not None]
    return results[0] if len(results) == 1 else tuple(results)


class _Results(NamedTuple):
    """What a call returns, as far as it is asked for."""

    out: Any
    lse: Any
    statistics: Any

    @staticmethod
    def places(lse: bool, stats: bool) -> _Results:
        """Where each result's axes come from, for `sharded`."""
        return _Results(OUTPUT, ROWS if lse else None, HEADS if stats else None)


def _run(
    chosen: Choice, anywhere: bool, lse: bool, stats: bool, operands: Operands, mask: Mask
) -> _Results:
    *shape, size = operands.value.shape
    if size == 0:  # there are weights all the same, and they have a log-sum-exp
        operands = operands._replace(value=jnp.zeros((*shape, 1), operands.value.dtype))
    out, of_rows = BACKENDS[chosen.name].run(
        operands, mask, chosen.plan, lse=lse, anywhere=anywhere
    )
    found = statistics.collect(operands, mask, chosen.plan) if stats else None
    return _Results(out[..., :size], of_rows if lse else None, found)


@dataclass(frozen=True)
class Explanation:
    """What `dot_product_attention` would do with a call, and why not otherwise.

    Arguments:
      implementation: the name that would run.
      shift: the shift that would be used; ``"none or mean"`` where it depends on the data.
      reason: why this shift.
      precision, schedule: as resolved.
      guarded: whether finite inputs are promised finite outputs.
      why_not: for every other implementation, the reason.
    """

    implementation: str
    shift: str
    reason: str
    precision: Precision
    schedule: Schedule
    guarded: bool
    why_not: dict[str, str]

    def __str__(self) -> str:
        lines = [
            f"implementation  {self.implementation}",
            f"shift           {self.shift}: {self.reason}",
            f"precision       {self.precision}",
            f"schedule        {self.schedule}",
            f"finite outputs  {'promised for finite inputs' if self.guarded else 'not promised'}",
        ]
        lines += [f"not {name}: {reason}" for name, reason in self.why_not.items()]
        return "\n".join(lines)


def explain(*args: Any, **kwargs: Any) -> Explanation:
    """Which implementation, schedule and shift `dot_product_attention` would use, and why.

    Arguments: those of `dot_product_attention`; arrays may be `jax.ShapeDtypeStruct`.

    Raises: what `dot_product_attention` raises.

    >>> import jax, jax.numpy as jnp
    >>> x = jax.ShapeDtypeStruct((1, 128, 8, 64), jnp.float16)
    >>> explain(x, x, x, is_causal=True).shift
    'reference'
    """
    arguments, implementation = _bound(*args, **kwargs)
    found: list[Explanation] = []

    def trace(arrays: dict[str, Any]) -> None:
        call = _canonical(**{**arguments, **arrays})
        name, plan, why_not = choose(implementation, call.operands, call.mask, call.plan)
        shift, reason = plan.explain_shift()
        found.append(
            Explanation(
                name, shift, reason, plan.precision, plan.schedule, plan.promises_finite, why_not
            )
        )

    arrays = {k: v for k, v in arguments.items() if k in _ARRAYS and v is not None}
    jax.eval_shape(trace, arrays)
    return found[0]


_ARRAYS = (
    "query",
    "key",
    "value",
    "bias",
    "mask",
    "query_seq_lengths",
    "key_value_seq_lengths",
    "segment_ids",
    "sinks",
    "dropout_key",
)


# From the user's arguments to canonical ones. Implementations take no defaults.


def canonical(*args: Any, **kwargs: Any) -> _Call:
    """A call of `dot_product_attention` as an implementation takes it."""
    return _canonical(**_bound(*args, **kwargs)[0])


def _bound(*args: Any, **kwargs: Any) -> tuple[dict[str, Any], Implementation]:
    """The arguments of `_canonical`, defaults included, and the implementation asked for."""
    bound = inspect.signature(dot_product_attention).bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    for option in ("return_residual", "return_statistics"):
        arguments.pop(option)
    return arguments, arguments.pop("implementation")


@dataclass(frozen=True)
class _Call:
    operands: Operands
    mask: Mask
    plan: Plan
    batched: bool

    def unbatch(self, x: Array) -> Array:
        return x if self.batched else x[0]

    @property
    def empty(self) -> bool:
        """Whether there is no query or no key to compute with."""
        return 0 in self.operands.query.shape or 0 in self.operands.key.shape


def _empty(o: Operands, plan: Plan, lse: bool, stats: bool) -> _Results:
    """The documented result where no query sees a key: 0, and the log-sum-exp of the sinks."""
    rows = o.query.shape[:3]
    wide = wide_type(o.query.dtype)
    of_rows = jnp.full(rows, lowest(wide))
    if o.sinks is not None:
        of_rows = jnp.broadcast_to(o.sinks.astype(wide), rows)
    return _Results(
        out=jnp.zeros((*rows, o.value.shape[-1]), o.query.dtype),
        lse=of_rows.astype(wide) if lse else None,
        statistics=statistics.of_nothing(o, plan) if stats else None,
    )


def _canonical(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None,
    mask: ArrayLike | None,
    *,
    scale: ArrayLike | None,
    is_causal: bool,
    query_seq_lengths: ArrayLike | None,
    key_value_seq_lengths: ArrayLike | None,
    local_window_size: int | tuple[int, int] | None,
    causal_alignment: str,
    segment_ids: SegmentIds | None,
    logits_soft_cap: float | None,
    sinks: ArrayLike | None,
    shift: str,
    beta: float | None,
    precision: str | Precision | None,
    schedule: Schedule | None,
    dropout_rate: float,
    dropout_key: Array | None,
    dropout_broadcast: bool,
    interpret: bool,
) -> _Call:
    batched = np.ndim(query) == 4
    q, k, v = _query_key_value(query, key, value)
    resolved = _precision(precision, str(q.dtype))
    factor, static_scale = _scale(scale, q)
    if logits_soft_cap is not None:
        logits_soft_cap = _soft_cap(logits_soft_cap)
    plan = Plan(
        shift=shift,
        precision=resolved,
        schedule=_schedule(schedule, q, k, v, _flag("is_causal", is_causal)),
        interpret=_flag("interpret", interpret),
        logits_soft_cap=logits_soft_cap,
        beta=beta,
        scale=static_scale,
        explicit_precision=precision is not None,
        dropout_rate=_rate(dropout_rate),
    )
    _check_shift(plan)
    full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    ids = (None, None) if segment_ids is None else _segments(segment_ids, q, k)
    return _Call(
        operands=Operands(
            q, k, v, _bias(bias, full, wide_type(q.dtype)), _sinks(sinks, q.shape[2]), factor
        ),
        mask=Mask(
            query_length=q.shape[1],
            key_length=k.shape[1],
            is_causal=bool(is_causal),
            causal_alignment=causal_alignment,
            window=_window(local_window_size),
            query_lengths=_lengths("query_seq_lengths", query_seq_lengths, q),
            key_lengths=_lengths("key_value_seq_lengths", key_value_seq_lengths, k),
            query_segments=ids[0],
            key_segments=ids[1],
            array=_mask_array(mask, full),
            dropout=_seeds(plan.dropout_rate, dropout_key, dropout_broadcast, q),
        ),
        plan=plan,
        batched=batched,
    )


def _query_key_value(q: ArrayLike, k: ArrayLike, v: ArrayLike) -> tuple[Array, Array, Array]:
    arrays = {"query": jnp.asarray(q), "key": jnp.asarray(k), "value": jnp.asarray(v)}
    layouts = {
        "query": "[B, T, N, D] or [T, N, D]",
        "key": "[B, S, K, D] or [S, K, D]",
        "value": "[B, S, K, E] or [S, K, E]",
    }
    ndim = arrays["query"].ndim
    for name, x in arrays.items():
        if x.ndim not in (3, 4) or x.ndim != ndim:
            raise wrong(name, f"have the layout {layouts[name]}, as `query` has", f"{x.shape}")
        if str(x.dtype) not in FLOATS:
            raise wrong(name, f"be of type {', '.join(FLOATS)}", str(x.dtype))
        if x.dtype != arrays["query"].dtype:
            seen = f"{x.dtype} beside {arrays['query'].dtype}"
            raise wrong(name, "have query's type", seen, "Cast one of them.")
    q, k, v = (x if ndim == 4 else x[None] for x in arrays.values())
    (batch, _, heads, size), (_, keys, kv_heads, _) = q.shape, k.shape
    if k.shape[0] != batch or k.shape[3] != size:
        allowed = f"be [{batch}, S, K, {size}], the batch and head size of query's {q.shape}"
        raise wrong("key", allowed, f"{k.shape}")
    if v.shape[:3] != k.shape[:3]:
        allowed = f"be [{batch}, {keys}, {kv_heads}, E], as key's {k.shape}"
        raise wrong("value", allowed, f"{v.shape}")
    if size == 0:
        raise wrong("query", "have a head size of at least 1", 0)
    if kv_heads == 0 or heads % kv_heads:
        allowed = f"have a number of heads that divides query's {heads}"
        raise wrong("key", allowed, kv_heads)
    return q, k, v


def _precision(precision: str | Precision | None, dtype: str) -> Precision:
    if precision is None:
        resolved = Precision.named(dtype)
    elif isinstance(precision, Precision):
        resolved = precision
    else:
        resolved = Precision.named(precision)
    wide = "float64" in dataclasses.astuple(resolved)
    if wide != (dtype == "float64"):
        way_out = "Cast query, key and value instead."
        raise wrong(
            "precision", "be float64 for float64 inputs and only for them", resolved, way_out
        )
    if resolved.products == "float16" and dtype != "float16":
        allowed = 'have products="float32" for inputs that are not float16'
        raise wrong("precision", allowed, resolved, "Cast query, key and value to float16.")
    return resolved


def _scale(scale: ArrayLike | None, q: Array) -> tuple[Array, float | None]:
    """1/α as an array, and as a number where it is one."""
    wide = wide_type(q.dtype)
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    if _is_real(scale):
        if not abs(scale) <= float(jnp.finfo(wide).max):  # NaN is not, either
            raise wrong("scale", f"be finite in {wide}", scale)
        return jnp.asarray(scale, wide), float(scale)
    if not isinstance(scale, (jax.Array, np.ndarray)) or not _is_number_type(scale.dtype):
        raise wrong("scale", "be a real number or a scalar array of one", repr(scale))
    array = jnp.asarray(scale)
    if array.ndim != 0:
        raise wrong("scale", "be a number or a scalar array", f"shape {array.shape}")
    return array.astype(wide), None


def _is_real(x: Any) -> TypeGuard[float]:
    """Whether x is a real number of Python or NumPy."""
    return isinstance(x, (int, float, np.integer, np.floating)) and not isinstance(x, bool)


def _is_number_type(dtype: jnp.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def _flag(name: str, value: bool) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise wrong(name, "be True or False", repr(value))
    return bool(value)


def _schedule(schedule: Schedule | None, q: Array, k: Array, v: Array, is_causal: bool) -> Schedule:
    if schedule is None:
        device = jax.devices()[0]
        target = target_of_device(device.platform, device.device_kind)
        sizes = {"head_dim": q.shape[3], "value_head_dim": v.shape[3], "dtype": str(q.dtype)}
        sizes |= {"length": k.shape[1], "is_causal": is_causal}
        schedule = Schedule.for_target(target, **sizes)
    elif isinstance(schedule, Schedule):
        schedule.check(head_dim=q.shape[3], value_head_dim=v.shape[3], dtype=str(q.dtype))
    else:
        raise wrong("schedule", "be a pasa_jax.Schedule or None", repr(schedule))
    # A block longer than the sequence has the sequence's length: its mean is over real keys.
    return schedule.fitted(schedule.block_q, k.shape[1])


def _check_shift(plan: Plan) -> None:
    check_choice("shift", plan.shift, ("auto", *SHIFTS))
    if plan.shift != "paper":
        if plan.beta is not None:
            raise wrong("beta", "be None unless shift='paper'", plan.beta)
        return
    if plan.scale is None:
        way_out = "Fold the array into query, or use another shift."
        raise wrong("scale", "be a Python number for shift='paper'", "an array", way_out)
    if not 0 < abs(plan.scale) <= 2.0**100:
        allowed = "be other than 0 and at most 2^100 for shift='paper', whose matrix holds it"
        raise wrong("scale", allowed, plan.scale)
    if plan.beta is not None:
        check_beta(plan.beta)
    else:
        optimal_beta(plan.schedule.block_kv)


def _positive(name: str, value: float) -> float:
    if not _is_real(value) or not 0 < value < math.inf:
        raise wrong(name, "be a positive, finite number", repr(value))
    return float(value)


def _soft_cap(cap: float) -> float:
    cap = _positive("logits_soft_cap", cap)
    if not 1e-30 <= cap <= 1e30:  # it is divided by, and multiplied with, in float32
        raise wrong("logits_soft_cap", "lie between 1e-30 and 1e30", cap)
    return cap


def _rate(rate: float) -> float:
    if not _is_real(rate) or not 0 <= rate < 1:
        raise wrong("dropout_rate", "be a number in [0, 1)", repr(rate))
    return float(rate)


def _seeds(rate: float, key: Array | None, broadcast: bool, q: Array) -> Array | None:
    broadcast = _flag("dropout_broadcast", broadcast)
    if rate == 0:
        return None
    if key is None:
        way_out = "jax.random.key(seed) makes one."
        raise wrong("dropout_key", "be given where dropout_rate is not 0", None, way_out)
    array = jnp.asarray(key)
    typed = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    if array.ndim != (0 if typed else 1) or not (typed or array.dtype == jnp.uint32):
        raise wrong("dropout_key", "be one key of jax.random", f"{array.dtype}{list(array.shape)}")
    return _dropout.seeds(array, q.shape[0], q.shape[2], broadcast=broadcast)


def _window(window: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if window is None:
        return None
    pair = tuple(window) if isinstance(window, (tuple, list)) else (window, window)
    if len(pair) != 2 or not all(_is_size(w) for w in pair):
        raise wrong("local_window_size", "be a non-negative int or a pair of them", repr(window))
    # A window beyond any sequence is no window; sums with it must fit int32.
    return min(int(pair[0]), _FAR), min(int(pair[1]), _FAR)


_FAR = 2**30


def _is_size(x: Any) -> bool:
    return isinstance(x, (int, np.integer)) and not isinstance(x, bool) and int(x) >= 0


def _broadcastable(name: str, x: Array, full: tuple[int, ...]) -> Array:
    x = x.reshape((1,) * (4 - x.ndim) + x.shape) if x.ndim < 4 else x
    if x.ndim != 4 or any(a not in (1, b) for a, b in zip(x.shape, full, strict=True)):
        raise wrong(name, f"broadcast to [B, N, T, S] = {list(full)}", f"{x.shape}")
    return x


def _bias(bias: ArrayLike | None, full: tuple[int, ...], wide: jnp.dtype) -> Array | None:
    if bias is None:
        return None
    x = jnp.asarray(bias)
    if not _is_number_type(x.dtype):
        allowed = "be of a floating or an integer type"
        raise wrong("bias", allowed, str(x.dtype), "A bool array is a `mask`.")
    # No score is wider: what a wider bias says of hidden keys must be said in its type.
    if jnp.issubdtype(x.dtype, jnp.integer) or x.dtype.itemsize > wide.itemsize:
        x = x.astype(wide)
    return _broadcastable("bias", x, full)


def _mask_array(mask: ArrayLike | None, full: tuple[int, ...]) -> Array | None:
    if mask is None:
        return None
    x = jnp.asarray(mask)
    if x.dtype != jnp.bool_:
        raise wrong("mask", "be of type bool", str(x.dtype), "An additive mask is a `bias`.")
    return _broadcastable("mask", x, full)


def _lengths(name: str, lengths: ArrayLike | None, x: Array) -> Array | None:
    if lengths is None:
        return None
    array = jnp.asarray(lengths)
    if array.shape != (x.shape[0],) or not jnp.issubdtype(array.dtype, jnp.integer):
        seen = f"{array.dtype}{list(array.shape)}"
        raise wrong(name, f"be integers of shape [B] = [{x.shape[0]}]", seen)
    # Clipped in its own type, by numbers that this type can hold.
    most = min(x.shape[1], int(jnp.iinfo(array.dtype).max))
    return jnp.clip(array, array.dtype.type(0), array.dtype.type(most)).astype(jnp.int32)


def _segments(ids: SegmentIds, q: Array, k: Array) -> tuple[Array, Array]:
    pair = ids if isinstance(ids, tuple) else (ids, ids)
    if len(pair) != 2:
        raise wrong(
            "segment_ids", "be one array or a pair (query's, key's)", f"{len(pair)} of them"
        )
    arrays = []
    for part, x in zip(pair, (q, k), strict=True):
        array = jnp.asarray(part)
        array = array[None] if array.ndim == 1 else array
        if array.shape != x.shape[:2] or not jnp.issubdtype(array.dtype, jnp.integer):
            allowed = f"be integers, {list(q.shape[:2])} for query and {list(k.shape[:2])} for key"
            raise wrong("segment_ids", allowed, f"{array.dtype}{list(array.shape)}")
        arrays.append(array)
    return _narrow_ids(*arrays)


def _narrow_ids(q: Array, k: Array) -> tuple[Array, Array]:
    """The ids as int32, equal where they were: those of 64 bits by their rank among all."""
    if max(q.dtype.itemsize, k.dtype.itemsize) <= 4:
        return q.astype(jnp.int32), k.astype(jnp.int32)
    q, k = (x if x.dtype == jnp.uint64 else x.astype(jnp.int64).astype(jnp.uint64) for x in (q, k))
    ranked = jnp.sort(jnp.concatenate([q.ravel(), k.ravel()]))
    q, k = (jnp.searchsorted(ranked, x).astype(jnp.int32) for x in (q, k))
    return q, k


def _sinks(sinks: ArrayLike | None, heads: int) -> Array | None:
    if sinks is None:
        return None
    x = jnp.asarray(sinks)
    if x.shape != (heads,) or not jnp.issubdtype(x.dtype, jnp.floating):
        raise wrong("sinks", f"be floating, of shape [N] = [{heads}]", f"{x.dtype}{list(x.shape)}")
    return x
