"""The public functions: `dot_product_attention`, `partial_attention` and `explain`."""

from __future__ import annotations

import inspect
from typing import Any

import jax
from jax.typing import ArrayLike

from pasa_jax.call.arguments import Arguments, Call, SegmentIds
from pasa_jax.call.backends import Implementation
from pasa_jax.call.compute import compute
from pasa_jax.call.explanation import Explanation, explained
from pasa_jax.call.partial import Partial, partial_result
from pasa_jax.core.block_mask import BlockMask
from pasa_jax.core.low_rank import LowRankBias
from pasa_jax.core.mods import MaskMod, ScoreMod
from pasa_jax.core.precision import Precision
from pasa_jax.core.schedule import Schedule

Array = jax.Array


def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | LowRankBias | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: Implementation = None,
    return_residual: bool = False,
    causal_alignment: str = "top_left",
    segment_ids: SegmentIds | None = None,
    q_positions: ArrayLike | None = None,
    kv_positions: ArrayLike | None = None,
    mask_mod: MaskMod | None = None,
    score_mod: ScoreMod | None = None,
    block_mask: BlockMask | None = None,
    q_data: Any = None,
    kv_data: Any = None,
    head_data: Any = None,
    logits_soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    shift: str = "auto",
    beta: float | None = None,
    precision: str | Precision | None = None,
    schedule: Schedule | None = None,
    return_statistics: bool = False,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    dropout_broadcast: bool = False,
    interpret: bool = False,
) -> Any:
    r"""softmax(scale · Q·Kᵀ + bias) · V, with scores stored in 16 bits that cannot overflow.

    A drop-in for `jax.nn.dot_product_attention`: same positional arguments, names, layouts and
    defaults. Letters: B batch, T query length, S key length, N query heads, K key heads (N is a
    multiple of K), D head size, E value head size.

    Arguments:
      query: [B, T, N, D] or [T, N, D]; float16, bfloat16, float32, or float64 under x64.
      key: [B, S, K, D] or [S, K, D], of query's type.
      value: [B, S, K, E] or [S, K, E], of query's type; E may differ from D.
      bias: broadcastable to [B, N, T, S], added to the scaled scores; floating or integers. −inf,
        or the lowest finite number of its type (as masks of Hugging Face hold), hides a key. A
        `LowRankBias` is never formed as a whole.
      mask: bool, broadcastable to [B, N, T, S], True where the query sees the key.
      scale: factor of the scores; default 1/√D. A real number that float32 (float64 for float64
        inputs) can hold, or a scalar array.
      is_causal: query i sees keys up to i (see ``causal_alignment``).
      query_seq_lengths, key_value_seq_lengths: [B] integers; positions beyond are padding, and
        their outputs are 0. Clipped to [0, T] and [0, S].
      local_window_size: (left, right), or one int for both: keys from i − left to i + right.
      implementation: None = the best that supports the call; a name = that one or an error; a
        sequence of names = the first of them that can. ``"pallas_tpu"``, ``"pallas_gpu"``,
        ``"lax"`` or ``"reference"``. jax.nn's own names work too: ``"xla"`` is ``"lax"``, and
        ``"cudnn"`` is ``("pallas_gpu", "lax")``.
      return_residual: also return the log-sum-exp of the scores, float32 (float64 for float64)
        and differentiable. (jax.nn returns it in the inputs' type, without a gradient.)
      causal_alignment: ``"top_left"`` (jax.nn: query 0 stands at key 0) or ``"bottom_right"``
        (FlashAttention: the last query stands at the last key). Places the window too.
      segment_ids: [B, T] integers for self-attention, or a pair ([B, T], [B, S]); a query sees
        the keys of its own segment.
      q_positions, kv_positions: [B, T] or [T], [B, S] or [S] integers: where queries and keys
        stand, for ``is_causal`` and ``local_window_size``, in place of 0, 1, … (caches, rings,
        permuted or packed tokens). From −2³⁰ to 2³⁰.
      mask_mod: a function mask_mod(b, h, q, kv) -> bool, True where the query sees the key. Its
        arguments are int32 arrays that broadcast: batch entry, query head, index of the query and
        of the key. It must be elementwise, and hold no arrays.
      score_mod: a function score_mod(score, b, h, q, kv) -> score, likewise, of the scaled score
        after the soft cap, in float32 (float64 for float64); −inf hides the key. JAX
        differentiates it. Scores beyond float32 are cut before it.
      block_mask: a `BlockMask`: only its blocks are visited, and its own mask_mod is asked in those
        that are partly seen. Tiles are by default no larger than its blocks.
      q_data, kv_data, head_data: pytrees of numbers for the functions, which get them by these
        names, sliced by tile: leaves [T], [B, T] or [B, N, T]; [S], [B, S] or [B, N, S]; [N] or
        [B, N]. Floating leaves have gradients.
      logits_soft_cap: c > 0: scores become c·tanh(s/c) before bias and mask.
      sinks: [N] scores of one more key a head, with value 0: they only take up weight.
      shift: ``"auto"``, ``"none"``, ``"paper"``, ``"mean"``, ``"mean_past"``, ``"reference"`` or
        ``"bound"``; see `pasa_jax.shifts`. All but ``"none"`` and the setting ``"paper"`` of
        ``precision`` promise finite outputs for finite inputs (the implementation of the name
        ``"reference"``: while scores fit float32).
      beta: β in (0, 1) of the shift ``"paper"``; default `optimal_beta` of the schedule's block.
      precision: a `Precision` or its name; None stores scores and probabilities in the inputs'
        type, and the statistics and the output before normalisation in float32.
      schedule: tile sizes and target; default that of the device. Its ``block_kv``, ``target``,
        the shift and β change the numbers within rounding, everything else
        the speed and the order of float32 sums.
      return_statistics: also return `Statistics` of the scores, per head (one more pass).
      dropout_rate: the share of the weights, in [0, 1), that is set to 0; the others are divided by
        1 − rate, and the log-sum-exp is that of all. ``"lax"`` and ``"reference"`` have it, and
        drop the same weights whatever the schedule.
      dropout_key: a key of `jax.random`; without effect at rate 0. What is dropped depends on it,
        the batch entry, the head and the two positions alone: under vmap and shard_map, where
        batch entries are numbered anew, give each part a key of its own.
      dropout_broadcast: drop the same pairs of positions in every batch entry and head.
      interpret: run the Pallas kernel that ``implementation`` names step by step on whatever device
        there is, to test with; ``schedule`` must be for the kernel's chip. Slow.

    Returns:
      The output [B, T, N, E] (or [T, N, E]) of query's type; with ``return_residual`` and/or
      ``return_statistics`` a tuple (output, log-sum-exp [B, T, N], statistics) of those asked
      for. A query that sees no key gives 0 and the lowest finite log-sum-exp (jax.nn averages
      all values). What stands in a key or value that a query does not see never reaches its
      output, NaN included; one that it does see and that is not finite makes its row NaN.

    Raises:
      ValueError: an argument is wrong; the message names it, what is allowed and what was seen.
      ScheduleError: ``schedule`` does not fit its target's memories.
      BackendUnsupported: no implementation asked for can run the call.

    Source: Cheng et al., arXiv 2503.01873; docs/algorithm.md has the equations.

    >>> import jax.numpy as jnp
    >>> x = jnp.full((1, 4, 2, 64), 300.0, jnp.float16)  # every score is 720000
    >>> bool(jnp.all(dot_product_attention(x, x, x, is_causal=True) == 300))
    True
    """
    return compute(
        Arguments(
            query=query,
            key=key,
            value=value,
            bias=bias,
            mask=mask,
            scale=scale,
            is_causal=is_causal,
            query_seq_lengths=query_seq_lengths,
            key_value_seq_lengths=key_value_seq_lengths,
            local_window_size=local_window_size,
            implementation=implementation,
            return_residual=return_residual,
            causal_alignment=causal_alignment,
            segment_ids=segment_ids,
            q_positions=q_positions,
            kv_positions=kv_positions,
            mask_mod=mask_mod,
            score_mod=score_mod,
            block_mask=block_mask,
            q_data=q_data,
            kv_data=kv_data,
            head_data=head_data,
            logits_soft_cap=logits_soft_cap,
            sinks=sinks,
            shift=shift,
            beta=beta,
            precision=precision,
            schedule=schedule,
            return_statistics=return_statistics,
            dropout_rate=dropout_rate,
            dropout_key=dropout_key,
            dropout_broadcast=dropout_broadcast,
            interpret=interpret,
        )
    )


def explain(*args: Any, **kwargs: Any) -> Explanation:
    """Which implementation, schedule and shift `dot_product_attention` would use, and why.

    Arguments: those of `dot_product_attention`; arrays may be `jax.ShapeDtypeStruct`.

    Raises: what `dot_product_attention` raises.

    >>> import jax, jax.numpy as jnp
    >>> x = jax.ShapeDtypeStruct((1, 128, 8, 64), jnp.float16)
    >>> explain(x, x, x, is_causal=True).shift
    'reference'
    """
    return explained(_bound(*args, **kwargs))


def partial_attention(*args: Any, reference: ArrayLike | None = None, **kwargs: Any) -> Partial:
    """Attention over some of the keys, not normalised: parts of it add up over tiles, pages, chips.

    Arguments: those of `dot_product_attention`, sinks, ``return_residual`` and
    ``return_statistics`` excepted; and

      reference: m of the result, broadcastable to [B, T, N], in units of scores. Parts with the
        same reference add without `merge`. It should be within about 80 of each row's log-sum-exp,
        or the sums leave float32. None: the log-sum-exp of each row.

    Raises: what `dot_product_attention` raises.

    >>> import jax.numpy as jnp
    >>> from pasa_jax import merge
    >>> q, k = jnp.ones((1, 1, 1, 4)), jnp.ones((1, 6, 1, 4))
    >>> parts = [partial_attention(q, k[:, i], k[:, i]) for i in (slice(0, 2), slice(2, 6))]
    >>> out, lse = merge(*parts).output()
    >>> bool(jnp.allclose(out, dot_product_attention(q, k, k)))
    True
    """
    return partial_result(_bound(*args, **kwargs), reference)


def canonical(*args: Any, **kwargs: Any) -> Call:
    """A call of `dot_product_attention` as an implementation takes it."""
    return Call.of(_bound(*args, **kwargs))


def _bound(*args: Any, **kwargs: Any) -> Arguments:
    """The arguments of `dot_product_attention`, defaults included."""
    bound = inspect.signature(dot_product_attention).bind(*args, **kwargs)
    bound.apply_defaults()
    return Arguments(**bound.arguments)
