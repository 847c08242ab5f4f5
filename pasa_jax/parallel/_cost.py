"""What each scheme costs a device: bytes sent, operations, memory, and time on paper.

The formulas are short, and a test compares bytes and operations with the compiled program. Letters:
c devices of the sequence, u that share heads, b, n, k the device's batch entries, query and key
heads (after repetition), t and s its tokens and keys, z bytes of a number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from pasa_jax.core.errors import check_choice, wrong
from pasa_jax.core.target import target_of_device
from pasa_jax.parallel._schemes import shared_heads

GB = 10**9


@dataclass(frozen=True)
class Chip:
    """A chip's figures on its data sheet.

    Arguments:
      operations: per second, in 16 bits.
      memory: in bytes.
      link: bytes per second to one neighbour, in one direction.
      island: the chips that are all connected by such links; None: the links make rings (a torus).
      beyond: bytes per second to a chip of another island.
    """

    operations: float
    memory: float
    link: float
    island: int | None = None
    beyond: float = 0.0


# TPUs: cloud.google.com/tpu/docs, jax-ml.github.io/scaling-book (links of one axis). H100: NVIDIA's
# data sheet, NVLink 4 within 8 GPUs, 400 Gbit/s a GPU between them. cpu: no real link; it only
# lets `auto` decide on simulated devices.
CHIPS: dict[str, Chip] = {
    "tpu_v5e": Chip(197e12, 16 * GB, 45e9),
    "tpu_v6e": Chip(918e12, 32 * GB, 90e9),
    "tpu_v5p": Chip(459e12, 95 * GB, 90e9),
    "h100": Chip(989e12, 80 * GB, 450e9, 8, 50e9),
    "cpu": Chip(1e11, 64 * GB, 10e9, 8, 10e9),
}
EFFICIENCY = 0.5  # the share of a chip's operations that attention reaches, on paper
LATENCY = 2e-6  # seconds until a message arrives, on paper


@dataclass(frozen=True, kw_only=True)
class Work:
    """Attention of one device, before anything is exchanged."""

    b: int
    t: int
    s: int
    n: int
    k: int
    d: int
    e: int
    z: int
    c: int
    causal: bool
    balanced: bool
    seen: int | None = None  # the most keys that a query sees, where a window says so

    @property
    def keys(self) -> int:
        """Bytes of the device's keys and values."""
        return self.b * self.s * self.k * (self.d + self.e) * self.z

    @property
    def queries(self) -> int:
        """Bytes of the device's queries and outputs."""
        return self.b * self.t * self.n * (self.d + self.e) * self.z

    def products(self, share: float) -> float:
        """Operations of q·k and p·v, of which a ``share`` of the pairs is seen, or a window."""
        keys = self.s * self.c * share
        keys = keys if self.seen is None else min(keys, self.seen)
        return 2.0 * self.b * self.n * self.t * keys * (self.d + self.e)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one scheme costs the busiest device, for one call and its gradient.

    Arguments:
      ulysses_devices: u of `ring_ulysses`, else None.
      sent, sent_backward: bytes that the device sends.
      operations: of the products, forward; the gradient takes 2.5 times as many.
      memory: bytes of the call's arrays at the gradient's peak.
      seconds: on paper, forward and backward.
      refused: why it cannot be, or None.
    """

    scheme: str
    ulysses_devices: int | None = None
    sent: float = 0.0
    sent_backward: float = 0.0
    operations: float = 0.0
    memory: float = 0.0
    seconds: float = 0.0
    refused: str | None = None

    @property
    def name(self) -> str:
        if self.ulysses_devices is None:
            return self.scheme
        return f"{self.scheme} ({self.ulysses_devices})"

    def __str__(self) -> str:
        if self.refused is not None:
            return f"{self.name:18} {self.refused}"
        return (
            f"{self.name:18} {_bytes(self.sent)} and {_bytes(self.sent_backward)} sent, "
            f"{self.operations / 1e12:9.3g} T operations, {_bytes(self.memory)} held, "
            f"{self.seconds * 1e3:9.3g} ms"
        )


def _bytes(x: float) -> str:
    return f"{x / 2**20:9.3g} MiB"


@dataclass(frozen=True)
class Plan:
    """The costs of all schemes, and the one to take.

    Arguments:
      reason: why that one.
    """

    costs: tuple[Cost, ...]
    chosen: Cost
    reason: str

    def __str__(self) -> str:
        lines = [f"scheme  {self.chosen.name}: {self.reason}", "on paper, for a device:"]
        return "\n".join([*lines, *(f"  {cost}" for cost in self.costs)])


def plan(
    devices: Any,
    B: int,
    T: int,
    S: int,
    N: int,
    K: int,
    D: int,
    dtype: Any = "bfloat16",
    causal: bool = True,
    *,
    E: int | None = None,
    chip: str | None = None,
    batch: Any = None,
    heads: Any = None,
    sequence: Any = None,
    ulysses_devices: int | None = None,
    balanced: bool = False,
    window: tuple[int, int] | None = None,
) -> Plan:
    """What every scheme would cost, from formulas alone, and which is the best on paper.

    Arguments:
      devices: how many share the sequence; or a mesh, whose axes ``batch``, ``heads`` and
        ``sequence`` name.
      B, T, S, N, K, D, E: of the whole call; E is D by default.
      dtype: of query, key and value.
      causal: whether it is causal.
      chip: a name of `CHIPS`; by default that of the mesh's devices.
      ulysses_devices: of `ring_ulysses`; by default the best number is looked for.
      balanced: whether tokens are permuted (`zigzag`, `striped`).
      window: (left, right), as ``local_window_size``: only what is computed becomes less, as a ring
        sends its keys to every device all the same.

    Raises:
      ValueError: an unknown chip, or numbers that are not positive.

    >>> plan(8, 1, 65536, 65536, 32, 8, 128, chip="tpu_v5e").chosen.scheme
    'ulysses'
    """
    sizes = {"B": B, "T": T, "S": S, "N": N, "K": K, "D": D}
    for name, size in sizes.items():
        if size < 1:
            raise wrong(name, "be positive", size)
    if isinstance(devices, int):
        c, of_batch, of_heads = devices, 1, 1
    else:
        c, of_batch, of_heads = (_devices(devices, x) for x in (sequence, batch, heads))
        chip = _chip_of(devices) if chip is None else chip
    chip = "tpu_v5e" if chip is None else chip
    check_choice("chip", chip, tuple(CHIPS))
    work = Work(
        b=-(-B // of_batch),
        t=-(-T // c),
        s=-(-S // c),
        n=-(-N // of_heads),
        k=shared_heads(K, of_heads) // of_heads,
        d=D,
        e=D if E is None else E,
        z=jnp.dtype(dtype).itemsize,
        c=c,
        causal=causal,
        balanced=balanced,
        seen=None if window is None else window[0] + 1 + (0 if causal else window[1]),
    )
    costs = [_all_gather(work), _ulysses(work)]
    groups = [ulysses_devices] if ulysses_devices else _groups(work)
    costs += [_ring_ulysses(work, u) for u in groups] + [_ring(work)]
    costs = [cost if cost.refused else _timed(cost, work, CHIPS[chip]) for cost in costs]
    chosen, reason = _best(costs, CHIPS[chip])
    return Plan(tuple(costs), chosen, f"{reason}, on {c} x {chip}")


def _devices(mesh: Any, names: Any) -> int:
    names = () if names is None else (names,) if isinstance(names, str) else names
    return math.prod(mesh.shape[name] for name in names)


def _chip_of(mesh: Any) -> str:
    """The chip of a mesh; v5e where its devices are not known."""
    if isinstance(mesh, jax.sharding.AbstractMesh):
        return "tpu_v5e"
    device = mesh.devices.flat[0]
    name = target_of_device(device.platform, device.device_kind).name
    return name if name in CHIPS else "h100" if device.platform == "gpu" else "tpu_v5p"


def _groups(work: Work) -> list[int]:
    """The numbers of devices that may share heads in a ring of groups."""
    return [u for u in range(2, work.c) if work.c % u == 0 and work.n % u == 0]


def _best(costs: list[Cost], chip: Chip) -> tuple[Cost, str]:
    able = [cost for cost in costs if cost.refused is None]
    fits = [cost for cost in able if cost.memory < 0.8 * chip.memory]
    if not fits:
        return min(able, key=lambda cost: cost.memory), "it holds least, and none fits"
    # Within a twentieth the simpler one, which comes first.
    least = min(cost.seconds for cost in fits)
    chosen = next(cost for cost in fits if cost.seconds <= 1.05 * least)
    return chosen, "it is the fastest" + ("" if len(fits) == len(able) else " of those that fit")


# The formulas.


def seen_share(work: Work, parts: int) -> float:
    """The share of its pairs that the busiest of ``parts`` devices computes."""
    if not work.causal:
        return 1.0
    if work.balanced or parts == 1:
        return 0.5
    return (parts - 0.5) / parts


def _all_gather(w: Work) -> Cost:
    sent = (w.c - 1) * w.keys
    return Cost(
        scheme="all_gather",
        sent=sent,
        sent_backward=sent,  # the gradients of K and V, summed where they belong
        operations=w.products(seen_share(w, w.c)),
        memory=2 * w.queries + 2 * w.c * w.keys,
    )


def _exchanged(w: Work, u: int) -> tuple[float, float]:
    """Bytes of queries with outputs, and of repeated keys with values, that leave the device."""
    repeats = shared_heads(w.k, u) / w.k
    return w.queries * (u - 1) / u, w.keys * repeats * (u - 1) / u


def _ulysses(w: Work) -> Cost:
    cost = Cost(scheme="ulysses")
    if w.n % w.c:
        return replace(cost, refused=f"{w.c} devices do not divide {w.n} query heads")
    sent = sum(_exchanged(w, w.c))
    repeats = shared_heads(w.k, w.c) / w.k
    return replace(
        cost,
        sent=sent,
        sent_backward=sent,
        operations=w.products(seen_share(w, 1)),
        memory=3 * w.queries + (1 + 2 * repeats) * w.keys,
    )


def _ring(w: Work) -> Cost:
    return Cost(
        scheme="ring",
        sent=(w.c - 1) * w.keys,
        # Keys again; their gradients in float32, and home in the keys' type.
        sent_backward=(w.c - 1) * w.keys * (1 + 4 / w.z) + (w.keys if w.c > 1 else 0),
        operations=w.products(seen_share(w, w.c)),
        memory=3 * w.queries + (3 + 3 * 4 / w.z) * w.keys,
    )


def _ring_ulysses(w: Work, u: int) -> Cost:
    cost = Cost(scheme="ring_ulysses", ulysses_devices=u)
    if w.c % u or w.n % u:
        return replace(cost, refused=f"groups of {u} do not divide {w.c} devices, {w.n} heads")
    inner = grouped(w, u)
    ring, exchanged = _ring(inner), sum(_exchanged(w, u))
    return replace(
        cost,
        sent=ring.sent + exchanged,
        sent_backward=ring.sent_backward + exchanged,
        operations=ring.operations,
        memory=ring.memory + w.queries + w.keys,
    )


def grouped(w: Work, u: int) -> Work:
    """The work of a device of a group that shares the heads."""
    k = shared_heads(w.k, u) // u
    return replace(w, t=w.t * u, s=w.s * u, n=w.n // u, k=k, c=w.c // u)


# Time.


def _timed(cost: Cost, w: Work, chip: Chip) -> Cost:
    """The cost with its time: a ring sends while it computes, the others before and after."""
    rate = EFFICIENCY * chip.operations * (1.0 if w.z <= 2 else 0.5)
    compute = cost.operations / rate
    if cost.scheme == "all_gather":
        seconds = 3.5 * compute + _along(
            cost.sent + cost.sent_backward, 2 * (w.c - 1), w.c, chip, 2
        )
    elif cost.scheme == "ulysses":
        seconds = 3.5 * compute + 2 * _across(cost.sent, w.c, chip)
    else:
        u = cost.ulysses_devices or 1
        inner = grouped(w, u)
        ring = _ring(inner)
        seconds = 2 * _across(sum(_exchanged(w, u)), u, chip)
        for sent, work in ((ring.sent, compute), (ring.sent_backward, 2.5 * compute)):
            link = _along(sent, inner.c - 1, w.c, chip, 1)
            seconds += max(link, work) + min(link, work) / inner.c
    return replace(cost, seconds=seconds)


def _along(sent: float, steps: int, devices: int, chip: Chip, directions: int) -> float:
    """Seconds to send round a ring of devices, to one neighbour or to both."""
    if chip.island is None:
        return sent / (directions * chip.link) + steps * LATENCY
    return sent / (chip.link if devices <= chip.island else chip.beyond) + steps * LATENCY


def _across(sent: float, devices: int, chip: Chip) -> float:
    """Seconds to send to every other device: round a ring each byte passes a quarter of it."""
    if devices == 1:
        return 0.0
    if chip.island is None:
        return sent * devices / 4 / (2 * chip.link) + devices * LATENCY
    return sent / (chip.link if devices <= chip.island else chip.beyond) + devices * LATENCY
