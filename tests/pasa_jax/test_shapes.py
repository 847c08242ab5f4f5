"""The shapes in signatures hold on running calls, and a wrong shape is refused.

The annotations are strings, and jaxtyping is no dependency at run time: here the functions that
have such annotations are replaced by functions that check them.
"""

import importlib
import inspect
import pkgutil
import sys
import typing

import jax
import jax.numpy as jnp
import pytest

import pasa_jax.core
import pasa_jax.implementations
from pasa_jax import Precision, Schedule, dot_product_attention
from pasa_jax.core import tile
from pasa_jax.implementations import head_walk
from tests.cases import CASES

jaxtyping = pytest.importorskip("jaxtyping")
beartype = pytest.importorskip("beartype")

SHAPES = "pasa_jax.core.shapes"
SKIPPED = ("errors", "checks", "target", "schedule", "precision")  # nothing there has a shape


def modules():
    for package in (pasa_jax.core, pasa_jax.implementations):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if info.name != SHAPES and info.name.rpartition(".")[2] not in SKIPPED:
                yield importlib.import_module(info.name)


def has_shape(function):
    annotations = getattr(function, "__annotations__", {}).values()
    return any("[Array, " in str(x) or "Column" in str(x) for x in annotations)


def functions(module):
    """(owner, name, function) of a module's functions and methods with shapes."""
    owners = [x for x in vars(module).values() if inspect.isclass(x)]
    for owner in [module, *owners]:
        for name, x in list(vars(owner).items()):
            made = name == "__init__"  # by `dataclass`, with the names of other modules
            own = inspect.isfunction(x) and x.__module__ == module.__name__ and not made
            if own and has_shape(x):
                yield owner, name, x


@pytest.fixture(scope="module")
def checked():
    """While it lasts, the functions check their annotations; gives their names."""
    names = {n: x for n, x in vars(importlib.import_module(SHAPES)).items() if n[0].isupper()}
    check = jaxtyping.jaxtyped(typechecker=beartype.beartype)
    patch, replaced, seen = pytest.MonkeyPatch(), {}, []
    for module in modules():
        for name, x in names.items():
            patch.setattr(module, name, x, raising=False)
        for owner, name, function in functions(module):
            typing.get_type_hints(function)  # every name in them is known
            replaced[function] = check(function)
            seen.append(f"{module.__name__}.{function.__qualname__}")
            if owner is not module:
                patch.setattr(owner, name, replaced[function])
    loaded = [x for n, x in sys.modules.items() if n.startswith("pasa_jax")]
    for module in loaded:  # wherever it was imported to
        for name, x in list(vars(module).items()):
            if inspect.isfunction(x) and x in replaced:
                patch.setattr(module, name, replaced[x])
    jax.clear_caches()
    yield seen
    patch.undo()
    jax.clear_caches()


def test_the_central_functions_have_shapes(checked):
    expected = {"tile": 20, "walk": 6, "prepare": 1, "guard": 4, "lax": 2, "pages": 4, "packed": 3}
    for module, least in expected.items():
        assert sum(f".{module}." in name for name in checked) >= least, module


@pytest.mark.parametrize(
    ("name", "target", "shift"),
    [
        ("causal", "cpu", "auto"),
        ("causal", "ascend_910b", "auto"),
        ("bias", "ascend_910b", "reference"),
        ("soft cap", "ascend_910b", "paper"),
        ("sinks", "cpu", "mean_past"),
        ("lengths", "ascend_910b", "reference"),
        ("segments, causal", "cpu", "none"),
        ("one key", "cpu", "paper"),
    ],
)
def test_shapes_hold(checked, name, target, shift):
    case = CASES[name]
    arrays = case.arrays("float16")
    schedule = Schedule(block_q=32, block_kv=16, target=target)

    def loss(q):
        out = dot_product_attention(
            **{**arrays, "query": q}, **case.keywords, schedule=schedule, shift=shift
        )
        return jnp.sum(out.astype(jnp.float32))

    jax.eval_shape(jax.grad(loss), arrays["query"])


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu", "reference"])
def test_shapes_hold_in_the_other_implementations(checked, implementation):
    case = CASES["causal"]
    arrays = case.arrays("bfloat16")
    target = {"pallas_tpu": "tpu_v6e", "pallas_gpu": "h100"}.get(implementation, "cpu")
    schedule = Schedule(block_q=128, block_kv=128, target=target)

    def call(arrays):
        return dot_product_attention(
            **arrays, **case.keywords, schedule=schedule, implementation=implementation
        )

    jax.eval_shape(call, arrays)


def test_a_wrong_shape_is_refused(checked):
    numerics = tile.Numerics(tile.Storage.PLAIN, Precision.named("float32"))
    q, k = jnp.zeros((4, 8)), jnp.zeros((6, 8))
    one = jnp.ones(())
    assert tile.plain_scores(q, k, one, numerics).shape == (4, 6)
    with pytest.raises(jaxtyping.TypeCheckError, match="plain_scores"):
        tile.plain_scores(q, jnp.zeros((6, 7)), one, numerics)  # another head size
    with pytest.raises(jaxtyping.TypeCheckError, match="key_tile"):
        tile.key_tile(k, jnp.zeros((5, 3)), None, numerics)  # another number of keys


def test_a_wrong_shape_within_a_call_is_refused(checked, monkeypatch):
    """Keys [D, S] are found where `prepare` is called, under tracing."""
    prepare = head_walk.prepare
    monkeypatch.setattr(
        head_walk, "prepare", lambda q, k, *rest, **options: prepare(q, k.T, *rest, **options)
    )
    x = jnp.ones((1, 48, 1, 8), jnp.float16)
    with pytest.raises(jaxtyping.TypeCheckError, match="prepare"):
        jax.eval_shape(lambda x: dot_product_attention(x, x, x, implementation="lax"), x)
