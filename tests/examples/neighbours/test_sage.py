"""SageAttention's smoothing beside PASA's."""

import numpy as np
import pytest

from examples.neighbours import _keys, sage

NOTHING, GLOBAL, BLOCKS, SHORTER, GLOBAL_Q, BLOCKS_Q = sage.SMOOTHINGS


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    output = tmp_path_factory.mktemp("sage")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_keys, "ALIKE", 2)
        errors = sage.main(tokens=256, size=32, every=0, output=output)
    assert (output / "sage.png").stat().st_size > 10_000
    return errors


@pytest.mark.parametrize("dtype", sage.TYPES)
def test_any_mean_repairs_a_constant_bias(found, dtype):
    for how in (GLOBAL, BLOCKS, SHORTER, GLOBAL_Q, BLOCKS_Q):
        mean = found[f"{dtype}, {how}"]
        assert mean["bias 200"] < 1.2 * mean["bias 0"]
        assert mean["bias 200"] < found[f"{dtype}, {NOTHING}"]["bias 200"] / 3


@pytest.mark.parametrize("dtype", sage.TYPES)
def test_only_means_of_blocks_follow_keys_that_drift(found, dtype):
    drifts = "bias drifts, -200 to 200"
    of_blocks = found[f"{dtype}, {BLOCKS}"][drifts]
    of_all = found[f"{dtype}, {GLOBAL}"][drifts]
    assert of_all > 0.8 * found[f"{dtype}, {NOTHING}"][drifts]
    assert of_blocks < (0.3 if dtype in ("int8", "float16", "bfloat16") else 0.7) * of_all


@pytest.mark.parametrize("dtype", sage.TYPES)
def test_no_mean_of_keys_repairs_what_turns_fast(found, dtype):
    fast = "bias 200 in a fast pair, rotated"
    for how in sage.SMOOTHINGS:
        assert found[f"{dtype}, {how}"][fast] > 0.6 * found[f"{dtype}, {NOTHING}"][fast]


@pytest.mark.parametrize("dtype", sage.TYPES)
def test_the_mean_of_queries_counts_where_they_have_one(found, dtype):
    with_keys = found[f"{dtype}, {GLOBAL}"], found[f"{dtype}, {GLOBAL_Q}"]
    uniform, plain = "PASA's: uniform at 30", "bias 50"
    assert with_keys[1][uniform] < with_keys[0][uniform] / 5
    assert with_keys[1][plain] > 0.8 * with_keys[0][plain]


def test_the_library_has_the_errors_that_are_emulated(found):
    for shift, how in (("none", NOTHING), ("mean", BLOCKS)):
        ours, emulated = found[f"pasa_jax, {shift}"], found[f"float16, {how}"]
        for data, error in ours.items():
            assert error < 1.1 * emulated[data] + 5e-4, (shift, data)
            assert error > 0.6 * emulated[data], (shift, data)


def test_without_rounding_every_smoothing_gives_the_true_output():
    for head in _keys.synthetic(128, 16):
        true = _keys.true_output(head)
        q = head.query / 4
        for smoothing in sage.SMOOTHINGS.values():
            off_q, off_k, added = smoothing(q, head.key)
            found = _keys.output(off_q @ off_k.T + added, head)
            np.testing.assert_allclose(found, true, atol=1e-9)


@pytest.mark.full
def test_on_a_real_model(tmp_path):
    found = sage.main(tokens=512, every=6, output=tmp_path)
    for dtype in ("int8", "int4", "e4m3"):
        nothing, of_all, of_blocks, shorter, all_and_q, blocks_and_q = (
            found[f"{dtype}, {how}"][_keys.MEDIAN] for how in sage.SMOOTHINGS
        )
        assert nothing > max(of_all, of_blocks, shorter, all_and_q, blocks_and_q)
        assert of_all > 1.3 * all_and_q
        assert of_blocks > 1.3 * blocks_and_q
        assert shorter < 1.05 * of_blocks
