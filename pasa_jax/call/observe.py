"""Who is told of each attention call: `pasa_jax.diagnostics`, while it looks at a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax

from pasa_jax.core.mask import Mask
from pasa_jax.core.operands import Operands
from pasa_jax.core.prepare import Plan

Observer = Callable[[Operands, Mask, Plan], None]
_observer: ContextVar[Observer | None] = ContextVar("observer", default=None)


@contextmanager
def observed_by(observer: Observer) -> Iterator[None]:
    """Tells ``observer`` of every call of this thread while it lasts; jit is off meanwhile.

    Without jit, functions that were compiled before run as Python again, and the arrays that reach
    a call hold numbers.
    """
    token = _observer.set(observer)
    try:
        with jax.disable_jit():
            yield
    finally:
        _observer.reset(token)


def announce(operands: Operands, mask: Mask, plan: Plan) -> None:
    """Tells of a call before it is computed."""
    observer = _observer.get()
    if observer is not None:
        with jax.disable_jit(False):
            observer(operands, mask, plan)
