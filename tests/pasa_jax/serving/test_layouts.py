"""The layouts of other libraries: their functions, on what we give them, compute our attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.gpu import paged_attention as jax_gpu
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention as jax_tpu
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ref_ragged_paged_attention

from pasa_jax import dot_product_attention
from pasa_jax.serving import layouts
from pasa_jax.serving.layouts import Pages
from tests.thin import only, some_tuples

P, K, N, PAGE, M = 11, 3, 6, 8, 4
LENGTHS = (9, 0, 32, 16, 7)
COUNTS = (1, 0, 5, 1, 7)


def made(head_dim=16, value_head_dim=None, dtype="float32", lengths=LENGTHS):
    """Pages in an order that is none; what no sequence holds is NaN."""
    rng = np.random.default_rng(0)
    table, free = np.full((len(lengths), M), -1), rng.permutation(P).tolist()
    held = np.zeros((P, 1, PAGE, 1), bool)
    for row, length in zip(table, lengths, strict=True):
        for m in range(-(-length // PAGE)):
            row[m] = free.pop()
            held[row[m], 0, : length - m * PAGE] = True

    def random(size):
        x = np.where(held, rng.standard_normal((P, K, PAGE, size)), np.nan)
        return jnp.asarray(x, dtype)

    key, value = random(head_dim), random(value_head_dim or head_dim)
    return Pages(key, value, jnp.asarray(table, jnp.int32), jnp.asarray(lengths, jnp.int32))


def queries(tokens, head_dim=16, dtype="float32"):
    x = np.random.default_rng(1).standard_normal((tokens, N, head_dim))
    return jnp.asarray(x, dtype)


def gathered(x, table):
    """[B, M·page, K, …] of pages."""
    return jnp.swapaxes(x[table], 2, 3).reshape(len(table), M * PAGE, K, -1)


def ours(pages, query, counts):
    """[tokens, N, E]: each of a sequence's last tokens sees itself and what is before it."""
    counts = np.asarray(counts)
    row, step = np.nonzero(np.arange(counts.max()) < counts[:, None])
    padded = jnp.zeros((len(counts), counts.max(), *query.shape[1:]), query.dtype)
    found = dot_product_attention(
        padded.at[row, step].set(query),
        *(gathered(x, pages.table) for x in (pages.key, pages.value)),
        is_causal=True,
        causal_alignment="bottom_right",
        query_seq_lengths=jnp.asarray(counts),
        key_value_seq_lengths=pages.lengths,
        implementation="reference",
    )
    return found[row, step]


def close(found, expected, bound=2e-6):
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    assert np.abs(found - expected).max() <= bound * np.abs(expected).max()


def same(found, expected):
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(*(np.asarray(z, np.float32) for z in (x, y)))


def without_nan(pages):
    """Kernels multiply what they mask by zero."""
    return pages._replace(key=jnp.nan_to_num(pages.key), value=jnp.nan_to_num(pages.value))


@pytest.mark.full
def test_jax_on_a_tpu():
    pages = made(128, lengths=(9, 3, 32, 16))
    query, counts = queries(4, 128), (1,) * 4
    given = layouts.to_jax(without_nan(pages), multiple=2)
    with pltpu.force_tpu_interpret_mode(), jax.numpy_dtype_promotion("standard"):
        found = jax_tpu(query / 128**0.5, *given, pages_per_compute_block=2)
    close(found, ours(pages, query, counts), 1e-2)  # it rounds keys to bfloat16


def test_jax_on_a_gpu():
    pages = made(lengths=(9, 3, 32, 16))
    query, counts = queries(4), (1,) * 4
    keys, values, lengths, table = layouts.to_jax(without_nan(pages), multiple=6)
    assert table.shape == (4, 6)
    found = jax_gpu.paged_attention(
        query / 4, keys, values, table, lengths, k_splits=3, interpret=True
    )
    close(found, ours(pages, query, counts))


def test_ragged():
    pages, counts = made(lengths=(9, 7, 32)), (1, 0, 5)
    query = queries(6)
    given = jax.jit(layouts.to_ragged)(without_nan(pages), jnp.asarray(counts))
    assert given.cu_q_lens.tolist() == [0, 1, 6, 6]
    assert given.num_seqs.tolist() == [2]
    with jax.numpy_dtype_promotion("standard"):
        found = ref_ragged_paged_attention(query, *given, sm_scale=0.25)
    close(found, ours(pages, query, counts))


def plain(q, k, v):
    """[tokens, N, E] in float64: causal attention of the last tokens."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, N // K, axis=1) for x in (k, v))
    s = np.einsum("qhd,khd->hqk", q, k) / q.shape[2] ** 0.5
    sees = len(k) - len(q) + np.arange(len(q))[:, None] >= np.arange(len(k))
    p = np.exp(np.where(sees, s - s.max(-1, keepdims=True), -np.inf))
    return np.einsum("hqk,khd->qhd", p / p.sum(-1, keepdims=True), v)


def tpu_inference(query, given, head_dim):
    """What tpu-inference's reference reads, without new tokens: for 64, values behind keys."""
    cache, lengths, indices, starts, distribution = (np.asarray(x) for x in given)
    cache = cache.reshape(*cache.shape[:2], -1, cache.shape[4])
    outs = []
    for b in range(distribution[2]):
        q = query[starts[b] : starts[b + 1]]
        assert b >= distribution[0] or len(q) == 1
        pages = indices.reshape(-1, M)[b]
        kv = cache[pages].reshape(-1, *cache.shape[2:])[: lengths[b]]
        kv = kv[:, :K] if head_dim == 64 else kv[:, : 2 * K].reshape(len(kv), K, -1)
        k, v = np.split(kv, 2, axis=2)
        outs.append(plain(q, k[..., :head_dim], v[..., :head_dim]))
    return np.concatenate(outs)


HEADS = [(16, "float32"), (64, "float32"), (192, "bfloat16"), (128, "float16"), (64, "bfloat16")]


@pytest.mark.parametrize(("head_dim", "dtype"), some_tuples(HEADS, every=4))
def test_tpu_inference(head_dim, dtype):
    pages = made(head_dim, dtype=dtype)
    n = 4 // pages.key.dtype.itemsize
    given = layouts.to_tpu_inference(without_nan(pages), COUNTS)
    heads = -(-K * (1 if head_dim == 64 else 2) // n)
    assert given.kv_cache.shape == (P, PAGE, heads, n, -(-head_dim // 128) * 128)
    assert given.distribution.tolist() == [1, 1, 4]
    query = queries(sum(COUNTS), head_dim, dtype)
    found = tpu_inference(query, given, head_dim)
    close(
        found,
        ours(pages, query, COUNTS),
        {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1e-2}[dtype],
    )


def flashinfer(query, given, layout):
    """FlashInfer's decode, as its documentation has the layout."""
    cache, indptr, indices, last = given
    keys, values = cache if isinstance(cache, tuple) else (cache[:, 0], cache[:, 1])
    outs = []
    for b, q in enumerate(np.asarray(query)):
        mine = np.asarray(indices)[int(indptr[b]) : int(indptr[b + 1])]
        length = PAGE * (len(mine) - 1) + int(last[b])
        k, v = (np.asarray(x)[mine] for x in (keys, values))
        if layout == "HND":
            k, v = (np.swapaxes(x, 1, 2) for x in (k, v))
        outs.append(plain(q[None], *(x.reshape(-1, K, x.shape[3])[:length] for x in (k, v))))
    return np.concatenate(outs)


@pytest.mark.parametrize(("layout", "combined"), [("NHD", True), ("HND", False)])
def test_flashinfer(layout, combined):
    pages = made(lengths=(9, 3, 32, 16), value_head_dim=None if combined else 12)
    given = layouts.to_flashinfer(pages, layout=layout, combined=combined)
    assert given.indptr.tolist() == [0, 2, 3, 7, 9]
    assert given.last_page_len.tolist() == [1, 3, 8, 8]
    query = queries(4)
    close(flashinfer(query, given, layout), ours(pages, query, (1,) * 4))


ACTIVE = (LENGTHS[0], *LENGTHS[2:])
THERE_AND_BACK = {
    "jax": lambda x: layouts.from_jax(layouts.to_jax(x)),
    "ragged": lambda x: layouts.from_ragged(layouts.to_ragged(x, (1, 3, 1, 2))),
    "tpu-inference": lambda x: layouts.from_tpu_inference(
        layouts.to_tpu_inference(x, (1, 3, 1, 2)), kv_heads=K, head_dim=x.key.shape[3]
    ),
    "NHD": lambda x: layouts.from_flashinfer(layouts.to_flashinfer(x), blocks=M),
    "HND": lambda x: layouts.from_flashinfer(
        layouts.to_flashinfer(x, layout="HND", combined=True), layout="HND", blocks=M
    ),
}


@pytest.mark.parametrize("head_dim", only([64], [16, 64]))
@pytest.mark.parametrize("name", THERE_AND_BACK)
def test_there_and_back(name, head_dim):
    pages = made(head_dim, dtype="bfloat16", lengths=ACTIVE)
    same(jax.jit(THERE_AND_BACK[name])(pages), pages)


def test_sequences_without_queries():
    pages = made()
    for there, back in (
        (layouts.to_ragged, layouts.from_ragged),
        (
            layouts.to_tpu_inference,
            lambda x: layouts.from_tpu_inference(x, kv_heads=K, head_dim=16),
        ),
    ):
        found = jax.jit(lambda x, there=there, back=back: back(there(x, COUNTS)))(pages)
        order = [0, 2, 3, 4, 1]
        same(found, pages._replace(table=pages.table[jnp.asarray(order)], lengths=found.lengths))
        assert found.lengths.tolist() == [LENGTHS[b] for b in order]
    found = jax.jit(lambda x: layouts.from_ragged(layouts.to_ragged(x, (0, 0, 2, 0, 0))))(pages)
    assert found.lengths.tolist() == [32, 0, 0, 0, 0]
    assert (found.table >= 0).sum() == 4


def test_pages_that_are_given_up_name_page_0():
    pages = made()
    pages = pages._replace(table=pages.table.at[2, :2].set(-1))
    assert layouts.to_jax(pages).page_indices[2, :2].tolist() == [0, 0]
    assert layouts.to_flashinfer(pages).indices[2:4].tolist() == [0, 0]


def test_blocks_of_flashinfer():
    pages = made(lengths=(9, 3))
    assert layouts.from_flashinfer(layouts.to_flashinfer(pages)).table.shape == (2, 2)


WRONG = {
    "key": (
        lambda x: layouts.to_jax(x._replace(key=x.key[0])),
        "`key` must be [P, K, page, D]; got (3, 8, 16).",
    ),
    "value": (
        lambda x: layouts.to_ragged(x._replace(value=x.value[..., :12]), COUNTS),
        "`value` must be [11, 3, 8, 16], as key's (11, 3, 8, 16); got (11, 3, 8, 12).",
    ),
    "value's pages": (
        lambda x: layouts.to_flashinfer(x._replace(value=x.value[1:])),
        "`value` must be [11, 3, 8, E], as key's (11, 3, 8, 16); got (10, 3, 8, 16).",
    ),
    "type": (
        lambda x: layouts.to_jax(x._replace(value=x.value.astype("bfloat16"))),
        "`value` must be of key's type float32; got bfloat16. Cast it.",
    ),
    "table": (
        lambda x: layouts.to_jax(x._replace(table=x.table[0])),
        "`table` must be int32 of shape [B, M]; got int32[4].",
    ),
    "lengths": (
        lambda x: layouts.to_jax(x._replace(lengths=x.lengths[1:])),
        "`lengths` must be int32 of shape [B] = [5]; got int32[4].",
    ),
    "counts": (
        lambda x: layouts.to_ragged(x, COUNTS[1:]),
        "`counts` must be integers of shape [B] = [5]; got int32[4].",
    ),
    "multiple": (
        lambda x: layouts.to_jax(x, multiple=0),
        "`multiple` must be a positive int; got 0.",
    ),
    "page size": (
        lambda x: layouts.to_tpu_inference(
            Pages(*(y[:, :, 1:].astype("float16") for y in x[:2]), *x[2:]), COUNTS
        ),
        "`key` must have a page size that is a multiple of 2 for float16; got 7.",
    ),
    "cache": (
        lambda x: layouts.from_tpu_inference(
            layouts.to_tpu_inference(x, COUNTS), kv_heads=5, head_dim=16
        ),
        "`kv_cache` must be [11, 8, 10, 1, 128] for 5 heads of size 16; got (11, 8, 6, 1, 128).",
    ),
    "layout": (
        lambda x: layouts.to_flashinfer(x, layout="NDH"),
        "`layout` must be one of 'NHD', 'HND'; got 'NDH'.",
    ),
    "blocks": (
        lambda x: jax.jit(layouts.from_flashinfer)(layouts.to_flashinfer(x)),
        "`blocks` must be an int under jit; got None.",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name):
    call, message = WRONG[name]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call(made())
    assert str(error.value) == message
