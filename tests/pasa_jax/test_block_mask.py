"""`BlockMask`: its lists against the dense mask, however it is made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax import BlockMask, and_masks, create_block_mask, dot_product_attention
from pasa_jax.core import block_mask as module
from tests import gallery
from tests.cases import TILES
from tests.gallery import GALLERY, QUICKLY

T, S, SIZE = 70, 50, (16, 12)
IDS = np.repeat([[0, 1, 2], [3, 0, 2]], [20, 9, 41], axis=1).astype(np.int32)
DATA = {"q_data": {"document": IDS}, "kv_data": {"document": IDS[:, :S]}}


def kinds_of(seen: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[…, rows, columns] 0, 1 or 2 of a dense mask […, T, S], one block at a time."""
    (rows, columns), (t, s) = size, seen.shape[-2:]
    kinds = np.zeros((*seen.shape[:2], -(-t // rows), -(-s // columns)), np.int8)
    for index in np.ndindex(*kinds.shape):
        b, h, i, j = index
        block = seen[b, h, i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        kinds[index] = 2 if block.all() else int(block.any())
    return kinds


def of_documents() -> np.ndarray:
    return IDS[:, None, :, None] == IDS[:, None, None, :S]


def of_head(b, h, q, kv):
    return kv <= q + 8 * h - 4 * b


def made(mask_mod=gallery.document_mod, heads=None, **data) -> BlockMask:
    return create_block_mask(mask_mod, 2, heads, T, S, SIZE, **data)


def test_kinds_of_documents():
    mask = made(**DATA)
    true = kinds_of(of_documents(), SIZE)
    np.testing.assert_array_equal(mask.kinds, true)
    assert set(np.unique(true)) == {0, 1, 2}
    assert mask.shape == (2, 1, T, S)
    np.testing.assert_array_equal(mask.to_dense(), true != 0)
    assert mask.sparsity() == pytest.approx(100 * np.mean(true == 0))


def test_kinds_of_heads_and_batch_entries():
    i, j = np.arange(T)[:, None], np.arange(S)
    b, h = np.ogrid[:2, :3]
    seen = j <= i + (8 * h - 4 * b)[..., None, None]
    np.testing.assert_array_equal(made(of_head, 3).kinds, kinds_of(seen, SIZE))


def test_under_jit_with_data_that_are_traced():
    found = jax.jit(lambda data: made(**data))(DATA)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), found, made(**DATA))


def test_without_data_the_mask_is_constant_under_jit():
    def sparsity():
        both = and_masks(gallery.causal_mod, gallery.causal_mod)  # which begins with a constant
        return jnp.float32(create_block_mask(both, None, None, T, T, 7).sparsity())

    assert float(jax.jit(sparsity)()) == 45.0  # of ten rows of ten blocks


def test_in_pieces(monkeypatch):
    """A function is asked for as few blocks at a time as memory asks for."""
    whole = made(**DATA).kinds
    for blocks in (1, 2):  # five columns: the last piece of two is padding by half
        monkeypatch.setattr(module, "_LARGEST", blocks * SIZE[0] * SIZE[1])
        np.testing.assert_array_equal(made(**DATA).kinds, whole)


def test_lists_hold_each_block_once_in_ascending_order():
    mask = made(**DATA)
    kinds = np.asarray(mask.kinds)
    pairs = (
        (mask.kv_num_blocks, mask.kv_indices, 1),
        (mask.full_kv_num_blocks, mask.full_kv_indices, 2),
    )
    for number, index, kind in pairs:
        for b, h, i in np.ndindex(*kinds.shape[:3]):
            own = np.asarray(index)[b, h, i, : int(number[b, h, i])]
            np.testing.assert_array_equal(own, np.flatnonzero(kinds[b, h, i] == kind))
    of_queries = mask.q_lists
    for number, index, kind in ((*of_queries[:2], 1), (*of_queries[2:], 2)):
        for b, h, j in np.ndindex(*np.shape(number)):
            own = np.asarray(index)[b, h, j, : int(number[b, h, j])]
            np.testing.assert_array_equal(own, np.flatnonzero(kinds[b, h, :, j] == kind))


def test_lists_there_and_back():
    mask = made(**DATA)
    lists = (mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices)
    # What follows the number of a row has no meaning.
    columns = np.arange(mask.kv_indices.shape[3])
    fouled = jnp.where(columns < mask.kv_num_blocks[..., None], mask.kv_indices, 0)
    again = BlockMask.from_kv_blocks(
        lists[0], fouled, *lists[2:], lengths=(T, S), block_size=SIZE, mask_mod=mask.mask_mod
    )
    np.testing.assert_array_equal(again.kinds, mask.kinds)
    assert (again.lengths, again.block_size) == (mask.lengths, mask.block_size)
    kinds = BlockMask.from_kinds(mask.kinds, (T, S), SIZE)
    for x, y in zip(lists, jax.tree.leaves(kinds), strict=True):
        np.testing.assert_array_equal(x, y)


def test_lists_without_whole_blocks_and_lengths():
    mask = BlockMask.from_kv_blocks([[[1, 2]]], [[[[0, 1], [1, 0]]]], block_size=4)
    assert mask.lengths == (8, 8)
    assert mask.kinds[0, 0].tolist() == [[1, 0], [1, 1]]
    assert BlockMask.from_kinds([[[[True, False]]]], (4, 8), 4).kinds.tolist() == [[[[1, 0]]]]


@pytest.mark.parametrize("implementation", ["lax", "reference"])
def test_partial_blocks_without_a_function_are_seen(implementation):
    """Lists by hand, of blocks that are no tiles."""
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 3, (2, 4, 5, 5))
    mask = BlockMask.from_kinds(kinds, (T, S), SIZE)
    seen = np.repeat(np.repeat(kinds != 0, SIZE[0], 2)[:, :, :T], SIZE[1], 3)[..., :S]
    example = gallery.Example(t=T, s=S, keywords={"block_mask": mask}, seen=seen)
    bounds = gallery.BOUNDS["float32"]
    options = {"implementation": implementation, "schedule": TILES}
    gallery.check(example, "float32", bounds[0], None, **options)


def test_whole_blocks_ask_no_function():
    """A function that hides all: partial blocks are hidden, whole ones are not."""
    kinds = np.asarray([[[[1, 2], [2, 1]]]])
    mask = BlockMask.from_kinds(kinds, (8, 8), 4, lambda b, h, q, kv: q < 0)
    x = jnp.arange(64.0).reshape(1, 8, 1, 8) / 64
    seen = jnp.asarray(np.repeat(np.repeat(kinds == 2, 4, 2), 4, 3))
    out = jax.jit(
        lambda x: dot_product_attention(x, x, x, block_mask=mask), compiler_options=QUICKLY
    )(x)
    true = dot_product_attention(x, x, x, mask=seen, implementation="reference")
    np.testing.assert_allclose(out, true, atol=1e-6)


def triangle(n: int) -> BlockMask:
    kinds = 2 * np.tri(n, dtype=np.int8)
    return BlockMask.from_kinds(kinds[None, None], (n, n), 1)


def test_pictures():
    mask = create_block_mask(gallery.causal_mod, None, None, 6, 6, 2)
    assert mask.picture() == "▒░░\n█▒░\n██▒"
    assert repr(mask).startswith("BlockMask(1 × 1 heads, 6 × 6 in blocks of 2 × 2, 33.33 % hidden)")
    large = triangle(66).picture().split("\n")
    assert {len(row) for row in large} == {len(large)} == {22}  # three blocks to a mark
    assert large[1] == "█▒" + 20 * "░"
    ragged = triangle(35).picture().split("\n")
    assert (len(ragged), ragged[-1]) == (18, 18 * "█")


def test_a_tracer_has_no_picture():
    texts = []

    def of(data):
        texts.append(repr(made(**data)))
        return jnp.zeros(())

    jax.jit(of)(DATA)
    assert texts == ["BlockMask(2 × 1 heads, 70 × 50 in blocks of 16 × 12)"]


def test_a_mask_travels_through_transformations():
    """Under vmap over the mask itself, as a leaf of the call."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, 8, 1, 8)), jnp.float32)
    kinds = jnp.asarray(rng.integers(0, 2, (3, 1, 1, 2, 2)).astype(np.int8))
    kinds = kinds.at[:, :, :, :, 0].set(1)

    def attend(kinds):
        return dot_product_attention(
            x, x, x, block_mask=BlockMask.from_kinds(kinds, (8, 8), 4), implementation="reference"
        )

    together = jax.jit(jax.vmap(attend))(kinds)
    for i in range(3):
        np.testing.assert_allclose(together[i], attend(kinds[i]), atol=1e-6)


def test_kinds_of_pixels():
    example = GALLERY["neighbourhood"]()
    mask = create_block_mask(gallery.neighbour_mod, None, None, example.t, example.s, 10)
    np.testing.assert_array_equal(mask.kinds, kinds_of(example.seen[None, None], (10, 10)))


LISTS = (np.zeros((1, 1, 2), np.int32), np.zeros((1, 1, 2, 2), np.int32))
WRONG = {
    "lengths": (
        lambda: create_block_mask(gallery.causal_mod, None, None, 0, 5),
        "`T` must be a positive number; got 0.",
    ),
    "heads": (
        lambda: create_block_mask(gallery.causal_mod, None, 2.5, 5, 5),
        "`N` must be a positive number; got 2.5.",
    ),
    "block size": (
        lambda: create_block_mask(gallery.causal_mod, None, None, 5, 5, (2, 0)),
        "`block_size` must be a positive number or a pair of them; got (2, 0).",
    ),
    "kinds": (
        lambda: BlockMask.from_kinds(np.zeros((1, 1, 2, 3)), (8, 8), 4),
        "`kinds` must be [B|1, N|1, 2, 2]; got (1, 1, 2, 3).",
    ),
    "lists": (
        lambda: BlockMask.from_kv_blocks(LISTS[0][0], LISTS[1]),
        "`kv_indices` must be [B|1, N|1, rows, columns], and kv_num_blocks without its last axis; "
        "got (1, 1, 2, 2) beside (1, 2).",
    ),
    "half of the whole blocks": (
        lambda: BlockMask.from_kv_blocks(*LISTS, LISTS[0]),
        "`full_kv_indices` must be given with full_kv_num_blocks; got one of the two.",
    ),
    "lists of whole blocks": (
        lambda: BlockMask.from_kv_blocks(*LISTS, LISTS[0], LISTS[1][..., :1]),
        "`full_kv_indices` must be [1, 1, 2, 2]; got (1, 1, 2, 1).",
    ),
    "lengths of lists": (
        lambda: BlockMask.from_kv_blocks(*LISTS, lengths=(100, 200)),
        "`lengths` must be of 2 and 2 blocks of (128, 128); got (100, 200).",
    ),
    "a function of floats": (
        lambda: create_block_mask(lambda b, h, q, kv: q * 1.0, None, None, 5, 5),
        "`mask_mod` must be a function mask_mod(b, h, q, kv) -> bool; "
        "got a result of type float32.",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_masks(name):
    make, message = WRONG[name]
    if name == "a function of floats":
        with jax.numpy_dtype_promotion("standard"), pytest.raises(ValueError) as found:  # noqa: PT011
            make()
    else:
        with pytest.raises(ValueError) as found:  # noqa: PT011 - the message is compared below
            make()
    assert str(found.value) == message
