"""The mathematics of one tile, as pure functions on arrays.

Every walker calls or traces exactly these: the lax loops, the Pallas kernels, the AscendC
generator. They use ordinary primitives alone (no control flow, no gather), and everything that is
one number per query row has shape [R, 1] (or [R], where the dialect is flat). Shapes: R rows,
n keys, D and E head sizes. The equations are those of docs/algorithm.md.

Scores are kept divided by 2^e, e one number per row from the guard (eq. 12), 0 in ordinary data.
Its ``temper`` puts 2^e back in the exponent, so m and every offset are in the divided unit too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pasa_jax.core.precision import Precision

Array = jax.Array

_LANES = 128  # of a vector, and columns of the narrowest matrix unit


@dataclass(frozen=True)
class Dialect:
    """The forms of the same mathematics that one machine likes; the defaults suit them all.

    Arguments:
      base_two: scores, m and offsets are in units of ln 2, and exponentials are powers of two.
      exponential: the type in which a tile's exponentials are computed, unless the precision
        says; None: the statistics'.
      exp2: the power of two of a tile.
      matrix_columns: if P's row sums may come out of the matrix unit, as a product with ones in
        columns that it would leave idle: how many it computes at once; else 0.
      sum_columns: if P's row sums are a product of their own, with as many columns of ones; else 0.
      running_maximum: where nothing is put back after the rounding, scores are stored minus the
        running maximum instead of their tile's, which saves rescaling what the tile adds.
      contracts: the compiler may round product·gain − maximum only once.
      flat: columns have shape [R], for a compiler that would hold [R, 1] as a whole tile.
      narrow_sums: whether sums that may leave their type, of values that a row does not see, are
        taken out (a select of a whole tile of the output), and m stays at `lowest` until a row sees
        a key, where the statistics are float16.
    """

    base_two: bool = False
    exponential: str | None = None
    exp2: Callable[[Array], Array] = jnp.exp2
    matrix_columns: int = 0
    sum_columns: int = 0
    running_maximum: bool = False
    contracts: bool = True
    flat: bool = False
    narrow_sums: bool = True


@dataclass(frozen=True)
class Numerics:
    """What is static about the arithmetic of a tile.

    Arguments:
      shift: ``"none"``, ``"paper"``, ``"mean"`` or ``"reference"``.
      precision: the types of the intermediates.
      reachable: whether the float32 product is seen before it is rounded to ``precision.scores``.
      inva: Inva of eq. 5 for ``paper``; 1 for the other shifts, whose offset is put back whole.
      logits_soft_cap: cap of s ↦ cap·tanh(s/cap), or None.
      dialect: the forms that the machine likes.
      kept: the share of the weights that dropout keeps, or 1.
    """

    shift: str
    precision: Precision
    reachable: bool = True
    inva: float = 1.0
    logits_soft_cap: float | None = None
    dialect: Dialect = Dialect()
    kept: float = 1.0

    @property
    def statistics(self) -> jnp.dtype:
        return jnp.dtype(self.precision.statistics)

    @property
    def product(self) -> jnp.dtype:
        """The type in which the matrix unit accumulates: float32, or float64 under x64."""
        wide = "float64" in (self.precision.scores, self.precision.statistics)
        return jnp.dtype("float64" if wide else "float32")

    @property
    def accumulated(self) -> jnp.dtype:
        """The type in which q·k and P·V are added up."""
        return jnp.dtype("float16") if self.precision.products == "float16" else self.product

    @property
    def exponential(self) -> str | None:
        return self.precision.exponential or self.dialect.exponential

    @property
    def tile(self) -> jnp.dtype:
        """The type of a tile's arithmetic between product and probabilities. Where scores are
        stored and exponentials computed in the same 16 bits, it may be theirs: a difference of
        two such numbers is rounded once, near zero, where that costs nothing.
        """
        same = self.precision.exponential == self.precision.scores
        late = self.shift == "reference" and self.reachable
        plain = same and not (late or self.follows_maximum) and self.logits_soft_cap is None
        return jnp.dtype(self.precision.scores) if plain else self.statistics

    @property
    def unit(self) -> float:
        """What natural scores are multiplied by: log2 e where they are in units of ln 2."""
        return math.log2(math.e) if self.dialect.base_two else 1.0

    def exp(self, x: Array) -> Array:
        """e^x for x in the unit of the scores."""
        return self.dialect.exp2(x) if self.dialect.base_two else jnp.exp(x)

    def over_row(self, reduce: Callable[..., Array], x: Array) -> Array:
        """The column that ``reduce`` makes of x [R, n]."""
        return reduce(x, axis=1, keepdims=not self.dialect.flat)

    @property
    def lags(self) -> bool:
        """Whether scores are stored minus the running maximum of the tiles before."""
        return self.shift == "reference" and not self.reachable

    @property
    def follows_maximum(self) -> bool:
        """Whether scores are stored minus the running maximum."""
        late = self.shift == "none" or (self.shift == "reference" and self.reachable)
        return late and self.dialect.running_maximum


class QueryTile(NamedTuple):
    """The rows of a tile, made by `query_tile`."""

    q: Array  # [R, D]
    gain: Array  # [R|1, 1] factor of the product, applied before rounding
    guard: Guard | None  # what the scores are divided by; None: 1
    rest: Array | None = None  # [1, 1] factor applied after rounding, or None: 1
    value_gain: Array | None = None  # [] factor of the values these rows see, or None: 1
    # The guard of scores that a soft cap brings back into range by itself, after which ``guard``
    # is None; else None.
    capped: Guard | None = None


class Guard(NamedTuple):
    """Powers of two that keep the scores of a row in range (eq. 12); all 1 in ordinary data.

    2^e and 2^-e may leave float32, so each comes as a product of factors that do not.
    """

    down: Array  # [R, 1] down·rest·gain = 2^-e: the first two are for q
    rest: Array  # [R, 1]
    gain: Array  # [R, 1] for the factor of the product, where that is large
    temper: Array  # [R, 1] temper·beyond = 2^e; `temper` is at most 2^126 (float64: 2^1022)
    beyond: Array  # [R, 1]


class KeyTile(NamedTuple):
    """The keys of a tile, made by `key_tile`."""

    k: Array  # [n, D] without what the shift takes off: K'
    v: Array  # [n, E] with unusable rows zeroed
    usable: Array | None  # [1, n] bool: False where key or value must not be looked at
    kappa: Array | None = None  # [1, D] what `mean` took off every key (or rows, all equal)
    weights: Array | None = None  # [n, 1] 1/n for the columns that the paper's M mixed, else 0
    raw: Array | None = None  # [n, D] the unshifted keys, for `reference` behind the rounding


class Scores(NamedTuple):
    """The scores of one tile: S = (stored + base) + inva·offset, per row."""

    stored: Array  # [R, n] S' minus its base, masked entries far below; statistics dtype
    base: Array  # [R, 1] the row maximum of the visible S' (or the running one), or lowest
    # [R, 1] what the shift took off (s̄' for `paper`, to be multiplied by inva), or None: 0
    offset: Array | None
    slope: Array | None = None  # [R, n] derivative of the soft cap
    every: bool = False  # whether every row sees every key of the tile


class State(NamedTuple):
    """A partial result of the online softmax over the keys seen so far."""

    m: Array  # [R, 1] running maximum, without inva·f
    l: Array  # noqa: E741  [R, 1] running sum
    o: Array  # [R, E] running output, not normalised
    f: Array  # [R, 1] F, the paper's running mean of s̄'; 0 for the other shifts


def wide_type(dtype: jnp.dtype) -> jnp.dtype:
    """The type that sums numbers of ``dtype``: float64 for float64, else float32."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def _tempered(x: Array, guard: Guard | None) -> Array:
    """x·2^e as an exponent takes it, for a column or a tile x: what is left out beyond 2^126 would
    change a weight only between scores that differ by less than 2^-119 of their bound.
    """
    if guard is None:
        return x
    return x * (_beside(guard.temper) if x.ndim == 2 else guard.temper).astype(x.dtype)


def _divided(x: Array, guard: Guard | None) -> Array:
    """x/2^e, for a column or a tile x."""
    if guard is None:
        return x
    for factor in (guard.down, guard.rest, guard.gain):
        x = x * (factor if x.ndim == 2 else factor.reshape(x.shape)).astype(x.dtype)
    return x


def _beside(column: Array) -> Array:
    """A column as [R, 1], to stand beside a tile."""
    return column if column.ndim == 2 else column[:, None]


def shown_by(bias: Array) -> Array:
    """[…] bool: False where a bias hides its key: −∞, or the lowest finite number of its type,
    which stands for it in many models' masks. NaN hides nothing: it is seen, and spoils the row.
    """
    floor = jnp.asarray(lowest(bias.dtype), bias.dtype)
    return (bias > floor) | (bias != bias)


def lowest(dtype: jnp.dtype) -> float:
    """The finite number that stands for "no key seen" and for a masked score."""
    return float(jnp.finfo(dtype).min)


def _dot(a: Array, b: Array, contract: tuple[int, int], dtype: jnp.dtype) -> Array:
    """A matrix product with accumulator ``dtype``; operands of unlike types are widened first."""
    if a.dtype != b.dtype:
        a, b = a.astype(dtype), b.astype(dtype)
    dims = (((contract[0],), (contract[1],)), ((), ()))
    # float32 operands are multiplied in float32 (some chips would use fewer bits by default).
    precision = lax.Precision.HIGHEST if a.dtype.itemsize >= 4 else None
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=dtype)


def initial_state(rows: int, value_size: int, numerics: Numerics) -> State:
    """The state before any key (eq. 10)."""
    stat = numerics.statistics
    column = (rows,) if numerics.dialect.flat else (rows, 1)
    return State(
        m=jnp.full(column, lowest(stat), stat),
        l=jnp.zeros(column, stat),
        o=jnp.zeros((rows, value_size), jnp.dtype(numerics.precision.accumulator)),
        f=jnp.zeros(column, stat),
    )


def query_tile(q: Array, scale: Array, guard: Guard | None, numerics: Numerics) -> QueryTile:
    """Query rows with 1/α and the guard's 2^-e placed where they lose nothing (eq. 12).

    Arguments:
      q: [R, D].
      scale: [] 1/α in the product's type; 1 for `paper`, whose M carries it.
      guard: None where the scores cannot leave their range.
    """
    dtype = numerics.product
    gain = jnp.full((1, 1), scale.astype(dtype) * dtype.type(numerics.unit))
    rest = None
    if not numerics.reachable and numerics.dialect.base_two:
        power = _power_of_two(gain)  # log2 e is left for later: q would be rounded
        gain, rest = power, gain / power
    if guard is not None:
        gain = gain * guard.gain
        if q.dtype == jnp.float16:  # its products fit float32: divide them
            gain = gain * guard.down * guard.rest
        else:  # the product itself could overflow: divide q, which is exact
            q = q * guard.down.astype(q.dtype) * guard.rest.astype(q.dtype)
    if not numerics.reachable:  # nothing can be multiplied between product and rounding
        q = (q.astype(dtype) * gain).astype(q.dtype)
        gain = jnp.ones_like(gain)
    if numerics.logits_soft_cap is not None:
        return QueryTile(q, gain, None, rest, capped=guard)
    return QueryTile(q, gain, guard, rest)


def _power_of_two(x: Array) -> Array:
    """The largest power of two in x (float32), with its sign; 1 for 0."""
    bits = lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-(1 << 23))
    power = lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(power == 0, jnp.ones_like(power), power)


def key_tile(
    k: Array,
    v: Array,
    usable: Array | None,
    numerics: Numerics,
    *,
    kappa: Array | None = None,
    matrix: Array | None = None,
    weights: Array | None = None,
    value_gain: Array | None = None,
) -> KeyTile:
    """Keys without what the shift takes off them (eq. 4, 7), and values fit for the product.

    A key that is not usable (not finite, or padding) is zeroed before anything is mixed, so that
    it cannot reach rows that do not see it, neither through the block's mean nor as 0·NaN; then
    its column is made NaN, so that rows that do see it say so.

    Arguments:
      k, v: [n, D], [n, E].
      usable: [n, 1] bool, or None: all are.
      kappa: [1, D] of k's type, for `mean` (any vector is valid, since the same is put back); or
        more rows, all equal, for a matrix unit that takes no single one.
      matrix, weights: M [n, n] and the share of each column in the row mean [n, 1], for `paper`.
      value_gain: [] the power of two that keeps P·V in range, or None.
    """
    if usable is not None:
        k, v = zero_unusable(k, usable), zero_unusable(v, usable)
    if value_gain is not None:
        v = v * value_gain.astype(v.dtype)
    shifted, raw = k, None
    if kappa is not None:
        wide = numerics.product
        shifted = (k.astype(wide) - kappa[:1].astype(wide)).astype(k.dtype)
        raw = _poison(k, usable) if numerics.shift == "reference" else None
    if matrix is not None:  # its row mean needs every column: `scores` poisons them after it
        shifted = _dot(matrix, k, (1, 0), numerics.product).astype(k.dtype)
    else:
        shifted = _poison(shifted, usable)
    row = None if usable is None else usable.reshape(1, -1)
    return KeyTile(shifted, v, row, kappa, weights, raw)


def mean_key(total: Array, count: Array, dtype: jnp.dtype) -> Array:
    """κ of a block (eq. 7) from the sum and the number of its usable keys, in the keys' type."""
    return (total * (1 / jnp.maximum(count, 1))).astype(dtype)


def zero_unusable(x: Array, usable: Array) -> Array:
    """Rows of x where ``usable`` [n, 1], zeros elsewhere."""
    return jnp.where(usable, x, jnp.zeros_like(x))


def _poison(x: Array, usable: Array | None) -> Array:
    if usable is None:
        return x
    return jnp.where(usable, x, jnp.full_like(x, jnp.nan))


def plain_scores(q: Array, k: Array, scale: Array, numerics: Numerics) -> Array:
    """S = q·k/α in the product's type, [R, n]: what no shift and no storage has touched."""
    return _dot(q, k, (1, 1), numerics.product) * scale.astype(numerics.product)


def scores(
    query: QueryTile,
    key: KeyTile,
    state: State,
    mask: Array | None,
    bias: Array | None,
    numerics: Numerics,
    *,
    with_slope: bool = False,
) -> Scores:
    """The stored scores S' of one tile, masked, minus their row maximum (eq. 4, 7, 9).

    Arguments:
      mask: [R, n] bool, True where the row sees the key; None: everywhere.
      bias: [R, n] added to the scores; −inf, or its type's lowest number, hides a key.
      state: for `reference` where the accumulator is out of reach: r is its running maximum.
      with_slope: also give the soft cap's derivative, for the gradient.
    """
    stat, store = numerics.statistics, jnp.dtype(numerics.precision.scores)
    if bias is not None:
        shown = shown_by(bias)
        mask = shown if mask is None else mask & shown
        bias = _divided(bias.astype(stat) * stat.type(numerics.unit), query.guard)
    late = numerics.shift == "reference" and numerics.reachable
    narrow = numerics.tile if bias is None and query.rest is None else stat
    product = _dot(query.q, key.k, (1, 1), numerics.accumulated)
    product = product.astype(numerics.product) * query.gain
    offset = None
    if late:
        z = product.astype(stat)
    elif numerics.shift == "reference":
        plain = bias is None and numerics.logits_soft_cap is None
        running = state.m if plain else None
        z, offset = _lagging_reference(query, key, product, running, mask, numerics)
    else:
        z = product.astype(store).astype(narrow)
        z = z if query.rest is None else z * query.rest.astype(stat)
        if key.weights is not None:  # s̄' over the columns that M mixed, before the mask
            offset = _dot(z, key.weights, (1, 0), numerics.product).astype(stat)
            if key.usable is not None:
                z = jnp.where(key.usable, z, jnp.full_like(z, jnp.nan))
        elif key.kappa is not None:
            offset = _kappa_product(query, key, numerics)
    slope = None
    if numerics.logits_soft_cap is not None:  # needs S itself: put the offset back first
        whole = z if offset is None else z + _beside(offset) * stat.type(numerics.inva)
        z, slope = _soft_cap(whole, query.capped, numerics)
        offset = None
    if bias is not None:
        z = z + bias
    if mask is not None:
        z = jnp.where(mask, z, jnp.full_like(z, lowest(z.dtype)))
        slope = None if slope is None else jnp.where(mask, slope, jnp.zeros_like(slope))
    base = numerics.over_row(jnp.max, z)
    if numerics.follows_maximum:
        base = jnp.maximum(base, state.m)
    stored = z - _beside(base)
    # Contracted into one rounding with the product before it, the largest score is not its own
    # maximum; where scores are huge, every probability of the row would vanish.
    if numerics.dialect.contracts:
        stored = jnp.where(z >= _beside(base), jnp.zeros_like(stored), stored)
    if base.dtype != stat:
        narrow_base, base = base, base.astype(stat)
        if mask is not None:
            seen = narrow_base != lowest(narrow_base.dtype)
            base = jnp.where(seen, base, jnp.full_like(base, lowest(stat)))
    if late and store != stat:
        if store == jnp.float16:  # what is below its range has no weight: clamp it
            stored = jnp.maximum(stored, jnp.full_like(stored, lowest(store)))
        stored = stored.astype(store).astype(numerics.exponential or stat)
    return Scores(stored, base, offset, slope if with_slope else None, mask is None)


def _kappa_product(query: QueryTile, key: KeyTile, numerics: Numerics) -> Array:
    """c = q·κ/α, [R, 1], the offset of `mean` (eq. 7): one more column of the product."""
    assert key.kappa is not None
    product = _dot(query.q, key.kappa, (1, 1), numerics.product) * query.gain
    product = product if query.rest is None else product * query.rest
    if len(key.kappa) > 1:  # rows for a matrix unit that takes no single one: all equal
        product = numerics.over_row(jnp.max, product)
    return product.astype(numerics.statistics)


def _lagging_reference(
    query: QueryTile,
    key: KeyTile,
    shifted: Array,
    running: Array | None,
    mask: Array | None,
    numerics: Numerics,
) -> tuple[Array, Array]:
    """`reference` where the product leaves the matrix unit rounded (eq. 11): S' and r.

    r is the ``running`` maximum before this block [R, 1]; rows that have none are primed with the
    block's own maximum as `mean` sees it. So is every block beside a bias or a soft cap (None):
    the running maximum then is not one of S. r travels as two more columns of q·k, in halves of
    q's type, and what is put back is the sum of those halves.
    """
    assert key.raw is not None
    stat, store = numerics.statistics, jnp.dtype(numerics.precision.scores)
    prime = shifted.astype(store).astype(stat)
    if mask is not None:
        prime = jnp.where(mask, prime, jnp.full_like(prime, lowest(stat)))
    prime = jnp.max(prime, axis=1, keepdims=True)
    prime = jnp.where(prime > lowest(stat), prime + _kappa_product(query, key, numerics), 0)
    r = prime if running is None else jnp.where(running > lowest(stat), running, prime)
    high = r.astype(query.q.dtype)
    low = (r - high.astype(stat)).astype(query.q.dtype)
    r = high.astype(stat) + low.astype(stat)
    product = _dot(query.q, key.raw, (1, 1), numerics.accumulated).astype(numerics.product)
    product = product - r.astype(numerics.product)
    return product.astype(store).astype(stat), r


def _soft_cap(s: Array, guard: Guard | None, numerics: Numerics) -> tuple[Array, Array]:
    """cap·tanh(S/cap) and its derivative 1 − tanh², of s = S/2^e. An S that leaves float32 is
    infinite here, and its tanh is 1.
    """
    assert numerics.logits_soft_cap is not None
    cap = numerics.statistics.type(numerics.logits_soft_cap * numerics.unit)
    if guard is not None:
        s = _tempered(s, guard) * _beside(guard.beyond).astype(s.dtype)
    tanh = jnp.tanh(s / cap)
    return cap * tanh, 1 - tanh * tanh


def probabilities(s: Scores, query: QueryTile, numerics: Numerics) -> Array:
    """P = exp(S' − max S') in the stored type, [R, n]: at most 1, its row maximum exactly 1."""
    exponent = s.stored
    if query.guard is not None:  # whose 2^e the tile's own type need not hold
        exponent = _tempered(exponent.astype(numerics.statistics), query.guard)
    if numerics.exponential is not None:
        exponent = exponent.astype(numerics.exponential)
    p = numerics.exp(exponent)
    return p.astype(jnp.dtype(numerics.precision.probabilities))


def update(
    state: State,
    s: Scores,
    query: QueryTile,
    key: KeyTile,
    count: Array | float,
    numerics: Numerics,
    kept: Array | None = None,
) -> State:
    """One step of the online softmax with the mean recovered globally (eq. 10).

    Arguments:
      count: how many blocks have been seen, this one included (`paper`'s running mean F).
      kept: [R, n] bool, the weights that dropout keeps; None: all. Dropped ones count in l.
    """
    stat, acc = numerics.statistics, jnp.dtype(numerics.precision.accumulator)
    wide = numerics.product
    p = probabilities(s, query, numerics)
    l_loc, pv = _sum_and_product(p, key.v, numerics, kept)
    pv = pv.astype(acc)
    if numerics.follows_maximum:  # a row that has seen no key yet is wiped by its first one
        keep = numerics.exp(_tempered(state.m - s.base, query.guard))
        return State(
            s.base, keep * state.l + l_loc, _beside(keep.astype(acc)) * state.o + pv, state.f
        )
    f = state.f
    previous, current = state.m.astype(wide), s.base.astype(wide)
    # What is stored has the statistics' type; a sum of two stored numbers is used as it comes.
    # The offset is folded before m is subtracted: in float32 no exponent is ever positive.
    if numerics.shift == "paper" and s.offset is not None:
        count, inva = jnp.asarray(count, stat), stat.type(numerics.inva)
        old = jnp.where(count > 1, state.f, s.offset)
        f = old + (s.offset - old) / count
        moved = previous + (inva * (old - f)).astype(wide)
        if stat == jnp.float16 and numerics.dialect.narrow_sums:
            moved = jnp.where(previous == lowest(stat), previous, moved)
        previous = moved
        current = current + (inva * (s.offset - f)).astype(wide)
    elif s.offset is not None:
        current = current + s.offset.astype(wide)
    seen = None if s.every else s.base != lowest(stat)
    m, current = _larger(previous, current, seen, stat)
    keep = numerics.exp(_tempered(previous - m.astype(wide), query.guard)).astype(stat)
    take = numerics.exp(_tempered(current - m.astype(wide), query.guard)).astype(stat)
    if seen is not None:
        take = jnp.where(seen, take, jnp.zeros_like(take))
        # Where the sum of values that a row does not see may be infinite: 0·∞ is NaN.
        infinite = acc == jnp.float16 or numerics.shift == "none"
        if infinite and numerics.dialect.narrow_sums:
            pv = jnp.where(_beside(seen), pv, jnp.zeros_like(pv))
    return State(
        m=m,
        l=keep * state.l + take * l_loc,
        o=_beside(keep.astype(acc)) * state.o + _beside(take.astype(acc)) * pv,
        f=f,
    )


def _larger(
    previous: Array, current: Array, seen: Array | None, stat: jnp.dtype
) -> tuple[Array, Array]:
    """The new maximum of a row, and its tile's; a row that saw no key of the tile stays at
    `lowest` there, whatever its offset.
    """
    if seen is not None:
        current = jnp.where(seen, current, jnp.full_like(current, lowest(stat)))
    return jnp.maximum(previous, current).astype(stat), current


def running_maximum(m: Array, s: Scores, numerics: Numerics) -> Array:
    """What `update` makes of the running maximum m [R, 1]: the next tile's r, for `reference`
    behind the rounding.
    """
    wide = numerics.product
    current = s.base.astype(wide)
    if s.offset is not None:
        current = current + s.offset.astype(wide)
    seen = None if s.every else s.base != lowest(numerics.statistics)
    return _larger(m.astype(wide), current, seen, numerics.statistics)[0]


def _sum_and_product(
    p: Array, v: Array, numerics: Numerics, kept: Array | None
) -> tuple[Array, Array]:
    """P's row sums [R, 1] and P·V [R, E], the latter of what dropout keeps."""
    if numerics.dialect.sum_columns:
        ones = jnp.ones((v.shape[0], numerics.dialect.sum_columns), p.dtype)
        l_loc = numerics.over_row(jnp.max, _dot(p, ones, (1, 0), numerics.product))  # all equal
        l_loc = l_loc.astype(numerics.statistics)
        return l_loc, _dot(_undropped(p, kept), v, (1, 0), numerics.accumulated)
    size = v.shape[1]
    idle = -size % numerics.dialect.matrix_columns if numerics.dialect.matrix_columns else 0
    if idle == 0 or kept is not None:
        l_loc = numerics.over_row(jnp.sum, p.astype(numerics.statistics))
        return l_loc, _dot(_undropped(p, kept), v, (1, 0), numerics.accumulated)
    # As few of them as fill whole vectors.
    ones = jnp.ones((v.shape[0], -size % _LANES or _LANES), v.dtype)
    both = _dot(p, jnp.concatenate([v, ones], axis=1), (1, 0), numerics.product)
    return both[:, size : size + 1].astype(numerics.statistics), both[:, :size]


def _undropped(x: Array, kept: Array | None) -> Array:
    """x [R, n] where dropout keeps it, zeros elsewhere."""
    return x if kept is None else jnp.where(kept, x, jnp.zeros_like(x))


def settle(state: State, numerics: Numerics) -> State:
    """The state in the product's type, inva·F folded into m, to be merged or finished."""
    wide = numerics.product
    state = State(*(x.astype(wide) for x in state))
    if numerics.shift != "paper":
        return state
    m = state.m + wide.type(numerics.inva) * state.f  # alone it may leave float16
    m = jnp.where(state.l > 0, m, jnp.full_like(m, lowest(wide)))
    return state._replace(m=m, f=jnp.zeros_like(m))


def merge(a: State, b: State, numerics: Numerics, guard: Guard | None = None) -> State:
    """The state over the keys of both settled states, for split keys and rings (eq. 13)."""
    m = jnp.maximum(a.m, b.m)
    of_a, of_b = (numerics.exp(_tempered(x.m - m, guard)) for x in (a, b))
    return State(m, of_a * a.l + of_b * b.l, _beside(of_a) * a.o + _beside(of_b) * b.o, a.f)


def add_sink(state: State, sink: Array, numerics: Numerics, guard: Guard | None) -> State:
    """The settled state with one more key of score ``sink`` [R, 1] and value zero."""
    wide = state.m.dtype
    sink = _divided(sink.astype(wide) * wide.type(numerics.unit), guard)
    no_value = State(sink, jnp.ones_like(state.l), jnp.zeros_like(state.o), state.f)
    return merge(state, no_value, numerics, guard)


def finish(
    state: State, numerics: Numerics, guard: Guard | None, value_gain: Array | None = None
) -> tuple[Array, Array]:
    """Output [R, E] and log-sum-exp [R, 1] of a settled state (eq. 14).

    A row that saw no key gives output 0 and the lowest finite log-sum-exp. What dropout kept stands
    for all, so it is divided by its share.

    Arguments:
      value_gain: [] what `key_tile` multiplied the values by, or None.
    """
    seen = state.m != lowest(state.m.dtype)
    some = (state.l != 0) & (seen | (state.l != state.l))  # NaN is something
    l = jnp.where(some, state.l, jnp.ones_like(state.l))  # noqa: E741
    out = state.o / _beside(l.astype(state.o.dtype))
    out = jnp.where(_beside(some), out, jnp.zeros_like(out))
    if value_gain is not None:
        out = out / value_gain.astype(out.dtype)
    if numerics.kept != 1:
        out = out * out.dtype.type(1 / numerics.kept)
    floor = lowest(state.m.dtype)
    m = _tempered(state.m, guard) * l.dtype.type(1 / numerics.unit)
    if guard is not None:
        m = m * guard.beyond.astype(m.dtype)
    lse = jnp.clip(m, m.dtype.type(floor), m.dtype.type(-floor)) + jnp.log(l)
    return out, jnp.where(some, lse, jnp.full_like(lse, floor))


def rounded(out: Array, dtype: jnp.dtype, *, clip: bool) -> tuple[Array, Array]:
    """``out`` rounded to ``dtype``, and what rounding took off it.

    Arguments:
      clip: a mean of values, rounded up, must not leave their type.
    """
    if clip:
        largest = out.dtype.type(jnp.finfo(dtype).max)
        out = jnp.clip(out, -largest, largest)
    narrow = out.astype(dtype)
    return narrow, (out - narrow.astype(out.dtype)).astype(dtype)


def sink_weight(
    sink: Array,
    m: Array,
    l: Array,  # noqa: E741
    numerics: Numerics,
    guard: Guard | None,
) -> Array:
    """The probability that a finished row (m, l of `gradients`) gives its sink, [R, 1]."""
    gap = _divided(sink.astype(m.dtype) * m.dtype.type(numerics.unit), guard) - m
    return numerics.exp(_tempered(gap, guard)) / jnp.where(l != 0, l, jnp.ones_like(l))


class TileGradients(NamedTuple):
    """What one tile adds to the gradients; the query's and key's still lack the factor 1/α."""

    q: Array  # [R, D]
    k: Array  # [n, D]
    v: Array  # [n, E]
    scores: Array  # [R, n] of S after bias, hence of the bias


def gradients(
    s: Scores,
    query: QueryTile,
    key: KeyTile,
    q: Array,
    k: Array,
    m: Array,
    l: Array,  # noqa: E741
    d_out: Array,
    delta: Array,
    numerics: Numerics,
    kept: Array | None = None,
) -> TileGradients:
    """The reverse of one tile, from the row statistics of the forward pass (eq. 15).

    The scores are the forward pass's own, bit for bit, so their probabilities sum to one.

    Arguments:
      q, k: [R, D], [n, D] as the user gave them, unusable rows zeroed.
      m, l: [R, 1] of the finished state, sinks included.
      d_out: [R, E] cotangent of the output, in the product's type.
      delta: [R, 1] Σ d_out·out minus the cotangent of the log-sum-exp.
      kept: as in `update`.
    """
    wide = numerics.product
    p = probabilities(s, query, numerics).astype(wide)
    base = s.base.astype(wide)
    if s.offset is not None:
        base = base + s.offset.astype(wide) * wide.type(numerics.inva)
    seen = s.base != lowest(numerics.statistics)
    gap = jnp.where(seen, base - m, jnp.full_like(m, lowest(wide)))
    share = numerics.exp(_tempered(gap, query.guard)) / jnp.where(l != 0, l, jnp.ones_like(l))
    # That of the tile's largest score, which is no more than 1. Where `paper` has moved m by far
    # larger offsets, its rounding says otherwise.
    share = jnp.minimum(share, jnp.ones_like(share))
    p = p * jnp.where(seen, share, jnp.zeros_like(share))
    # float16 cannot hold gradients (their range is the loss's business): they stay in float32.
    operand = wide if q.dtype == jnp.float16 else q.dtype
    if kept is not None:
        d_out = d_out * wide.type(1 / numerics.kept)
    d_p = _undropped(_dot(d_out.astype(operand), key.v.astype(operand), (1, 1), wide), kept)
    d_s = p * (d_p - delta)
    d_raw = (d_s if s.slope is None else d_s * s.slope.astype(wide)).astype(operand)
    return TileGradients(
        q=_dot(d_raw, k.astype(operand), (1, 0), wide),
        k=_dot(d_raw, q.astype(operand), (0, 0), wide),
        v=_dot(_undropped(p, kept).astype(operand), d_out.astype(operand), (0, 0), wide),
        scores=d_s,
    )
