"""`python -m tests.fuzz.defects`: does the fuzzer see defects that are put in?

Each defect is one change of a line of pasa_jax in a copy. Signatures are drawn until one reaches
the line ("focus"), and run with fixed seeds until a result is beyond its bound; the same signature
must then pass without the defect.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SEED, LIMIT, DATA = 2026, 25, 24


@dataclass(frozen=True)
class Defect:
    """``old`` becomes ``new`` in pasa_jax/``file``; ``focus``: which signatures reach it."""

    name: str
    kind: str  # "structure", or "digits": only the last digits are lost
    file: str
    old: str
    new: str
    focus: str = "any"
    gradient: bool = False


DEFECTS = (
    Defect(
        "the left edge of a window",
        "structure",
        "core/mask.py",
        "            seen = seen & (columns >= at - left)\n",
        "            seen = seen & (columns > at - left)\n",
        "window",
    ),
    Defect(
        "a running sum that is not rescaled",
        "structure",
        "core/tile/softmax.py",
        "        l=old * state.l + new * l_loc,\n",
        "        l=state.l + new * l_loc,\n",
        "blocks",
    ),
    Defect(
        "sinks of the wrong head of a group",
        "structure",
        "implementations/head_walk.py",
        "jnp.repeat(self.head.sinks, self.block_q)",
        "jnp.tile(self.head.sinks, self.block_q)",
        "group sinks",
    ),
    Defect(
        "Inva·F left out of the log-sum-exp",
        "structure",
        "core/tile/state.py",
        "    m = state.m + wide.type(numerics.inva) * state.f",
        "    m = state.m + wide.type(0) * state.f",
        "paper",
    ),
    Defect(
        "the log-sum-exp's cotangent left out",
        "structure",
        "implementations/lax.py",
        "delta = delta - tile.zero_unusable(walk.rows(d_lse, start).astype(wide), live)",
        "delta = delta - 0 * tile.zero_unusable(walk.rows(d_lse, start).astype(wide), live)",
        gradient=True,
    ),
    Defect(
        "a bias's gradient not summed over a group",
        "structure",
        "implementations/lax.py",
        "    return add_at(d_bias, jnp.sum(d_scores, axis=axes, keepdims=True), place)",
        "    d_scores = d_scores[:1] if 0 in axes else d_scores\n"
        "    return add_at(d_bias, jnp.sum(d_scores, axis=axes, keepdims=True), place)",
        "group bias",
        gradient=True,
    ),
    Defect(
        "the soft cap's slope left out",
        "structure",
        "core/tile/reverse.py",
        "d_raw = (d_s if s.slope is None else d_s * s.slope.astype(wide)).astype(operand)",
        "d_raw = d_s.astype(operand)",
        "soft cap",
        gradient=True,
    ),
    Defect(
        "positions at the right edge of a window",
        "structure",
        "core/mask.py",
        "            seen = seen & (columns <= rows + right)\n        return seen\n",
        "            seen = seen & (columns < rows + right)\n        return seen\n",
        "positions",
    ),
    Defect(
        "the lists of tiles by the least position alone",
        "structure",
        "core/visits.py",
        "whole = some & (k_least <= q_most + right), whole & (k_most <= q_least + right)",
        "whole = some & (k_least <= q_least + right), whole & (k_most <= q_least + right)",
        "positions, tiles",
    ),
    Defect(
        "a block mask's partial blocks seen whole",
        "structure",
        "core/mask.py",
        "                seen = (kinds == 2) | (seen & mods.shows(mods.block_mod, place, data))\n",
        "                pass\n",
        "block mask",
    ),
    Defect(
        "a function given the key head's number",
        "structure",
        "core/mods.py",
        "heads=lax.dynamic_slice_in_dim(self.heads, h * groups, groups),",
        "heads=lax.dynamic_slice_in_dim(self.heads, h, groups),",
        "function of heads",
    ),
    Defect(
        "the factors of another head of a group",
        "structure",
        "core/tile/arrays.py",
        "        return x[min(g, len(x) - 1)]\n",
        "        return x[0]\n",
        "group factors",
    ),
    Defect(
        "probabilities rounded to bfloat16 first",
        "digits",
        "core/tile/softmax.py",
        "    p = numerics.exp(exponent)\n",
        "    p = numerics.exp(exponent).astype(jnp.bfloat16)\n",
        "not bfloat16",
    ),
    Defect(
        "the running sum kept in bfloat16",
        "digits",
        "core/tile/softmax.py",
        "        l=old * state.l + new * l_loc,\n",
        "        l=(old * state.l + new * l_loc).astype(jnp.bfloat16).astype(stat),\n",
    ),
    Defect(
        "what is put back for mean kept in 16 bits",
        "digits",
        "core/tile/stored.py",
        "    return product.astype(numerics.statistics)\n\n\ndef _lagging",
        "    return product.astype(query.q.dtype).astype(numerics.statistics)\n\n\ndef _lagging",
        "mean",
    ),
    Defect(
        "the mean of a tail over n instead of its own keys",
        "digits",
        "core/blocks.py",
        "    kappa = mean_key(per_block(clean * part, n, jnp.sum), count, wide) / part",
        "    count = jnp.full_like(count, n)\n"
        "    kappa = mean_key(per_block(clean * part, n, jnp.sum), count, wide) / part",
        "mean with a tail",
    ),
    Defect(
        "scores rounded before the reference is taken off",
        "digits",
        "core/tile/stored.py",
        "        z = product.astype(stat)\n",
        "        z = product.astype(store).astype(stat)\n",
        "reference",
    ),
    Defect(
        "what rounding took off the output left out of delta",
        "digits",
        "implementations/lax.py",
        "delta = jnp.sum(d_o * (out.astype(wide) + rest.astype(wide)), axis=1, keepdims=True)",
        "delta = jnp.sum(d_o * (out.astype(wide) + 0 * rest.astype(wide)), axis=1, keepdims=True)",
        "exact scores",
        gradient=True,
    ),
    Defect(
        "float16's gradients from float16 products",
        "digits",
        "core/tile/reverse.py",
        "    operand = wide if q.dtype == jnp.float16 else q.dtype\n",
        "    operand = q.dtype\n",
        "float16",
        gradient=True,
    ),
)

# What a signature must have, as its attributes and keywords say.
FOCUS: dict[str, Callable] = {
    "any": lambda x: True,
    "window": lambda x: "local_window_size" in x.static and min(x.s, x.t) > 8,
    "blocks": lambda x: x.s > x.schedule.block_kv,
    "group sinks": lambda x: x.n > x.k and "sinks" in x.extra,
    "group bias": lambda x: x.n > x.k and _one_head(x.extra.get("bias")),
    "paper": lambda x: x.static.get("shift") == "paper",
    "soft cap": lambda x: "logits_soft_cap" in x.static,
    "not bfloat16": lambda x: x.dtype != "bfloat16",
    "mean": lambda x: x.dtype != "float32" and x.static.get("shift") == "mean",
    "mean with a tail": lambda x: (
        x.static.get("shift") == "mean" and x.s % min(x.schedule.block_kv, x.s) > 0
    ),
    "reference": lambda x: x.static.get("shift") == "reference",
    "exact scores": lambda x: x.dtype != "float32" and x.static.get("precision") == "float32",
    "float16": lambda x: x.dtype == "float16",
    "positions": lambda x: "q_positions" in x.extra and "is_causal" in x.static,
    "positions, tiles": lambda x: (
        "q_positions" in x.extra
        and x.s > 2 * x.schedule.block_kv
        and "is_causal" in x.static
        and x.schedule.block_q > x.n // x.k
    ),
    "block mask": lambda x: "kinds" in x.extra,
    "function of heads": lambda x: x.static.get("mask_mod") == "dilated" and x.n > x.k > 1,
    "group factors": lambda x: x.n > x.k and len(x.extra.get("q_factors", ((), ""))[0]) == 3,
}


def _one_head(bias: tuple | None) -> bool:
    return bias is not None and bias[1] != "int32" and (len(bias[0]) < 3 or bias[0][-3] == 1)


def hunt(defect: Defect, only: int | None = None) -> dict:
    """Fuzzes the tree that is imported until something fails that is not known."""
    import numpy as np

    from tests.fuzz import calls, check, fuzz, known

    start, tried = time.time(), 0
    for index in [only] if only is not None else range(10**4):
        rng = np.random.default_rng([SEED, index])
        signature = calls.draw_signature(rng, fuzz.NARROW)
        if signature.static["implementation"] != "lax" or not FOCUS[defect.focus](signature):
            continue
        tried += 1
        tally = check.Tally()
        fuzz.checked(signature, rng, tally, data=DATA, gradient=defect.gradient)
        new = [f for f in tally.failures if known.name_of(f) is None]
        if new:
            line = fuzz._line(new[0], index)
            return {"caught": index, "line": line, "tried": tried, "s": time.time() - start}
        if tried == LIMIT or time.time() - start > 240:
            break
    return {"caught": None, "line": "", "tried": tried, "s": time.time() - start}


def with_defect(defect: Defect, folder: Path) -> None:
    """Copies pasa_jax and this fuzzer to ``folder`` and puts the defect in."""
    for part in ("pasa_jax", "tests/fuzz"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tests" / "__init__.py").touch()
    put_in(folder / "pasa_jax" / defect.file, defect.name, defect.old, defect.new)


def put_in(path: Path, name: str, old: str, new: str) -> None:
    """Puts the defect ``name`` in: ``new`` for ``old``, which must stand once in the file."""
    text = path.read_text(encoding="utf-8")
    if text.count(old) != 1:
        raise ValueError(f"{name}: its line stands {text.count(old)} times in {path}")
    path.write_text(text.replace(old, new), encoding="utf-8")


def _child(folder: Path, number: int, only: int | None) -> dict:
    command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz.defects", "--child", str(number)]
    command += [] if only is None else ["--only", str(only)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def try_defect(number: int) -> tuple[Defect, dict, dict]:
    """What the fuzzer says of one defect, and of the same signature without it."""
    with tempfile.TemporaryDirectory() as name:
        with_defect(DEFECTS[number], Path(name))
        found = _child(Path(name), number, None)
    clean = {"caught": None}
    if found["caught"] is not None:
        clean = _child(ROOT, number, found["caught"])
    return DEFECTS[number], found, clean


def main() -> int:
    """Tries every defect; 1 if one is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", type=int)
    parser.add_argument("--only", type=int)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("numbers", nargs="*", type=int)
    given = parser.parse_args()
    if given.child is not None:
        print(json.dumps(hunt(DEFECTS[given.child], given.only)))
        return 0
    caught = 0
    numbers = given.numbers or range(len(DEFECTS))
    with ThreadPoolExecutor(given.workers) as pool:
        for defect, found, clean in pool.map(try_defect, numbers):
            fine = found["caught"] is not None and clean["caught"] is None
            caught += fine
            verdict = "caught" if fine else "MISSED"
            if clean["caught"] is not None:
                verdict = "FAILS WITHOUT IT TOO"
            print(
                f"{verdict:8} {defect.kind:9} {found['s']:4.0f} s, {found['tried']:2} signatures: "
                f"{defect.name}\n    {found['line'][:150]}",
                flush=True,
            )
    print(f"{caught} of {len(numbers)} caught")
    return int(caught < len(numbers))


if __name__ == "__main__":
    raise SystemExit(main())
