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

    def put_into(self, folder: Path) -> None:
        path = folder / self.file
        text = path.read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: stands {text.count(self.old)} times in {self.file}")
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")


MUTANTS: tuple[Mutant, ...] = ()


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
        mutant.put_into(folder)
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
