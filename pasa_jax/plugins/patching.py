"""Swaps the attention of existing code: of nnx models, and of `jax.nn` itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
from flax import linen
from flax import nnx as flax_nnx
from jax.typing import ArrayLike

from pasa_jax.call.api import dot_product_attention
from pasa_jax.core.errors import check_choice, wrong
from pasa_jax.plugins import nnx
from pasa_jax.plugins._adapter import Choose, checked, options_for
from pasa_jax.plugins._swap import nothing_swapped, renamed

Array = jax.Array


@dataclass
class Patch:
    """The changes of `patch`; `restore`, or the end of a ``with`` block, undoes them.

    Arguments:
      options: path of each changed module -> the options of its new attention.
    """

    options: dict[str, dict[str, Any]]
    _changes: list[_Change] = field(repr=False)

    def restore(self) -> None:
        """Gives every module the attention that it had; a second call does nothing.

        Raises:
          ValueError: a module was given another attention since: undo that first.
        """
        for change in self._changes:
            now = change.module.attention_fn
            if now is not change.after:
                raise wrong(
                    f"attention_fn at {change.path!r}",
                    "be the one that this patch put there",
                    repr(now),
                    "Restore later patches first.",
                )
        for change in self._changes:
            change.module.attention_fn = change.before
        self._changes.clear()

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()


@dataclass(frozen=True)
class _Change:
    path: str
    module: Any
    before: Callable[..., Array]
    after: Callable[..., Array]


def patch(
    model: flax_nnx.Module,
    *,
    choose: Choose | Mapping[str, Mapping[str, Any]] | None = None,
    **options: Any,
) -> Patch:
    """Gives every `flax.nnx.MultiHeadAttention` in ``model``, in place, PASA's attention.

    Parameters, caches and rngs stay; nnx.jit traces the changed model anew.

    Arguments:
      model: any nnx module; those that derive from `flax.nnx.MultiHeadAttention` are changed.
      choose: which modules, and how: (path, module) -> options beside ``options``, or None to
        leave the module as it is; or a mapping from paths to options, which leaves all others.
        Paths are as ``"encoder.layers.0.attention"``; the model itself is ``""``. None: all, and
        each must have flax's own attention function.
      options: of `pasa_jax.plugins.nnx.attention_fn`.

    Returns:
      A `Patch`, which can restore the model and is a context manager.

    Raises:
      ValueError: a linen model, no attention in the model, a path that it does not have, an
        unknown option, an ``attention_fn`` that is not flax's own. Then nothing is changed.

    >>> from flax import nnx
    >>> model = nnx.Sequential(nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0)))
    >>> with patch(model, shift="mean") as changed:
    ...     print(changed.options)
    {'layers.0': {'shift': 'mean'}}
    """
    modules = _attention_modules(model)
    if isinstance(choose, Mapping):
        choose = _from_mapping(choose, tuple(modules))
    changes, chosen_options = [], {}
    for path, module in modules.items():
        chosen = options_for(path, module, choose, options, nnx.NATIVE)
        if chosen is not None:
            after = nnx.attention_fn(**chosen)
            changes.append(_Change(path, module, module.attention_fn, after))
            chosen_options[path] = chosen
    for change in changes:
        change.module.attention_fn = change.after
    return Patch(chosen_options, changes)


def _attention_modules(model: Any) -> dict[str, Any]:
    if isinstance(model, linen.Module):
        way_out = "Linen: `with pasa_jax.plugins.linen.replaced(…):` around init and apply."
        raise wrong("model", "be a flax.nnx module", f"a linen {type(model).__name__}", way_out)
    if not isinstance(model, flax_nnx.Module):
        raise wrong("model", "be a flax.nnx module", f"a {type(model).__name__}")
    modules = {
        ".".join(map(str, path)): module
        for path, module in flax_nnx.iter_modules(model)
        if isinstance(module, flax_nnx.MultiHeadAttention)
    }
    if not modules:
        way_out = (
            "What calls flax.nnx.dot_product_attention itself: `nnx.replaced`; jax.nn's: "
            "`replace_jax_nn`; what multiplies out its own scores: call "
            "pasa_jax.dot_product_attention there."
        )
        allowed = "hold a flax.nnx.MultiHeadAttention"
        raise wrong("model", allowed, f"a {type(model).__name__} without one", way_out)
    return modules


def _from_mapping(chosen: Mapping[str, Mapping[str, Any]], paths: tuple[str, ...]) -> Choose:
    for path in chosen:
        check_choice("path in choose", path, paths)
    return lambda path, module: chosen.get(path)


# Arguments of jax.nn's function, which each call gives; they cannot be options as well.
_OF_THE_CALL = ("scale", "local_window_size")


@contextmanager
def replace_jax_nn(*, missing_ok: bool = False, **options: Any) -> Iterator[None]:
    """A context in which `jax.nn.dot_product_attention` is `pasa_jax.dot_product_attention`.

    For code that calls it by that name, or one imported from there: flax.nnx's own attention
    (without dropout), keras on jax. Functions that jit has compiled before stay as they were. The
    change is seen by every thread.

    ``implementation`` in such a call, ``"xla"`` and ``"cudnn"`` as well, means what it does for
    `pasa_jax.dot_product_attention`; the option, where it is given, comes before it. The
    differences between the two functions are listed in docs/api.md.

    Arguments:
      missing_ok: no error where there is nothing to swap.
      options: of `pasa_jax.dot_product_attention`, by keyword: ``shift``, ``beta``, ``precision``,
        ``schedule``, ``implementation``, ``causal_alignment``, ``logits_soft_cap``; and
        ``attention``, a function in its place (`pasa_jax.parallel.attention_fn`).

    Raises:
      ValueError: an unknown option; at the end, where the function was not called meanwhile.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.full((1, 4, 2, 64), 300.0, jnp.float16)
    >>> with replace_jax_nn():
    ...     bool(jnp.all(jax.nn.dot_product_attention(x, x, x) == 300))
    True
    """
    checked(options)
    for name in _OF_THE_CALL:
        if name in options:
            raise wrong(name, "be left to the calls of jax.nn.dot_product_attention", options[name])
    attention = options.pop("attention", dot_product_attention)
    called = False

    def replacement(
        query: ArrayLike,
        key: ArrayLike,
        value: ArrayLike,
        bias: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        **keywords: Any,
    ) -> Any:
        nonlocal called
        called = True
        return attention(query, key, value, bias, mask, **{**keywords, **options})

    with renamed(jax.nn.dot_product_attention, replacement):
        yield
    if not called and not missing_ok:
        raise nothing_swapped("replace_jax_nn", "jax.nn")
