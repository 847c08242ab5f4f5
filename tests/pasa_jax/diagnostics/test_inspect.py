"""Every way in which a model calls attention is seen, named, and left as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from pasa_jax import dot_product_attention
from pasa_jax.diagnostics import inspect
from pasa_jax.plugins import KVCache, patch
from pasa_jax.serving import PagedCache

X = jnp.asarray(np.random.default_rng(0).standard_normal((1, 6, 8)), jnp.float32)
Q = jnp.asarray(np.random.default_rng(1).standard_normal((1, 6, 2, 4)), jnp.float32)


class Block(nnx.Module):
    def __init__(self, rngs):
        # With a dropout rate, flax does not call jax.nn but multiplies out the scores itself.
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, dropout_rate=0.1, rngs=rngs)

    def __call__(self, x):
        return x + self.attention(x, deterministic=True)


class Model(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([Block(rngs), Block(rngs)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Own(nnx.Module):
    """A module that calls the public function, its layers walked by a scan."""

    def __init__(self):
        self.blocks = nnx.vmap(Scanned)(jnp.arange(3, dtype=jnp.float32))

    def __call__(self, x):
        graph, state = nnx.split(self.blocks)
        return jax.lax.scan(lambda x, s: (nnx.merge(graph, s)(x), None), x, state)[0]


class Scanned(nnx.Module):
    def __init__(self, gain):
        self.gain = nnx.Param(gain)

    def __call__(self, x):
        return dot_product_attention(x * self.gain[...], x, x)


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.MultiHeadDotProductAttention(2, name="first")(x)
        return linen.MultiHeadDotProductAttention(2)(x)


def found(model, *inputs):
    """(name, via) of each call."""
    return [(c.name, c.via) for c in inspect(model, *inputs, error_rows=0).calls]


PATHS = [("layers.0.attention", "flax.nnx"), ("layers.1.attention", "flax.nnx")]


def test_a_model_of_nnx_is_left_as_it_is():
    model = Model()
    before = model(X)
    assert found(model, X) == PATHS
    functions = [layer.attention.attention_fn for layer in model.layers]
    assert functions == [nnx.dot_product_attention] * 2
    np.testing.assert_array_equal(model(X), before)


def test_a_function_that_jit_compiled_before():
    model = Model()
    run = nnx.jit(lambda m, x: m(x))
    run(model, X)
    assert found(run, model, X) == PATHS
    plain = jax.jit(dot_product_attention)
    plain(Q, Q, Q)
    assert len(found(plain, Q, Q, Q)) == 1


def test_grad_and_remat():
    model = Model()

    def loss(x):
        return jax.checkpoint(lambda x: model(x).sum())(x)

    names = found(jax.grad(loss), X)
    assert set(names) == set(PATHS)


def test_vmap_gives_a_call_for_each_entry():
    assert found(jax.vmap(Model()), X[None].repeat(2, axis=0)) == [p for p in PATHS for _ in "12"]


def test_layers_under_a_scan_are_numbered():
    report = inspect(Own(), Q, error_rows=0)
    assert [c.name for c in report.calls] == ["Scanned[0]", "Scanned[1]", "Scanned[2]"]
    sizes = [float(c.max_product.max()) for c in report.calls]
    assert sizes[0] == 0 < sizes[1]


def test_a_scan_in_a_scan_and_backwards():
    model = Own()

    def step(x, _):
        return model(x), None

    names = [name for name, _ in found(lambda x: jax.lax.scan(step, x, None, 2), Q)]
    assert names == [f"Scanned[{token}][{layer}]" for token in range(2) for layer in range(3)]

    def own(x, gain):
        return dot_product_attention(x * gain, x, x), None

    def backwards(x):
        return jax.lax.scan(own, x, jnp.arange(3.0), reverse=True)[0]

    calls = inspect(backwards, Q, error_rows=0).calls
    assert [call.name[-3:] for call in calls] == ["[2]", "[1]", "[0]"]
    assert calls[-1].max_product.max() == 0


def test_linen():
    model = Linen()
    variables = model.init(jax.random.key(0), X)
    expected = [("first", "flax.linen"), ("MultiHeadDotProductAttention_0", "flax.linen")]
    assert found(model.apply, variables, X) == expected
    assert found(jax.jit(model.apply), variables, X) == expected
    assert found(model.bind(variables), X) == expected


class Direct(linen.Module):
    """Calls flax's function itself."""

    @linen.compact
    def __call__(self, x):
        q = linen.DenseGeneral((2, 4))(x)
        return x + linen.dot_product_attention(q, q, q).reshape(x.shape)


class Directs(linen.Module):
    @linen.compact
    def __call__(self, x):
        return Direct(name="second")(Direct(name="first")(x))


class NnxDirect(nnx.Module):
    def __init__(self):
        self.project = nnx.LinearGeneral(8, (2, 4), rngs=nnx.Rngs(0))

    def __call__(self, x):
        q = self.project(x)
        out = nnx.dot_product_attention(q, q, q, dropout_rate=0.1, deterministic=True)
        return x + out.reshape(x.shape)


def test_models_that_call_flax_s_function_themselves():
    model = Directs()
    variables = model.init(jax.random.key(0), X)
    expected = [("first", "flax.linen"), ("second", "flax.linen")]
    assert found(model.apply, variables, X) == expected
    root = Direct()
    assert found(root.apply, root.init(jax.random.key(0), X), X) == [("Direct", "flax.linen")]
    # By a method that is no module's: the root has no variables there.
    attend = lambda module, q: linen.dot_product_attention(q, q, q)  # noqa: E731
    name = [("Direct", "flax.linen")]
    assert found(lambda q: root.apply({}, q, method=attend), Q) == name
    assert found(nnx.Sequential(NnxDirect(), NnxDirect()), X) == [
        ("layers.0", "flax.nnx"),
        ("layers.1", "flax.nnx"),
    ]


def test_an_attention_fn_that_calls_flax_s_function():
    def halved(query, key, value, **keywords):
        return linen.dot_product_attention(query / 2, key, value)

    module = linen.MultiHeadDotProductAttention(2, attention_fn=halved)
    variables = module.init(jax.random.key(0), X)
    (call,) = inspect(module.apply, variables, X, error_rows=0).calls
    assert (call.name, call.via) == ("MultiHeadDotProductAttention", "flax.linen")


class Encoder(Model):
    pass


class Decoder(Model):
    pass


def names(model, *inputs):
    return [name for name, _ in found(model, *inputs)]


def test_two_models_of_unlike_classes_are_told_apart():
    encoder, decoder = Encoder(), Decoder()
    below = [f"{kind}.layers.{i}.attention" for kind in ("Encoder", "Decoder") for i in range(2)]
    assert names(lambda x: decoder(encoder(x)), X) == below
    # Names that are apart already stay.
    alone = MODULE(), encoder
    assert names(lambda x: alone[1](alone[0](x)), X)[1:] == [path for path, _ in PATHS]


def MODULE():
    return nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(1))


def test_two_models_of_one_class_are_numbered():
    first, second = Model(), Model()
    run = nnx.jit(lambda model, x: model(x))
    expected = [f"Model_{n}.layers.{i}.attention" for n in range(2) for i in range(2)]
    assert names(lambda x: run(second, run(first, x)), X) == expected
    # One model is one, whether jit and grad run copies of it.
    assert names(lambda x: run(first, first(run(first, x))), X) == [n for n, _ in PATHS] * 3
    pair = [MODULE(), MODULE()]
    expected = ["MultiHeadAttention_0", "MultiHeadAttention_1"]
    assert names(lambda x: pair[1](pair[0](x)), X) == expected


def test_two_models_of_linen():
    model = Linen()
    first, second = (model.init(jax.random.key(i), X) for i in range(2))
    inner = ["first", "MultiHeadDotProductAttention_0"]
    two = [f"Linen_{n}.{name}" for n in range(2) for name in inner]
    run = jax.jit(model.apply)
    assert names(lambda x: run(second, run(first, x)), X) == two
    assert names(lambda x: model.bind(second)(model.bind(first)(x)), X) == two
    assert names(lambda x: Linen().apply(first, run(first, x)), X) == inner * 2
    direct = Directs()
    other = direct.init(jax.random.key(0), X)
    expected = [*(f"Linen.{name}" for name in inner), "Directs.first", "Directs.second"]
    assert names(lambda x: direct.apply(other, run(first, x)), X) == expected


def test_a_model_of_linen_that_is_initialized_is_one_model():
    class Twice(linen.Module):
        @linen.compact
        def __call__(self, x):
            shared = linen.MultiHeadDotProductAttention(2, name="shared")
            return shared(linen.Dense(8)(shared(x)))

    def run(x):
        variables = Twice().init(jax.random.key(0), x)
        return Twice().apply(variables, x)

    assert names(run, X) == ["shared"] * 4


def test_layers_under_a_scan_of_linen_are_one_model():
    class Layer(linen.Module):
        @linen.compact
        def __call__(self, x, _):
            return linen.MultiHeadDotProductAttention(2)(x), None

    class Scan(linen.Module):
        @linen.compact
        def __call__(self, x):
            layers = linen.scan(
                Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
            )
            return layers(name="layers")(x, None)[0]

    model = Scan()
    variables = model.init(jax.random.key(0), X)
    path = "layers.MultiHeadDotProductAttention_0"
    layers = {f"{path}[0]", f"{path}[1]"}
    assert set(names(model.apply, variables, X)) == layers
    gradient = jax.grad(lambda v: model.apply(v, X).sum())
    assert set(names(gradient, variables)) == layers


def test_functions_are_named_by_line():
    def attend(q):
        return jax.nn.dot_product_attention(q, q, q) + dot_product_attention(q, q, q)

    (name, via), (_, own) = found(attend, Q)
    assert name.startswith("test_functions_are_named_by_line.<locals>.attend:")
    assert (via, own) == ("jax.nn", "pasa_jax")


def test_a_cache():
    def decode(q):
        cache = KVCache.empty(1, 8, 2, 4, jnp.float32)
        for t in range(2):
            cache = cache.append(q[:, t : t + 1], q[:, t : t + 1])
            cache.attend(q[:, t : t + 1])

    calls = inspect(decode, Q, error_rows=0).calls
    assert [c.shapes[0] for c in calls] == [(1, 1, 2, 4)] * 2
    expected = np.einsum("bnd,bsnd->bns", Q[:, 1], Q[:, :2])
    np.testing.assert_allclose(calls[1].max_product, np.abs(expected).max(axis=(0, 2)), rtol=1e-5)


@pytest.mark.full
def test_a_paged_cache():
    """Two sequences of which one has three new tokens behind five, and the other one."""
    x = np.random.default_rng(0).standard_normal((9, 2, 4)).astype(np.float32)

    def decode(x):
        cache = PagedCache.empty(2, 8, 4, 16, 2, 4, "float32")
        for counts, new in (([5, 0], x[:5]), ([3, 1], x[5:])):
            cache, batch = cache.grown(np.asarray(counts, np.int32), total=len(new))
            cache = cache.write(batch, new, new)
            cache.attend(new, batch)

    _, call = inspect(decode, x, error_rows=4).calls
    assert call.shapes == ((2, 4, 2, 4), (2, 16, 2, 4), (2, 16, 2, 4))
    first = np.einsum("tnd,snd->nts", x[5:8], x[:8])
    seen = np.arange(8) <= 5 + np.arange(3)[:, None]
    largest = np.abs(np.where(seen, first, 0)).max(axis=(1, 2))
    own = np.sum(np.square(x[8]), axis=-1)
    np.testing.assert_allclose(call.max_product, np.maximum(largest, own), rtol=1e-5)
    assert set(call.formats) == {"bfloat16", "int8", "float8_e4m3", "float8_e5m2"}


def test_a_layer_that_overflows_does_not_hide_those_behind_it():
    model = Model()
    projection = model.layers[0].attention
    for linear in (projection.query, projection.key):
        linear.bias[...] = linear.bias[...] + 400
    narrow = jax.tree.map(lambda x: x.astype(jnp.float16), nnx.state(model, nnx.Param))
    nnx.update(model, narrow)
    report = inspect(model, X.astype(jnp.float16), error_rows=0)
    assert [call.dtype for call in report.calls] == ["float16", "float16"]
    assert sorted(report.overflowing) == [(0, 0), (0, 1)]
    assert all(call.not_finite == (0, 0, 0) for call in report.calls)
    assert "2 of 4 heads overflow float16, in layers.0.attention (call 0):" in report.verdict
    assert report.advice == [
        "Run the model inside `with pasa_jax.plugins.nnx.replaced():`, which swaps the attention "
        "of flax.nnx that these heads call for PASA's."
    ]


def test_a_patched_model_is_seen_as_well():
    model = Model()
    with patch(model, shift="mean"):
        assert found(model, X) == PATHS


def test_inputs_that_are_not_finite_are_said_first():
    report = inspect(Model(), X.at[0, 2].set(jnp.nan), error_rows=0)
    assert report.verdict.startswith("Not finite before any attention: an input of layers.0")


def test_progress_is_told_of_each_call():
    seen = []
    report = inspect(Model(), X, error_rows=0, progress=seen.append)
    assert tuple(seen) == report.calls


def test_other_code_is_not_watched():
    inspect(Model(), X, error_rows=0)
    jax.jit(dot_product_attention).lower(Q, Q, Q)  # would fail in the callback of an observer
    with pytest.raises(ZeroDivisionError):
        inspect(lambda: 1 // 0)
    assert not jax.config.jax_disable_jit


def test_errors():
    with pytest.raises(ValueError, match=r"`model` must know its variables; got an unbound linen"):
        inspect(Linen(), X)
    with pytest.raises(ValueError, match=r"`model` must be a flax\.nnx model or a function; got a"):
        inspect(3)
    with pytest.raises(ValueError, match="`model` must call dot_product_attention of") as error:
        inspect(lambda x: x, X)
    assert str(error.value) == (
        "`model` must call dot_product_attention of flax.nnx, flax.linen, jax.nn or pasa_jax, or a "
        "module of flax with that attention; got no such call. Model code that multiplies out its "
        "own scores, or holds one of these functions by another name, must call "
        "pasa_jax.dot_product_attention there (docs/flax.md)."
    )
