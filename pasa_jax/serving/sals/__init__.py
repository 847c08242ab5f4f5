"""Keys cached in a joint low-rank space, and attention over the few tokens that matter (SALS).

    basis = sals.calibrate(model, text, rank=48)             # once for a model
    caches = sals.LatentCache.empty(basis, 1, 4096, rope_base=model.config.rope_base)
    states, caches = sals.prefill(model, prompt, caches)     # dense attention
    states, caches = sals.step(model, next_tokens, caches)   # sparse attention

Before their rotary positions, the keys of all heads of a layer vary in few directions. A token is
stored by its coordinates along these, and by its values in 8 bits. A query is compared with the
leading coordinates of all tokens; only the best of them get their keys back, rotated, and are
attended, beside the first tokens and the last ones, whose keys are stored as they are.

Source: SALS, arXiv 2510.24273. docs/serving.md says how far it carries, and where it fails.
"""

from pasa_jax.serving.sals._basis import Basis, calibrate
from pasa_jax.serving.sals._cache import LatentCache
from pasa_jax.serving.sals._model import generate, prefill, step

__all__ = ["Basis", "LatentCache", "calibrate", "generate", "prefill", "step"]
