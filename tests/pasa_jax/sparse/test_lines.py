"""Columns and diagonals of the last queries."""

import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax.sparse import line_scores, vertical_slash, vertical_slash_of
from tests.pasa_jax.sparse.draws import arrays, blocks, causal, kept, weights
from tests.thin import some_tuples


def lines(p, queries):
    """Sums by column and by distance of the last queries' weights p [T, S]."""
    t, s = p.shape
    columns, diagonals = np.zeros(s), np.zeros(s)
    for i in range(max(0, t - queries), t):
        for key in range(i + s - t + 1):
            columns[key] += p[i, key]
            diagonals[i + s - t - key] += p[i, key]
    return columns, diagonals


@pytest.mark.parametrize(("t", "s", "queries"), some_tuples([(7, 33, 64), (40, 40, 8)], 2))
def test_scores_are_sums_of_the_last_weights(t, s, queries):
    q, k, _ = arrays(t, s, n=4, k=2, b=2)
    columns, diagonals = line_scores(q, k, queries=queries)
    for b in range(2):
        for h in range(4):
            exact = lines(weights(q[b, :, h], k[b, :, h // 2]), queries)
            assert np.allclose(columns[b, h], exact[0], atol=1e-5)
            assert np.allclose(diagonals[b, h], exact[1], atol=1e-5)


def test_the_mask_holds_the_largest_lines():
    t, s, size = 45, 59, 8
    rng = np.random.default_rng(0)
    columns, diagonals = (jnp.asarray(rng.random((1, 1, s)), jnp.float32) for _ in range(2))
    mask = vertical_slash_of(
        columns, diagonals, t, vertical=3, slash=4, sinks=1, local=2, block_size=size
    )
    key, distance = np.zeros(s, bool), np.zeros(s, bool)
    key[0] = distance[:2] = True  # forced, and counted
    key[1 + np.argsort(-np.asarray(columns)[0, 0, 1:])[:2]] = True
    distance[2 + np.argsort(-np.asarray(diagonals)[0, 0, 2:])[:2]] = True
    before = np.arange(t)[:, None] + s - t - np.arange(s)[None]
    exact = causal(t, s) & (key[None] | distance[np.maximum(before, 0)])
    forced = kept(
        vertical_slash_of(
            columns, diagonals, t, vertical=0, slash=0, sinks=0, local=0, block_size=size
        )
    )
    assert np.array_equal(
        kept(mask)[0, 0], blocks(exact, size) | (forced[0, 0] & blocks(causal(t, s), size))
    )
    assert kept(mask).sum() < blocks(causal(t, s), size).sum()


def test_a_key_that_the_last_queries_ask_for_is_found():
    rng = np.random.default_rng(1)
    q, k, _ = arrays(256, 256, n=1, d=16, size=1.0)
    at = int(rng.integers(64, 128))
    k = k.at[0, at, 0].set(0).at[0, at, 0, 0].set(40.0)
    q = q.at[0, 192:, 0, 0].set(4.0)
    options = {"vertical": 4, "slash": 8, "sinks": 2, "local": 4, "block_size": 16}
    found = kept(vertical_slash(q, k, **options))[0, 0]
    assert found[12:, at // 16].all()
    # The same key asked for by earlier queries alone is not.
    q = q.at[0, 192:, 0, 0].set(0.0).at[0, 128:160, 0, 0].set(4.0)
    assert not kept(vertical_slash(q, k, **options))[0, 0, -1, at // 16]


@pytest.mark.full
def test_repeated_text_is_a_diagonal():
    rng = np.random.default_rng(2)
    words = rng.standard_normal((64, 32))
    words *= 12 / np.linalg.norm(words, axis=1, keepdims=True)
    text = np.concatenate([words, words, words])[None, :, None]
    q, k = jnp.asarray(text, jnp.float32), jnp.asarray(np.roll(text, 1, axis=1), jnp.float32)
    mask = vertical_slash(q, k, vertical=2, slash=3, sinks=2, local=1, block_size=16, queries=32)
    found = kept(mask)[0, 0]
    for row in range(4, 12):  # 63 places back
        assert found[row, row - 4]
        assert found[row, row - 3]
    assert not found[7, 1:3].any()
    assert not found[7, 5:7].any()


@pytest.mark.full
def test_batch_entries_are_chosen_alone():
    q, k, _ = arrays(48, 48, b=2)
    options = {"vertical": 3, "slash": 3, "sinks": 1, "local": 1, "block_size": 8, "queries": 4}
    both = kept(vertical_slash(q, k, **options))
    for b in range(2):
        alone = kept(vertical_slash(q[b : b + 1], k[b : b + 1], **options))
        assert np.array_equal(both[b], alone[0])
