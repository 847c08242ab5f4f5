"""Every transformation that users wrap attention in."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pasa_jax import dot_product_attention
from pasa_jax.call import differentiation as _attend
from tests.cases import CASES, TILES
from tests.thin import only

attend = partial(dot_product_attention, is_causal=True, schedule=TILES, implementation="lax")


@pytest.fixture
def qkv():
    arrays = CASES["causal"].arrays("float32")
    return arrays["query"], arrays["key"], arrays["value"]


def loss(q, k, v):
    return jnp.sum(jnp.sin(attend(q, k, v)))


def close(a, b, atol=3e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


def test_jit_equals_eager(qkv):
    close(jax.jit(attend)(*qkv), attend(*qkv))


def test_vmap(qkv):
    stacked = [jnp.stack([x, 2 * x, -x]) for x in qkv]
    close(jax.vmap(attend)(*stacked)[1], attend(*(2 * x for x in qkv)))
    shared = jax.vmap(attend, in_axes=(0, None, None))(stacked[0], *qkv[1:])
    close(shared[2], attend(-qkv[0], *qkv[1:]))


@pytest.mark.full
def test_vmap_over_lengths(qkv):
    lengths = jnp.asarray([[5, 50], [30, 1]], jnp.int32)
    found = jax.vmap(lambda n: attend(*qkv, key_value_seq_lengths=n))(lengths)
    close(found[1], attend(*qkv, key_value_seq_lengths=lengths[1]))


def test_vmap_of_grad_and_grad_of_vmap(qkv):
    stacked = [jnp.stack([x, 2 * x]) for x in qkv]
    a = jax.vmap(jax.grad(loss, (0, 1, 2)))(*stacked)
    b = jax.grad(lambda *x: jnp.sum(jax.vmap(loss)(*x)), (0, 1, 2))(*stacked)
    close(a, b, 1e-5)


@pytest.mark.full
def test_value_and_grad_and_jacrev(qkv):
    value, grad = jax.value_and_grad(loss)(*qkv)
    close(value, loss(*qkv), 1e-3)
    one_row = jax.jacrev(lambda q: attend(q, *qkv[1:])[0, 3, 1, 2])(qkv[0])
    assert one_row.shape == qkv[0].shape
    assert np.all(np.asarray(one_row)[1] == 0)
    assert np.abs(np.asarray(one_row)[0, 3, 1]).max() > 0
    assert grad.shape == qkv[0].shape


@pytest.mark.full
def test_checkpoint(qkv):
    close(jax.grad(jax.checkpoint(loss), (0, 1, 2))(*qkv), jax.grad(loss, (0, 1, 2))(*qkv), 1e-5)


@pytest.mark.full
def test_scan_over_layers(qkv):
    q, k, v = qkv
    v = jnp.concatenate([v, v[..., :4]], axis=-1)

    def layers(q):
        return jax.lax.scan(lambda x, _: (attend(x, k, v), None), q, None, length=3)[0]

    unrolled = attend(attend(attend(q, k, v), k, v), k, v)
    close(layers(q), unrolled)
    grad = jax.grad(lambda q: jnp.sum(layers(q)))(q)
    close(grad, jax.grad(lambda q: jnp.sum(attend(attend(attend(q, k, v), k, v), k, v)))(q), 1e-5)


def test_donation(qkv):
    q, k, v = (jnp.array(x) for x in qkv)
    expected = np.asarray(attend(q, k, v[..., :12]))
    same_shape = jnp.concatenate([v, v[..., :4]], axis=-1)
    found = jax.jit(attend, donate_argnums=0)(q, k, same_shape)
    assert q.is_deleted()
    close(found[..., :12], expected)


def test_concrete_and_traced_scale_agree(qkv):
    close(jax.jit(lambda s: attend(*qkv, scale=s))(0.3), attend(*qkv, scale=0.3))


SHARDED = """
BATCH_HEADS, SHIFTS = (True,), ("auto",)
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, PartitionSpec as P
from pasa_jax import dot_product_attention, Schedule
jax.config.update("jax_numpy_dtype_promotion", "strict")
rng = np.random.default_rng(0)
q, k, v = (jnp.asarray(rng.standard_normal((2, 40, h, 16)), jnp.float16) for h in (4, 2, 2))
mesh = Mesh(np.asarray(jax.devices()).reshape(2, 2), ("batch", "heads"))
spec = P("batch", None, "heads", None)
for batch_heads in BATCH_HEADS:
    tiles = Schedule(block_q=32, block_kv=16, batch_heads=batch_heads)
    for shift in SHIFTS:
        def attend(q, k, v):
            return dot_product_attention(q, k, v, is_causal=True, schedule=tiles, shift=shift)
        sharded = jax.shard_map(attend, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
        def loss(f):
            return lambda q, k, v: jnp.sum(f(q, k, v).astype(jnp.float32) ** 2)
        np.testing.assert_allclose(jax.jit(sharded)(q, k, v), attend(q, k, v), atol=1e-3)
        ours = jax.jit(jax.grad(loss(sharded), (0, 1, 2)))(q, k, v)
        for a, b in zip(ours, jax.grad(loss(attend), (0, 1, 2))(q, k, v)):
            np.testing.assert_allclose(a, b, atol=2e-2)
    # One key head for all: replicated over "heads", its gradient summed.
    one = P("batch", None, None, None)
    shared = jax.shard_map(attend, mesh=mesh, in_specs=(spec, one, one), out_specs=spec)
    ours = jax.grad(loss(shared), (1, 2))(q, k[:, :, :1], v[:, :, :1])
    for a, b in zip(ours, jax.grad(loss(attend), (1, 2))(q, k[:, :, :1], v[:, :, :1])):
        np.testing.assert_allclose(a, b, atol=4e-2)
print("sharded")
"""


# The default mesh of `jax.make_mesh`: what an array is sharded over stands in its type.
PLACED = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P
from pasa_jax import dot_product_attention, Schedule, explain
from pasa_jax.plugins import nnx as plugin
jax.config.update("jax_numpy_dtype_promotion", "strict")
rng = np.random.default_rng(0)
q, k, v = (jnp.asarray(rng.standard_normal((2, 40, h, 16)), jnp.float32) for h in (4, 2, 2))
tiles = Schedule(block_q=32, block_kv=16)
mesh = jax.make_mesh((2, 2), ("batch", "heads"))
def attend(*x, **options):
    return dot_product_attention(*x, is_causal=True, schedule=tiles, **options)
def loss(f):
    return lambda *x: jnp.sum(f(*x) ** 2)
def put(x, *spec):
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))
def kind(x):
    return jax.typeof(x).sharding.spec
plain, gradients = attend(q, k, v), jax.grad(loss(attend), (0, 1, 2))(q, k, v)
spec = ("batch", None, "heads", None)
placed = [put(x, *spec) for x in (q, k, v)]
np.testing.assert_allclose(attend(*placed), plain, atol=3e-6)  # without a mesh in the context
"""
EXPLICIT = """
with jax.set_mesh(mesh):
    assert explain(*placed).implementation == "lax"
    peer = jax.nn.dot_product_attention(*placed)
    for f in (attend, jax.jit(attend), lambda *x: attend(*x, implementation="reference")):
        out = f(*placed)
        assert kind(out) == kind(peer) == P(*spec), kind(out)
        np.testing.assert_allclose(out, plain, atol=3e-6)
    found = jax.jit(jax.grad(loss(attend), (0, 1, 2)))(*placed)
    for a, b in zip(found, gradients):
        assert kind(a) == P(*spec)
        np.testing.assert_allclose(a, b, atol=3e-5)
    for wrong in ((None, "batch", None, None), (None, None, None, "batch")):
        try:
            attend(put(q, *wrong), *placed[1:])
            raise AssertionError("accepted")
        except ValueError as error:
            assert "`query` must be sharded over its batch and its heads alone" in str(error)
            assert "jax.shard_map" in str(error)
print("sharded")
"""
EXPLICIT_MORE = """
with jax.set_mesh(mesh):
    options = {"return_residual": True, "return_statistics": True}
    _, lse, seen = attend(*placed, **options)
    assert kind(lse) == P("batch", None, "heads")
    for a, b in zip(seen, attend(q, k, v, **options)[2]):
        assert kind(a) == P("batch", "heads")
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    further = {
        "query_seq_lengths": jnp.asarray([30, 40]),
        "mask": jnp.asarray(rng.random((2, 1, 1, 40)) > 0.2),
        "bias": jnp.asarray(rng.standard_normal((1, 4, 40, 1)), jnp.float32),
        "sinks": jnp.arange(4.0), "segment_ids": jnp.asarray(rng.integers(0, 2, (2, 40))),
        "dropout_rate": 0.3, "dropout_key": jax.random.key(0),
    }
    np.testing.assert_allclose(attend(*placed, **further), attend(q, k, v, **further), atol=3e-6)
    # One key head beside sharded query heads; unbatched; vmap.
    one = [x[:, :, :1] for x in (k, v)]
    whole = [put(x, "batch", None, None, None) for x in one]
    np.testing.assert_allclose(attend(placed[0], *whole), attend(q, *one), atol=3e-6)
    single = attend(*(put(x[0], None, "heads", None) for x in (q, k, v)))
    assert kind(single) == P(None, "heads", None)
    np.testing.assert_allclose(single, plain[0], atol=3e-6)
    several = jax.vmap(attend)(*(jnp.stack([x, x]) for x in placed))
    assert kind(several) == P(None, *spec)
    module = nnx.MultiHeadAttention(
        4, 32, decode=False, rngs=nnx.Rngs(0), attention_fn=plugin.attention_fn(schedule=tiles)
    )
    x = put(jnp.asarray(rng.standard_normal((2, 10, 32)), jnp.float32), "batch")
    assert kind(module(x))[0] == "batch"
    assert kind(jax.grad(lambda x: jnp.sum(module(x) ** 2))(x))[0] == "batch"
print("sharded")
"""


SCRIPTS = {
    "shard_map": SHARDED,
    "explicit": PLACED + EXPLICIT,
    "shard_map, more": SHARDED.replace('(True,), ("auto",)', '(False, True), ("auto", "mean")'),
    "explicit, more": PLACED + EXPLICIT_MORE,
}


@pytest.mark.parametrize("script", only(["explicit"], SCRIPTS))
def test_sharded_over_batch_and_heads(script):
    """With check_vma on, on four devices; they must exist before jax starts, hence a process."""
    import os
    import subprocess
    import sys

    # What takes long is the compiler.
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    env = {**os.environ, "XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPTS[script]],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "sharded", done.stderr[-2000:]


def test_automatic_sharding(qkv):
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("batch",))
    placed = [jax.device_put(x, NamedSharding(mesh, PartitionSpec("batch"))) for x in qkv]
    close(jax.jit(attend)(*placed), attend(*qkv))


def test_outside_of_jit_a_shape_is_compiled_once(qkv):
    jax.block_until_ready(attend(*qkv))
    before = _attend._compiled_forward._cache_size()
    close(attend(*(x + 1 for x in qkv)), jax.jit(attend)(*(x + 1 for x in qkv)))
    assert _attend._compiled_forward._cache_size() == before


def test_while_jit_is_disabled(qkv):
    expected = jax.value_and_grad(loss)(*qkv)
    with jax.disable_jit():
        found = jax.value_and_grad(loss)(*qkv)
    close(found, expected, atol=1e-5)


class TestMemory:
    """O(T + S) beside the arrays themselves, where jax.nn keeps T × S scores."""

    def temporaries(self, function):
        x = jax.ShapeDtypeStruct((1, 8192, 1, 64), jnp.float32)

        def loss(q, k, v):
            return jnp.sum(jnp.square(function(q, k, v, is_causal=True)))

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def test_reverse_mode_at_8192(self):
        ours = self.temporaries(dot_product_attention)
        theirs = self.temporaries(jax.nn.dot_product_attention)
        score_matrix = 8192 * 8192 * 4
        operand = 8192 * 64 * 4
        assert theirs > score_matrix
        tiles = 8 * 512 * 512 * 4
        assert ours < 12 * operand + tiles < score_matrix / 4
