"""A part of a longer sequence in a kernel, which a ring gives it: queries that stand elsewhere."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax import Schedule
from pasa_jax.call.api import canonical
from pasa_jax.call.backends import BACKENDS


@pytest.mark.full
@pytest.mark.parametrize("place", [24, -8])
def test_a_kernel_sees_what_the_lax_walk_sees(place):
    """Interpreted on one device: its callbacks wait for each other on several."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 32, 2, 16)), jnp.float32) for _ in range(3))
    tiles = Schedule(block_q=32, block_kv=16, target="tpu_v6e")
    call = canonical(q, k, v, is_causal=True, local_window_size=(30, 0), schedule=tiles)
    mask, plan = replace(call.mask, place=place), replace(call.plan, interpret=True)
    results = []
    for name in ("lax", "pallas_tpu"):
        adapted = BACKENDS[name].adapt(plan)
        forward, _ = BACKENDS[name].passes(call.operands, mask, adapted, anywhere=False)
        results.append(forward(call.operands, mask, adapted, wanted="lse"))
    np.testing.assert_allclose(results[0].out, results[1].out, atol=1e-5)
    np.testing.assert_allclose(results[0].lse, results[1].lse, atol=1e-5)
