"""Attention in 16-bit arithmetic that cannot overflow and loses no accuracy, for JAX."""

from pasa_jax.call.api import dot_product_attention, explain, partial_attention
from pasa_jax.call.explanation import Explanation
from pasa_jax.call.partial import Partial, merge
from pasa_jax.call.statistics import REASONS, Statistics
from pasa_jax.core.block_mask import BlockMask, and_masks, create_block_mask, or_masks
from pasa_jax.core.errors import BackendUnsupported, ScheduleError
from pasa_jax.core.low_rank import LowRankBias, alibi_slopes
from pasa_jax.core.mask import Mask
from pasa_jax.core.precision import Precision
from pasa_jax.core.schedule import Schedule
from pasa_jax.core.shifts import SHIFTS, optimal_beta
from pasa_jax.core.target import TARGETS, Target

__version__ = "0.1.0"

__all__ = [
    "REASONS",
    "SHIFTS",
    "TARGETS",
    "BackendUnsupported",
    "BlockMask",
    "Explanation",
    "LowRankBias",
    "Mask",
    "Partial",
    "Precision",
    "Schedule",
    "ScheduleError",
    "Statistics",
    "Target",
    "alibi_slopes",
    "and_masks",
    "create_block_mask",
    "dot_product_attention",
    "explain",
    "merge",
    "optimal_beta",
    "or_masks",
    "partial_attention",
]
