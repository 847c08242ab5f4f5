"""Scores that grow past float16 while a model is trained."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from examples import training
from examples.neighbours import muon
from pasa_jax import dot_product_attention

SIZES = {"layers": 1, "width": 16, "heads": 2}


@pytest.mark.parametrize("cap", [None, 2.0])
def test_plain_attention_is_attention(cap):
    q, k, v = 2 * np.random.default_rng(0).standard_normal((3, 1, 12, 2, 8)).astype(np.float32)
    out = muon.plain(*map(jnp.asarray, (q, k, v)), cap=cap)
    true = dot_product_attention(q, k, v, is_causal=True, logits_soft_cap=cap, precision="float32")
    np.testing.assert_allclose(out, true, atol=2e-6)


def test_a_cap_hides_scores_that_are_infinite():
    """tanh(±inf) = ±1: finite, and wrong where two scores of a row are both beyond."""
    x = jnp.full((1, 4, 1, 16), 200.0, jnp.float16)
    assert np.isnan(muon.plain(x, x, x)).any()
    assert np.isfinite(muon.plain(x, x, x, cap=50.0)).all()


def test_muon_takes_the_matrices_and_only_queries_and_keys_are_raised():
    with jax.numpy_dtype_promotion("standard"):
        model = training.LanguageModel(
            muon.RUNS["float32"], length=8, rngs=nnx.Rngs(0), **SIZES
        )  # fmt: skip
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        kinds = muon.matrices(params)
        block = kinds["blocks"][0]
        assert block["attention"]["query"]["kernel"].reduction_axis == (0,)
        assert block["attention"]["query"]["kernel"].output_axis == (1, 2)
        assert block["attention"]["out"]["kernel"].reduction_axis == (0, 1)
        assert block["up"]["kernel"].output_axis == (1,)
        assert kinds["head"]["kernel"] is None
        assert block["attention"]["query"]["bias"] is None
        gradients = jax.tree.map(jnp.ones_like, params)

        @jax.jit
        def updates(params, gradients):
            optimizers = (muon.optimizer("AdamW", rate) for rate in (1.0, 30.0))
            return [x.update(gradients, x.init(params), params)[0] for x in optimizers]

        once, raised = updates(params, gradients)
    ratios = jax.tree.map(lambda x, y: float(y.ravel()[0] / x.ravel()[0]), once, raised)
    attention = ratios["blocks"][0]["attention"]
    assert np.isclose(attention["query"]["kernel"], 30)
    assert np.isclose(attention["key"]["kernel"], 30)
    assert np.isclose(attention["value"]["kernel"], 1)
    assert np.isclose(ratios["head"]["kernel"], 1)


@pytest.mark.full
def test_the_probe_measures_the_largest_product():
    data = training.batches(4, 2, 16).reshape(2, 2, 2, 17)
    with jax.numpy_dtype_promotion("standard"):
        losses, largest = muon.train("float32", optax.sgd(0.0), data, **SIZES)
        model = training.LanguageModel(
            muon.RUNS["float32"], length=16, rngs=nnx.Rngs(0), **SIZES
        )  # fmt: skip
        for part in range(2):
            x = model.bytes(data[part, 0, :, :-1]) + model.positions(jnp.arange(16))
            x = model.blocks[0].norms[0](x)
            attention = model.blocks[0].attention
            products = jnp.einsum("btnd,bsnd->bnts", attention.query(x), attention.key(x))
            true = float(jnp.abs(jnp.tril(products)).max())
            np.testing.assert_allclose(largest[part], true, rtol=1e-4)
    assert losses.shape == (4,)


@pytest.mark.full
def test_a_thousand_steps(tmp_path, capsys):
    with jax.numpy_dtype_promotion("standard"):
        found = muon.main(tmp_path)
    end = {title: losses[-100:].mean() for title, (losses, _) in found.items()}
    largest = {title: products[-1] for title, (_, products) in found.items()}
    assert 2 * 17 < largest["Muon ×1, float32"] < 1000  # grows, and far too little to overflow
    assert np.isfinite(end["AdamW ×30, plain float16"])
    assert largest["AdamW ×30, plain float16"] < muon.LARGEST
    broken, products = found["Muon ×30, plain float16"]
    first = int(np.argmax(np.isnan(broken)))
    assert 20 < first < 500
    assert np.isnan(broken[first:]).all()
    assert products[first // 50] > 0.2 * muon.LARGEST
    assert largest["Muon ×30, shifts, float16"] > 5 * muon.LARGEST
    assert abs(end["Muon ×30, shifts, float16"] - end["Muon ×30, float32"]) < 0.1
    for run in ("plain float16, capped", "shifts, float16, capped"):
        assert end[f"Muon ×30, {run}"] < end["Muon ×30, float32"]
        assert largest[f"Muon ×30, {run}"] < 0.7 * largest["Muon ×30, float32"]
    assert (tmp_path / "muon.png").stat().st_size > 10_000
    assert "NaN from step" in capsys.readouterr().out
