"""Fills the parameters of a flax.nnx module with named tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from pasa_jax.core.errors import check_choice, wrong

M = TypeVar("M", bound=nnx.Module)
DTYPES = ("float32", "float16", "bfloat16")


def checked_dtype(dtype: Any) -> Any:
    """``dtype`` as a jnp.dtype, if a model can have it."""
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    check_choice("dtype", name, DTYPES)
    return jnp.dtype(name)


class Tensors:
    """The tensors of a checkpoint, each of which is taken once.

    A tensor that is taken is removed from ``tensors``, so that memory need not hold both the model
    and the checkpoint. ``source`` is the argument that errors name.
    """

    def __init__(self, tensors: dict[str, np.ndarray], source: str) -> None:
        self._tensors = tensors
        self._source = source

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor ``name``, which must be floating and have ``shape``."""
        if name not in self._tensors:
            raise wrong(self._source, f"hold the tensor {name}", "none of that name")
        tensor = self._tensors.pop(name)
        if tensor.shape != shape:
            raise wrong(self._source, f"hold {name} of shape {shape}", tensor.shape)
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise wrong(self._source, f"hold {name} of a floating type", tensor.dtype)
        return tensor

    def parameter(self, name: str, leaf: str, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor ``name`` as flax holds it in ``leaf``: torch's matrices are [out, in], a
        kernel is [in, out]."""
        return self.take(name, shape[::-1]).T if leaf == "kernel" else self.take(name, shape)

    def check_empty(self) -> None:
        """Raises if a tensor was never taken: then config and weights are not of one model."""
        if self._tensors:
            left = sorted(self._tensors)
            names = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
            way_out = "The config and the weights must be of one model."
            raise wrong(
                self._source, "hold no tensor that the model has no place for", names, way_out
            )


def fill(make: Callable[[], M], value: Callable[[str, Any], Any]) -> M:
    """The module that ``make`` would give, with the parameters ``value(path, shape and dtype)``.

    ``make`` is only traced for its shapes. A path is the names of the attributes, joined by dots.
    """
    graph, state = nnx.split(nnx.eval_shape(make))
    flat = [
        (path, parameter.replace(value(".".join(map(str, path)), parameter.get_value())))
        for path, parameter in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(flat))
