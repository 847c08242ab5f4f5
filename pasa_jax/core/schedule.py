"""`Schedule`: all tile sizes, and the only place for them. It needs the standard library alone."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from pasa_jax.core.errors import ScheduleError, check_choice, wrong
from pasa_jax.core.target import TARGETS, Target, find_target

TUNED = Path(__file__).parent / "tuned"  # <target>.json: what `python -m pallas_kernels tune` found
_ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How the score matrix of one head is cut into tiles and walked.

    ``block_kv`` and ``target`` change the numbers (a block has one mean; the target says where
    scores are rounded), as do the shift and β; everything else changes the speed, and
    the numbers only by the order in which float32 sums are formed.

    Arguments:
      block_q: rows of a tile. The G query heads of one key head share a tile, so it holds
        ``block_q // G`` positions.
      block_kv: keys of a tile (n in the paper; 128 there).
      unroll: key tiles that one step of the loop computes, so that a compiler may overlap the
        products of one with the softmax of another.
      batch_heads: walk all heads at once (accelerators) or one after another (CPU: a head's
        tiles then stay in the cache).
      tiles_per_program: query tiles that one program of a TPU kernel computes, so that the compiler
        may overlap the end of one with the start of the next.
      warps, stages: of one program on a GPU: threads by 32, and tiles that are loaded ahead.
      target: name of the chip whose arithmetic is followed; see `pasa_jax.target.TARGETS`.
    """

    block_q: int = 512
    block_kv: int = 512
    unroll: int = 1
    tiles_per_program: int = 1
    batch_heads: bool = False
    warps: int = 4
    stages: int = 2
    target: str = "cpu"

    def __post_init__(self) -> None:
        for field in ("block_q", "block_kv", "unroll", "tiles_per_program", "warps", "stages"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise wrong(f"schedule.{field}", "be a positive int", repr(value))
        check_choice("schedule.target", self.target, tuple(TARGETS))

    @staticmethod
    def for_target(
        target: str | Target = "cpu",
        *,
        head_dim: int = 128,
        value_head_dim: int | None = None,
        dtype: Any = "float32",
        length: int | None = None,
        is_causal: bool = False,
        window: int | None = None,
    ) -> Schedule:
        """The schedule tuned for the most similar problem, if there is a table for ``target``;
        else the largest of the default tiles that fits its memories.

        Arguments:
          head_dim, value_head_dim: D and E.
          dtype: of queries, keys and values: "float16", "bfloat16", "float32" or "float64", or
            what NumPy or JAX have for it (``q.dtype``, ``jnp.bfloat16``).
          length: the number of keys; None: 2048.
          window: the keys that a query sees of those before it, where a window limits them.

        >>> Schedule.for_target("ascend_910b", dtype="float16").block_kv
        1024
        """
        target = target if isinstance(target, Target) else find_target(target)
        dtype = _type_name(dtype)
        for name, size in (("head_dim", head_dim), ("value_head_dim", value_head_dim or 1)):
            if not isinstance(size, int) or size < 1:
                raise wrong(name, "be a positive int", repr(size))
        defaults = [
            Schedule(
                block_q=block_q,
                block_kv=block_kv,
                unroll=4 if target.kind == "tpu" else 1,
                warps=4 if max(head_dim, value_head_dim or 0) <= 64 else 8,
                batch_heads=target.kind != "cpu",
                target=target.name,
            )
            for block_q, block_kv in _CANDIDATES[target.kind]
        ]

        if target.kind == "cpu" and not is_causal and window is None:  # no tile is left out
            defaults = [replace(x, block_q=2 * x.block_q) for x in defaults]

        def unlike(x: Tuned) -> tuple[float, ...]:
            windows = (x.window or x.length, window or length or 2048)
            sizes = ((x.head_dim, head_dim), (x.length, length or 2048), windows)
            ratios = (abs(math.log2(max(1, a) / max(1, b))) for a, b in sizes)
            limited = (x.window is None) != (window is None)
            return (x.dtype != dtype, x.is_causal != is_causal, limited, sum(ratios))

        tuned = sorted(tuned_for(target.name), key=unlike)
        for schedule in [*(Schedule(**x.schedule) for x in tuned[:1]), *defaults]:
            if not schedule._overfull(head_dim, value_head_dim or head_dim, dtype):
                return schedule
        schedule.check(head_dim=head_dim, value_head_dim=value_head_dim, dtype=dtype)
        return schedule

    def footprint(
        self, *, head_dim: int, value_head_dim: int | None = None, dtype: Any
    ) -> dict[str, int]:
        """Bytes that one tile step needs in each on-chip memory of the target.

        Key and value tiles are counted as often as there are stages (one is loaded while another
        is used); a GPU's registers are those of the schedule's warps. On an NPU
        the products run in sub-tiles of 128 × 128 × 128, of which one is loaded ahead, and the two
        vector cores share the rows, of which each works on 16 at a time, or on 8 longer ones.
        """
        item, e = _ITEMSIZE[_type_name(dtype)], value_head_dim or head_dim
        kind = find_target(self.target).kind
        if kind == "gpu":  # whose tiles have sides that are powers of two
            head_dim, e = (1 << (n - 1).bit_length() for n in (head_dim, e))
        q = self.block_q * head_dim * item
        kv = self.stages * self.block_kv * (head_dim + e) * item
        scores = self.block_q * self.block_kv
        out, rows = self.block_q * e * 4, 4 * self.block_q * 4
        if kind == "gpu":
            return {"shared": q + kv, "registers": scores * (4 + item) + out + rows}
        if kind == "tpu":
            return {"VMEM": q + kv + scores * (4 + item) + out + rows}
        if kind == "npu":
            sub, half = 128, (self.block_q + 1) // 2
            slab = 16 if self.block_kv <= 512 else 8
            tiles = slab * self.block_kv * (3 * item + 4) + slab * e * (4 + item)
            return {
                "L1": 4 * sub * (head_dim + sub) * item,
                "L0A": 2 * sub * min(head_dim, sub) * item,
                "L0B": 2 * sub * min(max(head_dim, e), sub) * item,
                "L0C": 2 * sub * sub * 4,
                "UB": half * e * 4 + tiles + 6 * 1024,  # and what is one number a row
            }
        return {}

    def check(self, *, head_dim: int, value_head_dim: int | None = None, dtype: Any) -> None:
        """Raises `ScheduleError` if a tile step does not fit the target's memories."""
        dtype = _type_name(dtype)
        overfull = self._overfull(head_dim, value_head_dim or head_dim, dtype)
        if overfull:
            memory, wanted, there = overfull
            raise ScheduleError(
                f"`schedule` must fit {self.target}: a {self.block_q} × {self.block_kv} tile of "
                f"{dtype} with head sizes {head_dim} and {value_head_dim or head_dim} wants "
                f"{wanted} bytes of {memory}; there are {there}. Use a smaller block_q or block_kv."
            )

    def _overfull(self, head_dim: int, e: int, dtype: str) -> tuple[str, int, int] | None:
        target = find_target(self.target)
        there = dict(target.memories)
        if target.kind == "gpu":  # a thread has 255, of which some hold addresses and indices
            there["registers"] = min(there["registers"], self.warps * 32 * 220 * 4)
        wanted = self.footprint(head_dim=head_dim, value_head_dim=e, dtype=dtype)
        for memory, size in wanted.items():
            if size > there[memory]:
                return memory, size, there[memory]
        return None

    def backward(self, dtype: Any, *, same_blocks: bool) -> Schedule:
        """The schedule of the backward pass on a GPU, which holds more tiles at once.

        float16 and float32 have gradients whose products take float32 operands.

        Arguments:
          same_blocks: whether ``block_kv`` must stay, because keys were shifted block by block.
        """
        narrow = _type_name(dtype) == "bfloat16"
        block_kv = self.block_kv if same_blocks else min(self.block_kv, 64 if narrow else 32)
        scores = 64 * (64 if narrow else 32)
        return replace(
            self, block_q=min(self.block_q, max(16, scores // block_kv)), block_kv=block_kv
        )

    def keys_beside(self, rows: int, most: int = 4) -> int:
        """The keys of a tile of few ``rows``: up to ``most`` times ``block_kv``, so that a step of
        the loop still has work to do.
        """
        return self.block_kv * max(1, min(most, self.block_q // rows))

    def fitted(self, rows: int, keys: int) -> Schedule:
        """This schedule with blocks no larger than the problem (at least 1)."""
        return replace(
            self,
            block_q=max(1, min(self.block_q, rows)),
            block_kv=max(1, min(self.block_kv, keys)),
        )


def _type_name(dtype: Any) -> str:
    """The name of a type that is given as "float16", ``np.float16``, ``x.dtype`` or the like."""
    name = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", None)
    name = str(dtype) if name is None else name
    check_choice("dtype", name, tuple(_ITEMSIZE))
    return name


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The fastest schedule found for one problem, with one batch entry and as many keys as queries.

    Arguments:
      shape: the problem's name.
      cost: cycles or microseconds, as the table says.
      schedule: the fields of a `Schedule`.
      window: as in `Schedule.for_target`.
    """

    shape: str
    length: int
    head_dim: int
    dtype: str
    is_causal: bool
    cost: int
    schedule: dict[str, Any]
    window: int | None = None


@lru_cache
def tuned_for(target: str) -> tuple[Tuned, ...]:
    """What the table of ``target`` holds; nothing where there is none."""
    path = TUNED / f"{target}.json"
    if not path.exists():
        return ()
    return tuple(Tuned(**x) for x in json.loads(path.read_text())["schedules"])


# From large to small. The CPU's 512 × 512 is the fastest measured under a causal mask (a float32
# tile is 1 MiB, like a second-level cache), and twice as many rows without one; the paper's and the
# vendor's Ascend kernels have tiles of 128 × 512.
_CANDIDATES: dict[str, tuple[tuple[int, int], ...]] = {
    "cpu": ((512, 512),),
    "tpu": ((1024, 1024), (512, 512), (256, 256), (128, 128)),
    "gpu": ((128, 64), (64, 64), (64, 32), (32, 32), (16, 16)),
    "npu": ((128, 1024), (128, 512), (128, 256), (128, 128), (64, 128)),
}
