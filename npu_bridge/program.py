"""The program of a kernel: what the cube core and its two vector cores do, and when.

A core's work is a list of items, one query tile of one head each. For each item the cube core makes
scores ahead of the vector cores, which turn them into probabilities; it then multiplies these with
the values, and the vector cores add the product to the output. What passes between them lies in
global memory (`workspace`), a few tiles deep, and three flags say when it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from npu_bridge import stages
from npu_bridge.ir import (
    C_TYPES,
    ITEMSIZE,
    Advance,
    Alias,
    Barrier,
    Buffer,
    Call,
    Comment,
    CrossSet,
    CrossWait,
    Expr,
    For,
    Function,
    If,
    Instruction,
    Let,
    Node,
    SetFlag,
    Slice,
    SyncAll,
    WaitFlag,
    times,
    walk,
    with_barriers,
)
from npu_bridge.lowering import Lowering, Scalar, Value, Vector
from npu_bridge.memory import Memory, frees_before
from npu_bridge.stages import COLUMNS, Kernel
from pasa_jax.core.errors import PlanError

# Names of numbers in the functions, which values must not take.
_NUMBERS = ("row", "slot", "first", "place", "lane", "slab", "unit", "valid", "keys", "count")
VECTOR_CORES = 2  # of one cube core
CLOSING = 16  # rows whose output is computed at once
LEAST = 16  # rows and columns that the cube unit multiplies at least
SUB = 128  # side of the tiles that the cube unit multiplies
AHEAD = 2  # key tiles by which the scores are ahead of the values
DEPTH = AHEAD + 1  # tiles of each kind in the workspace
LAG = 1  # key tiles by which the output is behind the probabilities
CARRIED = LAG + 1
FLAGS = {
    "SCORES_READY": 0,
    "P_READY": 1,
    "UPDATE_READY": 2,
    "REFERENCE_READY": 3,  # these two of the shift "reference" only
    "SHIFTED_READY": 4,
}
# Event ids of the vector core, per pair of pipes.
SOFTMAX, UPDATE, SINGLE, PADDING = 0, 2, 4, 5


@dataclass
class Core:
    """The program of one kind of core."""

    kind: str  # "AIC" or "AIV"
    memories: dict[str, Memory]
    functions: list[Function] = field(default_factory=list)
    body: list[Node] = field(default_factory=list)
    scratch: dict[str, list[Buffer]] = field(default_factory=dict)  # by function
    counters: tuple[str, ...] = ()

    def add(self, function: Function) -> Function:
        self.functions.append(function)
        return function


@dataclass
class Program:
    """An emitted kernel before it is text."""

    kernel: Kernel
    rows: int
    cube: Core
    vector: Core
    globals: dict[str, Buffer]
    step: stages.Step

    @property
    def flags(self) -> dict[str, int]:
        """The cross-core flags that this kernel uses."""
        few = ("SCORES_READY", "P_READY", "UPDATE_READY")
        return FLAGS if self.step.refer is not None else {name: FLAGS[name] for name in few}


def build(kernel: Kernel) -> Program:
    """The program of a kernel, with the tallest slabs that fit, and with P·V double-buffered if
    that fits too.

    Raises:
      PlanError: no slab fits; the message says which memory, how much and what would fit.
    """
    check(kernel)
    failed: PlanError | None = None
    for slabs in _SLABS:
        try:
            return _Builder(kernel, slabs).program()
        except PlanError as error:
            failed = error
    raise PlanError(f"{failed}. {_nearest(kernel)}")


def check(kernel: Kernel) -> None:
    """Raises where a kernel is not one that can be built, whatever its memories."""
    n, q = kernel.schedule.block_kv, kernel.schedule.block_q
    if q != SUB:
        raise PlanError(f"`schedule.block_q` must be {SUB}, the rows of a cube tile; got {q}")
    if n % SUB:
        raise PlanError(f"`schedule.block_kv` must be a multiple of {SUB}; got {n}")
    for name in ("head_dim", "value_head_dim"):
        size = getattr(kernel, name)
        if size % 64 or not 0 < size <= 256:
            raise PlanError(f"`{name}` must be 64, 128, 192 or 256; got {size}")
    if kernel.precision.probabilities != kernel.dtype:
        raise PlanError(
            "`precision.probabilities` must be the type of the values, since the cube unit "
            f"multiplies equal types; got {kernel.precision.probabilities} and {kernel.dtype}"
        )


def _nearest(kernel: Kernel) -> str:
    from dataclasses import replace

    n = kernel.schedule.block_kv
    for smaller in range(n - SUB, 0, -SUB):
        schedule = replace(kernel.schedule, block_kv=smaller)
        try:
            _Builder(replace(kernel, schedule=schedule), _SLABS[-1]).program()
        except PlanError:
            continue
        return f"block_kv = {smaller} would fit."
    return "No smaller block_kv fits either."


def _first_write(compute: list[Node], stores: list[Node]) -> int:
    """The first node that writes what ``stores`` read."""
    stored = {s.buffer for x in walk(stores) if isinstance(x, Instruction) for s in x.reads}
    for i, node in enumerate(compute):
        for x in walk([node]):
            for s in x.writes if isinstance(x, Instruction) else ():
                if s.buffer in stored or (s.buffer.alias and s.buffer.alias.buffer in stored):
                    return i
    return 0


def aliased(nodes: list[Node]) -> list[Buffer]:
    """The buffers in a body that are names for memory of others, in order."""
    found: dict[Buffer, None] = {}
    for x in walk(nodes):
        if isinstance(x, Instruction):
            found |= {s.buffer: None for s in (*x.writes, *x.reads) if s.buffer.alias is not None}
    return list(found)


def _row(row: str) -> str:
    """Where a row of queries or outputs lies, in rows."""
    return f"int64_t(entry) * queryLength * heads + ({row}) * rowStride + head * headStride"


class Slabs(NamedTuple):
    """How a vector core cuts its rows.

    Arguments:
      rows: of a slab.
      masked: of a slab of a tile that is masked, which takes more memory.
      slots: of the buffer for P·V.
    """

    rows: int
    masked: int
    slots: int


_SLABS = [
    Slabs(rows, masked, slots)
    for rows in (64, 32, 16)
    for masked in (rows, 16, 8)
    for slots in (2, 1)
    if masked <= rows
]


class _Builder:
    def __init__(self, kernel: Kernel, slabs: Slabs) -> None:
        self.k = kernel
        self.rows, self.slots = slabs.rows, slabs.slots
        rows = self.rows
        self.slabs = slabs
        self.half = kernel.schedule.block_q // VECTOR_CORES
        self.n, self.d, self.e = kernel.schedule.block_kv, kernel.head_dim, kernel.value_head_dim
        self.dtype = C_TYPES[kernel.dtype]
        self.item = ITEMSIZE[self.dtype]
        self.full = stages.step(kernel, rows, masked=False)
        self.cut = stages.step(kernel, slabs.masked, masked=True)
        target = kernel.schedule.target
        self.vector = Core("AIV", {"UB": Memory.of(target, "UB")})
        self.cube = Core("AIC", {m: Memory.of(target, m) for m in ("L1", "L0A", "L0B", "L0C")})
        self.globals: dict[str, Buffer] = {}
        self._global_buffers()

    # Global memory.

    def _global_buffers(self) -> None:
        k, types = self.k, {p.name: p.dtype for p in self.full.products.values()}

        def gm(name: str, dtype: str, note: str) -> None:
            self.globals[name] = Buffer(name, "GM", dtype, 0, note=note)

        gm("query", self.dtype, "[B, T, N, D]")
        gm("key", self.dtype, "[B, S, K, D]")
        gm("value", self.dtype, "[B, S, K, E]")
        gm("output", self.dtype, "[B, T, N, E]")
        if k.return_lse:
            gm("lse", "float", "[B, T, N]")
        if k.bias is not None:
            gm("bias", self.dtype, f"[B, N, T, S], axes {k.bias}")
        if k.lengths:
            gm("lengths", "int32_t", "[B] keys of each batch entry")
        if k.shift == "paper":
            gm("matrices", self.dtype, "[2, n, n] M of a full block and of the tail")
            gm("weights", "float", "[2, n] share of each column in the row mean")
        gm("scaledQuery", self.dtype, "[B, N, padded T, D] query rows as they are multiplied")
        if self.shifted:
            gm("shiftedKey", self.dtype, "[B, K, blocks, n, D] K'")
        if k.shift != "mean":  # keys are multiplied as they lie
            gm("keyTail", self.dtype, "[B, K, n, D] the last block, if it is not full")
        gm("valueTail", self.dtype, "[B, K, n, E] the last block, if it is not full")
        if self.lags:
            gm("shifted", types["shifted"], f"[{DEPTH}, block_q, n] per core: S − r")
            gm("minus", self.dtype, f"[{DEPTH}, {LEAST}, block_q] per core: −r in two halves")
        if "offsets" in types:
            gm("kappa", self.dtype, f"[B, K, blocks, {LEAST}, D] κ, rows equal")
            gm("offsets", types["offsets"], f"[{DEPTH}, block_q, {LEAST}] per core: q·κ")
        if "sums" in types:
            gm("ones", self.dtype, f"[{SUB}, {LEAST}] ones")
            gm("sums", types["sums"], f"[{DEPTH}, block_q, {LEAST}] per core: row sums of P")
        if k.decode:
            gm("partO", "float", "[items, block_q, E] O of a part of the keys")
            gm("partM", "float", "[items, block_q] m of it")
            gm("partL", "float", "[items, block_q] l of it")
        gm("scores", types["scores"], f"[{DEPTH}, block_q, n] per core: S'")
        gm("p", self.dtype, f"[{DEPTH}, block_q, n] per core: P")
        gm("update", types["update"], f"[{DEPTH}, block_q, E] per core: P·V")

    @property
    def shifted(self) -> bool:
        return self.k.shift in ("mean", "paper", "reference")

    @property
    def lags(self) -> bool:
        """Whether scores are formed again, minus a row reference that the first ones gave."""
        return self.full.refer is not None

    # The whole.

    def program(self) -> Program:
        self._vector_core()
        self._cube_core()
        for core in (self.vector, self.cube):
            for memory in core.memories.values():
                memory.check(f"a tile of {self.k.schedule.block_q} × {self.n}")
        return Program(self.k, self.rows, self.cube, self.vector, self.globals, self.full)

    def _prologue(self, work: list[Node]) -> list[Node]:
        return [*work, *([Barrier("ALL")] if work else []), SyncAll()]

    def _items(self, body: list[Node]) -> list[Node]:
        """The loop over this core's items, and what each is."""
        bounds, names = stages.key_range(self.k)
        q = self.k.schedule.block_q
        lets: list[Node] = [
            Let("tile", "Mod(item, queryTiles)"),
            Let("head", "Mod(Div(item, queryTiles), heads)"),
            Let("entry", "Mod(Div(item, queryTiles * heads), batch)"),
            Let("kvHead", "Div(head, groups)"),
            Let("start", "0" if self.k.decode else f"tile * {q}"),
            self._keys_of("entry"),
            Comment("The key tiles that these queries see."),
            *bounds,
            *self._part(names["lo"], names["hi"]),
            Let("fullLo", names["full_lo"]),
            Let("fullHi", names["full_hi"]),
        ]
        return [For("item", "core", "items", [*lets, *body], "cores")]

    @staticmethod
    def _part(lo: str, hi: str) -> list[Node]:
        """The key tiles of this item's part of the keys."""
        return [
            Let("part", "Div(item, queryTiles * heads * batch)"),
            Let("lo", f"{lo} + Div(({hi} - {lo}) * part, parts)"),
            Let("tiles", f"{lo} + Div(({hi} - {lo}) * (part + 1), parts) - lo"),
        ]

    def _keys_of(self, entry: str) -> Let:
        if self.k.lengths:
            return Let("keys", f"Max(0, Min(keyLength, lengths.GetValue({entry})))")
        return Let("keys", "keyLength")

    # The vector core.

    def _vector_core(self) -> None:
        ub = self.vector.memories["UB"]
        stat = C_TYPES[str(self.k.numerics.statistics)]
        acc = C_TYPES[self.k.precision.accumulator]
        keep = ub.keep
        self.state = {
            name: keep(name, stat, self.half, note=f"{name} of each row")
            for name in ("m", "l", "f")
        }
        self.state["o"] = keep("o", acc, self.half * self.e, note="O, not normalised")
        for name in self.full.carried:
            self.state[name] = keep(
                name, stat, self.half, CARRIED, "what the output is multiplied by"
            )
        if self.k.shift == "paper":
            keep_weights = keep(
                "shares", "float", self.n, 2, "share of each column in the row mean"
            )
            self.state["weights"] = keep_weights
        r, p = self.rows, self.full.products
        self.rings = {
            "scores": keep("scoresIn", p["key"].dtype, r * self.n, 2, "S' of a slab"),
            "p": keep("pOut", self.dtype, r * self.n, note="P of a slab"),
            "update": keep("updateIn", p["value"].dtype, r * self.e, self.slots, "P·V of a slab"),
        }
        if self.lags:
            self.rings["shifted"] = keep(
                "shiftedIn", p["raw"].dtype, r * self.n, 2, "S − r of a slab"
            )
            self.minus = keep("minusOut", self.dtype, 2 * max(r, LEAST), note="−r in two halves")
        if "kappa" in p:
            self.rings["offsets"] = keep(
                "offsetsIn", p["kappa"].dtype, r * COLUMNS, 2, "q·κ of a slab"
            )
        if "ones" in p:
            self.rings["sums"] = keep(
                "sumsIn", p["ones"].dtype, r * COLUMNS, self.slots, "row sums of P"
            )
        if self.k.bias is not None:
            self.rings["bias"] = keep("biasIn", self.dtype, r * self.n, 2, "bias of a slab")
        self.closing = {"out": keep("outOut", self.dtype, CLOSING * self.e, note="output rows")}
        if self.k.return_lse:
            spread = "log-sum-exp, a block each"
            self.closing["lse"] = keep("lseOut", "float", CLOSING * 8, note=spread)
            self.closing["column"] = keep("lseColumn", "float", CLOSING, note="log-sum-exp")
        self.merging: dict[str, Buffer] = {}
        for name in ("m", "l", "o", "m2", "l2", "o2") if self.k.decode else ():
            size = CLOSING * (self.e if name[0] == "o" else 1)
            note = f"{name[0]} of a part of the keys"
            self.merging[name] = keep(f"part{name.capitalize()}UB", "float", size, note=note)
        self.vector.counters = ("softmaxTurn", "updateTurn", "tileTurn")

        self._first = True  # what comes before the main loop may use all of the memory
        queries = self._prepare_queries()
        prologue: list[Node] = [Call(queries, ())]
        if "kappa" in p:
            prologue.append(Call(self._prepare_keys(), ()))
        if self.lags:
            prologue.append(Call(self._prepare_minus(), ()))
        if "ones" in p:
            prologue.append(Call(self._prepare_ones(), ()))
        prologue += [Barrier("ALL"), Call(self._prepare_tails(), ())]
        if self.k.shift == "paper":
            prologue += [Barrier("ALL"), SyncAll()]
        self._first = False
        full = self._softmax("Softmax", self.full, self.rows)
        cut = self._softmax("SoftmaxMasked", self.cut, self.slabs.masked)
        update = self._accumulate()
        begin, close = self._begin(), self._close()
        arguments = ("entry", "head", "start", "keys", "lo + t", "t")
        unmasked = "lo + t >= fullLo" if self.k.masked else "1"
        softmax = If(
            f"({unmasked}) & (lo + t < fullHi)", [Call(full, arguments)], [Call(cut, arguments)]
        )
        loop = For(
            "t",
            0,
            f"tiles + {LAG}",
            [
                If(
                    "t < tiles",
                    [
                        CrossWait("MTE2", FLAGS["SCORES_READY"], "SCORES_READY"),
                        *self._referring(arguments, unmasked),
                        softmax,
                        CrossSet("MTE3", FLAGS["P_READY"], "P_READY"),
                    ],
                ),
                If(
                    f"t >= {LAG}",
                    [
                        CrossWait("MTE2", FLAGS["UPDATE_READY"], "UPDATE_READY"),
                        Call(update, (f"t - {LAG}",)),
                    ],
                ),
            ],
        )
        end = Call(close, ("entry", "head", "start"))
        merged: list[Node] = []
        if self.k.decode:
            end = Call(self._store_state(), ("item",))
            merged = [Barrier("ALL"), SyncAll(), Call(self._merge(close), ())]
        items = self._items([Call(begin, ()), loop, end, Advance("tileTurn", "tiles")])
        ids = [SOFTMAX, SOFTMAX + 1, UPDATE, UPDATE + 1, SINGLE]
        self.vector.body = [
            *[SetFlag("V", "MTE2", i) for i in ids],
            *[SetFlag("MTE3", "V", i) for i in ids],
            SetFlag("MTE3", "MTE2", 0),
            *self._prologue(prologue),
            *self._load_weights(),
            *items,
            *merged,
            *[WaitFlag("V", "MTE2", i) for i in ids],
            *[WaitFlag("MTE3", "V", i) for i in ids],
            WaitFlag("MTE3", "MTE2", 0),
        ]

    def _load_weights(self) -> list[Node]:
        if self.k.shift != "paper":
            return []
        shares, weights = self.state["weights"], self.globals["weights"]
        size = 2 * self.n
        return [
            Instruction(
                f"DataCopy({shares.name}, {weights.name}, {size})",
                "MTE2",
                (shares.at(0, size),),
                (weights.at(0, size),),
                size * 4,
            ),
            Barrier("ALL"),
        ]

    def _lowered(
        self,
        equations: list[Any],
        inputs: dict[Any, Value],
        rows: int,
        outputs: dict[Any, tuple[Slice, Buffer | None]],
        names: dict[Any, str] | None = None,
        spare: Sequence[Slice] = (),
    ) -> list[Node]:
        """The vector instructions of a stage, placed.

        Arguments:
          spare: what it was given and may overwrite.
          outputs: variable -> where it must be left, and the buffer of the old value that stands
            there, if one does.
        """
        ub = self.vector.memories["UB"]

        def allocate(name: str, dtype: str, count: int) -> Buffer:
            self._named[name] = self._named.get(name, 0) + 1
            number = self._named[name]
            return Buffer(f"{name}_{number}" if number > 1 else name, "UB", dtype, count)

        low = Lowering(rows, allocate, inputs, names=names)
        low.lower(equations)
        late: list[tuple[Vector, Slice]] = []
        for var, (to, old) in outputs.items():
            value = low.value(var)
            assert isinstance(value, Vector), value
            mine = value.place.buffer
            own = mine.address is None and mine.alias is None and value.place.offset == 0
            if (
                own
                and mine.count == value.size
                and (old is None or frees_before(low.body, old, mine))
            ):
                mine.alias = Slice(to.buffer, to.offset, value.size)
            else:
                late.append((value, to))
        for value, to in late:
            low.copied(value, to)
        placed = ub.place(low.body, 0 if self._first else ub.kept, spare)
        for b in placed:
            if b.address is not None and b.address + b.bytes > self._far:
                left = max(0, self._far - b.address)
                raise PlanError(f"{b.name} wants {b.bytes} bytes of UB; there are {left} left")
        self._scratch += placed
        aliases = [Alias(b) for b in aliased(low.body)]
        # One slab's values lie where those of the one before did.
        return [*aliases, Barrier("V"), *with_barriers(low.body)]

    def _slab(
        self,
        ids: Expr,
        loads: list[Node],
        compute: list[Node],
        stores: list[Node],
        out: Expr = SINGLE,
    ) -> list[Node]:
        """Load, compute, store, each on its pipe; ``ids`` and ``out`` are the events of the slots
        that are loaded and stored.
        """
        nodes: list[Node] = [
            WaitFlag("V", "MTE2", ids),
            *loads,
            SetFlag("MTE2", "V", ids),
            WaitFlag("MTE2", "V", ids),
        ]
        if not stores:
            return [*nodes, *compute, SetFlag("V", "MTE2", ids)]
        at = _first_write(compute, stores)  # what is stored may still be on its way out until then
        nodes += [*compute[:at], WaitFlag("MTE3", "V", out), *compute[at:]]
        nodes += [SetFlag("V", "MTE2", ids), SetFlag("V", "MTE3", out), WaitFlag("V", "MTE3", out)]
        return [*nodes, *stores, SetFlag("MTE3", "V", out)]

    def _rows_in(self, to: Slice, source: Slice, rows: Expr, width: int, gap: Expr) -> Instruction:
        """Loads ``rows`` rows of ``width`` numbers that lie ``gap`` numbers apart in memory."""
        item = ITEMSIZE[to.buffer.dtype]
        size = width * item
        return Instruction(
            f"DataCopyPad({to}, {source}, DataCopyExtParams{{static_cast<uint16_t>({rows}), "
            f"{size}, static_cast<uint32_t>(({gap}) * {item}), 0, 0}}, "
            f"DataCopyPadExtParams<{to.buffer.dtype}>())",
            "MTE2",
            (to,),
            (source,),
            times(rows, size),
        )

    def _rows_out(self, to: Slice, source: Slice, rows: Expr, width: int, gap: Expr) -> Instruction:
        item = ITEMSIZE[source.buffer.dtype]
        size = width * item
        return Instruction(
            f"DataCopyPad({to}, {source}, DataCopyExtParams{{static_cast<uint16_t>({rows}), "
            f"{size}, 0, static_cast<uint32_t>(({gap}) * {item}), 0}})",
            "MTE3",
            (to,),
            (source,),
            times(rows, size),
        )

    def _copy(self, to: Slice, source: Slice, count: int, pipe: str) -> Instruction:
        dtype = (to if pipe == "MTE2" else source).buffer.dtype
        return Instruction(
            f"DataCopy({to}, {source}, {count})",
            pipe,
            (Slice(to.buffer, to.offset, count),),
            (Slice(source.buffer, source.offset, count),),
            count * ITEMSIZE[dtype],
        )

    def _first_columns(self, to: Slice, source: Slice, rows: int) -> Instruction:
        """Loads one block of each row of a float32 array of `LEAST` columns."""
        return Instruction(
            f"DataCopy({to}, {source}, DataCopyParams{{{rows}, 1, {LEAST // COLUMNS - 1}, 0}})",
            "MTE2",
            (Slice(to.buffer, to.offset, rows * COLUMNS),),
            (Slice(source.buffer, source.offset, rows * LEAST),),
            rows * 64,  # the least that is fetched
        )

    def _padded_load(
        self, to: Buffer, source: Slice, rows: int, valid: str, width: int, gap: Expr
    ) -> list[Node]:
        """Loads ``valid`` of ``rows`` rows, and zeros for the others."""
        whole = to.at(0, rows * width)
        zero = Instruction(
            f"Duplicate({to.name}.ReinterpretCast<half>(), half(0.0f), {rows * width})",
            "V",
            (whole,),
            (),
            rows * width * 2,
        )
        clear: list[Node] = [
            SetFlag("MTE2", "V", PADDING),
            WaitFlag("MTE2", "V", PADDING),
            zero,
            SetFlag("V", "MTE2", PADDING),
            WaitFlag("V", "MTE2", PADDING),
        ]
        load = self._rows_in(Slice(to, 0, whole.count), source, valid, width, gap)
        return [If(f"{valid} < {rows}", clear), If(f"{valid} > 0", [load])]

    def _function(
        self, core: Core, name: str, parameters: tuple[str, ...], comment: str,
        body: Callable[[], list[Node]],
    ) -> Function:  # fmt: skip
        self._scratch: list[Buffer] = []
        # How often the function has used a name.
        self._named = dict.fromkeys((*parameters, *_NUMBERS), 1)
        self._far = self.vector.memories["UB"].capacity // 32 * 32
        nodes = body()
        found = core.add(Function(name, parameters, nodes, comment))
        core.scratch[name] = self._scratch
        return found

    def _spread_units(self, units: str, body: list[Node]) -> list[Node]:
        """Units of work dealt out over all vector cores."""
        return [For("unit", "vectorCore", units, body, "vectorCores")]

    def _prepare_queries(self) -> Function:
        rows = min(64, self.half)
        traced = stages.queries(self.k, rows)

        def body() -> list[Node]:
            source = self._temporary("rowsIn", self.dtype, rows * self.d)
            to = self._temporary("rowsOut", self.dtype, rows * self.d)
            inputs: dict[Any, Value] = {
                traced.inputs["query"]: Vector(source.at(), rows, self.d),
                traced.inputs["scale"]: Scalar("scale"),
            }
            output = traced.outputs["scaled"]
            at = f"({_row('row')}) * {self.d}"
            gap = f"(rowStride - 1) * {self.d}"
            loads = self._padded_load(
                source, self.globals["query"].at(at), rows, "valid", self.d, gap
            )
            scaled = self.globals["scaledQuery"].at(f"int64_t(unit) * {rows * self.d}")
            if output is traced.inputs["query"]:  # nothing to compute: the rows are only gathered
                compute: list[Node] = [Barrier("V"), *self._moved(source, to, rows * self.d)]
            else:
                compute = self._lowered(traced.equations, inputs, rows, {output: (to.at(), None)})
            lets: list[Node] = [
                Let("slabs", f"queryTiles * {self.k.schedule.block_q // rows}"),
                Let("row", f"Mod(unit, slabs) * {rows}"),
                Let("head", "Mod(Div(unit, slabs), heads)"),
                Let("entry", "Div(unit, slabs * heads)"),
                Let("valid", f"Max(0, Min({rows}, queryLength - row))"),
            ]
            stores: list[Node] = [self._copy(scaled, to.at(), rows * self.d, "MTE3")]
            units = f"batch * heads * queryTiles * {self.k.schedule.block_q // rows}"
            return self._spread_units(units, [*lets, *self._slab(SINGLE, loads, compute, stores)])

        comment = "Query rows, scaled and rounded as they are multiplied (eq. 12); zeros beyond T."
        return self._function(self.vector, "PrepareQueries", (), comment, body)

    def _moved(self, source: Buffer, to: Buffer, count: int) -> list[Node]:
        """A copy in UB, bit by bit."""
        return [
            Instruction(
                f"DataCopy({to.name}, {source.name}, {count})",
                "V",
                (to.at(0, count),),
                (source.at(0, count),),
                count * 2,
            )
        ]

    def _temporary(self, name: str, dtype: str, count: int) -> Buffer:
        """A buffer of one function, at the far end of the memory: values are placed from below."""
        buffer = Buffer(name, "UB", dtype, count)
        self._far -= buffer.bytes
        buffer.address = self._far
        self._scratch.append(buffer)
        return buffer

    def _prepare_keys(self) -> Function:
        rows = 64
        total_of = stages.key_total(self.k, rows)
        kappa_of = stages.kappa(self.k)
        shift = stages.shifted_keys(self.k, rows)

        def body() -> list[Node]:
            source = self._temporary("keysIn", self.dtype, rows * self.d)
            to = self._temporary("keysOut", self.dtype, rows * self.d)
            total = self._temporary("total", "float", self.d)
            kappa = self._temporary("kappaOut", self.dtype, self.d)
            key = Vector(source.at(), rows, self.d)
            sum_ = Vector(total.at(), 1, self.d)
            at = f"((int64_t(entry) * keyLength + first) * kvHeads + kvHead) * {self.d}"
            gap = f"(kvHeads - 1) * {self.d}"
            loads: list[Node] = [
                Let("first", f"j * {self.n} + slab"),
                Let("valid", f"Max(0, Min({rows}, keys - first))"),
                *self._padded_load(source, self.globals["key"].at(at), rows, "valid", self.d, gap),
            ]
            t = total_of.inputs
            adding = self._lowered(
                total_of.equations,
                {t["key"]: key, t["total"]: sum_},
                rows,
                {total_of.outputs["total"]: (total.at(), total)},
            )
            t = kappa_of.inputs
            finding = self._lowered(
                kappa_of.equations,
                {t["total"]: sum_, t["count"]: Scalar("count")},
                1,
                {kappa_of.outputs["kappa"]: (kappa.at(), None)},
            )
            t = shift.inputs
            shifting = self._lowered(
                shift.equations,
                {t["key"]: key, t["kappa"]: Vector(kappa.at(), 1, self.d)},
                rows,
                {shift.outputs["shifted"]: (to.at(), None)},
            )
            zero = Instruction(
                f"Duplicate(total, 0.0f, {self.d})", "V", (total.at(),), (), self.d * 4
            )
            copies = For(
                "row",
                0,
                LEAST,
                [
                    self._copy(
                        self.globals["kappa"].at(f"(int64_t(unit) * {LEAST} + row) * {self.d}"),
                        kappa.at(),
                        self.d,
                        "MTE3",
                    )
                ],
            )
            shifted = self.globals["shiftedKey"].at(f"(int64_t(unit) * {self.n} + slab) * {self.d}")
            stores: list[Node] = [self._copy(shifted, to.at(), rows * self.d, "MTE3")]
            work: list[Node] = [
                Barrier("V"),
                zero,
                For("slab", 0, self.n, self._slab(SINGLE, loads, adding, []), rows),
                WaitFlag("MTE3", "V", SINGLE),
                *finding,
                SetFlag("V", "MTE3", SINGLE),
                WaitFlag("V", "MTE3", SINGLE),
                copies,
                SetFlag("MTE3", "V", SINGLE),
                For("slab", 0, self.n, self._slab(SINGLE, loads, shifting, stores), rows),
            ]
            lets: list[Node] = [
                Let("j", "Mod(unit, keyBlocks)"),
                Let("kvHead", "Mod(Div(unit, keyBlocks), kvHeads)"),
                Let("entry", "Div(unit, keyBlocks * kvHeads)"),
                self._keys_of("entry"),
                Let("count", f"Min({self.n}, keys - j * {self.n})"),
            ]
            return self._spread_units("batch * kvHeads * keyBlocks", [*lets, If("count > 0", work)])

        comment = "κ of each key block, and the keys without it (eq. 7)."
        return self._function(self.vector, "PrepareKeys", (), comment, body)

    def _prepare_tails(self) -> Function:
        rows = 64

        def tail(source: str, to: str, width: int, buffer: Buffer) -> list[Node]:
            at = f"((int64_t(entry) * keyLength + first) * kvHeads + kvHead) * {width}"
            loads = self._padded_load(
                buffer,
                self.globals[source].at(at),
                rows,
                "valid",
                width,
                f"(kvHeads - 1) * {width}",
            )
            place = self.globals[to].at(f"(int64_t(unit) * {self.n} + slab) * {width}")
            return [
                WaitFlag("MTE3", "MTE2", 0),
                *loads,
                SetFlag("MTE2", "MTE3", 0),
                WaitFlag("MTE2", "MTE3", 0),
                self._copy(place, buffer.at(), rows * width, "MTE3"),
                SetFlag("MTE3", "MTE2", 0),
            ]

        def body() -> list[Node]:
            wide = max(self.d, self.e) if "keyTail" in self.globals else self.e
            buffer = self._temporary("rowsIn", self.dtype, rows * wide)
            copies = tail("value", "valueTail", self.e, buffer)
            if "keyTail" in self.globals:
                copies += tail("key", "keyTail", self.d, buffer)
            slab: list[Node] = [
                Let("first", f"Div(keys, {self.n}) * {self.n} + slab"),
                Let("valid", f"Max(0, Min({rows}, keys - first))"),
                *copies,
            ]
            return self._spread_units(
                "batch * kvHeads",
                [
                    Let("kvHead", "Mod(unit, kvHeads)"),
                    Let("entry", "Div(unit, kvHeads)"),
                    self._keys_of("entry"),
                    If(f"Mod(keys, {self.n}) > 0", [For("slab", 0, self.n, slab, rows)]),
                ],
            )

        comment = "The last block of each head if it is not full, followed by zeros."
        return self._function(self.vector, "PrepareTails", (), comment, body)

    def _prepare_ones(self) -> Function:
        def body() -> list[Node]:
            size = SUB * LEAST
            ones = self._temporary("onesOut", self.dtype, size)
            bits = {"half": "0x3c00", "bfloat16_t": "0x3f80"}[self.dtype]
            fill = Instruction(
                f"Duplicate(onesOut.ReinterpretCast<uint16_t>(), uint16_t({bits}), {size})",
                "V",
                (ones.at(),),
                (),
                size * self.item,
            )
            store = self._copy(self.globals["ones"].at(0), ones.at(), size, "MTE3")
            to = [SetFlag("V", "MTE3", SINGLE), WaitFlag("V", "MTE3", SINGLE)]
            done = SetFlag("MTE3", "V", SINGLE)
            return [If("vectorCore == 0", [WaitFlag("MTE3", "V", SINGLE), fill, *to, store, done])]

        comment = "Ones, by which the cube unit multiplies P to add it up."
        return self._function(self.vector, "PrepareOnes", (), comment, body)

    def _prepare_minus(self) -> Function:
        rows = 2 * self.half

        def body() -> list[Node]:
            size = DEPTH * LEAST * rows
            zeros = self._temporary("zerosOut", self.dtype, size)
            fill = Instruction(
                f"Duplicate(zerosOut.ReinterpretCast<half>(), half(0.0f), {size})",
                "V",
                (zeros.at(),),
                (),
                size * self.item,
            )
            to = self.globals["minus"].at(f"int64_t(core) * {size}")
            nodes: list[Node] = [
                WaitFlag("MTE3", "V", SINGLE),
                fill,
                SetFlag("V", "MTE3", SINGLE),
                WaitFlag("V", "MTE3", SINGLE),
                self._copy(to, zeros.at(), size, "MTE3"),
                SetFlag("MTE3", "V", SINGLE),
            ]
            return [If("(firstRow == 0) & (core < cores)", nodes)]

        comment = "Zeros where the halves of r are two of as many rows as the cube unit multiplies."
        return self._function(self.vector, "PrepareMinus", (), comment, body)

    def _referring(self, arguments: tuple[str, ...], unmasked: str) -> list[Node]:
        """Finds r of a tile, and waits for the scores without it."""
        if not self.lags:
            return []
        assert self.full.refer is not None
        assert self.cut.refer is not None
        full = self._refer("Refer", self.full.refer, self.rows)
        cut = self._refer("ReferMasked", self.cut.refer, self.slabs.masked)
        condition = f"({unmasked}) & (lo + t < fullHi)"
        return [
            If(condition, [Call(full, arguments)], [Call(cut, arguments)]),
            CrossSet("MTE3", FLAGS["REFERENCE_READY"], "REFERENCE_READY"),
            CrossWait("MTE2", FLAGS["SHIFTED_READY"], "SHIFTED_READY"),
        ]

    def _refer(self, name: str, stage: stages.Stage, r: int) -> Function:
        rows = 2 * self.half

        def body() -> list[Node]:
            inputs = {var: self._stage_input(given, r) for given, var in stage.inputs.items()}
            outputs: dict[Any, tuple[Slice, Buffer | None]] = {}
            for out, var in stage.outputs.items():
                if out in ("high", "low"):
                    outputs[var] = (self.minus.at(r if out == "low" else 0, r), None)
                else:
                    outputs[var] = (self._carried(out, r), None)
            names = {var: f"new_{out}" for out, var in stage.outputs.items()}
            compute = self._lowered(stage.equations, inputs, r, outputs, names)
            both = self.minus.at(0, 2 * r)
            compute += [
                Barrier("V"),
                Instruction(
                    f"Muls(minusOut, minusOut, {self.dtype}(-1.0f), {2 * r})",
                    "V",
                    (both,),
                    (both,),
                    2 * r * self.item,
                ),
            ]
            loads = self._stage_loads(stage, r)
            place = f"(int64_t(core) * {DEPTH} + {self._slot_of(DEPTH, 't')}) * {LEAST * rows}"
            to = self.globals["minus"].at(f"{place} + firstRow + row")
            stores: list[Node] = [self._rows_out(to, both, 2, r, f"{rows - r}")]
            slab = self._slab("slot", loads, compute, stores, SINGLE)
            return [
                For("row", 0, self.half, [*self._slab_lets(), *slab, Advance("softmaxTurn")], r)
            ]

        cut = "with" if name != "Refer" else "without"
        comment = (
            f"r, the running maximum, or the block's if there is none (eq. 11), {cut} the mask."
        )
        parameters = ("entry", "head", "start", "keys", "j", "t")
        return self._function(self.vector, name, parameters, comment, body)

    def _carried(self, name: str, r: int) -> Slice:
        """Where a column that is carried lies, for the tile t."""
        place = f"{self._slot_of(CARRIED, 't')} * {self.half} + row"
        return self.state[name].at(place, r)

    def _slab_lets(self) -> list[Node]:
        """Names of what a slab of S' is."""
        return [
            Let("slot", "Mod(softmaxTurn, 2)"),
            Let("first", "start + firstRow + row"),
            self._slab_place(),
        ]

    def _slab_place(self) -> Let:
        """Which row of the workspace the slab's first is."""
        at = f"int64_t(core) * {DEPTH * 2 * self.half} + " + (
            f"{self._slot_of(DEPTH, 't')} * {2 * self.half} + firstRow + row"
        )
        return Let("place", at, "int64_t")

    def _stage_loads(self, stage: stages.Stage, r: int) -> list[Node]:
        """Loads what a stage reads of scores, offsets and bias."""
        loads: list[Node] = []
        for name in ("scores", "shifted"):
            if name in stage.inputs:
                to, source = self._ring_slot(name), self.globals[name].at(f"place * {self.n}")
                loads.append(self._copy(to, source, r * self.n, "MTE2"))
        if "offsets" in stage.inputs:
            source = self.globals["offsets"].at(f"place * {LEAST}")
            loads.append(self._first_columns(self._ring_slot("offsets"), source, r))
        if "bias" in stage.inputs:
            loads += self._bias_load(r)
        return loads

    def _begin(self) -> Function:
        def body() -> list[Node]:
            lowest = {"float": "-3.4028234663852886e+38f", "half": "half(-65504.0f)"}
            nodes: list[Node] = [Barrier("V")]
            for name in ("m", "l", "f", "o"):
                b = self.state[name]
                value = lowest[b.dtype] if name == "m" else f"{b.dtype}(0.0f)"
                nodes.append(
                    Instruction(
                        f"Duplicate({b.name}, {value}, {b.count})",
                        "V",
                        (b.at(),),
                        (),
                        b.count * ITEMSIZE[b.dtype],
                    )
                )
            return nodes

        comment = "The state before any key (eq. 10)."
        return self._function(self.vector, "Begin", (), comment, body)

    def _slot_of(self, depth: int, t: str) -> str:
        """The slot of the workspace, or of what is carried, for tile ``t`` of this item."""
        return f"Mod(tileTurn + {t}, {depth})"

    def _softmax(self, name: str, step: stages.Step, r: int) -> Function:
        stage = step.softmax

        def body() -> list[Node]:
            inputs = {var: self._stage_input(given, r) for given, var in stage.inputs.items()}
            outputs: dict[Any, tuple[Slice, Buffer | None]] = {}
            for out, var in stage.outputs.items():
                if out == "p":
                    outputs[var] = (self.rings["p"].at(0, r * self.n), None)
                elif out in step.carried:
                    outputs[var] = (self._carried(out, r), None)
                else:
                    outputs[var] = (self.state[out].at("row", r), self.state[out])
            names = {var: f"new_{out}" for out, var in stage.outputs.items()}
            read = self._ring_slot("shifted" if self.lags else "scores")
            spare = [Slice(read.buffer, read.offset, r * self.n)]
            compute = self._lowered(stage.equations, inputs, r, outputs, names, spare)
            stores: list[Node] = [
                self._copy(
                    self.globals["p"].at(f"place * {self.n}"),
                    self.rings["p"].at(),
                    r * self.n,
                    "MTE3",
                )
            ]
            slab = self._slab("slot", self._stage_loads(stage, r), compute, stores, SOFTMAX)
            return [
                For("row", 0, self.half, [*self._slab_lets(), *slab, Advance("softmaxTurn")], r)
            ]

        cut = "with" if name != "Softmax" else "without"
        comment = f"From S' to P, and the row statistics (eq. 9, 10), {cut} the mask."
        parameters = ("entry", "head", "start", "keys", "j", "t")
        return self._function(self.vector, name, parameters, comment, body)

    def _ring_slot(self, name: str) -> Slice:
        return self.rings[name].slot("slot")

    def _stage_input(self, given: str, r: int) -> Value:
        if given in self.rings:
            width = {"offsets": COLUMNS, "update": self.e, "sums": COLUMNS}.get(given, self.n)
            s = self._ring_slot(given)
            return Vector(Slice(s.buffer, s.offset, r * width), r, width)
        if given == "o":
            return Vector(self.state["o"].at(f"row * {self.e}", r * self.e), r, self.e)
        if given == "weights":
            # The second row of shares is the tail's.
            place = f"Pick(j == Div(keys, {self.n}), {self.n}, 0)"
            return Vector(self.state["weights"].at(place, self.n), self.n, 1)
        if given in self.full.carried:
            return Vector(self._carried(given, r), r, 1)
        if given in self.state:
            return Vector(self.state[given].at("row", r), r, 1)
        if given == "start":  # all rows of a decoding tile are one position
            return Scalar(0 if self.k.decode else "first")
        return Scalar(given)

    def _bias_load(self, r: int) -> list[Node]:
        """A slab of the bias; what lies beyond its end is zero, and masked."""
        axes = self.k.bias or ""
        assert axes[2:] == "TS", axes
        b, n = ("entry" if axes[0] == "B" else "0"), ("head" if axes[1] == "N" else "0")
        heads = "heads" if axes[1] == "N" else "1"
        at = f"((int64_t({b}) * {heads} + {n}) * queryLength + first) * keyLength + j * {self.n}"
        ring = self.rings["bias"]
        to, source = ring.slot("slot"), self.globals["bias"].at(at)
        size = r * self.n
        clear: list[Node] = [
            SetFlag("MTE2", "V", PADDING),
            WaitFlag("MTE2", "V", PADDING),
            Instruction(
                f"Duplicate({to}, {ring.dtype}(0.0f), {size})", "V", (to,), (), size * self.item
            ),
            SetFlag("V", "MTE2", PADDING),
            WaitFlag("V", "MTE2", PADDING),
        ]
        load = Instruction(
            f"DataCopyPad({to}, {source}, DataCopyExtParams{{static_cast<uint16_t>(seenRows), "
            f"static_cast<uint32_t>(seenKeys * {self.item}), "
            f"static_cast<uint32_t>((keyLength - seenKeys) * {self.item}), "
            f"static_cast<uint32_t>({self.n * self.item // 32} - "
            f"CeilDiv(seenKeys * {self.item}, 32)), 0}}, DataCopyPadExtParams<{ring.dtype}>())",
            "MTE2",
            (to,),
            (source,),
            f"seenRows * seenKeys * {self.item}",
        )
        return [
            Let("seenRows", f"Max(0, Min({r}, queryLength - first))"),
            Let("seenKeys", f"Min({self.n}, keyLength - j * {self.n})"),
            If(f"(seenRows < {r}) | (seenKeys < {self.n})", clear),
            If("seenRows > 0", [load]),
        ]

    def _accumulate(self) -> Function:
        stage, r = self.full.accumulate, self.rows

        def body() -> list[Node]:
            inputs = {var: self._stage_input(name, r) for name, var in stage.inputs.items()}
            outputs: dict[Any, tuple[Slice, Buffer | None]] = {}
            for name, var in stage.outputs.items():
                width = self.e if name == "o" else 1
                to = self.state[name].at(times("row", width), r * width)
                outputs[var] = (to, self.state[name])
            names = {var: f"new_{name}" for name, var in stage.outputs.items()}
            compute = self._lowered(stage.equations, inputs, r, outputs, names)
            loads: list[Node] = [
                self._copy(
                    self.rings["update"].slot("slot"),
                    self.globals["update"].at(f"place * {self.e}"),
                    r * self.e,
                    "MTE2",
                )
            ]
            if "sums" in self.rings:
                loads.append(
                    self._first_columns(
                        self.rings["sums"].slot("slot"),
                        self.globals["sums"].at(f"place * {LEAST}"),
                        r,
                    )
                )
            lets: list[Node] = [
                Let("slot", f"Mod(updateTurn, {self.slots})"),
                self._slab_place(),
            ]
            slab = self._slab(f"{UPDATE} + slot", loads, compute, [])
            return [For("row", 0, self.half, [*lets, *slab, Advance("updateTurn")], r)]

        comment = "Rescales O and adds P·V of a tile (eq. 10)."
        return self._function(self.vector, "Accumulate", ("t",), comment, body)

    def _slab_state(self, row: Expr) -> dict[str, Value]:
        """The state of `CLOSING` rows from ``row`` on."""
        r = CLOSING
        found: dict[str, Value] = {
            name: Vector(self.state[name].at(row, r), r, 1) for name in ("m", "l", "f")
        }
        found["o"] = Vector(self.state["o"].at(times(row, self.e), r * self.e), r, self.e)
        return found

    def _settled(self, which: str) -> dict[str, Value]:
        """One of the two states that are merged."""
        r = CLOSING
        found: dict[str, Value] = {
            name: Vector(self.merging[name + which].at(), r, 1) for name in ("m", "l")
        }
        found["o"] = Vector(self.merging["o" + which].at(), r, self.e)
        return found

    def _part_copies(self, row: str, which: str, pipe: str) -> list[Node]:
        """Copies of m, l and o between a merging buffer and rows of the workspace."""
        r, found = CLOSING, []
        for name, width in (("m", 1), ("l", 1), ("o", self.e)):
            local = self.merging[name + which].at()
            place = self.globals[f"part{name.upper()}"].at(f"({row}) * {width}")
            pair = (local, place) if pipe == "MTE2" else (place, local)
            found.append(self._copy(*pair, r * width, pipe))
        return found

    def _store_state(self) -> Function:
        r = CLOSING
        traced = stages.settle(self.k, r)

        def body() -> list[Node]:
            inputs = {traced.inputs[n]: x for n, x in self._slab_state("row").items()}
            outputs: dict[Any, tuple[Slice, Buffer | None]] = {
                traced.outputs[name]: (self.merging[name].at(), None) for name in ("m", "l", "o")
            }
            compute = self._lowered(traced.equations, inputs, r, outputs)
            row = f"int64_t(item) * {2 * self.half} + firstRow + row"
            slab: list[Node] = [
                WaitFlag("MTE3", "V", SINGLE),
                *compute,
                SetFlag("V", "MTE3", SINGLE),
                WaitFlag("V", "MTE3", SINGLE),
                *self._part_copies(row, "", "MTE3"),
                SetFlag("MTE3", "V", SINGLE),
            ]
            return [For("row", 0, self.half, slab, r)]

        comment = "Keeps m, l and O of a part of the keys, to be merged."
        return self._function(self.vector, "StoreState", ("item",), comment, body)

    def _merge(self, close: Function) -> Function:
        r = CLOSING
        traced = stages.merge(self.k, r)

        def body() -> list[Node]:
            given = self._settled("") | {f"{n}2": x for n, x in self._settled("2").items()}
            inputs = {traced.inputs[n]: x for n, x in given.items()}
            outputs: dict[Any, tuple[Slice, Buffer | None]] = {}
            for name in ("m", "l", "o"):
                old = self.merging[name]
                outputs[traced.outputs[name]] = (old.at(), old)
            compute = self._lowered(traced.equations, inputs, r, outputs)
            row = f"int64_t(unit) * {2 * self.half} + row"
            first = self._slab(SINGLE, self._part_copies(row, "", "MTE2"), [], [])
            other = f"(int64_t(part) * batch * heads + unit) * {2 * self.half} + row"
            more = self._slab(SINGLE, self._part_copies(other, "2", "MTE2"), compute, [])
            slab: list[Node] = [
                *first,
                For("part", 1, "parts", more),
                Call(close, ("entry", "head", "row")),
                # The next slab is loaded where this one was computed.
                SetFlag("V", "MTE2", PADDING),
                WaitFlag("V", "MTE2", PADDING),
            ]
            return self._spread_units(
                "batch * heads",
                [
                    Let("head", "Mod(unit, heads)"),
                    Let("entry", "Div(unit, heads)"),
                    For("row", 0, "queryLength", slab, r),
                ],
            )

        comment = "The states of all parts of the keys in one (eq. 13)."
        return self._function(self.vector, "Merge", (), comment, body)

    def _close(self) -> Function:
        r = CLOSING
        traced = stages.close(self.k, r)

        def body() -> list[Node]:
            if self.k.decode:
                given = self._settled("") | {"f": Scalar(0.0)}  # which settling has put into m
            else:
                given = self._slab_state("row")
            inputs: dict[Any, Value] = {v: given[n] for n, v in traced.inputs.items()}
            out = self.closing["out"]
            outputs: dict[Any, tuple[Slice, Buffer | None]] = {
                traced.outputs["out"]: (out.at(), None)
            }
            stores: list[Node] = [
                self._rows_out(
                    self.globals["output"].at(f"({_row('first')}) * {self.e}"),
                    out.at(),
                    "valid",
                    self.e,
                    f"(rowStride - 1) * {self.e}",
                )
            ]
            if self.k.return_lse:
                outputs[traced.outputs["lse"]] = (self.closing["column"].at(), None)
            compute = self._lowered(traced.equations, inputs, r, outputs)
            if self.k.return_lse:
                lse, column = self.closing["lse"], self.closing["column"]
                spread = f"Brcb({lse.name}, {column.name}, {r // 8}, {{1, 8}})"
                compute += [
                    Barrier("V"),
                    Instruction(spread, "V", (lse.at(),), (column.at(),), r * 32),
                ]
                stores.append(
                    self._rows_out(
                        self.globals["lse"].at(_row("first")), lse.at(), "valid", 1, "rowStride - 1"
                    )
                )
            lets: list[Node] = [
                Let("first", "start" if self.k.decode else "start + firstRow + row"),
                Let("valid", f"Max(0, Min({r}, queryLength - first))"),
            ]
            slab: list[Node] = [
                WaitFlag("MTE3", "V", SINGLE),
                *compute,
                SetFlag("V", "MTE3", SINGLE),
                WaitFlag("V", "MTE3", SINGLE),
                If("valid > 0", stores),
                SetFlag("MTE3", "V", SINGLE),
            ]
            if self.k.decode:  # one slab, which `Merge` has made
                return [*lets, *slab]
            return [For("row", 0, self.half, [*lets, *slab], r)]

        comment = "O/l, rounded to the output's type (eq. 14)."
        return self._function(self.vector, "Close", ("entry", "head", "start"), comment, body)

    # The cube core.

    def _cube_core(self) -> None:
        m = self.cube.memories
        self.chunk_d = SUB if self.d % SUB == 0 else 64
        self.chunk_e = SUB if self.e % SUB == 0 else 64
        chunk = max(self.chunk_d, self.chunk_e)
        keep = m["L1"].keep
        self.l1 = {
            "query": keep("queryL1", self.dtype, SUB * self.d, 2, "query tile, Nz"),
            "key": keep("keyL1", self.dtype, SUB * self.d, 2, "keys of a sub-tile, Nz"),
            "left": keep("leftL1", self.dtype, SUB * SUB, 2, "P of a sub-tile, Nz"),
            "right": keep("rightL1", self.dtype, SUB * chunk, 2, "values of a sub-tile, Nz"),
        }
        if "ones" in self.full.products:
            self.l1["ones"] = keep("onesL1", self.dtype, SUB * LEAST, note="ones, Nz")
        if self.lags:
            self.l1["minus"] = keep("minusL1", self.dtype, LEAST * SUB, 2, "−r by rows, Nz")
            if "ones" not in self.l1:
                raise PlanError("the shift 'reference' wants float32 statistics")
        self.l0a = m["L0A"].keep("a", self.dtype, SUB * SUB, 2, "left matrix, Zz")
        self.l0b = m["L0B"].keep("b", self.dtype, SUB * SUB, 2, "right matrix, Zn")
        self.l0c = m["L0C"].keep("c", "float", SUB * SUB, 2, "product in float32, Nz")
        self.cube.counters = ("queryTurn", "keyTurn", "pairTurn", "l0Turn", "l0cTurn", "tileTurn")
        prologue: list[Node] = []
        if self.k.shift == "paper":
            prologue = [SyncAll(), Call(self._shift_keys(), ())]
        scores, values = self._scores(), self._values()
        # A reference lags by no tile: what it is taken off waits for the tile before.
        ahead = 1 if self.lags else AHEAD
        arguments = ("entry", "kvHead", "keys", "lo + t", "t")
        behind = ("entry", "kvHead", "keys", f"lo + t - {ahead}", f"t - {ahead}")
        shifting: list[Node] = []
        if self.lags:
            shifting = [
                CrossWait("MTE2", FLAGS["REFERENCE_READY"], "REFERENCE_READY"),
                Call(self._shifted(), behind),
                CrossSet("FIX", FLAGS["SHIFTED_READY"], "SHIFTED_READY"),
            ]
        loop = For(
            "t",
            0,
            f"tiles + {ahead}",
            [
                If(
                    "t < tiles",
                    [
                        Call(scores, arguments),
                        CrossSet("FIX", FLAGS["SCORES_READY"], "SCORES_READY"),
                    ],
                ),
                If(
                    f"t >= {ahead}",
                    [
                        *shifting,
                        CrossWait("MTE2", FLAGS["P_READY"], "P_READY"),
                        Call(values, behind),
                        CrossSet("FIX", FLAGS["UPDATE_READY"], "UPDATE_READY"),
                    ],
                ),
            ],
        )
        at = f"((int64_t(entry) * heads + head) * queryTiles + tile) * {SUB * self.d}"
        load = self._to_l1(
            self.l1["query"].slot("querySlot"), self.globals["scaledQuery"].at(at),
            SUB, self.d, str(self.d),
        )  # fmt: skip
        query: list[Node] = [
            Let("querySlot", "Mod(queryTurn, 2)"),
            WaitFlag("MTE1", "MTE2", "4 + querySlot"),
            load,
            SetFlag("MTE2", "MTE1", "4 + querySlot"),
            WaitFlag("MTE2", "MTE1", "4 + querySlot"),
        ]
        done: list[Node] = [
            SetFlag("MTE1", "MTE2", "4 + querySlot"),
            Advance("queryTurn"),
            Advance("tileTurn", "tiles"),
        ]
        both = (0, 1)
        l1_ids = range(6)
        self.cube.body = [
            *[SetFlag("MTE1", "MTE2", i) for i in l1_ids],
            *[SetFlag("M", "MTE1", i) for i in both],
            *[SetFlag("FIX", "M", i) for i in both],
            *self._prologue(prologue),
            *self._load_ones(),
            *self._items([*query, loop, *done]),
            *([SyncAll()] if self.k.decode else []),  # the vector cores merge what they have
            *[WaitFlag("MTE1", "MTE2", i) for i in l1_ids],
            *[WaitFlag("M", "MTE1", i) for i in both],
            *[WaitFlag("FIX", "M", i) for i in both],
        ]

    def _load_ones(self) -> list[Node]:
        if "ones" not in self.l1:
            return []
        to, source = self.l1["ones"], self.globals["ones"]
        return [
            self._to_l1(to.at(), source.at(0), SUB, LEAST, str(LEAST)),
        ]  # the flag of the first query tile, which is loaded after it, tells of both

    def _to_l1(self, to: Slice, source: Slice, rows: int, columns: int, stride: str) -> Instruction:
        """Loads a matrix that lies row by row, ``stride`` numbers apart, as Nz."""
        return Instruction(
            f"DataCopy({to}, {source}, Nd2NzParams{{1, {rows}, {columns}, 0, "
            f"static_cast<uint16_t>({stride}), {rows}, 1, 0}})",
            "MTE2",
            (Slice(to.buffer, to.offset, rows * columns),),
            (Slice(source.buffer, source.offset, rows * columns),),
            rows * columns * self.item,
        )

    def _multiply(
        self, left: Slice, right: Slice, *, n: int, k: int, right_rows: int, by_rows: bool,
        first: str,
    ) -> list[Node]:  # fmt: skip
        """One product of the cube unit, [128, k]·[k, n], added to c.

        Arguments:
          left: k columns of a matrix of 128 rows in L1.
          right: [n, k] in L1, or with ``by_rows`` [k, n]; the matrix has ``right_rows`` rows.
        """
        a, b = self.l0a, self.l0b
        slot = f"side * {a.count}"
        load_a = Instruction(
            f"LoadData(a[{slot} + i * {k * 16}], {left.at('i * 256')}, "
            f"LoadData2DParams{{0, {k // 16}, {SUB // 16}, 0, 0, false, 0}})",
            "MTE1",
            (a.slot("side"),),
            (left,),
            16 * k * self.item,
        )
        if by_rows:
            step, params = "i * 256", f"{{0, {n // 16}, {right_rows // 16}, 0, 0, true, 0}}"
        else:
            step, params = f"i * {right_rows * 16}", f"{{0, {n // 16}, 1, 0, 0, false, 0}}"
        load_b = Instruction(
            f"LoadData(b[{slot} + i * {n * 16}], {right.at(step)}, LoadData2DParams{params})",
            "MTE1",
            (b.slot("side"),),
            (right,),
            16 * n * self.item,
        )
        loads = [For("i", 0, SUB // 16, [load_a]), For("i", 0, k // 16, [load_b])]
        return self._turn("side", loads, n, k, first)

    def _turn(self, side: str, loads: Sequence[Node], n: int, k: int, first: str) -> list[Node]:
        """``loads`` fill the ``side`` of L0A and L0B whose turn it is; their product,
        [128, k]·[k, n], is added to c, or is c where it is the first.
        """
        a, b, c = self.l0a, self.l0b, self.l0c
        mmad = Instruction(
            f"Mmad(c[product * {c.count}], a[{side} * {a.count}], b[{side} * {b.count}], "
            f"MmadParams{{{SUB}, {n}, {k}, 0, false, {first}}})",
            "M",
            (c.slot("product"),),
            (a.slot(side), b.slot(side), c.slot("product")),
            SUB * n * k,
        )
        return [
            Let(side, "Mod(l0Turn, 2)"),
            WaitFlag("M", "MTE1", side),
            *loads,
            SetFlag("MTE1", "M", side),
            WaitFlag("MTE1", "M", side),
            mmad,
            Barrier("M"),
            SetFlag("M", "MTE1", side),
            Advance("l0Turn"),
        ]

    def _collect(self, body: list[Node], to: Slice, n: int, stride: int) -> list[Node]:
        """``body`` adds up a product in c, which then leaves, rounded to the type of ``to``."""
        c = self.l0c
        dtype = to.buffer.dtype
        mode = {"half": "F322F16", "bfloat16_t": "F322BF16", "float": "NoQuant"}[dtype]
        fixpipe = Instruction(
            f"Fixpipe<{dtype}, float, CFG_ROW_MAJOR>({to}, c[product * {c.count}], "
            f"FixpipeParamsV220{{{n}, {SUB}, {SUB}, {stride}, false, QuantMode_t::{mode}, "
            "0, 1, 0, 0, 0})",
            "FIX",
            (to,),
            (c.slot("product"),),
            SUB * n * ITEMSIZE[dtype],
        )
        return [
            Let("product", "Mod(l0cTurn, 2)"),
            WaitFlag("FIX", "M", "product"),
            *body,
            SetFlag("M", "FIX", "product"),
            WaitFlag("M", "FIX", "product"),
            fixpipe,
            SetFlag("FIX", "M", "product"),
            Advance("l0cTurn"),
        ]

    def _place(self, t: str) -> Let:
        rows = 2 * self.half
        return Let(
            "place",
            f"(int64_t(core) * {DEPTH} + {self._slot_of(DEPTH, t)}) * {rows}",
            "int64_t",
        )

    def _key_rows(self, to: Slice, offset: str) -> list[Node]:
        """Loads a sub-tile of the keys of block j that the scores are made of, from row ``offset``
        on.
        """
        if not self.shifted:
            return self._raw_rows(to, "key", SUB, self.d, offset)
        head = "(int64_t(entry) * kvHeads + kvHead)"
        at = f"(({head} * keyBlocks + j) * {self.n} + {offset}) * {self.d}"
        return [self._to_l1(to, self.globals["shiftedKey"].at(at), SUB, self.d, str(self.d))]

    def _raw_rows(
        self, to: Slice, name: str, rows: int, width: int, offset: str, column: str = "0"
    ) -> list[Node]:
        size = self.d if name == "key" else self.e
        row = f"j * {self.n} + {offset}"
        at = f"((int64_t(entry) * keyLength + {row}) * kvHeads + kvHead) * {size} + {column}"
        tail = f"((int64_t(entry) * kvHeads + kvHead) * {self.n} + {offset}) * {size} + {column}"
        return [
            If(
                f"j < Div(keys, {self.n})",
                [self._to_l1(to, self.globals[name].at(at), rows, width, f"kvHeads * {size}")],
                [self._to_l1(to, self.globals[f"{name}Tail"].at(tail), rows, width, str(size))],
            )
        ]

    def _by_columns(self, n: int) -> For:
        """The query tile times n rows of keys in L1, over the columns of both."""
        left = Slice(self.l1["query"], f"querySlot * {SUB * self.d} + k * {SUB}", SUB * self.d)
        right = Slice(self.l1["key"], f"slot * {SUB * self.d} + k * {n}", n * self.d)
        multiply = self._multiply(
            left, right, n=n, k=self.chunk_d, right_rows=n, by_rows=False, first="k == 0"
        )
        return For("k", 0, self.d, multiply, self.chunk_d)

    def _query_times(
        self, load: list[Node], to: Slice, n: int, stride: int, more: Sequence[Node] = ()
    ) -> list[Node]:
        """The query tile times ``n`` rows that ``load`` brings, and what ``more`` adds."""
        product = [self._by_columns(n), *more, SetFlag("MTE1", "MTE2", "slot")]
        return [
            Let("slot", "Mod(keyTurn, 2)"),
            WaitFlag("MTE1", "MTE2", "slot"),
            *load,
            SetFlag("MTE2", "MTE1", "slot"),
            WaitFlag("MTE2", "MTE1", "slot"),
            *self._collect(product, to, n, stride),
            Advance("keyTurn"),
        ]

    def _scores(self) -> Function:
        def body() -> list[Node]:
            to = self.l1["key"].slot("slot")
            nodes: list[Node] = [self._place("t"), Let("querySlot", "Mod(queryTurn, 2)")]
            load = self._key_rows(to, "sub")
            out = self.globals["scores"].at(f"place * {self.n} + sub")
            nodes.append(For("sub", 0, self.n, self._query_times(load, out, SUB, self.n), SUB))
            if "kappa" in self.full.products:
                at = f"((int64_t(entry) * kvHeads + kvHead) * keyBlocks + j) * {LEAST * self.d}"
                load = [self._to_l1(to, self.globals["kappa"].at(at), LEAST, self.d, str(self.d))]
                out = self.globals["offsets"].at(f"place * {LEAST}")
                nodes += self._query_times(load, out, LEAST, LEAST)
            return nodes

        comment = "S' = Q·K'ᵀ of a tile (eq. 4, 7), rounded on its way out."
        parameters = ("entry", "kvHead", "keys", "j", "t")
        return self._function(self.cube, "Scores", parameters, comment, body)

    def _shifted(self) -> Function:
        def body() -> list[Node]:
            minus = self.l1["minus"]
            at = self.globals["minus"].at(f"Div(place, {2 * self.half}) * {LEAST * 2 * self.half}")
            load = self._raw_rows(self.l1["key"].slot("slot"), "key", SUB, self.d, "sub")
            load.append(self._to_l1(minus.slot("slot"), at, LEAST, SUB, str(SUB)))
            out = self.globals["shifted"].at(f"place * {self.n} + sub")
            product = self._query_times(load, out, SUB, self.n, self._minus_product())
            return [
                self._place("t"),
                Let("querySlot", "Mod(queryTurn, 2)"),
                For("sub", 0, self.n, product, SUB),
            ]

        comment = "S − r = Q·Kᵀ − r of a tile: −r is two more columns of Q, in halves (eq. 11)."
        parameters = ("entry", "kvHead", "keys", "j", "t")
        return self._function(self.cube, "Shifted", parameters, comment, body)

    def _minus_product(self) -> list[Node]:
        """Adds −r, 16 rows of which two are not zero, times ones."""
        a, b = self.l0a, self.l0b
        minus, ones = self.l1["minus"], self.l1["ones"]
        load_a = Instruction(
            f"LoadData(a[last * {a.count}], {minus.slot('slot')}, "
            f"LoadData2DParams{{0, {SUB // 16}, 1, 0, 0, true, 0}})",
            "MTE1",
            (a.slot("last"),),
            (minus.slot("slot"),),
            SUB * LEAST * self.item,
        )
        load_b = Instruction(
            f"LoadData(b[last * {b.count}], {ones.name}, "
            f"LoadData2DParams{{0, {SUB // 16}, 1, 0, 0, false, 0}})",
            "MTE1",
            (b.slot("last"),),
            (ones.at(),),
            SUB * LEAST * self.item,
        )
        return self._turn("last", [load_a, load_b], SUB, LEAST, "false")

    def _accumulated(
        self, left: list[Node], right: list[Node], to: Slice, n: int, stride: int
    ) -> list[Node]:
        """Σ over the sub-tiles ``sub`` of a block: what ``left`` loads times what ``right`` does,
        or times ones where that is nothing.
        """
        a = Slice(self.l1["left"], f"slot * {self.l1['left'].count}", SUB * SUB)
        b = Slice(self.l1["right"], f"slot * {self.l1['right'].count}", SUB * n)
        if not right:
            b = self.l1["ones"].at()
        multiply = self._multiply(a, b, n=n, k=SUB, right_rows=SUB, by_rows=True, first="sub == 0")
        body: list[Node] = [
            Let("slot", "Mod(pairTurn, 2)"),
            WaitFlag("MTE1", "MTE2", "2 + slot"),
            *left,
            *right,
            SetFlag("MTE2", "MTE1", "2 + slot"),
            WaitFlag("MTE2", "MTE1", "2 + slot"),
            *multiply,
            SetFlag("MTE1", "MTE2", "2 + slot"),
            Advance("pairTurn"),
        ]
        return self._collect([For("sub", 0, self.n, body, SUB)], to, n, stride)

    def _values(self) -> Function:
        def body() -> list[Node]:
            p = self.globals["p"].at(f"place * {self.n} + sub")
            left = self._to_l1(self.l1["left"].slot("slot"), p, SUB, SUB, str(self.n))
            right = self._raw_rows(
                self.l1["right"].slot("slot"), "value", SUB, self.chunk_e, "sub", "column"
            )
            to = self.globals["update"].at(f"place * {self.e} + column")
            product = self._accumulated([left], right, to, self.chunk_e, self.e)
            nodes = [self._place("t"), For("column", 0, self.e, product, self.chunk_e)]
            if "ones" in self.l1:
                sums = self.globals["sums"].at(f"place * {LEAST}")
                nodes += self._accumulated([left], [], sums, LEAST, LEAST)
            return nodes

        comment = "P·V of a tile (eq. 10)."
        parameters = ("entry", "kvHead", "keys", "j", "t")
        return self._function(self.cube, "Values", parameters, comment, body)

    def _shift_keys(self) -> Function:
        def body() -> list[Node]:
            m = self.globals["matrices"].at(
                f"(int64_t(j == Div(keys, {self.n})) * {self.n} + row) * {self.n} + sub"
            )
            left = self._to_l1(self.l1["left"].slot("slot"), m, SUB, SUB, str(self.n))
            right = self._raw_rows(
                self.l1["right"].slot("slot"), "key", SUB, self.chunk_d, "sub", "column"
            )
            at = f"(int64_t(unit) * {self.n} + row) * {self.d} + column"
            to = self.globals["shiftedKey"].at(at)
            product = self._accumulated([left], right, to, self.chunk_d, self.d)
            rows = For("row", 0, self.n, [For("column", 0, self.d, product, self.chunk_d)], SUB)
            return [
                For(
                    "unit",
                    "core",
                    "batch * kvHeads * keyBlocks",
                    [
                        Let("j", "Mod(unit, keyBlocks)"),
                        Let("kvHead", "Mod(Div(unit, keyBlocks), kvHeads)"),
                        Let("entry", "Div(unit, keyBlocks * kvHeads)"),
                        self._keys_of("entry"),
                        If(f"j * {self.n} < keys", [rows]),
                    ],
                    "cores",
                )
            ]

        comment = "K' = M·K of each key block (eq. 4)."
        return self._function(self.cube, "ShiftKeys", (), comment, body)
