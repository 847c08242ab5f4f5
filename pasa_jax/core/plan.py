"""`Plan`: the static part of one call, all defaults resolved."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property

import jax
import jax.numpy as jnp

from pasa_jax.core.precision import Precision
from pasa_jax.core.schedule import Schedule
from pasa_jax.core.shifts import PaperBlocks, paper_blocks
from pasa_jax.core.target import find_target
from pasa_jax.core.tile import Dialect, Numerics, Storage, wide_type

Array = jax.Array


@dataclass(frozen=True)
class Plan:
    """The static part of one call, all defaults resolved.

    `call.backends.choose` adapts it to the implementation; what computes reads only the adapted
    plan, and reads from ``storage`` how scores are stored.

    Arguments:
      shift: as asked for, ``"auto"`` included.
      precision, schedule: defaults resolved.
      logits_soft_cap: or None.
      modified: whether a function of the caller changes scores.
      beta: β of `paper`, or None for `optimal_beta` of the block.
      scale: 1/α where it is a Python number; None: it is an array. `paper` folds it into M.
      explicit_precision: whether the caller named the precision.
      dialect: the forms that suit the implementation's machine.
      dropout_rate: the share of the weights that dropout drops.
      guarded: whether the implementation keeps scores in range (eq. 12).
      wide_output: whether the output is float32 (float64 for float64) instead of the inputs' type.
      interpret: whether a Pallas kernel is run step by step, on any device.
    """

    shift: str
    precision: Precision
    schedule: Schedule
    logits_soft_cap: float | None = None
    modified: bool = False
    beta: float | None = None
    scale: float | None = None
    explicit_precision: bool = False
    dialect: Dialect = field(default_factory=Dialect)
    dropout_rate: float = 0.0
    guarded: bool = True
    wide_output: bool = False
    interpret: bool = False

    @cached_property
    def storage(self) -> Storage:
        """How scores are stored, after the static part of `auto`'s choice (section 6)."""
        rounded = self.rounds_products
        if self.shift == "reference":
            return Storage.LAGGING if rounded else Storage.BENEATH_MAXIMUM
        if self.shift != "auto":
            return Storage(self.shift)
        if self.precision.eight_bits:
            return Storage.BLOCK_MEAN
        if self.precision.scores in ("float32", "float64") and self.precision.products != "float16":
            return Storage.PLAIN
        return Storage.BLOCK_MEAN if rounded else Storage.BENEATH_MAXIMUM

    @property
    def unproved(self) -> Plan:
        """The plan for heads whose bound is too wide: a running maximum, scores in float32; or
        those of `mean`, whose keys less κ it has then.

        A plan of another shift needs no proof, and is its own.
        """
        if self.storage is not Storage.BOUND:
            return self
        return replace(self, shift="mean" if self.centred else "auto")

    @property
    def centred(self) -> bool:
        """Whether scores are stored as those of `mean` are, and a bound is taken off afterwards."""
        return self.storage is Storage.BOUND and self.numerics(1).centred

    @property
    def rounds_products(self) -> bool:
        """Whether q·k is rounded to 16 bits before anything can be taken off it: by the target, or
        because it is added up in float16 ("rounded products")."""
        target = find_target(self.schedule.target)
        return not target.accumulator_reachable or self.precision.products == "float16"

    @property
    def promises_finite(self) -> bool:
        """Whether finite inputs must give finite outputs.

        The shift ``none`` promises nothing, nor do statistics or accumulators of 16 bits.
        """
        narrow = (self.precision.statistics, self.precision.accumulator)
        return self.guarded and self.shift != "none" and "float16" not in narrow

    def output(self, dtype: jnp.dtype) -> jnp.dtype:
        """The type of the output for inputs of ``dtype``."""
        return wide_type(dtype) if self.wide_output else jnp.dtype(dtype)

    @property
    def chooses_per_head(self) -> bool:
        """Whether `auto` decides for each key head, by the data."""
        return (
            self.shift == "auto"
            and self.storage is Storage.BLOCK_MEAN
            and not self.precision.eight_bits
        )

    def explain_shift(self) -> tuple[str, str]:
        """The shift, and the reason for it as a clause."""
        target, scores = self.schedule.target, self.precision.scores
        if self.storage is Storage.BOUND:
            rule = "each key head decides: bound where it is proved to be safe"
            if find_target(target).kind == "tpu":
                rule = "each query tile decides: bound where its row sums prove that it was safe"
            return "bound or none", rule
        if self.shift != "auto":
            return self.shift, "it was asked for"
        if self.precision.eight_bits:
            return "mean", "keys lose their block's mean before they are rounded to 8 bits"
        if self.storage is Storage.PLAIN:
            return "none", f"scores are stored in {scores}"
        if self.storage is Storage.BENEATH_MAXIMUM:
            return "reference", f"{target} sees the float32 product before it is rounded"
        why = f"{target} rounds the product to {scores} first"
        if self.precision.products == "float16":
            why = "products are added up in float16"
        rule = "mean where the offset makes the scores that count larger"
        return "none or mean", f"{why}, so each key head decides: {rule}"

    def numerics(self, keys: int) -> Numerics:
        """The static arithmetic of a tile of a call with S = ``keys``."""
        paper = self.storage is Storage.PAPER
        return Numerics(
            storage=self.storage,
            precision=self.precision,
            rounds_products=self.rounds_products,
            inva=self.paper_blocks(keys).inva if paper else 1.0,
            logits_soft_cap=self.logits_soft_cap,
            modified=self.modified,
            dialect=self.dialect,
            kept_share=1 - self.dropout_rate,
        )

    def gain(self, scale: Array) -> Array:
        """The factor of the product: 1/α, or the part of it that is not in the paper's M."""
        paper = self.storage is Storage.PAPER
        return jnp.full_like(scale, self._paper_gain) if paper else scale

    @property
    def _paper_gain(self) -> float:
        """The power of two, at least 1, that is left out of M.

        |K'| ≤ 2·max|K|/α must fit the type of the keys. It is 1 where α ≥ 2, as for every usual
        head size.
        """
        assert self.scale is not None
        return max(1.0, 2.0 ** math.ceil(math.log2(2 * abs(self.scale))))

    def paper_blocks(self, keys: int) -> PaperBlocks:
        assert self.scale is not None
        return paper_blocks(self.schedule.block_kv, keys, self.beta, self.scale / self._paper_gain)
