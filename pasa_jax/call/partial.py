"""Attention over some of the keys, and how such parts are put together (eq. 13)."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pasa_jax.call.arguments import Arguments
from pasa_jax.call.compute import compute
from pasa_jax.core.errors import wrong
from pasa_jax.core.tile import lowest

Array = jax.Array


class Partial(NamedTuple):
    """Attention over some of the keys, float32 (float64 for float64 inputs), differentiable.

    With w = exp(score − m) of every key that the row sees, l is the sum of w and o the sum of
    w·value. Parts that have the same m simply add; `merge` adds any.
    """

    o: Array  # [B, T, N, E] not normalised
    l: Array  # noqa: E741  [B, T, N] 0 where a query sees none of the keys
    m: Array  # [B, T, N] the reference of each row; the lowest finite number where nobody chose it

    @staticmethod
    def of(out: Array, lse: Array, reference: ArrayLike | None) -> Partial:
        """The part with this output [B, T, N, E] and log-sum-exp [B, T, N]."""
        m = jax.lax.stop_gradient(lse)
        if reference is not None:
            m = jnp.broadcast_to(jnp.asarray(reference, lse.dtype), lse.shape)
        some = lse != lowest(lse.dtype)
        l = jnp.where(some, jnp.exp(jnp.where(some, lse - m, 0)), jnp.zeros_like(lse))  # noqa: E741
        return Partial(out * l[..., None], l, m)

    def output(self, sinks: ArrayLike | None = None) -> tuple[Array, Array]:
        """The output [B, T, N, E] and the log-sum-exp [B, T, N] over all keys of the part.

        Arguments:
          sinks: [N] scores of one more key a head, with value 0. They count once: here.
        """
        part = self
        if sinks is not None:
            score = jnp.broadcast_to(jnp.asarray(sinks, self.m.dtype), self.m.shape)
            no_value = Partial(jnp.zeros_like(self.o), jnp.ones_like(self.l), score)
            part = merge(self, no_value)
        some = part.l != 0  # NaN is something
        l = jnp.where(some, part.l, jnp.ones_like(part.l))  # noqa: E741
        floor = jnp.full_like(part.m, lowest(part.m.dtype))
        out = jnp.where(some[..., None], part.o / l[..., None], jnp.zeros_like(part.o))
        largest = float(jnp.finfo(out.dtype).max)  # a mean of values may not leave their range
        return jnp.clip(out, -largest, largest), jnp.where(some, part.m + jnp.log(l), floor)


_REFUSED = {
    "sinks": ("be None", "They count once, after all parts are merged: `Partial.output(sinks)`."),
    "return_residual": ("be False", "`Partial.output` returns the log-sum-exp."),
    "return_statistics": ("be False", "Ask `dot_product_attention` for them."),
}


def partial_result(given: Arguments, reference: ArrayLike | None) -> Partial:
    """What `partial_attention` returns."""
    for name, (allowed, way_out) in _REFUSED.items():
        value = getattr(given, name)
        if value is not None and value is not False:
            raise wrong(name, f"{allowed} in `partial_attention`", "something else", way_out)
    out, lse = compute(replace(given, return_residual=True), wide_output=True)
    return Partial.of(out, lse, reference)


def merge(*parts: Partial) -> Partial:
    """The part over the keys of all ``parts``, no key of which is in two of them.

    Its m is the log-sum-exp over these keys: l is 1, and o cannot leave the range of the values.

    >>> import jax.numpy as jnp
    >>> a = Partial(o=jnp.ones((1, 1, 1, 2)), l=jnp.ones((1, 1, 1)), m=jnp.zeros((1, 1, 1)))
    >>> float(merge(a, a).l[0, 0, 0]), round(float(merge(a, a).m[0, 0, 0]), 4)
    (1.0, 0.6931)
    """
    if not parts:
        raise wrong("parts", "be one or more results of `partial_attention`", "none")
    m = jax.lax.stop_gradient(parts[0].m)
    for part in parts[1:]:
        m = jnp.maximum(m, jax.lax.stop_gradient(part.m))
    weights = [jnp.exp(part.m - m) for part in parts]
    total = sum((part.l * w for part, w in zip(parts, weights, strict=True)), jnp.zeros_like(m))
    total = jax.lax.stop_gradient(jnp.where(total != 0, total, jnp.ones_like(m)))
    shares = [w / total for w in weights]
    l = [part.l * w for part, w in zip(parts, shares, strict=True)]  # noqa: E741
    o = [part.o * w[..., None] for part, w in zip(parts, shares, strict=True)]
    return Partial(o=sum(o[1:], o[0]), l=sum(l[1:], l[0]), m=m + jnp.log(total))
