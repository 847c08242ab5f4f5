"""Defects that `make test` must catch, put into a copy of the packages one after another.

    python -m tests.mutants [NUMBER …]

Each defect names the test files of `make test` that are run against it; it is caught if one of
their tests fails.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.defects import put_in

ROOT = Path(__file__).parents[1]
COPIED = ("pasa_jax", "pallas_kernels", "npu_bridge", "tests", "examples", "benchmarks")
FILES = ("pyproject.toml", "conftest.py")


@dataclass(frozen=True)
class Mutant:
    """In ``file``, ``old`` becomes ``new``; ``tests`` are run."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS = (
    Mutant(
        "the running sum is not rescaled",
        "pasa_jax/core/tile/softmax.py",
        "        l=old * state.l + new * l_loc,\n",
        "        l=state.l + new * l_loc,\n",
        ("tests/pasa_jax/test_contract.py",),
    ),
    Mutant(
        "the paper's mean is not multiplied by Inva",
        "pasa_jax/core/tile/softmax.py",
        "(inva * (s.offset - f)).astype(wide)",
        "(s.offset - f).astype(wide)",
        ("tests/pasa_jax/test_contract.py",),
    ),
    Mutant(
        "keys of 8 bits keep their mean",
        "pasa_jax/core/eight_bits.py",
        "k.astype(wide) - spread(kappa.astype(wide), n, len(k))",
        "k.astype(wide)",
        ("tests/pasa_jax/test_eight_bits.py",),
    ),
    Mutant(
        "a key of 8 bits has the scale of the one before it",
        "pasa_jax/implementations/head_walk.py",
        'extra["scale"] = scale.reshape(1, -1)',
        'extra["scale"] = jnp.roll(scale, 1).reshape(1, -1)',
        ("tests/pasa_jax/test_eight_bits.py",),
    ),
    Mutant(
        "a gradient of products of 8 bits is given",
        "pasa_jax/call/differentiation.py",
        "    if core.plan.precision.eight_bits:\n",
        "    if False:\n",
        ("tests/pasa_jax/test_eight_bits.py",),
    ),
    Mutant(
        "the offset of a block mean lacks the scale",
        "pasa_jax/core/tile/stored.py",
        "numerics.product, numerics) * query.gain\n    product = product if",
        "numerics.product, numerics)\n    product = product if",
        ("tests/pasa_jax/test_contract.py",),
    ),
    Mutant(
        "a key that is not finite is read as 0",
        "pasa_jax/core/tile/inputs.py",
        "    return jnp.where(usable, x, jnp.full_like(x, jnp.nan))",
        "    return x",
        ("tests/pasa_jax/test_promises.py",),
    ),
    Mutant(
        "the derivative of the soft cap is not squared",
        "pasa_jax/core/tile/stored.py",
        "1 - tanh * tanh",
        "1 - tanh",
        ("tests/pasa_jax/test_gradients.py",),
    ),
    Mutant(
        "the gradient of the softmax lacks its mean",
        "pasa_jax/core/tile/reverse.py",
        "d_s = p * (d_p - beside(delta))",
        "d_s = p * d_p",
        ("tests/pasa_jax/test_gradients.py",),
    ),
    Mutant(
        "a sink's weight is not rescaled",
        "pasa_jax/core/tile/state.py",
        "of_a * a.l + of_b * b.l",
        "of_a * a.l + b.l",
        ("tests/pasa_jax/test_contract.py",),
    ),
    Mutant(
        "the gain of the values is not taken out",
        "pasa_jax/core/tile/state.py",
        "        out = out / value_gain.astype(out.dtype)\n",
        "        pass\n",
        ("tests/pasa_jax/test_promises.py",),
    ),
    Mutant(
        "what dropout keeps is not scaled up in the gradient",
        "pasa_jax/core/tile/reverse.py",
        "d_out * wide.type(1 / numerics.kept_share)",
        "d_out * wide.type(1)",
        ("tests/pasa_jax/test_dropout.py",),
    ),
    Mutant(
        "the guard forgets the size of the query",
        "pasa_jax/core/guard.py",
        "log2 = of_q + jnp.maximum(of_k, of_shifted)",
        "log2 = jnp.maximum(of_k, of_shifted)",
        ("tests/pasa_jax/test_promises.py",),
    ),
    Mutant(
        "auto shifts where it does not help",
        "pasa_jax/core/choice.py",
        "* towards > around",
        "* towards < around",
        ("tests/pasa_jax/test_statistics.py",),
    ),
    Mutant(
        "the left edge of a window",
        "pasa_jax/core/mask.py",
        "seen & (columns >= at - left)",
        "seen & (columns > at - left)",
        ("tests/pasa_jax/test_contract.py",),
    ),
    Mutant(
        "the last query stands at the last slot, not the last valid key",
        "pasa_jax/core/mask.py",
        "return self.valid_keys() - self.valid_queries()",
        "return self.key_length - self.valid_queries()",
        ("tests/pasa_jax/test_contract.py",),
    ),
    Mutant(
        "a query sees segments up to its own",
        "pasa_jax/core/mask.py",
        "(q[:, None] == k[None, :])",
        "(q[:, None] >= k[None, :])",
        ("tests/pasa_jax/test_contract.py",),
    ),
    Mutant(
        "a cut tile is taken for a whole one",
        "pasa_jax/core/mask.py",
        "start + 1 + place + right",
        "stop + place + right",
        ("tests/pasa_jax/test_contract.py",),
    ),
    Mutant(
        "one row of padding is in use",
        "pasa_jax/core/walk.py",
        "if lengths is None else row < lengths",
        "if lengths is None else row <= lengths",
        ("tests/pasa_jax/test_contract.py",),
    ),
    Mutant(
        "keys of an overlapping tile count twice",
        "pasa_jax/core/walk.py",
        "seen & (columns >= j * n)",
        "seen & (columns >= 0)",
        ("tests/pasa_jax/test_contract.py",),
    ),
    Mutant(
        "rows of an overlapping tile are written again",
        "pasa_jax/implementations/head_walk.py",
        "return used if new is None else used & new",
        "return used",
        ("tests/pasa_jax/test_gradients.py",),
    ),
    Mutant(
        "the mask of the first head for all",
        "pasa_jax/core/bits.py",
        "lax.dynamic_slice_in_dim(x, h * groups, groups)",
        "lax.dynamic_slice_in_dim(x, 0, groups)",
        ("tests/pasa_jax/test_contract.py",),
    ),
    Mutant(
        "the bias's gradient at the first key",
        "pasa_jax/implementations/lax.py",
        "0 if 2 in axes else at)",
        "0)",
        ("tests/pasa_jax/test_gradients.py",),
    ),
    Mutant(
        "the log-sum-exp has no gradient",
        "pasa_jax/implementations/lax.py",
        "            delta = delta - tile.",
        "            delta = delta + 0 * tile.",
        ("tests/pasa_jax/test_gradients.py",),
    ),
    Mutant(
        "lengths wrap in their own type",
        "pasa_jax/call/checks.py",
        "jnp.clip(array, array.dtype.type(0), array.dtype.type(most)).astype(jnp.int32)",
        "jnp.clip(array.astype(jnp.int8).astype(jnp.int32), 0, most)",
        (
            "tests/pasa_jax/test_reported.py",
            "tests/pasa_jax/test_contract.py",
        ),
    ),
    Mutant(
        "a TPU takes the sinks of the first heads",
        "pallas_kernels/_tpu_walk.py",
        "self.refs.sinks[first + g]",
        "self.refs.sinks[g]",
        ("tests/pallas_kernels/test_both.py",),
    ),
    Mutant(
        "flax's mask is not inverted where it is broadcast",
        "pasa_jax/plugins/_adapter.py",
        "(*batch, *x.shape[-3:])).reshape(-1, *x.shape[-3:])",
        "(*batch, *x.shape[-3:])).reshape(-1, *x.shape[-3:])[::-1]",
        (
            "tests/pasa_jax/plugins/test_nnx.py",
            "tests/pasa_jax/plugins/test_linen.py",
        ),
    ),
    Mutant(
        "dropout of a deterministic module",
        "pasa_jax/plugins/_adapter.py",
        "drops = not deterministic and dropout_rate > 0",
        "drops = dropout_rate > 0",
        (
            "tests/pasa_jax/plugins/test_nnx.py",
            "tests/pasa_jax/plugins/test_linen.py",
        ),
    ),
    Mutant(
        "the cache writes one place too far",
        "pasa_jax/plugins/cache.py",
        "place = self.length[:, None] + step  # [B, T]",
        "place = self.length[:, None] + step + 1  # [B, T]",
        ("tests/pasa_jax/plugins/test_cache.py",),
    ),
    Mutant(
        "the largest norms of a page are of the new keys alone",
        "pasa_jax/core/pages.py",
        "return old.at[page].max(x.astype(old.dtype), mode",
        "return old.at[page].set(x.astype(old.dtype), mode",
        ("tests/pasa_jax/plugins/test_cache.py",),
    ),
    Mutant(
        "what is said of a page is not forgotten when it begins again",
        "pasa_jax/core/pages.py",
        "begun = jnp.where(slot == 0, page, self.count)",
        "begun = jnp.full_like(page, self.count)",
        ("tests/pasa_jax/serving/test_paged.py",),
    ),
    Mutant(
        "values that no row sees are not cleaned",
        "pasa_jax/implementations/page_walk.py",
        "shown = None if seen is None else jnp.any(seen, axis=0)[:, None]",
        "shown = None if seen is None else jnp.ones((self.block_kv, 1), bool)",
        ("tests/pasa_jax/serving/test_paged.py",),
    ),
    Mutant(
        "the pages of a layer are those of the first",
        "pasa_jax/serving/_cache.py",
        "jnp.where(there, page + layer * self._per_layer, self.pages.count)",
        "jnp.where(there, page, self.pages.count)",
        ("tests/pasa_jax/serving/test_paged.py",),
    ),
    Mutant(
        "shared pages are not copied",
        "pasa_jax/serving/_cache.py",
        "pages=self.pages.copied(source, target), table=table), batch",
        "pages=self.pages, table=table), batch",
        ("tests/pasa_jax/serving/test_paged.py",),
    ),
    Mutant(
        "the pages behind a window are asked for",
        "pasa_jax/serving/_cache.py",
        "if seen is not None:\n            lo =",
        "if seen is None:\n            lo =",
        ("tests/pasa_jax/serving/test_paged.py",),
    ),
    Mutant(
        "the mean is not added to packed keys",
        "pasa_jax/core/packed.py",
        "g, -1) + mean[:, None]).reshape",
        "g, -1) + 0 * mean[:, None]).reshape",
        ("tests/pasa_jax/serving/test_packed.py",),
    ),
    Mutant(
        "a fork takes the packed group in place of the open one",
        "pasa_jax/core/packed.py",
        "is_open = length // g == of_source // g",
        "is_open = length < 0",
        ("tests/pasa_jax/serving/test_packed.py",),
    ),
    Mutant(
        "a group is packed one token too early",
        "pasa_jax/core/packed.py",
        "full = now & (slot % g == g - 1)",
        "full = now & (slot % g == g - 2)",
        ("tests/pasa_jax/serving/test_packed.py",),
    ),
    Mutant(
        "a block holds the page of the block beside it",
        "pallas_kernels/tpu_pages.py",
        "* specs.pages + place]",
        "* specs.pages + (place + 1) % specs.pages]",
        ("tests/pallas_kernels/test_pages.py",),
    ),
    Mutant(
        "partly seen tiles of pages have no mask",
        "pallas_kernels/_tpu_pages_program.py",
        "partial(fold, True)",
        "partial(fold, False)",
        ("tests/pallas_kernels/test_pages.py",),
    ),
    Mutant(
        "the last key tile of pages is not read",
        "pallas_kernels/_tpu_pages_program.py",
        "pl.when((j < sight.hi) & ~whole)",
        "pl.when((j < sight.hi - 1) & ~whole)",
        ("tests/pallas_kernels/test_pages.py",),
    ),
    Mutant(
        "a sink counts twice over pages",
        "pallas_kernels/_tpu_pages_program.py",
        "inputs.sinks[place + g])",
        "inputs.sinks[place + g] + 0.6931)",
        ("tests/pallas_kernels/test_pages.py",),
    ),
    Mutant(
        "hidden values of a page are multiplied",
        "pallas_kernels/_pages.py",
        "v = tile.zero_unusable(v, self.shown(j))\n        kappa",
        "kappa",
        ("tests/pallas_kernels/test_pages.py",),
    ),
    Mutant(
        "every sequence reads the pages of the first",
        "pallas_kernels/tpu_pages.py",
        "by_step[tiles.sequence]",
        "by_step[tiles.sequence * 0]",
        ("tests/pallas_kernels/test_pages.py",),
    ),
    Mutant(
        "keys of 8 bits lack the means of their groups",
        "pasa_jax/core/tile/stored.py",
        "product = product + _means_product(query, key, numerics)",
        "pass",
        ("tests/pallas_kernels/test_packed_pages.py",),
    ),
    Mutant(
        "values of 8 bits lack their scales",
        "pasa_jax/core/tile/softmax.py",
        ".astype(numerics.statistics) * key.value_scale",
        ".astype(numerics.statistics)",
        ("tests/pallas_kernels/test_packed_pages.py",),
    ),
    Mutant(
        "the open group is that of the first sequence",
        "pallas_kernels/_pages.py",
        "else row[tiles.sequence]",
        "else row[tiles.sequence * 0]",
        ("tests/pallas_kernels/test_packed_pages.py",),
    ),
    Mutant(
        "on a GPU two parts share a key tile",
        "pallas_kernels/gpu_pages.py",
        "hi = jnp.minimum(lo + each, whole.hi)",
        "hi = jnp.minimum(lo + each + 1, whole.hi)",
        ("tests/pallas_kernels/test_pages.py",),
    ),
    Mutant(
        "on a GPU a row is sought in the page before",
        "pallas_kernels/gpu_pages.py",
        "self.numbers.sequence * self.blocks + block])",
        "self.numbers.sequence * self.blocks + jnp.maximum(block - 1, 0)])",
        ("tests/pallas_kernels/test_pages.py",),
    ),
    Mutant(
        "a Llama's rows are not permuted",
        "pasa_jax/models/_gguf.py",
        "x.reshape(heads, -1, 2, *x.shape[1:])",
        "x.reshape(heads, 2, -1, *x.shape[1:])",
        ("tests/pasa_jax/models/test_gguf.py",),
    ),
    Mutant(
        "ε outside of the root",
        "pasa_jax/models/decoder.py",
        "lax.rsqrt(square + self.epsilon)",
        "lax.rsqrt(square)",
        ("tests/pasa_jax/models/test_decoder.py",),
    ),
    Mutant(
        "rotary positions of half the speed",
        "pasa_jax/core/rotary.py",
        "(-np.arange(0, size, 2) / size)\n    angle = positions",
        "(-np.arange(0, size, 2) / (2 * size))\n    angle = positions",
        ("tests/pasa_jax/models/test_decoder.py",),
    ),
    Mutant(
        "a number minus a vector keeps the vector's sign",
        "npu_bridge/lower/arithmetic.py",
        'to.with_scalar("Adds", to.with_scalar("Muls", b, Scalar(-1.0), hint), a, hint)',
        'to.with_scalar("Adds", b, a, hint)',
        ("tests/npu_bridge/test_lower.py",),
    ),
    Mutant(
        "a comparison with the number on the left loses equality",
        "npu_bridge/lower/rules.py",
        '_SWAPPED = {"GE": "LE"',
        '_SWAPPED = {"GE": "LT"',
        ("tests/npu_bridge/test_lower.py",),
    ),
    Mutant(
        "tanh has the wrong sign",
        "npu_bridge/lower/conditions.py",
        'compared(to, "GE", x, Scalar(0.0))',
        'compared(to, "LE", x, Scalar(0.0))',
        ("tests/npu_bridge/test_lower.py",),
    ),
    Mutant(
        "no barrier before memory is written again",
        "npu_bridge/barriers.py",
        " or _overlap(writes, read)",
        "",
        ("tests/npu_bridge/test_kernels.py",),
    ),
)


def failing_test(mutant: Mutant) -> tuple[str | None, float]:
    """The first test that fails with the defect, and the seconds until then."""
    start = time.time()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in COPIED:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / part, folder / part, ignore=ignored)
        for file in FILES:
            shutil.copy(ROOT / file, folder)
        put_in(folder / mutant.file, mutant.name, mutant.old, mutant.new)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, *mutant.tests], cwd=folder, capture_output=True, text=True, check=False
        )
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{mutant.name}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    failed = [x for x in done.stdout.splitlines() if x.startswith(("FAILED", "ERROR"))]
    return failed[0] if done.returncode else None, time.time() - start


def main() -> int:
    """Tries every defect; 1 if one is not caught."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("numbers", nargs="*", type=int)
    given = parser.parse_args()
    mutants = [MUTANTS[i] for i in given.numbers or range(len(MUTANTS))]
    caught = 0
    with ThreadPoolExecutor(given.workers) as pool:
        for mutant, (failed, seconds) in zip(mutants, pool.map(failing_test, mutants), strict=True):
            caught += failed is not None
            print(f"{seconds:4.0f} s  {mutant.name}: {failed or 'NOT CAUGHT'}"[:160], flush=True)
    print(f"{caught} of {len(mutants)} caught")
    return int(caught < len(mutants))


if __name__ == "__main__":
    raise SystemExit(main())
