"""Examples in documents and docstrings that take too long for `make test`."""

import pytest

SLOW = (
    "docs/diagnose.md",
    "docs/flax.md",
    "docs/masks.md",
    "docs/models.md",
    "docs/parallel.md",
    "pasa_jax/diagnostics/_collect.py",
    "pasa_jax/models/decoder.py",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith(SLOW):
            item.add_marker(pytest.mark.full)
