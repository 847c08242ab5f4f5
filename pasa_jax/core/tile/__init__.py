"""The mathematics of one tile, as pure functions on arrays.

Every walker calls or traces exactly these: the lax loops, the Pallas kernels, the AscendC
generator. They use ordinary primitives alone (no control flow, no gather), and everything that is
one number per query row has shape [R, 1] (or [R], where the dialect is flat). Shapes: R rows,
n keys, D and E head sizes. The equations are those of docs/algorithm.md.

Where the guard asks for it, scores are stored divided by 2^e, e one number per row (eq. 12), 0 in
ordinary data. The exponent is multiplied by 2^e again, so m and every offset are divided too.
"""

from pasa_jax.core.tile.arrays import (
    Guard,
    divided,
    is_finite,
    low_rank,
    outer,
    shown_by,
    zero_unusable,
)
from pasa_jax.core.tile.bounds import (
    LARGEST_PRODUCT,
    LARGEST_STORED,
    RAISED_LOG2,
    RowBounds,
    Sight,
    extremes,
    fixed_reference,
    guard_by_size,
    in_range,
    in_range_by_sum,
    overreach,
    place_sight,
    power_above,
    reference,
    row_bounds,
    settled_reference,
    stored_error,
)
from pasa_jax.core.tile.inputs import (
    Codes,
    KeyTile,
    QueryTile,
    codes_of,
    key_tile,
    mean_key,
    query_tile,
)
from pasa_jax.core.tile.numerics import Dialect, Numerics, Storage, lowest, wide_type
from pasa_jax.core.tile.reverse import TileGradients, gradients, reverse
from pasa_jax.core.tile.softmax import probabilities, running_maximum, update
from pasa_jax.core.tile.state import (
    State,
    add_sink,
    finish,
    initial_state,
    merge,
    rounded,
    settle,
    sink_weight,
)
from pasa_jax.core.tile.stored import Modify, Scores, plain_scores, scores

__all__ = [
    "LARGEST_PRODUCT",
    "LARGEST_STORED",
    "RAISED_LOG2",
    "Codes",
    "Dialect",
    "Guard",
    "KeyTile",
    "Modify",
    "Numerics",
    "QueryTile",
    "RowBounds",
    "Scores",
    "Sight",
    "State",
    "Storage",
    "TileGradients",
    "add_sink",
    "codes_of",
    "divided",
    "extremes",
    "finish",
    "fixed_reference",
    "gradients",
    "guard_by_size",
    "in_range",
    "in_range_by_sum",
    "initial_state",
    "is_finite",
    "key_tile",
    "low_rank",
    "lowest",
    "mean_key",
    "merge",
    "outer",
    "overreach",
    "place_sight",
    "plain_scores",
    "power_above",
    "probabilities",
    "query_tile",
    "reference",
    "reverse",
    "rounded",
    "row_bounds",
    "running_maximum",
    "scores",
    "settle",
    "settled_reference",
    "shown_by",
    "sink_weight",
    "stored_error",
    "update",
    "wide_type",
    "zero_unusable",
]
