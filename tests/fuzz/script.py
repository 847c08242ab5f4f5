"""Writes a failure as a script of its own, which needs numpy, jax and pasa_jax alone."""

from __future__ import annotations

import base64
import inspect
import io
import textwrap
from pathlib import Path

import numpy as np

from tests.fuzz import functions
from tests.fuzz.calls import by_parts
from tests.fuzz.check import Failure

_SCRIPT = '''"""{title}"""

import base64
import io
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pasa_jax import (  # noqa: F401
    BlockMask, LowRankBias, Precision, Schedule, dot_product_attention, merge, partial_attention
)

jax.config.update("jax_enable_x64", {x64})
TYPES = {types}
PACKED = """
{packed}
"""
STATIC = dict({static})
BATCHED, CUTS = {batched}, {cuts}
inf, nan = float("inf"), float("nan")
FOUND, TRUE, BOUND, INDEX = {found!r}, {true!r}, {bound!r}, {index!r}

arrays = {{
    name: jnp.asarray(x.view(TYPES[name]) if x.dtype == np.uint16 else x, TYPES[name])
    for name, x in np.load(io.BytesIO(base64.b64decode(PACKED))).items()
}}
cotangents = tuple(arrays.pop(name) for name in ("d_out", "d_lse") if name in arrays)


{functions}

arrays, STATIC = as_arguments(arrays, STATIC)
if not BATCHED:
    arrays |= {{name: arrays[name][0] for name in ("query", "key", "value")}}
    cotangents = tuple(x[0] for x in cotangents)


{by_parts}

def attend(moving):
    if CUTS:
        return by_parts(arrays | moving, STATIC, CUTS)
    return dot_product_attention(**(arrays | moving), **STATIC, return_residual=True)


for name, x in arrays.items():
    if hasattr(x, "dtype"):
        print(f"{{name}}: {{x.dtype}}{{list(x.shape)}}")
print(STATIC)
what = {what!r}
if what.startswith("d "):
    name = what[2:]
    found = jax.vjp(jax.jit(attend), {{name: arrays[name]}})[1](cotangents)[0][name]
    INDEX = INDEX if BATCHED or name not in ("query", "key", "value") else INDEX[1:]
else:
    found = jax.jit(attend)({{}})[what == "log-sum-exp"]
    INDEX = INDEX if BATCHED else INDEX[1:]
seen = float(found[INDEX])
print(f"{kind}: {{what}}{{list(INDEX)}} is {{seen!r}}, should be {{TRUE!r}}")
error = abs(seen - TRUE)
print(f"error {{error:.3g}}, bound {{BOUND:.3g}} (when found: {{abs(FOUND - TRUE):.3g}})")
'''


def write(failure: Failure, folder: Path, name: str, title: str) -> Path:
    """folder/name.py, which shows the failure when run in a checkout."""
    x, arrays = failure.call.signature, dict(failure.call.arrays)
    if failure.cotangents is not None:
        arrays |= dict(zip(("d_out", "d_lse"), failure.cotangents, strict=True))
    types = {key: str(y.dtype) for key, y in arrays.items()}
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        **{k: y.view(np.uint16) if y.dtype.itemsize == 2 else y for k, y in arrays.items()},
    )
    numbers = {"found": failure.found, "true": failure.true, "bound": failure.bound}
    text = _SCRIPT.format(
        title=title,
        types=types,
        packed="\n".join(textwrap.wrap(base64.b64encode(buffer.getvalue()).decode(), 96)),
        static=", ".join(f"{k}={v!r}" for k, v in x.static.items()),
        batched=x.batched,
        cuts=x.cuts,
        by_parts=inspect.getsource(by_parts),
        functions=_functions(),
        x64=x.dtype == "float64",
        what=failure.what,
        kind=failure.kind,
        index=failure.index,
        **numbers,
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.py"
    path.write_text(text)
    return path


def _functions() -> str:
    """The text of `tests.fuzz.functions` after its imports."""
    text = inspect.getsource(functions)
    return text[text.index("def dilated") :].strip()
