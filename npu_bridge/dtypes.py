"""The types of numbers, by the names that C++ has for them."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

BLOCK = 32  # bytes of a block, in which the on-chip memories are addressed
REPEAT = 256  # bytes that a vector instruction computes at a time: a repeat
# C++ type by the name of jax's.
C_TYPES = {
    "float16": "half",
    "bfloat16": "bfloat16_t",
    "float32": "float",
    "int32": "int32_t",
    "bool": "uint8_t",
    "uint8": "uint8_t",
}
# What holds each C++ type in NumPy.
NUMPY = {
    "half": np.dtype(np.float16),
    "bfloat16_t": np.dtype(jnp.bfloat16),
    "float": np.dtype(np.float32),
    "int32_t": np.dtype(np.int32),
    "uint16_t": np.dtype(np.uint16),
    "uint8_t": np.dtype(np.uint8),
}
ITEMSIZE = {name: dtype.itemsize for name, dtype in NUMPY.items()}
