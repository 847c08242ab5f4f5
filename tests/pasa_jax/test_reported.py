"""Defects that were met from outside, each by the smallest call that showed it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax import Precision, Schedule, dot_product_attention, explain
from pasa_jax.core.errors import BackendUnsupported
from tests.cases import CASES, TILES, exact
from tests.thin import only, some

BEHIND = replace(TILES, target="ascend_910b")


def normal(i, shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(i).standard_normal(shape, np.float32).astype(dtype))


def wide(x):
    return np.asarray(x, np.float64)


def total(out):
    return jnp.sum(out.astype(jnp.float32))


# Gradients.

MOVED_BACK = {
    "last tile in padding": (700, 64, {"query_seq_lengths": [100]}),
    "as many keys": (700, 700, {"query_seq_lengths": [100]}),
    "longer": (1000, 1000, {"query_seq_lengths": [200]}),
    "lengths of keys too": (700, 64, {"query_seq_lengths": [100], "key_value_seq_lengths": [30]}),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(pytest.param(name, "float32", marks=pytest.mark.full) for name in MOVED_BACK),
        ("last tile in padding", "float16"),
    ],
)
def test_gradients_where_the_last_query_tile_is_moved_back(name, dtype):
    """It starts in padding and may not touch what the rows before it have left for the gradient."""
    t, s, lengths = MOVED_BACK[name]
    lengths = {k: jnp.asarray(x, jnp.int32) for k, x in lengths.items()}
    q, k, v = (normal(i, (1, x, 1, 8), dtype) for i, x in ((1, t), (2, s), (3, s)))

    def gradients(q, k, v, **options):
        return jax.grad(
            lambda *x: total(dot_product_attention(*x, **lengths, **options)), (0, 1, 2)
        )(q, k, v)

    found = gradients(q, k, v, implementation="lax")
    true = gradients(*(x.astype(jnp.float32) for x in (q, k, v)), implementation="reference")
    for a, b in zip(found, true, strict=True):
        np.testing.assert_allclose(wide(a), wide(b), atol=2e-2 if dtype == "float16" else 2e-5)


@pytest.mark.parametrize("rows", some(["broadcast", "own"]))
def test_a_key_that_only_padding_sees_reaches_no_gradient(rows):
    """A bias hides the NaN key from valid rows; rows of padding see it, and have no gradient."""
    q, k, v = (normal(i, (2, 40, 2, 8)) for i in range(3))
    k = k.at[0, 5].set(jnp.nan)
    lengths = jnp.asarray([20, 40], jnp.int32)
    bias = jnp.zeros((2 if rows == "own" else 1, 1, 40, 40))
    bias = bias.at[0, 0, :20, 5].set(-jnp.inf)
    if rows == "broadcast":
        bias = bias.at[0, 0, 20:, 5].set(0.5)

    def loss(q, k, v, bias):
        out = dot_product_attention(
            q, k, v, bias, query_seq_lengths=lengths, implementation="lax", schedule=TILES
        )
        return total(out[0])

    for found in jax.grad(loss, (0, 1, 2, 3))(q, k, v, bias):
        assert np.all(np.isfinite(found))


# Integers that are narrower or wider than int32.


@pytest.mark.parametrize("dtype", some(["int8", "uint8", "int16"]))
def test_lengths_of_narrow_integers(dtype):
    q, k = normal(1, (1, 20, 1, 8)), normal(2, (1, 300, 1, 8))
    for name, x in (("key_value_seq_lengths", 100), ("query_seq_lengths", 11)):
        narrow, plain = (
            dot_product_attention(q, k, k, **{name: jnp.asarray([x], kind)})
            for kind in (dtype, "int32")
        )
        np.testing.assert_array_equal(narrow, plain)
    q = normal(1, (1, 256, 1, 8))
    narrow = dot_product_attention(q, k, k, query_seq_lengths=jnp.asarray([100], dtype))
    assert np.all(np.any(np.asarray(narrow[0, :100]) != 0, axis=-1))


def test_lengths_beyond_what_their_type_holds():
    q, k = normal(1, (1, 2, 1, 8)), normal(2, (1, 40_000, 1, 8))
    for x, kind in ((30_000, "int16"), (39_999, "uint16"), (-3, "int8"), (2**32 - 1, "uint32")):
        found = dot_product_attention(q, k, k, key_value_seq_lengths=jnp.asarray([x], kind))
        lengths = jnp.asarray([np.clip(x, 0, 40_000)], jnp.int32)
        np.testing.assert_array_equal(
            found, dot_product_attention(q, k, k, key_value_seq_lengths=lengths)
        )


def test_segment_ids_of_64_bits(x64):
    x = normal(1, (1, 4, 1, 8))
    ids = jnp.asarray([[1, 1, 1 + 2**32, -1]], jnp.int64)
    found = dot_product_attention(x, x, x, segment_ids=ids)
    plain = dot_product_attention(x, x, x, segment_ids=jnp.asarray([[0, 0, 1, 2]], jnp.int32))
    np.testing.assert_array_equal(found, plain)
    pair = (ids, jnp.asarray([[1, 1, 7, 7]], jnp.int32))
    assert np.all(np.asarray(dot_product_attention(x, x, x, segment_ids=pair))[0, 2:] == 0)


# Rounded products.


def alibi(heads, t, s):
    slopes = 2.0 ** -np.arange(1, heads + 1)
    return -slopes[:, None, None] * np.abs(np.arange(t)[:, None] - np.arange(s)[None])[None, None]


@pytest.mark.parametrize(
    "shift",
    ["reference", *(pytest.param(x, marks=pytest.mark.full) for x in ("auto", "mean"))],
)
@pytest.mark.parametrize("kind", ["100", "1e4", "7e4", "alibi"])
def test_a_bias_behind_the_rounding(shift, kind):
    """It is added after scores are stored, so what is taken off them may not hold it."""
    q, k, v = (normal(i, (1, 256, 2, 64), "float16") for i in range(3))
    bias = alibi(2, 256, 256) if kind == "alibi" else np.full((1, 1, 256, 256), float(kind))
    bias = jnp.asarray(bias, jnp.float32)
    out = dot_product_attention(q, k, v, bias, shift=shift, schedule=BEHIND)
    true, _ = exact({"query": q, "key": k, "value": v, "bias": bias}, {})
    plain = dot_product_attention(q, k, v, bias, shift="none", precision="float16", schedule=BEHIND)
    floor = np.abs(wide(plain) - true).max()
    assert np.abs(wide(out) - true).max() <= 2 * floor + 1e-3


@pytest.mark.parametrize(
    "shift", only(["reference", "mean_past"], ["reference", "auto", "mean", "mean_past"])
)
@pytest.mark.parametrize("cut", [False, True], ids=["ascend", "float16 products"])
def test_a_scale_above_one_behind_the_rounding(shift, cut):
    """q·scale is formed in 16 bits there: the guard must leave room for it too."""
    q = jnp.full((1, 8, 1, 4), 65504, jnp.float16)
    k = v = jnp.ones((1, 40, 1, 4), jnp.float16)
    half = Precision(scores="float16", probabilities="float16", products="float16")
    options = {"precision": half, "schedule": TILES} if cut else {"schedule": BEHIND}
    out = dot_product_attention(q, k, v, scale=1.5, shift=shift, **options)
    np.testing.assert_allclose(wide(out), 1)


# What a row does not see.


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("size", [1e8, 1e12, 1e30])
def test_a_future_key_does_not_reach_earlier_rows_by_its_size(dtype, size):
    q, k, v = (normal(i, (1, 64, 1, 8), dtype) for i in range(3))

    def call(k):
        return dot_product_attention(
            q, k, v, is_causal=True, precision="float16", return_residual=True
        )

    clean, loud = call(k), call(k.at[0, 50].set(size))
    for a, b in zip(clean, loud, strict=True):
        np.testing.assert_array_equal(a[:, :50], b[:, :50])


@pytest.mark.parametrize("window", [None, (12, 3)])
@pytest.mark.parametrize("dtype", some(["bfloat16", "float32"]))
def test_huge_keys_and_values_reach_only_the_tiles_that_visit_them(dtype, window):
    """Bitwise, from both ends where a window leaves out earlier keys."""
    q, k = (normal(i, (1, 100, 2, 8), dtype) for i in range(2))
    v = jnp.full((1, 100, 2, 8), 1e-30, dtype)
    options = {"is_causal": window is None, "local_window_size": window, "schedule": TILES}

    def call(k, v):
        return dot_product_attention(q, k, v, **options, return_residual=True)

    clean = call(k, v)
    assert np.all(np.asarray(clean[0], np.float64) > 0)
    places = [90] if window is None else [3, 90]
    loud = call(*(x.at[0, jnp.asarray(places)].set(3e38) for x in (k, v)))
    rows = slice(0, 64) if window is None else slice(48, 64)
    for a, b in zip(clean, loud, strict=True):
        np.testing.assert_array_equal(a[:, rows], b[:, rows])


def test_the_log_sum_exp_of_scores_beyond_float32():
    """Where the guard divides by more than 2^100: true ones fit, larger ones are the largest."""
    q = jnp.zeros((1, 2, 1, 4)).at[0, 0, 0, 0].set(3e38).at[0, 1, 0, 0].set(1e37)
    k = jnp.zeros((1, 3, 1, 4)).at[0, 0, 0, 0].set(3e38).at[0, 1, 0, 1].set(3e38)
    for scale, of_second in ((1.0, None), (1e-37, 3e38)):
        out, lse = dot_product_attention(
            q, k, k, scale=scale, return_residual=True, implementation="lax"
        )
        assert np.all(np.isfinite(out))
        true = np.minimum(wide(q)[0, :, 0, 0] * 3e38 * scale, np.finfo(np.float32).max)
        np.testing.assert_allclose(wide(lse)[0, :, 0], true, rtol=1e-5)
        assert of_second is None or np.isclose(lse[0, 1, 0], of_second)


# One plan.


@pytest.mark.parametrize(
    "target", only(["cpu", "ascend_910b"], ["h100", "tpu_v6e", "cpu", "ascend_910b"])
)
@pytest.mark.parametrize("implementation", only([None, "reference"], [None, "lax", "reference"]))
def test_explain_and_statistics_agree(target, implementation):
    from pasa_jax import REASONS, SHIFTS

    x = normal(1, (1, 128, 2, 64), "float16")
    schedule = Schedule.for_target(target, head_dim=64, dtype=x.dtype)
    options = {"schedule": schedule, "implementation": implementation}
    told = explain(x, x, x, **options)
    _, seen = dot_product_attention(x, x, x, **options, return_statistics=True)
    shift, reason = SHIFTS[int(seen.shift[0, 0])], REASONS[int(seen.reason[0, 0])]
    assert shift in told.shift
    if "float32" in told.reason and "stored" in told.reason:
        assert reason == "scores are stored in at least float32"
    assert (reason == "the float32 product is seen before it is rounded") == (
        told.shift == "reference"
    )


# Biases that hide.


@pytest.mark.parametrize("implementation", ["lax", "reference"])
@pytest.mark.parametrize("dtype", some(["float32", "bfloat16", "float16"]))
def test_the_lowest_number_of_a_bias_hides_as_minus_infinity_does(implementation, dtype):
    q, k, v = (normal(i, (1, 20, 2, 8)) for i in range(3))
    hide = normal(5, (1, 1, 20, 20)) > 0
    hide = hide.at[0, 0, 7].set(True)
    zero = jnp.zeros(hide.shape, dtype)

    def call(x):
        bias = jnp.where(hide, jnp.asarray(x, dtype), zero)
        return dot_product_attention(
            q, k, v, bias, implementation=implementation, return_residual=True
        )

    lowest, infinite = call(float(jnp.finfo(dtype).min)), call(-jnp.inf)
    for a, b in zip(lowest, infinite, strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.all(np.asarray(lowest[0])[0, 7] == 0)
    assert np.all(np.asarray(lowest[1])[0, 7] == np.finfo(np.float32).min)


@pytest.mark.parametrize("implementation", ["lax", "reference"])
def test_a_nan_in_a_bias_is_seen(implementation):
    q, k, v = (normal(i, (1, 20, 2, 8)) for i in range(3))
    bias = jnp.zeros((1, 1, 20, 20)).at[0, 0, 3, 4].set(jnp.nan)
    out = np.asarray(dot_product_attention(q, k, v, bias, implementation=implementation))
    assert np.all(np.isnan(out[0, 3]))
    assert np.all(np.isfinite(np.delete(out, 3, axis=1)))
    hidden = jnp.ones((1, 1, 20, 20), bool).at[0, 0, 3, 4].set(False)
    out = dot_product_attention(q, k, v, bias, hidden, implementation=implementation)
    assert np.all(np.isfinite(out))


# Scales.


@pytest.mark.parametrize("scale", [1e30, jnp.float32(1e30), -1e38])
@pytest.mark.parametrize(
    "dtype",
    ["float16", *(pytest.param(x, marks=pytest.mark.full) for x in ("bfloat16", "float32"))],
)
def test_a_huge_scale(scale, dtype):
    q = jnp.full((1, 4, 1, 8), 1e4, dtype)
    k = jnp.full((1, 6, 1, 8), 1e4, dtype).at[0, 2].set(9e3)
    v = normal(3, (1, 6, 1, 8), dtype)
    out = dot_product_attention(q, k, v, scale=scale, schedule=TILES)
    expected = wide(v)[0, 2, 0] if scale < 0 else np.delete(wide(v)[0, :, 0], 2, 0).mean(0)
    np.testing.assert_allclose(wide(out)[0, 0, 0], expected, atol=1e-2)


SCALES = {
    "too large": (1e300, "`scale` must be finite in float32; got 1e+300."),
    "complex": (1j, "`scale` must be a real number or a scalar array of one; got 1j."),
    "text": ("x", "`scale` must be a real number or a scalar array of one; got 'x'."),
    "not a number": (np.nan, "`scale` must be finite in float32; got nan."),
}


@pytest.mark.parametrize("name", SCALES)
def test_scales_that_are_refused(name):
    x = normal(1, (1, 4, 1, 8))
    scale, sentence = SCALES[name]
    with pytest.raises(ValueError, match="scale") as error:
        dot_product_attention(x, x, x, scale=scale)
    assert str(error.value) == sentence


# Statistics and log-sum-exp of little.


@pytest.mark.parametrize("shapes", [((2, 0), 5), ((0, 3), 5), ((2, 3), 0)])
def test_statistics_of_nothing(shapes):
    (b, t), s = shapes
    q, k = jnp.zeros((b, t, 4, 8), jnp.float16), jnp.zeros((b, s, 2, 8), jnp.float16)
    out, seen = dot_product_attention(q, k, k, return_statistics=True)
    assert out.shape == (b, t, 4, 8)
    for x in seen:
        assert x.shape == (b, 4)
        assert np.all(np.isfinite(x))


@pytest.mark.full
def test_resonance_of_zeros_and_of_nothing_seen():
    x = normal(1, (2, 8, 2, 8))
    for q, options in ((0 * x, {}), (x, {"mask": jnp.zeros((1, 1, 8, 8), bool)})):
        _, seen = dot_product_attention(q, x, x, **options, return_statistics=True)
        assert np.all(np.asarray(seen.resonance) == 0)


@pytest.mark.parametrize("implementation", ["lax", "reference"])
def test_values_without_channels_have_a_log_sum_exp(implementation):
    q, k = normal(1, (1, 5, 2, 8)), normal(2, (1, 6, 2, 8))
    options = {"return_residual": True, "implementation": implementation}
    out, lse = dot_product_attention(q, k, jnp.zeros((1, 6, 2, 0)), **options)
    assert out.shape == (1, 5, 2, 0)
    np.testing.assert_array_equal(lse, dot_product_attention(q, k, k, **options)[1])


# Spellings.


@pytest.mark.parametrize("dtype", ["float16", np.float16, jnp.float16, jnp.dtype("float16")])
def test_a_schedule_takes_every_spelling_of_a_type(dtype):
    named = Schedule.for_target("ascend_910b", dtype="float16")
    assert Schedule.for_target("ascend_910b", dtype=dtype) == named
    assert named.footprint(head_dim=64, dtype=dtype) == named.footprint(
        head_dim=64, dtype="float16"
    )


def test_a_type_that_a_schedule_does_not_know():
    with pytest.raises(ValueError, match=r"`dtype` must be one of 'float16', .*; got 'int8'"):
        Schedule.for_target("h100", dtype="int8")


X = normal(1, (1, 4, 2, 8))
WRONG = {
    "beta": (
        {"shift": "paper", "beta": "x"},
        "`beta` must lie strictly between 0 and 1; got 'x'.",
    ),
    "implementation": (
        {"implementation": 3},
        "`implementation` must be one of 'pallas_tpu', 'pallas_gpu', 'lax', 'reference', 'xla', "
        "'cudnn'; got 3.",
    ),
    "window": (
        {"local_window_size": 1.5},
        "`local_window_size` must be a non-negative int or a pair of them; got 1.5.",
    ),
    "window of text": (
        {"local_window_size": "ab"},
        "`local_window_size` must be a non-negative int or a pair of them; got 'ab'.",
    ),
    "soft cap": (
        {"logits_soft_cap": 1e-40},
        "`logits_soft_cap` must lie between 1e-30 and 1e30; got 1e-40.",
    ),
    "interpret": (
        {"interpret": True},
        "`interpret` must be False unless a Pallas kernel runs the call; got True beside 'lax'. "
        "Name the kernel, with a schedule for its chip.",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_sentence_of_an_error(name):
    keywords, sentence = WRONG[name]
    with pytest.raises(ValueError, match="must") as error:
        dot_product_attention(X, X, X, **keywords)
    assert str(error.value) == sentence


@pytest.mark.parametrize("window", [2**31 - 1, 2**31, np.iinfo(np.int64).max, (2**40, 0)])
def test_a_window_wider_than_any_sequence(window):
    found = dot_product_attention(X, X, X, local_window_size=window)
    expected = dot_product_attention(X, X, X, is_causal=isinstance(window, tuple))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["xla", "cudnn", ("cudnn",), ["xla", "reference"]])
def test_the_names_that_jax_nn_has(name):
    found = dot_product_attention(X, X, X, implementation=name)
    np.testing.assert_array_equal(found, dot_product_attention(X, X, X, implementation="lax"))


@pytest.mark.parametrize("implementation", ["lax", "reference"])
def test_a_bias_of_integers(implementation):
    q, k, v = (normal(i, (1, 9, 2, 8), "float16") for i in range(3))
    bias = jnp.asarray(np.arange(81).reshape(1, 1, 9, 9) % 7, jnp.int32)
    found, expected = (
        dot_product_attention(q, k, v, x, implementation=implementation)
        for x in (bias, bias.astype(jnp.float32))
    )
    np.testing.assert_array_equal(found, expected)


# Kernels without their chip.


@pytest.mark.parametrize(("name", "target"), [("pallas_tpu", "tpu_v6e"), ("pallas_gpu", "h100")])
class TestKernelsElsewhere:
    def test_say_so(self, name, target):
        schedule = Schedule(block_q=32, block_kv=16, target=target)
        with pytest.raises(BackendUnsupported, match="pass interpret=True to run the kernel step"):
            dot_product_attention(X, X, X, implementation=name, schedule=schedule)

        @jax.jit
        def call(x):
            return dot_product_attention(x, x, x, implementation=name, schedule=schedule)

        with pytest.raises(BackendUnsupported, match="Name 'lax', leave the name out"):
            jax.vmap(call)(X[None])

    def test_say_which_schedule(self, name, target):
        with pytest.raises(
            BackendUnsupported, match=rf"schedule=Schedule.for_target\('{target}'\)"
        ):
            dot_product_attention(X, X, X, implementation=name)

    def test_are_interpreted_on_request(self, name, target):
        arrays = CASES["causal"].arrays("float32")
        schedule = Schedule(block_q=32, block_kv=16, target=target)
        options = {"is_causal": True, "schedule": schedule}
        found = dot_product_attention(**arrays, **options, implementation=name, interpret=True)
        by_lax = dot_product_attention(**arrays, **options, implementation="lax")
        np.testing.assert_allclose(found, by_lax, atol=4e-6)
        assert explain(**arrays, **options, interpret=True).implementation == name


# What the fuzzer found (`make fuzz`).

SIXTEEN = Schedule(block_q=16, block_kv=16)


@pytest.mark.parametrize("dtype", some(["float16", "bfloat16", "float32"]))
@pytest.mark.parametrize("scale", [0.7, 3.0])
def test_the_paper_s_keys_stay_in_their_type(dtype, scale):
    """|K'| is up to twice |K|/α: a power of two of 1/α is left to the product."""
    signs = np.where(np.arange(16) == 0, -1.0, 1.0)[None, :, None, None]
    k = jnp.asarray(float(jnp.finfo(dtype).max) * signs * np.ones((1, 16, 1, 8)), dtype)
    q, v = jnp.full((1, 1, 1, 8), 1e-3, dtype), jnp.asarray(1 - signs * 0.5, dtype)
    out = dot_product_attention(q, k, v, shift="paper", scale=scale, beta=0.9375, schedule=SIXTEEN)
    np.testing.assert_allclose(wide(out), 0.5, rtol=1e-2)


def test_a_sink_beside_scores_beyond_float32():
    k = jnp.full((1, 16, 1, 8), 3e38)
    mask = jnp.zeros((1, 1, 2, 16), bool).at[0, 0, 0].set(True)
    out, lse = dot_product_attention(
        jnp.full((1, 2, 1, 8), 1e36),
        k,
        jnp.ones_like(k),
        mask=mask,
        sinks=jnp.asarray([10.0]),
        schedule=SIXTEEN,
        return_residual=True,
    )
    np.testing.assert_array_equal(out[0, :, 0, 0], [1, 0])
    np.testing.assert_array_equal(lse[0, :, 0], [np.finfo(np.float32).max, 10])


def test_values_that_a_row_does_not_see_in_a_float16_accumulator():
    """A tile's sum of them may be infinite there, and is not to be weighted by 0."""
    z = jnp.zeros((1, 512, 1, 16), jnp.float16)
    out = dot_product_attention(
        z,
        z,
        jnp.full_like(z, 300),
        is_causal=True,
        precision="paper",
        schedule=Schedule(block_q=512, block_kv=256),
    )
    np.testing.assert_allclose(wide(out[:, :200]), 300, rtol=1e-2)  # 200·300 fits float16


def test_gradients_of_the_reference_beside_padding_and_at_the_largest_number():
    z = jnp.zeros((1, 7, 1, 4), jnp.float16)
    one, q = jnp.ones_like(z), z.at[0, 5:].set(jnp.nan)

    def padded(k):
        lengths = jnp.asarray([5])
        return dot_product_attention(
            q, k, one, implementation="reference", query_seq_lengths=lengths
        )

    assert np.all(np.isfinite(jax.grad(lambda k: total(padded(k)))(one)))

    def largest(v):
        return dot_product_attention(z, z, v, implementation="reference")

    found = jax.grad(lambda v: total(largest(v)))(jnp.full_like(z, 65504))
    np.testing.assert_allclose(wide(found), 1, rtol=1e-3)


def test_keys_that_nobody_sees_do_not_decide_whether_a_block_is_shifted():
    k = jnp.full((1, 16, 1, 8), 60000, jnp.float16)
    q = jnp.full((1, 1, 1, 8), 0.123, jnp.float16)
    found = [
        dot_product_attention(
            q,
            k,
            jnp.ones_like(k),
            shift="mean",
            key_value_seq_lengths=jnp.asarray([length]),
            schedule=SIXTEEN,
            return_residual=True,
        )[1].item()
        for length in (15, 16)
    ]
    true = wide(q)[0, 0, 0, 0] * 60000 * 8 / np.sqrt(8)
    np.testing.assert_allclose(found, true + np.log([15, 16]), rtol=1e-6)


def test_the_gradient_of_a_lagging_reference_has_the_forward_pass_s_roundings():
    """Rounded relative to another reference, scores of 10^6 may pass the maximum by thousands."""
    q, k = 1000 * normal(1, (1, 14, 2, 16), "float16"), 1e4 * normal(2, (1, 65, 1, 16), "float16")
    v = normal(3, (1, 65, 1, 4), "float16")
    schedule = Schedule(block_q=16, block_kv=16, target="ascend_910b")

    def gradient(v, **options):
        return jax.grad(lambda v: total(dot_product_attention(q, k, v, scale=1e-2, **options)))(v)

    found = gradient(v, shift="reference", schedule=schedule)
    # Each query gives its weights, which sum to 1, to each channel.
    np.testing.assert_allclose(wide(found).sum(1), 2 * 14, rtol=2e-2)


def test_no_weight_of_a_gradient_is_above_one():
    """`paper` moves m by offsets whose rounding in float32 is larger than 1 at scores of 10^9."""
    q, k = 6e4 * normal(1, (1, 8, 1, 16), "float32"), 6e4 * normal(2, (1, 48, 1, 16), "float32")
    q, k = (jnp.clip(x, -65504, 65504).astype(jnp.float16) for x in (q, k))
    v = normal(3, (1, 48, 1, 4), "float16")
    options = {"shift": "paper", "precision": "float32", "schedule": SIXTEEN}
    found = jax.grad(lambda v: total(dot_product_attention(q, k, v, **options)))(v)
    assert np.all(np.isfinite(wide(found)))
    assert np.all(wide(found) <= 8)  # queries


BEYOND = {
    "a reference in q's type": ("float16", {"shift": "reference", "precision": "bfloat16"}),
    "scores in float32 and a scale above 1": (
        "float16",
        {"shift": "mean", "precision": "float32", "scale": 40.0},
    ),
    "exponentials in float16": (
        "bfloat16",
        {
            "shift": "mean",
            "precision": Precision(
                scores="float16", probabilities="float32", exponential="float16"
            ),
        },
    ),
}


@pytest.mark.parametrize("name", BEYOND)
def test_what_the_guard_had_left_out(name):
    dtype, options = BEYOND[name]
    top = float(jnp.finfo(dtype).max)
    q, k = (top * jnp.sign(normal(i, (1, 12, 1, 16))).astype(dtype) for i in (1, 2))
    v = normal(3, (1, 12, 1, 4), dtype)
    schedule = Schedule(block_q=16, block_kv=16, target="ascend_910b")
    out, lse = dot_product_attention(q, k, v, **options, schedule=schedule, return_residual=True)
    assert np.all(np.isfinite(wide(out)))
    assert np.all(np.isfinite(wide(lse)))


NARROW = Precision(scores="bfloat16", probabilities="bfloat16", statistics="float16")


@pytest.mark.parametrize(
    "options", [{"shift": "none"}, {"precision": NARROW}], ids=["none", "narrow"]
)
def test_values_that_a_row_does_not_see_where_sums_are_not_guarded(options):
    v = jnp.full((1, 32, 1, 4), 3e38, jnp.bfloat16).at[0, 0].set(1.0)
    x = jnp.zeros((1, 32, 1, 8), jnp.bfloat16)
    options = options | {"is_causal": True, "schedule": Schedule(block_q=32, block_kv=16)}
    out = dot_product_attention(x, x, v, **options)
    np.testing.assert_array_equal(out[0, 0], 1)
    # Queries before the first key see none of a tile that the others see, only their sink.
    options = options | {"causal_alignment": "bottom_right", "sinks": jnp.ones(1)}
    out = dot_product_attention(x, x[:, :16], v[:, 16:], **options)
    np.testing.assert_array_equal(out[0, :16], 0)


def test_the_guard_of_float64(x64):
    """Keys that another row of the tile sees make e 1000; the score itself fits."""
    q = jnp.full((1, 2, 1, 4), 1e300, jnp.float64)
    k = jnp.full((1, 3, 1, 4), 1e300, jnp.float64).at[0, 0].set(1.0)
    mask = jnp.asarray([[True, False, False], [True, True, True]])[None, None]
    out, lse = dot_product_attention(q, k, k[..., :1], mask=mask, return_residual=True)
    np.testing.assert_allclose(out[0, 0], 1)
    np.testing.assert_allclose(lse[0, :, 0], [2e300, np.finfo(np.float64).max])
