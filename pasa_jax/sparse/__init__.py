"""Which blocks of causal attention to compute: choosers of a `BlockMask`, and sparse attention.

    block_mask = xattention(q, k)
    out = dot_product_attention(q, k, v, is_causal=True, block_mask=block_mask)

A chooser takes queries and keys after their rotary positions and can be compiled by `jax.jit`. It
places the last query at the last key: where T < S, call attention with
``causal_alignment="bottom_right"``. docs/sparse.md says where each works, and where not.
"""

from pasa_jax.sparse._antidiagonal import xattention
from pasa_jax.sparse._delta import delta_correction
from pasa_jax.sparse._flash import dropped_keys, hash_buckets, random_buckets
from pasa_jax.sparse._lines import line_scores, vertical_slash, vertical_slash_of
from pasa_jax.sparse._share import share_prefill
from pasa_jax.sparse._window import sink_window

__all__ = [
    "delta_correction",
    "dropped_keys",
    "hash_buckets",
    "line_scores",
    "random_buckets",
    "share_prefill",
    "sink_window",
    "vertical_slash",
    "vertical_slash_of",
    "xattention",
]
