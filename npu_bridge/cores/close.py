"""The rows of a vector core before the first key tile and after the last, and decoding's merge of
the states over parts of the keys.
"""

from __future__ import annotations

from npu_bridge import stages
from npu_bridge.cores.context import Context, query_row
from npu_bridge.cores.function import Output, VectorFunction, inputs_of
from npu_bridge.cores.slabs import cleared, computed, copy, slab, spread_units, zero_bits
from npu_bridge.cores.vector_memory import VectorMemory
from npu_bridge.expressions import Expr, Scalar, times
from npu_bridge.instructions import Brcb, Duplicate, RowsIn, RowsOut
from npu_bridge.ir import Barrier, Call, For, Function, If, Let, Node, SetFlag, WaitFlag
from npu_bridge.layout import CLOSING, PADDING, SINGLE
from npu_bridge.lower import Value, Vector

_LOWEST = {"float": -3.4028234663852886e38, "half": -65504.0}
_SETTLED = ("m", "l", "o")


def begin(c: Context, memory: VectorMemory) -> Function:
    """The state before any key."""
    f = VectorFunction(memory.ub, "Begin")
    body: list[Node] = [Barrier("V")]
    for name in ("m", "l", "f", "o"):
        b = memory.state[name]
        lowest = name == "m"
        value = Scalar(_LOWEST[b.dtype] if lowest else 0)
        body.append(Duplicate(b.at(), value, b.count, spelled=not lowest))
    return f.done("The state before any key (eq. 10).", body)


def _state(c: Context, memory: VectorMemory, row: Expr) -> dict[str, Value]:
    """The state of `CLOSING` rows from ``row`` on."""
    r = CLOSING
    state: dict[str, Value] = {
        name: Vector(memory.state[name].at(row, r), r, 1) for name in ("m", "l", "f")
    }
    state["o"] = Vector(memory.state["o"].at(times(row, c.e), r * c.e), r, c.e)
    return state


def _settled(c: Context, memory: VectorMemory, which: str) -> dict[str, Value]:
    """One of the two states that are merged: ``which`` is "" or "2"."""
    r = CLOSING
    return {
        name: Vector(memory.merging[name + which].at(), r, c.e if name == "o" else 1)
        for name in _SETTLED
    }


def close(c: Context, memory: VectorMemory) -> Function:
    """O/l, rounded to the output's type, and the log-sum-exp."""
    r, decode = CLOSING, c.kernel.decode
    traced = stages.close(c.kernel, r)
    f = VectorFunction(memory.ub, "Close", ("entry", "head", "start"))
    # Settling has put f into m.
    settled = _settled(c, memory, "") | {"f": Scalar(0.0)} if decode else None
    state = settled or _state(c, memory, "row")
    loads: list[Node] = []
    if c.kernel.sinks:
        state["sinks"], loads = _sinks(c, memory)
    out, row = memory.closing["out"], query_row("first")
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
    last: list[Node] = [If("valid > 0", stores)]
    of_head = c.kernel.sinks and not decode
    body: list[Node] = [
        *([Let("sink", "sinks.GetValue(head)", "float")] if of_head else []),
        Let("first", "start" if decode else "start + firstRow + row"),
        Let("valid", f"Max(0, Min({r}, queryLength - first))"),
        *(slab(SINGLE, loads, compute, last) if loads else computed(compute, last)),
    ]
    if not decode:  # decoding: one slab, which `Merge` has made
        body = [For("row", 0, c.half, body, r)]
    return f.done("O/l, rounded to the output's type (eq. 14).", body)


def _sinks(c: Context, memory: VectorMemory) -> tuple[Value, list[Node]]:
    """The sink of each row's head: one number where all rows are of one head. And its loads."""
    source = c.globals["sinks"]
    if not c.kernel.decode:
        return Scalar("sink"), []
    to = memory.closing["sinks"]
    load = RowsIn(to.at(), source.at("head * queryLength + first"), 1, "valid", 0, CLOSING)
    zeros = If(f"valid < {CLOSING}", cleared(zero_bits(to.at(), CLOSING)))
    return Vector(to.at(), CLOSING, 1), [zeros, If("valid > 0", [load])]


def store_state(c: Context, memory: VectorMemory) -> Function:
    """Decoding: keeps m, l and O of a part of the keys."""
    r = CLOSING
    traced = stages.settle(c.kernel, r)
    f = VectorFunction(memory.ub, "StoreState", ("item",))
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
        copies.append(copy(*pair, CLOSING * width))
    return copies


def merge(c: Context, memory: VectorMemory, close: Function) -> Function:
    """Decoding: the states of all parts of the keys in one, and the output from it."""
    traced = stages.merge(c.kernel, CLOSING)
    f = VectorFunction(memory.ub, "Merge")
    other = {f"{n}2": x for n, x in _settled(c, memory, "2").items()}
    inputs = inputs_of(traced.inputs, _settled(c, memory, "") | other)
    outputs = {}
    for name in _SETTLED:
        old = memory.merging[name]
        outputs[traced.outputs[name]] = Output(old.at(), old)
    compute = f.lowered(traced.equations, inputs, outputs)
    first = _part_copies(c, memory, f"int64_t(unit) * {c.block_q} + row", "", load=True)
    unit = "int64_t(part) * batch * heads + unit"
    more = _part_copies(c, memory, f"({unit}) * {c.block_q} + row", "2", load=True)
    rows: list[Node] = [
        *slab(SINGLE, first, [], []),
        For("part", 1, "parts", slab(SINGLE, more, compute, [])),
        Call(close, ("entry", "head", "row")),
        # The next slab is loaded where this one was computed.
        SetFlag("V", "MTE2", PADDING),
        WaitFlag("V", "MTE2", PADDING),
    ]
    body: list[Node] = [
        Let("head", "Mod(unit, heads)"),
        Let("entry", "Div(unit, heads)"),
        For("row", 0, "queryLength", rows, CLOSING),
    ]
    comment = "The states of all parts of the keys in one (eq. 13)."
    return f.done(comment, spread_units("batch * heads", body))
