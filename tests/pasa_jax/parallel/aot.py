"""Compiles the schemes for chips that are not there, and checks what the devices would exchange.

    python -m tests.pasa_jax.parallel.aot --output out/compile_schemes.json      # make test-aot
    python -m tests.pasa_jax.parallel.aot --topology v5e:2x2 --scheme ring

libtpu compiles for whole slices of TPUs and JAX's CUDA plugin for several GPUs (`[aot]` of the
package's extras). Of each program it is checked, in the optimised HLO:

- collectives are of the scheme's kinds, as many as it needs, and a device sends the bytes that
  `parallel.plan` says;
- each transfer of a ring starts before products that do not wait for it, and ends after them;
- arguments, results and temporary arrays fit into a chip's memory.

Three programs at the end have a fault, which must be found.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

MIB, GIB = 2**20, 2**30
# libtpu asks no server for its chips, and several processes may hold it.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# XLA has one transfer of a GPU under way at a time unless it may have more: keys, values, and the
# gradients of both.
GPU_OPTIONS = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_experimental_parallel_collective_overlap_limit": 4,
}
SCHEMES = ("all_gather", "ulysses", "ring", "ring_ulysses")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One program: causal attention in bfloat16 of one sequence, 32 query and 8 key heads of 128.

    Arguments:
      topology: as libtpu names it, or "h100:" and how many.
      ulysses_devices: of `ring_ulysses`.
      expected: the scheme whose exchange is expected, where it is not ``scheme``.
      by_sums: whether parts are gathered and scattered by sums over all devices, as libtpu does it
        in large slices of v5p. A sum sends twice as much.
      overlap: whether a GPU's compiler is asked to send while it computes.
      late: transfers that the compiler is known to finish before the products.
      faulty: whether the program has a fault that must be found.
      limit: seconds that it may take.
    """

    topology: str
    scheme: str
    tokens: int = 2**16
    implementation: str = "lax"
    gradient: bool = False
    ulysses_devices: int | None = None
    expected: str | None = None
    by_sums: bool = False
    overlap: bool = True
    late: int = 0
    faulty: bool = False
    limit: float = 900

    @property
    def chip(self) -> str:
        name = self.topology.split(":")[0]
        return name if name == "h100" else f"tpu_{name}"

    @property
    def devices(self) -> int:
        count = 1
        for x in self.topology.split(":")[1].split("x"):
            count *= int(x)
        return count

    @property
    def title(self) -> str:
        group = "" if self.ulysses_devices is None else f" ({self.ulysses_devices})"
        return f"{self.scheme}{group}"


def _every(topology: str, **more: Any) -> list[Case]:
    groups = {"ring_ulysses": 2}
    return [
        Case(topology=topology, scheme=x, ulysses_devices=groups.get(x), **more) for x in SCHEMES
    ]


MILLION = 2**20
CASES = [
    *_every("v5e:2x2"),
    *_every("v6e:2x2"),
    *_every("v6e:2x2", gradient=True),
    *_every("v6e:2x2", implementation="pallas_tpu"),
    *_every("v6e:2x2", implementation="pallas_tpu", gradient=True),
    *_every("h100:4"),
    *_every("h100:4", gradient=True),
    Case(topology="v5e:4x4", scheme="ring"),
    Case(topology="v5e:4x4", scheme="ring_ulysses", ulysses_devices=8, tokens=MILLION),
    Case(
        topology="v5e:4x4",
        scheme="ring_ulysses",
        ulysses_devices=8,
        tokens=MILLION,
        gradient=True,
        late=1,
    ),
    Case(topology="v6e:4x4", scheme="ulysses", tokens=MILLION, gradient=True),
    Case(topology="v5p:4x4x4", scheme="ring_ulysses", ulysses_devices=32, tokens=MILLION),
    Case(
        topology="v5p:4x4x4",
        scheme="ring_ulysses",
        ulysses_devices=32,
        tokens=MILLION,
        gradient=True,
        late=1,
    ),
    Case(topology="v5p:4x4x4", scheme="all_gather", tokens=MILLION, gradient=True, by_sums=True),
    Case(topology="v5p:16x16x16", scheme="all_gather", tokens=MILLION, gradient=True, by_sums=True),
    Case(topology="v5e:2x2", scheme="all_gather", expected="ulysses", faulty=True),
    Case(topology="v5e:2x2", scheme="ulysses", expected="ring", faulty=True),
    Case(topology="h100:4", scheme="ring", overlap=False, faulty=True),
]


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the compiler made of a case.

    Arguments:
      kinds: how many collectives of each kind.
      sent: bytes that a device sends, all-reduces of numbers left out.
      on_paper: bytes that `parallel.plan` says.
      permutes, overlapped: transfers to a neighbour, and those under which products are computed.
      memory: bytes of arguments, results and temporary arrays.
      held_on_paper: bytes of the arrays that `parallel.plan` says, at the gradient's peak.
      code: bytes of the program.
      seconds: to compile.
      why: what is wrong, or "".
    """

    kinds: dict[str, int]
    sent: float
    on_paper: float
    permutes: int
    overlapped: int
    memory: float
    held_on_paper: float
    code: float
    seconds: float
    why: str = ""


def compiled(case: Case) -> Any:
    """The compiled program, and the seconds that it took."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    from pasa_jax import Schedule, parallel

    mesh = Mesh(np.array(_devices(case)), ("s",), axis_types=(AxisType.Auto,))
    attention = parallel.attention_fn(
        mesh, sequence="s", scheme=case.scheme, ulysses_devices=case.ulysses_devices
    )
    keywords: dict[str, Any] = {"implementation": case.implementation, "is_causal": True}
    if case.implementation != "lax":
        sizes = {"length": case.tokens, "head_dim": 128, "is_causal": True}
        keywords["schedule"] = Schedule.for_target(case.chip, dtype="bfloat16", **sizes)

    def loss(q: Any, k: Any, v: Any) -> Any:
        return jnp.sum(jnp.square(attention(q, k, v, **keywords).astype(jnp.float32)))

    def forward(q: Any, k: Any, v: Any) -> Any:
        return attention(q, k, v, **keywords)

    place = NamedSharding(mesh, PartitionSpec(None, "s"))
    shapes = [(1, case.tokens, heads, 128) for heads in (32, 8, 8)]
    given = [jax.ShapeDtypeStruct(x, jnp.bfloat16, sharding=place) for x in shapes]
    run = jax.jit(jax.grad(loss, (0, 1, 2)) if case.gradient else forward, out_shardings=place)
    lowered = run.lower(*given)
    options = GPU_OPTIONS if case.chip == "h100" and case.overlap else None
    start = time.perf_counter()
    return lowered.compile(compiler_options=options), time.perf_counter() - start


def _devices(case: Case) -> Any:
    from jax.experimental import topologies

    from pallas_kernels.worker import gpu_config

    if case.chip != "h100":
        found = topologies.get_topology_desc(platform="tpu", topology_name=case.topology)
    else:
        found = topologies.get_topology_desc(
            platform="cuda",
            topology_name="h100",
            target_config=gpu_config("h100"),
            topology=f"1x1x{case.devices}",
        )
    assert len(found.devices) == case.devices
    return found.devices


def expected_kinds(case: Case) -> dict[str, int]:
    """How many collectives of each kind the scheme needs."""
    c, u = case.devices, case.ulysses_devices or 1
    hops = c // u
    # Forward keys and values; backward they go round again, and their gradients once more, home.
    ring = 2 * (hops - 1) + (2 * (hops - 1) + 2 * hops if case.gradient else 0)
    twice = 2 if case.gradient else 1
    if case.by_sums:
        return {"all-reduce": 2 * twice}
    kinds = {
        "all_gather": {"all-gather": 2} | ({"reduce-scatter": 2} if case.gradient else {}),
        "ulysses": {"all-to-all": 4 * twice},
        "ring": {"collective-permute": ring},
        "ring_ulysses": {"all-to-all": 4 * twice, "collective-permute": ring},
    }
    return kinds[case.expected or case.scheme]


def examined(case: Case, text: str) -> Found:
    """What stands in the program's optimised HLO, and what is wrong with it."""
    from pasa_jax import parallel
    from tests.pasa_jax.parallel.collectives import collectives

    # Without sums of a few numbers, and the rows by which libtpu moves parts to even addresses.
    found = collectives(text)
    found = [x for x in found if x.sent > 0.01 * max(y.sent for y in found)]
    costs = parallel.plan(
        case.devices,
        *(1, case.tokens, case.tokens, 32, 8, 128),
        chip=case.chip,
        ulysses_devices=case.ulysses_devices or 2,
    ).costs
    (cost,) = [x for x in costs if x.scheme == (case.expected or case.scheme)]
    on_paper = cost.sent + (cost.sent_backward if case.gradient else 0)
    permutes = [x for x in found if x.kind == "collective-permute"]
    one = Found(
        kinds=dict(Counter(x.kind for x in found)),
        sent=sum(x.sent for x in found),
        on_paper=on_paper * (2 if case.by_sums else 1),
        permutes=len(permutes),
        overlapped=sum(x.overlapped for x in permutes),
        memory=0,
        held_on_paper=cost.memory,
        code=0,
        seconds=0,
    )
    return replace(one, why=complaint(case, one))


def complaint(case: Case, found: Found) -> str:
    """What is wrong with a program, or ""."""
    kinds = expected_kinds(case)
    if found.kinds != kinds:
        return f"collectives are {found.kinds}, not {kinds}"
    if abs(found.sent / found.on_paper - 1) > 0.01:
        return f"{found.sent / MIB:.1f} MiB are sent, not {found.on_paper / MIB:.1f}"
    # The last transfer brings gradients home; nothing is left to compute.
    least = found.permutes - (2 if case.gradient else 0) - case.late
    if found.overlapped < least:
        return f"{found.overlapped} of {found.permutes} transfers overlap with products"
    return ""


def measured(case: Case) -> Found:
    """A case, compiled and examined."""
    from pasa_jax.parallel import CHIPS

    program, seconds = compiled(case)
    found = examined(case, program.as_text())
    m = program.memory_analysis()
    memory = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes
    if not found.why and memory > CHIPS[case.chip].memory:
        found = replace(found, why=f"{memory / GIB:.1f} GiB are more than a chip has")
    return replace(found, memory=memory, code=m.generated_code_size_in_bytes, seconds=seconds)


def in_a_process(case: Case) -> dict[str, Any]:
    """`measured`, where a compiler that crashes or lasts harms nobody."""
    command = [sys.executable, "-m", __spec__.name, "--case", json.dumps(asdict(case))]
    try:
        done = subprocess.run(
            command, env=os.environ | ENVIRONMENT, capture_output=True, timeout=case.limit
        )
    except subprocess.TimeoutExpired:
        return {"why": f"not compiled within {case.limit:.0f} seconds"}
    if done.returncode:
        last = [x for x in done.stderr.decode().splitlines() if x.strip() and "----" not in x]
        return {"why": f"status {done.returncode}: {' '.join(last[-3:])[:400]}"}
    return json.loads(done.stdout.decode().splitlines()[-1])


def row(case: Case, found: dict[str, Any]) -> list[str]:
    known = [
        case.topology,
        f"{case.tokens // 1024}k",
        case.title,
        case.implementation,
        "gradient" if case.gradient else "forward",
    ]
    if "sent" not in found:
        return [*known, *[""] * 5, found["why"]]
    return [
        *known,
        ", ".join(f"{n} {kind}" for kind, n in found["kinds"].items()),
        f"{found['sent'] / MIB:.4g} ({found['on_paper'] / MIB:.4g})",
        f"{found['overlapped']} of {found['permutes']}" if found["permutes"] else "–",
        f"{found['memory'] / GIB:.2f}",
        f"{found['seconds']:.0f}",
        found["why"] or ("fault found" if case.faulty else "ok"),
    ]


def main(
    topology: Annotated[list[str] | None, typer.Option(help="Which; default all.")] = None,
    scheme: Annotated[list[str] | None, typer.Option(help="Which; default all.")] = None,
    implementation: Annotated[list[str] | None, typer.Option(help="Which; default all.")] = None,
    gradient: Annotated[bool | None, typer.Option(help="Only these, or only others.")] = None,
    tokens: Annotated[int | None, typer.Option(help="In place of the cases' own.")] = None,
    limit: Annotated[float, typer.Option(help="Seconds that one program may take.")] = 900,
    output: Annotated[Path | None, typer.Option(help="Add the figures to this file.")] = None,
) -> None:
    """Compiles every case, prints a table, and ends with 1 where a program is not as expected."""
    cases = [
        replace(x, limit=limit, tokens=tokens or x.tokens)
        for x in CASES
        if (topology is None or x.topology in topology)
        and (scheme is None or x.scheme in scheme)
        and (implementation is None or x.implementation in implementation)
        and gradient in (None, x.gradient)
    ]
    console = Console(width=200)
    heads = ("topology", "tokens", "scheme", "by", "pass", "collectives", "MiB sent (on paper)")
    table = Table(*heads, "overlapped", "GiB", "seconds", "")
    records = []
    with Progress(console=console, transient=True) as progress:
        for case in progress.track(cases, description="compiling"):
            found = in_a_process(case)
            if case.faulty:
                found["why"] = "" if found["why"] else "the fault is not found"
            records.append({**asdict(case), **found})
            table.add_row(*row(case, found))
            progress.console.print(" | ".join(row(case, found)), style="dim", highlight=False)
            if output is not None:
                _write(output, records)
    console.print(table)
    failures = sum(bool(x["why"]) for x in records)
    console.print(f"{failures} of {len(records)} failed")
    if failures:
        raise typer.Exit(1)


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    names = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin")
    versions = {name: importlib.metadata.version(name) for name in names}
    path.parent.mkdir(parents=True, exist_ok=True)
    date = datetime.now(UTC).date().isoformat()
    path.write_text(json.dumps({"date": date, "versions": versions, "cells": records}, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--case"]:
        print(json.dumps(asdict(measured(Case(**json.loads(sys.argv[2]))))))
    else:
        typer.run(main)
