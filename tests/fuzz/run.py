"""`python -m tests.fuzz`: random calls against their bounds, one process a core."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

import numpy as np

TURN = 12  # signatures of one process; then a fresh one, whose memory holds no old programs


def main() -> int:
    """Fuzzes for some minutes; 1 if anything failed whose cause is not known."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=Path("out/fuzz"))
    given = parser.parse_args()
    seed = int(time.time()) if given.seed is None else given.seed
    print(f"seed {seed}", flush=True)
    end = time.time() + 60 * given.minutes
    total = Report()
    turns = iter(range(10**6))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(given.workers, mp_context=context, max_tasks_per_child=1) as pool:

        def start() -> Future[Report]:
            return pool.submit(_turn, seed, next(turns), given.output, end)

        running = {start() for _ in range(given.workers)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                total.add(future.result())
                if time.time() < end:
                    running.add(start())
    print(total.text())
    return int(any(name is None for name in total.kinds))


class Report:
    """What all processes have checked."""

    def __init__(self) -> None:
        self.outputs = self.gradients = self.signatures = 0
        self.kinds: Counter[str | None] = Counter()
        self.lines: list[str] = []
        self.ratios: dict[str, list[float]] = {}

    def add(self, other: Report) -> None:
        self.outputs += other.outputs
        self.gradients += other.gradients
        self.signatures += other.signatures
        self.kinds.update(other.kinds)
        self.lines += other.lines
        for line in other.lines:
            print(line, flush=True)
        for name, found in other.ratios.items():
            self.ratios.setdefault(name, []).extend(found)

    def text(self) -> str:
        head = f"{self.signatures} signatures, {self.outputs} outputs, {self.gradients} gradients"
        lines = [head, "", "largest error / bound of a call (quantiles 10, 50, 90, 99 %, all):"]
        for name, found in sorted(self.ratios.items()):
            below = [r for r in found if r <= 1]
            marks = np.quantile(below, [0.1, 0.5, 0.9, 0.99, 1]) if below else []
            lines.append(f"  {name:12} {len(found):6}  " + " ".join(f"{m:.2g}" for m in marks))
        lines += ["", "failures:"] + [
            f"  {count:5} {name or 'NEW'}" for name, count in self.kinds.most_common()
        ]
        return "\n".join(lines)


def _turn(seed: int, turn: int, folder: Path, end: float) -> Report:
    """One process's share: some signatures, until ``end``."""
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    import jax

    from tests.fuzz import fuzz

    wide = turn % 8 == 7
    jax.config.update("jax_enable_x64", wide)
    report = Report()
    for i in range(TURN):
        if time.time() > end:
            break
        fuzz.one_signature(seed, turn * TURN + i, wide, folder, report)
    return report
