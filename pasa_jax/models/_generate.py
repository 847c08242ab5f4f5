"""Text from a decoder: a prompt, then token after token, in one compiled loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike
from numpy.typing import NDArray

from pasa_jax.core import bits
from pasa_jax.core.errors import wrong
from pasa_jax.plugins import KVCaches

Array = jax.Array


# (how many tokens came before, the next token of each text [B] int32, and whether it has ended)
OnToken = Callable[[int, NDArray, NDArray], None]


class Request(NamedTuple):
    """The static arguments of `run`, for which its loop is compiled."""

    count: int
    eos: tuple[int, ...]
    temperature: float
    attention: Callable[..., Array] | None
    on_token: OnToken | None


def checked_request(
    tokens: Array,
    max_length: int,
    count: int,
    eos: int | Sequence[int] | None,
    temperature: float,
    key: Array | None,
    attention: Callable[..., Array] | None,
    on_token: OnToken | None,
) -> Request:
    """The request, or the error for a wrong argument of `Decoder.generate`."""
    if not isinstance(count, (int, np.integer)) or count < 1:
        raise wrong("max_new_tokens", "be a positive int", repr(count))
    room = max_length - tokens.shape[1]
    if count > room:
        allowed = f"be at most {room}, what max_length = {max_length} leaves after the prompt"
        raise wrong("max_new_tokens", allowed, count)
    if not isinstance(temperature, (int, float)) or not 0 <= temperature < math.inf:
        raise wrong("temperature", "be a finite number of at least 0", repr(temperature))
    if temperature > 0 and key is None:
        raise wrong("key", "be given to sample", None, "jax.random.key(seed) makes one.")
    if on_token is not None and not callable(on_token):
        raise wrong("on_token", "be a function or None", repr(on_token))
    ends = () if eos is None else (eos,) if isinstance(eos, (int, np.integer)) else eos
    tokens_of_end = tuple(int(x) for x in ends)
    return Request(int(count), tokens_of_end, float(temperature), attention, on_token)


def checked_lengths(lengths: ArrayLike | None, tokens: Array) -> Array:
    """``lengths`` [B] int32; T where there are none."""
    batch, longest = tokens.shape
    if lengths is None:
        return jnp.full(batch, longest, jnp.int32)
    array = jnp.asarray(lengths)
    if array.shape != (batch,) or not jnp.issubdtype(array.dtype, jnp.integer):
        seen = f"{array.dtype}{list(array.shape)}"
        raise wrong("lengths", f"be integers of shape [B] = [{batch}]", seen)
    if not isinstance(array, Tracer):
        held = np.asarray(array)
        if not 1 <= held.min() <= held.max() <= longest:
            raise wrong("lengths", f"be in [1, {longest}], the length of `tokens`", held.tolist())
    return array.astype(jnp.int32)


class Memory(NamedTuple):
    """How the text so far is stored: ``start`` reads prompts, ``step`` one more token of each.

    Both return logits [B, V] of the next token and the new state.
    """

    start: Callable[[Array, Array], tuple[Array, Any]]
    step: Callable[[Array, Any], tuple[Array, Any]]


@partial(jax.jit, static_argnames="request")
def run(model: Any, tokens: Array, lengths: Array, key: Array, request: Request) -> Array:
    """[B, count] new tokens."""
    memory = cached(model, request) if request.attention is None else read_again(model, request)
    ends = jnp.asarray(request.eos, jnp.int32)

    def put(i: Any, logits: Array, texts: Array, ended: Array) -> tuple[Array, Array, Array]:
        """The i-th token of each text that has not ended."""
        token = choose(logits, request.temperature, jax.random.fold_in(key, i))
        token = jnp.where(ended, texts[:, i], token)
        ended = jnp.isin(token, ends)
        if request.on_token is not None:
            told = partial(_tell, request.on_token)
            jax.debug.callback(told, i, token, ended, ordered=True)
        return token, texts.at[:, i].set(token), ended

    def unfinished(carry: tuple[Any, ...]) -> Array:
        i, _, _, ended, _ = carry
        return (i < request.count) & ~jnp.all(ended)

    def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        i, token, texts, ended, state = carry
        logits, state = memory.step(token, state)
        return i + 1, *put(i, logits, texts, ended), state

    texts = jnp.full((len(tokens), request.count), request.eos[0] if request.eos else 0, jnp.int32)
    logits, state = memory.start(tokens, lengths)
    first = put(0, logits, texts, jnp.zeros(len(tokens), bool))
    return lax.while_loop(unfinished, step, (jnp.int32(1), *first, state))[2]


def _tell(on_token: OnToken, i: Any, token: Any, ended: Any) -> None:
    on_token(int(i), np.asarray(token), np.asarray(ended))


def choose(logits: Array, temperature: float, key: Array) -> Array:
    """The likeliest token of logits [B, V], or a sample."""
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, logits / temperature).astype(jnp.int32)


def cached(model: Any, request: Request) -> Memory:
    """Keys and values of all layers in `KVCaches`."""

    def start(tokens: Array, lengths: Array) -> tuple[Array, KVCaches]:
        states, new = model.walk(tokens, look=lambda q, k, v, layer: (k, v))
        empty = KVCaches.empty(
            model.config.layers,
            len(tokens),
            tokens.shape[1] + request.count,
            model.config.kv_heads,
            model.config.head_dim,
            model.dtype,
        )

        def append(layer: Array, caches: KVCaches) -> KVCaches:
            layer = layer.astype(jnp.int32)
            key, value = jax.tree.map(lambda x: x[layer], new)
            return caches.beside(layer, caches[layer].append(key, value, lengths=lengths))

        caches = lax.fori_loop(0, model.config.layers, append, empty)
        return model.logits(_at(states, lengths - 1)), caches

    blocks = bits.stored_tree(model.blocks)  # once, before the loop

    def step(token: Array, caches: KVCaches) -> tuple[Array, KVCaches]:
        states, caches = model.step(token[:, None], caches, blocks)
        return model.logits(states[:, 0]), caches

    return Memory(start, step)


def read_again(model: Any, request: Request) -> Memory:
    """Stores the tokens [B, T + count] and reads all of them at each step, because an attention
    function of the caller cannot use a cache."""

    def logits(texts: Array, lengths: Array) -> Array:
        states, _ = model.walk(texts, request.attention)
        return model.logits(_at(states, lengths - 1))

    def start(tokens: Array, lengths: Array) -> tuple[Array, Any]:
        texts = jnp.pad(tokens, ((0, 0), (0, request.count)))
        return logits(texts, lengths), (texts, lengths)

    def step(token: Array, state: tuple[Array, Array]) -> tuple[Array, Any]:
        texts, lengths = state
        texts = texts.at[jnp.arange(len(texts)), lengths].set(token)
        return logits(texts, lengths + 1), (texts, lengths + 1)

    return Memory(start, step)


def _at(states: Array, places: Array) -> Array:
    """states [B, T, W] at one place of each text, [B, W]."""
    return jnp.take_along_axis(states, places[:, None, None], axis=1)[:, 0]
