"""Everything runs under strict dtype promotion: an implicit upcast is a failure."""

from collections.abc import Iterator

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
# Compiling takes most of the time of most tests, and their bounds hold with any code.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module")
def optimized() -> Iterator[None]:
    """Machine code as users have it, for numbers at the edges of the types."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def x64():
    """64-bit types for one test."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)
