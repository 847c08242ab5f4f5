"""`flax.nnx.MultiHeadAttention` with our attention in place of flax's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pasa_jax import dot_product_attention
from pasa_jax.plugins import nnx as plugin

FEATURES, HEADS = 16, 4
# What only the adapter decides is tested with the implementation that compiles fastest.
QUICK = plugin.attention_fn(implementation="reference")


def module(attention_fn=None, features=FEATURES, **options):
    """An attention module; the same parameters whatever the attention function."""
    options = {"num_heads": HEADS, "in_features": features, "decode": False, **options}
    fn = QUICK if attention_fn is None else attention_fn
    return nnx.MultiHeadAttention(**options, attention_fn=fn, rngs=nnx.Rngs(0))


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


X = normal(3, 10, FEATURES)
MASKS = {
    "none": None,
    "float causal": nnx.make_causal_mask(jnp.ones((3, 10))),
    "bool padding": jnp.arange(10)[None, None, None] < jnp.asarray([10, 4, 7])[:, None, None, None],
    "int of one head": (jnp.arange(100).reshape(1, 1, 10, 10) % 3).astype(jnp.int32)
    + jnp.eye(10, dtype=jnp.int32),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_any_type_as_flax_has_them(name):
    flax = module(nnx.dot_product_attention)
    np.testing.assert_allclose(
        jax.jit(lambda x, m: module()(x, mask=m))(X, MASKS[name]),
        flax(X, mask=None if name == "none" else MASKS[name].astype(bool)),
        atol=2e-6,
    )


@pytest.mark.parametrize(
    "options",
    [
        {"num_kv_heads": 2},
        {"normalize_qk": True, "use_bias": False},
        {"dtype": jnp.bfloat16},
        {"dtype": jnp.float16},
        {"precision": jax.lax.Precision.HIGHEST},
        {"precision": "high", "qkv_features": 8, "out_features": 5},
    ],
)
def test_every_option_of_the_module(options):
    found = module(**options)(X.astype(options.get("dtype", jnp.float32)), is_causal=True)
    wide = {k: v for k, v in options.items() if k != "dtype"}
    expected = module(nnx.dot_product_attention, **wide)(X, is_causal=True)
    assert found.dtype == options.get("dtype", jnp.float32)
    assert found.shape == expected.shape
    error = np.abs(np.asarray(found, np.float32) - expected).max() / np.abs(expected).max()
    assert error < {2: 2e-2, 4: 4e-6}[found.dtype.itemsize]


@pytest.mark.parametrize(("batch", "masked"), [((), True), ((2, 3), False), ((2, 1, 3), True)])
def test_any_number_of_batch_dimensions(batch, masked):
    x = normal(*batch, 7, FEATURES)
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((7, 7), bool)), (*batch, 1, 7, 7)) if masked else None
    found = module()(x, mask=mask)
    flat = x.reshape(-1, 7, FEATURES)
    expected = module()(flat, is_causal=masked).reshape(found.shape)
    assert found.shape == x.shape
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_cross_attention_of_values_that_differ():
    kv = normal(3, 6, FEATURES, seed=1)
    found = module()(X, kv, 2 * kv)
    expected = module(nnx.dot_product_attention)(X, kv, 2 * kv)
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize(("batch", "num_kv_heads"), [((2,), 2), ((2, 3), None)])
def test_decoding_step_by_step_is_the_causal_forward(batch, num_kv_heads):
    x = normal(*batch, 6, FEATURES)
    attention = module(plugin.attention_fn(), num_kv_heads=num_kv_heads)
    expected = attention(x, is_causal=True)
    attention.init_cache(x.shape, dtype=x.dtype)
    graph, params, rest = nnx.split(attention, nnx.Param, ...)

    @jax.jit
    def step(rest, token):
        attention = nnx.merge(graph, params, rest)
        out = attention(token, decode=True)
        return nnx.state(attention, nnx.Not(nnx.Param)), out

    outs = []
    for t in range(6):
        rest, out = step(rest, x[..., t : t + 1, :])
        outs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outs, axis=-2), expected, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "options", "keywords"),
    [("is_causal", {}, {"is_causal": True}), ("local_window_size", {"local_window_size": 4}, {})],
)
def test_one_query_beside_many_keys_has_no_position(name, options, keywords):
    """Flax 0.12.8 passes is_causal on from a decoder, whose query then sees key 0 alone."""
    x = X[:, :, None]
    message = f"`{name}` must be left out for one query beside 10 keys"
    with pytest.raises(ValueError, match=message):
        plugin.attention_fn(**options)(x[:, :1], x, x, **keywords)


def test_dropout_is_drawn_anew_and_deterministic_is_without():
    attention = module(dropout_rate=0.5, broadcast_dropout=False)
    quiet = module()(X)
    np.testing.assert_array_equal(attention(X, deterministic=True), quiet)
    draw = nnx.jit(lambda m, rngs: m(X, deterministic=False, rngs=rngs))
    a, b = draw(attention, None), draw(attention, None)
    assert not np.allclose(a, b, atol=1e-3)
    np.testing.assert_array_equal(draw(attention, nnx.Rngs(3)), draw(attention, nnx.Rngs(3)))


def test_dropout_is_that_of_the_public_function():
    q, key = normal(1, 10, HEADS, 4), jax.random.key(2)
    for broadcast in (False, True):
        found = QUICK(q, q, q, dropout_rng=key, dropout_rate=0.5, broadcast_dropout=broadcast)
        expected = dot_product_attention(
            q,
            q,
            q,
            dropout_rate=0.5,
            dropout_key=key,
            dropout_broadcast=broadcast,
            implementation="reference",
        )
        np.testing.assert_array_equal(found, expected)


def test_float16_scores_beyond_65504_with_dropout():
    """Flax multiplies out float16 scores as soon as there is dropout, and gives NaN."""
    q, k = (normal(1, 32, 2, 64, seed=s) * 10 + 100 for s in (0, 1))
    q, k, v = (x.astype(jnp.float16) for x in (q, k, normal(1, 32, 2, 64, seed=2)))
    drop = {"dropout_rng": jax.random.key(0), "dropout_rate": 0.25, "deterministic": False}
    attend = jax.jit(lambda fn, *x: fn(*x, **drop), static_argnums=0)
    assert bool(jnp.isnan(attend(nnx.dot_product_attention, q, k, v)).any())
    found = attend(plugin.attention_fn(), q, k, v)
    wide = attend(QUICK, *(x.astype(jnp.float32) for x in (q, k, v)))
    error = jnp.abs(found.astype(jnp.float32) - wide).max() / jnp.abs(wide).max()
    assert float(error) < 1e-3


def test_gradients_and_training_under_nnx_jit():
    def loss(m):
        return jnp.mean(jnp.square(m(X, is_causal=True, deterministic=True)))

    ours, flax = module(plugin.attention_fn()), module(nnx.dot_product_attention)
    found = nnx.jit(nnx.grad(nnx.remat(loss)))(ours)
    expected = nnx.jit(nnx.grad(loss))(flax)
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6)


def test_split_and_merge_and_clone():
    attention = module()
    merged = nnx.merge(*nnx.split(attention))
    np.testing.assert_array_equal(merged(X), attention(X))
    np.testing.assert_array_equal(nnx.clone(attention)(X), attention(X))


def test_equal_options_are_one_function():
    assert plugin.attention_fn(shift="mean") is plugin.attention_fn(shift="mean")
    assert plugin.attention_fn(shift="mean") is not plugin.attention_fn()


def test_bias_by_partial():
    bias = normal(1, HEADS, 10, 10)
    found = module(functools.partial(QUICK, bias=bias))(X)
    expected = module(functools.partial(nnx.dot_product_attention, bias=bias))(X)
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_dtype_and_promotion_are_flax_s():
    q = normal(1, 4, 2, 8).astype(jnp.float16)
    core = QUICK
    assert core(q, q, q, dtype=jnp.bfloat16).dtype == jnp.bfloat16
    assert core(q, q, q).dtype == jnp.float16

    def promote(arrays, *, dtype):
        return tuple(x.astype(jnp.float32) for x in arrays)

    assert core(q, q, q, promote_dtype=promote).dtype == jnp.float32


Q = normal(2, 4, 2, 8)
REFUSED = {
    "sow": (
        lambda: module()(X, sow_weights=True),
        "`sow_weights` must be False: attention weights are never held whole; got True. Give the "
        "modules that sow flax's own attention_fn, or ask pasa_jax.dot_product_attention for "
        "return_statistics.",
    ),
    "algorithm": (
        lambda: plugin.attention_fn()(Q, Q, Q, precision="BF16_BF16_F32"),
        "`precision` must be None or a jax.lax.Precision: products are as precise as 'highest'; "
        "got 'BF16_BF16_F32'. attention_fn(precision=…) names the types.",
    ),
    "no rng": (
        lambda: plugin.attention_fn()(Q, Q, Q, dropout_rate=0.5),
        "`dropout_rng` must be given where dropout_rate is not 0 and deterministic is False; got "
        "None. Pass an rng for dropout to the module.",
    ),
    "batch": (
        lambda: plugin.attention_fn()(Q, Q[0], Q),
        "`key` must be [batch…, length, heads, size], with the batch (2,); got (4, 2, 8).",
    ),
    "mask's batch": (
        lambda: plugin.attention_fn()(Q, Q, Q, mask=jnp.ones((3, 1, 4, 4))),
        "`mask` must broadcast to [batch…, N, T, S], with the batch (2,); got (3, 1, 4, 4).",
    ),
    "mask's rank": (
        lambda: plugin.attention_fn()(Q, Q, Q, mask=jnp.ones((1, 2, 1, 4, 4))),
        "`mask` must broadcast to [batch…, N, T, S], with the batch (2,); got (1, 2, 1, 4, 4).",
    ),
    "option": (
        lambda: plugin.attention_fn(is_causal=True),
        "`option` must be one of 'scale', 'local_window_size', 'implementation', "
        "'causal_alignment', 'logits_soft_cap', 'shift', 'beta', 'precision', 'schedule', "
        "'attention'; got 'is_causal'.",
    ),
    "unhashable": (
        lambda: plugin.attention_fn(implementation=["lax"]),
        "`implementation` must be hashable: a number, a name or a tuple; got ['lax'].",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call()
    assert str(error.value) == message
