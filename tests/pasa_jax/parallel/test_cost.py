"""The formulas of costs beside the compiled programs: bytes by the collectives, operations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax import parallel
from pasa_jax.parallel import __main__, plan
from pasa_jax.parallel._cost import CHIPS
from tests.gallery import QUICKLY
from tests.pasa_jax.parallel import trials
from tests.pasa_jax.parallel.collectives import collectives
from tests.pasa_jax.parallel.devices import on_devices
from tests.thin import only

SIZES = (2, 256, 256, 8, 2, 64)  # B, T, S, N, K, D
SCHEMES = {"all_gather": None, "ulysses": None, "ring": None, "ring_ulysses": 2}


def compiled(scheme, gradient):
    b, t, s, n, k, d = SIZES
    mesh = trials.mesh(("s",), (4,))
    attend = parallel.attention_fn(
        mesh, sequence="s", scheme=scheme, ulysses_devices=SCHEMES[scheme]
    )

    def forward(q, k, v):
        # The plain formula has no loops, whose operations the compiler would count once.
        return attend(q, k, v, implementation="reference")

    def loss(q, k, v):
        return jnp.sum(jnp.square(forward(q, k, v)))

    shapes = ((b, t, n, d), (b, s, k, d), (b, s, k, d))
    place = jax.NamedSharding(mesh, jax.P(None, "s"))
    x = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place) for shape in shapes]
    f = jax.grad(loss, (0, 1, 2)) if gradient else forward
    return jax.jit(f, compiler_options=QUICKLY).lower(*x).compile()


@pytest.mark.parametrize("gradient", only([False], [False, True]))
@pytest.mark.parametrize("scheme", only(["ring", "ulysses"], SCHEMES))
@on_devices
def test_formulas_beside_the_program(scheme, gradient):
    (cost,) = [
        x
        for x in plan(
            4, *SIZES, jnp.float32, False, chip="cpu", ulysses_devices=SCHEMES[scheme] or 2
        ).costs
        if x.scheme == scheme
    ]
    program = compiled(scheme, gradient)
    found = collectives(program.as_text())
    expected = cost.sent + (cost.sent_backward if gradient else 0)
    sent = sum(x.sent for x in found if x.kind != "all-reduce")
    assert sent == pytest.approx(expected, rel=0.01), found
    kinds = {
        "all_gather": {"all-gather"},
        "ulysses": {"all-to-all"},
        "ring": {"collective-permute"},
        "ring_ulysses": {"all-to-all", "collective-permute"},
    }
    forward = {x.kind for x in found} - {"all-reduce", "reduce-scatter"}
    assert forward == kinds[scheme]
    if scheme == "ring" and not gradient:
        assert len(found) == 3 * 2  # K and V, one rotation fewer than devices
    if not gradient:
        operations = program.cost_analysis()["flops"]
        assert cost.operations < operations < 1.2 * cost.operations


def test_the_share_that_the_busiest_device_computes():
    """Beside counts of the pairs."""
    for causal, balanced in ((True, False), (True, True), (False, False)):
        tokens, c = 64, 4
        positions = np.arange(tokens)
        if balanced:
            positions = parallel.zigzag(positions, c, axis=0)
        seen = positions[:, None] >= positions[None] if causal else np.ones((tokens, tokens), bool)
        most = max(x.mean() for x in np.split(seen, c))
        found = plan(c, 1, tokens, tokens, 4, 4, 8, causal=causal, balanced=balanced).costs
        (ring,) = [x for x in found if x.scheme == "ring"]
        share = ring.operations / (2 * 4 * tokens * tokens / c * 16)
        assert share == pytest.approx(most, abs=0.02)


@pytest.mark.parametrize(("causal", "window"), [(True, (9, 0)), (False, (9, 4)), (True, (99, 0))])
def test_a_window_leaves_less_to_compute(causal, window):
    tokens, c = 64, 4
    apart = np.arange(tokens)[:, None] - np.arange(tokens)
    seen = (apart <= window[0]) & (apart >= (0 if causal else -window[1]))
    most = max(x.mean() for x in np.split(seen, c))
    costs = plan(c, 1, tokens, tokens, 4, 4, 8, causal=causal, window=window).costs
    whole = plan(c, 1, tokens, tokens, 4, 4, 8, causal=causal).costs
    for cost, other in zip(costs, whole, strict=True):
        share = cost.operations / (2 * 4 * tokens * tokens / c * 16)
        assert cost.operations <= other.operations
        assert cost.sent == other.sent
        if cost.scheme == "ring":
            assert most - 0.02 < share < most + 0.12  # the first queries see less


def test_what_is_chosen():
    few = plan(4, 1, 65536, 65536, 32, 8, 128, chip="tpu_v5e")
    assert few.chosen.scheme in ("all_gather", "ulysses")
    odd = plan(8, 1, 65536, 65536, 28, 4, 128, chip="tpu_v5e")
    assert "8 devices do not divide 28 query heads" in str(odd)
    assert odd.chosen.scheme != "ulysses"
    long = plan(256, 1, 2**22, 2**22, 32, 8, 128, chip="tpu_v5e", balanced=True)
    assert long.chosen.scheme in ("ring", "ring_ulysses")
    assert long.chosen.memory < CHIPS["tpu_v5e"].memory
    full = plan(2, 1, 2**22, 2**22, 32, 8, 128, chip="tpu_v5e")
    assert "none fits" in full.reason
    with pytest.raises(ValueError, match=r"`chip` must be one of 'tpu_v5e'"):
        plan(2, 1, 1, 1, 1, 1, 1, chip="abacus")
    with pytest.raises(ValueError, match=r"`N` must be positive; got 0"):
        plan(2, 1, 1, 1, 0, 1, 1)


def test_the_table(capsys):
    __main__.main(["--chip", "h100", "--balanced"])
    table = capsys.readouterr().out
    assert "On paper" in table
    assert "4096k" in table
    assert "from 4" in table
