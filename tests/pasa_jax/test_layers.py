"""Imports go in one direction, and the sister packages use the inner interface alone."""

import ast
from pathlib import Path

import pytest

import pasa_jax

ROOT = Path(pasa_jax.__file__).parents[1]
CORE, WALK, CALL = "pasa_jax.core", "pasa_jax.implementations", "pasa_jax.call"
SPARSE = "pasa_jax.sparse"
# package -> what it may import of these three packages, itself included
ALLOWED = {
    "pasa_jax/core": (CORE,),
    "pasa_jax/implementations": (CORE, WALK),
    "pasa_jax/call": (CORE, WALK, CALL),
    "pasa_jax/sparse": ("pasa_jax", CORE, SPARSE),
    "pallas_kernels": ("pallas_kernels", "pasa_jax", CORE, f"{WALK}.lax", f"{WALK}.page_walk"),
    "npu_bridge": ("npu_bridge", "pasa_jax", CORE),
}
# It compiles a call without the repair, so it resolves the arguments as the public function does.
EXCEPTIONS = {"pallas_kernels/aot.py": (CALL,)}


def imports(path):
    """(module, name or "") of each import of pasa_jax, pallas_kernels or npu_bridge."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found = [(node.module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found = [(alias.name, "") for alias in node.names]
        else:
            continue
        yield from (
            x
            for x in found
            if x[0] and x[0].partition(".")[0] in ("pasa_jax", "pallas_kernels", "npu_bridge")
        )


def within(module, name, package):
    """Whether an import of ``name`` from ``module`` is one from ``package``."""
    if package == "pasa_jax":  # the public names
        return module == "pasa_jax" and (not name or name in pasa_jax.__all__)
    return any(x == package or x.startswith(f"{package}.") for x in (module, f"{module}.{name}"))


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_go_in_one_direction(folder):
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert paths
    for path in paths:
        place = path.relative_to(ROOT).as_posix()
        packages = ALLOWED[folder] + EXCEPTIONS.get(place, ())
        for module, name in imports(path):
            assert any(within(module, name, x) for x in packages), (place, module, name)


@pytest.mark.parametrize("folder", ["pallas_kernels", "npu_bridge"])
def test_sister_packages_use_no_private_name_of_pasa_jax(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for module, name in imports(path):
            if module.startswith("pasa_jax"):
                private = [x for x in (*module.split("."), name) if x.startswith("_")]
                assert not private, (path.name, module, name)
