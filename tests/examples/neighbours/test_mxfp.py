"""MX formats against a count of their numbers by hand, and attention with them."""

import math

import numpy as np
import pytest

from examples.neighbours import _keys, mxfp

OFF, CENTRED, SHORTER = mxfp.MEANS


def numbers(exponent_bits: int, mantissa_bits: int, emax: int, largest: float) -> list[float]:
    """The numbers >= 0 of a small float in the order of their codes, by its definition."""
    bias = 2 ** (exponent_bits - 1) - 1
    found = []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            fraction = mantissa / 2**mantissa_bits
            power = max(exponent, 1) - bias
            found.append(math.ldexp(fraction + (exponent > 0), power))
    assert max(x for x in found if x <= largest) == largest
    assert math.floor(math.log2(largest)) == emax
    return [x for x in found if x <= largest]


TABLES = {
    "e2m1": [0, 0.5, 1, 1.5, 2, 3, 4, 6],
    "e4m3": numbers(4, 3, 8, 448),
    "e5m2": numbers(5, 2, 15, 57344),
}


def nearest(x: float, table: list[float]) -> float:
    """The number of the table nearest to x; of two, that with an even code."""
    size = min(abs(x), table[-1])
    code = min(range(len(table)), key=lambda i: (abs(table[i] - size), i % 2))
    return math.copysign(table[code], x)


def counted(x: np.ndarray, name: str) -> np.ndarray:
    """x [T, D] in MX, number by number."""
    emax = {"e4m3": 8, "e5m2": 15, "e2m1": 2}[name]
    out = np.empty_like(x)
    for row in range(len(x)):
        for start in range(0, x.shape[1], 32):
            block = [float(y) for y in x[row, start : start + 32]]
            amax = max(abs(y) for y in block)
            scale = 2.0 ** (math.floor(math.log2(amax)) - emax) if amax else 1.0
            for i, y in enumerate(block):
                out[row, start + i] = nearest(y / scale, TABLES[name]) * scale
    return out


def inputs() -> np.ndarray:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((24, 64)) * np.exp2(rng.integers(-20, 20, (24, 1)))
    x[0] = 0
    x[1] = np.resize([0.25, 0.75, 1.25, 2.5, 3.5, 5, 4, -5], 64)  # ties of e2m1, at scale 1
    x[2, ::7] = 2.0 ** np.arange(-3, 7)  # powers of two
    x[3] = np.linspace(4, 7.99, 64)  # beyond 6: clipped
    return x.astype(np.float32)


@pytest.mark.parametrize("name", TABLES)
def test_conversion_is_what_is_counted_by_hand(name):
    x = inputs()
    np.testing.assert_array_equal(mxfp.mx(x, mxfp.ELEMENTS[name]), counted(x, name))


def test_ties_go_to_even_codes():
    x = np.zeros((1, 32), np.float32)
    x[0, :9] = [4, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -5]
    found = mxfp.mx(x, mxfp.ELEMENTS["e2m1"])[0, :9]
    assert found.tolist() == [4, 0, 1, 1, 2, 2, 4, 4, -4]


def off_by_one(amax, emax):
    return mxfp_scales(amax, emax - 1)


def rounded(amax, emax):
    """The exponent rounded up, as some conversions do to avoid clipping."""
    return mxfp_scales(amax * np.sqrt(2), emax)


mxfp_scales = mxfp.scales


@pytest.mark.parametrize("fault", [off_by_one, rounded])
def test_the_count_sees_a_wrong_scale(monkeypatch, fault):
    monkeypatch.setattr(mxfp, "scales", fault)
    x = inputs()
    for name in TABLES:
        assert np.any(mxfp.mx(x, mxfp.ELEMENTS[name]) != counted(x, name))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    output = tmp_path_factory.mktemp("mxfp")
    errors = mxfp.main(tokens=256, size=32, every=0, output=output)
    assert (output / "mxfp.png").stat().st_size > 10_000
    return errors


def test_a_wider_band_has_a_smaller_error(found):
    for band in ("band {}", "band {} and first"):
        widths = (1, 2) if "first" in band else (0, 1, 2, 4)
        of_widths = [found[f"{band.format(w)}, {CENTRED}"]["bias 0"] for w in widths]
        assert of_widths == sorted(of_widths, reverse=True)
    assert found[f"band 4, {OFF}"]["bias 0"] < found[f"e5m2 everywhere, {OFF}"]["bias 0"]


def test_means_of_keys_make_biased_keys_as_good_as_others(found):
    for band in ("band 0", "band 2", "band 4"):
        unbiased = found[f"{band}, {OFF}"]["bias 0"]
        for data in ("bias 50", "bias 200"):
            assert found[f"{band}, {OFF}"][data] > 3 * unbiased
            assert found[f"{band}, {CENTRED}"][data] < 1.2 * unbiased
            assert found[f"{band}, {SHORTER}"][data] < 1.2 * unbiased


def test_no_tile_may_have_4_bits_beside_biased_keys_without_means(found):
    allowed = mxfp.allowed(found, 4, "bias 50")
    assert np.isnan(allowed[OFF]).all()
    assert allowed[CENTRED][-1] > 0.5


def test_a_mean_is_kept_off_the_key_that_it_would_lengthen():
    k = np.random.default_rng(0).standard_normal((128, 8)) + 10
    k[3] = 0.1
    off = mxfp.MEANS[SHORTER](k)
    np.testing.assert_array_equal(np.flatnonzero(~off.any(axis=1)), [3])
    np.testing.assert_array_equal(
        np.delete(off, 3, axis=0), np.delete(mxfp.MEANS[CENTRED](k), 3, axis=0)
    )


def test_shares_are_counted_below_the_diagonal():
    for width, of_36 in ((0, 0), (1, 8), (2, 15), (8, 36)):
        assert mxfp.share_in_4_bits(mxfp.choices(8)[f"band {width}"], 8) == 1 - of_36 / 36
    assert mxfp.share_in_4_bits(mxfp.choices(8)["band 1 and first"], 8) == 1 - 15 / 36


@pytest.mark.full
def test_on_a_real_model(tmp_path):
    found = mxfp.main(tokens=512, every=6, output=tmp_path)
    for mean in mxfp.MEANS:
        near, with_first, everywhere = (
            found[f"{band}, {mean}"][_keys.MEDIAN]
            for band in ("band 2", "band 2 and first", "band 8")
        )
        assert everywhere < with_first < 0.8 * near
    for band in ("band 1 and first", "band 2 and first"):
        off, centred, shorter = (found[f"{band}, {mean}"][_keys.MEDIAN] for mean in mxfp.MEANS)
        assert centred < off
        assert shorter < off
    off, centred, shorter = (found[f"band 8, {mean}"][_keys.WORST] for mean in mxfp.MEANS)
    assert shorter < 1.05 * min(off, centred)
