"""Which heads of a model overflow in 16 bits, why, and what to do: docs/diagnose.md.

`inspect`   runs a model and measures every attention call on the way
`Report`    what it found: a table, JSON, a self-contained HTML page
"""

from pasa_jax.diagnostics._call import Call
from pasa_jax.diagnostics._collect import inspect
from pasa_jax.diagnostics.report import Report

__all__ = ["Call", "Report", "inspect"]
