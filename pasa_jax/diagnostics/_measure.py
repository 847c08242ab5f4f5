"""Measures one attention call by a walk over its tiles: sizes of scores, key bias, phases."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pasa_jax.call.statistics import Statistics, collect, overflow_edge, per_head
from pasa_jax.core import tile
from pasa_jax.core.mask import Index, Mask
from pasa_jax.core.operands import Operands
from pasa_jax.core.plan import Plan
from pasa_jax.core.precision import Precision
from pasa_jax.core.prepare import prepare
from pasa_jax.implementations.head_walk import HeadWalk

Array = jax.Array

LARGEST = 65504.0  # float16's
EDGE = overflow_edge("float16")
# Phases between q and k are counted in bins of 10°.
PHASES = np.arange(0, 181, 10)
# A target with rounded products.
ROUNDED = "ascend_910b"


class Products(NamedTuple):
    """Of the pairs that the mask shows, per query head [B, N, …]; before bias and soft cap."""

    max_product: Array  # [B, N] max |q·k|
    product_share: Array  # [B, N] share of the q·k that float16 cannot hold
    score_share: Array  # [B, N] the same of scale·q·k
    phases: Array  # [B, N, bins] share of the pairs whose phase arccos(q·k/‖q‖‖k‖) is in each bin
    query_mean: Array  # [B, N, D] mean over the queries
    key_mean: Array  # [B, N, D] mean over the keys of the head's key head
    key_spread: Array  # [B, N, D] their standard deviation
    not_finite: Array  # [B, N, 3] share of query, key and value that is seen and not finite
    shifts_if_rounded: Array  # [B, N] bool: `auto` on `ROUNDED` shifts this head


class Measured(NamedTuple):
    """The results of `measure`."""

    products: Products
    statistics: Statistics


@partial(jax.jit, static_argnums=2)
def measure(operands: Operands, mask: Mask, plan: Plan) -> Measured:
    """The sizes of a call's scores, and the sizes that `auto` stores in float16."""
    plan = replace(
        plan, shift="auto", precision=Precision.named("float16"), beta=None, logits_soft_cap=None
    )

    products = per_head(operands, mask, plan, _head)
    return Measured(products, collect(operands, mask, plan))


class _Counts(NamedTuple):
    """Folded over the tiles of a key head, each [G, …]."""

    largest: Array
    products: Array
    scores: Array
    beyond: Array  # [G, bins + 1] pairs whose phase is beyond each edge
    pairs: Array


def _head(walk: HeadWalk) -> Products:
    """[G, …] of each: one key head's query heads."""
    groups, head = walk.groups, walk.head
    one = jnp.ones((), walk.numerics.product)
    scale = jnp.abs(head.scale).astype(jnp.float32)
    cosines = np.cos(np.deg2rad(PHASES)).astype(np.float32)

    def query_tile(i: Array, counts: _Counts) -> _Counts:
        start = walk.query_start(i)
        raw, fresh = walk.rows(head.query, start), walk.fresh(start, i)
        raw = tile.zero_unusable(raw, jnp.all(jnp.isfinite(raw), axis=1, keepdims=True))
        lengths = _norms(raw)

        def step(j: Index, seen: Array | None, counts: _Counts) -> _Counts:
            k, _, usable = walk.raw_keys(j)
            k = tile.zero_unusable(k, usable)
            product = tile.plain_scores(raw, k, one, walk.numerics).astype(jnp.float32)
            shown = jnp.broadcast_to(fresh if seen is None else fresh & seen, product.shape)
            cosine = product / jnp.maximum(lengths * _norms(k).T, jnp.finfo(jnp.float32).tiny)
            size = jnp.where(shown, jnp.abs(product), 0)
            cosine = jnp.where(shown, cosine, jnp.inf)

            def share(x: Array) -> Array:
                return jnp.sum(x.reshape(groups, -1), axis=1, dtype=jnp.float32)

            return _Counts(
                largest=jnp.maximum(counts.largest, jnp.max(size.reshape(groups, -1), axis=1)),
                products=counts.products + share(size >= EDGE),
                scores=counts.scores + share(size * scale >= EDGE),
                beyond=counts.beyond + jnp.stack([share(cosine <= c) for c in cosines], axis=1),
                pairs=counts.pairs + share(shown),
            )

        return walk.over_keys(start, step, counts)

    zero = jnp.zeros(groups, jnp.float32)
    bins = jnp.zeros((groups, len(PHASES)), jnp.float32)
    counts = walk.over_queries(query_tile, _Counts(zero, zero, zero, bins, zero))
    return _summary(walk, counts)


def _summary(walk: HeadWalk, counts: _Counts) -> Products:
    head, groups = walk.head, walk.groups
    pairs = jnp.maximum(counts.pairs, 1)
    # A cosine that rounding took beyond 1 or −1 counts in the outer bins.
    beyond = counts.beyond.at[:, 0].set(counts.pairs).at[:, -1].set(0)
    valid = walk.mask.row_valid()
    in_use = jnp.ones((len(head.query), 1), bool) if valid is None else valid[:, None]
    visible = walk.mask.visible_keys()[:, None]
    lost = [_not_finite(head.query.reshape(len(in_use), -1), in_use)]
    lost += [_not_finite(x, visible) for x in (head.key, head.value)]
    finite = in_use & jnp.all(jnp.isfinite(head.query), axis=(1, 2))[:, None]
    mean, spread = _channels(head.key, walk.facts.usable[:, None])
    return Products(
        max_product=counts.largest,
        product_share=counts.products / pairs,
        score_share=counts.scores / pairs,
        phases=(beyond[:, :-1] - beyond[:, 1:]) / pairs[:, None],
        query_mean=_channels(head.query, finite[:, :, None])[0],
        key_mean=jnp.broadcast_to(mean, (groups, *mean.shape)),
        key_spread=jnp.broadcast_to(spread, (groups, *spread.shape)),
        not_finite=jnp.broadcast_to(jnp.stack(lost), (groups, 3)),
        shifts_if_rounded=jnp.broadcast_to(_shifts_if_rounded(walk), groups),
    )


def _not_finite(x: Array, seen: Array) -> Array:
    """[] the share of NaN and infinity in the rows of x [L, D] that are ``seen`` [L, 1]."""
    lost = jnp.sum(seen & ~jnp.isfinite(x), dtype=jnp.float32)
    return lost / jnp.maximum(jnp.sum(seen, dtype=jnp.float32) * x.shape[1], 1)


def _norms(x: Array) -> Array:
    return jnp.linalg.norm(x.astype(jnp.float32), axis=1, keepdims=True)


def _channels(x: Array, usable: Array) -> tuple[Array, Array]:
    """Mean and standard deviation of each channel of the usable rows of x [L, …]."""
    x = jnp.where(usable, x, jnp.zeros_like(x)).astype(jnp.float32)
    count = jnp.maximum(jnp.sum(usable, dtype=jnp.float32), 1)
    mean = jnp.sum(x / count, axis=0)
    square = jnp.where(usable, jnp.square(x - mean), 0)
    return mean, jnp.sqrt(jnp.sum(square / count, axis=0))


def _shifts_if_rounded(walk: HeadWalk) -> Array:
    """[] bool: with rounded products, whether `auto` shifts this head."""
    plan = replace(walk.plan, schedule=replace(walk.plan.schedule, target=ROUNDED))
    head = walk.head
    facts = prepare(head.query, head.key, head.value, head.scale, walk.mask, plan, walk.block_q)
    chosen = facts.chosen
    assert chosen is not None
    return chosen
