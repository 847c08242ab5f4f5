"""Functions, positions, block masks, lists of tiles and biases of low rank in the kernels."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _tpu_lists
from pasa_jax import LowRankBias, Schedule, alibi_slopes, create_block_mask, dot_product_attention
from pasa_jax.core.errors import BackendUnsupported
from tests.gallery import GALLERY, QUICKLY, check
from tests.pallas_kernels import mods_aot
from tests.pallas_kernels.test_aot import KERNELS, named
from tests.thin import only, some_tuples

TARGETS = {"pallas_tpu": "tpu_v6e", "pallas_gpu": "h100"}
BLOCKS = {"pallas_tpu": (128, 128), "pallas_gpu": (32, 16)}


def options(kernel, **fields):
    block_q, block_kv = BLOCKS[kernel]
    schedule = Schedule(block_q=block_q, block_kv=block_kv, target=TARGETS[kernel], **fields)
    return {"implementation": kernel, "interpret": True, "schedule": schedule}


CHOSEN = ("document",)


@pytest.mark.parametrize("name", only(CHOSEN, GALLERY))
def test_gallery(kernel, name):
    if name == "blocks of segments":  # its blocks of 20 are no multiples of any kernel's tiles
        with pytest.raises(BackendUnsupported, match="must be multiples of its tiles"):
            check(GALLERY[name](), "float32", 2e-5, 2e-4, **options(kernel))
        return
    check(GALLERY[name](), "float32", 2e-5, 2e-4, **options(kernel))


def long_arrays(queries=300, keys=700, heads=4, kv_heads=2):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    k, v = normal(2, keys, kv_heads, 16), normal(2, keys, kv_heads, 16)
    return normal(2, queries, heads, 16), k, v


def documents(b, h, q, kv, *, q_data, kv_data):
    return q_data == kv_data


def together(queries=300, keys=700):
    """Everything that narrows tiles or changes scores, at once."""
    rng = np.random.default_rng(1)
    ids = [np.sort(rng.integers(0, 4, (2, x)), axis=1).astype(np.int32) for x in (queries, keys)]
    data = {"q_data": jnp.asarray(ids[0]), "kv_data": jnp.asarray(ids[1])}
    slopes = alibi_slopes(4)
    return {
        **data,
        "block_mask": create_block_mask(documents, 2, None, queries, keys, 128, **data),
        "segment_ids": tuple(x // 2 for x in ids),
        "q_positions": np.arange(queries) + 350,
        "local_window_size": (400, 300),
        "score_mod": mods_aot.alibi,
        "head_data": slopes,
        "mask_mod": lambda b, h, q, kv: (q + kv + h + b) % 5 != 0,
        "bias": LowRankBias.alibi(0.1 * slopes, queries, keys),
    }


@pytest.mark.parametrize(
    ("name", "keywords"),
    some_tuples(product(TARGETS, ["documents", "together", "low rank"]), 6, 3),
)
def test_lists_of_long_sequences(name, keywords, request):
    """Several tiles in each list: tiles that are hidden, partly seen and seen whole."""
    if name == "pallas_tpu":
        request.getfixturevalue("tpu_interpreter")
    arrays, all_keywords = long_arrays(), together()
    parts = {
        "together": tuple(all_keywords),
        "documents": ("q_data", "kv_data", "block_mask"),
        "low rank": ("bias", "segment_ids"),
    }
    chosen = {part: all_keywords[part] for part in parts[keywords]}

    def total(arrays, **how):
        out, lse = dot_product_attention(*arrays, return_residual=True, **chosen, **how)
        return jnp.sum(out * jnp.cos(out)) + jnp.sum(jnp.where(lse > -1e30, lse, 0)), out

    def both(**how):
        compute = jax.value_and_grad(lambda x: total(x, **how), has_aux=True)
        return jax.jit(compute, compiler_options=QUICKLY)(arrays)

    (_, want), d_want = both(implementation="reference")
    (_, found), d_found = both(**options(name))
    np.testing.assert_allclose(found, want, atol=2e-5)
    for x, y in zip(d_found, d_want, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-4)


@pytest.mark.full
def test_lists_in_parts(tpu_interpreter, monkeypatch):
    """Lists that do not fit SMEM: several calls of the kernel, each of some rows."""
    arrays, keywords = long_arrays(), together()
    want = dot_product_attention(*arrays, **keywords, return_residual=True, implementation="lax")
    monkeypatch.setattr(_tpu_lists, "LISTED", 20)
    jax.clear_caches()
    found = dot_product_attention(
        *arrays, **keywords, return_residual=True, **options("pallas_tpu")
    )
    jax.clear_caches()
    for x, y in zip(found, want, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


def test_what_is_not_visited_is_not_read(kernel):
    """NaN in the keys of hidden blocks; the forward kernels do not even look at them."""
    q, k, v = long_arrays()
    mask = create_block_mask(lambda b, h, q, kv: kv < 256, None, None, 300, 700, 128)
    spoilt = (x.at[:, 256:].set(jnp.nan) for x in (k, v))
    call = {"block_mask": mask, **options(kernel)}
    found = dot_product_attention(q, *spoilt, **call)
    np.testing.assert_array_equal(found, dot_product_attention(q, k, v, **call))


LOWERED = [("block mask", False), ("documents", False), ("relative", False), ("low rank", True)]


@pytest.mark.parametrize("chip", KERNELS)
@pytest.mark.parametrize(
    ("name", "gradient"),
    [
        pytest.param(*x, marks=() if x in LOWERED else pytest.mark.full)
        for x in product(mods_aot.NAMES, (False, True))
    ],
)
def test_lowering(chip, name, gradient):
    """What an interpreter takes, a compiler may not."""
    target, call = KERNELS[chip]
    block = 128 if chip == "tpu" else 64
    function, arguments = mods_aot.attention(
        jax.ShapeDtypeStruct,
        name=name,
        length=1024,
        schedule={"target": target, "block_q": block, "block_kv": block},
        heads=2,
        block=128,
        gradient=gradient,
    )
    with named(chip):
        text = jax.jit(function).trace(*arguments).lower(lowering_platforms=(chip,)).as_text()
    assert text.count(call) > gradient


def test_a_block_mask_of_single_heads_needs_heads_of_their_own_keys(tpu_interpreter):
    mask = create_block_mask(lambda b, h, q, kv: kv <= q + h, None, 4, 300, 700, 128)
    with pytest.raises(BackendUnsupported, match="must share a block mask"):
        dot_product_attention(*long_arrays(), block_mask=mask, **options("pallas_tpu"))


def test_data_of_16_bits_are_refused_by_name(kernel):
    x = long_arrays()
    data = jnp.ones(4, jnp.bfloat16)
    with pytest.raises(BackendUnsupported, match="must be float32, int32 or bool, not bfloat16"):
        dot_product_attention(
            *x,
            score_mod=lambda s, b, h, q, kv, *, head_data: s * head_data.astype(s.dtype),
            head_data=data,
            **options(kernel),
        )
