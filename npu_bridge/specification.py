"""What one emitted kernel computes, and the walk over the keys that is traced for it."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from npu_bridge.functions import Functions
from pasa_jax.core import tile
from pasa_jax.core.mask import Index, Mask
from pasa_jax.core.mods import Data, Mods, Place
from pasa_jax.core.plan import Plan
from pasa_jax.core.precision import Precision
from pasa_jax.core.schedule import Schedule
from pasa_jax.core.walk import Walk

Array = jax.Array
# The columns of P's row sums that the vector cores read: all are equal, and as many make one block
# of float32. (The cube unit multiplies by twice as many at least.)
COLUMNS = 8
_MANY = 2**20  # blocks of keys that a static length stands for; the true one comes at run time


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """What one emitted kernel computes; batch, heads and lengths come at run time.

    Arguments:
      head_dim, value_head_dim: D and E.
      dtype: of query, key, value and output, "float16" or "bfloat16".
      shift: "none", "paper", "mean", "reference", "auto" or "bound".
      is_causal, causal_alignment, window, logits_soft_cap: as `dot_product_attention` takes them.
      bias: which of the axes [B, N, T, S] a bias has, as a string like "1NTS"; None: no bias.
      mask_axes: which of the axes [B, N, T, S] a boolean mask has, likewise; None: no mask.
      segments: whether queries and keys carry numbers of segments; a query sees those of its own.
      sinks: whether each query head has one more key of a given score and value 0.
      lengths: whether each batch entry has a length of its own for its keys.
      return_lse: whether the log-sum-exp is written too.
      packed: queries [T, N, D] and keys [S, K, D] are those of all sequences, one after another;
        offsets say where each begins, and a query sees keys of its own sequence.
      decode: one query (T = 1): the query heads of a key head are the rows of a tile, and the keys
        of a head are split over several cores, whose states are merged.
      repair: whether query tiles whose result is not finite are computed again, carefully.
      careful: whether it is the kernel that does so.
      functions: the caller's functions of masks and scores, or None.
      visits: whether the query tiles' lists of key tiles, of a block mask, are of each batch entry
        and of each query head: "BN", "1N", "B1" or "11"; None: there are no lists.
    """

    head_dim: int
    value_head_dim: int
    dtype: str
    shift: str
    precision: Precision
    schedule: Schedule
    is_causal: bool = False
    causal_alignment: str = "top_left"
    window: tuple[int, int] | None = None
    logits_soft_cap: float | None = None
    beta: float | None = None
    bias: str | None = None
    mask_axes: str | None = None
    segments: bool = False
    sinks: bool = False
    lengths: bool = False
    return_lse: bool = False
    packed: bool = False
    decode: bool = False
    repair: bool = True
    careful: bool = False
    functions: Functions | None = None
    visits: str | None = None

    @functools.cached_property
    def plan(self) -> Plan:
        # The vector unit rounds a product before it adds: it does not contract.
        return Plan(
            shift=self.shift,
            precision=self.precision,
            schedule=self.schedule,
            logits_soft_cap=self.logits_soft_cap,
            modified=self.functions is not None and self.functions.score_mod is not None,
            beta=self.beta,
            scale=self.head_dim**-0.5 if self.shift == "paper" else None,
            explicit_precision=True,
            dialect=tile.Dialect(
                contracts=False,
                narrow_sums=False,
                sum_columns=COLUMNS if self.sums_multiplied else 0,
            ),
        )

    @property
    def repaired(self) -> bool:
        """Whether it looks at its results, and has a careful kernel behind it. Float16 statistics
        promise nothing.
        """
        wide = "float16" not in (self.precision.statistics, self.precision.accumulator)
        return self.repair and wide and not self.careful

    @property
    def carefully(self) -> Kernel:
        """The kernel that computes damaged query tiles again: with the shift `mean`, which needs no
        other scale or matrices, whatever the first one was.
        """
        precision = self.precision
        if self.dtype == "bfloat16" and precision.scores == "float16":
            precision = replace(precision, scores="bfloat16")  # its range is that of the inputs
        return replace(self, careful=True, shift="mean", beta=None, precision=precision)

    @property
    def chooses(self) -> bool:
        """Whether `auto` chooses κ or 0 for each key head, on the chip."""
        return self.plan.chooses_per_head

    @property
    def form(self) -> str:
        """The shift whose form the kernel has: `auto` is `mean` whose κ may be 0, or `none`."""
        if self.shift != "auto":
            return self.shift
        return "mean" if self.chooses else "none"

    @property
    def keys_shifted(self) -> bool:
        """Whether the scores are made of K', which is computed first."""
        return self.form in ("mean", "paper", "reference", "bound")

    @property
    def bounded(self) -> bool:
        """Whether a query tile takes a bound on its scores off, where it is proved to be safe."""
        return self.shift == "bound"

    @property
    def unproved(self) -> Kernel:
        """What a query tile without a proof is computed by."""
        return replace(self, shift="mean")

    @property
    def output_stays(self) -> bool:
        """Whether P·V of all key tiles of an item is added up before it is handed over: there is
        no rescaling, and room for it in the cube unit.
        """
        return self.bounded and self.value_head_dim <= 128 and self.head_dim <= 128

    @property
    def sums_multiplied(self) -> bool:
        """Whether the cube unit adds up P, in float32: the vector unit is what takes longest."""
        return self.precision.statistics == "float32"

    @functools.cached_property
    def numerics(self) -> tile.Numerics:
        return self.plan.numerics(self.schedule.block_kv)

    def mask(self, queries: Index, keys: Index) -> Mask:
        """The mask of one batch entry or sequence, its lengths known at run time only."""
        # What hides keys by data is not looked at here: only that there is such a thing.
        data = jnp.zeros(1, bool) if self.hides_by_data else None
        return Mask(
            array=data,
            query_length=queries,  # type: ignore[arg-type]  # used in sums alone
            key_length=self.schedule.block_kv * _MANY,
            is_causal=self.is_causal,
            causal_alignment=self.causal_alignment,
            window=self.window,
            key_lengths=keys,  # type: ignore[arg-type]
        )

    @property
    def masked(self) -> bool:
        """Whether a tile may need a mask for another reason than that the keys end in it."""
        return self.is_causal or self.window is not None or self.hides_by_data

    @property
    def hides_by_data(self) -> bool:
        """Whether a mask, segments or a function hide keys: no tile is then seen whole by its place
        alone.
        """
        by_function = self.functions is not None and self.functions.mask_mod is not None
        return self.mask_axes is not None or self.segments or by_function

    def walk(self, rows: int, queries: Index, keys: Index, **parts: Any) -> TracedWalk:
        return TracedWalk(
            mask=self.mask(queries, keys),
            plan=self.plan,
            numerics=self.numerics,
            groups=rows if self.decode else 1,
            block_q=1 if self.decode else rows,
            value_size=self.value_head_dim,
            functions=self.functions,
            damages=self.repaired,
            parts=parts,
        )


@dataclass(frozen=True, kw_only=True)
class TracedWalk(Walk):
    """One slab of rows of the kernel, made of tracers."""

    functions: Functions | None = None
    damages: bool = False  # whether a score that is not finite must damage its row
    parts: dict[str, Any] = field(default_factory=dict)

    def guard(self) -> tile.Guard | None:
        """The guard of the rows (eq. 12), of which only one power of two is at hand."""
        temper = self.parts.get("guard")
        if temper is None:
            return None
        one = jnp.ones((1, 1), temper.dtype)
        return tile.Guard(down=1 / temper, rest=one, gain=one, temper=temper, beyond=one)

    def query(self, start: Index) -> tile.QueryTile:
        # As `tile.query_tile` leaves it: the factor is in the query already, and the gain of the
        # values in the values.
        guard, gain = self.guard(), self.parts.get("valueGain")
        rows = tile.QueryTile(
            self.parts["query"],
            jnp.ones((1, 1), self.numerics.product),
            guard,
            value_gain=gain,
            reference=self.parts.get("reference"),
        )
        if self.numerics.needs_scores:
            return rows._replace(guard=None, capped=guard)
        return rows

    def key(self, j: Index, value_gain: Array | None = None) -> tile.KeyTile:
        p = self.parts
        return tile.KeyTile(
            p["key"], p["value"], None, p.get("kappa"), p.get("weights"), p.get("raw")
        )

    def key_start(self, j: Index) -> Index:
        return j * self.block_kv

    def bias(self, start: Index, j: Index) -> Array | None:
        return self.parts.get("bias")

    def array(self, start: Index, j: Index, asks: Array | None = None) -> Array | None:
        p, shown = self.parts, None
        if "querySegments" in p:
            shown = p["querySegments"] == p["keySegments"]
        if "mask" in p:
            array = p["mask"] != 0
            shown = array if shown is None else shown & array
        if self.functions is not None and self.functions.mask_mod is not None:
            mods, place, data = self._asked(start, j)
            assert mods.mask_mod is not None
            array = mods.shows(mods.mask_mod, place, data)
            shown = array if shown is None else shown & array
        if self.functions is not None and self.functions.block_mod is not None:
            mods, place, data = self._asked(start, j)
            assert mods.block_mod is not None
            array = mods.shows(mods.block_mod, place, data) | (self.parts["whole"] != 0)
            shown = array if shown is None else shown & array
        return shown

    def modified(self, start: Index, j: Index) -> tile.Modify | None:
        if self.functions is None or self.functions.score_mod is None:
            return None
        mods, place, data = self._asked(start, j)
        if not self.damages:
            return functools.partial(mods.scored, place=place, data=data)

        def scored(score: Array) -> Array:
            # The tile functions cut what is beyond float32. The scores here have no guard: what was
            # infinite has left float16, and must be seen as damage. The sum is with 0, or NaN.
            return mods.scored(score, place, data) + (score * 8.0) * 0.0

        return scored

    def _asked(self, start: Index, j: Index) -> tuple[Mods, Place, Data]:
        """The caller's functions, and what they are asked about this tile."""
        assert self.functions is not None
        mods = self.functions.mods(self.parts["entry"], self.parts["head"])
        rows, keys = (start, self.block_q), (self.key_start(j), self.block_kv)
        place = mods.place(rows, keys, 1, transposed=False)
        return mods, place, self.functions.data(self.parts)

    def sinks(self) -> Array | None:
        return self.parts.get("sinks")
