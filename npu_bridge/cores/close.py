"""The rows of a vector core before the first key tile and after the last, and decoding's merge of
the states over parts of the keys.
"""

from __future__ import annotations

from npu_bridge import stages
from npu_bridge.cores.context import Context, Core
from npu_bridge.cores.function import Output, VectorFunction, inputs_of
from npu_bridge.cores.slabs import cleared, computed, copy, slab, spread_units, zero_bits
from npu_bridge.cores.vector_memory import VectorMemory
from npu_bridge.expressions import Expr, Scalar, times
from npu_bridge.instructions import Brcb, Duplicate, RowsIn, RowsOut
from npu_bridge.ir import Barrier, Call, For, Function, If, Let, Node, SetFlag, WaitFlag
from npu_bridge.layout import PADDING, SINGLE
from npu_bridge.lower import Value, Vector

_LOWEST = {"float": -3.4028234663852886e38, "half": -65504.0}
_SETTLED = ("m", "l", "o")


def begin(c: Context, memory: VectorMemory) -> Function:
    """The row statistics before any key."""
    careful = ("entry", "head", "tile") if memory.guard else ()
    f = VectorFunction(memory.ub, "Begin", ("side", *careful))
    body: list[Node] = [Barrier("V")]
    if memory.guard:
        row = f"{c.tile_row('tile')} * {c.block_q} + firstRow"
        load = copy(memory.guard.slot("side"), c.globals["guard"].at(row), c.half)
        flags = [("V", "MTE2", PADDING), ("MTE3", "MTE2", 1), ("MTE2", "V", SINGLE)]
        first, second, after = ([SetFlag(*x), WaitFlag(*x)] for x in flags)
        taken = ("V", "MTE2", SINGLE)
        body += [*first, *second, WaitFlag(*taken), load, *after, SetFlag(*taken)]
    for name in ("m", "l", "f"):
        b = memory.state[name]
        lowest = name == "m"
        value = Scalar(_LOWEST[b.dtype] if lowest else 0)
        body.append(Duplicate(b.slot("side"), value, b.count, spelled=not lowest))
    return f.done("The row statistics before any key (eq. 10).", body)


def clear(memory: VectorMemory) -> Function:
    """O before any key."""
    o = memory.state["o"]
    body: list[Node] = [Barrier("V"), Duplicate(o.at(), Scalar(0), o.count, spelled=True)]
    return VectorFunction(memory.ub, "Clear").done("O before any key (eq. 10).", body)


def _state(c: Context, memory: VectorMemory, row: Expr) -> dict[str, Value]:
    """The state of rows from ``row`` on."""
    r = c.slabs.closing
    state: dict[str, Value] = {
        name: Vector(memory.state[name].at(f"side * {c.half} + {row}", r), r, 1)
        for name in ("m", "l", "f")
    }
    state["o"] = Vector(memory.state["o"].at(times(row, c.e), r * c.e), r, c.e)
    return state


def _settled(c: Context, memory: VectorMemory, which: str) -> dict[str, Value]:
    """One of the two states that are merged: ``which`` is "" or "2"."""
    r = c.slabs.closing
    return {
        name: Vector(memory.merging[name + which].at(), r, c.e if name == "o" else 1)
        for name in _SETTLED
    }


def close(c: Context, memory: VectorMemory) -> Function:
    """O/l, rounded to the output's type, and the log-sum-exp."""
    r, decode = c.slabs.closing, c.kernel.decode
    traced = stages.close(c.kernel, r)
    f = VectorFunction(memory.ub, "Close", ("entry", "head", "start", "side"))
    # Settling has put f into m.
    settled = _settled(c, memory, "") | {"f": Scalar(0.0)} if decode else None
    state = settled or _state(c, memory, "row")
    loads: list[Node] = []
    if c.kernel.sinks:
        state["sinks"], loads = _sinks(c, memory)
    lets = c.queries_of("entry")
    if memory.guard:
        at = memory.guard.at(0 if decode else f"side * {c.half} + row", r)
        state |= {"guard": Vector(at, r, 1), "valueGain": Scalar("gain")}
        of_head = "entry * kvHeads + Div(head, groups)"
        lets.append(Let("gain", f"valueGain.GetValue({of_head})", "float"))
    if c.kernel.sinks and not decode:
        lets.append(Let("sink", "sinks.GetValue(head)", "float"))
    out, row = memory.closing["out"], c.query_row("first")
    outputs = {traced.outputs["out"]: Output(out.at())}
    to = c.globals["output"].at(f"({row}) * {c.e}")
    stores: list[Node] = [RowsOut(to, out.at(), "valid", c.e, f"(rowStride - 1) * {c.e}")]
    if c.kernel.return_lse:
        outputs[traced.outputs["lse"]] = Output(memory.closing["column"].at())
    compute = f.lowered(traced.equations, inputs_of(traced.inputs, state), outputs)
    if c.kernel.return_lse:
        lse, column = memory.closing["lse"], memory.closing["column"]
        compute += [Barrier("V"), Brcb(lse.at(), column.at(), r)]
        stores.append(RowsOut(c.globals["lse"].at(row), lse.at(), "valid", 1, "rowStride - 1"))
    stored = "valid > 0"
    if c.kernel.careful:  # what was right stays as it was
        tile, half = (
            ("0", "0") if decode else (f"Div(start, {c.block_q})", f"Div(firstRow, {c.half})")
        )
        place = c.damage_at(tile, half)
        stored = f"({stored}) & (damage.GetValue({place}) != 0.0f)"
    last: list[Node] = [If(stored, stores)]
    body: list[Node] = [
        Let("first", "start" if decode else "start + firstRow + row"),
        Let("valid", f"Max(0, Min({r}, {c.rows_end} - first))"),
        *(slab(SINGLE, loads, compute, last) if loads else computed(compute, last)),
    ]
    if not decode:  # decoding: one slab, which `Merge` has made
        body = [For("row", 0, c.half, body, r)]
    return f.done("O/l, rounded to the output's type (eq. 14).", [*lets, *body])


def _sinks(c: Context, memory: VectorMemory) -> tuple[Value, list[Node]]:
    """The sink of each row's head: one number where all rows are of one head. And its loads."""
    source = c.globals["sinks"]
    if not c.kernel.decode:
        return Scalar("sink"), []
    to = memory.closing["sinks"]
    load = RowsIn(to.at(), source.at("head * queryLength + first"), 1, "valid", 0, c.slabs.closing)
    zeros = If(f"valid < {c.slabs.closing}", cleared(zero_bits(to.at(), c.slabs.closing)))
    return Vector(to.at(), c.slabs.closing, 1), [zeros, If("valid > 0", [load])]


def undamaged(memory: VectorMemory) -> list[Node]:
    """Before the first item: no damage has been seen."""
    if not memory.damage:
        return []
    return [Duplicate(memory.damage["core"].at(), Scalar(0), 8), Barrier("V")]


def look(c: Context, memory: VectorMemory) -> Function:
    """Whether the rows of an item, or of a slab where states were merged, have a right result."""
    decode = c.kernel.decode
    f = VectorFunction(memory.ub, "Look", ("entry", "start", "side"), ramp=memory.ramp)
    rows = c.slabs.closing if decode else c.half
    traced = stages.damage(c.kernel, rows)
    places = memory.merging if decode else memory.state
    totals = {n: memory.damage[n] for n in ("total", "core")}
    values = {
        "l": Vector(places["l"].at(0 if decode else f"side * {c.half}", rows), rows, 1),
        "o": Vector(places["o"].at(0, rows * c.e), rows, c.e),
        **{n: Vector(b.at(0, 1), 1, 1) for n, b in totals.items()},
        **{n: Scalar(n) for n in ("first", "queries", "keys", "valid")},
    }
    outputs = {traced.outputs[n]: Output(b.at(0, 1), b) for n, b in totals.items()}
    compute = f.lowered(traced.equations, inputs_of(traced.inputs, values), outputs)
    body: list[Node] = [
        *c.queries_of("entry"),
        Let("first", "start" if decode else "start + firstRow"),
        Let("valid", f"Max(0, Min({rows}, {c.rows_end} - first))"),
        c.keys_of("entry"),
        *compute,
    ]
    return f.done("Adds NaN to the damage where a row's result cannot be right.", body)


def report(c: Context, memory: VectorMemory) -> Function:
    """Writes the damage of a query tile for all cores to read."""
    f = VectorFunction(memory.ub, "Report", ("entry", "head", "tile", "half"))
    to = c.globals["damage"].at(c.damage_at("tile", "half"))
    total = memory.damage["total"]
    body = computed([Barrier("V")], [RowsOut(to, total.at(0, 1), 1, 1, 0)])
    body += [SetFlag("MTE3", "V", PADDING), WaitFlag("MTE3", "V", PADDING)]
    return f.done("0, or NaN where rows must be computed again.", body)


def no_damage(memory: VectorMemory) -> list[Node]:
    """Before a query tile."""
    total = memory.damage["total"]
    return [Duplicate(total.at(), Scalar(0), total.count)]


def tell(c: Context, memory: VectorMemory) -> list[Node]:
    """After the last item: whether any of this core's was damaged."""
    if not memory.damage:
        return []
    to = c.globals["coreDamage"].at("vectorCore")
    return computed([Barrier("V")], [RowsOut(to, memory.damage["core"].at(0, 1), 1, 1, 0)])


def store_state(c: Context, memory: VectorMemory) -> Function:
    """Decoding: keeps m, l and O of a part of the keys."""
    r = c.slabs.closing
    traced = stages.settle(c.kernel, r)
    f = VectorFunction(memory.ub, "StoreState", ("item", "side"))
    outputs = {traced.outputs[name]: Output(memory.merging[name].at()) for name in _SETTLED}
    inputs = inputs_of(traced.inputs, _state(c, memory, "row"))
    compute = f.lowered(traced.equations, inputs, outputs)
    row = f"int64_t(item) * {c.block_q} + firstRow + row"
    body = computed(compute, _part_copies(c, memory, row, "", load=False))
    comment = "Keeps m, l and O of a part of the keys, to be merged."
    return f.done(comment, [For("row", 0, c.half, body, r)])


def _part_copies(
    c: Context, memory: VectorMemory, row: str, which: str, *, load: bool
) -> list[Node]:
    """Copies of m, l and o between a merging buffer and rows of the workspace."""
    copies: list[Node] = []
    for name in _SETTLED:
        width = c.e if name == "o" else 1
        local = memory.merging[name + which].at()
        place = c.globals[f"part{name.upper()}"].at(f"({row}) * {width}")
        pair = (local, place) if load else (place, local)
        copies.append(copy(*pair, c.slabs.closing * width))
    return copies


def merge(c: Context, memory: VectorMemory, core: Core, close: Function) -> Function:
    """Decoding: the states of all parts of the keys in one, and the output from it."""
    traced = stages.merge(c.kernel, c.slabs.closing)
    f = VectorFunction(memory.ub, "Merge")
    other = {f"{n}2": x for n, x in _settled(c, memory, "2").items()}
    if memory.guard:
        other["guard"] = Vector(memory.guard.at(0, c.slabs.closing), c.slabs.closing, 1)
    inputs = inputs_of(traced.inputs, _settled(c, memory, "") | other)
    outputs = {}
    for name in _SETTLED:
        old = memory.merging[name]
        outputs[traced.outputs[name]] = Output(old.at(), old)
    compute = f.lowered(traced.equations, inputs, outputs)
    first = _part_copies(c, memory, f"int64_t(unit) * {c.block_q} + row", "", load=True)
    if memory.guard:
        at = c.globals["guard"].at(f"int64_t(unit) * {c.block_q} + row")
        first.append(copy(memory.guard.at(0, c.slabs.closing), at, c.slabs.closing))
    unit = "int64_t(part) * batch * heads + unit"
    more = _part_copies(c, memory, f"({unit}) * {c.block_q} + row", "2", load=True)
    rows: list[Node] = [
        *slab(SINGLE, first, [], []),
        For("part", 1, "parts", slab(SINGLE, more, compute, [])),
        Call(close, ("entry", "head", "row", 0)),
    ]
    if memory.damage:
        rows.append(Call(core.add(look(c, memory)), ("entry", "row", 0)))
    rows += [  # the next slab is loaded where this one was computed
        SetFlag("V", "MTE2", PADDING),
        WaitFlag("V", "MTE2", PADDING),
    ]
    work: list[Node] = [For("row", 0, "queryLength", rows, c.slabs.closing)]
    if memory.damage:
        tell = Call(core.add(report(c, memory)), ("entry", "head", "0", "0"))
        work = [*no_damage(memory), *work, tell]
    body: list[Node] = [
        Let("head", "Mod(unit, heads)"),
        Let("entry", "Div(unit, heads)"),
        *work,
    ]
    comment = "The states of all parts of the keys in one (eq. 13)."
    return f.done(comment, spread_units("batch * heads", body))
