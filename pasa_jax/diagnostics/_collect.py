"""Runs a model and measures every attention call on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import linen, nnx

from pasa_jax import plugins
from pasa_jax.call.observe import observed_by
from pasa_jax.core.errors import wrong
from pasa_jax.core.mask import Mask
from pasa_jax.core.operands import Operands
from pasa_jax.core.plan import Plan
from pasa_jax.core.shifts import SHIFTS
from pasa_jax.diagnostics._call import Call
from pasa_jax.diagnostics._forms import Costs, measure_costs
from pasa_jax.diagnostics._measure import Measured, measure
from pasa_jax.diagnostics._names import Caller, caller, unique_names
from pasa_jax.diagnostics.report import Report
from pasa_jax.plugins._swap import DIRECT

Progress = Callable[[Call], None]


def inspect(
    model: Callable[..., Any],
    *inputs: Any,
    error_rows: int = 64,
    progress: Progress | None = None,
    **keywords: Any,
) -> Report:
    """Calls ``model(*inputs, **keywords)`` and reports on every attention call on the way.

    It sees calls of ``dot_product_attention`` of pasa_jax, jax.nn, flax.nnx and flax.linen, the
    attention modules of flax.nnx and flax.linen that have flax's own attention function or ours,
    and ``attend`` of `KVCache` and `PagedCache`, also within jit, scan, vmap, grad and remat. It
    does not see code that multiplies out its own scores. PASA computes every call, so that a layer
    that overflows does not spoil the layers after it. Jit is off, so that functions that were
    compiled before run again; this takes longer than a call of the model.

    Arguments:
      model: a flax.nnx model, which is left as it is (a clone runs), or any function: for linen
        ``inspect(module.apply, variables, x)``.
      inputs, keywords: passed on; arrays that hold numbers.
      error_rows: how many queries of each call the expected errors are measured on; 0: none.
      progress: called with each call when it is measured.

    Returns:
      A `Report`. Under vmap it holds a call once for each entry of the mapped axis. If two models
      have a path in common, all paths begin with the class of their model.

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
        raise _nothing_seen()
    return collector.report()


def _nothing_seen() -> ValueError:
    allowed = (
        "call dot_product_attention of flax.nnx, flax.linen, jax.nn or pasa_jax, or a module of "
        "flax with that attention"
    )
    way_out = (
        "Model code that multiplies out its own scores, or holds one of these functions by another "
        "name, must call pasa_jax.dot_product_attention there (docs/flax.md)."
    )
    return wrong("model", allowed, "no such call", way_out)


@contextmanager
def _routed() -> Iterator[None]:
    """A context in which flax's and jax's own attention is PASA's, which reports its calls."""
    with ExitStack() as stack:
        for plugin in (plugins.nnx, plugins.linen):
            choose = partial(_if_native, plugin.NATIVE)
            stack.enter_context(plugin.replaced(choose, missing_ok=True))
        stack.enter_context(plugins.replace_jax_nn(missing_ok=True))
        yield


def _if_native(native: object, path: str, module: Any) -> dict[str, Any] | None:
    """Calls of flax's function, and modules that have it; others keep their own attention."""
    return {} if path.endswith(DIRECT) or module.attention_fn is native else None


class _Collector:
    """Measures the calls that are reported to it, in their order."""

    def __init__(self, error_rows: int, progress: Progress | None) -> None:
        self.calls: list[Call] = []
        self._error_rows, self._progress = error_rows, progress
        self._callers: list[Caller] = []
        self._waiting: list[tuple[Caller, Plan, Operands, Mask]] = []

    def observe(self, operands: Operands, mask: Mask, plan: Plan) -> None:
        """Queues the call; a callback delivers its arrays, which vmap and grad hold as tracers."""
        who = caller()
        if who is None:
            return

        def take(operands: Operands, mask: Mask) -> None:
            arrays = jax.tree.map(np.asarray, (operands, mask))
            self._waiting.append((who, plan, *arrays))

        operands, mask = jax.lax.stop_gradient((operands, mask))
        jax.debug.callback(take, operands, mask)
        self.drain()

    def drain(self) -> None:
        """Measures the calls in the queue."""
        jax.effects_barrier()
        while self._waiting:
            waited = self._waiting.pop(0)
            call = _measured(*waited, self._error_rows)
            self._callers.append(waited[0])
            self.calls.append(call)
            if self._progress is not None:
                self._progress(call)

    def report(self) -> Report:
        """Of all calls, with names that tell them apart."""
        names = unique_names(self._callers)
        pairs = zip(self.calls, names, strict=True)
        return Report(tuple(replace(c, name=n) if c.name != n else c for c, n in pairs))


def _measured(who: Caller, plan: Plan, operands: Operands, mask: Mask, rows: int) -> Call:
    inputs = (operands.query, operands.key, operands.value)
    if operands.query.dtype == np.float64:
        operands = jax.tree.map(lambda x: x.astype(np.float32), operands)
    operands, mask = jax.tree.map(jax.numpy.asarray, (operands, mask))
    measured = jax.tree.map(np.asarray, measure(operands, mask, plan))
    loudest = int(measured.products.max_product.max(axis=1).argmax())
    costs = measure_costs(operands, mask, plan, loudest, rows) if rows else Costs({}, {})
    return _call(who, plan, inputs, float(operands.scale), measured, costs)


def _call(
    who: Caller,
    plan: Plan,
    inputs: tuple[Any, ...],
    scale: float,
    measured: Measured,
    costs: Costs,
) -> Call:
    """Joins the batch entries: the largest of sizes, the mean of shares."""
    products: Any = measured.products  # NumPy's arrays by now
    statistics: Any = measured.statistics
    shift, reason = replace(plan, shift="auto").explain_shift()
    used = SHIFTS[int(statistics.shift.flat[0])]
    return Call(
        name=who.name,
        via=who.via,
        shapes=tuple(x.shape for x in inputs),
        dtype=str(inputs[0].dtype),
        scale=scale,
        not_finite=tuple(map(float, products.not_finite.mean(axis=(0, 1)))),
        auto=f"{shift}: {reason}",
        float16_shift=used,
        shifts_if_rounded=products.shifts_if_rounded.any(axis=0),
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
        errors=costs.errors,
        formats=costs.formats,
    )


def _largest(x: np.ndarray) -> np.ndarray:
    """[B, N] -> [N]: the entry of the largest magnitude, with its sign."""
    return np.take_along_axis(x, np.abs(x).argmax(axis=0)[None], axis=0)[0]
