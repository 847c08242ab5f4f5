"""What the contexts share that swap an attention while they last."""

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
# What flax's functions and jax's are all called, and what marks a call of one in a path.
_NAME = "dot_product_attention"
DIRECT = f": {_NAME}"


class Swap:
    """Which attention takes the place of flax's in a context, and where it has done so.

    Arguments:
      native: flax's own function.
      attention_fn: options -> the function that takes its place.
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
        """The attention of an attention module that is called; None: the one it has."""
        self._asked = True
        chosen = options_for(path, module, self._choose, self._options, self._native)
        return self._swapped(path, chosen)

    def _of_call(self) -> AttentionFn | None:
        """The attention of code that calls flax's function itself; None: flax's."""
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
        """While it lasts, the name of ``before``, flax's function, means this swap's."""
        lasts = True

        # Linen asks for the signature. Who keeps the function beyond the context has flax's.
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
        """Raises where there was nothing to swap, chosen or not."""
        if not self._asked:
            raise nothing_swapped(context, function)


@contextmanager
def renamed(before: AttentionFn, after: AttentionFn) -> Iterator[None]:
    """While it lasts, ``dot_product_attention`` is ``after`` in each Python module where it is
    ``before``: in the library's, and in those that imported the name from there."""
    _rename(before, after)
    try:
        yield
    finally:
        _rename(after, before)


def _rename(now: AttentionFn, then: AttentionFn) -> None:
    for module in list(sys.modules.values()):
        # Past __getattr__, by which some modules load others.
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
