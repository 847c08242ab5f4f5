"""Shared by the contexts in which another attention is used."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import jax

from pasa_jax.core.errors import wrong
from pasa_jax.plugins import _callers
from pasa_jax.plugins._adapter import Choose, checked, chosen_options, options_for

AttentionFn = Callable[..., jax.Array]
# The name of flax's functions and of jax's, and what marks a call of one of them in a path.
_NAME = "dot_product_attention"
DIRECT = f": {_NAME}"


class Swap:
    """The attention that replaces flax's in a context, and the places where it did.

    Arguments:
      native: flax's own function.
      attention_fn: options -> the function that replaces it.
      choose, options: see `pasa_jax.plugins.linen.replaced`.
    """

    def __init__(
        self,
        native: AttentionFn,
        attention_fn: Callable[..., AttentionFn],
        choose: Choose | None,
        options: dict[str, Any],
    ) -> None:
        checked(options)
        self.changed: list[str] = []
        self._native, self._attention_fn = native, attention_fn
        self._choose, self._options = choose, options
        self._asked = False

    def of_module(self, path: str, module: Any) -> AttentionFn | None:
        """The new attention of an attention module that is called; None: it keeps its own."""
        self._asked = True
        chosen = options_for(path, module, self._choose, self._options, self._native)
        return self._swapped(path, chosen)

    def _of_call(self) -> AttentionFn | None:
        """The new attention of code that calls flax's function itself; None: flax's."""
        self._asked = True
        stack = _callers.frames()
        path = _callers.name(stack) + DIRECT
        module = next(iter(_callers.modules(stack)), None)
        return self._swapped(path, chosen_options(path, module, self._choose, self._options))

    def _swapped(self, path: str, chosen: dict[str, Any] | None) -> AttentionFn | None:
        if chosen is None:
            return None
        if path not in self.changed:
            self.changed.append(path)
        return self._attention_fn(**chosen)

    @contextmanager
    def calls_of(self, before: AttentionFn) -> Iterator[None]:
        """A context in which the name of ``before``, flax's function, means the new attention."""
        lasts = True

        # Linen reads the signature. Code that keeps this function after the context calls flax's.
        @wraps(before, assigned=("__name__", "__qualname__", "__doc__"))
        def replacement(*args: Any, **keywords: Any) -> jax.Array:
            swapped = self._of_call() if lasts else None
            return (swapped or before)(*args, **keywords)

        try:
            with renamed(before, replacement):
                yield
        finally:
            lasts = False

    def check(self, context: str, function: str) -> None:
        """Raises if no attention was called that could have been swapped."""
        if not self._asked:
            raise nothing_swapped(context, function)


@contextmanager
def renamed(before: AttentionFn, after: AttentionFn) -> Iterator[None]:
    """A context in which ``dot_product_attention`` is ``after`` in every Python module where it was
    ``before``: in the library, and in modules that imported the name from there."""
    _rename(before, after)
    try:
        yield
    finally:
        _rename(after, before)


def _rename(now: AttentionFn, then: AttentionFn) -> None:
    for module in list(sys.modules.values()):
        # Not by getattr: some modules have a __getattr__ that imports other modules.
        names = object.__getattribute__(module, "__dict__") if module is not None else {}
        if names.get(_NAME) is now:
            names[_NAME] = then


def nothing_swapped(context: str, function: str) -> ValueError:
    """The error of a context that ends without a call that it could have swapped."""
    way_out = (
        "What jit compiled before the context is not traced again: open it around the first call, "
        "or call jax.clear_caches() first. What holds the function by another name (`import … as`, "
        "a default, an attribute of a class) is not reached: let it call "
        f"{function}.{_NAME}. Where there may be nothing to swap, or an earlier context "
        "swapped it in what jit then compiled: missing_ok=True."
    )
    allowed = f"last while an attention of {function} is called or traced"
    return wrong(context, allowed, "no such call", way_out)
