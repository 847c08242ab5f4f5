"""What the programs of all cores are made from, and the loop over a core's items."""

from __future__ import annotations

from dataclasses import dataclass, field

from npu_bridge import cut, interface, numbers, stages
from npu_bridge.dtypes import C_TYPES
from npu_bridge.ir import (
    Barrier,
    Buffer,
    Comment,
    For,
    Function,
    InitSocState,
    Let,
    Node,
    SyncAll,
)
from npu_bridge.layout import DEPTH, VECTOR_CORES, Slabs
from npu_bridge.memory import Memory
from npu_bridge.specification import Kernel


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
      globals: the arrays in global memory, by name: arguments, then the workspace.
      workspace: of those, the arrays of the workspace.
    """

    kernel: Kernel
    slabs: Slabs
    full: cut.Step
    masked: cut.Step
    globals: dict[str, Buffer]
    workspace: list[numbers.Array]

    @staticmethod
    def of(kernel: Kernel, slabs: Slabs) -> Context:
        full = cut.step(kernel, slabs.rows, masked=False)
        arrays = numbers.workspace(kernel, full.products)
        arguments = {name: (dtype, "") for name, dtype in interface.arguments(kernel).items()}
        types = arguments | {a.name: (a.dtype, a.note) for a in arrays}
        places = {n: Buffer(n, "GM", dtype, 0, note=note) for n, (dtype, note) in types.items()}
        return Context(
            kernel,
            slabs,
            full,
            cut.step(kernel, slabs.masked, masked=True),
            places,
            arrays,
        )

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

    def keys_of(self, entry: str) -> Let:
        """How many keys a batch entry has."""
        if self.kernel.lengths:
            return Let("keys", f"Max(0, Min(keyLength, lengths.GetValue({entry})))")
        return Let("keys", "keyLength")

    def key_blocks(self) -> list[Node]:
        """What the unit of work ``unit`` is where each is a block of keys."""
        return [
            Let("j", "Mod(unit, keyBlocks)"),
            Let("kvHead", "Mod(Div(unit, keyBlocks), kvHeads)"),
            Let("entry", "Div(unit, keyBlocks * kvHeads)"),
            self.keys_of("entry"),
        ]

    def items(self, body: list[Node]) -> list[Node]:
        """The loop over this core's items, and what each is."""
        bounds, names = stages.key_range(self.kernel)
        lets: list[Node] = [
            Let("tile", "Mod(item, queryTiles)"),
            Let("head", "Mod(Div(item, queryTiles), heads)"),
            Let("entry", "Mod(Div(item, queryTiles * heads), batch)"),
            Let("kvHead", "Div(head, groups)"),
            Let("start", "0" if self.kernel.decode else f"tile * {self.block_q}"),
            self.keys_of("entry"),
            Comment("The key tiles that these queries see."),
            *bounds,
            *_part(names["lo"], names["hi"]),
            Let("fullLo", names["full_lo"]),
            Let("fullHi", names["full_hi"]),
        ]
        return [For("item", "core", "items", [*lets, *body], "cores")]


def _part(lo: str, hi: str) -> list[Node]:
    """The key tiles of this item's part of the keys."""
    return [
        Let("part", "Div(item, queryTiles * heads * batch)"),
        Let("lo", f"{lo} + Div(({hi} - {lo}) * part, parts)"),
        Let("tiles", f"{lo} + Div(({hi} - {lo}) * (part + 1), parts) - lo"),
    ]


def slot_of(depth: int, t: str) -> str:
    """The slot, of ``depth`` ones, for tile ``t`` of this item."""
    return f"Mod(tileTurn + {t}, {depth})"


def workspace_slot(t: str) -> str:
    """The slot of the workspace for tile ``t`` of this item, among those of all cores."""
    return f"int64_t(core) * {DEPTH} + {slot_of(DEPTH, t)}"


def query_row(row: str) -> str:
    """Where a row of queries or outputs lies, in rows."""
    return f"int64_t(entry) * queryLength * heads + ({row}) * rowStride + head * headStride"


def whole(body: list[Node]) -> list[Node]:
    """A core's program: what stands first and last in every kernel around ``body``."""
    return [InitSocState(), *body, Barrier("ALL")]


def prologue(work: list[Node]) -> list[Node]:
    """What is done once, before all cores begin with their items."""
    return [*work, *([Barrier("ALL")] if work else []), SyncAll()]
