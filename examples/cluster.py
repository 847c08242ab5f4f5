"""Attention over processes that talk through the network: one device's numbers, and lost peers.

    python examples/cluster.py                      # 2 and 4 processes, every scheme
    python examples/cluster.py --lose killed        # how the others end if one is killed
    python examples/cluster.py --lose stopped       # how they end if one is stopped

Each process has one CPU device, and JAX's collectives go over loopback by gloo, as they would
between machines. Every scheme's output and gradients are compared with those of one device.

One more process coordinates and has no part of the mesh. Whoever coordinates takes all others with
it when it is lost; so the processes that compute do not.

- A killed peer closes its connections. The next collective of the others raises ValueError, and
  they end with status 1 (see `ends_at_once`), each closing its connections in turn.
- A stopped peer keeps its connections, and a collective waits for it. `jax.distributed` misses its
  heartbeats for ``--heartbeat`` seconds and then aborts the others (status 134 in a shell). Python
  cannot catch that.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from pasa_jax import dot_product_attention, parallel

SCHEMES: dict[str, dict[str, int]] = {
    "all_gather": {},
    "ulysses": {},
    "ring": {},
    "ring_ulysses": {"ulysses_devices": 2},
}
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
COORDINATOR = 0  # `jax.distributed` lets the first process coordinate
BOUND = 1e-5  # of a difference from one device, relative to the largest number
SHAPES = ((2, 50, 4, 16), (2, 50, 2, 16), (2, 50, 2, 16))  # query, key, value; padded inside
ANSWERS = ("output", "d query", "d key", "d value")


class Loss(StrEnum):
    """What happens to a peer."""

    killed = "killed"
    stopped = "stopped"


SIGNALS = {Loss.killed: signal.SIGKILL, Loss.stopped: signal.SIGSTOP}


@dataclass(frozen=True)
class Job:
    """What a process is told.

    Arguments:
      processes: that compute.
      index: of this one; the `COORDINATOR` or one of the ``processes`` after it.
      port: of the coordinator.
      heartbeat: seconds without a sign of life after which a process counts as lost.
      limit: seconds that all of it may take.
      forever: whether to compute the last scheme until a peer is lost.
    """

    processes: int
    schemes: tuple[str, ...]
    heartbeat: int
    limit: int
    forever: bool = False
    port: int = 0
    index: int = COORDINATOR


# One process.


def work(job: Job) -> None:
    """Compares every scheme with one device, and prints a line of JSON for each.

    Raises:
      ArithmeticError: one differs by more than `BOUND`.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"127.0.0.1:{job.port}",
        job.processes + 1,
        job.index,
        initialization_timeout=job.limit,
        heartbeat_timeout_seconds=job.heartbeat,
        shutdown_timeout_seconds=job.limit,
    )
    devices = [x for x in jax.devices() if x.process_index != COORDINATOR]
    if job.index == COORDINATOR:
        return  # and at its exit jax.distributed waits for the others
    with ends_at_once():
        attend_and_compare(job, Mesh(devices, ("sequence",), axis_types=(AxisType.Auto,)))


def attend_and_compare(job: Job, mesh: Mesh) -> None:
    rng = np.random.default_rng(0)
    whole = [rng.standard_normal(shape).astype(np.float32) for shape in SHAPES]
    true = [np.asarray(x) for x in answers(dot_product_attention)(*whole)]
    for scheme in job.schemes:
        start = time.perf_counter()
        options = {"scheme": scheme, **SCHEMES[scheme]}
        attention = parallel.attention_fn(mesh, sequence="sequence", **options)
        run, parts = answers(attention), [spread(x, mesh) for x in whole]
        errors = [far(x, y) for x, y in zip(run(*parts), true, strict=True)]
        if not max(errors) < BOUND:
            raise ArithmeticError(f"{scheme} is {errors} away from one device, relative")
        told = {"scheme": scheme, **dict(zip(ANSWERS, errors, strict=True))}
        print(json.dumps({**told, "seconds": time.perf_counter() - start}), flush=True)
        while job.forever and scheme == job.schemes[-1]:
            jax.block_until_ready(run(*parts))


def answers(attention: Callable[..., Any]) -> Callable[..., list[jax.Array]]:
    """A function of query, key and value: the output, and the gradients of a sum over it."""

    def total(*operands: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = attention(*operands, is_causal=True)
        return jnp.sum(jnp.sin(out)), out

    def run(*operands: jax.Array) -> list[jax.Array]:
        gradients, out = jax.grad(total, (0, 1, 2), has_aux=True)(*operands)
        return [out, *gradients]

    return jax.jit(run, compiler_options=QUICKLY)


def spread(x: np.ndarray, mesh: Mesh) -> jax.Array:
    """x [B, T, …], which every process has, as one array whose tokens lie on all of them."""
    even = x.shape[1] % mesh.size == 0
    places = NamedSharding(mesh, PartitionSpec(None, "sequence" if even else None))
    return jax.make_array_from_callback(x.shape, places, lambda index: x[index])


def far(found: jax.Array, true: np.ndarray) -> float:
    """The largest difference in what this process holds, relative to the largest number."""
    differences = [np.abs(x.data - true[x.index]).max() for x in found.addressable_shards]
    return float(max(differences) / np.abs(true).max())


@contextlib.contextmanager
def ends_at_once() -> Iterator[None]:
    """Ends the process with status 1 where an exception leaves the block, and prints it.

    At a usual exit jax.distributed would first wait for the lost peer, then abort.
    """
    try:
        yield
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


# All processes.


@dataclass
class Peer:
    """A process and what it writes."""

    index: int
    process: subprocess.Popen[bytes]
    output: Path
    log: Path
    ended: float | None = None

    def told(self) -> list[dict[str, Any]]:
        """The lines of JSON that it has printed. (gloo prints lines of its own.)"""
        lines = self.output.read_text().splitlines(keepends=True)
        return [json.loads(x) for x in lines if x.startswith("{") and x.endswith("\n")]

    def running(self) -> bool:
        if self.process.poll() is not None and self.ended is None:
            self.ended = time.monotonic()
        return self.ended is None

    def error(self) -> str:
        """The Python exception that ended it; else why JAX aborted it, or ""."""
        log = self.log.read_text()
        raised = re.findall(r"^[\w.]+(?:Error|Exception|Interrupt)\b.*$", log, re.M)
        aborted = re.findall(r"^F\d{4} .*?\] (.*)$", log, re.M)
        return (raised or aborted or [""])[-1]


@contextlib.contextmanager
def peers(job: Job) -> Iterator[list[Peer]]:
    """Starts the coordinator and the ``job.processes``; none outlives the block."""
    job = replace(job, port=free_port())
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    started: list[Peer] = []
    with tempfile.TemporaryDirectory(prefix="pasa_cluster_") as folder:
        try:
            for index in range(job.processes + 1):
                output, log = (Path(folder, f"{index}.{x}") for x in ("out", "err"))
                told = json.dumps(asdict(replace(job, index=index)))
                with output.open("w") as out, log.open("w") as err:
                    command = [sys.executable, "-u", __file__, "--job", told]
                    process = subprocess.Popen(command, env=env, stdout=out, stderr=err)
                started.append(Peer(index, process, output, log))
            yield started
        finally:
            for peer in started:
                peer.process.kill()
                peer.process.wait()


def alive(some: list[Peer]) -> list[Peer]:
    return [x for x in some if x.running()]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def wait(
    until: Callable[[], bool], seconds: float, each: Callable[[], None] = lambda: None
) -> None:
    """Raises TimeoutError where it is not so within the time."""
    end = time.monotonic() + seconds
    while not until():
        if time.monotonic() > end:
            raise TimeoutError(f"the processes took more than {seconds:.0f} seconds")
        each()
        time.sleep(0.02)


def compare(job: Job, show: Callable[[int], None] = lambda done: None) -> list[dict[str, Any]]:
    """The largest differences from one device over all processes, for each scheme.

    Arguments:
      show: is told how many comparisons are done.

    Raises:
      RuntimeError: a process failed; its log is the message.
      TimeoutError: it takes longer than ``job.limit``.
    """
    with peers(job) as started:
        computing = started[1:]

        def failed() -> list[Peer]:
            return [x for x in started if not x.running() and x.process.returncode != 0]

        def over() -> bool:
            return bool(failed()) or not alive(started)

        wait(over, job.limit, lambda: show(sum(len(x.told()) for x in computing)))
        if failed():
            raise RuntimeError("\n".join(x.log.read_text()[-3000:] for x in failed()))
        told = [x.told() for x in computing]
    show(job.processes * len(job.schemes))
    return [
        {
            "processes": job.processes,
            "scheme": scheme,
            **{name: max(row[name] for row in rows) for name in (*ANSWERS, "seconds")},
        }
        for scheme, rows in zip(job.schemes, zip(*told, strict=True), strict=True)
    ]


def lose(job: Job, loss: Loss) -> list[dict[str, Any]]:
    """How the other processes end if one is lost while all compute.

    Returns:
      For each survivor its status, the seconds from the loss to its end, and its exception or "".

    Raises:
      TimeoutError: one has not ended after ``job.limit`` seconds.
    """
    with peers(replace(job, forever=True)) as started:
        _, lost, *others = started
        computing = [lost, *others]
        ready = len(job.schemes)
        wait(lambda: all(len(x.told()) == ready for x in alive(computing)), job.limit)
        if alive(computing) != computing:
            raise RuntimeError("\n".join(x.log.read_text()[-3000:] for x in computing))
        start = time.monotonic()
        lost.process.send_signal(SIGNALS[loss])
        wait(lambda: not alive(others), job.limit)
        return [
            {
                "process": x.index,
                "status": x.process.returncode,
                "seconds": (x.ended or start) - start,
                "error": x.error(),
            }
            for x in others
        ]


def table(rows: list[dict[str, Any]], title: str) -> Table:
    found = Table(*rows[0], title=title)
    for row in rows:
        found.add_row(*(f"{x:.2g}" if isinstance(x, float) else str(x)[:90] for x in row.values()))
    return found


def main(
    processes: Annotated[list[int] | None, typer.Option(help="How many; default 2 and 4.")] = None,
    scheme: Annotated[list[str] | None, typer.Option(help="Which; default all.")] = None,
    lose_one: Annotated[Loss | None, typer.Option("--lose", help="What befalls a peer.")] = None,
    heartbeat: Annotated[int, typer.Option(help="Seconds until a silent peer is lost.")] = 10,
    limit: Annotated[int, typer.Option(help="Seconds that a run may take.")] = 600,
) -> None:
    """Prints the differences from one device, or how the others end if a peer is lost."""
    console = Console()
    schemes = tuple(scheme or SCHEMES)
    rows: list[dict[str, Any]] = []
    with Progress(console=console, transient=True) as progress:
        for count in processes or (2, 4):
            if lose_one is not None:
                progress.add_task(f"{count} processes, one {lose_one}", total=None)
                job = Job(count, schemes[-1:], heartbeat, limit)
                rows += [{"processes": count, **row} for row in lose(job, lose_one)]
                continue
            bar = progress.add_task(f"{count} processes", total=count * len(schemes))
            job = Job(count, schemes, heartbeat, limit)
            rows += compare(job, lambda done, bar=bar: progress.update(bar, completed=done))
    if lose_one is not None:
        console.print(table(rows, f"One is {lose_one}; the heartbeat's limit is {heartbeat} s"))
        return
    console.print(table(rows, f"Largest differences from one device, relative ({BOUND} allowed)"))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        work(Job(**json.loads(sys.argv[2])))
    else:
        typer.run(main)
