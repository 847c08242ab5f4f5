"""One signature: compiled once, run on many random arrays, every result checked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.fuzz import calls, check, known, script
from tests.fuzz.calls import Call, Signature
from tests.fuzz.check import Failure, Tally

DATA = 60  # calls of a signature
NARROW = ("float16", "float16", "bfloat16", "float32")
RUBBISH = (np.nan, np.inf, -np.inf, 6e4)


def one_signature(seed: int, index: int, wide: bool, folder: Path, report: Any) -> None:
    """Checks signature ``index`` of ``seed`` and adds what was found to ``report``."""
    rng = np.random.default_rng([seed, index])
    signature = calls.draw_signature(rng, ("float64",) if wide and index % 3 else NARROW)
    tally = Tally()
    checked(signature, rng, tally, data=DATA, gradient=rng.random() < 0.45)
    report.outputs += tally.outputs
    report.gradients += tally.gradients
    report.signatures += 1
    for name, ratios in tally.ratios.items():
        report.ratios.setdefault(name, []).extend(ratios)
    seen: set[tuple[str, str, str | None]] = set()
    for failure in tally.failures:
        failure = replace(failure, known=known.name_of(failure))
        kind = (failure.what, failure.kind, failure.known)
        report.kinds[failure.known] += 1
        if kind not in seen:  # one script for each kind of a signature
            seen.add(kind)
            report.lines.append(_line(failure, index))
            place = folder / ("known" if failure.known else "new")
            title = f"Seed {seed}, signature {index}: {failure.known or 'of unknown cause'}."
            name = f"{seed}_{index}_{failure.what}_{failure.kind}".replace(" ", "-")
            script.write(failure, place, name, title)


def checked(
    signature: Signature, rng: np.random.Generator, tally: Tally, *, data: int, gradient: bool
) -> None:
    """Compiles a signature and checks ``data`` calls of it."""
    run = calls.compiled_gradient(signature) if gradient else calls.compiled(signature)
    for i in range(data):
        call = calls.draw_call(signature, rng, hard=i % 2 == 1)
        cotangents = _cotangents(signature, rng) if gradient else ()
        try:
            found = jax.block_until_ready(run(call.arrays, *cotangents))
        except ValueError as error:
            if "lead to a fixed point" not in str(error):  # of the paper's β: documented
                numbers = (np.nan, np.nan, 0.0)
                tally.failures.append(Failure(call, str(error)[:200], "raised", (), *numbers))
            return
        true, allowed = check.outputs(call, found[:2], tally)
        if gradient:
            check.gradients(call, true, allowed, *cotangents, found[2], tally)
        if i % 3 == 0:
            _spoil(call, run, cotangents, found, float(rng.choice(RUBBISH)), tally)


def _cotangents(x: Signature, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    d_out = rng.standard_normal((x.b, x.t, x.n, x.e)).astype(jnp.dtype(x.dtype))
    d_lse = rng.standard_normal((x.b, x.t, x.n)) * (rng.random() < 0.7)
    return d_out, d_lse.astype(np.float64 if x.dtype == "float64" else np.float32)


def _spoil(call: Call, run: Any, cotangents: Any, found: Any, rubbish: float, tally: Tally) -> None:
    """What nobody sees is replaced by rubbish: every result must be as good as before."""
    spoiled = check.spoiled(call, rubbish)
    if spoiled is None:
        return
    again = jax.block_until_ready(run(spoiled.arrays, *cotangents))
    true, allowed = check.outputs(spoiled, again[:2], tally)
    if cotangents:
        check.gradients(spoiled, true, allowed, *cotangents, again[2], tally)


def _line(f: Failure, index: int) -> str:
    x = f.call.signature
    static = {k: v for k, v in x.static.items() if k != "schedule"}
    s = x.schedule
    sizes = f"B{x.b} T{x.t} S{x.s} N{x.n} K{x.k} D{x.d} E{x.e} tiles {s.block_q}x{s.block_kv}"
    return (
        f"[{f.known or 'NEW'}] {index}: {f.what} {f.kind} at {f.index}: {f.found:.7g} for "
        f"{f.true:.7g} ± {f.bound:.3g}; {x.dtype} {sizes} {s.target} {static} {f.call.kinds}"
        + (f" cut at {x.cuts}" if x.cuts else "")
    )
