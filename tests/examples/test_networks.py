"""The examples that are networks, small."""

import importlib.util

import jax
import numpy as np
import pytest

from tests.examples import load
from tests.pasa_jax.parallel.devices import on_devices
from tests.weights import needs_minilm

LEVELS = ("quiet", "in phase", "against", "in phase, ×10", "against, ×10")


@pytest.mark.full
@needs_minilm
def test_sentence_embeddings(capsys):
    example = load("sentence_embeddings")
    vectors = example.main(example.SENTENCES[:3])
    near = vectors["float16"] @ vectors["float16"].T
    assert near[0, 1] > 0.3 + near[0, 2]
    for dtype, bound in (("float16", 2e-3), ("bfloat16", 2e-2)):
        assert 0 < np.linalg.norm(vectors[dtype] - vectors["float32"], axis=-1).max() < bound
    assert "Someone is having" in capsys.readouterr().out


@pytest.mark.full
def test_video_diffusion_attention():
    example = load("video_diffusion_attention")
    # Flax's norms promote; so does optax.
    with jax.numpy_dtype_promotion("standard"):
        (errors,), block = example.main(
            shapes=((96, 5),), sample=32, side=(8, 8), heads=3, size=32, context=16
        )
    assert tuple(example.KINDS) == LEVELS
    nan = {name: np.isnan(found).tolist() for name, found in errors.items()}
    assert nan["plain, scaled after rounding"] == [False, True, True, True, True]
    assert nan["Flax's"][:2] == [False, False]
    assert errors["Flax's"][1:3].min() > 0.1
    # As near as float32 scores of the same arrays, but for the rounding of the output.
    assert np.all(errors["PASA (auto)"] < 1.5 * errors["float32 scores"] + 1e-3)
    assert np.all(errors["bfloat16, PASA (auto)"] < 1.5 * errors["bfloat16, float32 scores"] + 4e-3)
    assert np.all(errors["float32 scores"] < 3e-2)

    assert np.isnan(block["plain, scaled after rounding"]).all()
    assert block["Flax's"][1] > 0.05  # of the attention alone
    assert 0 < block["PASA (auto)"][1] < 2e-3
    assert block["PASA (auto)"][0] < 1.1 * block["float32 scores"][0]


@pytest.mark.full
def test_training(tmp_path):
    plot = tmp_path / "curves.png"
    with jax.numpy_dtype_promotion("standard"):
        curves = load("training").main(20, plot, batch=4, length=64, layers=1, width=32, heads=1)
    true = curves["float32"]
    assert np.isnan(curves.pop("biased: plain, float16")).all()
    for name, losses in curves.items():
        assert losses[-3:].mean() < losses[:3].mean() - 1, name
        np.testing.assert_allclose(losses, true, atol=1e-2, err_msg=name)
    for name in ("PASA, bfloat16", "PASA, float16"):
        assert np.any(curves[name] != true), name
        np.testing.assert_allclose(curves[name], true, atol=2e-3, err_msg=name)
    assert plot.stat().st_size > 10_000


@pytest.mark.full
@pytest.mark.parametrize("scheme", ["ulysses", "ring"])
@on_devices
def test_training_on_a_mesh(scheme):
    """Data, tensor and sequence axes of two devices each, at once."""
    sizes = {"batch": 4, "length": 32, "layers": 1, "width": 16, "heads": 4}
    with jax.numpy_dtype_promotion("standard"):
        curves = load("training").beside_one_device((2, 2, 2), 4, scheme=scheme, **sizes)
    for dtype, bound in (("float32", 1e-5), ("float16", 5e-4)):
        one, many = curves[dtype]
        assert one[-1] < one[0] - 0.2
        np.testing.assert_allclose(many, one, atol=bound, err_msg=dtype)


@pytest.mark.filterwarnings("default")
def test_easydel_registry():
    if importlib.util.find_spec("easydel") is None:
        pytest.skip("no EasyDeL, which pins older versions of jax: see the example")
    with jax.numpy_dtype_promotion("standard"):
        errors = load("easydel_registry").main(length=64)
    assert errors["vanilla"] < 5e-3
    assert errors["pasa"] < 2e-3
    assert np.isnan(errors["vanilla, biased"])
    assert errors["pasa, biased"] < 5e-2
