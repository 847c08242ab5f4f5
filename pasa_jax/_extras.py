"""Packages that only an extra installs, imported on use."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, extra: str) -> Any:
    """The module, or an error that names the extra which installs it.

    Raises:
      ModuleNotFoundError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise  # it is there, and something that it needs is not
        way_out = f'pip install "pasa-jax[{extra}]"'
        raise ModuleNotFoundError(f"{module} is not installed: {way_out}", name=module) from error
