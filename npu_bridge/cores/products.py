"""The cube core's memories, and the parts of which its products are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from npu_bridge.cores.context import Context
from npu_bridge.instructions import Fixpipe, LoadData, MatrixIn, Mmad
from npu_bridge.ir import Advance, Barrier, Buffer, For, If, Let, Node, SetFlag, Slice, WaitFlag
from npu_bridge.layout import LEAST, SUB
from npu_bridge.memory import Memory
from pasa_jax.core.errors import PlanError

_MEMORIES = ("L1", "L0A", "L0B", "L0C")


@dataclass(frozen=True)
class CubeMemory:
    """The buffers of the cube core, all double-buffered but the ones.

    Arguments:
      l1: "query", "key", "left" and "right"; "ones" and "minus" where the kernel has them.
      a, b, c: left matrix, right matrix and product.
      chunk_d, chunk_e: columns of keys and of values that are multiplied at once.
    """

    memories: dict[str, Memory]
    l1: dict[str, Buffer]
    a: Buffer
    b: Buffer
    c: Buffer
    chunk_d: int
    chunk_e: int

    @staticmethod
    def of(c: Context) -> CubeMemory:
        memories = {m: Memory.of(c.kernel.schedule.target, m) for m in _MEMORIES}
        chunk_d, chunk_e = (SUB if size % SUB == 0 else 64 for size in (c.d, c.e))
        wide = max(chunk_d, chunk_e)
        stay = memories["L1"].stay
        l1 = {
            "query": stay("queryL1", c.dtype, SUB * c.d, 2, "query tile, Nz"),
            "key": stay("keyL1", c.dtype, SUB * c.d, 2, "keys of a sub-tile, Nz"),
            "left": stay("leftL1", c.dtype, SUB * SUB, 2, "P of a sub-tile, Nz"),
            "right": stay("rightL1", c.dtype, SUB * wide, 2, "values of a sub-tile, Nz"),
        }
        if "ones" in c.full.products:
            l1["ones"] = stay("onesL1", c.dtype, SUB * LEAST, note="ones, Nz")
        if c.refers:
            l1["minus"] = stay("minusL1", c.dtype, LEAST * SUB, 2, "−r by rows, Nz")
            if "ones" not in l1:
                raise PlanError("the shift 'reference' wants float32 statistics")
        a = memories["L0A"].stay("a", c.dtype, SUB * SUB, 2, "left matrix, Zz")
        b = memories["L0B"].stay("b", c.dtype, SUB * SUB, 2, "right matrix, Zn")
        product = memories["L0C"].stay("c", "float", SUB * SUB, 2, "product in float32, Nz")
        return CubeMemory(memories, l1, a, b, product, chunk_d, chunk_e)


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
            block = "(int64_t(entry) * kvHeads + kvHead) * keyBlocks + j"
            at = f"(({block}) * {c.n} + {offset}) * {size} + {column}"
            return [matrix_in(to, c.globals["valueCopy"].at(at), rows, width, str(size))]
        row = f"j * {c.n} + {offset}"
        at = f"((int64_t(entry) * keyLength + {row}) * kvHeads + kvHead) * {size} + {column}"
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
        head = "(int64_t(entry) * kvHeads + kvHead)"
        at = f"(({head} * keyBlocks + j) * {c.n} + {offset}) * {c.d}"
        return [matrix_in(to, c.globals["shiftedKey"].at(at), SUB, c.d, str(c.d))]

    def query_times(
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
            *self._collected(product, to, n, stride),
            Advance("keyTurn"),
        ]

    def _by_columns(self, n: int) -> For:
        """The query tile times n rows of keys in L1, over the columns of both."""
        size, d, chunk = SUB * self.c.d, self.c.d, self.memory.chunk_d
        left = Slice(self.memory.l1["query"], f"querySlot * {size} + k * {SUB}", size)
        right = Slice(self.memory.l1["key"], f"slot * {size} + k * {n}", n * d)
        multiply = self._multiplied(left, right, n, chunk, right_rows=None, first="k == 0")
        return For("k", 0, d, multiply, chunk)

    def accumulated(
        self, left: list[Node], right: list[Node], to: Slice, n: int, stride: int
    ) -> list[Node]:
        """Σ over the sub-tiles ``sub`` of a block: what ``left`` loads times what ``right`` does,
        or times ones where that is nothing.
        """
        l1 = self.memory.l1
        a = Slice(l1["left"], f"slot * {l1['left'].count}", SUB * SUB)
        b = Slice(l1["right"], f"slot * {l1['right'].count}", SUB * n) if right else l1["ones"].at()
        body: list[Node] = [
            Let("slot", "Mod(pairTurn, 2)"),
            WaitFlag("MTE1", "MTE2", "2 + slot"),
            *left,
            *right,
            SetFlag("MTE2", "MTE1", "2 + slot"),
            WaitFlag("MTE2", "MTE1", "2 + slot"),
            *self._multiplied(a, b, n, SUB, right_rows=SUB, first="sub == 0"),
            SetFlag("MTE1", "MTE2", "2 + slot"),
            Advance("pairTurn"),
        ]
        return self._collected([For("sub", 0, self.c.n, body, SUB)], to, n, stride)

    def _multiplied(
        self, left: Slice, right: Slice, n: int, k: int, *, right_rows: int | None, first: str
    ) -> list[Node]:
        """One product of the cube unit, [128, k]·[k, n], added to c.

        Arguments:
          left: k columns of a matrix of 128 rows in L1.
          right: [n, k] in L1, or [k, n] of a matrix that has ``right_rows`` rows.
        """
        a, b = self.memory.a, self.memory.b
        to_a = Slice(a, f"side * {a.count} + i * {k * 16}", 16 * k)
        to_b = Slice(b, f"side * {b.count} + i * {n * 16}", 16 * n)
        load_a = LoadData(to_a, left.at("i * 256"), k // 16, SUB // 16)
        if right_rows is None:
            load_b = LoadData(to_b, right.at(f"i * {n * 16}"), n // 16, 1)
        else:
            stride = right_rows // 16
            load_b = LoadData(to_b, right.at("i * 256"), n // 16, stride, transposed=True)
        loads = [For("i", 0, SUB // 16, [load_a]), For("i", 0, k // 16, [load_b])]
        return self._turn("side", loads, n, k, first)

    def minus_product(self) -> list[Node]:
        """Adds −r, 16 rows of which two are not zero, times ones."""
        a, b, l1 = self.memory.a, self.memory.b, self.memory.l1
        to_a = Slice(a, f"last * {a.count}", SUB * LEAST)
        to_b = Slice(b, f"last * {b.count}", SUB * LEAST)
        load_a = LoadData(to_a, l1["minus"].slot("slot"), SUB // 16, 1, transposed=True)
        load_b = LoadData(to_b, l1["ones"].at(), SUB // 16, 1)
        return self._turn("last", [load_a, load_b], SUB, LEAST, "false")

    def _turn(self, side: str, loads: Sequence[Node], n: int, k: int, first: str) -> list[Node]:
        """``loads`` fill the ``side`` of L0A and L0B whose turn it is; their product,
        [128, k]·[k, n], is added to c, or is c where it is the first.
        """
        m = self.memory
        a, b = (Slice(x, f"{side} * {x.count}", x.count) for x in (m.a, m.b))
        product = Slice(m.c, f"product * {m.c.count}", m.c.count)
        return [
            Let(side, "Mod(l0Turn, 2)"),
            WaitFlag("M", "MTE1", side),
            *loads,
            SetFlag("MTE1", "M", side),
            WaitFlag("MTE1", "M", side),
            Mmad(product, a, b, SUB, n, k, first),
            Barrier("M"),
            SetFlag("M", "MTE1", side),
            Advance("l0Turn"),
        ]

    def _collected(self, body: list[Node], to: Slice, n: int, stride: int) -> list[Node]:
        """``body`` adds up a product in c, which then leaves, rounded to the type of ``to``."""
        c = self.memory.c
        return [
            Let("product", "Mod(l0cTurn, 2)"),
            WaitFlag("FIX", "M", "product"),
            *body,
            SetFlag("M", "FIX", "product"),
            WaitFlag("M", "FIX", "product"),
            Fixpipe(to, Slice(c, f"product * {c.count}", c.count), SUB, n, stride),
            SetFlag("FIX", "M", "product"),
            Advance("l0cTurn"),
        ]
