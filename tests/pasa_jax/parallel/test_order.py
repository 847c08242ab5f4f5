"""The orders of tokens: what a device holds, and the way back."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax import dot_product_attention, parallel


@pytest.mark.parametrize(
    ("order", "inverse"),
    [
        (parallel.zigzag, parallel.inverse_zigzag),
        (parallel.striped, parallel.inverse_striped),
    ],
)
def test_there_and_back(order, inverse):
    tree = {"tokens": np.arange(48).reshape(2, 24), "positions": jnp.arange(48).reshape(2, 24)}
    there = order(tree, 4)
    assert isinstance(there["tokens"], np.ndarray)
    assert not np.array_equal(there["tokens"], tree["tokens"])
    for name, x in inverse(there, 4).items():
        np.testing.assert_array_equal(x, tree[name])


def test_every_device_has_as_much_to_do():
    positions = np.arange(64)
    work = {"natural": positions}
    work["zigzag"] = parallel.zigzag(positions, 4, axis=0)
    work["striped"] = parallel.striped(positions, 4, axis=0)
    seen = {
        name: [int((x[:, None] >= positions).sum()) for x in np.split(order, 4)]
        for name, order in work.items()
    }
    assert max(seen["natural"]) > 6 * min(seen["natural"])
    assert len(set(seen["zigzag"])) == 1
    assert max(seen["striped"]) < 1.1 * min(seen["striped"])


def test_tokens_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="a number of tokens that 8 divides; got 12"):
        parallel.zigzag(np.zeros((1, 12)), 4)
    with pytest.raises(ValueError, match="`devices` must be a positive int; got 0"):
        parallel.striped(np.zeros((1, 12)), 0)
    with pytest.raises(ValueError, match="`axis` must be an axis of x, which has 1; got 1"):
        parallel.striped(np.zeros(12), 2)


def test_functions_of_positions():
    """A function of permuted tokens gives what it gives of those in order."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, 16, 2, 8)), jnp.float32)
    positions = np.arange(16, dtype=np.int32)

    def near(b, h, q, kv, head_data):
        return (kv <= q) & (q - kv < 5 + head_data)

    function, moved = parallel.by_position(near), parallel.zigzag(x, 2)
    data = {"position": parallel.zigzag(positions, 2, axis=0)}
    given = {"q_data": data, "kv_data": data, "head_data": jnp.asarray([0, 3], jnp.int32)}
    attend = partial(dot_product_attention, implementation="reference")
    found = attend(moved, moved, moved, mask_mod=function, **given)
    true = attend(x, x, x, mask_mod=near, head_data=given["head_data"])
    np.testing.assert_allclose(parallel.inverse_zigzag(found, 2), true, atol=1e-6)
