"""`LatentCache`: keys in a joint low-rank space, values of few bits, and attention over a few."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike

from pasa_jax import Schedule, dot_product_attention
from pasa_jax.call import checks
from pasa_jax.core.checks import is_real, is_size
from pasa_jax.core.errors import check_choice, wrong
from pasa_jax.core.rotary import Rotation, rotated, rotation_below
from pasa_jax.serving.sals._basis import Basis
from pasa_jax.serving.sals._choice import chosen, lifted
from pasa_jax.serving.sals._values import LARGEST, packed, scales, unpacked

Array = jax.Array
_FLOATS = ("float16", "bfloat16", "float32")
_ATTEND = ("logits_soft_cap", "precision", "shift")


def _static() -> Any:
    return field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LatentCache:
    """Up to S tokens of one layer, made by `empty`, grown by `append`, read by `attend`.

    Of each token it stores r coordinates of the keys of all heads, before their rotary positions,
    and the values in 8 or 4 bits. The keys of the first tokens (sinks) and of the last ones (the
    window) it stores as they are, too: few, whatever S. `attend` scores all tokens on the leading
    coordinates, rebuilds and rotates the best, and attends them, the sinks and the window.

    It is a pytree and works with jit, scan and vmap; if it is donated, `append` writes in place.
    Letters as in `pasa_jax.dot_product_attention`. Numbers of 16 bits are held as uint16: XLA for
    CPUs would widen a whole array of them to write into it.

    Arguments:
      basis: of this layer.
      latents: [B, r, S].
      value: [B, S, K, E] int8, or [B, S, K, E/2] uint8 of 4 bits each.
      value_scale: [B, S, 1] or, of 4 bits, [B, S, K] uint16: bfloat16 factors of the integers.
      exact: [B, sinks + window, K, D] rotated keys; token p ≥ sinks is in slot
        sinks + (p − sinks) mod window.
      length: [B] int32, tokens appended so far; more than S if they did not fit.
      sinks, window, top: tokens that are attended: the first, the last, and the best of the others.
      scored: r* ≤ r, the coordinates that scores are of.
      rope_base: of the rotary positions, see `pasa_jax.core.rotary`.
      dtype: float16, bfloat16 or float32, of latents and exact keys.
      value_bits: 8 or 4.

    Source: SALS, arXiv 2510.24273.
    """

    basis: Basis
    latents: Array
    value: Array
    value_scale: Array
    exact: Array
    length: Array
    sinks: int = _static()
    window: int = _static()
    top: int = _static()
    scored: int = _static()
    rope_base: float = _static()
    dtype: str = _static()
    value_bits: int = _static()

    @staticmethod
    def empty(
        basis: Basis,
        batch: int,
        max_length: int,
        *,
        rope_base: float,
        dtype: Any = "bfloat16",
        value_head_dim: int | None = None,
        value_bits: int = 8,
        sinks: int = 16,
        window: int = 128,
        top: int = 368,
        scored: int | None = None,
    ) -> LatentCache:
        """A cache of no tokens; of one layer, or of all layers that ``basis`` is of, stacked.

        Arguments:
          basis: from `calibrate` or `Basis.of`.
          batch, max_length: B and S, positive.
          rope_base: θ ≥ 1; pair (i, i + D/2) of a head turns by θ^(−2i/D) a position.
          dtype: float16, bfloat16 or float32. Coordinates may be √(K·D) times as large as keys, and
            float16 ends at 65504.
          value_head_dim: E; default D.
          value_bits: 8, or 4 for an even E.
          sinks: at least 0.
          window: at least 1, and at least as many as there are queries in a call of `attend`.
          top: at least 1. By default 512 tokens are attended in all.
          scored: from 1 to r; default r/2.

        Raises:
          ValueError: an argument is wrong.

        >>> basis = Basis.of(jnp.eye(32).reshape(32, 2, 16), rank=8)
        >>> LatentCache.empty(basis, 1, 64, rope_base=1e4).latents.shape
        (1, 8, 64)
        """
        if not isinstance(basis, Basis):
            raise wrong("basis", "be a Basis", type(basis).__name__, "`calibrate` makes one.")
        layers, (rank, heads, size) = basis.directions.shape[:-3], basis.directions.shape[-3:]
        value_size = size if value_head_dim is None else value_head_dim
        scored = max(1, rank // 2) if scored is None else scored
        sizes = {"batch": batch, "max_length": max_length, "value_head_dim": value_size}
        sizes |= {"window": window, "top": top, "scored": scored}
        for name, value in sizes.items():
            if not is_size(value) or value < 1:
                raise wrong(name, "be a positive int", repr(value))
        if not is_size(sinks):
            raise wrong("sinks", "be an int of at least 0", repr(sinks))
        if scored > rank:
            raise wrong("scored", f"be at most the basis's rank r = {rank}", scored)
        if value_bits not in LARGEST:
            raise wrong("value_bits", "be 8 or 4", repr(value_bits))
        if value_size * value_bits % 8:
            raise wrong("value_head_dim", "be even, for two values in a byte", value_size)
        if not is_real(rope_base) or not 1 <= rope_base < math.inf:
            raise wrong("rope_base", "be a finite number of at least 1", repr(rope_base))
        if size % 2:
            raise wrong("basis", "be of heads with an even size, to rotate pairs", size)
        name = str(jnp.dtype(dtype))
        check_choice("dtype", name, _FLOATS)
        bits = jnp.float32 if name == "float32" else jnp.uint16
        slots = sinks + window
        return LatentCache(
            basis=basis,
            latents=jnp.zeros((*layers, batch, rank, max_length), bits),
            value=jnp.zeros(
                (*layers, batch, max_length, heads, value_size * value_bits // 8),
                jnp.int8 if value_bits == 8 else jnp.uint8,
            ),
            value_scale=jnp.zeros(
                (*layers, batch, max_length, scales(value_bits, heads)), jnp.uint16
            ),
            exact=jnp.zeros((*layers, batch, slots, heads, size), bits),
            length=jnp.zeros((*layers, batch), jnp.int32),
            sinks=int(sinks),
            window=int(window),
            top=int(top),
            scored=int(scored),
            rope_base=float(rope_base),
            dtype=name,
            value_bits=int(value_bits),
        )

    @property
    def max_length(self) -> int:
        """S."""
        return self.latents.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of the cache without its basis, which is a weight that all texts share."""
        return sum(x.nbytes for x in (self.latents, self.value, self.value_scale, self.exact))

    def append(self, key: Array, value: Array, *, lengths: ArrayLike | None = None) -> LatentCache:
        """This cache with more tokens: those of a prompt, or the next ones. O(T).

        Arguments:
          key: [B, T, K, D] floats, before their rotary positions.
          value: [B, T, K, E], of key's type.
          lengths: [B] integers, how many of the T tokens of each batch entry are no padding;
            default T. Clipped to [0, T].

        Returns:
          The new cache. Tokens that do not fit are not written, and every later `attend` of that
          batch entry gives NaN; where the length is known (not under jit) that is an error.

        Raises:
          ValueError: a wrong shape or type, or tokens that do not fit.
        """
        self._check_new(key, value)
        added = checks.lengths("lengths", lengths, key)
        added = jnp.full_like(self.length, key.shape[1]) if added is None else added
        length = self.length + added
        if _is_known(length) and int(jnp.max(length)) > self.max_length:
            allowed = f"hold tokens that fit beside the cache's: at most {self.max_length} in all"
            raise wrong("key", allowed, int(jnp.max(length)), "Make a longer cache.")
        return self._grown(key, value, added)

    def attend(
        self,
        query: Array,
        *,
        lengths: ArrayLike | None = None,
        scale: float | None = None,
        **options: Any,
    ) -> Array:
        r"""Attention of the last T tokens, each over the tokens up to itself that it chooses.

        Query t, at position p, attends the sinks; the last ``window`` tokens of the cache, up to
        p; and the ``top`` tokens j among the others with the largest

            Σ_h softmax_j(scale · (U_h·q_h)·z_j),   over the first r* coordinates of z_j.

        Arguments:
          query: [B, T, N, D] floats, before their rotary positions, of the T ≤ ``window`` tokens
            that were appended last. With T > 1 the window reaches back from the last of them.
          lengths: [B], how many of them are no padding, as given to `append`.
          scale: positive; default 1/√D.
          options: ``logits_soft_cap``, ``shift``, ``precision``, as in
            `pasa_jax.dot_product_attention` of float32; by default nothing is shifted, for
            scores are few and stored in float32.

        Returns:
          [B, T, N, E] of query's type; 0 for padding. NaN for a batch entry whose tokens did not
          fit, or that has fewer tokens than there are queries, and for a query with a score that is
          NaN. There is no gradient through the choice.

        Raises:
          ValueError: a wrong shape or type, an unknown option, or (where lengths are known) tokens
            that did not fit or more queries than tokens.
        """
        scale = self._check_query(query, scale, options)
        asked = checks.lengths("lengths", lengths, query)
        asked = jnp.full_like(self.length, query.shape[1]) if asked is None else asked
        lost = (self.length > self.max_length) | (self.length < asked)
        if _is_known(lost) and bool(jnp.any(lost)):
            allowed = "hold at most as many tokens as were appended, all of which fit"
            raise wrong("query", allowed, f"{query.shape[1]} beside {self.length.tolist()}")
        return self._attended(query, asked, lost, scale, tuple(sorted(options.items())))

    # How it is written.

    @jax.jit  # outside of a jitted step, one program
    def _grown(self, key: Array, value: Array, added: Array) -> LatentCache:
        """The cache with the first ``added`` [B] tokens; those that do not fit are not written."""
        step = jnp.arange(key.shape[1], dtype=jnp.int32)
        new = step < added[:, None]  # [B, T]
        at = self.length[:, None] + step
        place = jnp.where(new, at, self.max_length)
        rows = jnp.arange(len(key), dtype=jnp.int32)[:, None]
        length = self.length + added
        lasting = (at < self.sinks) | (at >= length[:, None] - self.window)
        slot = jnp.where(new & lasting, self._slot(at), self.exact.shape[1])
        turned = rotated(key, self._turn(at))
        whole, scale = packed(value, self.value_bits)
        return replace(
            self,
            latents=self.latents.at[rows, :, place].set(
                self._bits(self._latents(key)), mode="drop"
            ),
            value=self.value.at[rows, place].set(whole, mode="drop"),
            value_scale=self.value_scale.at[rows, place].set(scale, mode="drop"),
            exact=self.exact.at[rows, slot].set(self._bits(turned), mode="drop"),
            length=length,
        )

    def _slot(self, at: Array) -> Array:
        """The slot of `exact` for the token at each position."""
        return jnp.where(at < self.sinks, at, self.sinks + (at - self.sinks) % self.window)

    def _latents(self, key: Array) -> Array:
        """[B, T, r] float32."""
        centred = key.astype(jnp.float32) - self.basis.mean
        directions = self.basis.directions
        return jnp.einsum("btkd,rkd->btr", centred, directions, precision=lax.Precision.HIGHEST)

    def _turn(self, at: Array) -> Rotation:
        """Of the positions ``at``."""
        return rotation_below(self.max_length, at, self.exact.shape[-1], self.rope_base)

    def _bits(self, x: Array) -> Array:
        x = x.astype(self.dtype)
        return x if self.dtype == "float32" else lax.bitcast_convert_type(x, jnp.uint16)

    # How it is read.

    def _floats(self, bits: Array) -> Array:
        if self.dtype == "float32":
            return bits
        return lax.bitcast_convert_type(bits, jnp.dtype(self.dtype))

    @partial(jax.jit, static_argnames=("scale", "options"))
    def _attended(
        self, query: Array, asked: Array, lost: Array, scale: float, options: tuple[Any, ...]
    ) -> Array:
        """The output [B, T, N, E], for ``asked`` [B] queries; NaN for batch entries ``lost``.

        What is read is widened to float32, and stays so: it is little.
        """
        wide = query.astype(jnp.float32)
        batch, tokens, heads, size = query.shape
        step = jnp.arange(tokens, dtype=jnp.int32)
        at = (self.length - asked)[:, None] + step
        key, value, seen, unclear = self._read(wide, at, scale)
        rows, most = batch * tokens, key.shape[2]  # every query has keys of its own
        given: dict[str, Any] = {"shift": "none"} | dict(options)
        out = dot_product_attention(
            rotated(wide, self._turn(at)).reshape(rows, 1, heads, size),
            key.reshape(rows, most, *key.shape[3:]),
            value.reshape(rows, most, *value.shape[3:]),
            mask=seen.reshape(rows, 1, 1, most),
            scale=scale,
            implementation="lax",
            schedule=Schedule(block_q=heads, block_kv=most),
            **given,
        )
        out = out.reshape(batch, tokens, heads, -1)
        padding = (step >= asked[:, None])[..., None, None]
        out = jnp.where(padding, jnp.zeros_like(out), out)
        lost = (lost[:, None] | unclear)[..., None, None]
        return jnp.where(lost, jnp.full_like(out, jnp.nan), out).astype(query.dtype)

    def _read(self, query: Array, at: Array, scale: float) -> tuple[Array, Array, Array, Array]:
        """What the queries at positions ``at`` [B, T] attend, n tokens each.

        Returns:
          Rotated keys [B, T, n, K, D] and values [B, T, n, K, E], float32; [B, T, n] bool, whether
          they are seen; and [B, T] bool, whether a score was NaN.
        """
        place, seen = self._exact_places(at)
        key = self._floats(self.exact).astype(jnp.float32)[:, None]
        key = jnp.broadcast_to(key, (*at.shape, *key.shape[2:]))
        unclear = jnp.zeros(at.shape, bool)
        count = min(self.top, self.max_length - self.sinks - self.window)
        if count > 0:
            best, weight = self._chosen(query, scale, count)
            key = jnp.concatenate([key, self._rebuilt(best)], axis=2)
            place = jnp.concatenate([place, best], axis=2)
            seen = jnp.concatenate([seen, weight >= 0], axis=2)
            unclear = jnp.any(jnp.isnan(weight), axis=-1)
        return key, self._values(place), seen, unclear

    def _exact_places(self, at: Array) -> tuple[Array, Array]:
        """The positions of the slots, and whether the queries ``at`` [B, T] see them; [B, T, n]."""
        last = self.length[:, None] - self.sinks - 1  # counted after the sinks
        ring = jnp.arange(self.window, dtype=jnp.int32)
        ring = self.sinks + last - (last - ring) % self.window
        first = jnp.arange(self.sinks, dtype=jnp.int32)
        first = jnp.broadcast_to(first, (len(at), self.sinks))
        place = jnp.concatenate([first, ring], axis=1)[:, None]
        # A slot of the ring that is not in use has a position among the sinks.
        used = jnp.arange(place.shape[2], dtype=jnp.int32) < self.sinks
        seen = (place <= at[..., None]) & (used | (place >= self.sinks))
        return jnp.broadcast_to(jnp.maximum(place, 0), seen.shape), seen

    def _chosen(self, query: Array, scale: float, count: int) -> tuple[Array, Array]:
        """The tokens to rebuild, [B, T, count], and their weight, see `chosen`."""
        token = jnp.arange(self.max_length, dtype=jnp.int32)
        far = (token >= self.sinks) & (token < self.length[:, None] - self.window)
        leading = self._floats(self.latents[:, : self.scored])
        return chosen(
            lifted(query, self.basis.directions[: self.scored], scale), leading, far, count
        )

    def _rebuilt(self, place: Array) -> Array:
        """The rotated keys at ``place`` [B, T, n], [B, T, n, K, D]."""
        taken = jax.vmap(lambda z, i: jnp.take(z, i, axis=1, mode="clip"))(self.latents, place)
        latents = self._floats(taken).astype(jnp.float32)  # [B, r, T, n]
        directions = self.basis.directions
        key = jnp.einsum("brtn,rkd->btnkd", latents, directions, precision=lax.Precision.HIGHEST)
        return rotated(key + self.basis.mean, self._turn(place))

    def _values(self, place: Array) -> Array:
        """The values at ``place`` [B, T, n], [B, T, n, K, E]."""
        batch, most, heads, size = self.value.shape

        def taken(x: Array) -> Array:
            return jax.vmap(lambda x, i: jnp.take(x, i, axis=0, mode="clip"))(x, place)

        whole = taken(self.value.reshape(batch, most, heads * size))
        whole = whole.reshape(*place.shape, heads, size)
        return unpacked(whole, taken(self.value_scale), self.value_bits)

    # What is wrong.

    def _check_new(self, key: Array, value: Array) -> None:
        self._check_one_layer()
        tokens = key.shape[1] if key.ndim == 4 else 0
        *_, heads, packed_size = self.value.shape
        sizes = {"key": self.exact.shape[2:], "value": (heads, packed_size * 8 // self.value_bits)}
        for name, x in (("key", key), ("value", value)):
            expected = (len(self.length), tokens, *sizes[name])
            if x.shape != expected or tokens == 0:
                allowed = f"be [{expected[0]}, T, {expected[2]}, {expected[3]}] with one T ≥ 1"
                raise wrong(name, allowed, x.shape)
            if str(x.dtype) not in _FLOATS or x.dtype != key.dtype:
                raise wrong(
                    name, f"be of type {', '.join(_FLOATS)}, as `key` is", x.dtype, "Cast it."
                )
        if tokens > self.max_length:
            allowed = f"hold at most the cache's {self.max_length} tokens"
            raise wrong("key", allowed, tokens, "Make a longer cache.")

    def _check_query(self, query: Array, scale: float | None, options: dict[str, Any]) -> float:
        """The scale."""
        self._check_one_layer()
        _, _, heads, size = self.exact.shape
        right = query.ndim == 4 and query.shape[0] == len(self.length) and query.shape[3] == size
        if not right or 0 in query.shape or query.shape[2] % heads:
            allowed = f"be [{len(self.length)}, T, N, {size}], N a multiple of {heads}"
            raise wrong("query", allowed, query.shape)
        if str(query.dtype) not in _FLOATS:
            raise wrong("query", f"be of type {', '.join(_FLOATS)}", query.dtype)
        if query.shape[1] > self.window:
            way_out = "Attend fewer at a time, or make a cache with a larger window."
            allowed = f"be of at most {self.window} tokens, the window"
            raise wrong("query", allowed, query.shape[1], way_out)
        for name in options:
            if name not in _ATTEND:
                raise wrong("options", f"be among {', '.join(_ATTEND)}", name)
        if scale is None:
            return 1 / math.sqrt(size)
        if not is_real(scale) or not 0 < scale < math.inf:
            raise wrong("scale", "be a positive, finite number", repr(scale))
        return float(scale)

    def _check_one_layer(self) -> None:
        if self.length.ndim != 1:
            way_out = "`jax.lax.scan` or `jax.vmap` goes through the layers."
            raise wrong("cache", "be of one layer", f"{self.length.shape[:-1]} of them", way_out)


def _is_known(x: Array) -> bool:
    return not isinstance(x, Tracer)
