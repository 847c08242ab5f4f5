"""The tile functions: what they may be made of, and what they compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax import Precision
from pasa_jax.core import tile
from pasa_jax.core.shifts import paper_blocks

R, N, D, E = 16, 32, 8, 4

# What a kernel generator must be able to lower; a new name here is new work there.
ORDINARY = {
    "abs", "add", "and",
        "or", "broadcast_in_dim", "clamp", "convert_element_type", "div",
    "dot_general", "eq", "exp", "ge", "gt", "log", "lt", "max", "min", "mul", "ne", "neg",
    "reduce_max", "reduce_sum", "reshape", "select_n", "square", "sub", "tanh",
}  # fmt: skip


def primitives(jaxpr):
    """Names of the primitives of a jaxpr; `jit` is only a wrapper of others."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("jit", "pjit"):
            yield from primitives(equation.params["jaxpr"].jaxpr)
        else:
            yield equation.primitive.name


def numerics(storage="mean", precision="float16", **options):
    return tile.Numerics(tile.Storage(storage), Precision.named(precision), **options)


def one_tile(q, k, v, kappa, matrix, weights, mask, bias, guard, numerics):
    """Everything that happens to one tile, as one straight line."""
    shifted = {"kappa": kappa} if numerics.storage.uses_kappa else {}
    if numerics.storage is tile.Storage.PAPER:
        shifted = {"matrix": matrix, "weights": weights}
    query = tile.query_tile(q, jnp.float32(0.3), guard, numerics)
    if numerics.storage is tile.Storage.BOUND:
        query = query._replace(reference=jnp.zeros((R, 1), numerics.statistics))
    key = tile.key_tile(
        k, v, jnp.ones((N, 1), bool), numerics, value_gain=jnp.float32(1), **shifted
    )
    state = tile.initial_state(R, E, numerics)
    s = tile.scores(query, key, state, mask, bias, numerics, with_slope=True)
    state = tile.settle(tile.update(state, s, query, key, jnp.float32(1), numerics), numerics)
    state = tile.merge(state, state, numerics)
    state = tile.add_sink(state, jnp.zeros((R, 1), jnp.float32), numerics, query.guard)
    out, lse = tile.finish(state, numerics, query.guard, jnp.float32(1))
    d_out, delta = jnp.zeros((R, E), jnp.float32), jnp.zeros((R, 1), jnp.float32)
    g = tile.gradients(s, query, key, q, k, state.m, state.l, d_out, delta, numerics)
    return out, lse, g


def arguments(dtype="float16", seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = (jnp.asarray(rng.standard_normal(s), dtype) for s in ((R, D), (N, D), (N, E)))
    kappa = jnp.mean(k.astype(jnp.float32), axis=0, keepdims=True).astype(dtype)
    blocks = paper_blocks(N, N, None, 0.3)
    matrix = jnp.asarray(blocks.matrix, jnp.float16)
    mask = jnp.asarray(rng.random((R, N)) > 0.3)
    bias = jnp.asarray(rng.standard_normal((R, N)), jnp.float32)
    one = jnp.ones((R, 1), jnp.float32)
    return (
        q,
        k,
        v,
        kappa,
        matrix,
        jnp.asarray(blocks.weights),
        mask,
        bias,
        tile.Guard(one, one, one, one, one),
    )


@pytest.mark.parametrize("storage", [x.value for x in tile.Storage])
@pytest.mark.parametrize("rounds_products", [True, False])
@pytest.mark.parametrize("precision", ["float16", "float32", "paper"])
def test_a_tile_is_straight_line_code(storage, rounds_products, precision):
    chosen = numerics(storage, precision, rounds_products=rounds_products, logits_soft_cap=30.0)
    jaxpr = jax.make_jaxpr(lambda *x: one_tile(*x, chosen))(*arguments())
    found = set(primitives(jaxpr.jaxpr))
    assert found <= ORDINARY, found - ORDINARY
    assert {"dot_general", "exp"} <= found
    assert ("reduce_max" in found) == (chosen.storage is not tile.Storage.BOUND)


def walk(q, k, v, chosen, blocks, **shifted):
    """State over key blocks, no mask."""
    query = tile.query_tile(q, jnp.float32(0.3), None, chosen)
    state = tile.initial_state(len(q), v.shape[1], chosen)
    for count, block in enumerate(blocks, 1):
        usable = jnp.ones((len(block), 1), bool)
        kappa = jnp.mean(k[block], axis=0, keepdims=True)
        key = tile.key_tile(k[block], v[block], usable, chosen, kappa=kappa, **shifted)
        s = tile.scores(query, key, state, None, None, chosen)
        state = tile.update(state, s, query, key, float(count), chosen)
    return tile.settle(state, chosen), query


def exact(q, k, v, scale=0.3):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    s = q @ k.T * scale
    p = np.exp(s - s.max(1, keepdims=True))
    return p @ v / p.sum(1, keepdims=True), s.max(1) + np.log(p.sum(1))


def test_merging_states_of_split_keys_is_the_whole():
    chosen = numerics("mean", "float32")
    q, k, v, *_ = arguments("float32")
    k = k + 20
    whole, query = walk(q, k, v, chosen, [np.arange(16), np.arange(16, 32)])
    left, _ = walk(q, k, v, chosen, [np.arange(16)])
    right, _ = walk(q, k, v, chosen, [np.arange(16, 32)])
    for state in (whole, tile.merge(left, right, chosen), tile.merge(right, left, chosen)):
        out, lse = tile.finish(state, chosen, query.guard)
        true_out, true_lse = exact(q, k, v)
        np.testing.assert_allclose(out, true_out, atol=1e-5)
        np.testing.assert_allclose(lse[:, 0], true_lse, rtol=1e-5)


def test_merging_with_an_empty_state_changes_nothing():
    chosen = numerics("mean", "float32")
    q, k, v, *_ = arguments("float32")
    state, _ = walk(q, k, v, chosen, [np.arange(32)])
    merged = tile.merge(state, tile.initial_state(R, E, chosen), chosen)
    for a, b in zip(merged, state, strict=True):
        np.testing.assert_array_equal(a, b)


def test_any_kappa_gives_the_same_scores():
    """Eq. 7: what is taken off is put back, whatever it is."""
    chosen = numerics("mean", "float32")
    q, k, v, *_ = arguments("float32")
    query = tile.query_tile(q, jnp.float32(0.3), None, chosen)
    state = tile.initial_state(R, E, chosen)
    usable = jnp.ones((N, 1), bool)
    for kappa in (jnp.zeros((1, D)), jnp.full((1, D), 3.0), k[:1]):
        key = tile.key_tile(k, v, usable, chosen, kappa=kappa)
        s = tile.scores(query, key, state, None, None, chosen)
        total = np.asarray(s.stored + s.base + s.offset)
        np.testing.assert_allclose(total, np.asarray(q @ k.T) * 0.3, atol=1e-5)


def test_paper_restores_what_its_rounded_matrix_removed():
    """Eq. 5: S = S' + Inva·s̄', with Inva from the matrix as rounded."""
    blocks = paper_blocks(N, N, None, 1 / np.sqrt(D))
    chosen = numerics("paper", "float32", inva=blocks.inva)
    q, k, v, *_ = arguments("float32")
    query = tile.query_tile(q, jnp.float32(1), None, chosen)
    key = tile.key_tile(
        k + 10, v, jnp.ones((N, 1), bool), chosen,
        matrix=jnp.asarray(blocks.matrix), weights=jnp.asarray(blocks.weights),
    )  # fmt: skip
    s = tile.scores(query, key, tile.initial_state(R, E, chosen), None, None, chosen)
    total = np.asarray(s.stored + s.base + np.float32(blocks.inva) * s.offset, np.float64)
    plain = np.asarray(q, np.float64) @ np.asarray(k + 10, np.float64).T / np.sqrt(D)
    # M's diagonal is float16: relative error 2⁻¹² of what varies, not of the offset.
    np.testing.assert_allclose(total, plain, atol=5e-3)


def test_scores_are_really_stored_in_sixteen_bits():
    """Under jit too: a compiler that keeps the wider number would flatter every figure."""
    chosen = numerics("none", "float16")
    q, k = jnp.full((1, D), 7.0, jnp.float16), jnp.full((2, D), 9.0, jnp.float16)
    k = k.at[1, 0].set(9.3)
    query = tile.query_tile(q, jnp.float32(10), None, chosen)

    @jax.jit
    def stored(k):
        key = tile.key_tile(k, k, jnp.ones((2, 1), bool), chosen)
        s = tile.scores(query, key, tile.initial_state(1, D, chosen), None, None, chosen)
        return s.stored + s.base

    plain = 10 * np.asarray(q, np.float32) @ np.asarray(k, np.float32).T
    assert not np.array_equal(plain.astype(np.float16), plain)
    np.testing.assert_array_equal(stored(k), plain.astype(np.float16).astype(np.float32))
