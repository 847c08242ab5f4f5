"""`Report`: what `inspect` found, as text, as data and as a page."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from pasa_jax._extras import require
from pasa_jax.diagnostics import _verdict
from pasa_jax.diagnostics._call import Call
from pasa_jax.diagnostics._tables import tables

EXTRA = "diagnostics"


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
        return _verdict.heads_of(self.calls)

    @property
    def overflowing(self) -> list[tuple[int, int]]:
        """(call, head) of every head with a q·k beyond float16, largest first."""
        return _verdict.overflowing(self.calls)

    def inaccurate(self, dtype: str) -> list[tuple[int, int]]:
        """(call, head) of every head that eager code in ``dtype`` gets wrong, overflow included."""
        return _verdict.inaccurate(self.calls, dtype)

    @property
    def verdict(self) -> str:
        """One sentence: which heads overflow float16."""
        return _verdict.verdict(self.calls)

    @property
    def advice(self) -> list[str]:
        """Sentences: a repair for each way by which attention was called, and what none repairs."""
        return _verdict.advice(self.calls)

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
        Console().print(*tables(self.calls, rows), sep="\n")

    def to_html(self) -> str:
        """One self-contained page with the plots.

        Raises:
          ModuleNotFoundError: the extra ``diagnostics`` is not installed.
        """
        for module in ("matplotlib", "jinja2"):
            require(module, EXTRA)
        from pasa_jax.diagnostics._page import page  # it needs the extra

        return page(self.calls)

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
