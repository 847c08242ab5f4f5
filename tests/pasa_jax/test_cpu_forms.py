"""The forms that suit XLA's compiler for CPUs give the numbers of the plain ones."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax import Schedule, dot_product_attention
from pasa_jax.call.api import canonical
from pasa_jax.core import bits, tile
from pasa_jax.implementations import lax


def test_rounding_by_bits_is_rounding():
    bits = np.random.default_rng(0).integers(0, 2**32, 2**20, dtype=np.uint32)
    special = [0, 1, 0x7F800000, 0xFF800000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F7FFFFF]
    ties = (bits & np.uint32(0xFFFF0000)) | np.uint32(0x8000)
    x = np.concatenate([bits, ties, np.asarray(special, np.uint32)]).view(np.float32)
    found, true = (np.asarray(y) for y in (lax._narrow(x, jnp.dtype(jnp.bfloat16)), x))
    with np.errstate(invalid="ignore"):
        true = true.astype(jnp.bfloat16)
    nan = np.isnan(x)
    assert np.all(np.isnan(found[nan]))
    np.testing.assert_array_equal(found[~nan].view(np.uint16), true[~nan].view(np.uint16))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_finite_by_bits_is_finite(dtype):
    every = np.arange(2**16, dtype=np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(every.astype(np.float32))
    np.testing.assert_array_equal(tile.is_finite(jnp.asarray(every)), finite)


def test_what_is_done_to_bits_has_derivatives():
    x = jnp.ones((4, 2), jnp.bfloat16)
    place = (jnp.int32(1), jnp.int32(0))
    _, d_put = jax.jvp(lambda a, b: bits.put(a, b, place), (x, x[:2]), (x, 2 * x[:2]))
    assert d_put.tolist() == [[1, 1], [2, 2], [2, 2], [1, 1]]
    _, d_take = jax.jvp(lambda a: bits.take(a, 1, 2), (x,), (x,))
    assert d_take.tolist() == [[1, 1], [1, 1]]
    assert jax.grad(lambda a: jnp.sum(bits.take(a, 1, 2)))(x)[:, 0].tolist() == [0, 1, 1, 0]
    wide = jnp.asarray([1.0, 3.0])
    _, d_narrow = jax.jvp(lambda y: lax._narrow(y, jnp.dtype(jnp.bfloat16)), (wide,), (2 * wide,))
    assert d_narrow.tolist() == [2, 6]


@pytest.mark.parametrize("scale", [0.3, -0.3, 0.0])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_maximum_before_the_factor_is_the_same(precision, scale):
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 24, 1, 8)), precision) for _ in range(2))
    call = canonical(q, k, k, scale=scale, schedule=Schedule(block_q=24, block_kv=24))

    def scores(dialect):
        numerics = replace(call.plan, dialect=dialect).numerics(24)
        query = tile.query_tile(q[0, :, 0], call.operands.scale, None, numerics)
        key = tile.key_tile(k[0, :, 0], k[0, :, 0], None, numerics)
        return tile.scores(query, key, tile.initial_state(24, 8, numerics), None, None, numerics)

    plain, first = scores(tile.Dialect()), scores(lax.adapt(call.plan).dialect)
    assert lax.adapt(call.plan).dialect.maximum_first
    np.testing.assert_array_equal(plain.base, first.base)
    np.testing.assert_array_equal(plain.stored, first.stored)


def test_a_nan_of_any_payload_is_seen():
    q = jnp.ones((1, 4, 1, 8), jnp.bfloat16)
    nan = jax.lax.bitcast_convert_type(jnp.uint16(0x7FFF), jnp.bfloat16)
    for name in ("query", "key", "value"):
        arrays = dict.fromkeys(("query", "key", "value"), q)
        arrays[name] = q.at[0, 2].set(nan)
        out = np.asarray(dot_product_attention(**arrays), np.float32)
        assert np.isnan(out[0, 2]).all(), name
