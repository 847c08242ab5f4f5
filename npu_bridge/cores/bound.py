"""The shift "bound": what the vector cores find out of each block of keys, and from that the
references of an item's rows and whether they are proved to be safe (eq. 21, 22).
"""

from __future__ import annotations

from npu_bridge import bound_stages
from npu_bridge.bound_stages import FACTS, RUNNING
from npu_bridge.cores.context import GROUPED, Context, slot_of
from npu_bridge.cores.function import Output, VectorFunction, inputs_of
from npu_bridge.cores.slabs import computed, copy, padded_load, slab, spread_units, zero_bits
from npu_bridge.cores.vector_memory import VectorMemory
from npu_bridge.expressions import Scalar
from npu_bridge.instructions import Duplicate, RowsIn, RowsOut
from npu_bridge.ir import (
    Assign,
    Barrier,
    Buffer,
    For,
    Function,
    If,
    Invalidate,
    Let,
    Node,
    SetFlag,
    WaitFlag,
)
from npu_bridge.layout import DEPTH, LEAST, PADDING, QUERIES, SINGLE, SUB, VECTOR_CORES
from npu_bridge.lower import Value, Vector
from npu_bridge.memory import Memory

_HEAD = "(int64_t(entry) * kvHeads + kvHead)"


def fact_at(name: str, j: str) -> str:
    """Where a fact of block j lies."""
    return f"({_HEAD} * {len(FACTS)} + {FACTS.index(name)}) * {GROUPED} + {j}"


class KeyFacts:
    """What `prepare.keys` finds out of each block beside κ: its radius, its reach, and how far κ is
    from the mean of the keys.

    Arguments:
      rows: of a slab of keys.
    """

    def __init__(self, c: Context, f: VectorFunction, rows: int) -> None:
        self.c, self.rows = c, rows
        self.farthest = f.temporary("farthest", "float", rows)
        self.numbers = {
            n: f.temporary(f"{n}Out", "float", 8) for n in ("length", "radius", "reach", "off")
        }

    def values(self) -> dict[str, Value]:
        """What its stages read beside the keys."""
        return {
            "farthest": Vector(self.farthest.at(), self.rows, 1),
            "length": Vector(self.numbers["length"].at(0, 1), 1, 1),
            "valid": Scalar("valid"),
        }

    def of_centre(self) -> dict[str, Output]:
        """Where the stage that finds κ leaves the rest."""
        return {n: Output(self.numbers[n].at(0, 1)) for n in ("length", "off")}

    def of_slab(self) -> dict[str, Output]:
        """Where the stage of a slab leaves the rest."""
        return {"farthest": Output(self.farthest.at(), self.farthest)}

    def begin(self) -> list[Node]:
        """Before a block's first slab."""
        return [Barrier("V"), Duplicate(self.farthest.at(), Scalar(0), self.rows)]

    def end(self, f: VectorFunction) -> list[Node]:
        """After its last."""
        traced = bound_stages.ball(self.c.kernel, self.rows)
        farthest = Vector(self.farthest.at(), 1, self.rows)
        inputs = inputs_of(traced.inputs, {**self.values(), "farthest": farthest})
        outputs = {traced.outputs[n]: Output(self.numbers[n].at(0, 1)) for n in ("radius", "reach")}
        stores = [self.store(n, self.numbers[n], "j") for n in ("radius", "reach", "off")]
        return computed(f.lowered(traced.equations, inputs, outputs), stores)

    def store(self, name: str, source: Buffer, j: str) -> RowsOut:
        """Writes a fact of block j."""
        return RowsOut(self.c.globals["facts"].at(fact_at(name, j)), source.at(0, 1), 1, 1, 0)


def values(c: Context, ub: Memory, ramp: Buffer) -> Function:
    """The largest magnitude in the values of each block."""
    f = VectorFunction(ub, "PrepareValues", alone=True, ramp=ramp)
    rows = 64 if c.e <= SUB else 32
    source = f.temporary("valuesIn", c.dtype, rows * c.e, 2)
    top = f.temporary("top", "float", rows * c.e)
    out = f.temporary("topOut", "float", 8)
    traced = bound_stages.largest_values(c.kernel, rows)
    given = {
        "value": Vector(source.slot("slot"), rows, c.e),
        "top": Vector(top.at(), rows, c.e),
    }
    inputs = inputs_of(traced.inputs, given)
    looking = f.lowered(traced.equations, inputs, {traced.outputs["top"]: Output(top.at(), top)})
    found = bound_stages.largest_value(c.kernel, rows)
    inputs = inputs_of(found.inputs, given)
    place = {found.outputs["valueTop"]: Output(out.at(0, 1))}
    finding = f.lowered(found.equations, inputs, place)
    at = f"({_HEAD.replace('kvHeads + kvHead', 'keyLength + first')} * kvHeads + kvHead) * {c.e}"
    loads: list[Node] = [
        Let("first", f"j * {c.n} + slab"),
        Let("valid", f"Max(0, Min({rows}, keys - first))"),
        *padded_load(
            source.slot("slot"),
            c.globals["value"].at(at),
            rows,
            "valid",
            c.e,
            f"(kvHeads - 1) * {c.e}",
        ),
    ]
    slot = Let("slot", f"Mod(Div(slab, {rows}), 2)")
    to = RowsOut(c.globals["facts"].at(fact_at("valueTop", "j")), out.at(0, 1), 1, 1, 0)
    body: list[Node] = [
        *c.key_blocks(),
        Barrier("V"),
        Duplicate(top.at(), Scalar(0), rows * c.e),
        If(
            f"j * {c.n} < keys",
            [For("slab", 0, c.n, [slot, *slab("slot", loads, looking, [])], rows)],
        ),
        *computed(finding, [to]),
    ]
    comment = "The largest magnitude in the values of each block."
    return f.done(comment, spread_units("batch * kvHeads * keyBlocks", body))


def refer(c: Context, memory: VectorMemory) -> Function:
    """The references of all rows of an item, those of the other vector core too, so that both come
    to the same proof.
    """
    f = VectorFunction(memory.ub, "Refer", ("entry", "kvHead", "start", "keys", "lo", "tiles"),
                       ramp=memory.ramp)  # fmt: skip
    rows = c.block_q
    centre = f.temporary("centreIn", "float", LEAST * rows)
    facts = f.temporary("factsIn", "float", len(FACTS) * LEAST)
    norms = f.temporary("normsIn", "float", rows)
    running = {n: f.temporary(n, "float", rows) for n in RUNNING}
    failed = f.temporary("failedOut", "float", 8)
    reference = memory.reference
    assert reference is not None
    values: dict[str, Value] = {
        "centre": Vector(centre.at(), LEAST, rows),
        "length": Vector(norms.at(), 1, rows),
        **{n: Vector(facts.at(i * LEAST, LEAST), LEAST, 1) for i, n in enumerate(FACTS)},
        **{n: Vector(b.at(), 1, rows) for n, b in running.items()},
        **{n: Scalar(n) for n in ("start", "queries", "keys", "base")},
    }
    traced = bound_stages.extremes(c.kernel, rows)
    outputs = {traced.outputs[n]: Output(b.at(), b) for n, b in running.items()}
    adding = f.lowered(traced.equations, inputs_of(traced.inputs, values), outputs)
    traced = bound_stages.settled(c.kernel, rows)
    outputs = {
        traced.outputs["reference"]: Output(reference.slot(f"Mod(itemTurn, {QUERIES})")),
        traced.outputs["failed"]: Output(failed.at(0, 1)),
    }
    settling = f.lowered(traced.equations, inputs_of(traced.inputs, values), outputs)
    item = f"int64_t(core) * {DEPTH} + {slot_of(DEPTH, 'itemTurn')}"
    of_centre = c.globals["offsets"].at(f"(({item}) * {GROUPED} + base) * {rows}")
    of_norms = f"({item}) * {rows}"
    of_facts = c.globals["facts"].at(fact_at("radius", "base"))
    loads: list[Node] = [
        copy(centre.at(), of_centre, LEAST * rows),
        RowsIn(facts.at(), of_facts, len(FACTS), LEAST, f"{GROUPED} - {LEAST}"),
    ]
    proof = f"({proof_at('tileTurn')}) + Div(firstRow, {c.half})"
    body: list[Node] = [
        # What is loaded lies where values of other functions did.
        SetFlag("V", "MTE2", PADDING),
        WaitFlag("V", "MTE2", PADDING),
        *slab(SINGLE, [copy(norms.at(), c.globals["norms"].at(of_norms), rows)], [], []),
        *[Duplicate(running[n].at(), Scalar(float("-inf")), rows) for n in ("m", "least")],
        *[Duplicate(running[n].at(), Scalar(0), rows) for n in ("size", "top")],
        For(
            "base",
            f"Div(lo, {LEAST}) * {LEAST}",
            "lo + tiles",
            slab(SINGLE, loads, adding, []),
            LEAST,
        ),
        *computed(settling, [RowsOut(c.globals["proof"].at(proof), failed.at(0, 1), 1, 1, 0)]),
        SetFlag("MTE3", "S", 0),
        WaitFlag("MTE3", "S", 0),
        Invalidate("proof", "float"),
        Assign("failed", f"Pick(proof.GetValue({proof}) != 0.0f, 1, 0)"),
        SetFlag("S", "MTE3", 0),  # the place is written again later
        WaitFlag("S", "MTE3", 0),
    ]
    return f.done("m of each row, and whether all are proved (eq. 21, 22).", body)


def proof_at(turn: str) -> str:
    """Where the first vector core says whether the item is proved whose first tile is the core's
    ``turn``-th.
    """
    return f"(int64_t(core) * {DEPTH} + {slot_of(DEPTH, turn)}) * {VECTOR_CORES}"


def begin(c: Context, memory: VectorMemory) -> list[Node]:
    """m of a proved item is the reference."""
    reference, m = memory.reference, memory.state["m"]
    assert reference is not None
    source = reference.at(f"Mod(itemTurn, {QUERIES}) * {c.block_q} + firstRow", c.half)
    return [Barrier("V"), copy(m.slot("side"), source, c.half)]


def zeros(c: Context, f: VectorFunction) -> tuple[list[Node], list[Node]]:
    """Zeros in UB, and their copies to the facts of the block ``none``, which is none."""
    buffer = f.temporary("noFacts", "float", 8)
    stores: list[Node] = [
        RowsOut(c.globals["facts"].at(fact_at(n, "none")), buffer.at(0, 1), 1, 1, 0) for n in FACTS
    ]
    return [zero_bits(buffer.at(), 8)], stores
