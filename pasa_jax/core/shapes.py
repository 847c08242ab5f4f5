"""Types of arrays with their shapes, for signatures. jaxtyping is no dependency at run time.

Only type checkers and tests import this module; others import it under `TYPE_CHECKING`.
tests/pasa_jax/test_shapes.py checks the annotations on running calls. Letters: R rows, n keys of a
tile, D and E head sizes, B batch, T queries, S keys, N query heads, K key heads, G = N/K.
"""

from __future__ import annotations

from jax import Array
from jaxtyping import Bool, Float, Float32, Int, Shaped, UInt32

# One number per query row; [R] where the dialect is flat.
Column = Float[Array, "R 1"] | Float[Array, " R"]
BoolColumn = Bool[Array, "R 1"] | Bool[Array, " R"]
# The mask of a tile, or of its rows. (The order counts: [R, 1] does not say that n is 1.)
TileMask = Bool[Array, "R 1"] | Bool[Array, "R n"]

__all__ = [
    "Array",
    "Bool",
    "BoolColumn",
    "Column",
    "Float",
    "Float32",
    "Int",
    "Shaped",
    "TileMask",
    "UInt32",
]
