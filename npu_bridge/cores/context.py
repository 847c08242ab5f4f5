"""What the programs of all cores are made from, and the loop over a core's items."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from npu_bridge import cut, interface, numbers, stages
from npu_bridge.dtypes import C_TYPES
from npu_bridge.expressions import Expr
from npu_bridge.functions import Leaf
from npu_bridge.ir import (
    Advance,
    Assign,
    Barrier,
    Buffer,
    Comment,
    For,
    Function,
    InitSocState,
    Invalidate,
    Let,
    Node,
    SyncAll,
)
from npu_bridge.layout import LEAST, VECTOR_CORES, Slabs
from npu_bridge.memory import Memory
from npu_bridge.specification import Kernel

# Blocks of keys of a head, filled up to whole groups.
GROUPED = f"(CeilDiv(keyBlocks, {LEAST}) * {LEAST})"


@dataclass
class Core:
    """The program of one kind of core.

    Arguments:
      kind: "AIC" (cube) or "AIV" (vector).
      counters: numbers of the core that count turns.
    """

    kind: str
    memories: dict[str, Memory]
    counters: tuple[str, ...]
    functions: list[Function] = field(default_factory=list)
    body: list[Node] = field(default_factory=list)

    def add(self, function: Function) -> Function:
        self.functions.append(function)
        return function


@dataclass(frozen=True)
class Context:
    """A kernel, how its rows are cut into slabs, and what follows from both.

    Arguments:
      full, masked: the loop's body on a slab without and with the mask.
      columns, columns_masked: the same on all rows of a vector core, for what is only columns.
      update: the same on a slab of P·V.
      globals: the arrays in global memory, by name: arguments, then the workspace.
      workspace: of those, the arrays of the workspace.
      unproved: the shift "bound": what query tiles without a proof are computed by.
    """

    kernel: Kernel
    slabs: Slabs
    full: cut.Step
    masked: cut.Step
    columns: cut.Step
    columns_masked: cut.Step
    update: cut.Step
    globals: dict[str, Buffer]
    workspace: list[numbers.Array]
    unproved: Context | None = None

    @staticmethod
    def of(kernel: Kernel, slabs: Slabs, names: dict[str, str] | None = None) -> Context:
        """The context of a kernel.

        Arguments:
          names: how arrays of the workspace are called, where that is not by their own name.
        """
        full = cut.step(kernel, slabs.rows, masked=False)
        half = kernel.schedule.block_q // VECTOR_CORES
        arrays = numbers.workspace(kernel, full.products)
        arguments = {name: (dtype, "") for name, dtype in interface.arguments(kernel).items()}
        types = arguments | {a.name: (a.dtype, a.note) for a in arrays}
        called = names or {}
        places = {
            n: Buffer(called.get(n, n), "GM", dtype, 0, note=note)
            for n, (dtype, note) in types.items()
        }
        c = Context(
            kernel,
            slabs,
            full,
            cut.step(kernel, slabs.masked, masked=True),
            cut.step(kernel, half, masked=False),
            cut.step(kernel, half, masked=True),
            cut.step(kernel, slabs.update, masked=False),
            places,
            arrays,
        )
        if not kernel.bounded:
            return c
        # The other way has the same arrays.
        other = replace(Context.of(kernel.unproved, slabs, names), globals=places)
        return replace(c, unproved=other)

    @property
    def ways(self) -> tuple[Context, ...]:
        """The ways in which a query tile may be computed."""
        return (self,) if self.unproved is None else (self, self.unproved)

    @property
    def n(self) -> int:
        """Keys of a block."""
        return self.kernel.schedule.block_kv

    @property
    def d(self) -> int:
        return self.kernel.head_dim

    @property
    def e(self) -> int:
        return self.kernel.value_head_dim

    @property
    def dtype(self) -> str:
        """The C++ type of query, key, value and output."""
        return C_TYPES[self.kernel.dtype]

    @property
    def block_q(self) -> int:
        return self.kernel.schedule.block_q

    @property
    def half(self) -> int:
        """Rows of a tile that one vector core computes."""
        return self.block_q // VECTOR_CORES

    @property
    def refers(self) -> bool:
        """Whether scores are formed twice, the second time minus a row reference that the first
        ones gave.
        """
        return self.full.refer is not None

    # Which key tile an item's t-th is: of a range, or of the list of its query tile.

    @property
    def tile(self) -> str:
        """The t-th key tile of an item, in the scope of `this_tile`."""
        return "j" if self.kernel.visits else "lo + t"

    @property
    def opens(self) -> str:
        """Whether q·κ of that tile's group of blocks is not there yet."""
        if self.kernel.visits:
            return f"(t == 0) | (Div(j, {LEAST}) != Div(before, {LEAST}))"
        return f"(t == 0) | (Mod(lo + t, {LEAST}) == 0)"

    def this_tile(self) -> list[Node]:
        """What a list says of the t-th tile, and of the one before."""
        if not self.kernel.visits:
            return []
        return [
            Let("listed", "visits.GetValue(visited + t + 1)"),
            Let("j", "Div(listed, 2)"),
            Let("whole", "Mod(listed, 2)"),
            Let("before", "Div(visits.GetValue(visited + Max(t, 1)), 2)"),
        ]

    def _listed(self) -> list[Node]:
        """Where an item's list lies, and how long it is."""
        assert self.kernel.visits is not None
        entry, head = (
            name if axis != "1" else "0"
            for name, axis in zip(("entry", "head"), self.kernel.visits, strict=True)
        )
        heads = "heads" if head == "head" else "1"
        row = f"(int64_t({entry}) * {heads} + {head}) * queryTiles + tile"
        return [
            Let("visited", f"({row}) * (keyBlocks + 1)", "int64_t"),
            Let("tiles", "visits.GetValue(visited)"),
        ]

    @property
    def row_data(self) -> list[Leaf]:
        """What the caller's functions are given of queries and keys."""
        functions = self.kernel.functions
        return [x for x in functions.leaves if x.part != "head_data"] if functions else []

    @property
    def head_data(self) -> list[Leaf]:
        """What they are given of heads."""
        functions = self.kernel.functions
        return [x for x in functions.leaves if x.part == "head_data"] if functions else []

    @property
    def more_counters(self) -> list[str]:
        """Numbers of both kinds of cores that not every kernel has."""
        repaired = ["damagedCores"] if self.kernel.repaired else []
        return [*repaired, *(["sequence"] if self.kernel.packed else [])]

    # Where an entry's queries and keys begin. The sequences of a packed kernel lie one after
    # another; in the workspace sequence b has the query tiles from slot
    # ⌊queryOffsets[b] / block_q⌋ + b on and the key blocks from ⌊keyOffsets[b] / n⌋ + b on, which
    # is room for all of each.

    @property
    def grouped(self) -> str:
        """Rows of κ of a head: as many as whole groups of `LEAST` blocks reach."""
        if self.kernel.packed:  # whose groups begin anywhere
            return f"(keyBlocks + {LEAST})"
        return GROUPED

    @property
    def block_units(self) -> str:
        """How many units of work there are where each is a block of keys."""
        return "kvHeads * keyBlocks" if self.kernel.packed else "batch * kvHeads * keyBlocks"

    @property
    def rows_end(self) -> str:
        """The end of an entry's rows of queries, in the scope of `queries_of`."""
        return "queries" if self.kernel.packed else "queryLength"

    def queries_of(self, entry: str) -> list[Node]:
        """How many queries a sequence has; elsewhere every entry has as many."""
        return [Let("queries", _length("queryOffsets", entry))] if self.kernel.packed else []

    def query_row(self, row: str) -> str:
        """Where a row of queries or outputs lies, in rows."""
        first = "int64_t(entry) * queryLength * heads"
        if self.kernel.packed:
            first = "int64_t(queryOffsets.GetValue(entry)) * heads"
        return f"{first} + ({row}) * rowStride + head * headStride"

    def key_row(self, row: str) -> str:
        """Where a row of keys or values lies, in rows."""
        first = "int64_t(entry) * keyLength"
        if self.kernel.packed:
            first = "int64_t(keyOffsets.GetValue(entry))"
        return f"(({first} + {row}) * kvHeads + kvHead)"

    def block_row(self, j: str) -> str:
        """Which of all blocks of keys is an entry's block j."""
        if self.kernel.packed:
            return f"(int64_t(kvHead) * keyBlocks + {self._first_block('entry')} + {j})"
        return f"((int64_t(entry) * kvHeads + kvHead) * keyBlocks + {j})"

    def tile_row(self, tile: str) -> str:
        """Which of all query tiles is an entry's ``tile``."""
        if self.kernel.packed:
            return f"(int64_t(head) * queryTiles + {self._first_tile('entry')} + {tile})"
        return f"((int64_t(entry) * heads + head) * queryTiles + {tile})"

    def kappa_end(self) -> str:
        """Up to which j rows of κ are an entry's."""
        if not self.kernel.packed:
            return self.grouped
        own = f"{self._first_block('(entry + 1)')} - ({self._first_block('entry')})"
        return f"{own} + Pick(entry == batch - 1, {LEAST}, 0)"

    def _first_block(self, entry: str) -> str:
        return f"Div(keyOffsets.GetValue({entry}), {self.n}) + {entry}"

    def _first_tile(self, entry: str) -> str:
        return f"Div(queryOffsets.GetValue({entry}), {self.block_q}) + {entry}"

    @staticmethod
    def _sequence(first: str, slot: str) -> list[Node]:
        """The sequence that a slot is of; ``first`` is the first slot of that named ``other``."""
        count = Advance("sequence", f"Pick({first} <= {slot}, 1, 0)")
        return [
            Assign("sequence", 0),
            For("other", 1, "batch", [count]),
            Let("entry", "sequence"),
        ]

    def keys_of(self, entry: str) -> Let:
        """How many keys a batch entry has."""
        if self.kernel.packed:
            return Let("keys", _length("keyOffsets", entry))
        if self.kernel.lengths:
            return Let("keys", f"Max(0, Min(keyLength, lengths.GetValue({entry})))")
        return Let("keys", "keyLength")

    def kappa_row(self, j: str) -> str:
        """Which row of all κ is that of block j: each head has whole groups of `LEAST`."""
        if self.kernel.packed:
            return f"(int64_t(kvHead) * {self.grouped} + {self._first_block('entry')} + {j})"
        return f"((int64_t(entry) * kvHeads + kvHead) * {self.grouped} + {j})"

    def key_blocks(self) -> list[Node]:
        """What the unit of work ``unit`` is where each is a block of keys."""
        if self.kernel.packed:
            return [
                Let("blockSlot", "Mod(unit, keyBlocks)"),
                Let("kvHead", "Div(unit, keyBlocks)"),
                *self._sequence(self._first_block("other"), "blockSlot"),
                Let("j", f"blockSlot - ({self._first_block('entry')})"),
                self.keys_of("entry"),
            ]
        return [
            Let("j", "Mod(unit, keyBlocks)"),
            Let("kvHead", "Mod(Div(unit, keyBlocks), kvHeads)"),
            Let("entry", "Div(unit, keyBlocks * kvHeads)"),
            self.keys_of("entry"),
        ]

    def item(self) -> list[Node]:
        """Which queries the item ``item`` is of."""
        if self.kernel.packed:
            return [
                Let("tileSlot", "Mod(item, queryTiles)"),
                Let("head", "Div(item, queryTiles)"),
                *self._sequence(self._first_tile("other"), "tileSlot"),
                Let("tile", f"tileSlot - ({self._first_tile('entry')})"),
                Let("start", f"tile * {self.block_q}"),
                *self.queries_of("entry"),
            ]
        return [
            Let("tile", "Mod(item, queryTiles)"),
            Let("head", "Mod(Div(item, queryTiles), heads)"),
            Let("entry", "Mod(Div(item, queryTiles * heads), batch)"),
            Let("start", "0" if self.kernel.decode else f"tile * {self.block_q}"),
        ]

    def damage_at(self, tile: str, core: Expr) -> str:
        """Where in `damage` a vector core of the block says how its rows of a query tile are."""
        if self.kernel.packed:
            return f"{self.tile_row(tile)} * {VECTOR_CORES} + {core}"
        return f"((entry * heads + head) * queryTiles + {tile}) * {VECTOR_CORES} + {core}"

    def items(self, body: list[Node]) -> list[Node]:
        """The loop over this core's items, and what each is."""
        bounds, names = stages.key_range(self.kernel)
        lets: list[Node] = [
            *self.item(),
            Let("kvHead", "Div(head, groups)"),
            self.keys_of("entry"),
            Comment("The key tiles that these queries see."),
            *bounds,
            *self._tiles(names["lo"], names["hi"]),
            Let("fullLo", names["full_lo"]),
            Let("fullHi", names["full_hi"]),
        ]
        return [For("item", "core", "items", [*lets, *body], "cores")]

    def _tiles(self, lo: str, hi: str) -> list[Node]:
        if self.kernel.visits:
            return self._listed()
        return (_all if self.kernel.packed else _part)(lo, hi)


def _part(lo: str, hi: str) -> list[Node]:
    """The key tiles of this item's part of the keys."""
    return [
        Let("part", "Div(item, queryTiles * heads * batch)"),
        Let("lo", f"{lo} + Div(({hi} - {lo}) * part, parts)"),
        Let("tiles", f"{lo} + Div(({hi} - {lo}) * (part + 1), parts) - lo"),
    ]


def _all(lo: str, hi: str) -> list[Node]:
    """The key tiles of an item of a sequence: none where the item begins after its last query."""
    return [Let("lo", lo), Let("tiles", f"Pick(start < queries, {hi} - {lo}, 0)")]


def _length(offsets: str, entry: str) -> str:
    """How long a packed sequence is."""
    return f"{offsets}.GetValue({entry} + 1) - {offsets}.GetValue({entry})"


def slot_of(depth: int, turn: str) -> str:
    """The slot, of ``depth`` ones, for the tile that is the core's ``turn``-th."""
    return f"Mod({turn}, {depth})"


def whole(c: Context, body: list[Node]) -> list[Node]:
    """A core's program: what stands first and last in every kernel around ``body``."""
    first = [] if c.kernel.careful else [InitSocState()]
    return [*first, *body, Barrier("ALL")]


def look_for_damage() -> list[Node]:
    """After all items: counts the cores that have seen damage."""
    count = Advance("damagedCores", "Pick(coreDamage.GetValue(i) != 0.0f, 1, 0)")
    return [
        Barrier("ALL"),
        SyncAll(),
        Invalidate("coreDamage", "float"),
        For("i", 0, f"cores * {VECTOR_CORES}", [count]),
    ]


def prologue(work: list[Node]) -> list[Node]:
    """What is done once, before all cores begin with their items."""
    return [*work, *([Barrier("ALL")] if work else []), SyncAll()]
