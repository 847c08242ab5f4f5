"""How far a result may be from the exact one: a bound for each element, from what is rounded where.

The derivation is section 9 of docs/algorithm.md; its equation numbers stand in the comments.
Everything is computed from the exact scores; nothing of the implementation is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from pasa_jax import Precision
from tests.fuzz.calls import Call, Signature
from tests.fuzz.oracle import Backward, Truth, over_groups, to_shape

LEAST_LOG2 = -2000.0  # of 0
SAFETY = 2.0  # what first order and a sum's order leave out
UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
# Half the least number of float16; of the others, the least that is not flushed to zero.
FLOOR = {"float16": 2.0**-25, "bfloat16": 2.0**-126, "float32": 2.0**-126, "float64": 2.0**-1022}
TOP = {name: float(jnp.finfo(name).max) for name in UNIT}


def log2_norm(y: np.ndarray) -> np.ndarray:
    """log2 of the Euclidean norm over the last axis, whose squares may leave float64."""
    top = y.max(-1, keepdims=True)
    part = y / np.where(top > 0, top, 1)
    with np.errstate(divide="ignore"):
        found = np.log2(top[..., 0]) + 0.5 * np.log2((part**2).sum(-1))
    return np.where(top[..., 0] > 0, found, LEAST_LOG2)


@dataclass(frozen=True)
class Arithmetic:
    """What is rounded to what: docs/api.md's table of settings, and section 6 of the algorithm."""

    dtype: str
    precision: Precision
    shifts: tuple[str, ...]  # the one that is taken, or those that may be
    reach: bool  # whether the float32 product is seen before it is rounded
    promised: bool  # whether finite inputs must give finite outputs

    @property
    def wide(self) -> str:
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def products(self) -> str:
        return "float16" if self.precision.products == "float16" else self.wide


def arithmetic(x: Signature) -> Arithmetic:
    """The arithmetic that the documentation names for a signature."""
    wide = "float64" if x.dtype == "float64" else "float32"
    if x.static["implementation"] == "reference":
        plain = Precision(scores=wide, probabilities=wide, statistics=wide, accumulator=wide)
        return Arithmetic(x.dtype, plain, ("none",), True, False)
    asked = x.static.get("precision", x.dtype)
    if x.static.get("shift") == "bound":
        asked = Precision.named(wide)
        if x.dtype == "bfloat16":
            asked = replace(asked, probabilities="bfloat16")
    p = Precision.named(asked) if isinstance(asked, str) else asked
    reach = x.schedule.target != "ascend_910b" and p.products != "float16"
    shift = x.static.get("shift", "auto")
    shifts = (shift,)
    if shift == "auto" and p.scores in ("float32", "float64") and p.products != "float16":
        shifts = ("none",)
    elif shift == "auto":
        shifts = ("reference",) if reach else ("none", "mean")
    narrow = "float16" in (p.statistics, p.accumulator)
    return Arithmetic(x.dtype, p, shifts, reach, shift != "none" and not narrow)


@dataclass(frozen=True)
class Scores:
    """Bounds on the error of each score."""

    raw: np.ndarray  # [B, N, T, S] before the soft cap
    rest: np.ndarray  # [B, N, T, S] after it
    common: np.ndarray  # [B, N, T] the same for every key of a row: the log-sum-exp alone sees it
    cut: np.ndarray  # [B, N, T] rows whose weights are promised to be finite and no more
    excused: np.ndarray  # [B, N, T] rows of which nothing is promised
    near: np.ndarray  # [B, N, T, S] a tile's largest exp(score − log-sum-exp), for each key


class Blocks:
    """Sums and maxima over the key blocks, [..., S] -> [..., S]: each key gets its block's."""

    def __init__(self, x: Signature) -> None:
        self.keys = x.s
        self.size = min(x.schedule.block_kv, x.s)
        self.count = -(-x.s // self.size)

    def each(self) -> Iterator[slice]:
        for j in range(self.count):
            yield slice(j * self.size, min((j + 1) * self.size, self.keys))

    def sum(self, a: np.ndarray) -> np.ndarray:
        return self._over(a, lambda y: y.sum(-1, keepdims=True))

    def mean(self, a: np.ndarray) -> np.ndarray:
        return self._over(a, lambda y: y.mean(-1, keepdims=True))

    def max(self, a: np.ndarray) -> np.ndarray:
        return self._over(a, lambda y: y.max(-1, keepdims=True))

    def max_before(self, a: np.ndarray, first: np.ndarray) -> np.ndarray:
        """The largest a of the blocks before a key's own; ``first`` where there is none."""
        found, running = np.empty_like(a), np.full((*a.shape[:-1], 1), -np.inf)
        for at in self.each():
            found[..., at] = np.where(np.isfinite(running), running, first[..., at])
            running = np.maximum(running, a[..., at].max(-1, keepdims=True))
        return found

    def _over(self, a: np.ndarray, reduce) -> np.ndarray:
        found = np.empty_like(a)
        for at in self.each():
            found[..., at] = reduce(a[..., at])
        return found


class Model:
    """The bounds on one call's scores."""

    def __init__(self, call: Call, true: Truth) -> None:
        self.call, self.true = call, true
        self.x = call.signature
        self.a = arithmetic(self.x)
        self.blocks = Blocks(self.x)
        self.factor = abs(float(true.scale))
        self.q, self.k = np.abs(true.q), np.abs(true.k)
        self.plain = true.product * true.scale  # before the soft cap
        self.size = self.factor * (self.q @ self.k.swapaxes(-1, -2))  # Σ|q||k|/α
        self.u_in, self.u_wide = UNIT[self.a.dtype], UNIT[self.a.wide]
        self.u_store = UNIT[self.a.precision.scores]
        self.u_stat = UNIT[self.a.precision.statistics]
        self.add = (self.x.d / 2 + 4) * self.u_wide  # of a sum of D products
        if self.a.products == "float16":
            self.add = (self.x.d + 4) * UNIT["float16"]
        self.lifted = self._lifted()

    # Sizes of rows.

    def row_max(self, y: np.ndarray) -> np.ndarray:
        """[B, N, T, 1]: the largest of the keys that the row sees, or 0."""
        return np.max(np.where(self.true.seen, y, 0), axis=-1, keepdims=True)

    def top(self, y: np.ndarray) -> np.ndarray:
        """y where the row sees the key, else −inf."""
        return np.where(self.true.seen, y, -np.inf)

    def visited(self, y: np.ndarray, least: float = 0.0) -> np.ndarray:
        """[B, N, T, 1]: the largest y [B, N, S] of the key tiles that a row's query tile visits;
        ``least`` where it visits none.
        """
        x, found = self.x, np.full((*self.true.lse.shape, 1), least)
        rows = max(1, min(x.schedule.block_q // (x.n // x.k), x.t))
        reach = self.blocks.max(self.true.parts.reach) & self.true.finite[:, :, None]
        for start in range(0, x.t, rows):
            first = min(start, x.t - rows)
            tile = reach[:, :, first : first + rows].any(2)
            largest = np.where(tile, y, least).max(-1)
            found[:, :, start : start + rows] = largest[..., None, None]
        return found

    def bound(self) -> np.ndarray:
        """[B, N, T, 1] log2 of twice ‖q‖·max‖k‖, of the tiles that are visited (eq. 12)."""
        of_q, of_k = log2_norm(self.q)[..., None], self.visited(log2_norm(self.k), least=LEAST_LOG2)
        return 1 + of_q + of_k

    def exponent(self) -> np.ndarray:
        """[B, N, T, 1] a bound on the guard's e, and on that of large keys."""
        if not self.a.promised:
            return np.zeros((*self.true.lse.shape, 1))
        stored = "float16" if "float16" in (self.a.precision.scores, self.a.products) else "wide"
        limit = {"float16": 14, "wide": 120 if self.a.wide == "float32" else 1000}[stored]
        if self.a.shifts == ("reference",) and self.a.reach and self.a.dtype == "float16":
            return np.zeros((*self.true.lse.shape, 1))
        scale = np.log2(self.factor) if self.factor else LEAST_LOG2
        wide = 120 if self.a.wide == "float32" else 1000
        e = np.maximum(self.bound() + scale - limit, self.bound() + max(scale, 0) - wide)
        e = np.where(self.a.dtype == "float16", self.bound() + scale - limit, e)
        if not self.a.reach:  # q/α has its own type
            norm_q = log2_norm(self.q)[..., None]
            e = np.maximum(e, norm_q + scale - (14 if self.a.dtype == "float16" else 119))
        largest = np.log2(np.maximum(self.visited(self.k.max(-1)), 1))
        return np.maximum(np.ceil(e), 0) + (
            np.maximum(largest - 93, 0) if self.a.dtype != "float16" else 0
        )

    def _lifted(self) -> np.ndarray:
        """[B, N, T, 1] 2^e: what the least numbers are multiplied by."""
        return 2.0 ** np.minimum(self.exponent(), 900)

    # The scores, shift by shift.

    def scores(self) -> Scores:
        raw = np.zeros_like(self.plain)
        common = np.zeros((*self.true.lse.shape, 1))
        for shift in self.a.shifts:
            raw = np.maximum(raw, self._SHIFTS[shift](self))
        raw = raw + self._underflow()
        if not self.a.reach and "paper" not in self.a.shifts:
            near, all_of_it = self._query_rounding()
            raw, common = raw + near, common + all_of_it
        raw = np.where(self.true.seen, raw, 0)
        rest = np.where(self.true.seen, self._rest(), 0)
        top = self.blocks.max(self.top(self.true.scores))
        with np.errstate(over="ignore"):
            near = np.exp(np.minimum(top - self.true.lse[..., None], 50))
        # A row is cut where the guard's exponent is: its weights are those of other scores.
        cut = (self.exponent() > (125 if self.a.wide == "float32" else 1021))[..., 0]
        return Scores(raw, rest, common[..., 0], cut, self._excused(), near)

    def _underflow(self) -> np.ndarray:
        """What products, stored scores and divided queries lose below the least number."""
        p, sums = self.a.precision, self.k.sum(-1)[:, :, None, :]
        least = max(FLOOR[p.scores], FLOOR[self.a.wide], FLOOR[p.statistics])
        if self.a.products == "float16":
            least = least + self.x.d * FLOOR["float16"]
        of_q = FLOOR[self.a.dtype if self.a.dtype != "float16" else self.a.wide]
        of_k = FLOOR[self.a.dtype] if self.a.shifts != ("none",) else FLOOR[self.a.wide]
        return self.lifted * (
            least * max(self.factor, 1)
            + of_q * self.factor * sums
            + of_k * self.factor * self.q.sum(-1)[..., None]
        )

    def _none(self) -> np.ndarray:
        return self.add * self.size + (self.u_store + self._u_narrow()) * np.abs(self.plain)

    def _bound(self) -> np.ndarray:
        """A score lies up to 160·ln 2 below its reference, which is taken off unrounded."""
        return self._none() + self.u_stat * (160 * np.log(2) + self.row_max(np.abs(self.plain)))

    def _u_narrow(self) -> float:
        """What a score loses where the statistics are narrower than float32."""
        return self.u_stat if self.a.precision.statistics == "float16" else 0.0

    def _mean(self, past: bool = False) -> np.ndarray:
        return np.max([self._shifted(kappa) for kappa in self._kappas(past)], axis=0)

    def _mean_past(self) -> np.ndarray:
        return self._mean(past=True)

    def _usable(self) -> Iterator[np.ndarray]:
        """[B, N, S] keys that enter a mean, for each reading of "visible to some query"."""
        seen, groups = self.true.parts, self.x.n // self.x.k
        # The conditions may be asked together, or each for itself and of padding, too.
        for y in (
            (seen.by_place & seen.by_mask).any(2),
            (seen.reach & seen.by_mask).any(2),
            seen.reach.any(2) & seen.by_mask.any(2),
        ):
            of_head = y.reshape(self.x.b, self.x.k, groups, self.x.s).any(2)
            yield np.repeat(of_head, groups, axis=1) & self.true.finite

    def _kappas(self, past: bool) -> Iterator[np.ndarray]:
        """[B, N, S, D] κ of each key's block (eq. 7, 8), for each reading of "usable"."""
        shape = self.true.k.shape
        for y in self._usable():
            kappa, before = np.zeros(shape), np.where(y[:, :, :1, None], self.true.k[:, :, :1], 0)
            for at in self.blocks.each():
                count = np.maximum(y[:, :, at].sum(2), 1)[..., None, None]
                clean = np.where(y[:, :, at, None], self.true.k[:, :, at], 0)
                mean = clean.sum(2, keepdims=True) / count
                kappa[:, :, at] = before if past else mean
                before = mean
            yield kappa
            if np.abs(self.true.k - kappa).max() > 0.4 * TOP[self.a.dtype]:
                yield np.zeros(shape)  # a block whose shifted keys leave their type is left alone

    def _shifted(self, kappa: np.ndarray) -> np.ndarray:
        """Errors of q·(k − κ)/α as stored, and of what is put back."""
        slack = 2 * self.u_in * np.abs(kappa)
        apart = np.abs(self.true.k - kappa) + slack
        apart = self.factor * (self.q @ apart.swapaxes(-1, -2))
        offset = self.factor * (self.q @ np.abs(kappa).swapaxes(-1, -2))
        stored = self.factor * np.abs(self.true.q @ (self.true.k - kappa).swapaxes(-1, -2))
        return (
            self.add * apart
            + (self.x.d / 2 + 4) * self.u_wide * offset
            + self.u_in * apart
            + self.u_store * (stored + 2 * self.u_in * offset)
            + self._u_narrow() * (offset + stored)
        )

    def _reference(self) -> np.ndarray:
        if self.a.reach:  # rounded later, in `_rest`
            return self.add * self.size + self.u_stat * np.abs(self.plain)
        first = self.blocks.max(self.top(self.plain))
        first = np.where(np.isfinite(first), first, 0)
        with_bias = self.blocks.max_before(self.top(self.true.scores), first)
        without = self.blocks.max_before(self.top(self.plain), first)
        narrow = "float16" in (self.a.dtype, self.a.precision.scores, self.a.products)
        limit = 2.0 ** (14 if narrow else 121) * self.lifted  # what the guard lets a reference be
        # Beside a bias or a soft cap every block is primed.
        choices = [with_bias, without, first]
        apart = [np.abs(self.plain - np.clip(r, -limit, limit)) for r in choices]
        size = np.max(np.abs(choices), axis=0)
        return (
            self.add * (self.size + np.minimum(size, limit))
            + self.u_store * np.max(apart, axis=0)
            + self.u_store * self._mean()
        )

    def _paper(self) -> np.ndarray:
        return np.max([self._mixed(usable) for usable in self._usable()], axis=0)

    def _mixed(self, usable: np.ndarray) -> np.ndarray:
        """K' and S' are rounded, and Inva times the mean of what that did to a row (eq. 4, 5)."""
        usable_k = np.where(usable[..., None], self.true.k, 0)
        x, out = np.where(usable[:, :, None], self.true.product, 0), np.zeros_like(self.plain)
        spread, inva = np.zeros_like(self.plain), 1.0
        means = []
        for at in self.blocks.each():
            n = at.stop - at.start
            inside, off = _paper_matrix(n, self.x.static["beta"], float(self.true.scale))
            row_sum = inside + (n - 1) * off
            inva = float(self.true.scale) / row_sum - 1
            total = x[..., at].sum(-1, keepdims=True)
            stored = (inside - off) * x[..., at] + off * total
            keys = usable_k[:, :, at]
            mixed = np.abs((inside - off) * keys + off * keys.sum(2, keepdims=True))
            gross = abs(inside) * np.abs(keys) + abs(off) * np.abs(keys).sum(2, keepdims=True)
            mixing = (n / 2 + 4) * self.u_wide * gross + self.u_in * mixed + FLOOR[self.a.dtype]
            rounding = self.q @ (mixing + self.add * mixed).swapaxes(-1, -2)
            rounding = rounding + self.u_store * (np.abs(stored) + rounding)
            rounding = rounding + FLOOR[self.a.precision.scores] * self.lifted
            mean = stored.mean(-1, keepdims=True)
            means.append(mean)
            of_mean = rounding.mean(-1, keepdims=True) + self.u_stat * np.abs(mean)
            of_mean = of_mean + (n / 2 + 2) * self.u_wide * np.abs(stored).mean(-1, keepdims=True)
            tilt = np.abs((inside - off) - float(self.true.scale))
            out[..., at] = (
                rounding
                + abs(inva) * of_mean
                + tilt * np.abs(x[..., at] - x[..., at].mean(-1, keepdims=True))
                + 4 * self.u_stat * np.abs(stored)
            )
        spread = np.max(means, axis=0) - np.min(means, axis=0)
        return out + 4 * self.blocks.count * self.u_stat * abs(inva) * spread

    _SHIFTS: ClassVar = {
        "none": _none,
        "mean": _mean,
        "mean_past": _mean_past,
        "reference": _reference,
        "paper": _paper,
        "bound": _bound,
    }

    def _query_rounding(self) -> tuple[np.ndarray, np.ndarray]:
        """q/α is rounded: what that does to a score beside the others of its row, and to all."""
        centre = np.where(self.true.seen.any(2)[..., None], self.true.k, 0).sum(2, keepdims=True)
        centre = centre / np.maximum(self.true.seen.any(2).sum(-1), 1)[..., None, None]
        unit = 0.0 if _is_power_of_two(self.factor) else self.u_in * self.factor
        least = FLOOR[self.a.dtype] * self.lifted
        apart = np.abs(self.true.k - centre)
        near = unit * (self.q @ apart.swapaxes(-1, -2)) + least * apart.sum(-1)[:, :, None, :]
        all_of_it = unit * (self.q @ np.abs(centre).swapaxes(-1, -2))
        return near, all_of_it + least * np.abs(centre).sum(-1)[..., None]

    def _rest(self) -> np.ndarray:
        """What happens to a score after the soft cap: bias, storage, exponential, rescaling."""
        p, true = self.a.precision, self.true
        size = np.abs(true.scores)
        below = np.where(true.seen, self.blocks.max(self.top(true.scores)) - true.scores, 0)
        rest = self.u_stat * (2 * np.abs(true.bias) + below)
        if "q_factors" in self.call.arrays:
            ranks = self.call.arrays["q_factors"].shape[-1]
            rest = rest + (ranks + 2) * self.u_wide * np.where(true.seen, true.terms, 0)
        cap = self.x.static.get("logits_soft_cap")
        if cap is not None or not {"bias", "q_factors"}.isdisjoint(self.call.arrays):
            whole = size if cap is not None or "paper" not in self.a.shifts else np.abs(self.plain)
            rest = rest + self.u_stat * (2 * whole + 8 * (cap or 0))
        if self.a.shifts == ("reference",) and self.a.reach:
            rest = rest + self.u_store * below + FLOOR[p.scores] * self.lifted
        if p.exponential is not None:
            unit = UNIT[p.exponential]
            rest = rest + 2 * unit * below + 2 * unit
        steps = 8 * (self.blocks.count + 2)
        largest = np.maximum(
            self.row_max(size), np.abs(true.lse[..., None]) * (true.sink > 0)[..., None]
        )
        rest = rest + self.u_wide * (steps + 4 * largest) + 4 * self.u_stat * self.blocks.count
        return rest + UNIT[p.probabilities]

    # Rows of which nothing is promised.

    def _excused(self) -> np.ndarray:
        if self.a.promised:
            return np.zeros(self.true.lse.shape, bool)
        p, true = self.a.precision, self.true
        top = 0.9 * min(TOP[p.scores], TOP[p.statistics], TOP[self.a.products])
        size = np.maximum(np.abs(self.plain), np.abs(true.scores))
        size = np.maximum(size, np.abs(true.bias))
        if self.a.shifts != ("none",):  # a mean is of keys that the row does not see, too
            size = np.maximum(size, 2 * self.blocks.max(np.abs(self.plain)))
        found = self.row_max(size) >= top
        if "float16" in (p.statistics, p.accumulator):  # exponentials of m's own rounding
            found = found | (self.row_max(size) * UNIT[p.statistics] > 1)
        gross = np.maximum(self.size, self.q @ self.k.swapaxes(-1, -2))
        if self.a.shifts != ("none",):  # nor of one whose mean is of such keys
            gross = np.broadcast_to(gross.max(-1, keepdims=True), gross.shape)
        found = found | (self.row_max(gross) >= 0.9 * TOP[self.a.products])
        if not self.a.reach:
            found = found | (self.q.max(-1, keepdims=True) * self.factor >= 0.9 * TOP[self.a.dtype])
        value = self.row_max(np.abs(true.v).max(-1)[:, :, None, :])
        sums = min(TOP[p.accumulator], TOP[self.a.products])
        return (found | (self.x.s * value >= 0.5 * sums))[..., 0]


def _is_power_of_two(x: float) -> bool:
    return x == 0 or np.frexp(x)[0] == 0.5


def _paper_matrix(n: int, beta: float, scale: float) -> tuple[float, float]:
    """The two numbers of M (eq. 4): built in float32, rounded to float16 last."""

    def entry(y: float) -> float:
        return float(np.float16(np.float32(y * scale)))

    return entry(1 - beta / n), entry(-beta / n)


@dataclass(frozen=True)
class Forward:
    """Bounds on the results of a call."""

    out: np.ndarray  # [B, N, T, E]
    lse: np.ndarray  # [B, N, T]
    excused: np.ndarray  # [B, N, T]
    cut: np.ndarray  # [B, N, T]
    slope: np.ndarray  # [B, N, T, S] error of the soft cap's derivative
    p: np.ndarray  # [B, N, T, S] error of a normalised weight
    sink: np.ndarray  # [B, N, T]
    weighted: np.ndarray  # [B, N, T, E] error of the output before it is rounded


def forward(call: Call, true: Truth) -> Forward:
    """Section 9: from the errors of the scores to those of weights, output and log-sum-exp."""
    model = Model(call, true)
    s, a, x = model.scores(), model.a, call.signature
    p = a.precision
    cap = x.static.get("logits_soft_cap")
    steep, of_slope = np.ones_like(true.slope), np.zeros_like(true.slope)
    common = s.common
    if cap is not None:  # |d log slope|' ≤ 2/cap
        whole = s.raw + common[..., None]
        steep = np.minimum(1, true.slope * np.exp(np.minimum(2 * whole / cap, 700)))
        # A compiler's tanh of 64 bits is some units off.
        units = 64 if a.wide == "float64" else 8
        of_slope = np.minimum(1, 2 / cap * whole * steep + units * model.u_stat)
        delta, common = steep * whole + s.rest, 0 * common
    else:
        delta = s.raw + s.rest
    delta = SAFETY * delta
    delta = np.where(s.cut[..., None], np.finfo(delta.dtype).max / 8, delta)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        log_p = np.where(true.seen, true.scores - true.lse[..., None], -np.inf)
        # (18) ln Σ p·e^δ, from above; a sink's own error is that of the row's noise.
        row = np.where(true.seen, s.rest, np.inf).min(-1)
        of_sink = SAFETY * (np.where(np.isfinite(row), row, 0) + model.u_wide * _sink_size(call))
        of_sink = of_sink + SAFETY * common  # which it does not share with the keys
        weights = log_p + delta
        total = np.logaddexp(_log_sum(weights), np.log(true.sink) + of_sink)
        total = np.where(np.isfinite(total), np.maximum(total, 0), 0)
        # (19) weights relative to the sum, and what the least probabilities lose
        least = SAFETY * FLOOR[p.probabilities]
        if p.exponential is not None:
            least = least + SAFETY * FLOOR[p.exponential]
        narrow = max(FLOOR[p.statistics], FLOOR[p.accumulator])  # of a whole tile's weight
        least = np.where(true.seen, least * s.near + SAFETY * narrow, 0)
        p_plus = np.exp(np.minimum(weights + total[..., None], 0)) + least
        d_p = np.minimum(
            1, np.maximum(p_plus - true.p, true.p * -np.expm1(-delta - total[..., None]))
        )
        d_p = np.where(true.seen, d_p, 0)
        # (18) the output: a common factor of the weights does not count
        growth = np.where(delta < 30, np.log(np.expm1(np.minimum(delta, 30))), delta)
        grown = np.exp(np.minimum(growth + log_p + total[..., None], 0))
        grown = np.where(true.seen, grown, 0) + least
        sink = np.minimum(1, true.sink * np.expm1(np.minimum(of_sink + total, 700)))
    weighted = np.empty_like(true.out)
    hull = np.zeros_like(true.out)
    magnitude = true.p @ np.abs(true.v)
    for b in range(x.b):
        for n in range(x.n):
            apart = np.abs(true.v[b, n][None] - true.out[b, n][:, None])  # [T, S, E]
            weighted[b, n] = np.einsum("ts,tse->te", grown[b, n], apart)
            seen = true.seen[b, n][..., None]
            hull[b, n] = np.where(seen, apart, 0).max(1)
    of_zero = np.minimum(
        1, true.sink * np.expm1(np.minimum(of_sink, 700)) * np.exp(np.minimum(total, 700))
    )
    if "sinks" in call.arrays:  # whose share may have been too small for a number
        of_zero = np.where(of_sink + total > 700, 1, of_zero)
    weighted = weighted + of_zero[..., None] * np.abs(true.out)
    if "sinks" in call.arrays:
        hull = np.maximum(hull, np.abs(true.out))
    gross = magnitude + weighted
    n = model.blocks.size
    sums = SAFETY * (n / 2 + 2 + 4 * model.blocks.count)
    of_l = sums * model.u_stat
    of_o = SAFETY * ((n / 2 + 2) * UNIT[a.products] + 4 * model.blocks.count * UNIT[p.accumulator])
    weighted = np.minimum(weighted, hull)
    gross = np.minimum(gross, magnitude + weighted)
    top_v = model.visited(np.abs(true.v).max(-1))
    lost = FLOOR[a.dtype] if a.dtype != "float16" else 0
    lost = lost + FLOOR[p.accumulator] * model.blocks.count
    if a.products == "float16":
        lost = lost + n * FLOOR["float16"] * np.maximum(1, 2 * n * top_v / 2.0**15)
    weighted = (
        weighted + of_l * np.abs(true.out) + of_o * gross + SAFETY * (lost + 2.0**-200 * top_v)
    )
    out = weighted + UNIT[a.dtype] * (np.abs(true.out) + weighted) + FLOOR[a.dtype]
    # (19) the log-sum-exp sees what all scores of a row have in common
    lse = total + SAFETY * (common + s.common * 0 + model.u_wide * (4 * np.abs(true.lse) + 4))
    lse = lse + of_l + SAFETY * FLOOR[p.probabilities] * x.s
    largest = np.maximum(model.row_max(np.abs(true.scores))[..., 0], _sink_size(call))
    of_cut = np.log(x.s + 1) + SAFETY * (common + (s.raw + s.rest).max(-1)) + 2.0**-10 * largest
    lse = np.where(s.cut, of_cut, lse)
    lse = np.where(true.seen.any(-1) | (true.sink > 0), lse, 0)
    return Forward(out, lse, s.excused, s.cut, of_slope, d_p, sink, weighted)


def _log_sum(x: np.ndarray) -> np.ndarray:
    top = x.max(-1)
    base = np.where(np.isfinite(top), top, 0)
    return base + np.log(np.exp(x - base[..., None]).sum(-1))


def _sink_size(call: Call) -> np.ndarray:
    """[1, N, 1] |sink|, or 0."""
    sinks = call.arrays.get("sinks")
    return np.zeros((1, 1, 1)) if sinks is None else np.abs(sinks.astype(float))[None, :, None]


def gradients(call: Call, true: Truth, f: Forward, back: Backward) -> dict[str, np.ndarray]:
    """(20) Bounds on the gradients by name, in the layouts of the arguments."""
    x, a = call.signature, arithmetic(call.signature)
    wide = UNIT[a.wide]
    operand = 0.0 if a.dtype == "float16" else UNIT[a.dtype]  # what products take
    d_out, v = np.abs(back.d_out), np.abs(true.v)
    p = np.minimum(1, true.p + f.p)
    gross = d_out @ v.swapaxes(-1, -2)  # Σ|d_out||v|
    size = (x.e / 2 + 4) * wide
    of_delta = (d_out * f.weighted).sum(-1) + size * (d_out * np.abs(true.out)).sum(-1)
    of_delta = of_delta + (d_out * UNIT[a.dtype] ** 2 * np.abs(true.out)).sum(-1)
    of_delta = of_delta + (d_out * FLOOR[a.dtype]).sum(-1) + 4 * wide * np.abs(back.delta)
    apart = np.abs(back.d_p - back.delta[..., None])
    of_s = f.p * apart + p * (SAFETY * (size * gross + 4 * wide * apart) + of_delta[..., None])
    least = FLOOR[a.wide] * (1 + d_out.sum(-1)[..., None] + apart)
    of_s = np.where(true.seen, of_s + SAFETY * least, 0)
    of_raw = of_s * (true.slope + f.slope) + np.abs(back.d_s) * f.slope
    raw = np.abs(back.d_s) * true.slope + of_raw
    of_raw = of_raw + operand * raw + np.where(true.seen, FLOOR[a.wide], 0)
    q, k = (np.abs(y) + FLOOR[a.wide] for y in (true.q, true.k))
    scale, least_q = abs(float(true.scale)), 2 * FLOOR[a.wide]
    rows, keys = (x.t * x.n // x.k) / 2 + 4, x.s / 2 + 4
    sums = SAFETY * wide
    of_p = f.p + SAFETY * (operand * p + np.where(true.seen, FLOOR[a.wide], 0))
    found = {
        "query": (scale * ((of_raw + sums * keys * raw) @ k + x.s * least_q)).swapaxes(1, 2),
        "key": over_groups(
            call, scale * ((of_raw + sums * rows * raw).swapaxes(-1, -2) @ q + x.t * least_q)
        ),
        "value": over_groups(call, (of_p + sums * rows * p).swapaxes(-1, -2) @ d_out),
    }
    every = x.b * x.n * x.t / 2 + 4
    if "bias" in call.arrays and call.arrays["bias"].dtype != np.int32:
        total = of_s + sums * (every + keys) * np.abs(back.d_s)
        found["bias"] = to_shape(total, call.arrays["bias"].shape)
    if "sinks" in call.arrays:
        of_sink = f.sink * np.abs(back.delta) + (true.sink + f.sink) * of_delta
        flushed = 2 * FLOOR[a.wide]  # of each row
        of_sink = of_sink + sums * every * true.sink * np.abs(back.delta) + flushed
        found["sinks"] = of_sink.sum((0, 2))
    if "scale" in call.arrays:
        product = np.abs(true.q) @ k.swapaxes(-1, -2)
        flushed = FLOOR[a.wide] * (np.abs(true.q).sum(-1)[..., None] + k.sum(-1)[:, :, None, :])
        found["scale"] = ((of_raw + sums * (every + keys) * raw) * product + raw * flushed).sum()
    for name, bound in found.items():
        kind = str(call.arrays[name].dtype)
        exact = np.abs(back.grads[name])
        found[name] = bound + UNIT[kind] * (exact + bound) + FLOOR[kind] + FLOOR[a.wide]
    return found
