"""The loop's body, cut at its matrix products: products for the cube unit, and the stretches of
equations between them, stages, for the vector unit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from npu_bridge.dtypes import C_TYPES
from npu_bridge.expressions import Scalar
from npu_bridge.lower import Equation, Var
from npu_bridge.specification import COLUMNS, Kernel
from npu_bridge.stages import Trace, loop_body, needed
from pasa_jax.core.errors import LoweringError


@dataclass(frozen=True)
class Product:
    """A product for the cube unit.

    Arguments:
      name: of the array of the workspace in which its result is handed over.
      columns: of the result.
      dtype: the C++ type in which it is handed over.
    """

    name: str
    columns: int
    dtype: str


@dataclass(frozen=True)
class Stage:
    """A stretch of equations for the vector unit, with what it reads and makes, by name."""

    equations: list[Equation]
    inputs: dict[str, Var]
    outputs: dict[str, Any]


@dataclass(frozen=True)
class Parts:
    """A stage in two parts: what is computed slab by slab, and what is only columns, for all rows
    at once.

    Arguments:
      kept: the columns that the second part takes over from the first, by name, and their types.
    """

    slab: Stage
    columns: Stage
    kept: dict[str, str]


@dataclass(frozen=True)
class Step:
    """One key tile: products and the vector stages between them.

    Arguments:
      products: by what they multiply with: "key", "raw", "kappa", "value", "ones".
      refer: from the first scores to the row reference that is taken off the second ones, in two
        halves "high" and "low" of the inputs' type; None but for the shift "reference".
      softmax: from the scores to the probabilities, m, l and f.
      accumulate: the output.
      carried: columns that a stage takes over from the one before.
    """

    products: dict[str, Product]
    refer: Stage | None
    softmax: Parts
    accumulate: Parts
    carried: tuple[str, ...]


# The array in which a product is handed over, by what is multiplied with.
_RESULTS = {
    "key": "scores",
    "raw": "shifted",
    "kappa": "offsets",
    "value": "update",
    "ones": "sums",
}
_STATE = ("m", "l", "o", "f")


@lru_cache(maxsize=64)
def step(kernel: Kernel, rows: int, *, masked: bool) -> Step:
    """The loop's body on one slab, cut at its products."""
    traced = loop_body(kernel, rows, masked=masked)
    names = {var: name for name, var in traced.inputs.items()}
    cube = _find_products(traced, names)
    level, last = _levels(traced, cube.waits)
    given = set(traced.inputs.values())  # a state that is not changed, or the bound's reference
    outputs = {n: x for n, x in traced.outputs.items() if x not in given}
    if any(isinstance(x, Scalar) for x in outputs.values()):
        raise LoweringError("a state of the softmax is a plain number")
    vector = [e for e in traced.equations if e.output not in cube.inside] + cube.more
    level |= {e.output: level[e.inputs[0]] for e in cube.more}
    repeated = _repeated(vector, set(cube.results) | {traced.inputs[n] for n in _STATE})
    known = {**names, **cube.results}
    carried = _carried(vector, level, last, known, repeated)
    stages = []
    for at in range(1, last + 1):
        body = [e for e in vector if level[e.output] == at or e.output in repeated]
        wanted = {n: x for n, x in outputs.items() if level.get(x, 1) == at}
        wanted |= {n: x for n, x in carried.items() if level[x] == at}
        if at < last:
            wanted |= {n: x for x, n in cube.given.items() if level.get(x, 1) == at}
        before = {x: n for n, x in carried.items() if level[x] < at}
        stages.append(_stage(body, {**known, **before}, wanted))
    refer = stages[0] if last == 3 else None
    softmax = _in_parts(stages[-2], "masked" if masked else "full")
    accumulate = _in_parts(stages[-1], "update")
    return Step(cube.products, refer, softmax, accumulate, tuple(carried))


def _in_parts(stage: Stage, name: str) -> Parts:
    """The two parts of a stage; what they hand over is called after ``name``."""
    made = _by_slabs(stage)
    first = [e for e in stage.equations if e.output in made]
    rest = [e for e in stage.equations if e.output not in made]
    read = {x for e in rest for x in e.inputs}
    between = [e.output for e in first if e.output in read]
    kept = {f"{name}{i}": x for i, x in enumerate(between, 1)}
    types = {n: C_TYPES[str(x.aval.dtype)] for n, x in kept.items()}
    known = {x: n for n, x in stage.inputs.items()}
    outputs = {n: x for n, x in stage.outputs.items() if x in made}
    columns = {n: x for n, x in stage.outputs.items() if x not in made}
    return Parts(
        _stage(first, known, outputs | kept),
        _stage(rest, known | {x: n for n, x in kept.items()}, columns),
        types,
    )


def _by_slabs(stage: Stage) -> set[Var]:
    """What must be computed slab by slab: tiles, what they are made of, and columns of 16 bits
    that are made of them, a few rows of which are no whole block of memory.
    """
    made: set[Var] = set()
    size = -1
    while len(made) > size:
        size = len(made)
        for eqn in stage.equations:
            narrow = any(x in made and x.aval.dtype != "float32" for x in eqn.inputs)
            if narrow or any(_wide(x) for x in (eqn.output, *eqn.inputs)):
                made.add(eqn.output)
        for eqn in reversed(stage.equations):
            if eqn.output in made:
                made.update(x for x in eqn.inputs if isinstance(x, Var))
    return made


def _wide(x: Any) -> bool:
    """Whether a variable is a tile or a row of one, not a column."""
    return isinstance(x, Var) and x.aval.ndim == 2 and x.aval.shape[1] > COLUMNS


def _stage(body: list[Equation], known: dict[Var, str], outputs: dict[str, Any]) -> Stage:
    """A stage with what it reads from outside; equations that nothing needs are left out."""
    equations, variables = needed(body, outputs)
    inputs = {known[x]: x for x in variables if x in known}
    return Stage(equations, dict(sorted(inputs.items())), outputs)


def _carried(
    vector: list[Equation],
    level: dict[Any, int],
    last: int,
    known: dict[Var, str],
    repeated: set[Var],
) -> dict[str, Var]:
    """Columns that are used in a later stage than they are made in, by names for them."""
    carried: dict[str, Var] = {}
    for at in range(2, last + 1):
        for eqn in (e for e in vector if level[e.output] == at and e.output not in repeated):
            for x in eqn.inputs:
                early = isinstance(x, Var) and x not in known and level[x] < at
                if not early or x in repeated or x in carried.values():
                    continue
                if x.aval.shape[-1:] != (1,):
                    raise LoweringError(f"only columns are kept for a later stage, not {x.aval}")
                carried[f"factor{len(carried) + 1}"] = x
    return carried


@dataclass(frozen=True)
class _Products:
    """The products of a step.

    Arguments:
      results: the variables that they result in, by the products' names.
      given: what the vector unit hands over for them, by name.
      waits: result -> what must be computed before it can be multiplied, or None.
      inside: what the cube unit computes.
      more: equations of what is handed over that the trace has not: a reference with its sign
        changed, for the cube unit can only add.
    """

    products: dict[str, Product] = field(default_factory=dict)
    results: dict[Var, str] = field(default_factory=dict)
    given: dict[Var, str] = field(default_factory=dict)
    waits: dict[Var, Var | None] = field(default_factory=dict)
    inside: set[Var] = field(default_factory=set)
    more: list[Equation] = field(default_factory=list)


def _find_products(traced: Trace, names: dict[Var, str]) -> _Products:
    cube = _Products()
    for eqn in traced.equations:
        if eqn.primitive != "dot_general":
            continue
        left, right = eqn.inputs
        name = names.get(right, "")
        if eqn.output.aval.shape[1] == 1 and name != "kappa":
            continue
        if isinstance(right, Scalar) and right.value == 1:
            name = "ones"
        if name not in _RESULTS:
            raise LoweringError(
                "the cube unit multiplies with keys, κ or values as they lie in memory; "
                f"a product with something computed comes from {eqn.source}"
            )
        out, waits = eqn.output, left if left not in names else None
        cube.inside.add(out)
        minus = _minus(out, traced.equations) if name == "raw" else None
        if minus is not None:
            out, halves = minus
            waits = halves[0]
            for half, which in zip(halves, ("high", "low"), strict=True):
                negative = Var(half.aval)
                cube.more.append(Equation("neg", (half,), negative, {}, eqn.source))
                cube.given[negative] = which
        result, dtype = _rounded(out, traced.equations)
        cube.inside.update((out, result))
        cube.waits[result] = waits
        cube.results[result] = _RESULTS[name]
        if left not in names:
            cube.given[left] = "p"
        columns = result.aval.shape[1]
        cube.products[name] = Product(_RESULTS[name], columns, C_TYPES[dtype])
    return cube


def _minus(product: Var, equations: list[Equation]) -> tuple[Var, tuple[Var, Var]] | None:
    """What a product is after a column is taken off it, and that column's two halves."""
    made = {e.output: e for e in equations}
    uses = [e for e in equations if product in e.inputs]
    if len(uses) != 1 or uses[0].primitive != "sub":
        return None
    column = made.get(uses[0].inputs[1])
    if column is None or column.primitive != "add":
        return None
    halves = [made[x] for x in column.inputs if x in made]
    if len(halves) != 2 or any(h.primitive != "convert_element_type" for h in halves):
        return None
    high, low = (h.inputs[0] for h in halves)
    return uses[0].output, (high, low)


def _rounded(var: Var, equations: list[Equation]) -> tuple[Var, str]:
    """The variable and type in which a product leaves the cube unit: rounded on the way out if all
    that is done with it is that.
    """
    uses = [e for e in equations if var in e.inputs]
    if len(uses) == 1 and uses[0].primitive == "convert_element_type":
        dtype = str(uses[0].output.aval.dtype)
        if dtype in ("float16", "bfloat16"):
            return uses[0].output, dtype
    return var, str(var.aval.dtype)


def _levels(traced: Trace, waits: dict[Var, Var | None]) -> tuple[dict[Any, int], int]:
    """In which stage each variable is known, and how many stages there are: a product's result
    comes a stage after what it waits for. A state that the last stage makes is read there.
    """
    level: dict[Any, int] = dict.fromkeys(traced.inputs.values(), 1)
    last = 1
    for _ in range(2 * len(_STATE)):
        for eqn in traced.equations:
            if eqn.output in waits:
                x = waits[eqn.output]
                level[eqn.output] = 1 if x is None else level.get(x, 1) + 1
            else:
                level[eqn.output] = max([level.get(x, 1) for x in eqn.inputs], default=1)
        last = max(level.values())
        for name in _STATE:
            made = level.get(traced.outputs[name], 1)
            level[traced.inputs[name]] = last if made == last > 1 else 1
    return level, last


def _repeated(vector: list[Equation], changing: set[Any]) -> set[Any]:
    """What depends on neither product nor state (the mask): each stage makes its own.

    Arguments:
      changing: the products' results and the state.
    """
    result: set[Any] = set()
    changing = set(changing)
    for eqn in vector:
        if any(x in changing for x in eqn.inputs if isinstance(x, Var)):
            changing.add(eqn.output)
        else:
            result.add(eqn.output)
    return result
