"""The instructions of AscendC that kernels are made of: one class for each form of call.

An object holds the operands of one call; its text, its pipe, the memory it touches, its time and
what it computes all follow from them.
"""

from npu_bridge.instructions.copy import DataCopy, FirstBlocks, MatrixIn, RowsIn, RowsOut
from npu_bridge.instructions.cube import Fixpipe, LoadData, Mmad
from npu_bridge.instructions.operations import BINARY, UNARY, WITH_SCALAR, Operation
from npu_bridge.instructions.reduce import BlockReduce, WholeReduce
from npu_bridge.instructions.select import Compare, Select
from npu_bridge.instructions.vector import (
    Binary,
    BinaryStrided,
    Brcb,
    Cast,
    Duplicate,
    SetValue,
    Strided,
    Unary,
    WithScalar,
)

__all__ = [
    "BINARY",
    "UNARY",
    "WITH_SCALAR",
    "Binary",
    "BinaryStrided",
    "BlockReduce",
    "Brcb",
    "Cast",
    "Compare",
    "DataCopy",
    "Duplicate",
    "FirstBlocks",
    "Fixpipe",
    "LoadData",
    "MatrixIn",
    "Mmad",
    "Operation",
    "RowsIn",
    "RowsOut",
    "Select",
    "SetValue",
    "Strided",
    "Unary",
    "WholeReduce",
    "WithScalar",
]
