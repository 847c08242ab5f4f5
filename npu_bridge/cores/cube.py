"""The program of the cube core."""

from __future__ import annotations

from npu_bridge.cores.bound import proof_at
from npu_bridge.cores.context import (
    GROUPED,
    Context,
    Core,
    look_for_damage,
    prologue,
    slot_of,
    whole,
)
from npu_bridge.cores.products import CubeMemory, Products, matrix_in, when
from npu_bridge.expressions import Expr
from npu_bridge.ir import (
    Advance,
    Assign,
    Call,
    CrossSet,
    CrossWait,
    For,
    Function,
    If,
    Invalidate,
    Let,
    Node,
    SetFlag,
    Slice,
    SyncAll,
    WaitFlag,
)
from npu_bridge.layout import AHEAD, CHUNK, DEPTH, FLAGS, LEAST, QUERIES, SUB

# Which keys and queries a tile is of, and whether it is the first and the last of its item.
_TILE = ("entry", "kvHead", "keys", "j", "querySlot", "first", "last")
_COUNTERS = (
    "itemTurn",
    "scoreTurn",
    "valueTurn",
    "offsetTurn",
    "keyTurn",
    "pairTurn",
    "l0Turn",
    "pieceTurn",
    "failed",  # whether the item of the last P·V is not proved, of the shift "bound"
)


def cube_core(c: Context) -> Core:
    """Goes through this core's items: scores ahead of the vector cores, P·V behind them."""
    memory = CubeMemory.of(c)
    products = Products(c, memory)
    # A reference is taken off the scores of its own tile, so those are one tile ahead only.
    ahead = 1 if c.refers else AHEAD
    counters = (*_COUNTERS, *_earlier(ahead), *c.more_counters)
    core = Core("AIC", memory.memories, counters)
    before: list[Node] = []
    if c.kernel.shift == "paper":
        before = [SyncAll(), Call(core.add(_shift_keys(products)), ())]
    if c.kernel.careful:
        before = [SyncAll()]
    if c.kernel.chooses:
        before = [SyncAll(), SyncAll()]
    step = core.add(_step(products, core, ahead))
    both, l1_ids, products_ids = range(2), range(6), range(memory.flags)
    last: list[Node] = [
        Call(step, (*[0] * len(_TILE), 0, 0, f"scoreTurn - valueTurn > {ahead - 1 - u}"))
        for u in range(ahead)
    ]
    body: list[Node] = [
        *[SetFlag("MTE1", "MTE2", i) for i in l1_ids],
        *[SetFlag("M", "MTE1", i) for i in both],
        *[SetFlag("FIX", "M", i) for i in products_ids],
        *prologue(before),
        *_load_ones(products),
        *c.items(_item(products, step, ahead, last)),
        *last,
        If("itemTurn > 0", [SetFlag("MTE1", "MTE2", "4 + Mod(itemTurn - 1, 2)")]),
        *([SyncAll()] if c.kernel.decode else []),  # the vector cores merge what they have
        *[WaitFlag("MTE1", "MTE2", i) for i in l1_ids],
        *[WaitFlag("M", "MTE1", i) for i in both],
        *[WaitFlag("FIX", "M", i) for i in products_ids],
        *(look_for_damage() if c.kernel.repaired else []),
    ]
    core.body = whole(c, body)
    return core


def _earlier(ahead: int) -> tuple[str, ...]:
    """Where the core keeps which keys the tiles are of whose P·V is still to come."""
    return tuple(f"{name}{i}" for i in range(1, ahead + 1) for name in _TILE)


def _load_ones(products: Products) -> list[Node]:
    """Loads the ones; the flag of the first query tile, which is loaded after them, covers both."""
    c, l1 = products.c, products.memory.l1
    if "ones" not in l1:
        return []
    return [matrix_in(l1["ones"].at(), c.globals["ones"].at(0), SUB, LEAST, str(LEAST))]


def _item(products: Products, step: Function, ahead: int, last: list[Node]) -> list[Node]:
    """One item: loads its query tile, then goes through the key tiles.

    Arguments:
      last: P·V of all tiles whose scores are made: the vector cores want it before an item that
        sees no keys.
    """
    c = products.c
    at = f"(int64_t(core) * {QUERIES} + querySlot) * {SUB * c.d}"
    to = products.memory.l1["query"].slot("querySlot")
    ends = ("t == 0", "t == tiles - 1")
    tile: tuple[Expr, ...] = ("entry", "kvHead", "keys", c.tile, "querySlot", *ends)
    weighing = f"scoreTurn - valueTurn >= {ahead}"
    centre: list[Node] = []
    if c.kernel.bounded:
        centre = [
            *_centre(products),
            CrossSet("FIX", FLAGS["CENTRE_READY"], "CENTRE_READY"),
        ]
    return [
        Let("querySlot", f"Mod(itemTurn, {QUERIES})"),
        CrossWait("MTE2", FLAGS["QUERY_READY"], "QUERY_READY"),
        WaitFlag("MTE1", "MTE2", "4 + querySlot"),
        matrix_in(to, c.globals["scaledQuery"].at(at), SUB, c.d, str(c.d)),
        CrossSet("MTE2", FLAGS["QUERY_TAKEN"], "QUERY_TAKEN"),
        SetFlag("MTE2", "MTE1", "4 + querySlot"),
        WaitFlag("MTE2", "MTE1", "4 + querySlot"),
        *centre,
        If("tiles == 0", last),
        For("t", 0, "tiles", [*c.this_tile(), Call(step, (*tile, c.opens, 1, weighing))]),
        # A reference may still be taken off this item's scores, but not off the one's before.
        If("itemTurn > 0", [SetFlag("MTE1", "MTE2", "5 - querySlot")]),
        Advance("itemTurn"),
    ]


def _step(products: Products, core: Core, ahead: int) -> Function:
    """The scores of a tile, and P·V of an earlier one: sub-tile by sub-tile in turns, so that
    scores leave while P·V is multiplied.
    """
    c = products.c
    chunks = c.e // CHUNK
    now = _TILE
    earlier = tuple(f"{name}{ahead}" for name in _TILE)
    scores, values = core.add(_scores(products)), core.add(_values(products))
    offsets: list[Node] = []
    if "kappa" in c.full.products and not c.kernel.bounded:
        offsets = [If("opens", [Call(core.add(_offsets(products)), now)])]
    score: list[Node] = [Call(scores, (*now, "sub"))]
    scored: list[Node] = [CrossSet("FIX", FLAGS["SCORES_READY"], "SCORES_READY")]
    p_ready: list[Node] = [CrossWait("MTE2", FLAGS["P_READY"], "P_READY")]
    ends: tuple[Expr, ...] = ()
    valued: list[Node] = [CrossSet("FIX", FLAGS["UPDATE_READY"], "UPDATE_READY")]
    if c.kernel.output_stays:  # the proof was written before the item's first P
        proof = f"Pick(proof.GetValue({proof_at('valueTurn')}) != 0.0f, 1, 0)"
        look: list[Node] = [
            Invalidate("proof", "float"),
            Assign("failed", proof),
            SetFlag("S", "MTE2", slot_of(DEPTH, "valueTurn")),  # its place is written again later
            WaitFlag("S", "MTE2", slot_of(DEPTH, "valueTurn")),
        ]
        p_ready.append(If(f"first{ahead}", look))
        ends = (f"first{ahead} | failed", f"last{ahead} | failed")
        valued = [If(ends[1], valued)]
    value = [Call(values, (*earlier[:4], "turn", *ends))]
    if c.refers:
        shifted = Call(core.add(_shifted(products)), (*earlier, "sub"))
        shifting: list[Node] = [
            CrossWait("MTE2", FLAGS["REFERENCE_READY"], "REFERENCE_READY"),
            For("sub", 0, c.n, [shifted], SUB),
            CrossSet("FIX", FLAGS["SHIFTED_READY"], "SHIFTED_READY"),
        ]
        turns = For("turn", 0, chunks * c.n // SUB, value)
        body: list[Node] = [
            If("scoring", [*offsets, For("sub", 0, c.n, score, SUB), *scored]),
            If("weighing", [*shifting, *p_ready, turns, *valued]),
        ]
    else:
        turns = For("turn", f"sub / {SUB} * {chunks}", f"(sub / {SUB} + 1) * {chunks}", value)
        last = f"sub == {c.n - SUB}"
        both: list[Node] = [
            If("scoring", [*score, If(last, scored)]),
            If("weighing", [If("sub == 0", p_ready), turns, If(last, valued)]),
        ]
        body = [*([If("scoring", offsets)] if offsets else []), For("sub", 0, c.n, both, SUB)]
    kept: list[Node] = [
        Assign(f"{name}{i}", name if i == 1 else f"{name}{i - 1}")
        for i in range(ahead, 0, -1)
        for name in _TILE
    ]
    turn = [*kept, Advance("scoreTurn", "scoring"), Advance("valueTurn", "weighing")]
    comment = "The scores of a tile if it is `scoring`, and P·V of an earlier one if `weighing`."
    parameters = (*_TILE, "opens", "scoring", "weighing")
    return Function("Step", parameters, [*body, *turn], comment)


def _place(c: Context, counter: str) -> Let:
    """The first row of the workspace for a tile."""
    slot = f"int64_t(core) * {DEPTH} + {slot_of(DEPTH, counter)}"
    return Let("place", f"({slot}) * {c.block_q}", "int64_t")


def _scores(products: Products) -> Function:
    c = products.c
    load = products.key_rows(products.memory.l1["key"].slot("slot"), "sub")
    out = c.globals["scores"].at(f"place * {c.n} + sub")
    body = [_place(c, "scoreTurn"), *products.query_times(load, out)]
    comment = "S' = Q·K'ᵀ of a sub-tile (eq. 4, 7), rounded on its way out."
    return Function("Scores", (*_TILE, "sub"), body, comment)


def _offsets(products: Products) -> Function:
    c = products.c
    at = f"{c.kappa_row('Div(j, ' + str(LEAST) + ') * ' + str(LEAST))} * {c.d}"
    to = products.memory.l1["key"].slot("slot")
    load: list[Node] = [matrix_in(to, c.globals["kappa"].at(at), LEAST, c.d, str(c.d))]
    slot = f"int64_t(core) * {DEPTH} + {slot_of(DEPTH, 'offsetTurn')}"
    out = c.globals["offsets"].at(f"({slot}) * {LEAST * SUB}")
    body = [*products.times_query(load, out), Advance("offsetTurn")]
    comment = f"q·κ of {LEAST} blocks, a row each (eq. 7)."
    return Function("Offsets", _TILE, body, comment)


def _centre(products: Products) -> list[Node]:
    """q·κ of all blocks that an item may see, a group of blocks at a time."""
    c = products.c
    at = f"{c.kappa_row('base')} * {c.d}"
    to = products.memory.l1["key"].slot("slot")
    load: list[Node] = [matrix_in(to, c.globals["kappa"].at(at), LEAST, c.d, str(c.d))]
    slot = f"int64_t(core) * {DEPTH} + {slot_of(DEPTH, 'itemTurn')}"
    out = c.globals["offsets"].at(f"(({slot}) * {GROUPED} + base) * {SUB}")
    groups = f"Div(lo, {LEAST}) * {LEAST}", "lo + tiles"
    return [For("base", *groups, products.times_query(load, out), LEAST)]


def _shifted(products: Products) -> Function:
    c, l1 = products.c, products.memory.l1
    at = c.globals["minus"].at(f"Div(place, {c.block_q}) * {LEAST * c.block_q}")
    load = products.rows_in(l1["key"].slot("slot"), "key", SUB, c.d, "sub")
    load.append(matrix_in(l1["minus"].slot("slot"), at, LEAST, SUB, str(SUB)))
    out = c.globals["shifted"].at(f"place * {c.n} + sub")
    body = [_place(c, "valueTurn"), *products.query_times(load, out, products.minus(out))]
    comment = "S − r = Q·Kᵀ − r of a sub-tile: −r is two more columns of Q, in halves (eq. 11)."
    return Function("Shifted", (*_TILE, "sub"), body, comment)


def _values(products: Products) -> Function:
    """One product of P·V: a sub-tile of P times a chunk of the values' columns."""
    c, l1 = products.c, products.memory.l1
    chunks, subs = c.e // CHUNK, c.n // SUB
    left = l1["left"]
    slot = "slot" if chunks == 1 else "Mod(valueTurn, 2)" if subs == 1 else f"row / {SUB}"
    place = left.slot(slot)
    p = matrix_in(place, c.globals["p"].at(f"place * {c.n} + row"), SUB, SUB, str(c.n))
    first: str | bool = "chunk == 0" if chunks > 1 else True
    column = f"chunk * {CHUNK}"
    load = when(first, [p])
    load += products.rows_in(l1["right"].slot("slot"), "value", SUB, CHUNK, "row", column)
    to = c.globals["update"].at(f"place * {c.e} + {column}")
    sums = c.globals["sums"].at(f"place * {LEAST}") if "ones" in l1 else None
    ends: tuple[str, ...] = ()
    if c.kernel.output_stays:
        # MmadParams takes a bool, to which C++ does not narrow an int in braces.
        ends = ("((row == 0) & opening) != 0", f"(row == {c.n - SUB}) & closing")
    parameters = (*_TILE[:4], "turn", *(["opening", "closing"] if ends else []))
    body: list[Node] = [
        _place(c, "valueTurn"),
        Let("chunk", f"turn / {subs}"),
        Let("row", f"Mod(turn, {subs}) * {SUB}"),
        *products.accumulated(load, place, to, c.e, sums, first, *ends),
    ]
    return Function("Values", parameters, body, "P·V of a tile, a part of it (eq. 10).")


def _shift_keys(products: Products) -> Function:
    c, l1 = products.c, products.memory.l1
    left = Slice(l1["left"], f"slot * {SUB * SUB}", SUB * SUB)
    last = f"int64_t(j == Div(keyLength, {c.n}))"
    m = c.globals["matrices"].at(f"({last} * {c.n} + line) * {c.n} + row")
    load: list[Node] = [matrix_in(left, m, SUB, SUB, str(c.n))]
    load += products.rows_in(l1["right"].slot("slot"), "key", SUB, CHUNK, "row", "column")
    to = c.globals["shiftedKey"].at(f"(int64_t(unit) * {c.n} + line) * {c.d} + column")
    product = For("row", 0, c.n, products.accumulated(load, left, to, c.d), SUB)
    lines = For("line", 0, c.n, [For("column", 0, c.d, [product], CHUNK)], SUB)
    unit: list[Node] = [*c.key_blocks(), If(f"j * {c.n} < keys", [lines])]
    body: list[Node] = [For("unit", "core", "batch * kvHeads * keyBlocks", unit, "cores")]
    return Function("ShiftKeys", (), body, "K' = M·K of each key block (eq. 4).")
