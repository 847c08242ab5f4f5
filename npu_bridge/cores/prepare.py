"""What the vector cores compute once, before the loop: queries, keys, last blocks, constants."""

from __future__ import annotations

from npu_bridge import bound_stages, stages
from npu_bridge.cores import bound
from npu_bridge.cores.context import Context
from npu_bridge.cores.function import Output, VectorFunction, inputs_of
from npu_bridge.cores.slabs import (
    computed,
    copy,
    padded_load,
    slab,
    spread_units,
    zero_bits,
)
from npu_bridge.cores.vector_memory import VectorMemory
from npu_bridge.dtypes import BLOCK, ITEMSIZE
from npu_bridge.expressions import Scalar
from npu_bridge.instructions import Duplicate, SetValue, WithScalar
from npu_bridge.ir import Barrier, Buffer, For, Function, If, Let, Node, SetFlag, WaitFlag
from npu_bridge.layout import DEPTH, LEAST, QUERIES, SINGLE, SUB
from npu_bridge.lower import Value, Vector
from npu_bridge.memory import Memory

_ROWS = 64  # that are loaded at once
_ONE = {"half": 0x3C00, "bfloat16_t": 0x3F80}  # the bits of 1


def query(c: Context, memory: VectorMemory) -> Function:
    """The query rows of an item as they are multiplied; zeros beyond T."""
    rows, careful, bounded = c.slabs.closing, c.kernel.careful, c.kernel.bounded
    trace = bound_stages.queries if bounded else stages.queries
    traced = (stages.guarded_queries if careful else trace)(c.kernel, rows)
    f = VectorFunction(memory.ub, "PrepareQuery", ("item", "turn"))
    source, to = memory.query["in"], memory.query["out"]
    at = f"({c.query_row('first')}) * {c.d}"
    loads = padded_load(
        source.at(), c.globals["query"].at(at), rows, "valid", c.d, f"(rowStride - 1) * {c.d}"
    )
    output = traced.outputs["scaled"]
    if output is traced.inputs["query"]:  # nothing to compute: the rows are only gathered
        compute: list[Node] = [Barrier("V"), copy(to.at(), source.at(), rows * c.d)]
    else:
        values = {"query": Vector(source.at(), rows, c.d), "scale": Scalar("scale")}
        outputs = {output: Output(to.at())}
        if careful:
            values["keyBound"] = Scalar("bound")
            outputs[traced.outputs["guard"]] = Output(memory.query["guard"].at())
        if bounded:
            outputs[traced.outputs["length"]] = Output(memory.query["norms"].at())
        compute = f.lowered(traced.equations, inputs_of(traced.inputs, values), outputs)
    slot = f"int64_t(core) * {QUERIES} + Mod(turn, {QUERIES})"
    place = f"({slot}) * {c.block_q} + firstRow + row"
    scaled = c.globals["scaledQuery"].at(f"({place}) * {c.d}")
    stores: list[Node] = [copy(scaled, to.at(), rows * c.d)]
    lets = c.item()
    if bounded:
        # The other vector core reads them too, and may be a few items behind.
        turn = f"int64_t(core) * {DEPTH} + Mod(turn, {DEPTH})"
        at = f"({turn}) * {c.block_q} + firstRow + row"
        stores.append(copy(c.globals["norms"].at(at), memory.query["norms"].at(), rows))
    if careful:
        row = f"{c.tile_row('tile')} * {c.block_q}"
        to_guard = c.globals["guard"].at(f"{row} + firstRow + row")
        stores.append(copy(to_guard, memory.query["guard"].at(), rows))
        of_head = "entry * kvHeads + Div(head, groups)"
        lets.append(Let("bound", f"keyBound.GetValue({of_head})", "float"))
    slabs: list[Node] = [
        Let("first", "start + firstRow + row"),
        Let("valid", f"Max(0, Min({rows}, {c.rows_end} - first))"),
        *slab(SINGLE, loads, compute, stores),
    ]
    body: list[Node] = [*lets, For("row", 0, c.half, slabs, rows)]
    comment = "Query rows, scaled and rounded as they are multiplied (eq. 12); zeros beyond T."
    return f.done(comment, body)


def keys(c: Context, ub: Memory, ramp: Buffer) -> Function:
    """κ of each key block, and the keys without it."""
    f = VectorFunction(ub, "PrepareKeys", alone=True, ramp=ramp if c.kernel.bounded else None)
    rows = _ROWS if c.d <= SUB else _ROWS // 2
    source = f.temporary("keysIn", c.dtype, rows * c.d, 2)
    to = f.temporary("keysOut", c.dtype, rows * c.d, 2)
    total = f.temporary("total", "float", rows * c.d)
    kappa = f.temporary("kappaOut", c.dtype, c.d)
    facts = bound.KeyFacts(c, f, rows) if c.kernel.bounded else None
    values: dict[str, Value] = {
        "key": Vector(source.slot("slot"), rows, c.d),
        "total": Vector(total.at(), rows, c.d),
        "kappa": Vector(kappa.at(), 1, c.d),
        "count": Scalar("count"),
        "chosen": Scalar("taken"),
        **(facts.values() if facts else {}),
    }

    def lowered(traced: stages.Trace, outputs: dict[str, Output]) -> list[Node]:
        inputs = inputs_of(traced.inputs, values)
        places = {traced.outputs[name]: output for name, output in outputs.items()}
        return f.lowered(traced.equations, inputs, places)

    adding = lowered(stages.key_total(c.kernel, rows), {"total": Output(total.at(), total)})
    found, shifted = {"kappa": Output(kappa.at())}, {"shifted": Output(to.slot("slot"))}
    if facts:
        finding = lowered(bound_stages.centre(c.kernel, rows), found | facts.of_centre())
        shifting = lowered(bound_stages.shifted_keys(c.kernel, rows), shifted | facts.of_slab())
    else:
        finding = lowered(stages.kappa(c.kernel, rows), found)
        shifting = lowered(stages.shifted_keys(c.kernel, rows), shifted)
    at = f"{c.key_row('first')} * {c.d}"
    gap = f"(kvHeads - 1) * {c.d}"
    loads: list[Node] = [
        Let("first", f"j * {c.n} + slab"),
        Let("valid", f"Max(0, Min({rows}, keys - first))"),
        *padded_load(source.slot("slot"), c.globals["key"].at(at), rows, "valid", c.d, gap),
    ]
    block = c.block_row("j")
    out = c.globals["shiftedKey"].at(f"({block} * {c.n} + slab) * {c.d}")
    to_kappa = copy(c.globals["kappa"].at(f"{c.kappa_row('j')} * {c.d}"), kappa.at(), c.d)
    stores: list[Node] = [copy(out, to.slot("slot"), rows * c.d)]
    slot = Let("slot", f"Mod(Div(slab, {rows}), 2)")
    work: list[Node] = [
        Barrier("V"),
        Duplicate(total.at(), Scalar(0), rows * c.d),
        For("slab", 0, c.n, [slot, *slab("slot", loads, adding, [])], rows),
        *computed(finding, [to_kappa]),
        *(facts.begin() if facts else []),
        For("slab", 0, c.n, [slot, *slab("slot", loads, shifting, stores, "slot")], rows),
        *(facts.end(f) if facts else []),
    ]
    # The cube unit multiplies by whole groups of κ: of those that are none, by zeros.
    zeros = f.temporary("zeros", c.dtype, c.d)
    to_zeros = copy(c.globals["kappa"].at(f"{c.kappa_row('none')} * {c.d}"), zeros.at(), c.d)
    no_facts, to_facts = bound.zeros(c, f) if facts else ([], [])
    none_lo, none_hi = "Pick(count > 0, j + 1, j)", f"Pick(last, {c.kappa_end()}, j + 1)"
    nothing = For("none", none_lo, none_hi, [to_zeros, *to_facts])
    of_head = "takesKappa.GetValue(entry * kvHeads + kvHead)"
    body: list[Node] = [
        *c.key_blocks(),
        *([Let("taken", of_head, "float")] if c.kernel.chooses else []),
        Let("count", f"Min({c.n}, keys - j * {c.n})"),
        Let("last", f"{'blockSlot' if c.kernel.packed else 'j'} == keyBlocks - 1"),
        If("count > 0", work),
        nothing,
    ]
    comment = "κ of each key block, and the keys without it (eq. 7)."
    clear = computed([zero_bits(zeros.at(), c.d), *no_facts], [])
    return f.done(comment, [*clear, *spread_units(c.block_units, body)])


def tails(c: Context, ub: Memory) -> Function:
    """The last block of each head if it is not full, followed by zeros."""
    f = VectorFunction(ub, "PrepareTails", alone=True)
    of_keys = "keyTail" in c.globals
    buffer = f.temporary("rowsIn", c.dtype, _ROWS * (max(c.d, c.e) if of_keys else c.e))
    copies = _tail(c, "value", c.e, buffer)
    if of_keys:
        copies += _tail(c, "key", c.d, buffer)
    rows: list[Node] = [
        Let("first", f"Div(keys, {c.n}) * {c.n} + slab"),
        Let("valid", f"Max(0, Min({_ROWS}, keys - first))"),
        *copies,
    ]
    body: list[Node] = [
        Let("kvHead", "Mod(unit, kvHeads)"),
        Let("entry", "Div(unit, kvHeads)"),
        c.keys_of("entry"),
        If(f"Mod(keys, {c.n}) > 0", [For("slab", 0, c.n, rows, _ROWS)]),
    ]
    comment = "The last block of each head if it is not full, followed by zeros."
    return f.done(comment, spread_units("batch * kvHeads", body))


def _tail(c: Context, name: str, width: int, buffer: Buffer) -> list[Node]:
    """Copies rows of "key" or "value" by way of ``buffer``."""
    at = f"{c.key_row('first')} * {width}"
    source, gap = c.globals[name].at(at), f"(kvHeads - 1) * {width}"
    to = c.globals[f"{name}Tail"].at(f"(int64_t(unit) * {c.n} + slab) * {width}")
    return [
        WaitFlag("MTE3", "MTE2", 0),
        *padded_load(buffer.at(), source, _ROWS, "valid", width, gap),
        SetFlag("MTE2", "MTE3", 0),
        WaitFlag("MTE2", "MTE3", 0),
        copy(to, buffer.at(), _ROWS * width),
        SetFlag("MTE3", "MTE2", 0),
    ]


def ones(c: Context, ub: Memory) -> Function:
    """Ones in global memory, written by one core."""
    size = SUB * LEAST
    f = VectorFunction(ub, "PrepareOnes", alone=True)
    buffer = f.temporary("onesOut", c.dtype, size)
    fill = Duplicate(buffer.at().of_type("uint16_t"), Scalar(_ONE[c.dtype]), size)
    body = computed([fill], [copy(c.globals["ones"].at(0), buffer.at(), size)])
    comment = "Ones, by which the cube unit multiplies P to add it up."
    return f.done(comment, [If("vectorCore == 0", body)])


def ramp(ub: Memory, buffer: Buffer) -> Function:
    """0, 1, 2, … in a buffer that stays: the scalar unit writes a block, which is doubled."""
    f = VectorFunction(ub, "MakeRamp")
    length = BLOCK // ITEMSIZE[buffer.dtype]
    body: list[Node] = [
        *[SetValue(buffer.at(i, 1), Scalar(i)) for i in range(length)],
        SetFlag("S", "V", SINGLE),
        WaitFlag("S", "V", SINGLE),
    ]
    while length < buffer.count:
        more = min(length, buffer.count - length)
        body += [
            WithScalar("Adds", buffer.at(length, more), buffer.at(0, more), Scalar(length), more),
            Barrier("V"),
        ]
        length += more
    return f.done("Indices of rows and columns, by which positions are compared.", body)


def minus(c: Context, ub: Memory) -> Function:
    """Zeros in all rows of the two halves of −r that stay zero."""
    size = DEPTH * LEAST * c.block_q
    f = VectorFunction(ub, "PrepareMinus", alone=True)
    buffer = f.temporary("zerosOut", c.dtype, size)
    to = c.globals["minus"].at(f"int64_t(core) * {size}")
    body = computed([zero_bits(buffer.at(), size)], [copy(to, buffer.at(), size)])
    comment = "Zeros where the halves of r are two of as many rows as the cube unit multiplies."
    return f.done(comment, [If("(firstRow == 0) & (core < cores)", body)])
