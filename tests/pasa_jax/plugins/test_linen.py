"""`flax.linen.MultiHeadDotProductAttention` with our attention in place of flax's."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from flax import nnx as flax_nnx

from pasa_jax.plugins import linen as plugin
from pasa_jax.plugins import nnx as nnx_plugin

FEATURES, HEADS = 16, 4


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


X = normal(3, 10, FEATURES)
FLAX = linen.MultiHeadDotProductAttention(HEADS)
WALKED = FLAX.clone(attention_fn=plugin.attention_fn())
# What only the adapter decides is tested with the implementation that compiles fastest.
OURS = FLAX.clone(attention_fn=plugin.attention_fn(implementation="reference"))
VARIABLES = FLAX.init(jax.random.key(0), X)


def apply(module, *args, variables=VARIABLES, **keywords):
    return module.apply(variables, *args, **keywords)


def test_every_keyword_that_flax_passes_is_spelt_out():
    for ours, theirs in (
        (plugin.attention_fn(), linen.dot_product_attention),
        (nnx_plugin.attention_fn(), flax_nnx.dot_product_attention),
    ):
        wanted, found = (inspect.signature(x).parameters for x in (theirs, ours))
        assert list(found) == list(wanted)
        for name in set(wanted) - {"promote_dtype"}:
            assert found[name].default == wanted[name].default


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bool_, jnp.int32])
def test_masks_of_any_type_reach_it(dtype):
    mask = linen.make_causal_mask(jnp.ones((3, 10)), dtype=dtype)
    found = jax.jit(lambda x, m: apply(OURS, x, mask=m))(X, mask)
    np.testing.assert_allclose(found, apply(FLAX, X, mask=mask), atol=2e-6)
    assert not np.allclose(found, apply(OURS, X), atol=1e-3)


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_any_number_of_batch_dimensions(batch):
    x = normal(*batch, 10, FEATURES)
    mask = linen.make_causal_mask(jnp.ones((*batch, 10)))
    np.testing.assert_allclose(apply(OURS, x, mask=mask), apply(FLAX, x, mask=mask), atol=2e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"normalize_qk": True},
        {"dtype": jnp.bfloat16, "force_fp32_for_softmax": True},
        {"precision": jax.lax.Precision.HIGHEST},
    ],
)
def test_every_option_of_the_module(options):
    variables = OURS.clone(**options).init(jax.random.key(0), X)
    found = apply(OURS.clone(**options), X, variables=variables)
    wide = {k: v for k, v in options.items() if k != "dtype"}
    expected = apply(FLAX.clone(**wide), X, variables=variables)
    assert found.dtype == options.get("dtype", jnp.float32)
    error = np.abs(np.asarray(found, np.float32) - expected).max() / np.abs(expected).max()
    assert error < {2: 2e-2, 4: 4e-6}[found.dtype.itemsize]


@pytest.mark.parametrize("batch", [(2, 3)])
def test_decoding_step_by_step_is_the_causal_forward(batch):
    x = normal(*batch, 5, FEATURES)
    decoder = WALKED.clone(decode=True)
    cache = decoder.init(jax.random.key(0), x)["cache"]
    expected = apply(WALKED, x, mask=linen.make_causal_mask(jnp.ones((*batch, 5))))

    @jax.jit
    def step(cache, token):
        out, new = decoder.apply({**VARIABLES, "cache": cache}, token, mutable=["cache"])
        return new["cache"], out

    outs = []
    for t in range(5):
        cache, out = step(cache, x[..., t : t + 1, :])
        outs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outs, axis=-2), expected, atol=2e-6)


def test_receptive_field():
    mask = linen.make_causal_mask(jnp.ones((1, 10)))

    def row(x, t):
        return apply(OURS, x, mask=mask)[0, t].sum()

    reach = jax.jit(jax.vmap(jax.grad(row), (None, 0)))(X[:1], jnp.arange(10))
    reached = np.abs(np.asarray(reach[:, 0])).max(-1) > 1e-7
    np.testing.assert_array_equal(reached, np.tril(np.ones((10, 10), bool)))


def test_dropout_follows_the_rng():
    module = OURS.clone(dropout_rate=0.5, deterministic=False)
    a, b = ({"dropout": jax.random.key(i)} for i in (1, 2))
    run = jax.jit(lambda rngs: apply(module, X, rngs=rngs))
    np.testing.assert_array_equal(run(a), run(a))
    assert not np.array_equal(run(a), run(b))
    quiet = apply(module.clone(deterministic=None), X, deterministic=True)
    np.testing.assert_array_equal(quiet, apply(OURS, X))
    given = apply(module, X, dropout_rng=jax.random.key(3), rngs=a)
    np.testing.assert_array_equal(given, apply(module, X, dropout_rng=jax.random.key(3), rngs=b))


def test_float16_scores_beyond_65504():
    """Flax multiplies out float16 scores, and gives NaN; in float32 the same weights are fine."""
    modules = [m.clone(dtype=jnp.float16) for m in (FLAX, WALKED)]
    loud = jax.tree.map(lambda x: 60 * x, VARIABLES)
    loud = {"params": {**loud["params"], "out": VARIABLES["params"]["out"]}}
    x = 4 * X.astype(jnp.float16)
    theirs, ours = (apply(m, x, variables=loud) for m in modules)
    assert bool(jnp.isnan(theirs).any())
    wide = apply(OURS.clone(dtype=jnp.float32), x.astype(jnp.float32), variables=loud)
    error = jnp.abs(ours.astype(jnp.float32) - wide)
    assert float(jnp.quantile(error, 0.9) / jnp.abs(wide).max()) < 5e-3


def test_gradients():
    def loss(params, module):
        return jnp.mean(jnp.square(module.apply({"params": params}, X)))

    found = jax.jit(jax.grad(lambda p: loss(p, WALKED)))(VARIABLES["params"])
    expected = jax.grad(lambda p: loss(p, FLAX))(VARIABLES["params"])
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6)


def test_self_attention_and_its_alias():
    ours = linen.MultiHeadAttention(HEADS, attention_fn=OURS.attention_fn)
    np.testing.assert_array_equal(apply(ours, X), apply(OURS, X))
    older = linen.SelfAttention(HEADS, attention_fn=OURS.attention_fn)
    with pytest.warns(DeprecationWarning, match="SelfAttention"):
        np.testing.assert_array_equal(apply(older, X), apply(OURS, X))


def einsum_class():
    return jnp.einsum


REFUSED = {
    "sow": (
        lambda: apply(OURS, X, sow_weights=True, mutable=["intermediates"]),
        "`sow_weights` must be False",
    ),
    "einsum": (
        lambda: apply(
            OURS.clone(
                qk_attn_weights_einsum_cls=einsum_class, attn_weights_value_einsum_cls=einsum_class
            ),
            X,
        ),
        "`qk_attn_weights_einsum` must be None: scores are computed tile by tile; got <.* Leave it",
    ),
    "softmax": (
        lambda: apply(
            OURS.clone(
                dtype=jnp.float16,
                force_fp32_for_softmax=True,
                attention_fn=plugin.attention_fn(precision="paper"),
            ),
            X,
        ),
        "`force_fp32_for_softmax` must be False beside a precision whose softmax is in float16",
    ),
    "dot_general": (
        lambda: plugin.attention_fn()(X, X, X, einsum_dot_general=jax.lax.dot_general),
        "`einsum_dot_general` must be None",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()
