"""What the vector cores compute of one key tile: the reference, the softmax, the output."""

from __future__ import annotations

from npu_bridge.cores.context import GROUPED, Context, slot_of
from npu_bridge.cores.function import Output, VectorFunction, inputs_of
from npu_bridge.cores.slabs import cleared, copy, slab, zero_bits
from npu_bridge.cores.vector_memory import VectorMemory
from npu_bridge.cut import Stage
from npu_bridge.dtypes import BLOCK, ITEMSIZE
from npu_bridge.expressions import Expr, Scalar, times
from npu_bridge.functions import Leaf
from npu_bridge.instructions import FirstBlocks, RowsIn, RowsOut
from npu_bridge.ir import Advance, For, Function, If, Let, Node, SetFlag, Slice, WaitFlag
from npu_bridge.layout import CARRIED, DEPTH, LEAST, PADDING, QUERIES, SINGLE, SOFTMAX, UPDATE
from npu_bridge.lower import Value, Vector
from npu_bridge.specification import COLUMNS
from pasa_jax.core.errors import PlanError

# Of the functions. ``turn`` counts the tiles of the core; ``side`` is where the row statistics of
# the item lie.
_PARAMETERS = ("entry", "head", "start", "keys", "j", "t", "turn", "side")


def parameters(c: Context) -> tuple[str, ...]:
    """Of the functions; ``whole`` says whether a block mask shows all of the tile."""
    return (*_PARAMETERS, *(("whole",) if c.kernel.visits else ()))


def arguments(c: Context) -> tuple[str, ...]:
    """What the parameters are for tile t of an item."""
    own = {"j": c.tile, "turn": "tileTurn"}
    return tuple(own.get(name, name) for name in parameters(c))


# The type of a number of a head's data.
_SHARED = {"float32": "float", "int32": "int32_t", "bool": "int32_t"}


def _place_of(x: Leaf, n: int = 0) -> str:
    """Where data of the caller's functions lie for the head and the slab or the block of n keys."""
    of_head = x.part == "head_data"
    entry, head = x.axes.rjust(2, "1") if of_head else x.axes[:-1].ljust(2, "1")
    place = "int64_t(entry)" if entry == "B" else "0"
    if head == "N":
        place = f"({place}) * heads + head"
    if x.part == "q_data":
        return f"({place}) * queryLength + first"
    return place if of_head else f"({place}) * keyLength + j * {n}"


class Tile:
    """A vector core's part of one key tile, slab by slab.

    Arguments:
      rows: of a slab.
    """

    def __init__(self, c: Context, memory: VectorMemory, rows: int) -> None:
        self.c, self.memory, self.rows = c, memory, rows
        self._columns = {x.name for x in c.row_data if x.part == "q_data"}
        self._keys = {x.name for x in c.row_data if x.part == "kv_data"}
        self._heads = {x.name for x in c.head_data}

    def refer(self, name: str, stage: Stage, mask: str) -> Function:
        """−r of each row, in two halves, for the cube core.

        Arguments:
          mask: "with" or "without", for the comment.
        """
        c, r = self.c, self.rows
        f = VectorFunction(self.memory.ub, name, parameters(self.c), ramp=self.memory.ramp)
        halves = self.memory.minus
        assert halves is not None
        both = halves.at(0, 2 * r)
        places = {"high": halves.at(0, r), "low": halves.at(r, r)}
        outputs = {n: Output(places[n]) for n in stage.outputs if n in places}
        outputs |= {n: self._output(n) for n in stage.outputs if n not in places}
        compute = self._stage(f, stage, outputs)
        slot = f"(int64_t(core) * {DEPTH} + {slot_of(DEPTH, 'turn')}) * {LEAST * c.block_q}"
        to = c.globals["minus"].at(f"{slot} + firstRow + row")
        stores: list[Node] = [RowsOut(to, both, 2, r, f"{c.block_q - r}")]
        body = slab("slot", self._loads(stage), compute, stores, SINGLE)
        comment = (
            f"r, the running maximum, or the block's if there is none (eq. 11), {mask} the mask."
        )
        return f.done(comment, [*self._lets(stage), *self._slabs(body)])

    def softmax(self, name: str, stage: Stage, mask: str) -> Function:
        """From S' to P, and to what the row statistics are made of.

        Arguments:
          mask: "with" or "without", for the comment.
        """
        c, r = self.c, self.rows
        f = VectorFunction(self.memory.ub, name, parameters(self.c), ramp=self.memory.ramp)
        p = self.memory.rings["p"]
        slot = "slot" if p.slots > 1 else 0
        outputs = {n: self._output(n) for n in stage.outputs if n != "p"}
        outputs["p"] = Output(Slice(p, times(slot, p.count), r * c.n))
        read = self._ring("shifted" if c.refers else "scores", c.n)
        compute = self._stage(f, stage, outputs, spare=[read])
        to = c.globals["p"].at(f"place * {c.n}")
        stores: list[Node] = [copy(to, Slice(p, times(slot, p.count), r * c.n), r * c.n)]
        out: Expr = "slot" if p.slots > 1 else SOFTMAX
        body = slab("slot", self._loads(stage), compute, stores, out)
        return f.done(
            f"From S' to P (eq. 9, 10), {mask} the mask.",
            [*self._lets(stage), *self._slabs(body)],
        )

    def statistics(self, name: str, stage: Stage) -> Function:
        """The row statistics of a tile, all rows at once."""
        f = VectorFunction(self.memory.ub, name, parameters(self.c), ramp=self.memory.ramp)
        compute = self._stage(f, stage, {n: self._output(n) for n in stage.outputs})
        body = [*self._lets(stage), *self._all_rows(), *compute]
        return f.done("The row statistics (eq. 10).", body)

    def accumulate(self, name: str, sums: Stage, step: Stage) -> Function:
        """Rescales O and adds P·V.

        Arguments:
          sums: what is done with the row sums, all rows at once.
        """
        c, r, rings = self.c, self.rows, self.memory.rings
        f = VectorFunction(self.memory.ub, name, ("turn", "side"))
        columns: list[Node] = []
        if sums.outputs:
            whole = Tile(c, self.memory, c.half)
            compute = whole._stage(f, sums, {n: whole._output(n) for n in sums.outputs})
            columns = [*self._all_rows(), *slab(SINGLE, whole._sums(), compute, [])]
        compute = self._stage(f, step, {n: self._output(n) for n in step.outputs})
        update = c.globals["update"].at(f"place * {c.e}")
        loads: list[Node] = [copy(rings["update"].slot("slot"), update, r * c.e)]
        body: list[Node] = [
            Let("slot", f"Mod(updateTurn, {c.slabs.slots})"),
            self._place(),
            *slab(f"{UPDATE} + slot", loads, compute, []),
            Advance("updateTurn"),
        ]
        comment = "Rescales O and adds P·V of a tile (eq. 10)."
        rows = For("row", 0, c.half, body, r)
        return f.done(comment, [*([If("1", columns)] if columns else []), rows])

    def _lets(self, stage: Stage) -> list[Node]:
        """What the stage reads that is one number for all slabs: how many queries the sequence has,
        and the data of the head.
        """
        lets = self.c.queries_of("entry") if "queries" in stage.inputs else []
        for x in self.c.head_data:
            if x.name in stage.inputs:
                value = f"{x.name}.GetValue({_place_of(x)})"
                lets.append(Let(f"{x.name}_now", value, _SHARED[x.dtype]))
        return lets

    def _all_rows(self) -> list[Node]:
        """Names for all rows of the tile."""
        return [Let("row", 0), self._place()]

    def _output(self, name: str) -> Output:
        """Where a stage leaves what it makes, by its name there."""
        c, r, m = self.c, self.rows, self.memory
        if name in m.kept:
            place = m.kept[name].at("row", r)
            if r * ITEMSIZE[place.dtype] % BLOCK:
                raise PlanError(f"{r} rows of {place.dtype} are not whole blocks of {BLOCK} bytes")
            return Output(place)
        if name in c.full.carried:
            return Output(self._carried(name))
        if name == "o":
            return Output(m.state["o"].at(f"row * {c.e}", r * c.e), m.state["o"])
        return Output(self._column(name), m.state[name])

    def _stage(
        self,
        f: VectorFunction,
        stage: Stage,
        outputs: dict[str, Output],
        spare: list[Slice] | None = None,
    ) -> list[Node]:
        """The instructions of a stage, its outputs given by name."""
        inputs = inputs_of(stage.inputs, {name: self._input(name) for name in stage.inputs})
        places = {var: outputs[name] for name, var in stage.outputs.items()}
        names = {var: f"new_{name}" for name, var in stage.outputs.items()}
        return f.lowered(stage.equations, inputs, places, names, spare or [])

    def _input(self, name: str) -> Value:
        """What a stage reads, by its name there."""
        c, r, m = self.c, self.rows, self.memory
        if name in m.rings:
            if name == "offsets":
                place = f"Mod(j, {LEAST}) * {c.half} + row"
                return Vector(m.rings[name].at(place, r), r, 1)
            if name == "sums":
                return Vector(m.rings[name].at(), r, COLUMNS)
            if name == "keySegments" or name in self._keys:
                return Vector(m.rings[name].slot("slot"), 1, c.n)
            column = name == "querySegments" or name in self._columns
            width = 1 if column else c.e if name == "update" else c.n
            return Vector(self._ring(name, width), r, width)
        if name == "o":
            return Vector(m.state["o"].at(f"row * {c.e}", r * c.e), r, c.e)
        if name == "reference":
            assert m.reference is not None
            place = f"Mod(itemTurn, {QUERIES}) * {c.block_q} + firstRow + row"
            return Vector(m.reference.at(place, r), r, 1)
        if name == "weights":
            assert m.weights is not None
            # The second row of shares is the tail's.
            place = f"Pick(j == Div(keyLength, {c.n}), {c.n}, 0)"
            return Vector(m.weights.at(place, c.n), c.n, 1)
        if name in m.kept:
            return Vector(m.kept[name].at("row", r), r, 1)
        if name in c.full.carried:
            return Vector(self._carried(name), r, 1)
        if name in m.state:
            return Vector(self._column(name), r, 1)
        if name == "guard":
            assert m.guard is not None
            return Vector(m.guard.at(f"side * {c.half} + row", r), r, 1)
        if name in self._heads:
            return Scalar(f"{name}_now")
        if name == "start":  # all rows of a decoding tile are one position
            return Scalar(0 if c.kernel.decode else "first")
        return Scalar(name)

    def _column(self, name: str) -> Slice:
        """The rows of m, l or f."""
        return self.memory.state[name].at(f"side * {self.c.half} + row", self.rows)

    def _ring(self, name: str, width: int) -> Slice:
        """The slab of ``width`` columns in the slot whose turn it is."""
        s = self.memory.rings[name].slot("slot")
        return Slice(s.buffer, s.offset, self.rows * width)

    def _carried(self, name: str) -> Slice:
        """Where a column that a later stage reads lies, for the tile t."""
        place = f"{slot_of(CARRIED, 'turn')} * {self.c.half} + row"
        return self.memory.state[name].at(place, self.rows)

    def _slabs(self, body: list[Node]) -> list[Node]:
        """``body`` for each slab of S'; it may use the names of its slot, its first query and its
        place in the workspace.
        """
        lets = [
            Let("slot", "Mod(softmaxTurn, 2)"),
            Let("first", "start + firstRow + row"),
            self._place(),
        ]
        return [For("row", 0, self.c.half, [*lets, *body, Advance("softmaxTurn")], self.rows)]

    def _place(self) -> Let:
        """Which row of the workspace the slab's first is."""
        block_q = self.c.block_q
        slot = f"int64_t(core) * {DEPTH * block_q} + {slot_of(DEPTH, 'turn')} * {block_q}"
        return Let("place", f"{slot} + firstRow + row", "int64_t")

    def _loads(self, stage: Stage) -> list[Node]:
        """Loads what a stage reads of scores, offsets and bias."""
        c, r, rings = self.c, self.rows, self.memory.rings
        loads: list[Node] = []
        for name in ("scores", "shifted"):
            if name in stage.inputs:
                source = c.globals[name].at(f"place * {c.n}")
                loads.append(copy(rings[name].slot("slot"), source, r * c.n))
        arrays = [name for name in ("bias", "mask") if name in stage.inputs]
        data = [x for x in c.row_data if x.name in stage.inputs]
        if arrays or data or "querySegments" in stage.inputs:
            loads += [
                Let("seenRows", f"Max(0, Min({r}, queryLength - first))"),
                Let("seenKeys", f"Min({c.n}, keyLength - j * {c.n})"),
            ]
        for name in arrays:
            loads += self._of_scores(name)
        if "querySegments" in stage.inputs:
            loads += self._segments()
        for x in data:
            loads += self._data(x)
        return loads

    def offsets(self) -> Function:
        """Loads q·κ of the next group of blocks."""
        c = self.c
        place = f"int64_t(core) * {DEPTH} + {slot_of(DEPTH, 'offsetTurn')}"
        if c.kernel.bounded:  # those of all blocks are there
            place = f"int64_t(core) * {DEPTH} + {slot_of(DEPTH, 'itemTurn')}"
            place = f"(({place}) * {GROUPED} + Div(j, {LEAST}) * {LEAST}) * {c.block_q}"
        else:
            place = f"({place}) * {LEAST * c.block_q}"
        source = c.globals["offsets"].at(f"{place} + firstRow")
        load = RowsIn(self.memory.rings["offsets"].at(), source, LEAST, c.half, c.block_q - c.half)
        body: list[Node] = [
            SetFlag("V", "MTE2", PADDING),
            WaitFlag("V", "MTE2", PADDING),
            *slab(SINGLE, [load], [], []),
            Advance("offsetTurn"),
        ]
        return Function("LoadOffsets", ("j",), body, f"q·κ of {LEAST} blocks, a row each (eq. 7).")

    def _sums(self) -> list[Node]:
        """Loads the row sums of P: one block of each row."""
        if "sums" not in self.memory.rings:
            return []
        source = Slice(self.c.globals["sums"], f"place * {LEAST}", self.rows * LEAST)
        to = self.memory.rings["sums"].at()
        return [FirstBlocks(to, source, self.rows, LEAST // COLUMNS)]

    def _of_scores(self, name: str) -> list[Node]:
        """Loads a slab of "bias" or "mask"; what lies beyond its end is zero, and masked."""
        c, r = self.c, self.rows
        axes = (c.kernel.bias if name == "bias" else c.kernel.mask_axes) or ""
        assert axes[2:] == "TS", axes
        b, n = ("entry" if axes[0] == "B" else "0"), ("head" if axes[1] == "N" else "0")
        heads = "heads" if axes[1] == "N" else "1"
        at = f"((int64_t({b}) * {heads} + {n}) * queryLength + first) * keyLength + j * {c.n}"
        to = self._ring(name, c.n)
        load = RowsIn(
            to, c.globals[name].at(at), "seenRows", "seenKeys", "keyLength - seenKeys", c.n
        )
        return self._cut_short(f"(seenRows < {r}) | (seenKeys < {c.n})", to, "seenRows > 0", load)

    def _segments(self) -> list[Node]:
        """Loads the segments of a slab's queries and of the block's keys, likewise."""
        c, r, rings = self.c, self.rows, self.memory.rings
        rows, keys = self._ring("querySegments", 1), rings["keySegments"].slot("slot")
        row, key = "int64_t(entry) * queryLength + first", f"int64_t(entry) * keyLength + j * {c.n}"
        queries_in = RowsIn(rows, c.globals["querySegments"].at(row), 1, "seenRows", 0, r)
        keys_in = RowsIn(keys, c.globals["keySegments"].at(key), 1, "seenKeys", 0, c.n)
        return [
            *self._cut_short(f"seenRows < {r}", rows, "seenRows > 0", queries_in),
            *self._cut_short(f"seenKeys < {c.n}", keys, "1", keys_in),
        ]

    def _data(self, x: Leaf) -> list[Node]:
        """Loads what the caller's functions are given of a slab's queries or of the block's keys,
        likewise.
        """
        c, to = self.c, self.memory.rings[x.name].slot("slot")
        source, some = c.globals[x.name].at(_place_of(x, c.n)), "1"
        assert isinstance(to.count, int)
        if x.part == "q_data":
            count, whole, some = "seenRows", self.rows, "seenRows > 0"
        else:
            count, whole = "seenKeys", c.n
        load = RowsIn(to, source, 1, count, 0, to.count)
        return self._cut_short(f"{count} < {whole}", to, some, load)

    @staticmethod
    def _cut_short(short: str, to: Slice, some: str, load: RowsIn) -> list[Node]:
        """A load that zeros come before where it is ``short``, and that is left out where there is
        not ``some``.
        """
        assert isinstance(to.count, int)
        return [If(short, cleared(zero_bits(to, to.count))), If(some, [load])]
