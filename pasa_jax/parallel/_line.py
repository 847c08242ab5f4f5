"""`Line`: the devices over which a sequence is cut, and how they talk to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pasa_jax.core.errors import wrong
from pasa_jax.core.heads import varying

Array = jax.Array


@dataclass(frozen=True)
class Line:
    """``size`` devices in a row, each of which holds the next part of a sequence.

    Arguments:
      names: the axes of the mesh, the outermost first; together they number the devices.
      total: the devices of these axes.
      size: the devices of one line; ``total / size`` lines lie side by side.
      stride: the distance of neighbours, in numbers of devices.
    """

    names: tuple[str, ...]
    total: int
    size: int
    stride: int = 1

    @staticmethod
    def over(names: str | tuple[str, ...]) -> Line:
        """All devices of the axes ``names``, inside `jax.shard_map`."""
        names = (names,) if isinstance(names, str) else tuple(names)
        size = lax.axis_size(names) if names else 1
        return Line(names, size, size)

    def split(self, inner: int) -> tuple[Line, Line]:
        """A ring of groups: the line through one device of each group of ``inner`` neighbours, and
        the line within a group.
        """
        if inner < 1 or self.size % inner:
            allowed = f"divide the {self.size} devices of the sequence"
            raise wrong("ulysses_devices", allowed, inner)
        outer = Line(self.names, self.total, self.size // inner, inner)
        return outer, Line(self.names, self.total, inner)

    def index(self) -> Array:
        """[] int32, the place of this device in its line."""
        if self.size == 1:
            return jnp.int32(0)
        number = lax.axis_index(self.names).astype(jnp.int32)
        return number // self.stride % self.size

    @property
    def groups(self) -> list[list[int]] | None:
        """The devices of each line by number; None: there is one line."""
        if self.size == self.total:
            return None
        starts = [i for i in range(self.total) if i // self.stride % self.size == 0]
        return [[i + j * self.stride for j in range(self.size)] for i in starts]

    def rotate(self, tree: Any) -> Any:
        """Each array as the device before this one holds it; the first device's is the last's."""
        if self.size == 1:
            return tree
        pairs: list[tuple[int, int]] = []
        for group in self.groups or [list(range(self.total))]:
            pairs += list(zip(group, group[1:] + group[:1], strict=True))
        return jax.tree.map(lambda x: lax.ppermute(x, self._axis, pairs), tree)

    def gather(self, x: Array, axis: int) -> Array:
        """The parts of x of all devices, put together along ``axis``."""
        if self.size == 1:
            return x
        return lax.all_gather(x, self._axis, axis=axis, tiled=True, axis_index_groups=self.groups)

    def exchange(self, x: Array, split: int, joined: int) -> Array:
        """This device's share of axis ``split``, and all of axis ``joined``."""
        if self.size == 1:
            return x
        return lax.all_to_all(
            x, self._axis, split, joined, tiled=True, axis_index_groups=self.groups
        )

    def share(self, x: Array, axis: int) -> Array:
        """This device's part of what every device holds whole."""
        length = x.shape[axis] // self.size
        return lax.dynamic_slice_in_dim(x, self.index() * length, length, axis)

    def put_together(self, x: Array, axis: int = 1) -> Array:
        """`gather` over all devices, whose result JAX knows to be the same on each."""
        if not self.names:
            return x
        shape = list(x.shape)
        shape[axis] *= self.total
        zeros = varying(jnp.zeros(shape, x.dtype), (x, self.index()))
        at = self.index() * x.shape[axis]
        return lax.psum(lax.dynamic_update_slice_in_dim(zeros, x, at, axis), self._axis)

    def same(self, x: Array) -> Array:
        """x, which is the same on each device; JAX knows it then."""
        return lax.pmax(x, self._axis) if self.names else x

    @property
    def _axis(self) -> Any:
        return self.names[0] if len(self.names) == 1 else self.names
