"""Incoherent processing beside means that are taken off."""

import numpy as np
import pytest

from examples.neighbours import _keys, incoherent

FORMS = tuple(incoherent.FORMS)
INTEGERS = ("int8, of blocks", "int4, of blocks")
pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    output = tmp_path_factory.mktemp("incoherent")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_keys, "ALIKE", 1)
        errors = incoherent.main(tokens=256, size=64, every=0, output=output)
    assert (output / "incoherent.png").stat().st_size > 10_000

    def error(form, mean, rotated, data):
        return errors[incoherent.label(form, mean, rotated)][data]

    return error


def test_the_rotation_is_orthogonal_and_spreads_one_channel_over_all():
    turn = incoherent.rotation(64)
    np.testing.assert_allclose(turn @ turn.T, np.eye(64), atol=1e-12)
    np.testing.assert_allclose(np.abs(turn), 1 / 8)
    with pytest.raises(ValueError, match="size must be a power of two; got 80"):
        incoherent.rotation(80)


@pytest.mark.parametrize("form", FORMS)
def test_rotation_lowers_the_error_of_rare_outliers(found, form):
    data = "FA3's: 0.1 % outliers"
    ratio = found(form, "nothing", True, data) / found(form, "nothing", False, data)
    assert ratio < (0.8 if form in INTEGERS else 1.05), ratio


@pytest.mark.parametrize("form", FORMS)
def test_rotation_does_not_replace_a_mean(found, form):
    for bias in ("bias 50", "bias 200"):
        alone = found(form, "nothing", True, bias)
        assert alone > 3 * found(form, "blocks", False, bias)
        assert found(form, "blocks", True, bias) < 1.1 * found(form, "blocks", False, bias)


def test_rotation_spreads_a_bias_that_turns_where_no_mean_does(found):
    form, data = "int8, of blocks", "bias 200 in a fast pair, rotated"
    assert found(form, "blocks", False, data) > 0.8 * found(form, "nothing", False, data)
    assert found(form, "blocks", True, data) < found(form, "blocks", False, data) / 2


@pytest.mark.full
def test_on_a_real_model(tmp_path):
    errors = incoherent.main(tokens=512, every=6, output=tmp_path)
    for form in FORMS:
        nothing, both, rotated, mean = (
            errors[incoherent.label(form, *x)][_keys.MEDIAN]
            for x in (("nothing", False), ("blocks", True), ("nothing", True), ("blocks", False))
        )
        assert both < 1.05 * min(rotated, mean)
        assert rotated < nothing
        assert mean < nothing
