"""PASA in flax models, and in code that calls `jax.nn.dot_product_attention`.

`nnx.attention_fn`, `linen.attention_fn`   for the ``attention_fn`` of flax's attention modules
`patch`                                    swaps the attention of a finished nnx model
`linen.replaced`, `nnx.replaced`           swap all of flax's attention, while a context lasts
`replace_jax_nn`                           the same for callers of `jax.nn.dot_product_attention`
`KVCache`, `KVCaches`                      keys and values of a decoder, and their block means

Nothing here is imported by `import pasa_jax`. docs/flax.md shows each at work.
"""

from pasa_jax.plugins import linen, nnx
from pasa_jax.plugins.cache import KVCache, KVCaches
from pasa_jax.plugins.patching import Patch, patch, replace_jax_nn

__all__ = ["KVCache", "KVCaches", "Patch", "linen", "nnx", "patch", "replace_jax_nn"]
