"""Sizes, depths, flags and event ids that every kernel shares."""

from __future__ import annotations

from typing import NamedTuple

VECTOR_CORES = 2  # of one cube core
SUB = 128  # side of the tiles that the cube unit multiplies
LEAST = 16  # rows and columns that the cube unit multiplies at least
PIECE = 64  # rows of a sub-tile of scores that leave the cube unit at once
CHUNK = 64  # columns of values that are multiplied at once
CLOSING = 16  # rows whose output is computed at once
AHEAD = 3  # key tiles by which the scores are ahead of P·V
DEPTH = AHEAD + 1  # tiles of each kind in the workspace
LAG = 2  # key tiles by which the output is behind the probabilities
CARRIED = LAG + 1  # tiles whose carried columns are held
QUERIES = 2  # items whose queries are held
ITEMS = LAG + 1  # items whose row statistics are held, while output of them is still to come

# How AscendC names the place of a tensor, by the memory that it lies in.
POSITIONS = {"UB": "VECCALC", "L1": "A1", "L0A": "A2", "L0B": "B2", "L0C": "CO1"}
# Cross-core flags.
FLAGS = {
    "SCORES_READY": 0,
    "P_READY": 1,
    "UPDATE_READY": 2,
    "QUERY_READY": 3,
    "QUERY_TAKEN": 4,
    "CENTRE_READY": 5,  # of the shift "bound" only
    "REFERENCE_READY": 6,  # these two of the shift "reference" only
    "SHIFTED_READY": 7,
}
# Event ids of the vector core, per pair of pipes; SOFTMAX and UPDATE have one for each slot.
SOFTMAX, UPDATE, SINGLE, PADDING = 0, 2, 4, 5


class Slabs(NamedTuple):
    """How a vector core cuts its rows.

    Arguments:
      rows: of a slab.
      masked: of a slab of a tile that is masked, which takes more memory.
      update: of a slab of P·V.
      slots: of the buffers for P and for P·V.
    """

    rows: int
    masked: int
    update: int
    slots: int


# The tallest first, double-buffered before it is not.
SLABS = [
    Slabs(rows, masked, update, slots)
    for rows in (64, 32, 16, 8)
    for slots in (2, 1)
    for masked in (rows, 16, 8)
    for update in (32, 16)
    if masked <= rows
]
