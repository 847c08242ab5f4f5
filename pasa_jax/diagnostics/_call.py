"""`Call`: what was measured of one attention call."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pasa_jax.diagnostics._forms import EAGER, FLOAT32_SCORES, Errors
from pasa_jax.diagnostics._measure import EDGE, LARGEST

# A relative error beyond this is called inaccurate.
TOLERANCE = 1e-2


@dataclass(frozen=True, kw_only=True)
class Call:
    """One attention call. Arrays have an entry per query head; over batch entries, the largest.

    Arguments:
      name: path of the flax module that made the call, or its function and line; behind it, in
        brackets, the step of each ``jax.lax.scan`` in which it ran: a layer's number where a scan
        walks over the layers.
      via: ``"flax.nnx"``, ``"flax.linen"``, ``"jax.nn"`` or ``"pasa_jax"``.
      shapes: of query [B, T, N, D], key [B, S, K, D] and value [B, S, K, E].
      dtype, scale: of the call.
      not_finite: the shares of query, key and value that are NaN or infinite, and not hidden.
      auto: what the default does with the call as it is, and why.
      float16_shift: what the default would do here with scores in float16.
      shifts_if_rounded: [N] bool: with rounded products (Ascend 910B), whether the default takes
        the mean of the keys off, or nothing.
      max_product, max_score: [N] max |q·k|, and times the scale.
      max_stored: [N] the largest score that the default stores, in float16, after its shift.
      product_share, score_share: [N] share of the q·k, and of the scores, beyond float16.
      key_bias, key_deviation: [N] norm of the keys' mean; root mean square distance from it.
      resonance: [N] −1 to 1: the largest score over max‖q‖·max‖k‖, signed.
      phases: [N, 18] share of the pairs whose phase arccos(q·k/‖q‖‖k‖) is in each bin of 10°.
        Where q and k are waves along the head channels it is their difference of phase: 0° and
        180° are resonance (arXiv 2503.01873, section 3).
      query_mean, key_mean, key_spread: [N, D] by channel: means over the sequence, and the keys'
        standard deviation.
      errors: type -> form -> [N]: the relative error to expect of the output, measured; the cast
        of query, key and value to the type is part of it.
      formats: format of a cache -> [N]: the relative error of the output that it would cause alone,
        measured.
    """

    name: str
    via: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    scale: float
    not_finite: tuple[float, ...]
    auto: str
    float16_shift: str
    shifts_if_rounded: NDArray
    max_product: NDArray
    max_score: NDArray
    max_stored: NDArray
    product_share: NDArray
    score_share: NDArray
    key_bias: NDArray
    key_deviation: NDArray
    resonance: NDArray
    phases: NDArray
    query_mean: NDArray
    key_mean: NDArray
    key_spread: NDArray
    errors: Errors
    formats: dict[str, NDArray]

    @property
    def heads(self) -> int:
        """N."""
        return len(self.max_product)

    @property
    def margin(self) -> NDArray:
        """[N] what q·k may grow by before float16 cannot hold it; below 1 it cannot now."""
        return LARGEST / np.maximum(self.max_product, np.finfo(np.float32).tiny)

    @property
    def overflows(self) -> NDArray:
        """[N] bool: some q·k is infinite in float16."""
        return self.max_product >= EDGE

    def cast_cost(self, dtype: str) -> NDArray:
        """[N] the error that the cast to ``dtype`` causes by itself: that of float32 scores."""
        errors = self.errors.get(dtype)
        return np.zeros(self.heads) if errors is None else errors[FLOAT32_SCORES]

    def added(self, dtype: str, form: str) -> NDArray:
        """[N] what ``form`` adds to the cast: its error divided by that of float32 scores.

        NaN where the form's output is NaN, and where the cast's is already; 1 where both are 0.
        """
        error, cast = self.errors[dtype][form], self.cast_cost(dtype)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(error == cast, 1.0, error / cast)

    def cast_costs_much(self, dtype: str) -> NDArray:
        """[N] bool: inputs in ``dtype`` err more than `TOLERANCE` with float32 scores as well."""
        return ~(self.cast_cost(dtype) <= TOLERANCE)

    def inaccurate(self, dtype: str) -> NDArray:
        """[N] bool: eager code in ``dtype`` gives NaN, or errs more than twice as much as the cast
        and more than `TOLERANCE`."""
        if dtype not in self.errors:
            return np.zeros(self.heads, bool)
        return ~(self.errors[dtype][EAGER] <= np.maximum(2 * self.cast_cost(dtype), TOLERANCE))
