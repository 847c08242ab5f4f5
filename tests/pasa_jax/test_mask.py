"""`Mask`: the kind of each tile against the mask itself, element by element."""

import itertools
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax import Mask, Schedule
from tests.cases import visible

SHAPES = [(40, 40), (40, 56), (56, 40), (1, 40), (37, 1)]
KEYWORDS = [
    {},
    {"is_causal": True},
    {"is_causal": True, "causal_alignment": "bottom_right"},
    {"window": (9, 3)},
    {"window": (0, 0)},
    {"window": (20, 0), "is_causal": True, "causal_alignment": "bottom_right"},
]


@pytest.mark.parametrize("keywords", KEYWORDS)
@pytest.mark.parametrize(("t", "s"), SHAPES)
@pytest.mark.parametrize(("block_q", "block_kv"), [(8, 16), (16, 8), (13, 7), (64, 64)])
def test_tile_kinds(t, s, block_q, block_kv, keywords):
    mask = Mask(query_length=t, key_length=s, **keywords)
    schedule = Schedule(block_q=block_q, block_kv=block_kv)
    names = {"window": "local_window_size"}
    call = {names.get(k, k): v for k, v in keywords.items()}
    seen = np.broadcast_to(visible(1, t, s, {}, call)[0, 0], (t, s))
    tiles = itertools.product(range(-(-t // block_q)), range(-(-s // block_kv)))
    for i, j in tiles:
        whole = seen[i * block_q : (i + 1) * block_q, j * block_kv : (j + 1) * block_kv]
        kind = mask.tile(i, j, schedule)
        complete = whole.shape[1] == block_kv
        if kind == "full":
            assert whole.all()
            assert complete
        elif kind == "skip":
            assert not whole.any()
        # No tile is computed, or masked, for nothing.
        if not whole.any() and (t, s) in SHAPES[:3] and block_q <= t:
            assert kind == "skip" or "window" in keywords or i == t // block_q
        if whole.all() and complete:
            assert kind == "full"


@pytest.mark.parametrize("lengths", [None, (25, 30), (40, 17), (0, 9), (12, 0)])
@pytest.mark.parametrize("keywords", KEYWORDS)
@pytest.mark.parametrize(("t", "s"), SHAPES[:3])
@pytest.mark.parametrize(("block_q", "block_kv"), [(8, 16), (16, 8), (13, 7), (64, 64)])
def test_query_tiles_of_keys(t, s, block_q, block_kv, keywords, lengths):
    """Exactly the tiles that show something are visited, and those seen whole are full."""
    mask = Mask(query_length=t, key_length=s, **keywords)
    names = {"window": "local_window_size"}
    call = {names.get(k, k): v for k, v in keywords.items()}
    if lengths is not None:
        queries, keys = min(lengths[0], t), min(lengths[1], s)
        mask = replace(mask, query_lengths=jnp.int32(queries), key_lengths=jnp.int32(keys))
        call["query_seq_lengths"], call["key_value_seq_lengths"] = [queries], [keys]
    seen = np.broadcast_to(visible(1, t, s, {}, call)[0, 0], (t, s))
    for start in range(0, s, block_kv):
        r = mask.query_range(start, start + block_kv, block_q)
        if lengths is None:
            assert all(isinstance(x, int) for x in r)
        lo, full_lo, full_hi, hi = map(int, r)
        assert lo <= full_lo <= full_hi <= hi
        for i in range(-(-t // block_q)):
            shown = seen[i * block_q : (i + 1) * block_q, start : start + block_kv]
            whole = shown.all() and shown.shape == (block_q, block_kv)
            assert shown.any() <= (lo <= i < hi)
            assert (full_lo <= i < full_hi) == whole
            if "window" not in keywords:  # whose band may pass between two tiles' corners
                assert shown.any() == (lo <= i < hi)


def test_lengths_and_segments_leave_no_tile_full_by_place():
    ids = jnp.zeros((64,), jnp.int32)
    mask = Mask(query_length=64, key_length=64, query_segments=ids, key_segments=ids)
    assert mask.tile(0, 0, Schedule(block_q=32, block_kv=32)) == "partial"


def test_padding_rows_see_nothing():
    mask = Mask(query_length=64, key_length=64, query_lengths=jnp.int32(32))
    r = mask.key_range(jnp.int32(32), jnp.int32(64), 32)
    assert int(r.hi) <= int(r.lo)


def test_visible_keys():
    mask = Mask(query_length=3, key_length=8, is_causal=True)
    assert mask.visible_keys().tolist() == [True] * 3 + [False] * 5
    array = jnp.asarray([[[True, False, True]]])
    assert Mask(query_length=1, key_length=3, array=array).visible_keys().tolist() == [
        True,
        False,
        True,
    ]


def test_unknown_alignment():
    with pytest.raises(ValueError, match="`causal_alignment` must be one of 'top_left'"):
        Mask(query_length=1, key_length=1, causal_alignment="left")


def test_query_range_leaves_no_tile_full_by_place_where_segments_hide():
    ids = jnp.zeros((64,), jnp.int32)
    mask = Mask(query_length=64, key_length=64, query_segments=ids, key_segments=ids)
    assert mask.query_range(0, 32, 32) == (0, 0, 0, 2)
