"""Random calls of `dot_product_attention`: signatures, which are compiled once, and data for them.

A signature holds the shapes and all that is static; a call is a signature with NumPy arrays.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pasa_jax import Precision, Schedule, dot_product_attention, merge, partial_attention
from tests.fuzz.functions import FUNCTIONS, as_arguments

Rng = np.random.Generator
DIFFERENTIABLE = ("query", "key", "value", "bias", "sinks", "scale")
INTEGERS = ("int32", "int8", "int16", "uint8", "uint32")


@dataclass(frozen=True)
class Signature:
    """Shapes by letter, the static keywords, and (shape, type) of each further array.

    Keys are cut at ``cuts``, and the parts merged.
    """

    dtype: str
    b: int
    t: int
    s: int
    n: int
    k: int
    d: int
    e: int
    static: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    batched: bool = True
    cuts: tuple[int, ...] = ()

    @property
    def schedule(self) -> Schedule:
        return self.static["schedule"]

    @property
    def full(self) -> tuple[int, int, int, int]:
        return (self.b, self.n, self.t, self.s)

    def call(self, arrays: dict[str, Any]) -> tuple[Any, Any]:
        """Output [B, T, N, E] and log-sum-exp [B, T, N]."""
        arrays, static = as_arguments(arrays, self.static)
        if not self.batched:
            arrays |= {name: arrays[name][0] for name in ("query", "key", "value")}
        if self.cuts:
            out, lse = by_parts(arrays, static, self.cuts)
        else:
            out, lse = dot_product_attention(**arrays, **static, return_residual=True)
        return (out, lse) if self.batched else (out[None], lse[None])


def by_parts(
    arrays: dict[str, Any], static: dict[str, Any], cuts: tuple[int, ...]
) -> tuple[Any, Any]:
    """Output and log-sum-exp of the parts of a call whose keys are cut at ``cuts``."""
    parts = []
    for a, b in itertools.pairwise([0, *cuts, arrays["key"].shape[-3]]):
        part = {name: x for name, x in arrays.items() if name != "sinks"}
        for name in ("key", "value"):
            part[name] = part[name][..., a:b, :, :]
        for name in ("mask", "bias"):
            if name in part and part[name].shape[-1] > 1:
                part[name] = part[name][..., a:b]
        if "segment_ids" in part:
            part["segment_ids"] = (part["segment_ids"][0], part["segment_ids"][1][..., a:b])
        if "key_value_seq_lengths" in part:
            lengths = jnp.asarray(part["key_value_seq_lengths"], jnp.int32)
            part["key_value_seq_lengths"] = jnp.clip(lengths - a, 0, b - a)
        parts.append(partial_attention(**part, **static))
    out, lse = merge(*parts).output(arrays.get("sinks"))
    dtype = arrays["query"].dtype
    largest = float(jnp.finfo(dtype).max)
    return jnp.clip(out, -largest, largest).astype(dtype), lse


@dataclass(frozen=True)
class Call:
    """A signature with its arrays, and the names of what they were filled with."""

    signature: Signature
    arrays: dict[str, np.ndarray]
    kinds: dict[str, str]


def compiled(signature: Signature) -> Callable[[dict[str, Any]], tuple[Any, Any]]:
    """arrays -> (output, log-sum-exp), compiled once."""
    return jax.jit(signature.call)


def compiled_gradient(signature: Signature) -> Callable[..., tuple[Any, Any, dict[str, Any]]]:
    """(arrays, d_out, d_lse) -> (output, log-sum-exp, gradients by name), compiled once."""

    def run(arrays: dict[str, Any], d_out: Any, d_lse: Any) -> tuple[Any, Any, dict[str, Any]]:
        moving = {
            name: x
            for name, x in arrays.items()
            if name in DIFFERENTIABLE and jnp.issubdtype(x.dtype, jnp.floating)
        }
        still = {name: x for name, x in arrays.items() if name not in moving}
        (out, lse), back = jax.vjp(lambda x: signature.call({**x, **still}), moving)
        return out, lse, back((d_out, d_lse))[0]

    return jax.jit(run)


# Signatures.


def draw_signature(rng: Rng, dtypes: tuple[str, ...]) -> Signature:
    """A random signature that the documentation allows."""
    dtype = str(rng.choice(dtypes))
    groups, heads = int(rng.choice([1, 1, 2, 4])), int(rng.choice([1, 2]))
    schedule = _schedule(rng)
    t = _edge(rng, max(1, schedule.block_q // groups))
    s = _edge(rng, schedule.block_kv)
    if rng.random() < 0.04:  # longer than a narrow integer can say
        t, s = int(rng.choice([40, 130, 200])), int(rng.choice([140, 260]))
    if rng.random() < 0.15:
        s = t
    b, d = int(rng.choice([1, 2])), int(rng.choice([4, 8, 16, 24]))
    e = int(rng.choice([d, d, 3, 12]))
    static = _arithmetic(rng, dtype, schedule) | _conditions(rng)
    full = (b, groups * heads, t, s)
    extra = _extra(rng, full, dtype, static)
    batched = b > 1 or rng.random() < 0.5
    signature = Signature(dtype, b, t, s, groups * heads, heads, d, e, static, extra, batched)
    names = {*static, *extra}
    whole = names & {"is_causal", "local_window_size", "mask_mod", "kinds", "q_factors"}
    if s == 1 or whole or not _block_free(static) or rng.random() < 0.6:
        return signature
    cuts = {int(x) for x in rng.integers(1, s, size=int(rng.choice([1, 2])))}
    return replace(signature, cuts=tuple(sorted(cuts)))


def _block_free(static: dict[str, Any]) -> bool:
    """Whether what is rounded does not depend on where blocks of keys begin."""
    if static.get("shift") not in ("none", "reference", "bound"):
        return False
    named = (
        isinstance(static.get("precision", "float32"), str) and static.get("precision") != "paper"
    )
    return named and static["schedule"].target != "ascend_910b"


def _edge(rng: Rng, block: int) -> int:
    """A length at the edge of a whole number of blocks, or one."""
    times = int(rng.choice([1, 1, 2, 2, 3]))
    return max(1, int(rng.choice([1, *[block * times + x for x in (-1, 0, 1, block // 2)] * 3])))


def _schedule(rng: Rng) -> Schedule:
    targets = ["cpu"] * 6 + ["ascend_910b"] * 4 + ["ascend_950", "h100", "tpu_v6e"]
    return Schedule(
        block_q=int(rng.choice([16, 16, 24, 32])),
        block_kv=int(rng.choice([8, 16, 16, 32])),
        unroll=int(rng.choice([1, 1, 1, 2])),
        batch_heads=bool(rng.random() < 0.2),
        target=str(rng.choice(targets)),
    )


def _arithmetic(rng: Rng, dtype: str, schedule: Schedule) -> dict[str, Any]:
    """Implementation, shift and precision."""
    if dtype == "float64":
        shift = str(rng.choice(["auto", "none", "mean", "mean_past", "reference", "bound"]))
        schedule = replace(schedule, target="cpu")  # the others have no memory for it, or no unit
        return {"schedule": schedule, "shift": shift, "implementation": "lax"}
    if rng.random() < 0.06:
        return {"schedule": schedule, "implementation": "reference"}
    shifts = ["auto"] * 4 + ["none", "paper", "mean", "mean", "mean_past", "reference", "reference"]
    found: dict[str, Any] = {"schedule": schedule, "implementation": "lax"}
    if schedule.target != "ascend_910b":
        shifts += ["bound", "bound"]
    found["shift"] = str(rng.choice(shifts))
    if found["shift"] == "bound":  # it has types of its own
        return found
    if found["shift"] == "paper":
        found["beta"] = float(rng.choice([0.9375, 0.96875, 0.984497]))
    chance = rng.random()
    if chance < 0.35:
        names = ["float16", "bfloat16", "float32", "paper"]
        found["precision"] = str(rng.choice(names, p=[0.35, 0.3, 0.2, 0.15]))
    elif chance < 0.6:
        found["precision"] = _precision(rng, dtype)
    return found


def _precision(rng: Rng, dtype: str) -> Precision:
    types = ["float16", "bfloat16", "float32"]
    products = "float16" if dtype == "float16" and rng.random() < 0.4 else "float32"
    narrow = rng.random() < 0.15
    exponential = [None, None, "float16", "bfloat16", "float32"]
    return Precision(
        scores=str(rng.choice(types)),
        probabilities=str(rng.choice(types)),
        statistics="float16" if narrow and rng.random() < 0.6 else "float32",
        accumulator="float16" if narrow and rng.random() < 0.6 else "float32",
        products=products,
        exponential=exponential[int(rng.integers(5))],
    )


def _conditions(rng: Rng) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if rng.random() < 0.35:
        found["is_causal"] = True
    if rng.random() < 0.25:
        pair = (int(rng.choice([0, 1, 7, 16, 40])), int(rng.choice([0, 3, 16])))
        found["local_window_size"] = pair if rng.random() < 0.7 else pair[0]
    if rng.random() < 0.3:
        found["causal_alignment"] = "bottom_right"
    if rng.random() < 0.2:
        found["logits_soft_cap"] = float(rng.choice([1.5, 5.0, 30.0]))
    return found


def _extra(
    rng: Rng, full: tuple[int, ...], dtype: str, static: dict[str, Any]
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Which further arrays there are, their shapes and types; a number for scale in ``static``."""
    b, n, t, s = full
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    if rng.random() < 0.25:
        found["mask"] = (_broadcast(rng, full), "bool")
    if rng.random() < 0.3:
        kind = str(rng.choice(["float32", "float32", dtype, "int32"], p=[0.4, 0.3, 0.27, 0.03]))
        found["bias"] = (_broadcast(rng, full), kind)
    for name in ("query_seq_lengths", "key_value_seq_lengths"):
        if rng.random() < 0.25:
            found[name] = ((b,), str(rng.choice(INTEGERS, p=[0.4, 0.2, 0.1, 0.2, 0.1])))
    if rng.random() < 0.12:
        found["query_segments"], found["key_segments"] = ((b, t), "int32"), ((b, s), "int32")
    placed = "is_causal" in static or "local_window_size" in static
    if placed and "causal_alignment" not in static and rng.random() < 0.25:
        found["q_positions"] = ((int(rng.choice([1, b])), t), "int32")
        found["kv_positions"] = ((int(rng.choice([1, b])), s), "int32")
    if rng.random() < 0.15:
        static["mask_mod"] = str(rng.choice(list(FUNCTIONS)))
    if rng.random() < 0.15:
        block = (int(rng.choice([8, 10, 32])), int(rng.choice([5, 16, 24])))
        counts = (-(-t // block[0]), -(-s // block[1]))
        static["block"] = block
        found["kinds"] = ((int(rng.choice([1, b])), int(rng.choice([1, n])), *counts), "int8")
    if "bias" not in found and rng.random() < 0.15:
        rank, lead = int(rng.choice([1, 2, 5])), [(), (n,), (b, 1)]
        found["q_factors"] = ((*lead[int(rng.integers(3))], t, rank), "float32")
        found["k_factors"] = ((*lead[int(rng.integers(3))], s, rank), "float32")
    if rng.random() < 0.2:
        found["sinks"] = ((n,), str(rng.choice(["float32", dtype])))
    chance = rng.random()
    if chance < 0.25 and static.get("shift") != "paper":
        found["scale"] = ((), "float32")
    elif chance < 0.5:
        gentle = static.get("shift") == "paper"
        numbers = [0.1, 0.7, 1.0, -0.2, 3.0] + ([] if gentle else [0.0, 40.0, 1e-3])
        static["scale"] = float(rng.choice(numbers))
    return found


def _broadcast(rng: Rng, full: tuple[int, ...]) -> tuple[int, ...]:
    """A shape that broadcasts to ``full``."""
    shape = tuple(x if rng.random() < 0.6 else 1 for x in full)
    return shape[2:] if shape[:2] == (1, 1) and rng.random() < 0.5 else shape


# Data.

MILD = ("normal", "normal", "normal", "biased", "waves", "spikes", "heavy", "zeros", "small")
HARD = ("maxima", "signs", "subnormal", "loud", "spread", "one huge")


def draw_call(signature: Signature, rng: Rng, *, hard: bool) -> Call:
    """Random arrays for ``signature``; ``hard``: up to the edge of their type.

    Otherwise sizes are such that gradients stay far from float32's largest number.
    """
    x, dtype = signature, signature.dtype
    arrays: dict[str, np.ndarray] = {}
    kinds: dict[str, str] = {}
    shapes = {
        "query": (x.b, x.t, x.n, x.d),
        "key": (x.b, x.s, x.k, x.d),
        "value": (x.b, x.s, x.k, x.e),
    }
    wave = rng.uniform(0.2, 2), rng.uniform(0, 6)
    for name, shape in shapes.items():
        choice = HARD if hard and rng.random() < 0.5 else MILD
        kinds[name] = str(rng.choice(choice))
        arrays[name] = _fill(kinds[name], shape, dtype, rng, wave).astype(jnp.dtype(dtype))
    for name, (shape, kind) in x.extra.items():
        kinds[name], arrays[name] = _EXTRA[name](x, shape, kind, rng, hard)
    return Call(x, arrays, kinds)


def _fill(
    kind: str, shape: tuple[int, ...], dtype: str, rng: Rng, wave: tuple[float, float]
) -> np.ndarray:
    """float64 numbers within ``dtype``."""
    limits = jnp.finfo(dtype)
    top, tiny = float(limits.max), float(limits.smallest_subnormal)
    x = rng.standard_normal(shape)
    if kind == "biased":
        x = x + rng.choice([3.0, 10.0, 30.0]) * rng.choice([-1, 1], shape[-1:])
    elif kind == "waves":
        size, phase = rng.choice([1.0, 5.0, 30.0]), wave[1] + np.pi * rng.integers(2)
        x = size * np.sin(wave[0] * np.arange(shape[-1]) + phase) + 0.1 * x
    elif kind == "spikes":
        x = np.where(rng.random(shape) < 0.02, rng.choice([30.0, 500.0, 3000.0]) * x, x)
    elif kind == "heavy":
        x = x * 2.0 ** rng.uniform(-12, 8, shape)
    elif kind == "zeros":
        x = x * 0
    elif kind == "small":
        x = x * 2.0**-10
    elif kind == "maxima":
        x = np.full(shape, top) * rng.choice([-1, 1])
    elif kind == "signs":
        x = top * rng.choice([-1.0, 1.0], shape)
    elif kind == "subnormal":
        x = tiny * rng.integers(-3, 4, shape)
    elif kind == "loud":
        x = np.full(shape, 300.0)
    elif kind == "spread":
        low = -40 if dtype == "float16" else -60
        x = rng.choice([-1, 1], shape) * np.minimum(top, top * 2.0 ** rng.uniform(low, 0, shape))
    elif kind == "one huge":
        x[rng.integers(shape[0]), rng.integers(shape[1])] *= top * 2.0 ** rng.uniform(-12, -2)
    return np.clip(x, -top, top)


def _scale(x: Signature, shape: Any, dtype: str, rng: Rng, hard: bool) -> tuple[str, np.ndarray]:
    numbers = [0.0, 0.25, 0.3, 1.0, -0.4, 2.5, *([1e4, 1e-5, 1e30] if hard else [])]
    number = float(rng.choice(numbers))
    return f"{number:g}", np.asarray(number, dtype)


def _mask(x: Signature, shape: Any, dtype: str, rng: Rng, hard: bool) -> tuple[str, np.ndarray]:
    share = float(rng.choice([0.05, 0.5, 0.95]))
    found = rng.random(shape) < share
    if rng.random() < 0.3 and shape[-2] > 1:
        found[..., rng.integers(shape[-2]), :] = False
    return f"{share:g} seen", found


def _lengths(x: Signature, shape: Any, dtype: str, rng: Rng, full: int) -> tuple[str, np.ndarray]:
    limits = np.iinfo(dtype)
    choices = [0, 1, full, full, full - 1, int(rng.integers(full + 1)), full + 7, -3]
    picked = [int(np.clip(rng.choice(choices), limits.min, limits.max)) for _ in range(x.b)]
    return dtype, np.asarray(picked, dtype)


def _query_lengths(x: Signature, shape: Any, dtype: str, rng: Rng, hard: bool) -> Any:
    return _lengths(x, shape, dtype, rng, x.t)


def _key_lengths(x: Signature, shape: Any, dtype: str, rng: Rng, hard: bool) -> Any:
    return _lengths(x, shape, dtype, rng, x.s)


def _segments(x: Signature, shape: Any, dtype: str, rng: Rng, hard: bool) -> Any:
    found = rng.integers(0, 3, shape)
    return "ids", (np.sort(found, axis=1) if rng.random() < 0.6 else found).astype(dtype)


def _sinks(x: Signature, shape: Any, dtype: str, rng: Rng, hard: bool) -> Any:
    size = float(rng.choice([1.0, 1.0, 10.0, 1000.0]))
    return f"{size:g}", (size * rng.standard_normal(shape)).astype(jnp.dtype(dtype))


def _bias(x: Signature, shape: Any, dtype: str, rng: Rng, hard: bool) -> tuple[str, np.ndarray]:
    found = rng.standard_normal(shape)
    if dtype == "int32":
        return "integers", np.rint(3 * found).astype(np.int32)
    low = float(jnp.finfo(dtype).min)
    kinds = ["normal", "normal", "-inf", "alibi", "lowest", "huge"] + ["NaN", "1e30"] * hard
    kind = str(rng.choice(kinds))
    some = rng.random(shape) < 0.3
    if rng.random() < 0.3 and len(shape) > 1 and shape[-2] > 1:  # a whole row
        some[..., rng.integers(shape[-2]), :] = True
    if kind in ("-inf", "lowest", "NaN"):
        number = {"-inf": -np.inf, "lowest": low, "NaN": np.nan}[kind]
        some = some & (rng.random(shape) < 0.1) if kind == "NaN" else some
        found = np.where(some, number, found)
    elif kind == "alibi":
        i = np.arange(shape[-2])[:, None] if len(shape) > 1 else 0
        found = 0 * found - 0.5 * np.abs(i - np.arange(shape[-1]))
    elif kind == "huge":
        found = found + float(rng.choice([1e3, -1e3, 3e4, -3e4])) * (
            1 if rng.random() < 0.5 else some
        )
    elif kind == "1e30":
        found = np.where(some, np.clip(1e30, low, -low) * rng.choice([-1, 1]), found)
    return kind, found.astype(jnp.dtype(dtype))


def _positions(x: Signature, shape: Any, dtype: str, rng: Rng, hard: bool) -> Any:
    """Of a cache, a ring or a permutation: in any order, with repetitions, or far from 0."""
    length = shape[-1]
    kind = str(rng.choice(["in order", "rolled", "shuffled", "drawn", "far"]))
    base = np.broadcast_to(np.arange(length), shape)
    if kind == "rolled":
        base = (base + int(rng.integers(length + 1))) % length
    elif kind == "shuffled":
        base = rng.permuted(base, axis=1)
    elif kind == "drawn":
        base = rng.integers(-3, length + 3, shape)
    elif kind == "far":
        base = base + 2**29
    return kind, base.astype(dtype)


def _kinds(x: Signature, shape: Any, dtype: str, rng: Rng, hard: bool) -> tuple[str, np.ndarray]:
    share = float(rng.choice([0.1, 0.5, 0.9]))
    return f"{share:g} seen", (rng.integers(1, 3, shape) * (rng.random(shape) < share)).astype(
        dtype
    )


def _factors(x: Signature, shape: Any, dtype: str, rng: Rng, hard: bool) -> Any:
    size = float(rng.choice([0.3, 1.0, 1.0, 30.0]))
    return f"{size:g}", (size * rng.standard_normal(shape)).astype(dtype)


_EXTRA: dict[str, Any] = {
    "q_positions": _positions,
    "kv_positions": _positions,
    "kinds": _kinds,
    "q_factors": _factors,
    "k_factors": _factors,
    "mask": _mask,
    "bias": _bias,
    "query_seq_lengths": _query_lengths,
    "key_value_seq_lengths": _key_lengths,
    "query_segments": _segments,
    "key_segments": _segments,
    "sinks": _sinks,
    "scale": _scale,
}
