"""The TPU's backward pass beside positions, block masks, functions and biases of low rank: with the
rows of a head in VMEM, and tile by tile.

The kernels are given what the lax walk has left of the forward pass, and compared with the plain
formula in float64, or with the reference implementation.
"""

from dataclasses import replace
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _tpu_backward, _tpu_lists, tpu
from pasa_jax import BlockMask, LowRankBias, dot_product_attention
from pasa_jax.call.api import canonical
from pasa_jax.call.backends import choose
from pasa_jax.implementations import lax
from tests.gallery import BOUNDS, GALLERY, QUICKLY, plain, relative
from tests.pallas_kernels.test_mods import long_arrays, options, together
from tests.thin import only, some_tuples

WAYS = {"by head": 2**40, "streamed": 0}  # bytes of VMEM that the kernels are told of
pytestmark = pytest.mark.usefixtures("tpu_interpreter")


def gradients(arrays, keywords, d_out, d_lse, way):
    """The kernels' own cotangents, from the residuals of the lax walk."""
    call = canonical(*arrays, **keywords, **options("pallas_tpu"))
    plan = choose("pallas_tpu", call.operands, call.mask, call.plan).plan
    assert tpu.no_backward(call.operands, call.mask, plan) is None
    d_out = d_out.astype(call.operands.query.dtype)

    def backward(operands):
        result = lax.forward(operands, call.mask, plan, wanted="residuals")
        return _tpu_backward.gradients(operands, call.mask, plan, result, d_out, d_lse, WAYS[way])

    return jax.jit(backward, compiler_options=QUICKLY)(call.operands)


# The gallery: heads that share keys, two batch entries, odd lengths, rows that see nothing.


def check(example, way, dtype="float32"):
    arrays = example.arrays(dtype)
    cotangents = (jnp.asarray(x, jnp.float32) for x in example.weights())
    found = gradients(tuple(arrays.values()), example.keywords, *cotangents, way)
    true, bound = plain(example, arrays).gradients, BOUNDS[dtype][1]
    for name in ("query", "key", "value"):
        assert relative(getattr(found, name), true[name]) < bound, name
    if example.learned is not None:
        of = learned(found, example.learned, true["learned"])
        errors = jax.tree.map(relative, of, true["learned"])
        assert max(jax.tree.leaves(errors)) < bound, errors


def learned(found, name, like):
    """The gradients of factors or data as the user lays them out."""
    if name == "bias":
        q, k, scale = found.factors
        q, k = (np.moveaxis(np.asarray(x), 2, 3) for x in (q, k))
        found = LowRankBias(q, k, scale)
    else:
        field = {"q_data": "query", "kv_data": "key", "head_data": "head"}[name]
        found = jax.tree.unflatten(jax.tree.structure(like), getattr(found.data, field))
    return jax.tree.map(lambda x, y: np.reshape(x, np.shape(y)), found, like)


NAMES = [name for name in GALLERY if name != "blocks of segments"]  # whose blocks are no tiles


@pytest.mark.parametrize(("name", "way"), some_tuples(product(NAMES, WAYS), 30, 7))
def test_gallery(name, way):
    check(GALLERY[name](), way)


@pytest.mark.full
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["document", "low rank", "learned of tokens"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gallery_in_16_bits(name, way, dtype):
    check(GALLERY[name](), way, dtype)


@pytest.mark.full
@pytest.mark.parametrize("way", WAYS)
def test_learned_numbers_of_keys(way):
    example = GALLERY["learned of tokens"]()
    q = np.asarray(example.keywords["q_data"]["own"], np.float64)[..., None]

    def fold(d):
        return {"own": np.sum(d * q, axis=(1, 2))[:, None]}

    check(replace(example, learned="kv_data", fold=fold), way)


# Several tiles of queries and of keys, the last of each short.


def compare(keywords, way, names, arrays=None, clean=None, **further):
    """Holds the kernels' cotangents of queries, keys, values and ``names`` to the reference's.

    Arguments:
      clean: arrays for the reference, without what no query sees.
    """
    arrays = arrays or long_arrays()
    keywords = keywords | further
    rng = np.random.default_rng(2)
    of_out, of_lse = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in (arrays[0].shape, arrays[0].shape[:3])
    )

    def total(arrays, given):
        out, lse = dot_product_attention(
            *arrays, **keywords | given, return_residual=True, implementation="reference"
        )
        return jnp.sum(out * of_out) + jnp.sum(jnp.where(lse > -1e30, lse, 0) * of_lse)

    given = {name: keywords[name] for name in names}
    want = jax.jit(jax.grad(total, (0, 1)), compiler_options=QUICKLY)(clean or arrays, given)
    found = gradients(arrays, keywords, of_out, of_lse, way)
    for name, x, y in zip(("query", "key", "value"), found[:3], want[0], strict=True):
        assert relative(x, y) < 2e-5, name
    for name in names:
        errors = jax.tree.map(relative, learned(found, name, want[1][name]), want[1][name])
        assert max(jax.tree.leaves(errors)) < 2e-5, (name, errors)
    return found


@pytest.mark.parametrize("way", only([], WAYS))
def test_together(way):
    """Every mask, function and bias at once."""
    compare(together(200, 300), way, ["bias", "head_data"], long_arrays(200, 300))


@pytest.mark.full
def test_lists_in_parts(monkeypatch):
    """Lists that do not fit SMEM: several calls of each kernel, each for some tiles."""
    monkeypatch.setattr(_tpu_lists, "LISTED", 20)
    compare(together(), "streamed", ["bias", "head_data"])


@pytest.mark.full
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["causal", "window", "bottom right", "segments", "sinks"])
def test_what_needs_no_list_is_streamed_too(name, way):
    lengths = {
        "query_seq_lengths": np.asarray([130, 300], np.int32),
        "key_value_seq_lengths": np.asarray([700, 290], np.int32),
    }
    keywords = {
        "causal": {"is_causal": True},
        "window": {"local_window_size": (200, 30)},
        "bottom right": {"is_causal": True, "causal_alignment": "bottom_right", **lengths},
        "segments": {"segment_ids": together()["segment_ids"], "logits_soft_cap": 5.0},
        "sinks": {"sinks": np.asarray([0.5, -1, 2, 30], np.float32), "is_causal": True},
    }
    compare(keywords[name], way, [])


@pytest.mark.parametrize("way", only(["by head"], WAYS))
def test_what_is_hidden_may_be_anything(way):
    """NaN in keys that no query sees, of a block mask with empty rows and columns."""
    rng = np.random.default_rng(4)
    kinds = rng.integers(0, 3, (2, 1, 3, 6))
    kinds[:, :, 1], kinds[..., 4] = 0, 0
    mask = BlockMask.from_kinds(kinds, (300, 700), 128, lambda b, h, q, kv: (q + kv) % 3 != 0)
    clean = long_arrays()
    spoilt = tuple(x.at[:, 512:640].set(jnp.nan) for x in clean[1:])
    found = compare({"block_mask": mask}, way, [], (clean[0], *spoilt), clean)
    assert not np.any(np.asarray(found.query)[:, 128:256])
    assert not any(np.any(np.asarray(x)[:, 512:640]) for x in (found.key, found.value))


class TestChoice:
    def refusal(self, length, **keywords):
        x = jnp.zeros((1, 8, 1, 128), jnp.float32)
        call = canonical(x, x, x, **keywords, **options("pallas_tpu"))
        plan = choose("pallas_tpu", call.operands, call.mask, call.plan).plan
        longer = call.operands._replace(query=jax.ShapeDtypeStruct((1, length, 1, 128), x.dtype))
        mask = replace(call.mask, query_length=length)
        return tpu.no_backward(longer, mask, plan)

    def test_long_heads_are_streamed(self):
        assert self.refusal(2**17) is None

    def test_a_bias_is_not(self):
        bias = jnp.zeros((1, 1, 1, 8))
        assert self.refusal(8, bias=bias) is None
        assert "no gradient of a bias" in self.refusal(2**17, bias=bias)

    def test_lists_that_no_memory_holds(self, monkeypatch):
        monkeypatch.setattr(_tpu_lists, "LISTED", 20)
        assert "of one tile of each head are 1026 numbers" in self.refusal(2**17)
