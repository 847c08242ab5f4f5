"""Cheap exponentials in attention, as the example measures them."""

import pytest

from examples.neighbours import exponentials

KINDS = exponentials.KINDS
pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    output = tmp_path_factory.mktemp("exponentials")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exponentials, "PROBABILITIES", ("float32", "bfloat16"))
        patch.setattr(exponentials, "TIMED", ("float32",))
        errors = exponentials.main(tokens=128, every=0, length=128, rounds=2, output=output)
    assert (output / "exponentials.png").stat().st_size > 10_000
    return errors


def test_powers_have_the_published_errors(found):
    exact, cubic, quadratic = (found["2^x"][kind] for kind in KINDS)
    assert exact < 1e-6
    assert 7.4e-5 < cubic < 7.5e-5
    assert 1.7e-3 < quadratic < 1.75e-3


def test_the_cubic_is_lost_in_the_rounding_of_narrow_probabilities(found):
    for data, error in found["bfloat16, exact"].items():
        assert found["bfloat16, cubic"][data] < 1.05 * error
        assert found["bfloat16, quadratic"][data] > 1.05 * error


def test_in_float32_each_is_seen(found):
    for data, error in found["float32, exact"].items():
        assert found["float32, cubic"][data] > 10 * error
        assert found["float32, quadratic"][data] > 8 * found["float32, cubic"][data]


def test_times_are_ratios_to_the_exact_one(found):
    times = {name: x for name, x in found.items() if name.startswith("time of ")}
    assert set(times) == {"time of 2^x alone", "time of attention, float32"}
    assert all(x["exact"] == 1 and min(x.values()) > 0 for x in times.values())


@pytest.mark.full
def test_on_a_real_model(tmp_path):
    found = exponentials.main(tokens=256, every=10, length=128, rounds=1, output=tmp_path)
    exact, cubic, quadratic = (found[f"float16, {kind}"]["SmolLM2"] for kind in KINDS)
    assert cubic < 1.1 * exact
    assert quadratic > 2 * exact
