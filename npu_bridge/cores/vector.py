"""The program of a vector core."""

from __future__ import annotations

from npu_bridge.cores import close, prepare
from npu_bridge.cores.context import Context, Core, prologue, whole
from npu_bridge.cores.slabs import copy
from npu_bridge.cores.tile import ARGUMENTS, Tile
from npu_bridge.cores.vector_memory import VectorMemory
from npu_bridge.ir import (
    Advance,
    Barrier,
    Call,
    CrossSet,
    CrossWait,
    For,
    If,
    Node,
    SetFlag,
    SyncAll,
    WaitFlag,
)
from npu_bridge.layout import FLAGS, LAG, SINGLE, SOFTMAX, UPDATE


def vector_core(c: Context) -> Core:
    """Prepares, then goes through this core's items; decoding: merges their states at the end."""
    memory = VectorMemory.of(c)
    core = Core("AIV", {"UB": memory.ub}, ("softmaxTurn", "updateTurn", "tileTurn"))
    before = _prepare(c, core, memory)
    loop = _loop(c, core, memory)
    ids = [SOFTMAX, SOFTMAX + 1, UPDATE, UPDATE + 1, SINGLE]
    body: list[Node] = [
        *[SetFlag("V", "MTE2", i) for i in ids],
        *[SetFlag("MTE3", "V", i) for i in ids],
        SetFlag("MTE3", "MTE2", 0),
        *prologue(before),
        Call(core.add(prepare.ramp(memory.ub, memory.ramp)), ()),
        *_load_weights(c, memory),
        *loop,
        *[WaitFlag("V", "MTE2", i) for i in ids],
        *[WaitFlag("MTE3", "V", i) for i in ids],
        WaitFlag("MTE3", "MTE2", 0),
    ]
    core.body = whole(body)
    return core


def _prepare(c: Context, core: Core, memory: VectorMemory) -> list[Node]:
    """Calls of what is done once, before the loop."""
    products, ub = c.full.products, memory.ub
    functions = [prepare.queries(c, ub)]
    if "kappa" in products:
        functions.append(prepare.keys(c, ub))
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


def _load_weights(c: Context, memory: VectorMemory) -> list[Node]:
    if memory.weights is None:
        return []
    return [copy(memory.weights.at(), c.globals["weights"].at(0), 2 * c.n), Barrier("ALL")]


def _loop(c: Context, core: Core, memory: VectorMemory) -> list[Node]:
    """The items: P of tile t, and the output of the tile before."""
    full, masked = (Tile(c, memory, rows) for rows in (c.slabs.rows, c.slabs.masked))
    softmax = core.add(full.softmax("Softmax", c.full, "without"))
    softmax_masked = core.add(masked.softmax("SoftmaxMasked", c.masked, "with"))
    accumulate = core.add(full.accumulate(c.full.accumulate))
    begin, end = core.add(close.begin(c, memory)), core.add(close.close(c, memory))
    unmasked = "lo + t >= fullLo" if c.kernel.masked else "1"
    condition = f"({unmasked}) & (lo + t < fullHi)"
    refer: list[Node] = []
    if c.full.refer is not None and c.masked.refer is not None:
        r = core.add(full.refer("Refer", c.full.refer, "without"))
        r_masked = core.add(masked.refer("ReferMasked", c.masked.refer, "with"))
        refer = [
            If(condition, [Call(r, ARGUMENTS)], [Call(r_masked, ARGUMENTS)]),
            CrossSet("MTE3", FLAGS["REFERENCE_READY"], "REFERENCE_READY"),
            CrossWait("MTE2", FLAGS["SHIFTED_READY"], "SHIFTED_READY"),
        ]
    probabilities: list[Node] = [
        CrossWait("MTE2", FLAGS["SCORES_READY"], "SCORES_READY"),
        *refer,
        If(condition, [Call(softmax, ARGUMENTS)], [Call(softmax_masked, ARGUMENTS)]),
        CrossSet("MTE3", FLAGS["P_READY"], "P_READY"),
    ]
    output: list[Node] = [
        CrossWait("MTE2", FLAGS["UPDATE_READY"], "UPDATE_READY"),
        Call(accumulate, (f"t - {LAG}",)),
    ]
    turn = [If("t < tiles", probabilities), If(f"t >= {LAG}", output)]
    tiles = For("t", 0, f"tiles + {LAG}", turn)
    last, merge = Call(end, ("entry", "head", "start")), list[Node]()
    if c.kernel.decode:
        last = Call(core.add(close.store_state(c, memory)), ("item",))
        merge = [Barrier("ALL"), SyncAll(), Call(core.add(close.merge(c, memory, end)), ())]
    return [*c.items([Call(begin, ()), tiles, last, Advance("tileTurn", "tiles")]), *merge]
