"""One function of the vector core while it is made: the names, buffers and values that it has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from npu_bridge.barriers import with_barriers
from npu_bridge.dtypes import BLOCK
from npu_bridge.ir import Alias, Barrier, Buffer, Function, Node, Slice
from npu_bridge.lower import Equation, Lowering, Value, Var, Vector
from npu_bridge.memory import Memory, aliases, frees_before
from pasa_jax.core.errors import PlanError

# Names of numbers in the functions, which values must not take.
_NUMBERS = ("row", "slot", "first", "place", "lane", "slab", "unit", "valid", "keys", "count")


@dataclass(frozen=True)
class Output:
    """Where a stage must leave a value.

    Arguments:
      old: the buffer of the value that stands there before, if the stage reads it.
    """

    to: Slice
    old: Buffer | None = None


class VectorFunction:
    """What one function has of UB.

    Arguments:
      alone: whether the function runs before all that stays in UB is used, so that its values may
        lie anywhere behind the ramp.
      ramp: the numbers 0, 1, 2, … in UB, if the function may use them.
    """

    def __init__(
        self,
        ub: Memory,
        name: str,
        parameters: tuple[str, ...] = (),
        *,
        alone: bool = False,
        ramp: Buffer | None = None,
    ) -> None:
        self.name, self.parameters = name, parameters
        self._ramp = ramp
        self._buffers: list[Buffer] = []
        self._ub = ub
        first = 0 if ramp is None else (ramp.address or 0) + ramp.bytes
        self._base = first if alone else ub.staying
        self._end = ub.capacity // BLOCK * BLOCK  # where the temporaries begin
        self._uses = dict.fromkeys((*parameters, *_NUMBERS), 1)  # of each name

    def done(self, comment: str, body: list[Node]) -> Function:
        return Function(self.name, self.parameters, body, comment, self._buffers)

    def temporary(self, name: str, dtype: str, count: int, slots: int = 1) -> Buffer:
        """A buffer for the whole function, at the end of the memory: values are placed from its
        start.
        """
        buffer = Buffer(name, "UB", dtype, count, slots)
        self._uses[name] = 1
        self._end -= buffer.bytes
        buffer.address = self._end
        self._buffers.append(buffer)
        return buffer

    def lowered(
        self,
        equations: list[Equation],
        inputs: dict[Var, Value],
        outputs: dict[Var, Output],
        names: dict[Var, str] | None = None,
        spare: Sequence[Slice] = (),
    ) -> list[Node]:
        """The vector instructions of equations, placed.

        Arguments:
          outputs: where variables must be left.
          names: how variables are called; outputs by where they are left, if nothing is said.
          spare: inputs whose memory may be overwritten.
        """
        called = {var: f"new_{x.to.buffer.name}" for var, x in outputs.items()} | (names or {})
        low = Lowering(self._allocate, inputs, names=called, ramp=self._ramp)
        low.lower(equations)
        self._leave(low, outputs)
        self._buffers += self._placed(low.body, spare)
        # One slab's values lie where those of the one before did.
        return [*map(Alias, aliases(low.body)), Barrier("V"), *with_barriers(low.body)]

    def _allocate(self, name: str, dtype: str, count: int) -> Buffer:
        number = self._uses[name] = self._uses.get(name, 0) + 1
        return Buffer(f"{name}_{number}" if number > 1 else name, "UB", dtype, count)

    @staticmethod
    def _leave(low: Lowering, outputs: dict[Var, Output]) -> None:
        """Lets each output be computed where it must be left, or copies it there at the end."""
        copied: list[tuple[Vector, Slice]] = []
        for var, output in outputs.items():
            value = low.value(var)
            assert isinstance(value, Vector), value
            b = value.place.buffer
            whole = value.place.offset == 0 and b.count == value.size
            made_here = b.address is None and b.alias is None
            free = output.old is None or frees_before(low.body, output.old, b)
            if whole and made_here and free:
                b.alias = Slice(output.to.buffer, output.to.offset, value.size)
            else:
                copied.append((value, output.to))
        for value, to in copied:
            low.emitter.copied(value, to)

    def _placed(self, body: list[Node], spare: Sequence[Slice]) -> list[Buffer]:
        placed = self._ub.place(body, self._base, spare)
        for b in placed:
            if b.address is not None and b.address + b.bytes > self._end:
                left = max(0, self._end - b.address)
                raise PlanError(f"{b.name} wants {b.bytes} bytes of UB; there are {left} left")
        return placed


def inputs_of(variables: dict[str, Var], values: dict[str, Any]) -> dict[Var, Value]:
    """The values of variables, both by name."""
    return {var: values[name] for name, var in variables.items()}
