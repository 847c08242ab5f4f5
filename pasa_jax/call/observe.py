"""An observer of attention calls: `pasa_jax.diagnostics` is one, while it inspects a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax

from pasa_jax.core.mask import Mask
from pasa_jax.core.operands import Operands
from pasa_jax.core.plan import Plan

Observer = Callable[[Operands, Mask, Plan], None]
_observer: ContextVar[Observer | None] = ContextVar("observer", default=None)


@contextmanager
def observed_by(observer: Observer) -> Iterator[None]:
    """Passes every call of this thread to ``observer`` within the context; jit is off there.

    Without jit, functions that were compiled before run as Python again, and the arrays of a call
    are not tracers but hold numbers.
    """
    token = _observer.set(observer)
    try:
        with jax.disable_jit():
            yield
    finally:
        _observer.reset(token)


def is_observed() -> bool:
    """Whether this thread has an observer."""
    return _observer.get() is not None


def announce(operands: Operands, mask: Mask, plan: Plan) -> None:
    """Passes a call to the observer, if there is one, before it is computed."""
    observer = _observer.get()
    if observer is not None:
        with jax.disable_jit(False):
            observer(operands, mask, plan)
