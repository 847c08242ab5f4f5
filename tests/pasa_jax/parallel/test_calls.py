"""How the schemes are called: in shard_map, by plug-ins, for statistics; and what is refused."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pasa_jax import dot_product_attention, parallel
from tests.gallery import QUICKLY
from tests.pasa_jax.parallel import trials
from tests.pasa_jax.parallel.devices import on_devices
from tests.pasa_jax.parallel.test_schemes import OPTIONS, over_four
from tests.thin import only


def quickly(f, *arguments):
    return jax.jit(f, compiler_options=QUICKLY)(*arguments)


def arrays(t=40, s=40, n=4, k=2, dtype="float32"):
    return [trials.Trial(t=t, s=s, n=n, k=k).operands(dtype)[x] for x in ("query", "key", "value")]


@pytest.mark.full
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("scheme", OPTIONS)
@on_devices
def test_inside_of_shard_map(scheme, check_vma):
    """Local queries, keys and segments; rows of the bias; whole lengths."""
    mesh = trials.mesh(("s",), (4,))
    q, k, v = arrays()
    bias = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 40, 40)), jnp.float32)
    segments = jnp.asarray(np.repeat([[0, 1, 2]], [10, 10, 20], axis=1).repeat(2, 0), jnp.int32)
    lengths = jnp.asarray([40, 33], jnp.int32)
    static = {"is_causal": True, "schedule": trials.TILES, "return_residual": True}
    local = partial(
        getattr(parallel, scheme), axis_name="s", implementation="lax", **OPTIONS[scheme], **static
    )
    rows = P(None, "s")

    def over_devices(q, k, v, bias):
        return jax.shard_map(
            lambda q, k, v, bias, ids: local(
                q, k, v, bias, segment_ids=ids, key_value_seq_lengths=lengths
            ),
            mesh=mesh,
            in_specs=(rows, rows, rows, P(None, None, "s"), rows),
            out_specs=(rows, rows),
            check_vma=check_vma,
        )(q, k, v, bias, segments)

    def alone(q, k, v, bias):
        options = {"segment_ids": segments, "key_value_seq_lengths": lengths, **static}
        return dot_product_attention(q, k, v, bias, implementation="reference", **options)

    def loss(f):
        def of(*x):
            out, lse = f(*x)
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.sin(lse)), out

        return jax.grad(of, (0, 1, 2, 3), has_aux=True)

    found, true = (quickly(loss(f), q, k, v, bias) for f in (over_devices, alone))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(true), strict=True):
        np.testing.assert_allclose(a, b, atol=4e-5)


@pytest.mark.full
@pytest.mark.parametrize("heads", [4, 6])
@pytest.mark.parametrize("scheme", OPTIONS)
@on_devices
def test_statistics_are_those_of_the_whole(scheme, heads):
    """Six heads are no multiple of four devices: every device looks at all."""
    if heads == 6 and scheme == "ulysses":
        return
    q, k, v = arrays(n=heads)
    static = {"is_causal": True, "return_statistics": True, "schedule": trials.TILES}
    attend = over_four(scheme)
    _, found = quickly(partial(attend, **static), q, k, v)
    _, true = quickly(partial(dot_product_attention, **static), q, k, v)
    for name in true._fields:
        a, b = getattr(found, name), getattr(true, name)
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=name)


@on_devices
def test_a_ring_inside_of_shard_map():
    """As above, without gradients."""
    rows = P(None, "s")
    local = partial(parallel.ring, axis_name="s", is_causal=True, implementation="reference")
    run = jax.shard_map(local, mesh=trials.mesh(("s",), (4,)), in_specs=(rows,) * 3, out_specs=rows)
    found = quickly(run, *arrays())
    np.testing.assert_allclose(
        found,
        dot_product_attention(*arrays(), is_causal=True, implementation="reference"),
        atol=1e-5,
    )


@on_devices
def test_flax_modules():
    """By configuration alone: nnx, `patch`, linen, and a changed `jax.nn`."""
    from flax import linen, nnx

    from pasa_jax.plugins import linen as for_linen
    from pasa_jax.plugins import nnx as for_nnx
    from pasa_jax.plugins import patch, replace_jax_nn

    attend = over_four("all_gather", implementation="reference")
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 12, 32)), jnp.float32)
    mask = jnp.tril(jnp.ones((12, 12), bool))
    model = nnx.MultiHeadAttention(4, 32, decode=False, rngs=nnx.Rngs(0))
    plain = quickly(lambda x: model(x, mask=mask), x)
    with patch(model, attention=attend):
        np.testing.assert_allclose(quickly(lambda x: model(x, mask=mask), x), plain, atol=1e-5)
    equal = over_four("all_gather", implementation="reference")
    assert for_nnx.attention_fn(attention=equal) is for_nnx.attention_fn(attention=attend)
    module = linen.MultiHeadDotProductAttention(4)
    variables = module.init(jax.random.key(0), x)
    plain = quickly(lambda x: module.apply(variables, x, mask=mask), x)
    ours = linen.MultiHeadDotProductAttention(
        4, attention_fn=for_linen.attention_fn(attention=attend)
    )
    found = quickly(lambda x: ours.apply(variables, x, mask=mask), x)
    np.testing.assert_allclose(found, plain, atol=1e-5)
    plain = quickly(partial(jax.nn.dot_product_attention, is_causal=True), *arrays())
    with replace_jax_nn(attention=attend):
        found = quickly(
            lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True), *arrays()
        )
    np.testing.assert_allclose(found, plain, atol=1e-5)


@on_devices
def test_unbatched_empty_and_without_a_sequence():
    q, k, v = arrays()
    attend = over_four("all_gather", implementation="reference")
    alone = partial(dot_product_attention, implementation="reference")
    first = (q[0], k[0], v[0])
    np.testing.assert_allclose(quickly(attend, *first), quickly(alone, *first), atol=1e-5)
    assert not np.any(attend(q, k[:, :0], v[:, :0]))
    both = {"return_residual": True}
    out, lse = quickly(partial(attend, **both), q, k, v[..., :0])
    assert out.shape == (2, 40, 4, 0)
    np.testing.assert_allclose(lse, quickly(partial(alone, **both), q, k, v)[1], atol=1e-5)
    mesh = trials.mesh(("b", "h"), (2, 4))  # two key heads for four devices
    only_batch = parallel.attention_fn(mesh, batch="b", heads="h", implementation="reference")
    drops = {"is_causal": True, "dropout_rate": 0.2, "dropout_key": jax.random.key(0)}
    found, true = (quickly(partial(f, **drops), q, k, v) for f in (only_batch, alone))
    np.testing.assert_allclose(found, true, atol=1e-5)


def message(f, *arguments, **options):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        f(*arguments, **options)
    return str(error.value)


@on_devices
def test_what_is_refused():
    q, k, v = arrays(n=6)
    mesh = trials.mesh(("s",), (4,))
    said = message(over_four("ulysses"), q, k, v)
    assert said == (
        "`query` must have a number of heads that 4 devices divide, for 'ulysses'; got 6. Take the "
        "scheme 'ring' or 'all_gather', or 'ring_ulysses' with fewer devices that share heads "
        "(ulysses_devices)."
    )
    said = message(parallel.attention_fn, mesh, sequence="s", scheme="ring_ulysses")
    assert said.startswith("`ulysses_devices` must be given for 'ring_ulysses'")
    said = message(
        parallel.attention_fn, mesh, sequence="s", scheme="ring_ulysses", ulysses_devices=3
    )
    assert said == "`ulysses_devices` must divide the 4 devices of the sequence; got 3."
    said = message(parallel.attention_fn, mesh, sequence="t")
    assert said == "`sequence` must be one of 's'; got 't'."
    said = message(parallel.attention_fn, mesh, sequence="s", scheme="spiral")
    assert said.startswith("`scheme` must be one of 'auto', 'all_gather'")
    said = message(parallel.attention_fn, mesh, sequence="s", batch="s")
    assert said == "`mesh` must give each of its axes to one of batch, heads and sequence; got s."
    said = message(parallel.attention_fn(mesh, batch="s"), q, k, v)
    assert "`query` must have a batch axis that the 4 devices of ('s',) divide; got 2." in said
    said = message(over_four("ring"), q, k, v, shift="bound", score_mod=lambda s, *_: s)
    assert said.startswith("`shift` must be another than 'bound'")
    for scheme in OPTIONS:  # what dot_product_attention refuses, all refuse alike
        said = message(over_four(scheme), q, k, v, sinks=jnp.zeros(3))
        assert said == message(dot_product_attention, q, k, v, sinks=jnp.zeros(3))


@on_devices
def test_inside_of_shard_map_block_masks_are_refused():
    from pasa_jax import create_block_mask

    q, k, v = arrays()
    blocks = create_block_mask(trials.ahead_mod, None, None, 40, 40, (8, 8))
    local = partial(parallel.ring, axis_name="s", block_mask=blocks)
    rows = P(None, "s")
    mesh = trials.mesh(("s",), (4,))
    said = message(jax.shard_map(local, mesh=mesh, in_specs=(rows,) * 3, out_specs=rows), q, k, v)
    assert said == (
        "`block_mask` must be None inside of shard_map; got something else. "
        "`pasa_jax.parallel.attention_fn` takes one."
    )


@on_devices
def test_the_scheme_is_chosen_and_explained():
    attend = parallel.attention_fn(trials.mesh(("s",), (4,)), sequence="s")
    x = jax.ShapeDtypeStruct((1, 4096, 8, 64), jnp.bfloat16)
    told = attend.explain(x, x, x, is_causal=True)
    assert told.scheme in OPTIONS
    assert "it is the fastest" in told.reason
    assert told.device.implementation == "lax"
    assert f"scheme          {told.scheme}" in str(told)
    assert all(name in str(told) for name in OPTIONS)
    asked = over_four("ring").explain(x, x, x, schedule=replace(trials.TILES, block_kv=768))
    assert asked.reason == "it was asked for"
    assert asked.blocks.startswith("a device's 1024 keys are no multiple of block_kv=768")
    odd = jax.ShapeDtypeStruct((1, 4096, 7, 64), jnp.bfloat16)
    assert attend.explain(odd, odd, odd).scheme != "ulysses"


def held(scheme, devices, length=4096, *, gradient=True):
    """Bytes that a device needs beside the inputs."""
    mesh = trials.mesh(("s",), (devices,))
    attend = parallel.attention_fn(mesh, sequence="s", scheme=scheme, **OPTIONS[scheme])
    place = jax.NamedSharding(mesh, P(None, "s"))
    x = jax.ShapeDtypeStruct((1, length, 8, 64), jnp.float32, sharding=place)

    def loss(q, k, v):
        return jnp.sum(jnp.square(attend(q, k, v, is_causal=True)))

    f = jax.grad(loss, (0, 1, 2)) if gradient else loss
    run = jax.jit(f, compiler_options=QUICKLY)
    memory = run.lower(x, x, x).compile().memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes


@pytest.mark.full
@pytest.mark.parametrize("scheme", OPTIONS)
@on_devices
def test_memory_on_paper_is_that_of_the_program(scheme):
    (cost,) = [
        x
        for x in parallel.plan(
            8, 1, 4096, 4096, 8, 8, 64, jnp.float32, chip="cpu", ulysses_devices=2
        ).costs
        if x.scheme == scheme
    ]
    inputs = 3 * 4096 // 8 * 8 * 64 * 4
    assert 0.5 < (held(scheme, 8) + inputs) / cost.memory < 2


@pytest.mark.parametrize("scheme", only([], OPTIONS))
@on_devices
def test_memory_falls_with_the_number_of_devices(scheme):
    found = [held(scheme, c) for c in (2, 4, 8)]
    assert found == sorted(found, reverse=True)
    if scheme != "all_gather":  # which has all keys everywhere
        assert found[2] < 0.5 * found[0], found


@pytest.mark.parametrize("gradient", only([False], [False, True]))
@on_devices
def test_a_ring_never_holds_all_keys(gradient):
    part = 2 * 4096 * 8 * 64 * 4 / 8  # of K and V in float32
    tiles = 12 * 512 * 512 * 4
    # Two parts of the keys and the output; and of their gradients, those of queries and outputs.
    assert held("ring", 8, gradient=gradient) < (8 if gradient else 4) * part + tiles
