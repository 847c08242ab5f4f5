"""Which tiles are visited (`core.visits`), against every pair of places."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax.core.mask import Mask
from pasa_jax.core.visits import TileSight, Visits, tile_sight

T, S, BLOCK_Q, BLOCK_KV, BLOCKS = 37, 45, 8, 16, (6, 10)
DRAWS = 150
FIELDS = {
    "positions": ("query_positions", "key_positions"),
    "segments": ("query_segments", "key_segments"),
    "lengths": ("query_lengths", "key_lengths"),
    "kinds": ("kinds",),
}
# What is given, and the static part of the mask.
GIVEN = {
    "places": (("lengths",), {"is_causal": True, "window": (9, 0)}),
    "bottom right": (("lengths",), {"is_causal": True, "causal_alignment": "bottom_right"}),
    "positions": (("positions",), {"is_causal": True}),
    "positions, window": (("positions", "lengths"), {"window": (25, 20)}),
    "segments": (("segments",), {}),
    "segments, causal": (("segments", "lengths"), {"is_causal": True}),
    "kinds": (("kinds",), {}),
    "all": (("positions", "segments", "lengths", "kinds"), {"is_causal": True, "window": (30, 0)}),
}


def draw(rng: np.random.Generator, ordered: bool) -> dict[str, np.ndarray]:
    """Fields of one head's mask; ``ordered``: positions and segments ascend, and
    most blocks are whole."""

    def numbers(most: int, n: int) -> np.ndarray:
        x = rng.integers(0, most, n).astype(np.int32)
        return np.sort(x) if ordered else x

    segments = int(rng.integers(1, 5))
    shares = [[0.6, 0.2, 0.2], [0.05, 0.05, 0.9]][int(ordered)]
    rows, columns = -(-T // BLOCKS[0]), -(-S // BLOCKS[1])
    return {
        "query_positions": numbers(50, T),
        "key_positions": numbers(50, S),
        "query_segments": numbers(segments, T),
        "key_segments": numbers(segments, S),
        "query_lengths": rng.integers(0, T + 1, dtype=np.int32),
        "key_lengths": rng.integers(0, S + 1, dtype=np.int32),
        "kinds": rng.choice(3, (2, rows, columns), p=shares).astype(np.int8),
    }


def seen_by(fields: dict[str, np.ndarray], static: dict) -> tuple[np.ndarray, np.ndarray]:
    """[G, T, S] bool of each pair of places: surely hidden or not; surely seen or not."""
    i, j = np.arange(T)[:, None], np.arange(S)[None]
    q_length, k_length = fields.get("query_lengths", T), fields.get("key_lengths", S)
    some = (i < q_length) & (j < k_length)
    if "query_positions" in fields:
        at, keys = fields["query_positions"][:, None], fields["key_positions"][None]
    else:
        shifted = static.get("causal_alignment") == "bottom_right"
        at, keys = i + (k_length - q_length if shifted else 0), j
    left, right = static.get("window", (10**6, 10**6))
    some = some & (keys >= at - left) & (keys <= at + (0 if static.get("is_causal") else right))
    if "query_segments" in fields:
        some = some & (fields["query_segments"][:, None] == fields["key_segments"])
    whole = some
    if "kinds" in fields:
        kinds = np.repeat(fields["kinds"], BLOCKS[0], 1)[:, :T]
        kinds = np.repeat(kinds, BLOCKS[1], 2)[..., :S]
        some, whole = some & (kinds != 0), some & (kinds == 2)
    return some, whole


def of_tiles(fields: dict[str, np.ndarray], static: dict) -> TileSight:
    """The exact answer for each tile, from every pair of places in it."""
    some, whole = (np.broadcast_to(x, (2, T, S)) for x in seen_by(fields, static))
    used = np.broadcast_to(np.arange(T) < fields.get("query_lengths", T), (T,))
    shape = (-(-T // BLOCK_Q), -(-S // BLOCK_KV))
    any_of, all_of = np.zeros(shape, bool), np.zeros(shape, bool)
    for i, j in np.ndindex(*shape):
        first = min(i * BLOCK_Q, T - BLOCK_Q)
        at = (slice(None), slice(first, first + BLOCK_Q), slice(j * BLOCK_KV, (j + 1) * BLOCK_KV))
        any_of[i, j] = some[at].any()
        fits = (j + 1) * BLOCK_KV <= S
        all_of[i, j] = fits and whole[at][:, used[at[1]]].all()
    return TileSight(any_of, all_of)


def found(given: tuple[str, ...], static: dict, many: list[dict]) -> tuple[TileSight, Visits]:
    """`tile_sight` and the lists of many masks at once."""
    names = [x for part in given for x in FIELDS[part]]

    def one(fields):
        mask = Mask(query_length=T, key_length=S, block_size=BLOCKS, **static, **fields)
        sight = tile_sight(mask, BLOCK_Q, BLOCK_KV, overlap=True)
        return sight, Visits.of(sight)

    stacked = {name: jnp.stack([jnp.asarray(x[name]) for x in many]) for name in names}
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(stacked))


@pytest.mark.parametrize("name", GIVEN)
def test_no_pair_that_is_seen_is_missed_and_whole_tiles_are_whole(name):
    given, static = GIVEN[name]
    rng = np.random.default_rng(7)
    many = [draw(rng, ordered=bool(n % 2)) for n in range(DRAWS)]
    sight, _ = found(given, static, many)
    names = [x for part in given for x in FIELDS[part]]
    exact = [of_tiles({x: one[x] for x in names}, static) for one in many]
    some, whole = (np.stack(x) for x in zip(*exact, strict=True))
    assert not np.any(some & ~sight.some)
    assert not np.any(sight.some & sight.whole & ~whole)
    assert sight.some.mean() < 1  # and it is of use
    assert np.any(sight.some & sight.whole) or name in ("places", "all")


def test_sight_is_exact_where_positions_and_segments_ascend():
    """As in packed sequences, caches and rings."""
    rng = np.random.default_rng(8)
    many = [draw(rng, ordered=True) for _ in range(DRAWS)]
    for name in ("positions", "segments"):
        given, static = GIVEN[name]
        names = [x for part in given for x in FIELDS[part]]
        sight, _ = found(given, static, many)
        exact = [of_tiles({x: one[x] for x in names}, static) for one in many]
        some, whole = (np.stack(x) for x in zip(*exact, strict=True))
        if name == "positions":
            np.testing.assert_array_equal(sight.some, some)
        else:  # a segment that only queries have lies between two that keys have
            assert np.mean(sight.some != some) < 0.02
        np.testing.assert_array_equal(sight.some & sight.whole, whole)


@pytest.mark.parametrize("name", ["all", "segments"])
def test_each_tile_that_is_seen_is_visited_once(name):
    given, static = GIVEN[name]
    rng = np.random.default_rng(9)
    sight, lists = found(given, static, [draw(rng, ordered=True) for _ in range(DRAWS)])
    for n, i in np.ndindex(*lists.count.shape):
        order = lists.order[n, i]
        partial, count = lists.partial[n, i], lists.count[n, i]
        some, whole = sight.some[n, i], sight.whole[n, i]
        np.testing.assert_array_equal(order[:partial], np.flatnonzero(some & ~whole))
        np.testing.assert_array_equal(order[partial:count], np.flatnonzero(some & whole))
        last = order[count - 1] if count else 0
        np.testing.assert_array_equal(order[count:], last)  # nothing new is fetched after them


def test_a_function_or_an_array_leaves_no_tile_whole():
    array = jnp.ones((1, T, S), bool)
    mask = Mask(query_length=T, key_length=S, array=array)
    sight = tile_sight(mask, BLOCK_Q, BLOCK_KV)
    assert bool(sight.some.all())
    assert not bool(sight.whole.any())
