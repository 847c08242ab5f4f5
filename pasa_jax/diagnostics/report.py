"""`Report` and `Call`: what `inspect` found, as data, and what to do about it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pasa_jax._extras import require
from pasa_jax.diagnostics._forms import DTYPES, EAGER, FLOOR, Errors
from pasa_jax.diagnostics._measure import EDGE, LARGEST

EXTRA = "diagnostics"
# A form that errs more than this, and more than twice what 16-bit inputs cost by themselves, is
# called inaccurate.
TOLERANCE = 1e-2

_FIX = {
    "flax.nnx": "with pasa_jax.plugins.nnx.replaced(): model(…)",
    "flax.linen": "with pasa_jax.plugins.linen.replaced(): model.apply(…)",
    "jax.nn": "with pasa_jax.plugins.replace_jax_nn(): …",
    "pasa_jax": "pasa_jax.dot_product_attention was called, which is safe as it is",
}


@dataclass(frozen=True, kw_only=True)
class Call:
    """One attention call. Arrays have an entry per query head; over batch entries, the largest.

    Arguments:
      name: path of the flax module that made the call, or its function and line.
      via: ``"flax.nnx"``, ``"flax.linen"``, ``"jax.nn"`` or ``"pasa_jax"``.
      shapes: of query [B, T, N, D], key [B, S, K, D] and value [B, S, K, E].
      dtype, scale: of the call.
      not_finite: the shares of query, key and value that are NaN or infinite, and not hidden.
      auto: what the default does with the call as it is, and why.
      float16_shift: what the default would do here with scores in float16.
      shifts_behind: [N] bool: whether on a chip that rounds the product first (Ascend 910B) the
        default takes each head's mean off, or nothing.
      max_product, max_score: [N] max |q·k|, and times the scale.
      max_stored: [N] the largest score that the default stores, in float16, after its shift.
      product_share, score_share: [N] share of the q·k, and of the scores, beyond float16.
      key_bias, key_deviation: [N] norm of the keys' mean; root mean square distance from it.
      resonance: [N] −1 to 1: the largest score over max‖q‖·max‖k‖, signed.
      phases: [N, 18] share of the pairs whose phase arccos(q·k/‖q‖‖k‖) is in each bin of 10°.
        Where q and k are waves along the head channels it is their difference of phase: 0° and
        180° are resonance (arXiv 2503.01873, section 3).
      query_mean, key_mean, key_spread: [N, D] by channel: means over the sequence, and the keys'
        standard deviation.
      errors: type -> form -> [N]: the relative error to expect of the output, measured.
    """

    name: str
    via: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    scale: float
    not_finite: tuple[float, ...]
    auto: str
    float16_shift: str
    shifts_behind: NDArray
    max_product: NDArray
    max_score: NDArray
    max_stored: NDArray
    product_share: NDArray
    score_share: NDArray
    key_bias: NDArray
    key_deviation: NDArray
    resonance: NDArray
    phases: NDArray
    query_mean: NDArray
    key_mean: NDArray
    key_spread: NDArray
    errors: Errors

    @property
    def heads(self) -> int:
        """N."""
        return len(self.max_product)

    @property
    def margin(self) -> NDArray:
        """[N] what q·k may grow by before float16 cannot hold it; below 1 it cannot now."""
        return LARGEST / np.maximum(self.max_product, np.finfo(np.float32).tiny)

    @property
    def overflows(self) -> NDArray:
        """[N] bool: some q·k is infinite in float16."""
        return self.max_product >= EDGE

    def cast_costs(self, dtype: str) -> NDArray:
        """[N] bool: inputs in ``dtype`` err more than `TOLERANCE` with float32 scores as well."""
        found = self.errors.get(dtype)
        return np.zeros(self.heads, bool) if found is None else ~(found[FLOOR] <= TOLERANCE)

    def inaccurate(self, dtype: str) -> NDArray:
        """[N] bool: eager code in ``dtype`` gives NaN or errs more than its inputs' rounding."""
        found = self.errors.get(dtype)
        if found is None:
            return np.zeros(self.heads, bool)
        eager, floor = found[EAGER], found[FLOOR]
        return ~(eager <= np.maximum(2 * floor, TOLERANCE))


@dataclass(frozen=True)
class Report:
    """What `inspect` found.

    Arguments:
      calls: in the order in which they ran.
    """

    calls: tuple[Call, ...]

    @property
    def heads(self) -> int:
        """Query heads of all calls."""
        return sum(call.heads for call in self.calls)

    @property
    def overflowing(self) -> list[tuple[int, int]]:
        """(call, head) of every head with a q·k beyond float16, largest first."""
        found = self._heads(lambda call: call.overflows)
        return sorted(found, key=lambda at: -self.calls[at[0]].max_product[at[1]])

    def inaccurate(self, dtype: str) -> list[tuple[int, int]]:
        """(call, head) of every head that eager code in ``dtype`` gets wrong, overflow included."""
        return self._heads(lambda call: call.inaccurate(dtype))

    def _heads(self, of: Callable[[Call], NDArray]) -> list[tuple[int, int]]:
        """(call, head) of every head for which ``of`` is true."""
        return [(i, int(n)) for i, call in enumerate(self.calls) for n in np.flatnonzero(of(call))]

    @property
    def verdict(self) -> str:
        """One sentence: which heads overflow float16."""
        lost = [call.name for call in self.calls if any(call.not_finite)]
        if lost:
            return f"Not finite before any attention: an input of {lost[0]} holds NaN or infinity."
        if not self.overflowing:
            top = max(float(call.max_product.max(initial=0)) for call in self.calls)
            return f"No head overflows float16: the largest |q·k| is {top:,.0f} of {LARGEST:,.0f}."
        return (
            f"{len(self.overflowing)} of {self.heads} heads overflow float16, in {self._where()}: "
            "code that stores q·k in float16 gives NaN there."
        )

    def _where(self) -> str:
        """The three loudest of the calls that overflow, by name, and how many more there are."""
        loudest = list(dict.fromkeys(i for i, _ in self.overflowing))
        names: dict[str, list[str]] = {}
        for i in loudest[:3]:
            names.setdefault(self.calls[i].name, []).append(str(i))
        found = [
            f"{name} (call{'s' * (len(calls) > 1)} {', '.join(calls)})"
            for name, calls in names.items()
        ]
        more = [f"{len(loudest) - 3} more"] if len(loudest) > 3 else []
        return ", ".join(found + more)

    @property
    def advice(self) -> list[str]:
        """What to do, a line for each way by which attention was called; what nothing repairs."""
        at_risk = {i for i, _ in self.overflowing}
        for dtype in DTYPES:
            at_risk |= {i for i, _ in self.inaccurate(dtype)}
        vias = dict.fromkeys(self.calls[i].via for i in sorted(at_risk))
        return [f"{via}: {_FIX[via]}" for via in vias] + [
            f"{dtype}: in {heads} of {self.heads} heads the cast of query, key and value costs "
            "more than 1 % by itself, which no attention gives back: keep those in a wider type."
            for dtype in DTYPES
            if (heads := sum(int(call.cast_costs(dtype).sum()) for call in self.calls))
        ]

    # As text, as data, as a page.

    def as_dict(self) -> dict[str, Any]:
        """Plain data; what is not finite is None."""
        calls = [
            {f.name: _plain(getattr(call, f.name)) for f in fields(call)} for call in self.calls
        ]
        return {
            "verdict": self.verdict,
            "advice": self.advice,
            "overflowing": [list(at) for at in self.overflowing],
            "calls": calls,
        }

    def to_json(self) -> str:
        """`as_dict` as JSON."""
        return json.dumps(self.as_dict(), allow_nan=False)

    def print(self, *, rows: int = 20) -> None:
        """Prints the verdict, a line per call (the ``rows`` loudest), errors and advice."""
        from rich.console import Console  # flax needs it too

        from pasa_jax.diagnostics import _render

        Console().print(*_render.tables(self, rows), sep="\n")

    def to_html(self) -> str:
        """One self-contained page with the plots.

        Raises:
          ModuleNotFoundError: the extra ``diagnostics`` is not installed.
        """
        for module in ("matplotlib", "jinja2"):
            require(module, EXTRA)
        from pasa_jax.diagnostics import _render

        return _render.page(self)

    def save(self, folder: Path | str) -> tuple[Path, Path]:
        """Writes report.html and report.json into ``folder``, which is made; their paths."""
        folder = Path(folder)
        page, data = self.to_html(), self.to_json()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.html").write_text(page, encoding="utf-8")
        (folder / "report.json").write_text(data, encoding="utf-8")
        return folder / "report.html", folder / "report.json"


def _plain(x: Any) -> Any:
    """Arrays as lists, NaN and infinity as None."""
    if isinstance(x, np.ndarray):
        return _plain(x.tolist())
    if isinstance(x, dict):
        return {key: _plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x
