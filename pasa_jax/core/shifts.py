"""The shifts by name, and the paper's pseudo-average matrix M and its optimal β.

A shift says what is taken off the scores before they are stored in 16 bits, and added back in the
online softmax (docs/algorithm.md, section 2):

    none        nothing: plain 16-bit storage of q·k/α, which overflows beyond 65504
    paper       the fraction β of each key block's mean, by the rounded matrix M   (eq. 4)
    mean        q·κ/α, κ the mean of the block's keys                              (eq. 7)
    mean_past   the same with κ from earlier keys alone, for causal masks          (eq. 8)
    reference   the row maximum of the float32 tile, before rounding               (eq. 9)
    bound       a bound on the row maximum, known before the walk: it is taken off in
                float32, and partial results add                                   (eq. 21)
    auto        chooses, per key head where the choice depends on the data         (section 6)
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pasa_jax.core.errors import wrong

SHIFTS = ("none", "paper", "mean", "mean_past", "reference", "bound")

# The paper's starting points 1 − 2⁻⁴, 1 − 2⁻⁵ and 1 − 2⁻⁶ for β.
PAPER_STARTS = (1 - 2**-4, 1 - 2**-5, 1 - 2**-6)


def _float16(x: float) -> float:
    return float(np.float16(x))


def optimal_beta(
    block_kv: int, start: float = PAPER_STARTS[-1], *, iterations: int = 1000
) -> float:
    """β for which the float16 matrix I − (β/n)·J removes exactly what Inva = β/(1 − β) restores.

    The fixed point of β = 1 − r(β), with r(β) the row sum of the rounded matrix (the paper's
    "optimal accuracy condition"; docs/algorithm.md, eq. 6).

    Arguments:
      block_kv: n, the keys of a block.
      start: where the iteration starts, in (0, 1); the paper uses `PAPER_STARTS`.
      iterations: bound on the steps; it settles in a few.

    Raises:
      ValueError: ``start`` is not in (0, 1), ``block_kv`` is not positive, or the iteration
        leaves (0, 1), as it does for blocks so long that β/n has no float16 digits left.

    >>> round(optimal_beta(128), 6)
    0.984497
    """
    if block_kv < 1:
        raise wrong("block_kv", "be positive", block_kv)
    check_beta(start, "start")
    beta = start
    for _ in range(iterations):
        off = _float16(-beta / block_kv)
        row_sum = _float16(1 - beta / block_kv) + (block_kv - 1) * off
        if beta == 1 - row_sum:
            return beta
        beta = 1 - row_sum
        if not 0 < beta < 1:
            break
    raise wrong(
        "start", f"lead to a fixed point in (0, 1) for block_kv={block_kv}", start, "Try another."
    )


def check_beta(beta: float, argument: str = "beta") -> None:
    """Raises unless 0 < β < 1."""
    if isinstance(beta, (str, complex)) or not 0 < beta < 1:
        raise wrong(argument, "lie strictly between 0 and 1", repr(beta))


def paper_matrix(
    weights: NDArray[np.bool_], beta: float, scale: float, dtype: np.dtype
) -> tuple[NDArray, float]:
    """M = (I − (β/n)·J)·scale of the columns in ``weights``, rounded last, and Inva (eq. 4, 5).

    Arguments:
      weights: [n] bool; True for the columns of the block, False for those that the tile holds
        besides (the tail block's own n is the number of True).
      beta: β in (0, 1).
      scale: 1/α, usually 1/√D.
      dtype: the type M is rounded to, that of the keys.

    Returns:
      M [n, n] of ``dtype`` and Inva. Inva is computed from the rounded matrix, so that what it
      restores is what M removed. The paper's β/(1 − β) is that only while 1/√D is a power of two.
    """
    count = int(weights.sum())
    exact = np.diag(weights.astype(np.float64)) - beta / count * np.outer(weights, weights)
    matrix = (exact * scale).astype(np.float32).astype(dtype)
    row = matrix[int(np.argmax(weights))].astype(np.float64)
    return matrix, float(scale / row.sum() - 1)


class PaperBlocks(NamedTuple):
    """`paper`'s constants: one matrix for full blocks, one for the tail, one Inva for both."""

    matrix: np.ndarray  # [n, n] float32 that holds float16 numbers
    weights: np.ndarray  # [n, 1]
    tail_matrix: np.ndarray
    tail_weights: np.ndarray
    inva: float


@lru_cache(maxsize=32)
def paper_blocks(n: int, keys: int, beta: float | None, scale: float) -> PaperBlocks:
    """M and the row-mean weights for ``keys`` keys in blocks of n.

    The tail tile is the last n columns; those that belong to the block before it do not count in
    its mean.
    """
    beta = optimal_beta(n) if beta is None else beta
    float16 = np.dtype(np.float16)
    columns = np.ones(n, bool)
    matrix, inva = paper_matrix(columns, beta, scale, float16)
    tail = columns.copy()
    if keys % n:
        tail[: n - keys % n] = False
    tail_matrix, tail_inva = paper_matrix(tail, beta, scale, float16)
    # Inva depends on n through M's rounding; the tail's row mean carries the ratio.
    ratio = tail_inva / inva
    return PaperBlocks(
        matrix.astype(np.float32),
        np.full((n, 1), 1 / n, np.float32),
        tail_matrix.astype(np.float32),
        (tail[:, None] * (ratio / tail.sum())).astype(np.float32),
        inva,
    )
