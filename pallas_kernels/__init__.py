"""PASA as Pallas kernels: the walkers of `pasa_jax` whose tiles are refs on the chip.

Users call `pasa_jax.dot_product_attention`; its table of implementations imports what it needs
from here on first use.
"""
