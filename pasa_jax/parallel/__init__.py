"""Many devices: the sequence, the heads and the batch of attention over a mesh."""

from pasa_jax.parallel._local import all_gather, ring, ring_ulysses, ulysses
from pasa_jax.parallel._mesh import ParallelAttention, attention_fn

__all__ = [
    "ParallelAttention",
    "all_gather",
    "attention_fn",
    "ring",
    "ring_ulysses",
    "ulysses",
]
