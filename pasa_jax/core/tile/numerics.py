"""The arithmetic of a tile, as far as it is static: types, how scores are stored, machine forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import jax
import jax.numpy as jnp
from jax import lax

from pasa_jax.core.precision import POLYNOMIALS, Precision
from pasa_jax.core.tile.exponentials import polynomial_exp2

Array = jax.Array


class Storage(Enum):
    """How the scores of a tile are stored: what is taken off them before they are rounded.

    One member for each way; its value is the shift that asks for it, except that ``reference``
    has two ways: which one is possible depends on whether the target rounds products (`Numerics`).
    """

    PLAIN = "none"  # nothing is taken off
    PAPER = "paper"  # β times the block's mean score, by the matrix M (eq. 4)
    BLOCK_MEAN = "mean"  # q·κ/α, κ the mean of the block's keys (eq. 7)
    PAST_MEAN = "mean_past"  # the same, κ the mean of the block before (eq. 8)
    BENEATH_MAXIMUM = "reference"  # the row maximum of the float32 tile (eq. 9)
    LAGGING = "reference, lagging"  # the row maximum of the tiles before, in the product (eq. 11)
    BOUND = "bound"  # a bound on the row maximum, known before the walk (eq. 21)

    @property
    def shift(self) -> str:
        """The name of the shift, as in `pasa_jax.SHIFTS`."""
        return self.value.removesuffix(", lagging")

    @property
    def uses_kappa(self) -> bool:
        """Whether it needs κ; `LAGGING` does for rows that have no maximum yet."""
        return self in (Storage.BLOCK_MEAN, Storage.PAST_MEAN, Storage.LAGGING)

    @property
    def keeps_keys(self) -> bool:
        """Whether keys are multiplied as they are, and nothing is known of them beforehand: neither
        a block's mean nor a bound.
        """
        return self in (Storage.PLAIN, Storage.BENEATH_MAXIMUM)


@dataclass(frozen=True)
class Dialect:
    """The forms of the same mathematics that suit one machine; the defaults run on every machine.

    Arguments:
      base_two: scores, m and offsets are in units of ln 2, and exponentials are powers of two.
      exponential: the type in which a tile's exponentials are computed, unless the precision
        says; None: the statistics'.
      exp2: the function that computes the powers of two of a tile.
      matrix_columns: how many columns of a product the matrix unit computes at once, if P's row
        sums may be a product with ones in columns that would be idle otherwise; else 0.
      sum_columns: how many columns of ones P is multiplied by for its row sums, if that is a
        product of its own; else 0.
      narrow: the function that rounds scores less their maximum, and P, to their stored type.
      maximum_first: take the row maximum of a product before it is multiplied by its factor, where
        nothing else is done to it: for a compiler that would store what it reduces.
      running_maximum: store scores minus the running maximum instead of their tile's maximum,
        where nothing is added back after rounding. What the tile adds then needs no rescaling.
      whole_maximum: round the running maximum up to a whole number, where scores are not rounded.
        With ``base_two`` its exponential is then a power of two, so that P has the same rounding
        errors whatever the running maximum was: in the forward pass and in the gradient.
      contracts: the compiler may compute product·gain − maximum with a single rounding.
      transposed: tiles are [n, R], columns [1, R] and outputs [E, R]: rows lie along the lanes of
        vectors, where a reduction over keys costs no shuffles.
      flat: columns have shape [R], for a compiler that would hold [R, 1] as a whole tile.
      float16_gradients: the precision of products of float32 operands in the gradients of float16
        inputs, which may leave float16.
      narrow_sums: guard against infinite sums of values that a row does not see, and keep m at
        `lowest` until a row sees a key, where the statistics are float16. (Costs a select over a
        tile of the output.)
    """

    base_two: bool = False
    exponential: str | None = None
    exp2: Callable[[Array], Array] = jnp.exp2
    matrix_columns: int = 0
    sum_columns: int = 0
    narrow: Callable[[Array, jnp.dtype], Array] = jnp.astype
    maximum_first: bool = False
    running_maximum: bool = False
    whole_maximum: bool = False
    contracts: bool = True
    transposed: bool = False
    flat: bool = False
    float16_gradients: lax.Precision | lax.DotAlgorithmPreset = lax.Precision.HIGHEST
    narrow_sums: bool = True


@dataclass(frozen=True)
class Numerics:
    """What is static about the arithmetic of a tile.

    Arguments:
      storage: how scores are stored.
      precision: the types of the intermediates.
      rounds_products: whether the product q·k is rounded to ``precision.scores`` before anything
        else can be done with it ("rounded products"); else it is seen in float32 first.
      inva: Inva of eq. 5 for `Storage.PAPER`; 1 for the others, whose offset is added back whole.
      logits_soft_cap: cap of s ↦ cap·tanh(s/cap), or None.
      modified: whether a function of the caller changes the scores after it.
      dialect: the forms that suit the machine.
      kept_share: the share of the weights that dropout keeps, or 1.
    """

    storage: Storage
    precision: Precision
    rounds_products: bool = False
    inva: float = 1.0
    logits_soft_cap: float | None = None
    modified: bool = False
    dialect: Dialect = Dialect()
    kept_share: float = 1.0

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
        """The type in which a tile's exponentials are computed; None: the statistics'."""
        if self.precision.exponential in POLYNOMIALS:
            return "float32"
        return self.precision.exponential or self.dialect.exponential

    @property
    def tile(self) -> jnp.dtype:
        """The type of a tile's arithmetic between product and probabilities.

        Where scores are stored and exponentials computed in the same 16 bits it may be those 16
        bits: subtracting two such numbers rounds once, to a result near zero, where it costs
        nothing.
        """
        same = self.precision.exponential == self.precision.scores
        wide = self.storage in (Storage.BENEATH_MAXIMUM, Storage.BOUND)
        wide = wide or self.subtracts_running_maximum
        narrow = same and not wide and not self.needs_scores
        return jnp.dtype(self.precision.scores) if narrow else self.statistics

    @property
    def centred(self) -> bool:
        """Whether `Storage.BOUND` stores scores as `BLOCK_MEAN` does, and takes its reference off
        afterwards: where products are rounded, or keys are, it cannot be done before.
        """
        rounded = self.rounds_products and self.precision.scores == "float16"
        return self.storage is Storage.BOUND and (rounded or self.precision.eight_bits)

    @property
    def needs_scores(self) -> bool:
        """Whether a tile needs the scores S themselves, for the soft cap or a function."""
        return self.logits_soft_cap is not None or self.modified

    @property
    def unit(self) -> float:
        """What natural scores are multiplied by: log2 e where they are in units of ln 2."""
        return math.log2(math.e) if self.dialect.base_two else 1.0

    def exp(self, x: Array) -> Array:
        """e^x for x in the unit of the scores."""
        return self.dialect.exp2(x) if self.dialect.base_two else jnp.exp(x)

    def exp_of_tile(self, x: Array) -> Array:
        """`exp` of a tile's exponents, by a polynomial where the precision asks for it."""
        degree = self.precision.exponential
        if degree not in POLYNOMIALS:
            return self.exp(x)
        x = x if self.dialect.base_two else x * x.dtype.type(math.log2(math.e))
        return polynomial_exp2(x, degree)

    def over_row(self, reduce: Callable[..., Array], x: Array) -> Array:
        """The column that ``reduce`` makes of x [R, n]."""
        axis = 0 if self.dialect.transposed else 1
        return reduce(x, axis=axis, keepdims=not self.dialect.flat)

    def column_shape(self, rows: int) -> tuple[int, ...]:
        """The shape of one number per row."""
        if self.dialect.transposed:
            return (1, rows)
        return (rows,) if self.dialect.flat else (rows, 1)

    def beside_tile(self, rows: int) -> tuple[int, int]:
        """The shape of one number per row that stands beside a tile."""
        return (1, rows) if self.dialect.transposed else (rows, 1)

    @property
    def maximum_first(self) -> bool:
        """Whether the row maximum of a tile that is seen whole is taken before the factor."""
        unrounded = self.storage is Storage.BENEATH_MAXIMUM or (
            self.storage is Storage.PLAIN and self.precision.scores == self.product.name
        )
        return self.dialect.maximum_first and unrounded and not self.needs_scores

    @property
    def subtracts_running_maximum(self) -> bool:
        """Whether a tile's base is the running maximum, this tile included, and not its own."""
        nothing_added_back = self.storage in (Storage.PLAIN, Storage.BENEATH_MAXIMUM)
        return nothing_added_back and self.dialect.running_maximum


def wide_type(dtype: jnp.dtype) -> jnp.dtype:
    """The type that sums numbers of ``dtype``: float64 for float64, else float32."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def lowest(dtype: jnp.dtype) -> float:
    """The finite number that stands for "no key seen" and for a masked score."""
    return float(jnp.finfo(dtype).min)
