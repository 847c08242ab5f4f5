"""Runs a model and measures every attention call on the way."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import wraps
from types import FrameType
from typing import Any

import jax
import numpy as np
from flax import linen, nnx

from pasa_jax import plugins
from pasa_jax._errors import wrong
from pasa_jax._observe import observed_by
from pasa_jax._operands import Operands
from pasa_jax._prepare import Plan
from pasa_jax.diagnostics._forms import measure_errors
from pasa_jax.diagnostics._measure import Measured, measure
from pasa_jax.diagnostics.report import Call, Report
from pasa_jax.mask import Mask
from pasa_jax.plugins._adapter import lent
from pasa_jax.shifts import SHIFTS

Progress = Callable[[Call], None]


def inspect(
    model: Callable[..., Any],
    *inputs: Any,
    error_rows: int = 64,
    progress: Progress | None = None,
    **keywords: Any,
) -> Report:
    """Calls ``model(*inputs, **keywords)`` and reports on every attention call on the way.

    Seen are calls of `pasa_jax.dot_product_attention`, `jax.nn.dot_product_attention`, the
    attention modules of flax.nnx and flax.linen that have flax's own attention function or ours,
    and `KVCache.attend`; within jit, scan, vmap, grad and remat too. What multiplies out its own
    scores is not. Every call that is seen is computed by PASA, so that a layer that overflows
    does not hide those behind it, and jit is off meanwhile, so that functions that were compiled
    before run again: this takes longer than a call of the model.

    Arguments:
      model: a flax.nnx model, which is left as it is (a clone runs), or any function: for linen
        ``inspect(module.apply, variables, x)``.
      inputs, keywords: passed on; arrays that hold numbers.
      error_rows: how many queries of each call the expected errors are measured on; 0: none.
      progress: told of each call when it is measured.

    Returns:
      A `Report`. A call under vmap stands in it once for each of the mapped axis' entries.

    Raises:
      ValueError: ``model`` cannot be called like this, or no attention call was seen.

    >>> import jax.numpy as jnp
    >>> from pasa_jax import dot_product_attention
    >>> x = jnp.full((1, 8, 2, 64), 40.0)
    >>> report = inspect(dot_product_attention, x, x, x)
    >>> report.calls[0].max_product.tolist(), report.overflowing
    ([102400.0, 102400.0], [(0, 0), (0, 1)])
    """
    if isinstance(model, linen.Module) and model.scope is None:
        seen = f"an unbound linen {type(model).__name__}"
        raise wrong("model", "know its variables", seen, "inspect(model.apply, variables, …).")
    if not callable(model):
        raise wrong("model", "be a flax.nnx model or a function", f"a {type(model).__name__}")
    collector = _Collector(error_rows, progress)
    if isinstance(model, nnx.Module):
        model = nnx.clone(model)
    with _routed(), observed_by(collector.observe):
        jax.block_until_ready(model(*inputs, **keywords))
    collector.drain()
    if not collector.calls:
        way_out = (
            "Model code that multiplies out its own scores must call "
            "pasa_jax.dot_product_attention there (docs/flax.md)."
        )
        raise wrong("model", "compute an attention that can be seen", "no call of one", way_out)
    return Report(tuple(collector.calls))


@contextmanager
def _routed() -> Iterator[None]:
    """While it lasts, flax's and jax's own attention is PASA's, which tells of its calls."""

    def if_native(path: str, module: Any) -> dict[str, Any] | None:
        del path
        return {} if module.attention_fn is linen.dot_product_attention else None

    with ExitStack() as stack:
        stack.enter_context(_nnx_replaced())
        stack.enter_context(plugins.linen.replaced(choose=if_native))
        stack.enter_context(plugins.replace_jax_nn())
        yield


@contextmanager
def _nnx_replaced() -> Iterator[None]:
    """`plugins.patch` for every nnx module there is: jit and scan run copies of a model's."""
    kind: Any = nnx.MultiHeadAttention
    before = kind.__call__

    @wraps(before)
    def call(module: Any, *args: Any, **keywords: Any) -> Any:
        if module.attention_fn is not nnx.dot_product_attention:
            return before(module, *args, **keywords)
        with lent(module, plugins.nnx.attention_fn()):
            return before(module, *args, **keywords)

    kind.__call__ = call
    try:
        yield
    finally:
        kind.__call__ = before


class _Collector:
    """Measures the calls that it is told of, in their order."""

    def __init__(self, error_rows: int, progress: Progress | None) -> None:
        self.calls: list[Call] = []
        self._error_rows, self._progress = error_rows, progress
        self._waiting: list[tuple[str, str, Plan, Operands, Mask]] = []

    def observe(self, operands: Operands, mask: Mask, plan: Plan) -> None:
        """Puts the call in line; under vmap and grad its arrays come with a callback."""
        name, via = _caller()

        def take(operands: Operands, mask: Mask) -> None:
            arrays = jax.tree.map(np.asarray, (operands, mask))
            self._waiting.append((name, via, plan, *arrays))

        operands, mask = jax.lax.stop_gradient((operands, mask))
        jax.debug.callback(take, operands, mask)
        self.drain()

    def drain(self) -> None:
        """Measures what waits."""
        jax.effects_barrier()
        while self._waiting:
            call = _measured(*self._waiting.pop(0), self._error_rows)
            self.calls.append(call)
            if self._progress is not None:
                self._progress(call)


def _measured(name: str, via: str, plan: Plan, operands: Operands, mask: Mask, rows: int) -> Call:
    inputs = (operands.query, operands.key, operands.value)
    if operands.query.dtype == np.float64:
        operands = jax.tree.map(lambda x: x.astype(np.float32), operands)
    operands, mask = jax.tree.map(jax.numpy.asarray, (operands, mask))
    found = jax.tree.map(np.asarray, measure(operands, mask, plan))
    loudest = int(found.products.max_product.max(axis=1).argmax())
    errors = measure_errors(operands, mask, plan, loudest, rows) if rows else {}
    return _call(name, via, plan, inputs, float(operands.scale), found, errors)


def _call(
    name: str,
    via: str,
    plan: Plan,
    inputs: tuple[Any, ...],
    scale: float,
    found: Measured,
    errors: Any,
) -> Call:
    """All batch entries in one: largest of the sizes, mean of the shares."""
    products: Any = found.products  # NumPy's arrays by now
    statistics: Any = found.statistics
    shift, reason = replace(plan, shift="auto").explain_shift()
    used = SHIFTS[int(statistics.shift.flat[0])]
    return Call(
        name=name,
        via=via,
        shapes=tuple(x.shape for x in inputs),
        dtype=str(inputs[0].dtype),
        scale=scale,
        not_finite=tuple(map(float, products.not_finite.mean(axis=(0, 1)))),
        auto=f"{shift}: {reason}",
        float16_shift=used,
        shifts_behind=products.shifts_behind.any(axis=0),
        max_product=products.max_product.max(axis=0),
        max_score=products.max_product.max(axis=0) * abs(scale),
        max_stored=statistics.max_stored.max(axis=0),
        product_share=products.product_share.mean(axis=0),
        score_share=products.score_share.mean(axis=0),
        key_bias=statistics.key_bias.max(axis=0),
        key_deviation=statistics.key_spread.max(axis=0),
        resonance=_largest(statistics.resonance),
        phases=products.phases.mean(axis=0),
        query_mean=products.query_mean.mean(axis=0),
        key_mean=products.key_mean.mean(axis=0),
        key_spread=products.key_spread.mean(axis=0),
        errors=errors,
    )


def _largest(x: np.ndarray) -> np.ndarray:
    """[B, N] -> [N]: the entry of the largest magnitude, with its sign."""
    return np.take_along_axis(x, np.abs(x).argmax(axis=0)[None], axis=0)[0]


# Who called.

_FLAX = {"flax.nnx.nn.attention": "flax.nnx", "flax.linen.attention": "flax.linen"}


def _caller() -> tuple[str, str]:
    """What to call the call that is on the stack, and what it came through.

    The name is the path of the innermost flax module whose method runs, or the function that
    called, with its line.
    """
    via, frames = "pasa_jax", list(_frames(sys._getframe(1)))
    for frame in frames:
        module = frame.f_globals.get("__name__", "")
        if module in _FLAX:
            via = _FLAX[module]
        elif module == "pasa_jax.plugins.patching" and via == "pasa_jax":
            via = "jax.nn"
    owners = [_owner(frame) for frame in frames]
    modules = [owner for owner in owners if isinstance(owner, (nnx.Module, linen.Module))]
    if modules:
        return _path(modules), via
    for frame in frames:
        module = frame.f_globals.get("__name__", "")
        if not module.startswith(("pasa_jax.", "jax.", "flax.", "contextlib")):
            return f"{frame.f_code.co_qualname}:{frame.f_lineno}", via
    return "call", via


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _owner(frame: FrameType) -> Any:
    """The object whose method runs: the first argument, if it has a method of that name."""
    code = frame.f_code
    first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    return first if hasattr(type(first), code.co_name) else None


def _path(modules: list[Any]) -> str:
    """The path of the first in the last that holds it (jit and scan run copies of modules)."""
    innermost = modules[0]
    if isinstance(innermost, linen.Module):
        return ".".join(innermost.path) or type(innermost).__name__
    for outer in reversed(modules):
        if isinstance(outer, nnx.Module) and outer is not innermost:
            for path, module in nnx.iter_modules(outer):
                if module is innermost:
                    copied = [] if outer is modules[-1] else [type(outer).__name__]
                    return ".".join([*copied, *map(str, path)])
    return type(innermost).__name__
