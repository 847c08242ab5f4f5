"""The program of the cube core."""

from __future__ import annotations

from npu_bridge.cores.context import Context, Core, prologue, whole, workspace_slot
from npu_bridge.cores.products import CubeMemory, Products, matrix_in
from npu_bridge.ir import (
    Advance,
    Call,
    CrossSet,
    CrossWait,
    For,
    Function,
    If,
    Let,
    Node,
    SetFlag,
    SyncAll,
    WaitFlag,
)
from npu_bridge.layout import AHEAD, FLAGS, LEAST, SUB

_PARAMETERS = ("entry", "kvHead", "keys", "j", "t")
_COUNTERS = ("queryTurn", "keyTurn", "pairTurn", "l0Turn", "l0cTurn", "tileTurn")


def cube_core(c: Context) -> Core:
    """Goes through this core's items: scores ahead of the vector cores, P·V behind them."""
    memory = CubeMemory.of(c)
    products = Products(c, memory)
    core = Core("AIC", memory.memories, _COUNTERS)
    before: list[Node] = []
    if c.kernel.shift == "paper":
        before = [SyncAll(), Call(core.add(_shift_keys(products)), ())]
    loop = _loop(products, core)
    both, l1_ids = range(2), range(6)
    body: list[Node] = [
        *[SetFlag("MTE1", "MTE2", i) for i in l1_ids],
        *[SetFlag("M", "MTE1", i) for i in both],
        *[SetFlag("FIX", "M", i) for i in both],
        *prologue(before),
        *_load_ones(products),
        *c.items(_item(products, loop)),
        *([SyncAll()] if c.kernel.decode else []),  # the vector cores merge what they have
        *[WaitFlag("MTE1", "MTE2", i) for i in l1_ids],
        *[WaitFlag("M", "MTE1", i) for i in both],
        *[WaitFlag("FIX", "M", i) for i in both],
    ]
    core.body = whole(body)
    return core


def _load_ones(products: Products) -> list[Node]:
    """Loads the ones; the flag of the first query tile, which is loaded after them, covers both."""
    c, l1 = products.c, products.memory.l1
    if "ones" not in l1:
        return []
    return [matrix_in(l1["ones"].at(), c.globals["ones"].at(0), SUB, LEAST, str(LEAST))]


def _item(products: Products, loop: Node) -> list[Node]:
    """One item: loads its query tile, then goes through the key tiles."""
    c = products.c
    at = f"((int64_t(entry) * heads + head) * queryTiles + tile) * {SUB * c.d}"
    to = products.memory.l1["query"].slot("querySlot")
    return [
        _query_slot(),
        WaitFlag("MTE1", "MTE2", "4 + querySlot"),
        matrix_in(to, c.globals["scaledQuery"].at(at), SUB, c.d, str(c.d)),
        SetFlag("MTE2", "MTE1", "4 + querySlot"),
        WaitFlag("MTE2", "MTE1", "4 + querySlot"),
        loop,
        SetFlag("MTE1", "MTE2", "4 + querySlot"),
        Advance("queryTurn"),
        Advance("tileTurn", "tiles"),
    ]


def _loop(products: Products, core: Core) -> For:
    """The scores of tile t, and P·V of an earlier one."""
    c = products.c
    scores, values = core.add(_scores(products)), core.add(_values(products))
    # A reference is taken off the scores of its own tile, so those are one tile ahead only.
    ahead = 1 if c.refers else AHEAD
    now = ("entry", "kvHead", "keys", "lo + t", "t")
    earlier = ("entry", "kvHead", "keys", f"lo + t - {ahead}", f"t - {ahead}")
    shifting: list[Node] = []
    if c.refers:
        shifting = [
            CrossWait("MTE2", FLAGS["REFERENCE_READY"], "REFERENCE_READY"),
            Call(core.add(_shifted(products)), earlier),
            CrossSet("FIX", FLAGS["SHIFTED_READY"], "SHIFTED_READY"),
        ]
    first: list[Node] = [
        Call(scores, now),
        CrossSet("FIX", FLAGS["SCORES_READY"], "SCORES_READY"),
    ]
    second: list[Node] = [
        *shifting,
        CrossWait("MTE2", FLAGS["P_READY"], "P_READY"),
        Call(values, earlier),
        CrossSet("FIX", FLAGS["UPDATE_READY"], "UPDATE_READY"),
    ]
    return For("t", 0, f"tiles + {ahead}", [If("t < tiles", first), If(f"t >= {ahead}", second)])


def _place(c: Context) -> Let:
    """The first row of the workspace for tile t."""
    return Let("place", f"({workspace_slot('t')}) * {c.block_q}", "int64_t")


def _query_slot() -> Let:
    return Let("querySlot", "Mod(queryTurn, 2)")


def _scores(products: Products) -> Function:
    c = products.c
    to = products.memory.l1["key"].slot("slot")
    load = products.key_rows(to, "sub")
    out = c.globals["scores"].at(f"place * {c.n} + sub")
    body: list[Node] = [
        _place(c),
        _query_slot(),
        For("sub", 0, c.n, products.query_times(load, out, SUB, c.n), SUB),
    ]
    if "kappa" in c.full.products:
        at = f"((int64_t(entry) * kvHeads + kvHead) * keyBlocks + j) * {LEAST * c.d}"
        rows = matrix_in(to, c.globals["kappa"].at(at), LEAST, c.d, str(c.d))
        out = c.globals["offsets"].at(f"place * {LEAST}")
        body += products.query_times([rows], out, LEAST, LEAST)
    comment = "S' = Q·K'ᵀ of a tile (eq. 4, 7), rounded on its way out."
    return Function("Scores", _PARAMETERS, body, comment)


def _shifted(products: Products) -> Function:
    c, l1 = products.c, products.memory.l1
    at = c.globals["minus"].at(f"Div(place, {c.block_q}) * {LEAST * c.block_q}")
    load = products.rows_in(l1["key"].slot("slot"), "key", SUB, c.d, "sub")
    load.append(matrix_in(l1["minus"].slot("slot"), at, LEAST, SUB, str(SUB)))
    out = c.globals["shifted"].at(f"place * {c.n} + sub")
    product = products.query_times(load, out, SUB, c.n, products.minus_product())
    body = [_place(c), _query_slot(), For("sub", 0, c.n, product, SUB)]
    comment = "S − r = Q·Kᵀ − r of a tile: −r is two more columns of Q, in halves (eq. 11)."
    return Function("Shifted", _PARAMETERS, body, comment)


def _values(products: Products) -> Function:
    c, memory = products.c, products.memory
    chunk, l1 = memory.chunk_e, memory.l1
    p = c.globals["p"].at(f"place * {c.n} + sub")
    left: list[Node] = [matrix_in(l1["left"].slot("slot"), p, SUB, SUB, str(c.n))]
    right = products.rows_in(l1["right"].slot("slot"), "value", SUB, chunk, "sub", "column")
    to = c.globals["update"].at(f"place * {c.e} + column")
    product = products.accumulated(left, right, to, chunk, c.e)
    body = [_place(c), For("column", 0, c.e, product, chunk)]
    if "ones" in l1:
        sums = c.globals["sums"].at(f"place * {LEAST}")
        body += products.accumulated(left, [], sums, LEAST, LEAST)
    return Function("Values", _PARAMETERS, body, "P·V of a tile (eq. 10).")


def _shift_keys(products: Products) -> Function:
    c, memory = products.c, products.memory
    chunk, l1 = memory.chunk_d, memory.l1
    last = f"int64_t(j == Div(keyLength, {c.n}))"
    m = c.globals["matrices"].at(f"({last} * {c.n} + row) * {c.n} + sub")
    left: list[Node] = [matrix_in(l1["left"].slot("slot"), m, SUB, SUB, str(c.n))]
    right = products.rows_in(l1["right"].slot("slot"), "key", SUB, chunk, "sub", "column")
    to = c.globals["shiftedKey"].at(f"(int64_t(unit) * {c.n} + row) * {c.d} + column")
    product = products.accumulated(left, right, to, chunk, c.d)
    rows = For("row", 0, c.n, [For("column", 0, c.d, product, chunk)], SUB)
    unit: list[Node] = [*c.key_blocks(), If(f"j * {c.n} < keys", [rows])]
    body: list[Node] = [For("unit", "core", "batch * kvHeads * keyBlocks", unit, "cores")]
    return Function("ShiftKeys", (), body, "K' = M·K of each key block (eq. 4).")
