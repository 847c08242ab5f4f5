"""What a vector core holds in UB for the whole kernel."""

from __future__ import annotations

from dataclasses import dataclass

from npu_bridge.cores.context import Context
from npu_bridge.dtypes import BLOCK, C_TYPES
from npu_bridge.ir import Buffer
from npu_bridge.layout import CARRIED, ITEMS, LEAST, QUERIES
from npu_bridge.memory import Memory
from npu_bridge.specification import COLUMNS


@dataclass(frozen=True)
class VectorMemory:
    """The buffers that stay.

    Arguments:
      query: rows of the next item's queries, as they are given and as they are multiplied.
      state: m, l and f of all rows of two items, and o; with what a stage takes over from the one
        before.
      ramp: 0, 1, 2, … up to the keys of a block: indices of rows and columns.
      weights: shift "paper": the share of each column in the row mean, of a full block and of the
        tail.
      kept: columns that are computed slab by slab and used for all rows at once.
      rings: what is copied in and out a slab at a time, most of them double-buffered; and q·κ.
      minus: shift "reference": −r in two halves.
      closing: rows of the output, and of the log-sum-exp.
      merging: decoding: two settled states.
      damage: "total": of a query tile, "core": of all of the core's; 0 or NaN.
      guard: a careful kernel's: of each row of several items.
      reference: the shift "bound": what is taken off the scores of each row of two items.
    """

    ub: Memory
    query: dict[str, Buffer]
    state: dict[str, Buffer]
    kept: dict[str, Buffer]
    ramp: Buffer
    weights: Buffer | None
    rings: dict[str, Buffer]
    minus: Buffer | None
    closing: dict[str, Buffer]
    merging: dict[str, Buffer]
    damage: dict[str, Buffer]
    guard: Buffer | None
    reference: Buffer | None

    @staticmethod
    def of(c: Context) -> VectorMemory:
        ub = Memory.of(c.kernel.schedule.target, "UB")
        ramp = ub.stay("ramp", "float", c.n, note="0, 1, 2, …")
        query = {
            "in": ub.stay("queryIn", c.dtype, c.slabs.closing * c.d, note="query rows"),
            # The output's rows go out by it too.
            "out": ub.stay("rowsOut", c.dtype, c.slabs.closing * max(c.d, c.e), note="rows"),
        }
        if c.kernel.careful:
            query["guard"] = ub.stay("guardOut", "float", c.slabs.closing, note="their guards")
        if c.kernel.bounded:
            query["norms"] = ub.stay("normsOut", "float", c.slabs.closing, note="their lengths")
        state = _state(c, ub)
        kept = _kept(c, ub)
        weights = None
        if c.kernel.shift == "paper":
            share = "share of each column in the row mean"
            weights = ub.stay("shares", "float", c.n, 2, share)
        rings, minus = _rings(c, ub)
        closing, merging = {"out": query["out"], **_closing(c, ub)}, _merging(c, ub)
        damage = {}
        if c.kernel.repaired:
            note = "0, or NaN where a result is not right"
            damage = {n: ub.stay(f"{n}DamageUB", "float", 8, note=note) for n in ("total", "core")}
        guard = None
        if c.kernel.careful:
            guard = ub.stay("guards", "float", c.half, ITEMS, "guard of each row")
        reference = None
        if c.kernel.bounded:
            note = "what is taken off the scores of each row"
            reference = ub.stay("reference", "float", c.block_q, QUERIES, note)
        return VectorMemory(
            ub, query, state, kept, ramp, weights, rings, minus, closing, merging, damage, guard,
            reference,
        )  # fmt: skip


def _state(c: Context, ub: Memory) -> dict[str, Buffer]:
    stat = C_TYPES[str(c.kernel.numerics.statistics)]
    acc = C_TYPES[c.kernel.precision.accumulator]
    state = {n: ub.stay(n, stat, c.half, ITEMS, f"{n} of each row") for n in ("m", "l", "f")}
    state["o"] = ub.stay("o", acc, c.half * c.e, note="O, not normalised")
    for name in dict.fromkeys(name for x in c.ways for name in x.full.carried):
        state[name] = ub.stay(name, stat, c.half, CARRIED, "what the output is multiplied by")
    return state


def _kept(c: Context, ub: Memory) -> dict[str, Buffer]:
    steps = [
        part for x in c.ways for part in (x.full.softmax, x.masked.softmax, x.update.accumulate)
    ]
    types = {name: dtype for x in steps for name, dtype in x.kept.items()}
    return {n: ub.stay(n, dtype, c.half, note="of each row") for n, dtype in types.items()}


def _rings(c: Context, ub: Memory) -> tuple[dict[str, Buffer], Buffer | None]:
    r, u, slots, p = c.slabs.rows, c.slabs.update, c.slabs.slots, c.full.products
    rings = {
        "scores": ub.stay("scoresIn", p["key"].dtype, r * c.n, 2, "S' of a slab"),
        "p": ub.stay("pOut", c.dtype, r * c.n, slots, "P of a slab"),
        "update": ub.stay("updateIn", p["value"].dtype, u * c.e, slots, "P·V of a slab"),
    }
    minus = None
    if c.refers:
        rings["shifted"] = ub.stay("shiftedIn", p["raw"].dtype, r * c.n, 2, "S − r of a slab")
        minus = ub.stay("minusOut", c.dtype, 2 * max(r, LEAST), note="−r in two halves")
    if "kappa" in p:
        rings["offsets"] = ub.stay(
            "offsetsIn", p["kappa"].dtype, LEAST * c.half, note=f"q·κ of {LEAST} blocks"
        )
    if "ones" in p:
        rings["sums"] = ub.stay("sumsIn", p["ones"].dtype, c.half * COLUMNS, note="row sums of P")
    if c.kernel.bias is not None:
        rings["bias"] = ub.stay("biasIn", c.dtype, r * c.n, 2, "bias of a slab")
    masked = c.slabs.masked
    if c.kernel.mask_axes is not None:
        rings["mask"] = ub.stay("maskIn", "uint8_t", masked * c.n, 2, "mask of a slab")
    if c.kernel.segments:
        rows = -(-masked // 8) * 8
        note = "segments of a slab's queries"
        rings["querySegments"] = ub.stay("querySegmentsIn", "int32_t", rows, 2, note)
        rings["keySegments"] = ub.stay("keySegmentsIn", "int32_t", c.n, 2, "segments of the keys")
    for x in c.row_data:
        queries = x.part == "q_data"
        count = -(-r // BLOCK) * BLOCK if queries else c.n  # whole blocks of any type
        note = f"data of {'a slab' if queries else 'the keys'}"
        rings[x.name] = ub.stay(f"{x.name}_in", C_TYPES[x.dtype], count, 2, note)
    return rings, minus


def _closing(c: Context, ub: Memory) -> dict[str, Buffer]:
    closing: dict[str, Buffer] = {}
    if c.kernel.sinks and c.kernel.decode:
        closing["sinks"] = ub.stay(
            "sinksIn", "float", c.slabs.closing, note="sinks of the rows' heads"
        )
    if c.kernel.return_lse:
        spread = "log-sum-exp, a block each"
        closing["lse"] = ub.stay("lseOut", "float", c.slabs.closing * 8, note=spread)
        closing["column"] = ub.stay("lseColumn", "float", c.slabs.closing, note="log-sum-exp")
    return closing


def _merging(c: Context, ub: Memory) -> dict[str, Buffer]:
    merging = {}
    for name in ("m", "l", "o", "m2", "l2", "o2") if c.kernel.decode else ():
        size = c.slabs.closing * (c.e if name[0] == "o" else 1)
        note = f"{name[0]} of a part of the keys"
        merging[name] = ub.stay(f"part{name.capitalize()}UB", "float", size, note=note)
    return merging
