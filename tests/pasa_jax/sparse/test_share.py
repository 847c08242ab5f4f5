"""Heads that share blocks, and the defects of the published code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax.sparse import share_prefill
from pasa_jax.sparse._share import js_distance
from tests.pasa_jax.sparse.draws import arrays, blocks, causal, kept, weights

SIZE = 16
OPTIONS = {"block_size": SIZE, "fallback": 1.0}


def alike(t=96, s=96, heads=4, groups=2):
    """Heads whose queries differ by a little noise, over one key head that several read."""
    q, k, _ = arrays(t, s, n=1, k=1, d=16, size=2.5)
    noise = arrays(t, s, n=heads, k=1, d=16, size=0.05, seed=1)[0]
    return q + noise, jnp.repeat(k, heads // groups, axis=2)


def covered(p, threshold):
    """The blocks of each row that hold this share of the weights p [T, S]."""
    t, s = p.shape
    p = np.pad(p, ((0, -t % SIZE), (0, -s % SIZE)))
    mass = p.reshape(-(-t // SIZE), SIZE, -(-s // SIZE), SIZE).sum(axis=(1, 3))
    found = np.zeros(mass.shape, bool)
    for row in range(len(mass)):
        found[row, 0] = found[row, row] = True
        for column in np.argsort(-np.where(found[row], -1, mass[row])):
            if mass[row, found[row]].sum() < threshold * mass[row].sum():
                found[row, column] = True
    return found


@pytest.mark.full
@pytest.mark.parametrize("length", [96, 91])
def test_heads_that_are_alike_take_the_pivots_blocks(length):
    q, k = alike(length, length)
    found = kept(share_prefill(q, k, [[1, 3, 0]], **OPTIONS))[0]
    assert np.array_equal(found[1], blocks(causal(length, length), SIZE))  # the pivot is dense
    wanted = covered(weights(q[0, :, 1], k[0, :, 0]), 0.9)
    assert wanted.sum() < found[1].sum()
    for head in (0, 3):
        assert np.array_equal(found[head], wanted)


def test_a_head_in_no_cluster_has_its_own_blocks():
    """The published code fails with a KeyError for such a head."""
    q, k = alike()
    alone = kept(share_prefill(q, k, [], **OPTIONS))[0]
    some = kept(share_prefill(q, k, [[1, 3]], **OPTIONS))[0]
    single = kept(share_prefill(q, k, [[1, 3], [2]], **OPTIONS))[0]
    assert np.array_equal(some[[0, 2]], alone[[0, 2]])
    assert np.array_equal(single, some)
    diagonal = np.arange(alone.shape[-1])
    assert alone[:, :, 0].all()
    assert alone[:, diagonal, diagonal].all()


def test_weights_of_zero_do_not_hinder_sharing():
    """The published distance is NaN where a block has weight 0, and no head ever shares."""
    q, k = alike()
    q, k = 40 * q, (40 * k).at[:, 32:48].set(0)  # all of a row's weight is on one key
    found = kept(share_prefill(q, k, [[0, 1]], **OPTIONS))[0]
    wanted = covered(weights(q[0, :, 0], k[0, :, 0]), 0.9)
    last = weights(q[0, -SIZE:, 0], k[0, :, 0])
    assert not last[:, 32:48].astype(np.float32).any()
    assert np.array_equal(found[1], wanted)


def test_the_distance_of_distributions_with_zeros():
    p = jnp.asarray([[0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]], jnp.float32)
    other = jnp.asarray([[0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 0.0, 0.0]], jnp.float32)
    second = np.sqrt((np.log(1 / 0.75) + 0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(2)) / 2)
    assert np.allclose(js_distance(p, other), [np.sqrt(np.log(2)), second], atol=1e-6)
    assert np.array_equal(js_distance(p, p), [0, 0])


@pytest.mark.full
def test_heads_that_are_not_alike_do_not_share():
    q, k = alike()
    other = arrays(96, 96, n=1, k=1, d=16, size=6.0, seed=7)[0]
    q = q.at[:, :, 2:3].set(other)
    alone = kept(share_prefill(q, k, [], **OPTIONS))[0]
    found = kept(share_prefill(q, k, [[0, 2]], similarity=0.2, **OPTIONS))[0]
    assert np.array_equal(found[2], alone[2])


@pytest.mark.full
def test_columns_and_diagonals_that_hold_the_pivots_weight_are_used_instead():
    q, k = alike()
    options = {"block_size": SIZE, "fallback": 1e-6}
    alone = kept(share_prefill(q, k, [], **options))[0]
    assert np.array_equal(kept(share_prefill(q, k, [[0, 1]], **options))[0, 1], alone[1])


@pytest.mark.full
def test_batch_entries_share_alone():
    q, k = alike()
    other, _, _ = arrays(96, 96, n=4, k=2, d=16, size=6.0, seed=3)
    q, k = jnp.concatenate([q, other]), jnp.concatenate([k, k])
    choose = jax.jit(lambda q, k: share_prefill(q, k, [[0, 1], [2, 3]], **OPTIONS))
    both = kept(choose(q, k))
    for b in range(2):
        assert np.array_equal(both[b], kept(choose(q[b : b + 1], k[b : b + 1]))[0])
