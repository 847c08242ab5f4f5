"""Attention swapped in finished models, and put back."""

import sys
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from pasa_jax import dot_product_attention
from pasa_jax.plugins import linen as linen_plugin
from pasa_jax.plugins import nnx as nnx_plugin
from pasa_jax.plugins import patch, patching, replace_jax_nn

X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 8)), jnp.float32)
NATIVE = nnx.dot_product_attention


class Model(nnx.Module):
    def __init__(self, rngs, **options):
        self.first = nnx.Linear(8, 8, rngs=rngs)
        self.layers = nnx.List(
            [nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs, **options) for _ in range(2)]
        )

    def __call__(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(x, is_causal=True)
        return x


def functions(model):
    return [layer.attention_fn for layer in model.layers]


def test_patch_and_restore():
    model = Model(nnx.Rngs(0))
    run = nnx.jit(lambda m: m(X))
    before = run(model)
    changed = patch(model, shift="mean")
    assert functions(model) == [nnx_plugin.attention_fn(shift="mean")] * 2
    assert changed.options == {"layers.0": {"shift": "mean"}, "layers.1": {"shift": "mean"}}
    np.testing.assert_allclose(run(model), before, atol=3e-6)
    changed.restore()
    changed.restore()
    assert functions(model) == [NATIVE] * 2


def fails(context, inside):
    """Whether an exception leaves ``context``, after ``inside()``."""
    try:
        with context:
            inside()
            raise ZeroDivisionError
    except ZeroDivisionError:
        return True


def test_as_a_context_that_fails():
    model = Model(nnx.Rngs(0))
    changed = patch(model)
    assert functions(model) == [nnx_plugin.attention_fn()] * 2
    assert fails(changed, lambda: None)
    assert functions(model) == [NATIVE] * 2


def test_choose_by_mapping_and_by_function():
    model = Model(nnx.Rngs(0))
    ours = nnx_plugin.attention_fn
    with patch(model, choose={"layers.1": {"shift": "paper"}}, implementation="lax"):
        expected = [NATIVE, ours(shift="paper", implementation="lax")]
        assert functions(model) == expected
    with patch(model, choose=lambda path, module: {} if path == "layers.0" else None):
        assert functions(model) == [ours(), NATIVE]
    with patch(model.layers[0], choose={"": {}}):
        assert functions(model) == [ours(), NATIVE]


def test_patches_are_restored_in_order():
    model = Model(nnx.Rngs(0))
    with patch(model, shift="mean"):
        outer = functions(model)
        with patch(model, shift="none") as inner:
            assert functions(model) == [nnx_plugin.attention_fn(shift="none")] * 2
        assert functions(model) == outer
    first, second = patch(model), patch(model, shift="none")
    with pytest.raises(ValueError, match=r"'layers.0'` must be the one .* Restore later patches"):
        first.restore()
    second.restore()
    first.restore()
    assert functions(model) == [NATIVE] * 2
    assert inner.options["layers.0"] == {"shift": "none"}


def other(*args, **keywords):
    raise AssertionError


WRONG = {
    "linen": (
        lambda: patch(linen.Dense(3)),
        "`model` must be a flax.nnx module; got a linen Dense. Linen: `with "
        "pasa_jax.plugins.linen.replaced(…):` around init and apply.",
    ),
    "no model": (lambda: patch(3), "`model` must be a flax.nnx module; got a int."),
    "no attention": (
        lambda: patch(nnx.Linear(2, 2, rngs=nnx.Rngs(0))),
        "`model` must hold a flax.nnx.MultiHeadAttention; got a Linear without one. What calls "
        "flax.nnx.dot_product_attention itself: `nnx.replaced`; jax.nn's: `replace_jax_nn`; what "
        "multiplies out its own scores: call pasa_jax.dot_product_attention there.",
    ),
    "path": (
        lambda: patch(Model(nnx.Rngs(0)), choose={"layers.7": {}}),
        "`path in choose` must be one of 'layers.0', 'layers.1'; got 'layers.7'.",
    ),
    "own attention": (
        lambda: patch(Model(nnx.Rngs(0), attention_fn=other)),
        f"`attention_fn at 'layers.0'` must be flax's own; got {other!r}. `choose` says which "
        "modules to change.",
    ),
    "scale": (
        lambda: replace_jax_nn(scale=1.0).__enter__(),
        "`scale` must be left to the calls of jax.nn.dot_product_attention; got 1.0.",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name):
    call, message = WRONG[name]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call()
    assert str(error.value) == message


def test_nothing_is_changed_where_one_option_is_wrong():
    model = Model(nnx.Rngs(0))
    with pytest.raises(ValueError, match="`option` must be one of"):
        patch(model, choose={"layers.0": {}, "layers.1": {"shfit": "mean"}})
    assert functions(model) == [NATIVE] * 2


class LinenModel(linen.Module):
    attention: linen.Module  # a field, and one made in the call

    @linen.compact
    def __call__(self, x):
        x = x + self.attention(x).astype(x.dtype)
        return x + linen.MultiHeadDotProductAttention(2, name="inner")(x)


def test_linen_modules_wherever_they_are_made():
    field = linen.MultiHeadDotProductAttention(2, dtype=jnp.float16)
    model = LinenModel(field)
    variables = model.init(jax.random.key(0), X)
    loud = jax.tree_util.tree_map_with_path(
        lambda path, x: 300 * x if path[-2].key in ("query", "key") else x, variables
    )

    def run(x):
        return model.apply(loud, x)

    before = run(X)
    assert bool(jnp.isnan(before).any())
    with linen_plugin.replaced() as changed:
        assert bool(jnp.isfinite(jax.jit(lambda x: run(x))(X)).all())
        assert changed == ["attention", "inner"]
        with linen_plugin.replaced(choose=lambda path, module: None) as nothing:
            run(X)
        assert nothing == []
    np.testing.assert_array_equal(run(X), before)
    assert field.attention_fn is linen.dot_product_attention


def test_linen_chooses_and_refuses():
    model = LinenModel(linen.MultiHeadDotProductAttention(2, attention_fn=other))
    choose = lambda path, module: {"shift": "mean"}  # noqa: E731
    with linen_plugin.replaced(choose):
        model.init(jax.random.key(0), X)
    with (
        pytest.raises(ValueError, match="`attention_fn at 'attention'` must be flax's own"),
        linen_plugin.replaced(),
    ):
        model.init(jax.random.key(0), X)
    for plugin in (linen_plugin, nnx_plugin):
        with pytest.raises(ValueError, match="`option`"), plugin.replaced(is_causal=True):
            pass


def test_jax_nn_is_replaced_nested_and_put_back():
    before = jax.nn.dot_product_attention
    q = jnp.full((1, 4, 2, 64), 300, jnp.float16)

    def inner():
        found = jax.nn.dot_product_attention(q, q, q, is_causal=True)
        np.testing.assert_array_equal(found, dot_product_attention(q, q, q, is_causal=True))

    with replace_jax_nn(shift="none"):
        outer = jax.nn.dot_product_attention
        assert bool(jnp.isnan(jax.nn.dot_product_attention(q, q, q)).all())
        assert fails(replace_jax_nn(), inner)
        assert jax.nn.dot_product_attention is outer
    assert jax.nn.dot_product_attention is before


def call_jax_nn(options=None, **keywords):
    with replace_jax_nn(**(options or {})):
        return jax.nn.dot_product_attention(*[X[:, :, None]] * 3, **keywords)


def test_the_implementation_of_a_call_of_jax_nn_is_passed_on(monkeypatch):
    expected = dot_product_attention(*[X[:, :, None]] * 3, implementation="reference")
    np.testing.assert_array_equal(call_jax_nn(implementation="reference"), expected)
    with pytest.raises(ValueError, match=r"`implementation` must be one of .*; got 'mosaic'"):
        call_jax_nn(implementation="mosaic")
    monkeypatch.setattr(patching, "dot_product_attention", lambda *_, **keywords: keywords)
    for name in ("xla", "cudnn", None, "lax"):
        assert call_jax_nn(implementation=name) == {"implementation": name}
    assert call_jax_nn({"implementation": "lax"}, implementation="xla")["implementation"] == "lax"


@pytest.mark.parametrize("name", ["xla", "cudnn"])
def test_jax_nn_s_names_of_implementations_mean_the_lax_walk_on_a_cpu(name):
    expected = dot_product_attention(*[X[:, :, None]] * 3, implementation="lax")
    np.testing.assert_array_equal(call_jax_nn(implementation=name), expected)


def test_a_name_of_jax_nn_s_function_imported_before(monkeypatch):
    module = ModuleType("of_a_user")
    module.dot_product_attention = jax.nn.dot_product_attention
    monkeypatch.setitem(sys.modules, "of_a_user", module)
    q = jnp.full((1, 4, 2, 64), 300, jnp.float16)
    with replace_jax_nn(shift="none"):
        assert bool(jnp.isnan(module.dot_product_attention(q, q, q)).all())
    assert module.dot_product_attention is jax.nn.dot_product_attention


def test_nothing_of_jax_nn_to_replace():
    message = r"`replace_jax_nn` must last while .* of jax\.nn is"
    with pytest.raises(ValueError, match=message), replace_jax_nn():
        pass
    with replace_jax_nn(missing_ok=True):
        pass


def test_flax_s_own_attention_calls_the_replacement():
    q = jnp.full((1, 4, 2, 64), 300, jnp.float16)
    with replace_jax_nn():
        found = nnx.dot_product_attention(q, q, q, mask=jnp.ones((1, 1, 4, 4)))
    np.testing.assert_array_equal(found, q)
    assert not np.any(np.isnan(found))
