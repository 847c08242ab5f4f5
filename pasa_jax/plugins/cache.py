"""`KVCache`: keys and values of a decoder, and what PASA needs to know of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from pasa_jax.call import checks
from pasa_jax.call.api import canonical
from pasa_jax.call.differentiation import run
from pasa_jax.call.observe import announce
from pasa_jax.core.errors import wrong
from pasa_jax.core.guard import log2_norm
from pasa_jax.core.precision import FLOATS
from pasa_jax.core.prepare import Known
from pasa_jax.core.schedule import Schedule
from pasa_jax.core.target import target_of_device
from pasa_jax.core.tile import wide_type
from pasa_jax.implementations import lax as _lax

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys and values of up to S tokens, made by `empty`, grown by `append`, read by `attend`.

    It is a pytree and works with jit, scan and vmap; if it is donated, `append` writes in place.
    Beside keys and values it stores the sum and three maxima of each block of keys, which `append`
    updates in O(tokens appended). So `attend` reads each key and value once, where
    `pasa_jax.dot_product_attention` reads all of them a second time to find block means, largest
    norms and numbers that are not finite.

    Letters as in `pasa_jax.dot_product_attention`; S is the most that fits.

    Arguments:
      key, value: [B, S, K, D], [B, S, K, E].
      length: [B] int32, tokens appended to each batch entry so far; more than S if they did not
        fit.
      known: sums and maxima of the blocks, [B, K, …].
      schedule: tile sizes; a block of its ``block_kv`` keys has one sum.
    """

    key: Array
    value: Array
    length: Array
    known: Known
    schedule: Schedule = field(metadata={"static": True})

    @staticmethod
    def empty(
        batch: int,
        max_length: int,
        kv_heads: int,
        head_dim: int,
        dtype: Any,
        *,
        value_head_dim: int | None = None,
        schedule: Schedule | None = None,
    ) -> KVCache:
        """A cache of no tokens.

        Arguments:
          batch, max_length, kv_heads, head_dim: B, S, K, D; positive.
          dtype: float16, bfloat16, float32, or float64 under x64.
          value_head_dim: E; default D.
          schedule: default that of the device.

        Raises:
          ValueError: a size or a type that is not allowed.

        >>> KVCache.empty(1, 64, 2, 16, "float16").key.shape
        (1, 64, 2, 16)
        """
        sizes = {"batch": batch, "max_length": max_length, "kv_heads": kv_heads}
        value_size = head_dim if value_head_dim is None else value_head_dim
        sizes |= {"head_dim": head_dim, "value_head_dim": value_size}
        for name, size in sizes.items():
            if not isinstance(size, (int, np.integer)) or size < 1:
                raise wrong(name, "be a positive int", repr(size))
        dtype = jnp.dtype(dtype)
        if str(dtype) not in FLOATS:
            raise wrong("dtype", f"be one of {', '.join(FLOATS)}", str(dtype))
        schedule = _fitted(schedule, max_length, head_dim, value_size, str(dtype))
        heads, blocks = (batch, kv_heads), -(-max_length // schedule.block_kv)
        return KVCache(
            key=jnp.zeros((batch, max_length, kv_heads, head_dim), dtype),
            value=jnp.zeros((batch, max_length, kv_heads, value_size), dtype),
            length=jnp.zeros((batch,), jnp.int32),
            known=Known(
                finite=jnp.zeros((*heads, max_length), bool),
                total=jnp.zeros((*heads, blocks, head_dim), wide_type(dtype)),
                key_norm=jnp.full((*heads, blocks), -jnp.inf, jnp.float32),
                key_top=jnp.zeros((*heads, blocks), dtype),
                value_top=jnp.zeros((*heads, blocks), dtype),
            ),
            schedule=schedule,
        )

    @property
    def max_length(self) -> int:
        """S."""
        return self.key.shape[1]

    def append(self, key: Array, value: Array, *, lengths: ArrayLike | None = None) -> KVCache:
        """This cache with more tokens: those of a prompt, or the next one.

        Arguments:
          key, value: [B, T, K, D], [B, T, K, E] of the cache's type.
          lengths: [B] integers, how many of the T tokens of each batch entry are no padding;
            default T. Clipped to [0, T].

        Returns:
          The new cache. Tokens that do not fit are not written, and every later `attend` of that
          batch entry gives NaN; where the length is known (not under jit) that is an error.

        Raises:
          ValueError: a wrong shape or type, or tokens that do not fit.
        """
        tokens = self._check_new(key, value)
        added = checks.lengths("lengths", lengths, key)
        added = jnp.full_like(self.length, tokens) if added is None else added
        length = self.length + added
        if _is_known(length) and int(jnp.max(length)) > self.max_length:
            allowed = f"hold tokens that fit beside the cache's: at most {self.max_length} in all"
            raise wrong("key", allowed, int(jnp.max(length)), "Make a longer cache.")
        return self._grown(key, value, added)

    @jax.jit  # outside of a jitted step, one program
    def _grown(self, key: Array, value: Array, added: Array) -> KVCache:
        """The cache with the first ``added`` [B] tokens of key and value; those that do not fit are
        not written."""
        step = jnp.arange(key.shape[1], dtype=jnp.int32)
        new = step < added[:, None]  # [B, T]
        place = jnp.where(new, self.length[:, None] + step, self.max_length)
        rows = jnp.arange(key.shape[0], dtype=jnp.int32)[:, None]

        def written(old: Array, x: Array) -> Array:
            return old.at[rows, place].set(x, mode="drop")

        return KVCache(
            key=written(self.key, key),
            value=written(self.value, value),
            length=self.length + added,
            known=self._known_with(key, value, new, rows, place),
            schedule=self.schedule,
        )

    def attend(self, query: Array, *, lengths: ArrayLike | None = None, **options: Any) -> Array:
        """Attention of the last T tokens: each sees itself and all tokens before it.

        Arguments:
          query: [B, T, N, D] of the T tokens that were appended last, of the cache's type.
          lengths: [B], how many of them are no padding, as given to `append`.
          options: ``scale``, ``local_window_size``, ``logits_soft_cap``, ``sinks``, ``shift``,
            ``beta``, ``precision``, as in `pasa_jax.dot_product_attention`.

        Returns:
          [B, T, N, E] of query's type, computed by the lax walk. It equals what one causal call
          over all tokens gives for the last T, within the rounding of stored scores: the block
          means differ, as later keys are not in them yet. NaN for a batch entry whose tokens did
          not fit, or that has fewer tokens than there are queries. There is no gradient.

        Raises:
          ValueError: a wrong shape or type, an unknown option, or (where lengths are known)
            tokens that did not fit or more queries than tokens.
        """
        for name in options:
            if name not in _ATTEND:
                raise wrong("options", f"be among {', '.join(_ATTEND)}", name)
        if options.get("shift") == "bound":
            way_out = "Its bounds would be read from all keys at every step."
            raise wrong("shift", "be another than 'bound' in a cache", "'bound'", way_out)
        call = canonical(
            query,
            self.key,
            self.value,
            is_causal=True,
            causal_alignment="bottom_right",
            query_seq_lengths=lengths,
            key_value_seq_lengths=self.length,
            schedule=self.schedule,
            **options,
        )
        asked = call.mask.query_lengths
        asked = jnp.full_like(self.length, query.shape[1]) if asked is None else asked
        lost = (self.length > self.max_length) | (self.length < asked)
        if _is_known(lost) and bool(jnp.any(lost)):
            allowed = "hold at most as many tokens as were appended, all of which fit"
            raise wrong("query", allowed, f"{query.shape[1]} beside {self.length.tolist()}")
        announce(call.operands, call.mask, call.plan)
        result = run(_lax.forward, call.plan, "out", call.operands, call.mask, self.known)
        return jnp.where(lost[:, None, None, None], jnp.full_like(result.out, jnp.nan), result.out)

    def _check_new(self, key: Array, value: Array) -> int:
        """The number of tokens in ``key`` and ``value``."""
        tokens = key.shape[1] if key.ndim == 4 else 0
        for name, new, old in (("key", key, self.key), ("value", value, self.value)):
            expected = (old.shape[0], tokens, *old.shape[2:])
            if new.shape != expected or tokens == 0:
                allowed = f"be [{expected[0]}, T, {expected[2]}, {expected[3]}] with one T ≥ 1"
                raise wrong(name, allowed, new.shape)
            if new.dtype != old.dtype:
                raise wrong(name, f"be of the cache's type {old.dtype}", new.dtype, "Cast it.")
        if tokens > self.max_length:
            allowed = f"hold at most the cache's {self.max_length} tokens"
            raise wrong("key", allowed, tokens, "Make a longer cache.")
        return tokens

    def _known_with(self, key: Array, value: Array, new: Array, rows: Array, place: Array) -> Known:
        """`known` with the tokens ``new`` [B, T] of key and value, written at ``place``."""
        finite = jnp.all(jnp.isfinite(key), -1) & jnp.all(jnp.isfinite(value), -1)
        finite = finite & (new & (place < self.max_length))[..., None]  # [B, T, K]
        key, value = (jnp.where(finite[..., None], x, jnp.zeros_like(x)) for x in (key, value))
        old = self.known
        wide, block = old.total.dtype, place // self.schedule.block_kv
        norms = jnp.where(finite, log2_norm(key), -jnp.inf)

        def raised(old: Array, x: Array) -> Array:
            return old.at[rows, :, block].max(x, mode="drop")

        return Known(
            finite=old.finite.at[rows, :, place].set(finite, mode="drop"),
            total=old.total.at[rows, :, block].add(key.astype(wide), mode="drop"),
            key_norm=raised(old.key_norm, norms),
            key_top=raised(old.key_top, jnp.max(jnp.abs(key), axis=-1)),
            value_top=raised(old.value_top, jnp.max(jnp.abs(value), axis=-1)),
        )


_ATTEND = (
    "scale",
    "local_window_size",
    "logits_soft_cap",
    "sinks",
    "shift",
    "beta",
    "precision",
)


def _is_known(x: Array) -> bool:
    return not isinstance(x, Tracer)


def _fitted(
    schedule: Schedule | None, length: int, size: int, value_size: int, dtype: str
) -> Schedule:
    if schedule is None:
        device = jax.devices()[0]
        schedule = Schedule.for_target(
            target_of_device(device.platform, device.device_kind),
            head_dim=size,
            value_head_dim=value_size,
            dtype=dtype,
            length=length,
            is_causal=True,
        )
    elif not isinstance(schedule, Schedule):
        raise wrong("schedule", "be a pasa_jax.Schedule or None", repr(schedule))
    return schedule.fitted(schedule.block_q, length)
