"""The checks of the public function's arguments, one function for each argument.

Each returns the argument in its canonical form, or raises a ValueError that names it.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pasa_jax.core import dropout as _dropout
from pasa_jax.core.block_mask import BlockMask
from pasa_jax.core.checks import flag, is_real, positive
from pasa_jax.core.errors import check_choice, wrong
from pasa_jax.core.low_rank import LowRankBias
from pasa_jax.core.operands import Factors
from pasa_jax.core.plan import Plan
from pasa_jax.core.precision import FLOATS, POLYNOMIALS, Precision
from pasa_jax.core.schedule import Schedule
from pasa_jax.core.shifts import SHIFTS, check_beta, optimal_beta
from pasa_jax.core.target import find_target, target_of_device
from pasa_jax.core.tile import wide_type

Array = jax.Array
SegmentIds = ArrayLike | tuple[ArrayLike, ArrayLike]


def query_key_value(q: ArrayLike, k: ArrayLike, v: ArrayLike) -> tuple[Array, Array, Array]:
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


def precision(
    given: str | Precision | None, dtype: str, shift: str, target: str = "cpu"
) -> Precision:
    if given is None and shift == "bound":
        # A weight may be 2^-100, which float16 does not hold.
        narrow = "bfloat16" if dtype == "bfloat16" else wide_type(jnp.dtype(dtype)).name
        resolved = replace(Precision.named(wide_type(jnp.dtype(dtype)).name), probabilities=narrow)
    elif given is None:
        resolved = Precision.named(dtype)
    elif isinstance(given, Precision):
        resolved = given
    elif given == "int8":  # the name says nothing of what is not a product
        resolved = replace(Precision.named(dtype), scores="float32", products="int8")
    else:
        resolved = Precision.named(given)
    wide = "float64" in dataclasses.astuple(resolved)
    if wide != (dtype == "float64"):
        way_out = "Cast query, key and value instead."
        raise wrong(
            "precision", "be float64 for float64 inputs and only for them", resolved, way_out
        )
    if resolved.products == "float16" and dtype != "float16":
        allowed = 'have products="float32" for inputs that are not float16'
        raise wrong("precision", allowed, resolved, "Cast query, key and value to float16.")
    if resolved.eight_bits:
        _products_of_8_bits(resolved, dtype, shift, target)
    if shift == "bound" and not _wide_enough(resolved, target):
        allowed = (
            "store all but the probabilities in float32, and those not in float16, for 'bound'"
        )
        way_out = "Its weights and scores are far from 1. Leave `precision` out."
        raise wrong("precision", allowed, resolved, way_out)
    return resolved


def _products_of_8_bits(precision: Precision, dtype: str, shift: str, target: str) -> None:
    """Raises unless products may have 8 bits."""
    if dtype == "float64" or precision.scores != "float32":
        allowed = 'have scores="float32", for inputs that are not float64, beside products="int8"'
        raise wrong("precision", allowed, precision)
    if shift not in ("auto", "mean"):
        allowed = (
            "be 'auto' or 'mean' beside products of 8 bits, whose keys lose their block's mean"
        )
        raise wrong("shift", allowed, repr(shift))
    if not find_target(target).accumulator_reachable:
        allowed = 'have products="float32" where the target rounds products'
        raise wrong("precision", allowed, f"'int8' for {target}")


def _wide_enough(precision: Precision, target: str) -> bool:
    """Whether weights of 2^-100, and scores as far below their reference, can be stored.

    Where ``target`` rounds products, float16 may hold scores that the reference is taken off later.
    """
    wide = {precision.scores, precision.statistics, precision.accumulator}
    if not find_target(target).accumulator_reachable:
        wide -= {"float16"} - {precision.statistics, precision.accumulator}
    return (
        wide <= {"float32", "float64"}
        and precision.products == "float32"
        and precision.probabilities != "float16"
        and precision.exponential in (None, "float32", "float64", *POLYNOMIALS)
    )


def scale(given: ArrayLike | None, q: Array) -> tuple[Array, float | None]:
    """1/α as an array, and as a number where it is one."""
    wide = wide_type(q.dtype)
    if given is None:
        given = 1 / math.sqrt(q.shape[-1])
    if is_real(given):
        if not abs(given) <= float(jnp.finfo(wide).max):  # NaN is not, either
            raise wrong("scale", f"be finite in {wide}", given)
        return jnp.asarray(given, wide), float(given)
    if not isinstance(given, (jax.Array, np.ndarray)) or not _is_number_type(given.dtype):
        raise wrong("scale", "be a real number or a scalar array of one", repr(given))
    array = jnp.asarray(given)
    if array.ndim != 0:
        raise wrong("scale", "be a number or a scalar array", f"shape {array.shape}")
    return array.astype(wide), None


def _is_number_type(dtype: jnp.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def schedule(
    given: Schedule | None,
    q: Array,
    k: Array,
    v: Array,
    is_causal: bool,
    window: tuple[int, int] | None,
    block_size: tuple[int, int] | None = None,
) -> Schedule:
    """The tiles; by default no larger than the blocks of a block mask."""
    if given is None:
        device = jax.devices()[0]
        target = target_of_device(device.platform, device.device_kind)
        sizes = {"head_dim": q.shape[3], "value_head_dim": v.shape[3], "dtype": str(q.dtype)}
        sizes |= {"length": k.shape[1], "is_causal": is_causal}
        if window is not None and window[0] < k.shape[1]:
            sizes["window"] = window[0]
        given = Schedule.for_target(target, **sizes)
        if block_size is not None:
            rows = block_size[0] * (q.shape[2] // k.shape[2])
            given = given.fitted(rows, block_size[1])
    elif isinstance(given, Schedule):
        given.check(head_dim=q.shape[3], value_head_dim=v.shape[3], dtype=str(q.dtype))
    else:
        raise wrong("schedule", "be a pasa_jax.Schedule or None", repr(given))
    # A block longer than the sequence has the sequence's length: its mean is over real keys.
    return given.fitted(given.block_q, k.shape[1])


def shift(plan: Plan) -> None:
    """Raises unless the shift, β and the scale fit together."""
    check_choice("shift", plan.shift, ("auto", *SHIFTS))
    if plan.shift == "bound" and plan.modified:
        way_out = "A function may return anything, so nothing bounds its scores. Use 'auto'."
        raise wrong("shift", "be another than 'bound' beside a score_mod", "'bound'", way_out)
    if plan.shift == "bound" and plan.rounds_products and not plan.centred:
        seen = f"'bound' beside {plan.schedule.target}, which rounds products first"
        raise wrong("shift", "be another than 'bound' where products are rounded", seen)
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


def soft_cap(cap: float) -> float:
    cap = positive("logits_soft_cap", cap)
    if not 1e-30 <= cap <= 1e30:  # float32 must hold it and its inverse
        raise wrong("logits_soft_cap", "lie between 1e-30 and 1e30", cap)
    return cap


def dropout_rate(rate: float) -> float:
    if not is_real(rate) or not 0 <= rate < 1:
        raise wrong("dropout_rate", "be a number in [0, 1)", repr(rate))
    return float(rate)


def seeds(rate: float, key: Array | None, broadcast: bool, q: Array) -> Array | None:
    broadcast = flag("dropout_broadcast", broadcast)
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


def _broadcastable(name: str, x: Array, full: tuple[int, ...]) -> Array:
    x = x.reshape((1,) * (4 - x.ndim) + x.shape) if x.ndim < 4 else x
    if x.ndim != 4 or any(a not in (1, b) for a, b in zip(x.shape, full, strict=True)):
        raise wrong(name, f"broadcast to [B, N, T, S] = {list(full)}", f"{x.shape}")
    return x


def bias(given: ArrayLike | None, full: tuple[int, ...], wide: jnp.dtype) -> Array | None:
    if given is None:
        return None
    x = jnp.asarray(given)
    if not _is_number_type(x.dtype):
        allowed = "be of a floating or an integer type"
        raise wrong("bias", allowed, str(x.dtype), "A bool array is a `mask`.")
    # A bias of a wider type than the scores is cast first: its lowest number then hides keys too.
    if jnp.issubdtype(x.dtype, jnp.integer) or x.dtype.itemsize > wide.itemsize:
        x = x.astype(wide)
    return _broadcastable("bias", x, full)


def factors(given: LowRankBias, full: tuple[int, int, int, int], wide: jnp.dtype) -> Factors:
    """The factors of a bias of low rank, [B|1, N|1, R, …]."""
    b, n, t, s = full
    arrays = []
    for name, x, length in (("q_factors", given.q_factors, t), ("k_factors", given.k_factors, s)):
        x = jnp.asarray(x)
        fits = x.ndim in (2, 3, 4) and _is_number_type(x.dtype)
        x = x.reshape((1,) * (4 - x.ndim) + x.shape) if x.ndim < 4 else x
        if not fits or x.shape[0] not in (1, b) or x.shape[1] not in (1, n) or x.shape[2] != length:
            allowed = f"have numbers [B, N, {length}, R], with B = {b} or 1 and N = {n} or 1"
            raise wrong(f"bias.{name}", allowed, f"{x.dtype}{list(x.shape)}")
        arrays.append(x.astype(wide))
    q, k = arrays
    if q.shape[3] != k.shape[3] or q.shape[3] == 0:
        allowed = f"have the rank of q_factors, {q.shape[3]}, at least 1"
        raise wrong("bias.k_factors", allowed, k.shape[3])
    scale = jnp.asarray(given.scale)
    scale = scale.reshape((1,) * (2 - scale.ndim) + scale.shape) if scale.ndim < 2 else scale
    fits = scale.ndim == 2 and scale.shape[0] in (1, b) and scale.shape[1] in (1, n)
    if not fits or not _is_number_type(scale.dtype):
        allowed = f"be a number, [N] or [B, N], with B = {b} or 1 and N = {n} or 1"
        raise wrong("bias.scale", allowed, f"{scale.dtype}{list(scale.shape)}")
    return Factors(jnp.swapaxes(q, 2, 3), jnp.swapaxes(k, 2, 3), scale.astype(wide))


def positions(
    q_given: ArrayLike | None, kv_given: ArrayLike | None, q: Array, k: Array, alignment: str
) -> tuple[Array | None, Array | None]:
    """[B|1, T] and [B|1, S] int32; (None, None) where neither is given."""
    if q_given is None and kv_given is None:
        return None, None
    if alignment != "top_left":
        way_out = "Positions say where queries stand; shift q_positions instead."
        raise wrong("causal_alignment", "be 'top_left' beside positions", repr(alignment), way_out)
    arrays = []
    for name, given, x in (("q_positions", q_given, q), ("kv_positions", kv_given, k)):
        length = x.shape[1]
        array = jnp.arange(length, dtype=jnp.int32) if given is None else jnp.asarray(given)
        array = array[None] if array.ndim == 1 else array
        fits = array.ndim == 2 and array.shape[1] == length and array.shape[0] in (1, x.shape[0])
        if not fits or not jnp.issubdtype(array.dtype, jnp.integer):
            allowed = f"be integers, [B, {length}] or [{length}]"
            raise wrong(name, allowed, f"{array.dtype}{list(array.shape)}")
        # Far enough from the ends of int32 for a window.
        far = min(2**30, int(jnp.iinfo(array.dtype).max))
        low = max(-(2**30), int(jnp.iinfo(array.dtype).min))
        arrays.append(
            jnp.clip(array, array.dtype.type(low), array.dtype.type(far)).astype(jnp.int32)
        )
    return arrays[0], arrays[1]


def block_mask(given: BlockMask | None, full: tuple[int, int, int, int]) -> Array | None:
    """[B|1, N|1, rows, columns] int8, the kinds of its blocks."""
    if given is None:
        return None
    if not isinstance(given, BlockMask):
        way_out = "create_block_mask or BlockMask.from_kv_blocks makes one."
        raise wrong("block_mask", "be a BlockMask", repr(type(given)), way_out)
    b, n, *lengths = given.shape
    if tuple(lengths) != full[2:] or b not in (1, full[0]) or n not in (1, full[1]):
        allowed = f"be of B = {full[0]} or 1, N = {full[1]} or 1, T = {full[2]}, S = {full[3]}"
        raise wrong("block_mask", allowed, f"{given.shape}")
    return given.kinds


def mask(given: ArrayLike | None, full: tuple[int, ...]) -> Array | None:
    if given is None:
        return None
    x = jnp.asarray(given)
    if x.dtype != jnp.bool_:
        raise wrong("mask", "be of type bool", str(x.dtype), "An additive mask is a `bias`.")
    return _broadcastable("mask", x, full)


def lengths(name: str, given: ArrayLike | None, x: Array) -> Array | None:
    if given is None:
        return None
    array = jnp.asarray(given)
    if array.shape != (x.shape[0],) or not jnp.issubdtype(array.dtype, jnp.integer):
        seen = f"{array.dtype}{list(array.shape)}"
        raise wrong(name, f"be integers of shape [B] = [{x.shape[0]}]", seen)
    # Clipped in its own type, by numbers that this type can hold.
    most = min(x.shape[1], int(jnp.iinfo(array.dtype).max))
    return jnp.clip(array, array.dtype.type(0), array.dtype.type(most)).astype(jnp.int32)


def segments(ids: SegmentIds, q: Array, k: Array) -> tuple[Array, Array]:
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
    """The ids as int32, equal where they were equal: ids of 64 bits become their ranks."""
    if max(q.dtype.itemsize, k.dtype.itemsize) <= 4:
        return q.astype(jnp.int32), k.astype(jnp.int32)
    q, k = (x if x.dtype == jnp.uint64 else x.astype(jnp.int64).astype(jnp.uint64) for x in (q, k))
    ranked = jnp.sort(jnp.concatenate([q.ravel(), k.ravel()]))
    q, k = (jnp.searchsorted(ranked, x).astype(jnp.int32) for x in (q, k))
    return q, k


def sinks(given: ArrayLike | None, heads: int) -> Array | None:
    if given is None:
        return None
    x = jnp.asarray(given)
    if x.shape != (heads,) or not jnp.issubdtype(x.dtype, jnp.floating):
        raise wrong("sinks", f"be floating, of shape [N] = [{heads}]", f"{x.dtype}{list(x.shape)}")
    return x
