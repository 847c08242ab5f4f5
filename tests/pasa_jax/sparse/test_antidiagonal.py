"""XAttention, and the defects of its published code."""

import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax.sparse import xattention
from tests.pasa_jax.sparse.draws import arrays, blocks, causal, kept
from tests.thin import some, some_tuples

SIZE, STRIDE = 16, 4


def exact(q, k, threshold):
    """The blocks of one head by the definition, group by group; no padding and no chunks."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    t, s = len(q) // STRIDE, len(k) // STRIDE
    scores = np.full((t, s), -np.inf)
    for i in range(t):
        for j in range(i + s - t + 1):
            pairs = [(i * STRIDE + STRIDE - 1 - r, j * STRIDE + r) for r in range(STRIDE)]
            scores[i, j] = sum(q[a] @ k[b] for a, b in pairs)
    scores /= STRIDE * np.sqrt(q.shape[1])
    p = np.exp(scores - scores.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    group = SIZE // STRIDE
    mass = p.reshape(t // group, group, s // group, group).sum(axis=(1, 3))
    found = np.zeros(mass.shape, bool)
    for row in range(len(mass)):
        diagonal = row + len(mass[0]) - len(mass)
        found[row, [0, diagonal]] = True
        others = np.argsort(-np.where(found[row], -1, mass[row]))
        for column in others:
            if mass[row, found[row]].sum() < threshold * mass[row].sum():
                found[row, column] = True
    return found


@pytest.mark.parametrize(("t", "s"), some_tuples([(48, 128), (96, 96)], 2))
def test_blocks_are_those_of_the_definition(t, s):
    q, k, _ = arrays(t, s, n=4, k=2, b=2, size=2.5)
    for threshold in (0.6, 0.9):
        mask = xattention(q, k, stride=STRIDE, threshold=threshold, block_size=SIZE)
        for b in range(2):
            for h in range(4):
                wanted = exact(q[b, :, h], k[b, :, h // 2], threshold)
                assert np.array_equal(kept(mask)[b, h], wanted)


@pytest.mark.full
def test_sums_that_float16_cannot_hold_are_float32():
    q, k, _ = arrays(64, 64, dtype="float16", size=90.0)
    wide = xattention(*(x.astype(jnp.float32) for x in (q, k)), stride=STRIDE, block_size=SIZE)
    assert np.array_equal(kept(xattention(q, k, stride=STRIDE, block_size=SIZE)), kept(wide))


@pytest.mark.parametrize("s", some([96, 91], 2))
@pytest.mark.parametrize("chunk", some([48, 32], 2))
def test_a_chunk_has_the_rows_of_the_whole(s, chunk):
    """The published code masks all earlier chunks where nothing is padded: it slices up to −0."""
    q, k, _ = arrays(s, s, n=1, size=3.0)
    options = {"stride": STRIDE, "threshold": 0.7, "block_size": SIZE}
    whole = kept(xattention(q, k, **options))
    start = 96 - chunk
    last = kept(xattention(q[:, start:], k, **options))
    assert np.array_equal(last, whole[:, :, -last.shape[2] :])
    before = kept(xattention(q[:, :start], k[:, :start], **options))
    rows, columns = before.shape[2:]
    assert np.array_equal(before, whole[:, :, :rows, :columns])


@pytest.mark.full
@pytest.mark.parametrize("length", [33, 47, 49, 5, 1])
def test_padding_is_not_counted(length):
    """Odd lengths choose the blocks that a longer text, whose rest they do not see, has."""
    q, k, _ = arrays(64, 64, n=1, size=3.0)
    options = {"stride": 1, "threshold": 0.7, "block_size": SIZE}
    short = kept(xattention(q[:, :length], k[:, :length], **options))[0, 0]
    whole = kept(xattention(q, k, **options))[0, 0]
    full = length // SIZE
    assert np.array_equal(short[:full], whole[:full, : short.shape[1]])
    assert short[:, 0].all()
    assert short[np.arange(len(short)), np.arange(len(short))].all()
    # The last row by itself: the same queries as a chunk.
    rest = length - full * SIZE
    if rest:
        alone = xattention(q[:, length - rest : length], k[:, :length], **options)
        assert np.array_equal(short[full:], kept(alone)[0, 0])


@pytest.mark.full
def test_each_batch_entry_has_blocks_of_its_own():
    """The published code is written for a batch of one."""
    q, k, _ = arrays(96, 96, b=3, size=3.0)
    options = {"stride": STRIDE, "threshold": 0.7, "block_size": SIZE}
    together = kept(xattention(q, k, **options))
    alone = [kept(xattention(q[b : b + 1], k[b : b + 1], **options))[0] for b in range(3)]
    assert np.array_equal(together, np.stack(alone))
    assert not np.array_equal(together[0], together[1])


def test_sinks_are_a_column_and_not_a_row():
    """The published ``keep_sink`` shows all of query row 0 and not key column 0."""
    q, k, _ = arrays(64, 160, n=1, size=4.0)
    k = k.at[:, :SIZE].set(-q[:, :1].mean(axis=2, keepdims=True) * 50)  # block 0 gets no weight
    found = kept(xattention(q, k, stride=STRIDE, threshold=0.5, block_size=SIZE))[0, 0]
    assert found[:, 0].all()
    assert not found[0].all()


@pytest.mark.full
def test_the_threshold_1_keeps_what_has_weight_and_a_tiny_one_what_is_forced():
    q, k, _ = arrays(80, 80, n=1, size=0.5)
    all_of_it = xattention(q, k, stride=STRIDE, threshold=1.0, block_size=SIZE)
    assert np.array_equal(kept(all_of_it)[0, 0], blocks(causal(80, 80), SIZE))
    forced = kept(xattention(q, k, stride=STRIDE, threshold=1e-9, block_size=SIZE))[0, 0]
    wanted = np.eye(5, dtype=bool)
    wanted[:, 0] = True
    assert np.array_equal(forced, wanted)
