"""Sinks and a window."""

import numpy as np
import pytest

from pasa_jax import dot_product_attention
from pasa_jax.sparse import sink_window
from tests.pasa_jax.sparse.draws import arrays, attention, blocks, causal, kept, relative
from tests.thin import some_tuples


def seen(t, s, sinks, window):
    at, key = np.arange(t)[:, None] + s - t, np.arange(s)[None]
    return causal(t, s) & ((key < sinks) | (at - key < window))


@pytest.mark.parametrize(
    ("t", "s", "sinks", "window", "size"),
    some_tuples(
        [
            (61, 61, 17, 15, 16),
            (64, 64, 4, 16, 16),
            (20, 61, 0, 1, 16),
            (33, 70, 8, 40, 8),
            (1, 61, 1, 9, 8),
            (50, 50, 50, 1, 16),
        ]
    ),
)
def test_blocks_are_those_that_the_pairs_say(t, s, sinks, window, size):
    exact = seen(t, s, sinks, window)
    mask = sink_window(t, s, sinks, window, size)
    assert np.array_equal(kept(mask)[0, 0], blocks(exact, size))
    whole = np.asarray(mask.kinds)[0, 0] == 2
    assert not (whole & blocks(causal(t, s) & ~exact, size)).any()


@pytest.mark.full
def test_attention_sees_sinks_and_window_to_the_key():
    q, k, v = arrays(t=37, s=61)
    out = dot_product_attention(
        q,
        k,
        v,
        is_causal=True,
        causal_alignment="bottom_right",
        block_mask=sink_window(37, 61, sinks=3, window=11, block_size=16),
    )
    assert relative(out, attention(q, k, v, seen(37, 61, 3, 11))) < 1e-6


def test_equal_masks_compile_once():
    first, second = (sink_window(64, 64, 4, 16, 16).mask_mod for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)
