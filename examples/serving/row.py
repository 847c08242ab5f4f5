"""One step of a model: a row of new tokens of many sequences, and the tokens that follow."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pasa_jax.models import Decoder
from pasa_jax.serving import PagedCache

Array = jax.Array


class Ask(NamedTuple):
    """A token that is asked for.

    Arguments:
      place: where in the row the token before it stands.
      temperature, seed: 0 for the likeliest token; else of the sample.
      made: how many tokens of the answer there are already.
    """

    place: int
    temperature: float
    seed: int
    made: int


class Row(NamedTuple):
    """T tokens of S sequences, one sequence after another, and R tokens that are asked for.

    Arguments:
      tokens: [T] int32.
      counts: [S] int32, how many are of each sequence.
      asks: of arrays [R].
    """

    tokens: np.ndarray
    counts: np.ndarray
    asks: Any

    @staticmethod
    def of(
        total: int, counts: np.ndarray, tokens: list[int], asks: Sequence[Ask], most: int
    ) -> Row:
        """T = ``total``, R = ``total`` or ``most``; what is left of a row is padding."""
        row = np.zeros(total, np.int32)
        row[: len(tokens)] = tokens
        asks = [*asks, *[Ask(0, 0.0, 0, 0)] * (min(total, most) - len(asks))]
        types = (np.int32, np.float32, np.int32, np.int32)
        columns = zip(zip(*asks, strict=True), types, strict=True)
        return Row(row, counts, Ask(*(np.asarray(x, t) for x, t in columns)))  # type: ignore[arg-type]


class Found(NamedTuple):
    """What a step found.

    Arguments:
      tokens: [R] int32, what was asked for; -1 where logits are not finite.
      lost: [S] bool, sequences whose tokens did not fit.
      free: [] int32, how many pages are free.
    """

    tokens: Array
    lost: Array
    free: Array


@partial(jax.jit, donate_argnames="cache")
def step(model: Decoder, blocks: Any, cache: PagedCache, row: Row) -> tuple[Found, PagedCache]:
    """The cache with the tokens of a row.

    Arguments:
      blocks: `bits.stored_tree` of the model's.
    """
    cache, batch = cache.grown(row.counts, total=len(row.tokens))
    states, cache = model.paged_step(jnp.asarray(row.tokens), cache, batch, blocks)
    tokens = chosen(model.logits(states[row.asks.place]), row.asks)
    # Copies: the table is given away at the next step.
    return Found(tokens, jnp.copy(cache.table.lost), jnp.copy(cache.table.count)), cache


def chosen(logits: Array, asks: Any) -> Array:
    """[R] int32, as `Decoder.generate` chooses them for each sequence alone."""
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    samples = asks.temperature > 0
    tokens = jax.lax.cond(
        jnp.any(samples),
        lambda: jnp.where(samples, jax.vmap(_sampled)(logits, asks), likeliest),
        lambda: likeliest,
    )
    return jnp.where(jnp.isfinite(jnp.max(logits, axis=-1)), tokens, -1)


def _sampled(logits: Array, ask: Any) -> Array:
    key = jax.random.fold_in(jax.random.key(ask.seed), ask.made)
    divisor = jnp.where(ask.temperature > 0, ask.temperature, 1)
    return jax.random.categorical(key, logits[None] / divisor)[0].astype(jnp.int32)
