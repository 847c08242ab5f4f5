"""Models that call flax's `dot_product_attention` themselves: swapped for a while, and put back."""

import sys
from types import ModuleType

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from pasa_jax.plugins import linen as linen_plugin
from pasa_jax.plugins import nnx as nnx_plugin

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((2, 4, 4, 16)), jnp.float32)
Q = jnp.asarray(RNG.standard_normal((1, 6, 2, 8)), jnp.float32)
PLUGINS = {"linen": (linen_plugin, linen), "nnx": (nnx_plugin, nnx)}
either = pytest.mark.parametrize("name", PLUGINS)


class SpatialAttention(linen.Module):
    """As the attention blocks of diffusion models in linen are: flax's function, called itself."""

    heads: int = 2
    size: int = 8
    dtype: jnp.dtype = jnp.float16

    def setup(self):
        def to_heads(name):
            return linen.DenseGeneral((self.heads, self.size), dtype=self.dtype, name=name)

        self.query, self.key, self.value = map(to_heads, ("to_q", "to_k", "to_v"))
        self.out = linen.DenseGeneral(16, axis=(-2, -1), dtype=self.dtype, name="to_out_0")

    def __call__(self, x, context=None):
        shape = x.shape
        x = x.reshape(shape[0], -1, shape[-1])
        context = x if context is None else context
        out = linen.dot_product_attention(
            self.query(x),
            self.key(context),
            self.value(context),
            dtype=self.dtype,
            broadcast_dropout=False,
            dropout_rng=None,
            precision=jax.lax.Precision.HIGH,
            force_fp32_for_softmax=True,
            deterministic=True,
        )
        return self.out(out).reshape(shape)


class Transformer(linen.Module):
    def setup(self):
        self.attention1, self.attention2 = SpatialAttention(), SpatialAttention()

    def __call__(self, x):
        x = x + self.attention1(x).astype(x.dtype)
        return x + self.attention2(x, context=x[:, 0, :3]).astype(x.dtype)


class UNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.remat(Transformer)(name="down")(x)
        return linen.MultiHeadDotProductAttention(2, name="last")(x.reshape(2, 16, 16))


UNET = UNet()
# Flax multiplies weights in float32 with float16 values where the softmax is forced to float32.
standard = jax.numpy_dtype_promotion("standard")
with standard:
    VARIABLES = UNET.init(jax.random.key(0), X)
SWAPPED = [
    "down.attention1: dot_product_attention",
    "down.attention2: dot_product_attention",
    "last",
]


def scaled(variables, factor):
    """With queries and keys so much larger."""
    names = {"to_q", "to_k"}
    return jax.tree_util.tree_map_with_path(
        lambda path, x: factor * x if path[-2].key in names else x, variables
    )


@pytest.mark.full
@standard
def test_a_unet_of_linen():
    before = UNET.apply(VARIABLES, X)
    with linen_plugin.replaced() as changed:
        found = jax.jit(lambda v, x: UNET.apply(v, x))(VARIABLES, X)
    assert changed == SWAPPED
    np.testing.assert_allclose(found, before, atol=1e-2)
    loud = scaled(VARIABLES, 300)
    assert bool(jnp.isnan(UNET.apply(loud, X)).any())
    with linen_plugin.replaced():
        assert bool(jnp.isfinite(UNET.apply(loud, X)).all())
    assert bool(jnp.isnan(UNET.apply(loud, X)).any())


@standard
def test_choosing_among_callers_of_linen_s_function():
    seen = {}

    def choose(path, module):
        seen[path] = type(module)
        return {"shift": "mean"} if path == SWAPPED[1] else None

    with linen_plugin.replaced(choose) as changed:
        UNET.apply(VARIABLES, X)
    assert changed == [SWAPPED[1]]
    kinds = [SpatialAttention, SpatialAttention, linen.MultiHeadDotProductAttention]
    assert seen == dict(zip(SWAPPED, kinds, strict=True))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.qkv = nnx.LinearGeneral(16, (3, 2, 8), rngs=rngs)

    def __call__(self, x):
        q, k, v = jnp.moveaxis(self.qkv(x), -3, 0)
        # With dropout, flax multiplies the scores out itself.
        out = nnx.dot_product_attention(q, k, v, dropout_rate=0.1, deterministic=True)
        return x + out.reshape(x.shape)


class Model(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([Block(rngs), Block(rngs)])
        self.last = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


NNX_SWAPPED = [*(f"layers.{i}: dot_product_attention" for i in range(2)), "last"]


def test_a_model_of_nnx():
    model, x = Model(), X[0]
    before = model(x)
    with nnx_plugin.replaced() as changed:
        found = nnx.jit(lambda model, x: model(x))(model, x)
    assert changed == NNX_SWAPPED
    np.testing.assert_allclose(found, before, atol=3e-6)
    np.testing.assert_array_equal(model(x), before)
    narrow = jax.tree.map(lambda x: 300 * x.astype(jnp.float16), nnx.state(model, nnx.Param))
    nnx.update(model, narrow)
    x = x.astype(jnp.float16)
    assert bool(jnp.isnan(model.layers[0](x)).any())
    with nnx_plugin.replaced():
        assert bool(jnp.isfinite(model.layers[0](x)).all())
    assert bool(jnp.isnan(model.layers[0](x)).any())


def test_the_innermost_context_of_nnx_decides():
    model = Model()
    with nnx_plugin.replaced(precision="nonsense") as outer:
        with nnx_plugin.replaced() as inner:
            model(X[0])
        assert (inner, outer) == (NNX_SWAPPED, [])
        with pytest.raises(ValueError, match="nonsense"):
            model(X[0])
        with (
            nnx_plugin.replaced(lambda path, module: {} if path == "last" else None) as inner,
            pytest.raises(ValueError, match="nonsense"),
        ):
            model(X[0])
        assert inner == []


@either
def test_every_name_of_the_function_is_given_and_taken_back(name, monkeypatch):
    plugin, library = PLUGINS[name]
    inside = {"linen": flax.linen.attention, "nnx": flax.nnx.nn.attention}[name]
    early, late = ModuleType("early"), ModuleType("late")
    early.dot_product_attention = early.other = native = library.dot_product_attention
    monkeypatch.setitem(sys.modules, "early", early)
    monkeypatch.setitem(sys.modules, "nothing", None)
    with plugin.replaced(shift="none", missing_ok=True):
        kept = late.dot_product_attention = library.dot_product_attention
        monkeypatch.setitem(sys.modules, "late", late)
        for module in (library, inside, early):
            assert module.dot_product_attention is kept is not native
        assert early.other is native
        assert plugin.NATIVE is native
    for module in (library, inside, early, late):
        assert module.dot_product_attention is native
    # Whoever kept the function has flax's by now.
    with plugin.replaced(missing_ok=True) as changed:
        kept(Q, Q, Q)
    assert changed == []


@either
def test_a_module_that_was_given_flax_s_function_inside(name):
    plugin, library = PLUGINS[name]
    x = X[0]

    def run(fn):
        if name == "nnx":
            model = nnx.MultiHeadAttention(2, 16, attention_fn=fn, decode=False, rngs=nnx.Rngs(0))
            return model(x, mask=nnx.make_causal_mask(x[..., 0]))
        module = linen.MultiHeadDotProductAttention(2, attention_fn=fn)
        mask = linen.make_causal_mask(x[..., 0])
        return module.init_with_output(jax.random.key(0), x, mask=mask)[0]

    expected = run(library.dot_product_attention)
    with plugin.replaced() as changed:
        np.testing.assert_allclose(run(library.dot_product_attention), expected, atol=3e-6)
    assert len(changed) == 1
    with plugin.replaced(lambda path, module: None) as changed:
        np.testing.assert_array_equal(run(library.dot_product_attention), expected)
    assert changed == []


@either
def test_a_function_that_calls_it_outside_of_any_module(name):
    plugin, library = PLUGINS[name]

    def attend(q):
        return library.dot_product_attention(q, q, q)

    before = attend(Q)
    with plugin.replaced() as changed:
        np.testing.assert_allclose(attend(Q), before, atol=2e-6)
    (path,) = changed
    assert path.startswith("test_a_function_that_calls_it_outside_of_any_module.<locals>.attend:")
    assert path.endswith(": dot_product_attention")


@either
def test_nothing_to_swap_is_said(name):
    plugin, library = PLUGINS[name]
    run = jax.jit(lambda q: library.dot_product_attention(q, q, q))
    run(Q)
    with pytest.raises(ValueError, match="jit compiled before") as error, plugin.replaced():
        run(Q)
    assert str(error.value) == (
        f"`{name}.replaced` must last while an attention of flax.{name} is called or traced; got "
        "no such call. What jit compiled before the context is not traced again: open it around "
        "the first call, or call jax.clear_caches() first. What holds the function by another name "
        "(`import … as`, a default, an attribute of a class) is not reached: let it call "
        f"flax.{name}.dot_product_attention. Where there may be nothing to swap, or an earlier "
        "context swapped it in what jit then compiled: missing_ok=True."
    )
    with plugin.replaced(missing_ok=True) as changed:
        run(Q)
    assert changed == []


def test_what_jit_compiled_before_is_traced_again_without_its_cache():
    run = jax.jit(lambda q: linen.dot_product_attention(q, q, q))
    run(Q)
    jax.clear_caches()
    with linen_plugin.replaced() as changed:
        run(Q)
    assert len(changed) == 1


@either
def test_another_error_comes_first(name):
    plugin, library = PLUGINS[name]
    native = library.dot_product_attention
    with pytest.raises(ZeroDivisionError), plugin.replaced():
        raise ZeroDivisionError
    assert library.dot_product_attention is native
