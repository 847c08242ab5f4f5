"""The public functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from npu_bridge import checks, emulation, lists, project, tables, timing
from npu_bridge.functions import Functions, functions_of
from npu_bridge.program import Program, build
from npu_bridge.specification import Kernel
from pasa_jax.core.block_mask import BlockMask
from pasa_jax.core.checks import positive, window
from pasa_jax.core.errors import PlanError, ScheduleError, check_choice, wrong
from pasa_jax.core.precision import Precision
from pasa_jax.core.schedule import Schedule
from pasa_jax.core.shifts import check_beta
from pasa_jax.core.target import find_target

TARGETS = {"910b": "ascend_910b", "910_93": "ascend_910b"}  # one architecture, dav-2201
SHIFTS = ("none", "paper", "mean", "reference", "auto", "bound")
DTYPES = ("float16", "bfloat16")
_BOUND = Precision(scores="float16", probabilities="bfloat16")
_REFUSED = {
    "310p": "its cube and vector units are coupled and it has no Fixpipe and no cross-core flags: "
    "the kernel would be another one",
    "950": "its L0C reaches the vector unit directly, which this kernel does not use, and its "
    "instructions were not checked",
}


def kernel(
    *,
    head_dim: int = 128,
    value_head_dim: int | None = None,
    dtype: str = "float16",
    shift: str = "mean",
    precision: str | Precision | None = None,
    schedule: Schedule | None = None,
    target: str = "910b",
    is_causal: bool = False,
    causal_alignment: str = "top_left",
    local_window_size: int | tuple[int, int] | None = None,
    logits_soft_cap: float | None = None,
    beta: float | None = None,
    bias: str | None = None,
    mask: str | None = None,
    segments: bool = False,
    sinks: bool = False,
    lengths: bool = False,
    return_lse: bool = False,
    packed: bool = False,
    decode: bool = False,
    dropout_rate: float = 0.0,
    repair: bool = True,
    mask_mod: Callable[..., Any] | None = None,
    score_mod: Callable[..., Any] | None = None,
    q_data: Any = None,
    kv_data: Any = None,
    head_data: Any = None,
    block_mask: BlockMask | None = None,
) -> Kernel:
    """What a kernel computes. Batch, heads and lengths are given when it runs.

    Arguments:
      head_dim, value_head_dim: D and E: 64, 128, 192 or 256; E is D by default.
      dtype: of query, key, value and output: "float16" or "bfloat16".
      shift: "none", "paper", "mean" or "reference", whose row maximum is taken off in the cube
        unit's float32 sums, as two more columns; it forms the scores twice. "auto" chooses `mean`
        or `none` for each key head by the data, before the loop. "bound", for bfloat16 without
        bias, mask, segments and soft cap: query tiles whose weights are proved to stay in range
        need no running maximum; the others are computed as by "mean".
      precision: a `Precision` or its name; None: scores, exponentials and probabilities in
        ``dtype``, statistics and output in float32. ``probabilities`` must be ``dtype``.
      schedule: for "ascend_910b"; block_q must be 128. None: the fastest by the cost model
        (`Schedule.for_target`; `python -m npu_bridge tune` writes its table).
      target: "910b" or "910_93".
      is_causal, causal_alignment, local_window_size, logits_soft_cap, beta: as
        `pasa_jax.dot_product_attention` takes them.
      bias: the axes that a bias of ``dtype`` has, "BNTS" with 1 for B or N that are broadcast.
      mask: the axes that a mask of bytes has, likewise: 1 where a query sees a key, else 0.
      segments: whether queries [B, T] and keys [B, S] carry int32 numbers of segments: a query sees
        the keys of its own.
      sinks: whether the kernel takes a float32 score [N] of one more key a head, of value 0.
      lengths: whether the kernel takes a number of keys for each batch entry.
      return_lse: whether it also writes the log-sum-exp, float32.
      packed: queries are [T, N, D] and keys [S, K, D], those of B sequences one after another, and
        the kernel takes int32 ``queryOffsets`` and ``keyOffsets`` [B + 1]: where each begins, the
        totals T and S last. A query sees keys of its own sequence. Takes no bias, mask, segments,
        lengths, decode or shift "paper".
      decode: a kernel for one query (T = 1): the N/K query heads of a key head, 128 at most, are
        the rows of a tile, and the keys are split over the cores. Takes no bias, mask or segments.
      dropout_rate: must be 0: a kernel drops no weights.
      repair: whether a query tile whose result is not finite is computed again, with a guard for
        each row and without the values that it may not see. False: a smaller kernel, which promises
        less. (Kernels with float16 statistics are never repaired.)
      mask_mod, score_mod: elementwise functions, as `pasa_jax.dot_product_attention` takes them:
        mask_mod(b, h, q, kv) -> bool and score_mod(score, b, h, q, kv) -> score. They are traced
        and become instructions. With ``shift="bound"`` a mask_mod is computed by "mean", a
        score_mod is refused. Not for packed and decoding kernels.
      q_data, kv_data, head_data: what the functions are given by these names: pytrees of arrays or
        `jax.ShapeDtypeStruct` of float32, int32 or bool, [T], [B, T] or [B, N, T], likewise with S,
        and [N] or [B, N]. An axis of size 1 (not T, not S) is broadcast; other sizes do not matter:
        the arrays come when the kernel runs, as inputs ``q_data_0`` and so on, a leaf each.
      block_mask: a `pasa_jax.BlockMask`. The kernel takes of it whether it is of each batch entry
        and head, the size of its blocks, multiples of the tiles' 128 and block_kv, and its
        function, which gets the same data. Which tiles are visited comes when it runs, as the input
        ``visits``, which `npu_bridge.visits` makes: a hidden tile costs nothing. It says all of
        which keys a query sees: not beside is_causal, local_window_size, lengths, packed, decode.

    Raises:
      ValueError: an argument is not one of these; the message says which are.
      LoweringError: a function uses a primitive that has no instructions, or whole numbers beyond
        what is exact; the message names the primitive, the function and its line.
      PlanError: it does not fit the chip's memories; the message says what would.
    """
    if target in _REFUSED:
        raise PlanError(f"`target` {target!r} is not supported: {_REFUSED[target]}. Use '910b'.")
    check_choice("target", target, tuple(TARGETS))
    check_choice("dtype", dtype, DTYPES)
    check_choice("shift", shift, SHIFTS)
    for name, axes in (("bias", bias), ("mask", mask)):
        if axes is not None:
            check_choice(name, axes, ("BNTS", "1NTS", "B1TS", "11TS"))
    check_choice("causal_alignment", causal_alignment, ("top_left", "bottom_right"))
    if dropout_rate != 0:
        way = "Train with pasa_jax.dot_product_attention, which drops weights."
        raise wrong("dropout_rate", "be 0: emitted kernels do not drop weights", dropout_rate, way)
    if beta is not None and shift != "paper":
        raise wrong("beta", "be given with shift='paper' only", repr(beta))
    if beta is not None:
        check_beta(beta)
    for name, given in (("bias", bias), ("mask", mask), ("segments", segments or None)):
        if decode and given is not None:
            raise wrong(
                name, "not be given for a decoding kernel", repr(given), "Use decode=False."
            )
    block_mod = getattr(block_mask, "mask_mod", None)
    functions = functions_of(mask_mod, score_mod, q_data, kv_data, head_data, block_mod)
    visited = None
    if block_mask is not None:
        if not isinstance(block_mask, BlockMask):
            raise wrong("block_mask", "be a pasa_jax.BlockMask", repr(block_mask))
        given = {"is_causal": is_causal, "local_window_size": local_window_size is not None}
        given |= {"lengths": lengths, "packed": packed, "decode": decode}
        if schedule is None:
            largest = _schedule(target, head_dim, value_head_dim, dtype, is_causal)
            schedule = _fitted(largest, block_mask)
        visited = _visited(block_mask, given, schedule)
    if functions is not None:
        _check_functions(functions, shift, packed=packed, decode=decode)
    if shift == "bound" and (functions is not None or block_mask is not None):
        # As in lax: the proof does not know which keys are hidden.
        shift, precision = "mean", precision or _BOUND
    if shift == "bound":
        given = {"logits_soft_cap": logits_soft_cap, "bias": bias, "mask": mask}
        given |= {"segments": segments or None, "decode": decode or None}
        _check_bound(dtype, precision, given)
    if packed:
        _check_packed(
            shift, bias=bias, mask=mask, segments=segments, lengths=lengths, decode=decode
        )
    described = Kernel(
        head_dim=head_dim,
        value_head_dim=head_dim if value_head_dim is None else value_head_dim,
        dtype=dtype,
        shift=shift,
        precision=_precision(precision, dtype, shift),
        schedule=schedule or _schedule(target, head_dim, value_head_dim, dtype, is_causal),
        is_causal=is_causal,
        causal_alignment=causal_alignment,
        window=window(local_window_size),
        logits_soft_cap=None
        if logits_soft_cap is None
        else positive("logits_soft_cap", logits_soft_cap),
        beta=beta,
        bias=bias,
        mask_axes=mask,
        segments=segments,
        sinks=sinks,
        lengths=lengths,
        return_lse=return_lse,
        packed=packed,
        decode=decode,
        repair=repair,
        functions=functions,
        visits=visited,
    )
    if find_target(described.schedule.target).name not in TARGETS.values():
        raise wrong("schedule.target", "be 'ascend_910b'", described.schedule.target)
    try:
        _program(described)
    except PlanError:
        if schedule is not None:
            raise
        return _tuned(described)
    return described


def _check_functions(functions: Functions, shift: str, *, packed: bool, decode: bool) -> None:
    """Raises where a kernel cannot have functions of the caller."""
    if shift == "bound" and functions.score_mod is not None:
        way = "A function may return anything, so nothing bounds its scores. Use 'auto'."
        raise wrong("shift", "be another than 'bound' beside a score_mod", "'bound'", way)
    allowed = "be False beside a mask_mod or a score_mod"
    if packed:
        way = "Give sequences as ids in q_data and kv_data: mask_mod can compare them."
        raise wrong("packed", allowed, "True", way)
    if decode:
        way = "The rows of its tiles are query heads, not queries. Use decode=False."
        raise wrong("decode", allowed, "True", way)


def _visited(block_mask: BlockMask, given: dict[str, bool], schedule: Schedule) -> str:
    """Which axes the lists of a block mask have, "BN" with 1 for what is broadcast.

    Arguments:
      given: other arguments that hide keys, by name.

    Raises:
      ValueError: they, or the schedule's tiles, do not fit the block mask.
    """
    for name, x in given.items():
        if x:
            way = "Let the block mask's function say it."
            raise wrong(name, "not be given beside a block_mask", repr(x), way)
    rows, keys = block_mask.block_size
    tile = (schedule.block_q, schedule.block_kv)
    if rows % tile[0] or keys % tile[1]:
        allowed = f"have blocks that are multiples of a tile, {tile}"
        way = "Give create_block_mask such a block_size, or give its function as mask_mod."
        raise wrong("block_mask", allowed, f"blocks of {block_mask.block_size}", way)
    axes = zip("BN", block_mask.shape[:2], strict=True)
    return "".join("1" if n == 1 else axis for axis, n in axes)


def _fitted(schedule: Schedule, block_mask: BlockMask) -> Schedule:
    """The schedule with the largest block of keys, its own at most, that divides the mask's."""
    keys = block_mask.block_size[1]
    fitting = [n for n in range(128, schedule.block_kv + 1, 128) if keys % n == 0]
    return replace(schedule, block_kv=fitting[-1]) if fitting else schedule


def _check_bound(dtype: str, precision: str | Precision | None, given: dict[str, Any]) -> None:
    """Raises where the shift "bound" cannot do what is asked for."""
    if dtype != "bfloat16":
        allowed = "be 'bfloat16' for shift='bound', whose weights have not float16's range"
        raise wrong("dtype", allowed, repr(dtype), "Use shift='mean'.")
    if precision is not None and precision != _BOUND:
        allowed = "be None for shift='bound', which stores scores in float16 and P in bfloat16"
        raise wrong("precision", allowed, repr(precision))
    for name, x in given.items():
        if x is not None:
            allowed = "not be given for shift='bound', whose proof looks at positions alone"
            raise wrong(name, allowed, repr(x), "Use shift='mean'.")


_PACKED = {
    "bias": "It has the axes [B, N, T, S], and packed sequences have no T and S of their own.",
    "mask": "It has the axes [B, N, T, S], and packed sequences have no T and S of their own.",
    "segments": "The offsets say already which keys a query sees.",
    "lengths": "The offsets say already how many keys a sequence has.",
    "decode": "Use packed=False: with one query each, the sequences are a batch.",
}


def _check_packed(shift: str, **options: Any) -> None:
    """Raises where a packed kernel cannot have one of the options."""
    for name, why in _PACKED.items():
        if options[name]:
            raise wrong(name, "not be given for a packed kernel", repr(options[name]), why)
    why = {
        "paper": "Its matrix knows one last block, and each sequence has its own. Use 'mean'.",
        "auto": "It chooses for whole heads. Use 'mean'.",
        "bound": "Its proof looks at whole heads. Use 'mean'.",
    }
    if shift in why:
        raise wrong("shift", f"not be {shift!r} for a packed kernel", repr(shift), why[shift])


def _precision(precision: str | Precision | None, dtype: str, shift: str) -> Precision:
    if precision is not None:
        chosen = precision if isinstance(precision, Precision) else Precision.named(precision)
        for name in ("scores", "probabilities"):
            check_choice(f"precision.{name}", getattr(chosen, name), (*DTYPES, "float32"))
        for name in ("statistics", "accumulator", "exponential"):  # computed by the vector unit
            if getattr(chosen, name) is not None:
                check_choice(f"precision.{name}", getattr(chosen, name), ("float16", "float32"))
        check_choice("precision.products", chosen.products, ("float32",))
        return chosen
    if shift == "bound":
        return _BOUND
    exponential = dtype if dtype == "float16" and shift != "paper" else None
    return Precision(scores=dtype, probabilities=dtype, exponential=exponential)


def _schedule(
    target: str, head_dim: int, value_head_dim: int | None, dtype: str, is_causal: bool
) -> Schedule:
    try:
        return Schedule.for_target(
            TARGETS[target],
            head_dim=head_dim,
            value_head_dim=value_head_dim,
            dtype=dtype,
            length=4096,
            is_causal=is_causal,
        )
    except ScheduleError:  # `build` says what is wrong with such sizes
        return Schedule(block_q=128, block_kv=128, target=TARGETS[target])


@lru_cache(maxsize=64)
def _tuned(kernel: Kernel) -> Kernel:
    return replace(kernel, schedule=tables.tuned(kernel))


@lru_cache(maxsize=16)
def _program(kernel: Kernel) -> Program:
    return build(kernel)


def visits(kernel: Kernel, block_mask: BlockMask) -> Any:
    """The input ``visits`` of a kernel with a block mask: [B or 1, N or 1, query tiles, key tiles +
    1] int32, how many key tiles each query tile visits, and of each twice its place, + 1 where it
    is seen whole, in ascending order.

    Arguments:
      block_mask: with numbers, of the lengths of the call; its axes and blocks are the kernel's.

    Raises:
      ValueError: it is not such a mask.
    """
    return lists.visits(kernel, block_mask)


def emit(kernel: Kernel, folder: Path | str) -> list[Path]:
    """Writes the project of a kernel into ``folder``: sources, build files, a description.

    Deterministic: the same kernel gives the same bytes. Files of the same names are replaced.
    """
    return project.write(_program(kernel), Path(folder))


def run(folder: Path | str, inputs: dict[str, Any] | None = None, **options: Any) -> emulation.Run:
    """Compiles the sources in ``folder`` as they stand and runs them on the host emulator.

    Arguments:
      inputs: "query", "key", "value" (BTNH) and what else the kernel takes; default random ones.
      options: ``kernel``, ``cores``, ``scale``, ``policies``; see `npu_bridge.emulation.run`.

    Returns:
      A `Run`; its ``ok`` says whether the emulator had no complaint and the output is lax's.

    Raises:
      EmulationError: there is no g++, or it refuses the sources.
    """
    return emulation.run(Path(folder), inputs, **options)


def plan(kernel: Kernel) -> str:
    """The schedule and where every buffer lies, as text."""
    return "\n".join(project.summary(_program(kernel)))


def cost(kernel: Kernel, **problem: Any) -> timing.Cost:
    """The predicted time of a call.

    Arguments:
      problem: ``batch``, ``heads``, ``kv_heads``, ``queries``, ``keys``; see
        `npu_bridge.timing.cost`.
    """
    return timing.cost(_program(kernel), **problem)


def check(folder: Path | str, kernel: Kernel | None = None) -> list[str]:
    """What is wrong with the sources in ``folder``, as far as their text tells; see
    `npu_bridge.checks`.

    Arguments:
      kernel: what was emitted, where its functions do not stand in modules.
    """
    return checks.check(Path(folder), kernel)
