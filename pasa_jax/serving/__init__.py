"""Serving: keys and values of many sequences in pages, and attention over them.

`PagedCache`     pages, a table and attention of a step's new tokens, under one `jax.jit`
`Table`          which page holds which tokens: append, fork, free, trim
`format_errors`  what 8-bit keys and values would cost a call, head by head
`sals`           keys in few coordinates, and attention over the tokens that matter
`layouts`        pages and tables as other libraries lay them out, and back

docs/serving.md shows each at work.
"""

from pasa_jax.serving import layouts
from pasa_jax.serving._cache import Batch, PagedCache
from pasa_jax.serving._formats import as_stored, format_errors
from pasa_jax.serving._table import Places, Table

__all__ = [
    "Batch",
    "PagedCache",
    "Places",
    "Table",
    "as_stored",
    "format_errors",
    "layouts",
]
