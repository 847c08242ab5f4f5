"""The TPU kernel's fixed references: safe where the row sums say so, computed again elsewhere."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import tpu
from pallas_kernels._tpu_walk import Specs
from pasa_jax import TARGETS, Schedule, dot_product_attention, explain
from pasa_jax.call.api import canonical
from pasa_jax.call.backends import choose
from pasa_jax.core import tile
from tests.cases import CASES, exact
from tests.pallas_kernels.test_both import tiles
from tests.pallas_kernels.test_tpu import BY_LANES, LARGE
from tests.pasa_jax.test_contract import BOUND, check
from tests.thin import only, some_tuples

INTERPRETED = pytest.mark.usefixtures("tpu_interpreter")
KERNEL = {"implementation": "pallas_tpu", "interpret": True}
TILES = Schedule(block_q=128, block_kv=128, tiles_per_program=2, target="tpu_v6e")


def whether_again(arrays, **options):
    """Whether the kernel says that something must be computed again."""
    call = canonical(**arrays, **KERNEL, **options)
    plan = choose("pallas_tpu", call.operands, call.mask, call.plan).plan
    _, again = jax.jit(lambda o, m: tpu.kernel(o, m, plan, wanted="out"))(call.operands, call.mask)
    return bool(again)


def compared(arrays, **options):
    """The largest error against float64."""
    out = dot_product_attention(**arrays, **KERNEL, **options)
    keywords = {k: v for k, v in options.items() if k not in ("schedule", "shift")}
    true, _ = exact(arrays, keywords)
    return np.abs(np.asarray(out, np.float64) - true).max()


def arrays_of(s=256, n=1, d=16, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=(1, s, n, d)), jnp.float32)
        for name in ("query", "key", "value")
    }


@INTERPRETED
@pytest.mark.parametrize("name", only(["lengths, bottom right"], CASES))
def test_contract(name):
    schedule = dataclasses.replace(tiles("pallas_tpu", CASES[name]), tiles_per_program=2)
    check(CASES[name], "float32", BOUND["float32"], shift="bound", schedule=schedule, **KERNEL)


@INTERPRETED
@pytest.mark.parametrize(
    ("name", "target"),
    some_tuples([(x, y) for x in LARGE for y in ("tpu_v5e", "tpu_v6e")], 10, 1),
)
def test_programs_of_several_tiles(name, target):
    schedule = dataclasses.replace(BY_LANES, block_q=128, tiles_per_program=2, target=target)
    check(LARGE[name], "float32", 6e-6, schedule=schedule, **KERNEL)


@INTERPRETED
@pytest.mark.parametrize("causal", [False, True])
def test_ordinary_data_is_computed_once(causal):
    assert not whether_again(arrays_of(), is_causal=causal, schedule=TILES)


@INTERPRETED
def test_what_lies_beyond_the_rows_and_keys_does_not_matter():
    """Memory there is NaN, which must not send the call to the lax walk."""
    assert not whether_again(arrays_of(s=250), is_causal=True, schedule=TILES)


@INTERPRETED
def test_rows_that_see_nothing_are_not_computed_again():
    lengths = {"key_value_seq_lengths": jnp.asarray([0])}
    assert not whether_again(arrays_of(), schedule=TILES, **lengths)


@INTERPRETED
@pytest.mark.parametrize("score", only([300.0], [300.0, -300.0]))
def test_a_score_far_from_its_block_mean(score):
    """One key lies far above the others; or the only key that the first row sees far below."""
    arrays = arrays_of()
    direction = jnp.ones((16,), jnp.float32)
    arrays["query"] = jnp.broadcast_to(direction, arrays["query"].shape)
    at = 200 if score > 0 else 0
    arrays["key"] = arrays["key"].at[0, at, 0].set(score * 4 / 16 * direction)
    assert whether_again(arrays, is_causal=True, schedule=TILES)
    assert compared(arrays, is_causal=True, schedule=TILES) < 4e-6


@INTERPRETED
@pytest.mark.full
def test_tiny_values_keep_their_digits():
    arrays = arrays_of()
    arrays["value"] = arrays["value"] * 1e-37
    out = dot_product_attention(**arrays, **KERNEL, schedule=TILES)
    true, _ = exact(arrays, {})
    np.testing.assert_allclose(np.asarray(out, np.float64), true, atol=1e-5 * np.abs(true).max())


@INTERPRETED
@pytest.mark.parametrize(
    ("name", "options"),
    some_tuples([(x, {"shift": y}) for x in LARGE for y in ("auto", "mean", "mean_past")], 15, 0),
)
def test_keys_in_chunks(name, options, monkeypatch):
    """Where VMEM is a little too small for all keys of a head."""
    case = LARGE[name]
    schedule = dataclasses.replace(BY_LANES, block_q=128)
    call = canonical(**case.arrays("float32"), **case.keywords, schedule=schedule, **options)
    plan = choose("pallas_tpu", call.operands, call.mask, call.plan).plan
    of_call = (call.operands, call.mask, plan)
    share = (Specs.of(*of_call).bytes - 1) / TARGETS["tpu_v6e"].memories["VMEM"]
    jax.clear_caches()
    monkeypatch.setattr("pallas_kernels._tpu_walk._VMEM_SHARE", share)
    assert Specs.of(*of_call).chunks > 1
    precision = None if options["shift"] == "auto" else "float32"
    check(case, "float32", 6e-6, schedule=schedule, precision=precision, **options, **KERNEL)
    jax.clear_caches()


def test_auto_takes_it_unless_a_precision_is_named():
    arrays = arrays_of()
    told = explain(**arrays, schedule=TILES)
    assert told.shift == "bound or none"
    assert "each query tile decides" in told.reason
    assert explain(**arrays, schedule=TILES, precision="float32").shift == "none"


@pytest.mark.parametrize(
    ("l", "value", "fine"),
    [
        (1.0, 1.0, True),
        (2.0**-80, 8.0, True),
        (2.0**-81, 8.0, False),
        (2.0**-79, 0.25, False),
        (2.0**-80, 0.0, True),
        (0.0, 1.0, False),
        (np.inf, 1.0, False),
        (np.nan, 1.0, False),
    ],
)
def test_what_a_sum_says(l, value, fine):  # noqa: E741
    assert bool(tile.in_range_by_sum(jnp.float32(l), jnp.float32(value))) is fine


@pytest.mark.parametrize("storage", ["none", "mean", "reference", "bound"])
def test_transposed_tiles_compute_the_same(storage):
    """Scores, state and result of a tile [n, R] are those of [R, n]."""
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(x, 16)), jnp.float32) for x in (24, 40))
    v, bias = (jnp.asarray(rng.normal(size=x), jnp.float32) for x in ((40, 8), (24, 40)))
    mask = jnp.asarray(rng.random((24, 40)) < 0.7).at[3].set(False)

    def result(transposed):
        plan = canonical(q[None, :, None], k[None, :, None], v[None, :, None], shift=storage).plan
        dialect = tile.Dialect(transposed=transposed, running_maximum=True, contracts=False)
        numerics = dataclasses.replace(plan, dialect=dialect).numerics(40)
        query = tile.query_tile(q, jnp.float32(0.25), None, numerics)
        query = query._replace(reference=jnp.full(numerics.column_shape(24), 2.0))
        kappa = jnp.mean(k, axis=0, keepdims=True) if storage == "mean" else None
        key = tile.key_tile(k, v, None, numerics, kappa=kappa)
        state = tile.initial_state(24, 8, numerics)
        turned = (mask.T, bias.T) if transposed else (mask, bias)
        s = tile.scores(query, key, state, *turned, numerics)
        state = tile.settle(tile.update(state, s, query, key, 1.0, numerics), numerics)
        out, lse = tile.finish(state, numerics, None)
        return (out.T, lse.T) if transposed else (out, lse)

    for a, b in zip(result(False), result(True), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
