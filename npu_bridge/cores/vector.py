"""The program of a vector core."""

from __future__ import annotations

from npu_bridge.cores import careful, close, prepare
from npu_bridge.cores.context import Context, Core, look_for_damage, prologue, whole
from npu_bridge.cores.slabs import copy
from npu_bridge.cores.tile import ARGUMENTS, Tile
from npu_bridge.cores.vector_memory import VectorMemory
from npu_bridge.ir import (
    Advance,
    Assign,
    Barrier,
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
    SyncAll,
    WaitFlag,
)
from npu_bridge.layout import FLAGS, ITEMS, LAG, LEAST, QUERIES, SINGLE, SOFTMAX, UPDATE

# What is kept of the tiles whose P·V is still to come: whether there is one, which it is, whether
# it is the first and the last of its item, and what `close` wants to know of the item.
_HELD = {
    "some": "1",
    "turn": "tileTurn",
    "first": "t == 0",
    "last": "t == tiles - 1",
    **{name: name for name in ("item", "entry", "head", "start", "side")},
}
_COUNTERS = ("softmaxTurn", "updateTurn", "tileTurn", "itemTurn", "offsetTurn")


def vector_core(c: Context) -> Core:
    """Prepares, then goes through this core's items; decoding: merges their states at the end."""
    memory = VectorMemory.of(c)
    counters = [*_COUNTERS, *(f"{name}{i}" for i in range(1, LAG + 1) for name in _HELD)]
    counters += c.more_counters
    core = Core("AIV", {"UB": memory.ub}, tuple(counters))
    ramp: list[Node] = [Call(core.add(prepare.ramp(memory.ub, memory.ramp)), ())]
    if c.kernel.careful:
        before, ramp = [*ramp, *_prepare_carefully(c, core, memory)], []
    else:
        before = _prepare(c, core, memory)
    loop = _Loop(c, core, memory).nodes()
    ids = [SOFTMAX, SOFTMAX + 1, UPDATE, UPDATE + 1, SINGLE]
    body: list[Node] = [
        *[SetFlag("V", "MTE2", i) for i in ids],
        *[SetFlag("MTE3", "V", i) for i in ids],
        SetFlag("MTE3", "MTE2", 0),
        *prologue(before),
        *ramp,
        *_load_weights(c, memory),
        *close.undamaged(memory),
        *loop,
        *[WaitFlag("V", "MTE2", i) for i in ids],
        *[WaitFlag("MTE3", "V", i) for i in ids],
        WaitFlag("MTE3", "MTE2", 0),
        *(look_for_damage() if c.kernel.repaired else []),
    ]
    core.body = whole(c, body)
    return core


def _prepare(c: Context, core: Core, memory: VectorMemory) -> list[Node]:
    """Calls of what is done once, before the loop."""
    products, ub = c.full.products, memory.ub
    functions = [prepare.keys(c, ub)] if "kappa" in products else []
    if c.refers:
        functions.append(prepare.minus(c, ub))
    if "ones" in products:
        functions.append(prepare.ones(c, ub))
    tails = prepare.tails(c, ub)
    calls: list[Node] = [Call(core.add(f), ()) for f in functions]
    calls += [Barrier("ALL"), Call(core.add(tails), ())]
    if c.kernel.shift == "paper":  # the cube core computes K' from the tails
        calls += [Barrier("ALL"), SyncAll()]
    return calls


def _prepare_carefully(c: Context, core: Core, memory: VectorMemory) -> list[Node]:
    """The same for the careful kernel."""
    ub, ramp = memory.ub, memory.ramp
    calls: list[Node] = [
        Call(core.add(careful.keys(c, ub, ramp)), ()),
        Barrier("ALL"),
        SyncAll(),
        Invalidate("keyBound", "float"),
        Call(core.add(careful.values(c, ub, ramp)), ()),
    ]
    if "ones" in c.full.products:  # each has all of UB behind the ramp
        calls += [Barrier("ALL"), Call(core.add(prepare.ones(c, ub)), ())]
    return calls


def _load_weights(c: Context, memory: VectorMemory) -> list[Node]:
    if memory.weights is None:
        return []
    return [copy(memory.weights.at(), c.globals["weights"].at(0), 2 * c.n), Barrier("ALL")]


class _Loop:
    """The items of a core: P of a tile, and the output of the tile before, which may belong to the
    item before.
    """

    def __init__(self, c: Context, core: Core, memory: VectorMemory) -> None:
        self.c, self.core = c, core
        self.full = Tile(c, memory, c.slabs.rows)
        self.masked = Tile(c, memory, c.slabs.masked)
        update = Tile(c, memory, c.slabs.update)
        sums, step = c.columns.accumulate.columns, c.update.accumulate.slab
        accumulate = core.add(update.accumulate(sums, step))
        self.begin, self.clear = core.add(close.begin(c, memory)), core.add(close.clear(memory))
        self.end = core.add(close.close(c, memory))
        self.store = core.add(close.store_state(c, memory)) if c.kernel.decode else None
        self.memory = memory
        looks = c.kernel.repaired and not c.kernel.decode
        self.look = core.add(close.look(c, memory)) if looks else None
        self.report = core.add(close.report(c, memory)) if looks else None
        self.absorb = core.add(self._absorb(accumulate))
        turn = [Call(self.absorb, ()), *self._kept({"some": "0"})]
        comment = "The output of all tiles so far."
        self.flush = core.add(Function("Flush", (), turn * LAG, comment))
        self.query = core.add(prepare.query(c, memory))

    def nodes(self) -> list[Node]:
        """All items of the core."""
        merge: list[Node] = []
        if self.c.kernel.decode:
            merged = self.core.add(close.merge(self.c, self.memory, self.core, self.end))
            merge = [Barrier("ALL"), SyncAll(), Call(merged, ())]
        taken = CrossWait("MTE2", FLAGS["QUERY_TAKEN"], "QUERY_TAKEN")
        return [
            If("core < items", self._prepared("core", 0)),
            *self.c.items(self._item(taken)),
            Call(self.flush, ()),
            If("itemTurn > 0", [taken]),
            *merge,
            *close.tell(self.c, self.memory),
        ]

    def _item(self, taken: Node) -> list[Node]:
        """One item."""
        ahead = self._prepared("item + cores", f"Mod(itemTurn + 1, {QUERIES})")
        end = self._end("item", "entry", "head", "start", "side")
        empty: list[Node] = [
            Call(self.flush, ()), self._begun(), Call(self.clear, ()), *end
        ]  # fmt: skip
        return [
            Let("side", f"Mod(itemTurn, {ITEMS})"),
            # The next item's queries take the place of the last item's.
            If("itemTurn > 0", [taken]),
            If("item + cores < items", ahead),
            If("tiles == 0", empty),
            For("t", 0, "tiles", self._tile()),
            Advance("itemTurn"),
        ]

    def _prepared(self, item: str, slot: str | int) -> list[Node]:
        """The queries of an item, made ready for the cube core."""
        return [
            Call(self.query, (item, slot)),
            CrossSet("MTE3", FLAGS["QUERY_READY"], "QUERY_READY"),
        ]

    def _tile(self) -> list[Node]:
        """P of tile t, and the output of the tile before."""
        c = self.c
        unmasked = "lo + t >= fullLo" if c.kernel.masked else "1"
        condition = f"({unmasked}) & (lo + t < fullHi)"
        full, masked, core = self.full, self.masked, self.core
        softmax = If(
            condition,
            [Call(core.add(full.softmax("Softmax", c.full.softmax.slab, "without")), ARGUMENTS)],
            [
                Call(
                    core.add(masked.softmax("SoftmaxMasked", c.masked.softmax.slab, "with")),
                    ARGUMENTS,
                )
            ],
        )
        whole = Tile(c, self.memory, c.half)
        statistics = If(
            condition,
            [Call(core.add(whole.statistics("Statistics", c.columns.softmax.columns)), ARGUMENTS)],
            [
                Call(
                    core.add(
                        whole.statistics("StatisticsMasked", c.columns_masked.softmax.columns)
                    ),
                    ARGUMENTS,
                )
            ],
        )
        offsets: list[Node] = []
        if "offsets" in self.memory.rings:
            opens = f"(t == 0) | (Mod(lo + t, {LEAST}) == 0)"
            offsets = [If(opens, [Call(self.core.add(self.full.offsets()), ())])]
        refer: list[Node] = []
        if c.refers:
            refer = [
                If(
                    condition,
                    [Call(core.add(full.refer("Refer", c.full.refer, "without")), ARGUMENTS)],
                    [
                        Call(
                            core.add(masked.refer("ReferMasked", c.masked.refer, "with")), ARGUMENTS
                        )
                    ],
                ),
                CrossSet("MTE3", FLAGS["REFERENCE_READY"], "REFERENCE_READY"),
                CrossWait("MTE2", FLAGS["SHIFTED_READY"], "SHIFTED_READY"),
            ]
        return [
            CrossWait("MTE2", FLAGS["SCORES_READY"], "SCORES_READY"),
            If("t == 0", [self._begun()]),
            *offsets,
            *refer,
            softmax,
            CrossSet("MTE3", FLAGS["P_READY"], "P_READY"),
            statistics,
            Call(self.absorb, ()),
            *self._kept(_HELD),
            Advance("tileTurn"),
        ]

    def _kept(self, now: dict[str, str]) -> list[Node]:
        """Keeps the tile of ``now``; the others' turns come nearer."""
        older: list[Node] = [
            Assign(f"{name}{i}", f"{name}{i - 1}") for i in range(LAG, 1, -1) for name in _HELD
        ]
        return [*older, *(Assign(f"{name}1", x) for name, x in now.items())]

    def _absorb(self, accumulate: Function) -> Function:
        """Adds P·V of the tile whose turn it is; after the last of its item, the output."""
        held = {name: f"{name}{LAG}" for name in _HELD}
        end = self._end(*(held[name] for name in ("item", "entry", "head", "start", "side")))
        body: list[Node] = [
            CrossWait("MTE2", FLAGS["UPDATE_READY"], "UPDATE_READY"),
            If(held["first"], [Call(self.clear, ())]),
            Call(accumulate, (held["turn"], held["side"])),
            If(held["last"], end),
        ]
        comment = "Adds P·V of an earlier tile, if there is one; after its item's last, the output."
        return Function("Absorb", (), [If(held["some"], body)], comment)

    def _begun(self) -> Call:
        """The beginning of an item."""
        return Call(self.begin, self.begin.parameters)

    def _end(self, item: str, entry: str, head: str, start: str, side: str) -> list[Node]:
        """The end of an item."""
        if self.store is not None:
            return [Call(self.store, (item, side))]
        nodes: list[Node] = [Call(self.end, (entry, head, start, side))]
        if self.look is not None and self.report is not None:
            tile, half = f"Div({start}, {self.c.block_q})", f"Div(firstRow, {self.c.half})"
            nodes += [
                *close.no_damage(self.memory),
                Call(self.look, (entry, start, side)),
                Call(self.report, (entry, head, tile, half)),
            ]
        return nodes
