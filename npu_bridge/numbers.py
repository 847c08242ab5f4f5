"""The numbers of one call, and the arrays of the workspace, whose sizes are made of them.

Each number stands once, as an expression: the host's make_tiling.h and the kernel's `Problem` are
rendered from it, and `Tiling` and `values_of` give its value here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from npu_bridge.bound_stages import FACTS
from npu_bridge.cut import Product
from npu_bridge.dtypes import C_TYPES, ITEMSIZE
from npu_bridge.expressions import Expr, evaluate
from npu_bridge.layout import DEPTH, LEAST, QUERIES, SUB, VECTOR_CORES
from npu_bridge.specification import Kernel


@dataclass(frozen=True)
class Number:
    """A number of one call.

    Arguments:
      expression: of numbers that stand before it.
      c_text: its C++, where that is not the expression.
    """

    name: str
    expression: Expr
    c_text: str = ""

    @property
    def text(self) -> str:
        return self.c_text or str(self.expression)


# What the host works out of a call's sizes.
ENTRIES = Number("kvEntries", "uint64_t(batch) * kvHeads")
BLOCKS = Number("keyBlocks", "(keyLength + PASA_BLOCK_KV - 1) / PASA_BLOCK_KV")
# Decoding: as many parts of the keys as keep every core at work.
SHARES = Number("shares", "(cores + kvEntries - 1) / kvEntries")
PARTS = Number(
    "parts",
    "Min(shares, keyBlocks)",
    "static_cast<int32_t>(shares < keyBlocks ? shares : keyBlocks)",
)
# Decoding: the query heads of a key head are the rows of a tile.
GROUP_ROWS = Number("queryLength", "heads / kvHeads")
GROUP_HEADS = Number("heads", "kvHeads")
QUERY_ROWS = Number(
    "queryRows",
    "uint64_t(batch) * heads * ((queryLength + PASA_BLOCK_Q - 1) / PASA_BLOCK_Q) * PASA_BLOCK_Q",
)
# Packed: slots of query tiles and of key blocks that the sequences share; see `cores.context`.
PACKED_BLOCKS = Number("keyBlocks", "keyLength / PASA_BLOCK_KV + batch")
PACKED_ROWS = Number(
    "queryRows", "uint64_t(heads) * (queryLength / PASA_BLOCK_Q + batch) * PASA_BLOCK_Q"
)
CORE_ROWS = Number("coreRows", f"uint64_t(cores) * {DEPTH} * PASA_BLOCK_Q")


def host_numbers(kernel: Kernel) -> list[Number]:
    """What the host works out, in order."""
    parts = [SHARES, PARTS, GROUP_ROWS, GROUP_HEADS] if kernel.decode else [Number("parts", 1)]
    if kernel.packed:
        return [ENTRIES, PACKED_BLOCKS, *parts, PACKED_ROWS, CORE_ROWS]
    return [ENTRIES, BLOCKS, *parts, QUERY_ROWS, CORE_ROWS]


def kernel_numbers(kernel: Kernel) -> list[Number]:
    """The members of the kernel's `Problem`, in order, from its tiling."""
    s, decode, packed = kernel.schedule, kernel.decode, kernel.packed
    tiles = f"CeilDiv(tiling->queryLength, {s.block_q})"
    blocks = f"CeilDiv(tiling->keyLength, {s.block_kv})"
    if packed:
        tiles = f"tiling->queryLength / {s.block_q} + tiling->batch"
        blocks = f"tiling->keyLength / {s.block_kv} + tiling->batch"
    return [
        Number("batch", "tiling->batch"),
        Number("heads", "tiling->heads"),
        Number("kvHeads", "tiling->kvHeads"),
        Number("groups", "tiling->heads / tiling->kvHeads"),
        Number("queryLength", "tiling->queryLength"),
        Number("keyLength", "tiling->keyLength"),
        Number("queryTiles", tiles),
        Number("keyBlocks", blocks),
        Number("parts", "tiling->parts"),
        Number("items", f"{'' if packed else 'batch * '}heads * queryTiles * parts"),
        Number("cores", "tiling->cores"),
        Number("queries", 1 if decode else "queryLength"),
        Number("rowStride", 1 if decode else "heads"),
        Number("headStride", "queryLength" if decode else 1),
        Number("scale", "tiling->scale"),
    ]


@dataclass(frozen=True)
class Size:
    """One or several sizes of an array: the letters of its axes, and their product."""

    axes: str
    count: Expr
    per_core: bool = False


_QUERIES = Size(f"{QUERIES}, block_q", f"uint64_t(cores) * {QUERIES} * PASA_BLOCK_Q", per_core=True)
_ROWS = Size("B, N, padded T", QUERY_ROWS.name)
_TILES = Size("query tiles, 2", f"{QUERY_ROWS.name} / PASA_BLOCK_Q * 2")
_HEADS = Size("B, K", ENTRIES.name)
_KEY_HEADS = Size("K", "uint64_t(kvHeads)")  # packed
_BLOCKS = Size("blocks", BLOCKS.name)
_GROUPED = Size("blocks in whole groups", f"(({BLOCKS.name} + {LEAST - 1}) / {LEAST} * {LEAST})")
_PACKED_GROUPED = Size("blocks and a group", f"({BLOCKS.name} + {LEAST})")
_ITEM_ROWS = Size("items, block_q", f"{QUERY_ROWS.name} * {PARTS.name}")
_CORE_ROWS = Size(f"{DEPTH}, block_q", CORE_ROWS.name, per_core=True)
_CORE_COLUMNS = Size(f"{DEPTH}, {LEAST}, block_q", f"{CORE_ROWS.name} * {LEAST}", per_core=True)
_ITEMS = Size("items, vector cores", f"{QUERY_ROWS.name} / PASA_BLOCK_Q * {VECTOR_CORES}")
_CORES = Size("vector cores", f"uint64_t(cores) * {VECTOR_CORES}")
_CORE_BLOCKS = Size(f"{DEPTH}, block_q", CORE_ROWS.name, per_core=True)
_FACTS = Size(str(len(FACTS)), len(FACTS))
_PROOFS = Size(f"{DEPTH}, vector cores", f"uint64_t(cores) * {DEPTH * VECTOR_CORES}", per_core=True)
_ONES = Size(f"{SUB}, {LEAST}", SUB * LEAST)
_LEAST = Size(str(LEAST), LEAST)
_N = Size("n", "PASA_BLOCK_KV")
_D = Size("D", "PASA_HEAD_DIM")
_E = Size("E", "PASA_VALUE_HEAD_DIM")


@dataclass(frozen=True)
class Array:
    """An array of the workspace.

    Arguments:
      dtype: its C++ type.
      what: it holds.
    """

    name: str
    dtype: str
    shape: tuple[Size, ...]
    what: str

    @property
    def note(self) -> str:
        """Its shape and what it holds."""
        axes = ", ".join(size.axes for size in self.shape)
        per_core = " per core:" if any(size.per_core for size in self.shape) else ""
        return f"[{axes}]{per_core} {self.what}"

    @property
    def count(self) -> str:
        """Its elements, in the names of make_tiling.h."""
        return " * ".join(str(size.count) for size in self.shape)

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]


def workspace(kernel: Kernel, products: dict[str, Product]) -> list[Array]:
    """The arrays by which the cores hand over, in order."""
    types = {p.name: p.dtype for p in products.values()}
    dtype = C_TYPES[kernel.dtype]
    heads, grouped = (_KEY_HEADS, _PACKED_GROUPED) if kernel.packed else (_HEADS, _GROUPED)
    arrays = [
        Array("scaledQuery", dtype, (_QUERIES, _D), "query rows as they are multiplied"),
    ]
    if kernel.keys_shifted:
        arrays.append(Array("shiftedKey", dtype, (heads, _BLOCKS, _N, _D), "K'"))
    last = "the last block, if it is not full"
    if kernel.careful:
        arrays.append(Array("valueCopy", dtype, (heads, _BLOCKS, _N, _E), "the finite values"))
        arrays.append(Array("guard", "float", (_ROWS,), "power of two that a row is divided by"))
        arrays.append(Array("keyBound", "float", (_HEADS,), "largest magnitude of the keys"))
        arrays.append(Array("valueGain", "float", (_HEADS,), "factor of the values"))
    elif kernel.form != "mean":  # keys are multiplied as they lie
        arrays.append(Array("keyTail", dtype, (_HEADS, _N, _D), last))
    if not kernel.careful:
        arrays.append(Array("valueTail", dtype, (_HEADS, _N, _E), last))
    if kernel.repaired or kernel.careful:
        note = "0, or NaN where the result must be computed again"
        arrays.append(Array("damage", "float", (_ITEMS,), note))
        arrays.append(Array("coreDamage", "float", (_CORES,), "the same of a core's items"))
    if "shifted" in types:
        arrays.append(Array("shifted", types["shifted"], (_CORE_ROWS, _N), "S − r"))
        arrays.append(Array("minus", dtype, (_CORE_COLUMNS,), "−r in two halves"))
    if kernel.chooses:
        arrays.append(Array("moments", "float", (_TILES, _D), "Σq of a query tile, and Σq²"))
        arrays.append(Array("spread", "float", (_HEADS, _BLOCKS, _D), "Σ(k − κ)² of a block"))
        arrays.append(Array("takesKappa", "float", (_HEADS,), "1 where κ is taken off, else 0"))
    if "offsets" in types:
        arrays.append(Array("kappa", dtype, (heads, grouped, _D), "κ"))
        size = (_CORE_BLOCKS, _GROUPED) if kernel.bounded else (_CORE_COLUMNS,)
        arrays.append(Array("offsets", types["offsets"], size, "q·κ"))
    if kernel.bounded:
        arrays.append(Array("norms", "float", (_CORE_ROWS,), "lengths of the query rows"))
        arrays.append(Array("facts", "float", (_HEADS, _FACTS, _GROUPED), ", ".join(FACTS)))
        arrays.append(Array("proof", "float", (_PROOFS,), "0, or 1 where a row is not proved"))
    if "sums" in types:
        arrays.append(Array("ones", dtype, (_ONES,), "ones"))
        arrays.append(Array("sums", types["sums"], (_CORE_ROWS, _LEAST), "row sums of P"))
    if kernel.decode:
        arrays.append(Array("partO", "float", (_ITEM_ROWS, _E), "O of a part of the keys"))
        arrays.append(Array("partM", "float", (_ITEM_ROWS,), "m of it"))
        arrays.append(Array("partL", "float", (_ITEM_ROWS,), "l of it"))
    arrays.append(Array("scores", types["scores"], (_CORE_ROWS, _N), "S'"))
    arrays.append(Array("p", dtype, (_CORE_ROWS, _N), "P"))
    arrays.append(Array("update", types["update"], (_CORE_ROWS, _E), "P·V"))
    return arrays


def shared(first: list[Array], second: list[Array]) -> tuple[list[Array], dict[str, str]]:
    """The arrays of two kernels that run one after the other, and what those of the second are
    called: an array that both have is one.
    """
    arrays, names = list(first), {}
    of_first = {a.name: a for a in first}
    for a in second:
        name = a.name
        if name in of_first and of_first[name] != a:
            name = f"careful{a.name[0].upper()}{a.name[1:]}"
        names[a.name] = name
        if name not in of_first:
            arrays.append(replace(a, name=name))
    return arrays, names


# Values.


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """The values that the host passes to the kernel, under their names there.

    Arguments:
      host: every number that the host knows, by name.
    """

    batch: int
    heads: int
    kvHeads: int
    queryLength: int
    keyLength: int
    cores: int
    scale: float
    parts: int
    host: dict[str, Any] = field(repr=False, default_factory=dict)

    def elements(self, array: Array) -> int:
        """How many elements an array of the workspace has."""
        return evaluate(array.count, self.host)


def tiling(
    kernel: Kernel,
    *,
    batch: int,
    heads: int,
    kv_heads: int,
    queries: int,
    keys: int,
    cores: int,
    scale: float | None = None,
) -> Tiling:
    """What make_tiling.h fills in for a call."""
    given: dict[str, Any] = {
        "batch": batch,
        "heads": heads,
        "kvHeads": kv_heads,
        "queryLength": queries,
        "keyLength": keys,
        "cores": cores,
    }
    constants = {
        "PASA_BLOCK_Q": kernel.schedule.block_q,
        "PASA_BLOCK_KV": kernel.schedule.block_kv,
        "PASA_HEAD_DIM": kernel.head_dim,
        "PASA_VALUE_HEAD_DIM": kernel.value_head_dim,
    }
    host = {**constants, **given}
    for number in host_numbers(kernel):
        host[number.name] = evaluate(number.expression, host)
    return Tiling(
        **{name: host[name] for name in given},
        parts=host["parts"],
        scale=kernel.head_dim**-0.5 if scale is None else scale,
        host=host,
    )


def values_of(kernel: Kernel, given: Tiling) -> dict[str, Any]:
    """The values of `kernel_numbers` by name."""
    names: dict[str, Any] = {"tiling": given}
    for number in kernel_numbers(kernel):
        names[number.name] = evaluate(number.expression, names)
    del names["tiling"]
    return names
