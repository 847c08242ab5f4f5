"""The TPU's backward pass: against float64, and against the lax walk from the same residuals."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import tpu
from pasa_jax import Schedule, dot_product_attention
from pasa_jax.call.api import canonical
from pasa_jax.call.backends import choose
from pasa_jax.implementations import lax
from tests.cases import CASES, Case
from tests.pallas_kernels.test_tpu import LARGE
from tests.pasa_jax.test_gradients import float64_gradients, loss_of, relative
from tests.thin import only

TILES = Schedule(block_q=128, block_kv=128, target="tpu_v6e")
SMALL = dataclasses.replace(TILES, block_q=32, block_kv=16)
OPTIONS = {"implementation": "pallas_tpu", "interpret": True, "schedule": TILES}
INTERPRETED = pytest.mark.usefixtures("tpu_interpreter")
MANY_TILES = LARGE | {
    "full, odd lengths": Case(b=2, t=150, s=200, n=2, k=1),
    "bottom right, lengths": Case(
        t=200,
        s=300,
        keywords={
            "query_seq_lengths": np.asarray([130, 200], np.int32),
            "key_value_seq_lengths": np.asarray([290, 0], np.int32),
            "is_causal": True,
            "causal_alignment": "bottom_right",
        },
    ),
    "soft cap, sinks": Case(
        b=1,
        t=200,
        s=150,
        keywords={"logits_soft_cap": 5.0, "sinks": np.asarray([0.5, -1, 2, 30], np.float32)},
    ),
    "bias, soft cap, sinks, lengths": Case(
        t=200,
        s=150,
        bias=(1, 4, 200, 150),
        keywords={
            "logits_soft_cap": 5.0,
            "sinks": np.asarray([0.5, -1, 2, 30], np.float32),
            "query_seq_lengths": np.asarray([130, 200], np.int32),
            "key_value_seq_lengths": np.asarray([140, 0], np.int32),
        },
    ),
    "bias, segments": dataclasses.replace(LARGE["many tiles, segments"], bias=(1, 1, 1, 300)),
    "bias, window": dataclasses.replace(LARGE["many tiles, window"], bias=(1, 1, 400, 400)),
    "bias, keys that nobody sees": Case(
        b=1, t=150, s=300, n=1, k=1, bias=(1, 1, 150, 300), keywords={"is_causal": True}
    ),
    "bias of one query": Case(t=1, s=200, bias=(2, 4, 1, 200)),
    "bias of one key": Case(t=150, s=1, bias=(2, 4, 150, 1)),
}
# Every shape that a bias may have: queries and keys of several tiles, the last of which are short.
BIASES = list(itertools.product((2, 1), (4, 1), (150, 1), (200, 1)))


def gradients(case, dtype, **options):
    arrays = case.arrays(dtype)
    loss, operands = loss_of(case, arrays, **OPTIONS | options)
    return jax.jit(jax.grad(loss))(operands), float64_gradients(case, arrays)


def both(case, dtype, arrays=None, **options):
    """The arguments of both backward passes, and what `float64_gradients` takes.

    The result is that of the lax walk in the kernel's plan: the guard's units are 1 for such data.
    """
    arrays = arrays or case.arrays(dtype)
    call = canonical(**arrays, **case.keywords, **OPTIONS | options)
    plan = choose("pallas_tpu", call.operands, call.mask, call.plan).plan
    result = jax.jit(lambda o: lax.forward(o, call.mask, plan, wanted="residuals"))(call.operands)
    result = result._replace(by_lax=jnp.bool_(False))
    rng = np.random.default_rng(3)  # the cotangents of `loss_of`
    d_out = jnp.asarray(rng.standard_normal(result.out.shape), jnp.float32).astype(dtype)
    d_lse = jnp.asarray(rng.standard_normal(result.lse.shape), jnp.float32)
    return (call.operands, call.mask, plan, result, d_out, d_lse), arrays


def check_many_tiles(case, arrays=None):
    call, arrays = both(case, "float32", arrays)
    assert tpu.no_backward(*call[:3]) is None
    found = tpu.backward_kernel(*call)
    for argument, true in float64_gradients(case, arrays).items():
        assert relative(getattr(found, argument), true) < 2e-5, argument
    return found


@INTERPRETED
@pytest.mark.parametrize("name", only(["bottom right, lengths"], MANY_TILES))
def test_many_tiles_against_float64(name):
    check_many_tiles(MANY_TILES[name])


@INTERPRETED
@pytest.mark.parametrize("shape", only([], BIASES))
def test_bias_against_float64(shape):
    """The later keys are in no tile of the first queries."""
    case = Case(t=150, s=200, bias=shape, keywords={"is_causal": True})
    found = check_many_tiles(case)
    assert found.bias.shape == shape


@INTERPRETED
@pytest.mark.full
@pytest.mark.parametrize("hidden", [-np.inf, np.finfo(np.float32).min])
def test_what_a_bias_hides_has_no_gradient(hidden):
    case = Case(b=1, t=20, s=150, n=2, k=1, d=8, e=8, bias=(1, 1, 20, 150))
    arrays = case.arrays("float32")
    hides = np.random.default_rng(0).random(case.bias) < 0.3
    hides[:, :, 3], hides[..., 130:] = True, True  # a whole row, and all that is seen of a tile
    arrays["bias"] = jnp.where(hides, hidden, arrays["bias"])
    found = check_many_tiles(case, arrays)
    assert not np.any(np.asarray(found.bias)[hides])


@INTERPRETED
@pytest.mark.full
@pytest.mark.parametrize(
    "name",
    [
        *("one query", "one key", "multi-query", "bottom right, fewer keys", "window"),
        *("lengths", "lengths, bottom right", "no key at all", "mask", "mask of keys"),
        *("segments, causal", "soft cap, causal, biased", "sinks", "negative scale"),
        *("bias", "bias, broadcast", "bias of rows"),
    ],
)
def test_named_cases_against_float64(name):
    case = CASES[name]
    tiled = case.bias or case.mask or "segment_ids" in case.keywords
    found, true = gradients(case, "float32", schedule=TILES if tiled else SMALL)
    for argument in true:
        assert relative(found[argument], true[argument]) < 2e-5, argument


def rms(found, true):
    found = np.asarray(found, np.float64)
    return np.sqrt(np.mean((found - true) ** 2) / np.mean(true**2))


@INTERPRETED
@pytest.mark.parametrize("shift", only(["reference"], ["reference", "none", "mean", "mean_past"]))
@pytest.mark.parametrize("dtype", only([], ["bfloat16", "float16"]))
def test_errs_no_more_than_the_lax_walk(dtype, shift):
    case = Case(b=1, t=200, s=200, n=2, k=1, d=64, e=64, offset=4, keywords={"is_causal": True})
    case = dataclasses.replace(case, bias=(1, 2, 200, 200))
    call, arrays = both(case, dtype, shift=shift)
    found, by_lax = tpu.backward(*call), jax.jit(lax.backward, static_argnums=2)(*call)
    for argument, true in float64_gradients(case, arrays).items():
        if argument != "scale":  # one number, in which errors cancel by chance
            ours, theirs = (rms(getattr(x, argument), true) for x in (found, by_lax))
            assert ours < 1.2 * theirs, (argument, ours, theirs)
    assert any(np.any(a != b) for a, b in zip(found[:3], by_lax[:3], strict=True))


@INTERPRETED
@pytest.mark.full
def test_what_the_lax_walk_computed_it_also_reverses():
    """Its m may be divided by the guard's 2^e, which the kernel does not know."""
    case = Case(b=1, t=20, s=30, n=1, k=1, d=16, e=16)
    (operands, mask, plan, _, *cotangents), _ = both(case, "float32", scale=1e37)
    result = jax.jit(lambda o: tpu.forward(o, mask, plan, wanted="residuals"))(operands)
    assert bool(result.by_lax)
    found, by_lax = (
        jax.jit(lambda o, r: f(o, mask, plan, r, *cotangents))(operands, result)  # noqa: B023
        for f in (tpu.backward, lax.backward)
    )
    for name in ("query", "key", "value"):
        true = getattr(by_lax, name)
        assert np.any(true != 0)
        np.testing.assert_allclose(getattr(found, name), true, rtol=1e-5)


@INTERPRETED
def test_what_a_masked_key_holds_does_not_matter():
    """Not even in a tile that the forward pass, whose tiles are smaller, does not visit."""
    arrays = Case(b=1, t=20, s=200, n=1, k=1, d=16, e=16).arrays("float32")
    lengths = {"key_value_seq_lengths": jnp.asarray([100], jnp.int32)}

    @jax.jit
    @jax.grad
    def grad(arrays):
        return jnp.sum(jnp.sin(dot_product_attention(**arrays, **lengths, **OPTIONS)))

    clean = grad(arrays)
    for name in ("key", "value"):
        arrays[name] = arrays[name].at[0, 100:].set(jnp.nan)
    for name, found in grad(arrays).items():
        np.testing.assert_allclose(found, clean[name], atol=1e-6)


@pytest.mark.full
@pytest.mark.usefixtures("two_tpu_cores")
def test_two_cores_write_no_place_twice():
    case = dataclasses.replace(MANY_TILES["full, odd lengths"], bias=(1, 2, 150, 1))
    check_many_tiles(case)


class TestChoice:
    def test_a_short_call_is_not(self):
        assert self.reason(8) is None

    def reason(self, length, bias=None):
        x = jnp.zeros((1, 8, 1, 128), jnp.float32)
        call = canonical(x, x, x, bias=bias, **OPTIONS)
        plan = choose("pallas_tpu", call.operands, call.mask, call.plan).plan
        longer = call.operands._replace(query=jax.ShapeDtypeStruct((1, length, 1, 128), x.dtype))
        return tpu.no_backward(longer, call.mask, plan)

    @pytest.mark.parametrize(("heads", "kernel"), [(8, True), (9, False)])
    def test_a_large_bias_that_many_heads_share_is_left_to_lax(self, heads, kernel):
        def zeros(*shape):
            return jnp.zeros(shape, jnp.float32)

        x, bias = zeros(1, 40, heads, 8), zeros(1, 1, 40, 128)
        key = zeros(1, 128, heads, 8)
        call = canonical(x, key, key, bias=bias, **OPTIONS)
        plan = choose("pallas_tpu", call.operands, call.mask, call.plan).plan
        reason = tpu.no_backward(call.operands, call.mask, plan)
        shared = "the gradient of the bias, which heads share, would be written 9 times"
        assert reason == (None if kernel else shared)

    def test_a_small_bias_that_many_heads_share_is_not(self):
        assert self.reason(8, jnp.zeros((1, 1, 1, 8), jnp.float32)) is None
