"""What the vector cores prepare before the items that are computed again: operands in which nothing
can leave its range, and nothing that is not finite reaches a row that does not see it.
"""

from __future__ import annotations

from npu_bridge import stages
from npu_bridge.cores.context import Context
from npu_bridge.cores.function import Output, VectorFunction, inputs_of
from npu_bridge.cores.slabs import computed, copy, padded_load, slab, spread_units, zero_bits
from npu_bridge.expressions import Scalar
from npu_bridge.instructions import Duplicate, RowsOut
from npu_bridge.ir import Barrier, Buffer, For, Function, If, Let, Node
from npu_bridge.layout import SINGLE
from npu_bridge.lower import Vector
from npu_bridge.memory import Memory

_ROWS = 32  # that are loaded at once


def keys(c: Context, ub: Memory, ramp: Buffer) -> Function:
    """Of each key head: κ of each block over the keys that are finite, K', and the largest
    magnitudes, by which the scores and the sums of values are kept in range.
    """
    f = VectorFunction(ub, "CarefulKeys", alone=True, ramp=ramp)
    k_in = f.temporary("keysIn", c.dtype, _ROWS * c.d)
    v_in = f.temporary("valuesIn", c.dtype, _ROWS * c.e)
    k_out = f.temporary("keysOut", c.dtype, _ROWS * c.d)
    kappa = f.temporary("kappaOut", c.dtype, c.d)
    rows = {name: f.temporary(name, "float", c.d) for name in ("total", "count", "keyTop")}
    value_top = f.temporary("valueTop", "float", c.e)
    numbers = {name: f.temporary(f"{name}Out", "float", 8) for name in ("keyBound", "valueGain")}
    values = {
        "key": Vector(k_in.at(), _ROWS, c.d),
        "value": Vector(v_in.at(), _ROWS, c.e),
        "kappa": Vector(kappa.at(), 1, c.d),
        **{name: Vector(b.at(), 1, c.d) for name, b in rows.items()},
        "valueTop": Vector(value_top.at(), 1, c.e),
        "valid": Scalar("valid"),
    }

    def lowered(traced: stages.Trace, outputs: dict[str, Output]) -> list[Node]:
        inputs = inputs_of(traced.inputs, values)
        return f.lowered(
            traced.equations, inputs, {traced.outputs[n]: x for n, x in outputs.items()}
        )

    sums = {n: Output(rows[n].at(), rows[n]) for n in ("total", "count")}
    adding = lowered(stages.usable_total(c.kernel, _ROWS), sums)
    finding = lowered(stages.usable_kappa(c.kernel), {"kappa": Output(kappa.at())})
    tops = {"keyTop": Output(rows["keyTop"].at(), rows["keyTop"])}
    tops["valueTop"] = Output(value_top.at(), value_top)
    shifting = lowered(stages.usable_keys(c.kernel, _ROWS), {"shifted": Output(k_out.at()), **tops})
    bounding = lowered(
        stages.bounds_of_head(c.kernel), {n: Output(numbers[n].at(0, 1)) for n in numbers}
    )
    block = f"(int64_t(unit) * keyBlocks + j) * {c.n}"
    if c.kernel.packed:
        block = f"{c.block_row('j')} * {c.n}"
    at = c.key_row("first")
    loads: list[Node] = [
        Let("first", f"j * {c.n} + slab"),
        Let("valid", f"Max(0, Min({_ROWS}, keys - first))"),
        *padded_load(
            k_in.at(), c.globals["key"].at(f"{at} * {c.d}"), _ROWS, "valid", c.d, _gap(c.d)
        ),
        *padded_load(
            v_in.at(), c.globals["value"].at(f"{at} * {c.e}"), _ROWS, "valid", c.e, _gap(c.e)
        ),
    ]
    shifted = c.globals["shiftedKey"].at(f"({block} + slab) * {c.d}")
    to_kappa = copy(c.globals["kappa"].at(f"{c.kappa_row('j')} * {c.d}"), kappa.at(), c.d)
    of_block: list[Node] = [
        Barrier("V"),
        *[Duplicate(rows[n].at(), Scalar(0), c.d) for n in ("total", "count")],
        For("slab", 0, c.n, slab(SINGLE, loads, adding, []), _ROWS),
        *computed(finding, [to_kappa]),
        For(
            "slab",
            0,
            c.n,
            slab(SINGLE, loads, shifting, [copy(shifted, k_out.at(), _ROWS * c.d)]),
            _ROWS,
        ),
    ]
    stores: list[Node] = [
        RowsOut(c.globals[n].at("unit"), b.at(0, 1), 1, 1, 0) for n, b in numbers.items()
    ]
    body: list[Node] = [
        Let("kvHead", "Mod(unit, kvHeads)"),
        Let("entry", "Div(unit, kvHeads)"),
        c.keys_of("entry"),
        Barrier("V"),
        Duplicate(rows["keyTop"].at(), Scalar(0), c.d),
        Duplicate(value_top.at(), Scalar(0), c.e),
        For("j", 0, f"CeilDiv(keys, {c.n})", of_block),
        # The cube unit multiplies by whole groups of κ.
        For(
            "j",
            f"CeilDiv(keys, {c.n})",
            c.kappa_end(),
            computed([zero_bits(kappa.at(), c.d)], [to_kappa]),
        ),
        *computed(bounding, stores),
    ]
    comment = "K' of the keys that are finite, and how large they and the values are (eq. 7, 12)."
    return f.done(comment, spread_units("batch * kvHeads", body))


def _gap(width: int) -> str:
    return f"(kvHeads - 1) * {width}"


def values(c: Context, ub: Memory, ramp: Buffer) -> Function:
    """The values that the cube unit multiplies: zeros where key or value are not finite."""
    f = VectorFunction(ub, "CarefulValues", alone=True, ramp=ramp)
    k_in = f.temporary("keysIn", c.dtype, _ROWS * c.d)
    v_in = f.temporary("valuesIn", c.dtype, _ROWS * c.e)
    v_out = f.temporary("valuesOut", c.dtype, _ROWS * c.e)
    traced = stages.usable_values(c.kernel, _ROWS)
    given = {
        "key": Vector(k_in.at(), _ROWS, c.d),
        "value": Vector(v_in.at(), _ROWS, c.e),
        "valid": Scalar("valid"),
        "gain": Scalar("gain"),
    }
    inputs = inputs_of(traced.inputs, given)
    compute = f.lowered(traced.equations, inputs, {traced.outputs["values"]: Output(v_out.at())})
    at = c.key_row("first")
    loads = [
        *padded_load(
            k_in.at(), c.globals["key"].at(f"{at} * {c.d}"), _ROWS, "valid", c.d, _gap(c.d)
        ),
        *padded_load(
            v_in.at(), c.globals["value"].at(f"{at} * {c.e}"), _ROWS, "valid", c.e, _gap(c.e)
        ),
    ]
    to = c.globals["valueCopy"].at(f"(int64_t(unit) * {c.n} + slab) * {c.e}")
    rows: list[Node] = [
        Let("first", f"j * {c.n} + slab"),
        Let("valid", f"Max(0, Min({_ROWS}, keys - first))"),
        *slab(SINGLE, loads, compute, [copy(to, v_out.at(), _ROWS * c.e)]),
    ]
    body: list[Node] = [
        *c.key_blocks(),
        Let("gain", "valueGain.GetValue(entry * kvHeads + kvHead)", "float"),
        If(f"j * {c.n} < keys", [For("slab", 0, c.n, rows, _ROWS)]),
    ]
    comment = "The values, zeros where a key or its value is not finite or beyond the last key."
    return f.done(comment, spread_units(c.block_units, body))
