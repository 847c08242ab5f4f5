"""Many devices: the sequence, the heads and the batch of attention over a mesh."""

from pasa_jax.parallel._cost import CHIPS, Chip, Cost, Plan, plan
from pasa_jax.parallel._local import all_gather, ring, ring_ulysses, ulysses
from pasa_jax.parallel._mesh import ParallelAttention, ParallelExplanation, attention_fn
from pasa_jax.parallel._order import by_position, inverse_striped, inverse_zigzag, striped, zigzag

__all__ = [
    "CHIPS",
    "Chip",
    "Cost",
    "ParallelAttention",
    "ParallelExplanation",
    "Plan",
    "all_gather",
    "attention_fn",
    "by_position",
    "inverse_striped",
    "inverse_zigzag",
    "plan",
    "ring",
    "ring_ulysses",
    "striped",
    "ulysses",
    "zigzag",
]
