"""The program of a vector core."""

from __future__ import annotations

from npu_bridge.cores import bound, careful, choose, close, prepare
from npu_bridge.cores.context import Context, Core, look_for_damage, prologue, whole
from npu_bridge.cores.slabs import copy
from npu_bridge.cores.tile import Tile, arguments
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
from npu_bridge.layout import FLAGS, ITEMS, LAG, SINGLE, SOFTMAX, UPDATE

# What is kept of the tiles whose P·V is still to come: whether there is one, which it is, whether
# it is the first and the last of its item, and what `close` wants to know of the item.
_HELD = {
    "some": "1",
    "turn": "tileTurn",
    "first": "t == 0",
    "last": "t == tiles - 1",
    **{name: name for name in ("item", "entry", "head", "start", "side", "failed")},
}
# ``failed``: whether the item is not proved, of the shift "bound"; of others 0.
_COUNTERS = ("softmaxTurn", "updateTurn", "tileTurn", "itemTurn", "offsetTurn", "failed")


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
    if c.kernel.bounded:
        before, ramp = [*ramp, *before], []
    if c.kernel.chooses:  # what prepares the keys lies where the ramp does: it is made twice
        before = [*ramp, *before]
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
    functions = [prepare.keys(c, ub, memory.ramp)] if "kappa" in products else []
    if c.kernel.bounded:
        functions.append(bound.values(c, ub, memory.ramp))
    first = _choose(c, core, memory) if c.kernel.chooses else []
    if c.refers:
        functions.append(prepare.minus(c, ub))
    if "ones" in products:
        functions.append(prepare.ones(c, ub))
    tails = prepare.tails(c, ub)
    calls: list[Node] = first
    for f in functions:  # each has all of UB
        calls += [Call(core.add(f), ()), Barrier("ALL")]
    calls += [] if functions else [Barrier("ALL")]
    calls.append(Call(core.add(tails), ()))
    if c.kernel.shift == "paper":  # the cube core computes K' from the tails
        calls += [Barrier("ALL"), SyncAll()]
    return calls


def _choose(c: Context, core: Core, memory: VectorMemory) -> list[Node]:
    """`auto`: for which heads κ is taken off the keys."""
    ub, ramp = memory.ub, memory.ramp
    calls: list[Node] = []
    for f in (choose.queries(c, ub, ramp), choose.keys(c, ub, ramp), choose.heads(c, ub, ramp)):
        if f.name == "Choose":
            calls.append(SyncAll())
        calls += [Call(core.add(f), ()), Barrier("ALL")]
    return [*calls, SyncAll(), Invalidate("takesKappa", "float")]


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


class _Way:
    """One way in which a query tile may be computed: the functions of its key tiles.

    Arguments:
      suffix: of the functions' names.
    """

    def __init__(self, c: Context, core: Core, memory: VectorMemory, suffix: str) -> None:
        self.c, self.core = c, core
        self.full = Tile(c, memory, c.slabs.rows)
        self.masked = Tile(c, memory, c.slabs.masked)
        self.whole = Tile(c, memory, c.half)
        self.suffix = suffix
        sums, step = c.columns.accumulate.columns, c.update.accumulate.slab
        update = Tile(c, memory, c.slabs.update)
        self.accumulate = core.add(update.accumulate(f"Accumulate{suffix}", sums, step))

    def softmax(self) -> list[Node]:
        """P of tile t."""
        c, name = self.c, f"Softmax{self.suffix}"
        full = self.full.softmax(name, c.full.softmax.slab, "without")
        masked = self.masked.softmax(f"{name}Masked", c.masked.softmax.slab, "with")
        return [self._either(full, masked)]

    def statistics(self) -> list[Node]:
        """The row statistics after it."""
        full, masked = self.c.columns.softmax.columns, self.c.columns_masked.softmax.columns
        if not full.outputs:
            return []
        both = (
            self.whole.statistics("Statistics", full),
            self.whole.statistics("StatisticsMasked", masked),
        )
        return [self._either(*both)]

    def refer(self) -> list[Node]:
        """The shift "reference": −r of tile t, and the wait for what is left of the scores."""
        c = self.c
        if c.full.refer is None or c.masked.refer is None:
            return []
        full = self.full.refer("Refer", c.full.refer, "without")
        masked = self.masked.refer("ReferMasked", c.masked.refer, "with")
        return [
            self._either(full, masked),
            CrossSet("MTE3", FLAGS["REFERENCE_READY"], "REFERENCE_READY"),
            CrossWait("MTE2", FLAGS["SHIFTED_READY"], "SHIFTED_READY"),
        ]

    def _either(self, full: Function, masked: Function) -> If:
        """A function without the mask where the whole tile is seen, else one with it."""
        c = self.c
        unmasked = f"{c.tile} >= fullLo" if c.kernel.masked else "1"
        if c.kernel.visits:
            unmasked = f"whole == 1) & ({unmasked}"
        calls = [[Call(self.core.add(f), arguments(c))] for f in (full, masked)]
        return If(f"({unmasked}) & ({c.tile} < fullHi)", *calls)


class _Loop:
    """The items of a core: P of a tile, and the output of an earlier one, which may belong to the
    item before.
    """

    def __init__(self, c: Context, core: Core, memory: VectorMemory) -> None:
        self.c, self.core, self.memory = c, core, memory
        self.ways = [_Way(x, core, memory, "Bound" if x.kernel.bounded else "") for x in c.ways]
        self.begin, self.clear = core.add(close.begin(c, memory)), core.add(close.clear(memory))
        self.end = core.add(close.close(c, memory))
        self.store = core.add(close.store_state(c, memory)) if c.kernel.decode else None
        looks = c.kernel.repaired and not c.kernel.decode
        self.look = core.add(close.look(c, memory)) if looks else None
        self.report = core.add(close.report(c, memory)) if looks else None
        self.absorb = core.add(self._absorb())
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
        ahead = self._prepared("item + cores", "itemTurn + 1")
        end = self._end("item", "entry", "head", "start", "side")
        empty: list[Node] = [Call(self.flush, ()), self._begun(), Call(self.clear, ()), *end]
        centre: list[Node] = []
        if self.c.kernel.bounded:
            centre = [CrossWait("MTE2", FLAGS["CENTRE_READY"], "CENTRE_READY")]
        return [
            Let("side", f"Mod(itemTurn, {ITEMS})"),
            # The next item's queries take the place of the last item's.
            If("itemTurn > 0", [taken]),
            If("item + cores < items", ahead),
            *centre,
            If("tiles == 0", empty),
            For("t", 0, "tiles", self._tile()),
            Advance("itemTurn"),
        ]

    def _prepared(self, item: str, turn: str | int) -> list[Node]:
        """The queries of the core's ``turn``-th item, made ready for the cube core."""
        return [
            Call(self.query, (item, turn)),
            CrossSet("MTE3", FLAGS["QUERY_READY"], "QUERY_READY"),
        ]

    def _tile(self) -> list[Node]:
        """P of tile t, and the output of an earlier tile."""
        offsets: list[Node] = []
        if "offsets" in self.memory.rings:
            load = self.core.add(self.ways[0].full.offsets())
            offsets = [If(self.c.opens, [Call(load, (self.c.tile,))])]
        return [
            *self.c.this_tile(),
            CrossWait("MTE2", FLAGS["SCORES_READY"], "SCORES_READY"),
            If("t == 0", self._first()),
            *offsets,
            *self.ways[0].refer(),
            *self._by_proof("failed", [x.softmax() for x in self.ways]),
            CrossSet("MTE3", FLAGS["P_READY"], "P_READY"),
            *self._by_proof("failed", [x.statistics() for x in self.ways]),
            Call(self.absorb, ()),
            *self._kept(_HELD),
            Advance("tileTurn"),
        ]

    def _first(self) -> list[Node]:
        """Before an item's first tile."""
        if not self.c.kernel.bounded:
            return [self._begun()]
        refer = self.core.add(bound.refer(self.c, self.memory))
        proved = bound.begin(self.c, self.memory)
        return [Call(refer, refer.parameters), self._begun(), If("failed == 0", proved)]

    @staticmethod
    def _by_proof(failed: str, ways: list[list[Node]]) -> list[Node]:
        """What is done in the only way; or in the first where an item is proved."""
        if len(ways) == 1:
            return ways[0]
        return [If(failed, ways[1], ways[0])] if ways[0] else [If(failed, ways[1])]

    def _kept(self, now: dict[str, str]) -> list[Node]:
        """Keeps the tile of ``now``; the others' turns come nearer."""
        older: list[Node] = [
            Assign(f"{name}{i}", f"{name}{i - 1}") for i in range(LAG, 1, -1) for name in _HELD
        ]
        return [*older, *(Assign(f"{name}1", x) for name, x in now.items())]

    def _absorb(self) -> Function:
        """Adds P·V of the tile whose turn it is; after the last of its item, the output."""
        held = {name: f"{name}{LAG}" for name in _HELD}
        end = self._end(*(held[name] for name in ("item", "entry", "head", "start", "side")))
        arguments = (held["turn"], held["side"])
        ways: list[list[Node]] = [[Call(x.accumulate, arguments)] for x in self.ways]
        whole = self.c.kernel.output_stays  # a proved item's P·V comes all at once
        clear = f"{held['first']} | (1 - {held['failed']})" if whole else held["first"]
        body: list[Node] = [
            CrossWait("MTE2", FLAGS["UPDATE_READY"], "UPDATE_READY"),
            If(clear, [Call(self.clear, ())]),
            *self._by_proof(held["failed"], ways),
            If(held["last"], end),
        ]
        some = f"{held['some']} & ({held['last']} | {held['failed']})" if whole else held["some"]
        comment = "Adds P·V of an earlier tile, if there is one; after its item's last, the output."
        return Function("Absorb", (), [If(some, body)], comment)

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
