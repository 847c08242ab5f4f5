"""Attention sinks found and damped (ACT, arXiv 2406.15765), and what they are to the shifts.

    python -m examples.neighbours.sinks [--output out]

A sink is a key whose column of weights has a mean above ``SHARE`` over the number of keys. ACT
multiplies the weights of sinks by β and spreads what that takes over the row's other keys in
proportion. The paper leaves the first token alone, and damps only heads where a text held out says
that it helps; here the sign of the loss's derivative by the β of each head says so.

ACT needs the whole matrix of weights, as it is published. Four calls of this library's attention
give the same and form no matrix: the rows' log-sum-exp; the columns' sums, which are the
log-sum-exp of attention with queries and keys exchanged and the rows' taken off; and attention to
the sinks alone and to the others, added up by their log-sum-exp and β. Measured on SmolLM2-135M.
"""

from __future__ import annotations

import inspect
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from numpy.typing import NDArray

from examples.neighbours import _shared
from pasa_jax import dot_product_attention
from pasa_jax.models import Decoder, metrics

Array = jax.Array
SHARE, BETA = 5.0, 0.4  # the paper's
CHOICE = 6  # tokens of a continuation
BLOCK = 128  # keys of a block, whose mean the shifts take off


def weights(query: Array, key: Array) -> Array:
    """[N, T, T] of causal attention; query [T, N, D], key [T, K, D]."""
    key = jnp.repeat(key, query.shape[1] // key.shape[1], axis=1)
    scores = jnp.einsum("tnd,snd->nts", query, key) / np.sqrt(query.shape[-1]).astype(np.float32)
    seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    return jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)


def sinks_of(column_sums: Array, first: Array | bool = True) -> Array:
    """[N, T] which keys are sinks; a mean above SHARE / T is a sum above SHARE."""
    return (column_sums > SHARE) & ((jnp.arange(column_sums.shape[-1]) > 0) | first)


def whole(query: Array, key: Array, value: Array, betas: Array, first: Array) -> Array:
    """ACT as published, on the matrix of weights.

    Arguments:
      query, key, value: [T, N, D], [T, K, D], [T, K, E].
      betas: [N], of the heads.
      first: [] bool, whether the first key may be a sink.

    Returns:
      [T, N, E].
    """
    p = weights(query, key)
    sinks = sinks_of(p.sum(axis=1), first)[:, None]
    on_sinks, others = (jnp.sum(p, axis=-1, keepdims=True, where=x) for x in (sinks, ~sinks))
    beta = jnp.where(others > 0, betas[:, None, None], 1)  # a row of sinks alone stays
    spread = 1 + (1 - beta) * on_sinks / jnp.where(others > 0, others, 1)
    value = jnp.repeat(value, query.shape[1] // value.shape[1], axis=1)
    return jnp.einsum("nts,snd->tnd", p * jnp.where(sinks, beta, spread), value)


def by_calls(query: Array, key: Array, value: Array, betas: Array, first: Array) -> Array:
    """The same without a matrix."""
    group = query.shape[1] // key.shape[1]
    attend = partial(dot_product_attention, query, key, value, is_causal=True, return_residual=True)

    def exchanged(score: Any, b: Any, h: Any, q: Any, kv: Any, *, kv_data: Any) -> Any:
        return score - kv_data

    nothing = jnp.zeros((*query.shape[:2], 1), query.dtype)
    _, columns = dot_product_attention(
        jnp.repeat(key, group, axis=1), query, nothing, score_mod=exchanged,
        mask_mod=lambda b, h, q, kv: kv >= q, kv_data=attend()[1].T[None], return_residual=True,
    )  # fmt: skip
    sinks = sinks_of(jnp.exp(columns.T), first)[None, :, None]
    (on_sinks, log_sinks), (others, log_others) = attend(mask=sinks), attend(mask=~sinks)
    share = jax.nn.sigmoid(log_sinks - log_others)[..., None]
    damped = share * jnp.where(share < 1, betas[:, None], 1)
    return damped * on_sinks + (1 - damped) * others


@jax.jit
def log_probabilities(model: Decoder, tokens: Array, betas: Array, first: Array) -> Array:
    """[B, T, V] with the β [L, N] of each head."""

    def attention(q: Array, k: Array, v: Array, layer: Array) -> Array:
        return jax.vmap(lambda q, k, v: whole(q, k, v, betas[layer], first))(q, k, v)

    return metrics.log_probabilities(model(tokens, attention=attention))


def next_ones(log_p: Array, tokens: Array) -> Array:
    """[B, T − 1] the log-probability of each token after the first."""
    return jnp.take_along_axis(log_p[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]


def derivatives(model: Decoder, tokens: Array) -> Array:
    """[L, N] of the loss by each head's β at 1, the first key left alone."""

    def loss(betas: Array) -> Array:
        return -next_ones(
            log_probabilities(model, tokens, betas, jnp.asarray(False)), tokens
        ).mean()

    return jax.grad(loss)(jnp.ones((model.config.layers, model.config.heads)))


def questions(ids: NDArray, count: int, context: int = 24, length: int = CHOICE) -> Array:
    """[4·count, context + length]: each context with its own continuation and three others."""
    rng = np.random.default_rng(0)
    rows = []
    for start in rng.integers(0, len(ids) - context - length, count):
        others = rng.integers(0, len(ids) - length, 3)
        for at in (start + context, *others):
            rows.append(np.append(ids[start : start + context], ids[at : at + length]))
    return jnp.asarray(rows, jnp.int32)


def correct(log_p: Array, tokens: Array) -> float:
    """The share of questions whose own continuation is the likeliest."""
    each = next_ones(log_p, tokens)[:, -CHOICE:].sum(axis=1).reshape(-1, 4)
    return float(jnp.mean(jnp.argmax(each, axis=1) == 0))


def seen_by_shifts(query: NDArray, key: NDArray) -> NDArray[np.float64]:
    """[blocks with sinks, 4]; query [L, N, T, D], key [L, K, T, D].

    Layer; norm of the largest sink over the others' median; how far the sinks move the block's
    mean, over the others' root mean square distance from it; the radius max ‖k − k̄‖ with the sinks
    over that without.
    """
    found = []
    for layer, (q, k) in enumerate(zip(query, key, strict=True)):
        p = weights(jnp.asarray(q.swapaxes(0, 1)), jnp.asarray(k.swapaxes(0, 1)))
        sinks = np.asarray(sinks_of(p.sum(axis=1))).reshape(len(k), -1, k.shape[1]).any(axis=1)
        for block, sink in zip(
            k.reshape(-1, BLOCK, k.shape[2]), sinks.reshape(-1, BLOCK), strict=True
        ):
            if not sink.any():
                continue
            rest, norms = block[~sink], np.linalg.norm(block, axis=-1)
            mean, other = block.mean(axis=0), rest.mean(axis=0)
            distances = np.linalg.norm(rest - other, axis=-1)
            moved = np.linalg.norm(mean - other) / np.sqrt(np.mean(distances**2))
            radius = np.linalg.norm(block - mean, axis=-1).max() / distances.max()
            found.append((layer, norms[sink].max() / np.median(norms[~sink]), moved, radius))
    return np.asarray(found)


def main(output: Path = Path("out"), tokens: int = 256, count: int = 12) -> dict[str, Any]:
    """Prints the tables, saves the picture, returns what was measured."""
    model, tokenizer = _shared.smollm2()
    held_out = jnp.asarray(_shared.text(tokens))
    ids = tokenizer.encode(inspect.getsource(tarfile)).ids[2000 : 2000 + tokens]
    other, asked = jnp.asarray([ids]), questions(_shared.text(4 * tokens)[0], count)
    slopes = [derivatives(model, x) for x in (other, held_out)]
    all_heads = jnp.full(slopes[0].shape, BETA)
    found: dict[str, Any] = {"correlation": float(np.corrcoef([x.ravel() for x in slopes])[0, 1])}
    rows = {
        "as trained": (jnp.ones_like(all_heads), False),
        "every sink": (all_heads, True),
        "all but the first key": (all_heads, False),
        "the same, in heads where it helps": (jnp.where(slopes[0] > 0, BETA, 1), False),
    }
    for name, (betas, first) in rows.items():
        log_p = partial(log_probabilities, model, betas=betas, first=jnp.asarray(first))
        scores = [metrics.perplexity(log_p(x), x) for x in (other, held_out)]
        found[name] = *scores, correct(log_p(asked), asked)
    columns = ("sinks damped", "perplexity, text of the choice", "held out", "questions right")
    _shared.show("ACT on SmolLM2", columns, ((name, *found[name]) for name in rows))
    correlation = f"correlation of the heads' derivatives: {found['correlation']:.2f}"
    _shared.console.print(f"{correlation} between the two texts")
    query, key, _ = _shared.smollm2_heads(tokens)
    found["blocks"] = blocks = seen_by_shifts(query, key)
    names = ("norm of the largest sink / median", "shift of the mean / spread", "radius / without")
    quantiles = np.quantile(blocks[:, 1:], (0, 0.5, 1), axis=0).T
    rows = ((name, *x) for name, x in zip(names, quantiles, strict=True))
    _shared.show(f"{len(blocks)} blocks of keys with sinks", ("", "least", "median", "most"), rows)
    figure, (axes,) = _shared.picture(columns=3)
    for axis, name, values in zip(axes, names, blocks[:, 1:].T, strict=True):
        axis.semilogy(blocks[:, 0], values, ".")
        axis.axhline(1, color="gray", linewidth=0.8)
        axis.set(xlabel="layer", title=name)
    _shared.save(figure, output, "sinks")
    return found


if __name__ == "__main__":
    typer.run(main)
