"""What the vector cores compute before the keys are shifted where `auto` chooses for each key head
whether κ is taken off (core/choice.py).
"""

from __future__ import annotations

from typing import Any

from npu_bridge import stages
from npu_bridge.cores.context import Context
from npu_bridge.cores.function import Output, VectorFunction, inputs_of
from npu_bridge.cores.slabs import computed, copy, padded_load, slab, spread_units
from npu_bridge.expressions import Scalar
from npu_bridge.instructions import Duplicate, RowsOut
from npu_bridge.ir import Barrier, Buffer, For, Function, If, Let, Node
from npu_bridge.layout import SINGLE, SUB
from npu_bridge.lower import Vector
from npu_bridge.memory import Memory

_ROWS = 64  # of keys that are loaded at once
_TILES = 16  # of queries whose sums are loaded at once
SAMPLE = 32  # rows of a query tile that the choice looks at
_SUMS = ("total", "square")


def queries(c: Context, ub: Memory, ramp: Buffer) -> Function:
    """Σq and Σq² by channel, over the first rows of each query tile."""
    f = VectorFunction(ub, "Moments", alone=True, ramp=ramp)
    source = f.temporary("rowsIn", c.dtype, SAMPLE * c.d)
    sums = {n: f.temporary(n, "float", SAMPLE * c.d) for n in _SUMS}
    rows = {n: f.temporary(f"{n}Row", "float", c.d) for n in _SUMS}
    values = {
        "x": Vector(source.at(), SAMPLE, c.d),
        **{n: Vector(b.at(), SAMPLE, c.d) for n, b in sums.items()},
    }
    adding = _lowered(f, stages.moments(c.kernel, SAMPLE), values, sums, sums)
    summing = _lowered(f, stages.moment_rows(c.kernel, SAMPLE), values, rows)
    at = f"({c.query_row('start')}) * {c.d}"
    loads: list[Node] = [
        Let("valid", f"Max(0, Min({SAMPLE}, queryLength - start))"),
        *padded_load(
            source.at(), c.globals["query"].at(at), SAMPLE, "valid", c.d, f"(rowStride - 1) * {c.d}"
        ),
    ]
    stores: list[Node] = [
        copy(c.globals["moments"].at(f"(int64_t(item) * 2 + {i}) * {c.d}"), b.at(), c.d)
        for i, b in enumerate(rows.values())
    ]
    body: list[Node] = [
        Let("item", "unit"),
        *c.item(),
        *_cleared(sums),
        *slab(SINGLE, loads, adding, []),
        *computed(summing, stores),
    ]
    comment = "Sums of some queries of each tile and of their squares."
    return f.done(comment, spread_units("batch * heads * queryTiles", body))


def _cleared(buffers: dict[str, Buffer]) -> list[Node]:
    zeros = [Duplicate(b.at(), Scalar(0), b.count) for b in buffers.values()]
    return [Barrier("V"), *zeros]


def keys(c: Context, ub: Memory, ramp: Buffer) -> Function:
    """κ of each key block, and Σ(k − κ)² by channel, from half of the keys."""
    f = VectorFunction(ub, "Spreads", alone=True, ramp=ramp)
    rows = _ROWS if c.d <= SUB else _ROWS // 2
    source = f.temporary("keysIn", c.dtype, rows * c.d, 2)
    sums = {n: f.temporary(n, "float", rows * c.d) for n in _SUMS}
    whole = {n: f.temporary(f"{n}Row", "float", c.d) for n in _SUMS}
    out = {"kappa": f.temporary("kappaOut", c.dtype, c.d)}
    out["spread"] = f.temporary("spreadOut", "float", c.d)
    values = {
        "x": Vector(source.slot("slot"), rows, c.d),
        **{n: Vector(b.at(), rows, c.d) for n, b in sums.items()},
    }
    row_values = {n: Vector(b.at(), 1, c.d) for n, b in whole.items()}
    row_values |= {n: Scalar(f"static_cast<float>({n})") for n in ("count", "looked")}
    adding = _lowered(f, stages.moments(c.kernel, rows), values, sums, sums)
    summing = _lowered(f, stages.moment_rows(c.kernel, rows), values, whole)
    finding = _lowered(f, stages.spread(c.kernel), row_values, out)
    at = f"((int64_t(entry) * keyLength + first) * kvHeads + kvHead) * {c.d}"
    gap = f"(kvHeads - 1) * {c.d}"
    loads: list[Node] = [
        Let("first", f"j * {c.n} + slab"),
        Let("valid", f"Max(0, Min({rows}, keys - first))"),
        *padded_load(source.slot("slot"), c.globals["key"].at(at), rows, "valid", c.d, gap),
    ]
    block = "((int64_t(entry) * kvHeads + kvHead) * keyBlocks + j)"
    stores: list[Node] = [
        copy(c.globals["kappa"].at(f"{c.kappa_row('j')} * {c.d}"), out["kappa"].at(), c.d),
        copy(c.globals["spread"].at(f"{block} * {c.d}"), out["spread"].at(), c.d),
    ]
    step = 2 * rows  # every other slab is looked at
    slot = Let("slot", f"Mod(Div(slab, {step}), 2)")
    work: list[Node] = [
        *_cleared(sums),
        For("slab", 0, c.n, [slot, *slab("slot", loads, adding, [])], step),
        *computed([*summing, *finding], stores),
    ]
    body: list[Node] = [
        *c.key_blocks(),
        Let("count", f"Min({c.n}, keys - j * {c.n})"),
        Let("looked", f"Div(count, {step}) * {rows} + Min({rows}, Mod(count, {step}))"),
        If("count > 0", work),
    ]
    comment = "κ of each key block, and how far its keys are from it."
    return f.done(comment, spread_units("batch * kvHeads * keyBlocks", body))


def heads(c: Context, ub: Memory, ramp: Buffer) -> Function:
    """Whether κ is taken off the keys of each head."""
    f = VectorFunction(ub, "Choose", alone=True, ramp=ramp)
    tiles = {n: f.temporary(f"{n}In", "float", _TILES * c.d) for n in _SUMS}
    of_tiles = {n: f.temporary(f"{n}Sum", "float", _TILES * c.d) for n in _SUMS}
    of_queries = {n: f.temporary(n, "float", c.d) for n in _SUMS}
    kappa = f.temporary("kappaIn", c.dtype, c.d)
    spread = f.temporary("spreadIn", "float", c.d)
    sums = {n: f.temporary(n, "float", 8) for n in ("offset", "power", "around")}
    out = f.temporary("chosenOut", "float", 8)
    values = {
        **{n: Vector(b.at(), 1, c.d) for n, b in of_queries.items()},
        **{n: Vector(b.at(0, 1), 1, 1) for n, b in sums.items()},
        "kappa": Vector(kappa.at(), 1, c.d),
        "spread": Vector(spread.at(), 1, c.d),
        "count": Scalar("count"),
        "blocks": Scalar("static_cast<float>(keyBlocks)"),
        "keys": Scalar("static_cast<float>(keys)"),
        "scale": Scalar("scale"),
    }
    rows = {n: Vector(b.at(), _TILES, c.d) for n, b in of_tiles.items()}
    more = {f"{n}2": Vector(b.at(), _TILES, c.d) for n, b in tiles.items()}
    adding = _lowered(f, stages.moment_tiles(c.kernel, _TILES), rows | more, of_tiles, of_tiles)
    summing = _lowered(f, stages.moment_rows(c.kernel, _TILES), rows, of_queries)
    block = _lowered(f, stages.choice_of_block(c.kernel), values, sums, sums)
    deciding = _lowered(f, stages.chosen(c.kernel), values, {"chosen": out})
    first = "((int64_t(entry) * heads + kvHead * groups) * queryTiles + tile) * 2"
    loads: list[Node] = [Let("valid", f"Min({_TILES}, groups * queryTiles - tile)")]
    for i, b in enumerate(tiles.values()):
        at = c.globals["moments"].at(f"({first} + {i}) * {c.d}")
        loads += padded_load(b.at(), at, _TILES, "valid", c.d, c.d)
    of_block = "((int64_t(entry) * kvHeads + kvHead) * keyBlocks + j)"
    loads_of_block: list[Node] = [
        copy(kappa.at(), c.globals["kappa"].at(f"{c.kappa_row('j')} * {c.d}"), c.d),
        copy(spread.at(), c.globals["spread"].at(f"{of_block} * {c.d}"), c.d),
    ]
    # The rows that were looked at: fewer of a last tile that is not full.
    last = f"Min({SAMPLE}, Mod(queryLength, {c.block_q}))"
    looked = f"groups * (Div(queryLength, {c.block_q}) * {SAMPLE} + {last})"
    body: list[Node] = [
        Let("kvHead", "Mod(unit, kvHeads)"),
        Let("entry", "Div(unit, kvHeads)"),
        c.keys_of("entry"),
        Let("count", f"static_cast<float>({looked})", "float"),
        *_cleared(of_tiles | sums),
        For("tile", 0, "groups * queryTiles", slab(SINGLE, loads, adding, []), _TILES),
        *summing,
        For("j", 0, f"CeilDiv(keys, {c.n})", slab(SINGLE, loads_of_block, block, [])),
        *computed(deciding, [RowsOut(c.globals["takesKappa"].at("unit"), out.at(0, 1), 1, 1, 0)]),
    ]
    comment = "1 where κ is taken off the keys of a head, else 0."
    return f.done(comment, spread_units("batch * kvHeads", body))


def _lowered(
    f: VectorFunction,
    traced: stages.Trace,
    values: dict[str, Any],
    to: dict[str, Buffer],
    old: dict[str, Buffer] | None = None,
) -> list[Node]:
    """The instructions of a stage whose outputs are left in ``to``, where ``old`` ones may lie."""
    outputs = {}
    for name, var in traced.outputs.items():
        size = int(var.aval.size)
        outputs[var] = Output(to[name].at(0, size), (old or {}).get(name))
    return f.lowered(traced.equations, inputs_of(traced.inputs, values), outputs)
