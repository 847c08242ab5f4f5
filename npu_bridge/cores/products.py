"""The cube core's memories, and the parts of which its products are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from npu_bridge.cores.context import Context
from npu_bridge.expressions import Expr
from npu_bridge.instructions import Fixpipe, LoadData, MatrixIn, Mmad
from npu_bridge.ir import Advance, Barrier, Buffer, For, If, Let, Node, SetFlag, Slice, WaitFlag
from npu_bridge.layout import CHUNK, LEAST, PIECE, SUB
from npu_bridge.memory import Memory
from pasa_jax.core.errors import PlanError

_MEMORIES = ("L1", "L0A", "L0B", "L0C")


@dataclass(frozen=True)
class CubeMemory:
    """The buffers of the cube core.

    Arguments:
      l1: "query", "key", "left" and "right"; "ones", "kappa" and "minus" where the kernel has them.
      a, b: left and right matrix.
      pieces: products of queries and keys, ``rows`` rows each.
      out: products that are added up, a slot for each chunk where they are over several blocks.
      sums: where P's rows are added up.
      depth: columns of queries and keys that are multiplied at once.
    """

    memories: dict[str, Memory]
    l1: dict[str, Buffer]
    a: Buffer
    b: Buffer
    pieces: Buffer
    out: Buffer
    sums: Buffer | None
    depth: int
    rows: int

    @staticmethod
    def of(c: Context) -> CubeMemory:
        memories = {m: Memory.of(c.kernel.schedule.target, m) for m in _MEMORIES}
        depth = SUB if c.d % SUB == 0 else CHUNK
        l1 = _level_1(c, memories["L1"])
        a = memories["L0A"].stay("a", c.dtype, SUB * SUB, 2, "left matrix, Zz")
        b = memories["L0B"].stay("b", c.dtype, SUB * SUB, 2, "right matrix, Zn")
        stay = memories["L0C"].stay
        stays = c.kernel.output_stays
        slots = c.e // CHUNK if stays else 1
        out = stay("outL0C", "float", SUB * CHUNK, slots, "P·V, float32, Nz")
        sums = None
        if "ones" in l1:
            sums = stay("sumsL0C", "float", SUB * LEAST, note="row sums of P, float32, Nz")
        rows = PIECE if slots == 1 else PIECE // 2
        number = SUB // rows if slots == 1 else SUB // rows - 1
        pieces = stay("piecesL0C", "float", rows * SUB, number, "scores, float32, Nz")
        return CubeMemory(memories, l1, a, b, pieces, out, sums, depth, rows)

    @property
    def flags(self) -> int:
        """How many there are between FIX and M: one for each piece, then one for each of `out`."""
        return self.pieces.slots + self.out.slots

    @property
    def of_out(self) -> Expr:
        """The flag of what is added up."""
        first = self.pieces.slots
        return first if self.out.slots == 1 else f"{first} + chunk"


def _level_1(c: Context, memory: Memory) -> dict[str, Buffer]:
    stay, chunks, subs = memory.stay, c.e // CHUNK, c.n // SUB
    # P serves every chunk of the values, so its whole tile stays; each sub-tile of the next one
    # is loaded two products, at least, after the last that reads its place.
    left = 2 if chunks == 1 or subs == 1 else subs
    l1 = {
        "query": stay("queryL1", c.dtype, SUB * c.d, 2, "query tile, Nz"),
        "key": stay("keyL1", c.dtype, SUB * c.d, 2, "keys of a sub-tile, Nz"),
        "left": stay("leftL1", c.dtype, SUB * SUB, left, "P of a sub-tile, Nz"),
        "right": stay("rightL1", c.dtype, SUB * CHUNK, 2, "values of a sub-tile, Nz"),
    }
    if "ones" in c.full.products:
        l1["ones"] = stay("onesL1", c.dtype, SUB * LEAST, note="ones, Nz")
    if c.refers:
        l1["minus"] = stay("minusL1", c.dtype, LEAST * SUB, 2, "−r by rows, Nz")
        if "ones" not in l1:
            raise PlanError("the shift 'reference' wants float32 statistics")
    return l1


def matrix_in(to: Slice, source: Slice, rows: int, columns: int, stride: str) -> MatrixIn:
    """Loads a matrix that lies row by row, ``stride`` numbers apart."""
    size = rows * columns
    return MatrixIn(
        Slice(to.buffer, to.offset, size),
        Slice(source.buffer, source.offset, size),
        rows,
        columns,
        stride,
    )


def when(condition: str | bool, nodes: Sequence[Node]) -> list[Node]:
    """``nodes`` where the condition holds, which may be known here."""
    if isinstance(condition, bool):
        return list(nodes) if condition else []
    return [If(condition, list(nodes))]


class Products:
    """Makes the products of the cube unit."""

    def __init__(self, c: Context, memory: CubeMemory) -> None:
        self.c, self.memory = c, memory

    def rows_in(
        self, to: Slice, name: str, rows: int, width: int, offset: str, column: str = "0"
    ) -> list[Node]:
        """Loads rows of "key" or "value" of block j as they are given, from row ``offset`` on."""
        c = self.c
        size = c.d if name == "key" else c.e
        if c.kernel.careful:  # the copies hold whole blocks
            assert name == "value"
            at = f"({c.block_row('j')} * {c.n} + {offset}) * {size} + {column}"
            return [matrix_in(to, c.globals["valueCopy"].at(at), rows, width, str(size))]
        row = f"j * {c.n} + {offset}"
        at = f"{c.key_row(row)} * {size} + {column}"
        tail = f"((int64_t(entry) * kvHeads + kvHead) * {c.n} + {offset}) * {size} + {column}"
        whole = matrix_in(to, c.globals[name].at(at), rows, width, f"kvHeads * {size}")
        last = matrix_in(to, c.globals[f"{name}Tail"].at(tail), rows, width, str(size))
        return [If(f"j < Div(keys, {c.n})", [whole], [last])]

    def key_rows(self, to: Slice, offset: str) -> list[Node]:
        """Loads a sub-tile of the keys of block j that the scores are made of, from row ``offset``
        on.
        """
        c = self.c
        if not c.kernel.keys_shifted:
            return self.rows_in(to, "key", SUB, c.d, offset)
        at = f"({c.block_row('j')} * {c.n} + {offset}) * {c.d}"
        return [matrix_in(to, c.globals["shiftedKey"].at(at), SUB, c.d, str(c.d))]

    # Queries times keys.

    def query_times(self, load: list[Node], to: Slice, more: Sequence[Node] = ()) -> list[Node]:
        """The query tile times a sub-tile of keys that ``load`` brings; it leaves for ``to``.

        Arguments:
          more: products that are added before it leaves; they let it leave.
        """
        d, chunk = self.c.d, self.memory.depth
        left, right = self._query(), self._key("k", SUB)
        loads = [
            *_left_in(self.memory.a, left, chunk),
            *_right_in(self.memory.b, right, SUB, chunk),
        ]
        last: str | bool = not more
        if last and d > chunk:
            last = f"k == {d - chunk}"
        pieces = self.in_pieces(to, chunk, "k == 0" if d > chunk else True, last)
        return [
            *self._key_slot(load),
            For("k", 0, d, self.turn(loads, pieces), chunk),
            *more,
            SetFlag("MTE1", "MTE2", "slot"),
            Advance("pieceTurn", SUB // self.memory.rows),
            Advance("keyTurn"),
        ]

    def times_query(self, load: list[Node], to: Slice) -> list[Node]:
        """`LEAST` rows that ``load`` brings times the query tile: [16, 128]."""
        m, d, chunk = self.memory, self.c.d, self.memory.depth
        product = Slice(m.pieces, f"product * {m.pieces.count}", LEAST * SUB)
        a, b = (Slice(x, f"side * {x.count}", x.count) for x in (m.a, m.b))
        right = _right_in(m.b, self._query(), SUB, chunk)
        load_a = LoadData(
            Slice(m.a, a.offset, LEAST * chunk), self._key("k", LEAST), chunk // 16, 1
        )
        multiply: list[Node] = [Mmad(product, a, b, LEAST, SUB, chunk, "k == 0")]
        return [
            *self._key_slot(load),
            Let("product", f"Mod(pieceTurn, {m.pieces.slots})"),
            WaitFlag("FIX", "M", "product"),
            For("k", 0, d, self.turn([load_a, *right], multiply), chunk),
            *_leaves([Fixpipe(to, product, LEAST, SUB, SUB)], "product"),
            SetFlag("MTE1", "MTE2", "slot"),
            Advance("pieceTurn"),
            Advance("keyTurn"),
        ]

    def _query(self) -> Slice:
        """Columns k and further of the query tile in L1."""
        size = SUB * self.c.d
        return Slice(self.memory.l1["query"], f"querySlot * {size} + k * {SUB}", size)

    def _key(self, k: str, rows: int) -> Slice:
        """Columns k and further of ``rows`` keys in L1."""
        key = self.memory.l1["key"]
        return Slice(key, f"slot * {key.count} + {k} * {rows}", rows * self.c.d)

    def _key_slot(self, load: list[Node]) -> list[Node]:
        """Loads keys into the slot of L1 whose turn it is."""
        return [
            Let("slot", "Mod(keyTurn, 2)"),
            WaitFlag("MTE1", "MTE2", "slot"),
            *load,
            SetFlag("MTE2", "MTE1", "slot"),
            WaitFlag("MTE2", "MTE1", "slot"),
        ]

    def in_pieces(self, to: Slice, k: int, first: str | bool, last: str | bool) -> list[Node]:
        """The product of 128 rows in L0A and 128 columns in L0B, some rows at a time, so that one
        piece leaves while the next is computed.

        Arguments:
          k: columns of both.
          first, last: whether it begins a sum, and whether the sum leaves then.
        """
        m, n, rows = self.memory, self.c.n, self.memory.rows
        piece = Slice(m.pieces, f"product * {m.pieces.count}", rows * SUB)
        a = Slice(m.a, f"side * {m.a.count} + piece * {rows * k}", rows * k)
        b = Slice(m.b, f"side * {m.b.count}", SUB * k)
        begins = {True: "true", False: "false"}.get(first, str(first))  # type: ignore[call-overload]
        out = Fixpipe(to.at(f"piece * {rows * n}"), piece, rows, SUB, n)
        body = [
            Let("product", f"Mod(pieceTurn + piece, {m.pieces.slots})"),
            *when(first, [WaitFlag("FIX", "M", "product")]),
            Mmad(piece, a, b, rows, SUB, k, begins),
            *when(last, _leaves([out], "product")),
        ]
        return [For("piece", 0, SUB // rows, body)]

    def minus(self, to: Slice) -> list[Node]:
        """Adds −r, 16 rows of which two are not zero, times ones."""
        m, l1 = self.memory, self.memory.l1
        to_a = Slice(m.a, f"side * {m.a.count}", SUB * LEAST)
        to_b = Slice(m.b, f"side * {m.b.count}", SUB * LEAST)
        loads = [
            LoadData(to_a, l1["minus"].slot("slot"), SUB // 16, 1, transposed=True),
            LoadData(to_b, l1["ones"].at(), SUB // 16, 1),
        ]
        return [For("last", 0, 1, self.turn(loads, self.in_pieces(to, LEAST, False, True)))]

    def turn(self, loads: Sequence[Node], multiply: Sequence[Node]) -> list[Node]:
        """``loads`` fill the side of L0A and L0B whose turn it is; then ``multiply``."""
        return [
            Let("side", "Mod(l0Turn, 2)"),
            WaitFlag("M", "MTE1", "side"),
            *loads,
            SetFlag("MTE1", "M", "side"),
            WaitFlag("MTE1", "M", "side"),
            *multiply,
            Barrier("M"),
            SetFlag("M", "MTE1", "side"),
            Advance("l0Turn"),
        ]

    # Products that are added up over the sub-tiles of a block.

    def accumulated(
        self,
        loads: list[Node],
        left: Slice,
        to: Slice,
        stride: int,
        sums: Slice | None = None,
        summed: str | bool = False,
        begins: str = "row == 0",
        ends: str = "",
    ) -> list[Node]:
        """Adds one sub-tile, ``row``, to [128, 128]·[128, 64], which leaves for ``to`` after the
        last; and its row sums to ``sums``.

        Arguments:
          loads: bring the left matrix to ``left`` and the right one to its slot in L1.
          summed: whether the rows are added up too.
          begins, ends: whether it is the first and the last of what is added up; by default of its
            block.
        """
        m, n = self.memory, self.c.n
        right = Slice(m.l1["right"], f"slot * {m.l1['right'].count}", SUB * CHUNK)
        loads_0 = [*_left_in(m.a, left, SUB), *_right_in(m.b, right, CHUNK, SUB, rows=SUB)]
        product = m.out.slot("chunk" if m.out.slots > 1 else 0)
        ends = ends or f"row == {n - SUB}"
        wait = If(begins, [WaitFlag("FIX", "M", m.of_out)])
        multiply: list[Node] = [wait, self._times(product, 0, CHUNK, begins)]
        leave = [Fixpipe(to, product, SUB, CHUNK, stride)]
        if sums is not None and m.sums is not None:
            at = SUB * CHUNK
            ones = _right_in(m.b, m.l1["ones"].at(), LEAST, SUB, rows=SUB, at=at)
            loads_0 += when(summed, ones)
            multiply += when(summed, [self._times(m.sums.at(), at, LEAST, begins)])
            leave += when(summed, [Fixpipe(sums, m.sums.at(), SUB, LEAST, LEAST)])
        return [
            Let("slot", "Mod(pairTurn, 2)"),
            WaitFlag("MTE1", "MTE2", "2 + slot"),
            *loads,
            SetFlag("MTE2", "MTE1", "2 + slot"),
            WaitFlag("MTE2", "MTE1", "2 + slot"),
            *self.turn(loads_0, multiply),
            If(ends, _leaves(leave, m.of_out)),
            SetFlag("MTE1", "MTE2", "2 + slot"),
            Advance("pairTurn"),
        ]

    def _times(self, to: Slice, at: int, n: int, first: str) -> Mmad:
        """A sub-tile of 128 × 128 in L0A times ``n`` columns ``at`` a place in L0B."""
        m = self.memory
        a = Slice(m.a, f"side * {m.a.count}", m.a.count)
        b = Slice(m.b, f"side * {m.b.count}" + (f" + {at}" if at else ""), SUB * n)
        return Mmad(to, a, b, SUB, n, SUB, first)


def _left_in(to: Buffer, source: Slice, k: int) -> list[Node]:
    """Loads k columns of 128 rows from L1 into the side of L0A."""
    place = Slice(to, f"side * {to.count} + i * {k * 16}", 16 * k)
    return [For("i", 0, SUB // 16, [LoadData(place, source.at("i * 256"), k // 16, SUB // 16)])]


def _right_in(
    to: Buffer, source: Slice, n: int, k: int, *, rows: int | None = None, at: int = 0
) -> list[Node]:
    """Loads a right matrix from L1 into the side of L0B.

    Arguments:
      source: [n, k], or [k, n] of a matrix that has ``rows`` rows.
      at: elements that stand before it.
    """
    before = f" + {at}" if at else ""
    place = Slice(to, f"side * {to.count}{before} + i * {n * 16}", 16 * n)
    if rows is None:
        load = LoadData(place, source.at(f"i * {n * 16}"), n // 16, 1)
    else:
        load = LoadData(place, source.at("i * 256"), n // 16, rows // 16, transposed=True)
    return [For("i", 0, k // 16, [load])]


def _leaves(out: Sequence[Node], flag: Expr) -> list[Node]:
    """A product that is complete leaves the cube unit by ``out``, and its place is free again."""
    return [
        SetFlag("M", "FIX", flag),
        WaitFlag("M", "FIX", flag),
        *out,
        SetFlag("FIX", "M", flag),
    ]
