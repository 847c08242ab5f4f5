"""Attention in 16-bit arithmetic that cannot overflow and loses no accuracy, for JAX."""

from pasa_jax._api import Explanation, dot_product_attention, explain
from pasa_jax._errors import BackendUnsupported, ScheduleError
from pasa_jax.mask import Mask
from pasa_jax.precision import Precision
from pasa_jax.schedule import Schedule
from pasa_jax.shifts import SHIFTS, optimal_beta
from pasa_jax.statistics import Statistics
from pasa_jax.target import TARGETS, Target

__version__ = "0.1.0"

__all__ = [
    "SHIFTS",
    "TARGETS",
    "BackendUnsupported",
    "Explanation",
    "Mask",
    "Precision",
    "Schedule",
    "ScheduleError",
    "Statistics",
    "Target",
    "dot_product_attention",
    "explain",
    "optimal_beta",
]
