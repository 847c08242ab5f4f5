"""PASA under Keras 3 on JAX: one context around the call that is traced.

    pip install keras
    python examples/keras_on_jax.py

Keras' attention layers call `jax.nn.dot_product_attention` (where there is no dropout and no
scores are asked for). It logs whatever exception that raises and falls back to its own code, so
look at the log once: a call that we refuse does not stop the program.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax.numpy as jnp
import keras  # pyright: ignore[reportMissingImports]
import numpy as np

from pasa_jax.plugins import replace_jax_nn


def main(length: int = 256, bias: float = 200.0) -> dict[str, float]:
    """Prints and returns how far a layer's outputs lie apart, relative to the largest."""
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).standard_normal((1, length, 64)).astype(np.float32)
    layer = keras.layers.MultiHeadAttention(4, 32)
    layer(x, x)
    weights = [w + bias if w.shape == (4, 32) else w for w in layer.get_weights()]
    errors = {}
    for dtype in ("float16", "bfloat16"):
        narrow = keras.layers.MultiHeadAttention(4, 32, dtype=dtype)
        narrow(x, x)
        narrow.set_weights(weights)
        with replace_jax_nn():
            ours = narrow(x, x, use_causal_mask=True)
        theirs = narrow(x, x, use_causal_mask=True)
        errors[dtype] = float(jnp.abs(ours - theirs).max() / jnp.abs(theirs).max())
        print(f"{dtype:8}  difference {errors[dtype]:.1e}")
    return errors


if __name__ == "__main__":
    main()
