"""What is particular to the GPU kernel: head sizes, float16 products and exponentials."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax import Precision, Schedule, dot_product_attention, explain
from pasa_jax.core.errors import BackendUnsupported
from tests.cases import CASES, Case, exact
from tests.pasa_jax.test_contract import BOUND, check
from tests.thin import only, some

TILES = Schedule(block_q=32, block_kv=16, target="h100")
OURS = {"implementation": "pallas_gpu", "interpret": True, "schedule": TILES}
HALF = Precision(scores="float16", probabilities="float16", products="float16")


@pytest.mark.parametrize("d", only([80], [64, 80, 96, 192]))
def test_head_sizes(d):
    case = Case(t=40, s=50, n=2, k=1, d=d, e=d, keywords={"is_causal": True})
    check(case, "float16", BOUND["float16"], **OURS)


@pytest.mark.parametrize(
    "name", some(["biased", "causal", "lengths, bottom right", "mask of keys"], 4, 2)
)
@pytest.mark.parametrize("shift", ["auto", "mean"])
def test_float16_products(name, shift):
    check(CASES[name], "float16", 1e-2, shift=shift, precision=HALF, **OURS)


def test_float16_exponentials():
    precision = Precision(probabilities="float16", exponential="float16")
    check(CASES["causal"], "float16", 3e-3, precision=precision, **OURS)


@pytest.mark.full
def test_float16_products_of_huge_values_stay_finite():
    arrays = {name: x * 1000 for name, x in CASES["biased"].arrays("float16").items()}
    arrays["value"] = jnp.full_like(arrays["value"], 60000)  # sums of them leave float16
    for name in ("pallas_gpu", "lax"):
        options = {"implementation": name, "schedule": TILES, "precision": HALF}
        options["interpret"] = name != "lax"
        found = dot_product_attention(**arrays, **options).astype(jnp.float32)
        np.testing.assert_allclose(found, 60000, rtol=2e-3)


@pytest.mark.full
def test_vmap():
    arrays = CASES["causal"].arrays("float32")
    twice = {name: jnp.stack([x, 2 * x]) for name, x in arrays.items()}
    found = jax.vmap(lambda a: dot_product_attention(**a, **OURS))(twice)
    for i in range(2):
        alone = dot_product_attention(**{name: x[i] for name, x in twice.items()}, **OURS)
        np.testing.assert_allclose(found[i], alone, atol=2e-6)


class TestChoice:
    arrays = CASES["causal"].arrays("float16")

    def test_none_takes_the_kernel_for_a_gpu_and_says_what_it_stores(self):
        told = explain(**self.arrays, is_causal=True, schedule=TILES)
        assert told.implementation == "pallas_gpu"
        assert told.precision == Precision(scores="float32", probabilities="float16")

    def test_none_runs_on_the_cpu_too(self):
        out = dot_product_attention(**self.arrays, is_causal=True, schedule=TILES)
        true, _ = exact(self.arrays, {"is_causal": True})
        np.testing.assert_allclose(np.asarray(out, np.float64), true, atol=3e-3)

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"shift": "paper", "precision": "paper"}, "it keeps float32 statistics"),
            ({"shift": "reference", "precision": HALF}, "'reference' needs a float32 product"),
            (
                {"schedule": dataclasses.replace(TILES, block_kv=24)},
                "schedule.block_kv must be a power of two of at least 16, and is 24",
            ),
        ],
    )
    def test_what_it_cannot_do(self, options, reason):
        with pytest.raises(BackendUnsupported, match=reason):
            dot_product_attention(**{**self.arrays, **OURS, **options})

    def test_float16_products_are_for_float16_inputs(self):
        arrays = CASES["causal"].arrays("bfloat16")
        with pytest.raises(ValueError, match='products="float32"'):
            dot_product_attention(**arrays, precision=HALF)
