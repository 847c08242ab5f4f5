"""The benchmark of low-rank keys, small: its made tasks are what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax.core.rotary import rotated, rotation_below
from tests.scripts import load_script


@pytest.fixture(scope="module")
def bench():
    return load_script("benchmarks", "sals")


@pytest.mark.full
def test_each_head_asks_for_one_token(bench):
    """Dense attention gives nearly all weight to one token in the needle tasks, and not without."""
    largest = {}
    for name, task in bench.tasks(2048):
        query, key = (jnp.asarray(x, jnp.float32) for x in (task.query, task.key))
        turn = rotation_below(2048, jnp.arange(2048, dtype=jnp.int32), bench.SIZE, bench.BASE)
        query = rotated(query[None], (turn[0][-1:], turn[1][-1:]))[0]
        key = jnp.repeat(rotated(key, turn), bench.HEADS // bench.KEY_HEADS, axis=1)
        scores = jnp.einsum("nd,snd->ns", query, key) / np.sqrt(bench.SIZE)
        largest[name] = np.asarray(jax.nn.softmax(scores).max(axis=1))
    assert all(largest[x].min() > 0.8 for x in largest if "needle" in x), largest
    assert largest["weight spread over all keys"].max() < 0.1


@pytest.mark.full
def test_a_small_run(bench, capsys):
    with jax.numpy_dtype_promotion("standard"):
        bench.main(keys=1024, rounds=1, text=0, made=2048)
    shown = capsys.readouterr().out
    assert "12.5 %, append too" in shown
    assert "a needle by its place alone" in shown


@pytest.mark.full
def test_what_it_finds_and_what_it_loses(bench):
    with jax.numpy_dtype_promotion("standard"):
        found = {name: bench.error(task, 64) for name, task in bench.tasks(8192)}
    assert found.pop("a needle, keys of rank 24") < 0.05
    assert all(x > 0.3 for x in found.values()), found
