"""The errors of npu_bridge."""

from __future__ import annotations


class LoweringError(NotImplementedError):
    """A traced operation has no instruction here."""


class PlanError(ValueError):
    """A kernel does not fit the chip."""


class EmulationError(RuntimeError):
    """The host emulator could not run a kernel."""
