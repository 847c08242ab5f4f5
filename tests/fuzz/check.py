"""Runs a call and compares every element with its bound."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from tests.fuzz import bounds, oracle
from tests.fuzz.calls import Call


@dataclass(frozen=True)
class Failure:
    """One result of a call that is not what was promised."""

    call: Call
    what: str  # "output", "log-sum-exp", "d query", …
    kind: str  # "not finite", "beyond the bound", "should be NaN", "moved by what is hidden"
    index: tuple[int, ...]
    found: float
    true: float
    bound: float
    cotangents: tuple[np.ndarray, np.ndarray] | None = None
    known: str | None = None

    @property
    def ratio(self) -> float:
        return abs(self.found - self.true) / self.bound if self.bound else np.inf


@dataclass
class Tally:
    """What has been checked."""

    outputs: int = 0
    gradients: int = 0
    failures: list[Failure] = field(default_factory=list)
    ratios: dict[str, list[float]] = field(default_factory=dict)

    def note(self, what: str, ratio: float) -> None:
        self.ratios.setdefault(what, []).append(ratio)


def outputs(call: Call, found: tuple[Any, Any], tally: Tally) -> tuple[Any, Any]:
    """Checks output [B, T, N, E] and log-sum-exp [B, T, N]; returns truth and bounds."""
    with np.errstate(all="ignore"):
        true = oracle.truth(call)
        allowed = bounds.forward(call, true)
    out, lse = (np.asarray(y).astype(true.out.dtype).swapaxes(1, 2) for y in found)
    tally.outputs += 1
    excused = allowed.excused | _too_coarse_for_parts(call, true)
    free = excused | true.bad
    top = bounds.TOP[call.signature.dtype]
    clipped = np.clip(true.out, -top, top)
    tally.failures += _compare(call, "output", out, clipped, allowed.out, free[..., None], tally)
    limit = float(np.finfo(np.float32 if call.signature.dtype != "float64" else np.float64).max)
    exact = np.clip(true.lse, -limit, limit)
    tally.failures += _compare(call, "log-sum-exp", lse, exact, allowed.lse, free, tally)
    kept = true.bad[..., None] & ~np.isnan(out) & ~excused[..., None]
    tally.failures += _first(call, "output", "should be NaN", kept, out, np.nan, 0.0)
    return true, allowed


def _too_coarse_for_parts(call: Call, true: Any) -> np.ndarray:
    """[B, N, T] rows of which the log-sum-exp of a part, a float32 number, weighs too coarsely."""
    with np.errstate(invalid="ignore"):
        top = np.abs(np.where(true.seen, true.scores, 0)).max(-1)
        return np.full(top.shape, bool(call.signature.cuts)) & ~(top < 1e3)


def gradients(
    call: Call,
    true: Any,
    allowed: Any,
    d_out: np.ndarray,
    d_lse: np.ndarray,
    found: Any,
    tally: Tally,
) -> None:
    """Checks the gradients by name, unless a row is NaN or excused."""
    skipped = allowed.excused | true.bad | allowed.cut | _too_coarse_for_parts(call, true)
    x = call.signature
    # Each part rounds its gradients to the inputs' type, and their sum may be far smaller.
    rounded = bool(x.cuts) and x.dtype in ("bfloat16", "float16")
    if np.any(skipped) or rounded or not in_range(call, d_out):
        return
    with np.errstate(all="ignore"):
        back = oracle.backward(call, true, d_out, d_lse)
        limits = bounds.gradients(call, true, allowed, back)
    tally.gradients += 1
    for name, grad in found.items():
        seen = np.asarray(grad).astype(true.out.dtype)
        exact, bound = np.asarray(back.grads[name]), np.asarray(limits[name])
        top = bounds.TOP[str(call.arrays[name].dtype)]
        beyond = np.abs(exact) + bound >= 0.99 * top  # its type cannot hold it
        for failure in _compare(call, f"d {name}", seen, exact, bound, beyond, tally):
            tally.failures.append(_with(failure, cotangents=(d_out, d_lse)))


def in_range(call: Call, d_out: np.ndarray) -> bool:
    """Whether the gradient's products stay far from float32's largest number."""
    q, k, v = (
        float(np.max(np.where(np.isfinite(y), np.abs(y), 0), initial=0))
        for y in (call.arrays[n].astype(float) for n in ("query", "key", "value"))
    )
    top = float(np.abs(d_out.astype(float)).max(initial=0))
    sizes = [max(q, k, 1)] * 2 + [max(v, 1), max(top, 1)]
    return sum(np.log10(x) for x in sizes) < 30


def _with(failure: Failure, **fields: Any) -> Failure:
    return replace(failure, **fields)


def _compare(
    call: Call,
    what: str,
    found: np.ndarray,
    true: np.ndarray,
    bound: np.ndarray,
    free: np.ndarray,
    tally: Tally,
) -> list[Failure]:
    """At most one failure of each kind: the worst element."""
    free = np.broadcast_to(free, found.shape)
    with np.errstate(all="ignore"):
        error = np.abs(found - true)
        ratio = np.where(free, 0, np.where(error == 0, 0, error / bound))
    bad = ~np.isfinite(found) & ~free
    checked = ratio[~free & np.isfinite(ratio)]
    if checked.size:
        tally.note(what, float(checked.max()))
    failures = _first(call, what, "not finite", bad, found, true, bound)
    over = (ratio > 1) & ~bad
    if over.any():
        worst = np.unravel_index(np.argmax(np.where(over, ratio, 0)), ratio.shape)
        failures += [_failure(call, what, "beyond the bound", worst, found, true, bound)]
    return failures


def _first(
    call: Call, what: str, kind: str, where: np.ndarray, found: Any, true: Any, bound: Any
) -> list[Failure]:
    if not where.any():
        return []
    index = tuple(int(i) for i in np.argwhere(where)[0])
    return [_failure(call, what, kind, index, found, true, bound)]


def _failure(
    call: Call, what: str, kind: str, index: Any, found: Any, true: Any, bound: Any
) -> Failure:
    index = tuple(int(i) for i in index)
    numbers = [float(np.broadcast_to(y, found.shape)[index]) for y in (found, true, bound)]
    if what in ("output", "log-sum-exp"):  # as the caller sees it: positions before heads
        index = (index[0], index[2], index[1], *index[3:])
    return Failure(call, what, kind, index, *numbers)


def spoiled(call: Call, rubbish: float) -> Call | None:
    """The call with ``rubbish`` in keys and values that no query sees, and in padding queries."""
    x, seen = call.signature, oracle.conditions(call)
    groups = x.n // x.k
    hidden = ~seen.all.any(2).reshape(x.b, x.k, groups, x.s).any(2)  # [B, K, S]
    padding = ~np.broadcast_to(seen.rows[:, 0, :, 0], (x.b, x.t))
    if not hidden.any() and not padding.any():
        return None
    arrays = dict(call.arrays)
    where = {"query": padding[:, :, None, None]}
    where |= dict.fromkeys(("key", "value"), hidden.swapaxes(1, 2)[..., None])
    for name, at in where.items():
        filled = np.where(at, jnp.asarray(rubbish, arrays[name].dtype), arrays[name])
        arrays[name] = filled.astype(arrays[name].dtype)
    return Call(x, arrays, {**call.kinds, "hidden": str(rubbish)})
