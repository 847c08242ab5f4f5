"""Dropout of the attention weights: the same weights everywhere, the same in both passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax import BackendUnsupported, Schedule, dot_product_attention, explain
from pasa_jax.core import dropout as _dropout
from tests.cases import CASES, TILES
from tests.thin import some

KEY = jax.random.key(7)
DROP = {"dropout_rate": 0.3, "dropout_key": KEY}
# Odd lengths move a tile back; one schedule walks head by head.
WALKS = {
    "causal, more keys": TILES,
    "lengths": Schedule(block_q=24, block_kv=50, batch_heads=False),
    "sinks": TILES,
}


def keep_mask(b, n, t, s, rate=0.3, broadcast=False):
    """[B, N, T, S], pair by pair as documented: fold_in of entry, head, query and key."""
    words = jax.random.bits(KEY, (2,), jnp.uint32)
    seed = jax.random.wrap_key_data(words, impl="threefry2x32")
    threshold = np.uint32(round(rate * 2**32))

    def pair(*place):
        key = seed
        for number in place[2:] if broadcast else place:
            key = jax.random.fold_in(key, number)
        return jax.random.key_data(key)[0] >= threshold

    places = np.indices((b, n, t, s)).reshape(4, -1)
    return jax.vmap(pair)(*map(jnp.asarray, places)).reshape(b, n, t, s)


def explicit(q, k, v, kept, rate=0.3, bias=None, mask=None):
    """softmax(q·kᵀ/√D + bias)·kept/(1 − rate)·v, in q's type."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    s = jnp.einsum("btnd,bsnd->bnts", q, k, precision="highest") / np.sqrt(q.shape[3])
    s = s if bias is None else s + bias
    s = s if mask is None else jnp.where(mask, s, -jnp.inf)
    p = jnp.where(kept, jax.nn.softmax(s), 0) / (1 - rate)
    return jnp.einsum("bnts,bsne->btne", p, v, precision="highest")


@pytest.mark.full
@pytest.mark.parametrize(
    ("implementation", "broadcast"),
    [("lax", True), pytest.param("reference", False, marks=pytest.mark.full)],
)
def test_output_and_gradients_are_those_of_the_explicit_mask(implementation, broadcast):
    case = CASES["bias"]
    arrays = case.arrays("float32")
    kept = keep_mask(case.b, case.n, case.t, case.s, broadcast=broadcast)
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((2, 40, 4, 12)), jnp.float32)

    def ours(q, k, v, bias):
        out = dot_product_attention(
            q,
            k,
            v,
            bias,
            **DROP,
            dropout_broadcast=broadcast,
            implementation=implementation,
            schedule=TILES,
        )
        return jnp.sum(out * weights), out

    def theirs(q, k, v, bias):
        out = explicit(q, k, v, kept, bias=bias)
        return jnp.sum(out * weights), out

    operands = tuple(arrays.values())
    found, out = jax.jit(jax.grad(ours, (0, 1, 2, 3), has_aux=True))(*operands)
    true, expected = jax.grad(theirs, (0, 1, 2, 3), has_aux=True)(*operands)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    for a, b in zip(found, true, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("name", some(WALKS))
def test_both_implementations_drop_the_same_weights(name):
    case = CASES[name]
    arrays = case.arrays("float32")

    def run(implementation, schedule):
        def loss(q, k, v):
            out, lse = dot_product_attention(
                **{**arrays, "query": q, "key": k, "value": v},
                **case.keywords,
                **DROP,
                implementation=implementation,
                schedule=schedule,
                return_residual=True,
            )
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(lse > -1e30, lse, 0)), (out, lse)

        operands = arrays["query"], arrays["key"], arrays["value"]
        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*operands)

    found, expected = run("lax", WALKS[name]), run("reference", None)
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("shift", some(["auto", "paper"]))
def test_every_shift_drops_them_in_float16(shift):
    case = CASES["biased"]
    arrays = case.arrays("float16")
    wide = [x.astype(jnp.float32) for x in arrays.values()]
    expected = explicit(*wide, keep_mask(case.b, case.n, case.t, case.s))
    found = dot_product_attention(
        **arrays, **DROP, shift=shift, implementation="lax", schedule=TILES
    )
    dropped, plain = np.asarray(found, np.float32) - expected, np.asarray(expected)
    bound = 6e-2 if shift == "paper" else 4e-3
    assert np.abs(dropped).max() < bound * np.abs(plain).max()


def test_the_log_sum_exp_is_that_of_all_weights():
    arrays = CASES["full"].arrays("float32")
    options = {"return_residual": True, "implementation": "reference"}
    _, plain = dot_product_attention(**arrays, **options)
    _, dropped = jax.jit(lambda: dot_product_attention(**arrays, **DROP, **options))()
    np.testing.assert_allclose(plain, dropped, rtol=1e-6)


def test_the_mean_over_keys_is_the_output_without():
    case = CASES["full"]
    arrays = case.arrays("float32")
    keys = jax.random.split(KEY, 400)

    def one(key):
        return dot_product_attention(
            **arrays, dropout_rate=0.4, dropout_key=key, implementation="reference"
        )

    outs = np.asarray(jax.jit(lambda keys: jax.lax.map(one, keys))(keys))
    error = np.abs(outs.mean(0) - np.asarray(dot_product_attention(**arrays)))
    assert np.all(error < 5.5 * outs.std(0) / np.sqrt(len(keys)) + 1e-6)


def test_rate_0_changes_nothing_that_is_traced():
    arrays = CASES["causal"].arrays("float16")

    def jaxpr(**options):
        loss = lambda q: dot_product_attention(  # noqa: E731
            q, arrays["key"], arrays["value"], is_causal=True, **options
        ).sum()
        return str(jax.make_jaxpr(jax.grad(loss))(arrays["query"]))

    assert jaxpr() == jaxpr(dropout_rate=0.0, dropout_key=KEY, dropout_broadcast=True)


def test_the_share_of_dropped_weights():
    seeds = _dropout.seeds(KEY, 2, 3, broadcast=False)
    places = jnp.arange(200, dtype=jnp.int32)
    for rate in (0.05, 0.5, 0.9):
        kept = np.asarray(_dropout.kept(seeds[1], 3, places, places, rate)).reshape(3, 200, 200)
        assert abs(kept.mean() - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / kept.size)
        for other in (np.roll(kept, 1, axis=0), np.roll(kept, 1, axis=1), np.roll(kept, 1, axis=2)):
            both = np.corrcoef(kept.ravel(), other.ravel())[0, 1]
            assert abs(both) < 5 / np.sqrt(kept.size)


@pytest.mark.parametrize("key", some([jax.random.key(3, impl="rbg"), jax.random.PRNGKey(3)]))
def test_a_key_of_any_kind_drops_the_same_and_another_others(key):
    arrays = CASES["full"].arrays("float32")
    attend = jax.jit(
        lambda key: dot_product_attention(
            **arrays, dropout_rate=0.3, dropout_key=key, implementation="reference"
        )
    )
    a, b = attend(key), attend(KEY)
    np.testing.assert_array_equal(a, attend(key))
    assert not np.allclose(a, b, atol=1e-2)


@pytest.mark.full
def test_checkpoint_and_vmap():
    arrays = CASES["full"].arrays("float32")
    q, k, v = arrays.values()

    def loss(q, key):
        return jnp.sum(jnp.sin(dot_product_attention(q, k, v, dropout_rate=0.3, dropout_key=key)))

    keys = jax.random.split(KEY, 3)
    alone = jax.jit(jax.grad(loss))
    found = jax.jit(jax.vmap(jax.grad(jax.checkpoint(loss)), (None, 0)))(q, keys)
    np.testing.assert_allclose(found, jnp.stack([alone(q, key) for key in keys]), atol=1e-5)


def test_one_head_layout_and_no_keys():
    batched = CASES["full"].arrays("float32")
    batched = {k: v[:1] for k, v in batched.items()}
    attend = jax.jit(
        lambda arrays: dot_product_attention(**arrays, **DROP, implementation="reference")
    )
    alone = attend({k: v[0] for k, v in batched.items()})
    np.testing.assert_array_equal(alone, attend(batched)[0])
    empty = {**batched, "key": batched["key"][:, :0], "value": batched["value"][:, :0]}
    assert not np.any(attend(empty))


X = jnp.zeros((1, 4, 2, 8))
WRONG = {
    "rate": ({"dropout_rate": 1.0}, "`dropout_rate` must be a number in [0, 1); got 1.0."),
    "traced rate": (
        {"dropout_rate": np.ones(())},
        "`dropout_rate` must be a number in [0, 1); got array(1.).",
    ),
    "no key": (
        {"dropout_rate": 0.5},
        "`dropout_key` must be given where dropout_rate is not 0; got None. "
        "jax.random.key(seed) makes one.",
    ),
    "many keys": (
        {"dropout_rate": 0.5, "dropout_key": jax.random.split(KEY, 2)},
        "`dropout_key` must be one key of jax.random; got key<fry>[2].",
    ),
    "not a key": (
        {"dropout_rate": 0.5, "dropout_key": 3},
        "`dropout_key` must be one key of jax.random; got int32[].",
    ),
    "broadcast": (
        {"dropout_broadcast": 2},
        "`dropout_broadcast` must be True or False; got 2.",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name):
    keywords, message = WRONG[name]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        dot_product_attention(X, X, X, **keywords)
    assert str(error.value) == message


def test_the_kernels_leave_it_to_lax():
    schedule = Schedule.for_target("tpu_v5e", head_dim=8)
    with pytest.raises(BackendUnsupported, match="'pallas_tpu': it has no dropout"):
        dot_product_attention(X, X, X, **DROP, schedule=schedule, implementation="pallas_tpu")
    found = explain(X, X, X, **DROP, schedule=schedule)
    assert found.implementation == "lax"
    assert found.why_not["pallas_tpu"] == "it has no dropout"
    gpu = explain(X, X, X, **DROP, schedule=Schedule.for_target("h100", head_dim=8))
    assert gpu.why_not["pallas_gpu"] == "it has no dropout"
