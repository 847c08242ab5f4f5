"""Which heads overflow in float16, and what the default does about it.

    python examples/find_the_overflow.py

Keys of some heads are given the bias that real models show; the statistics tell which, the output
is compared with float64.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pasa_jax import dot_product_attention
from pasa_jax.evidence.plain import float64_attention, plain_attention


def main(length: int = 512, heads: int = 4, dim: int = 64) -> dict[str, np.ndarray]:
    """Prints a line per head; returns the errors by head, plain and ours."""
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((1, length, heads, dim)) for _ in range(3))
    loud = np.arange(heads) % 2 == 1  # every other head
    query[:, :, loud] += 90
    key[:, :, loud] += 110
    query, key, value = (jnp.asarray(x, jnp.float16) for x in (query, key, value))

    attention = jax.jit(
        lambda q, k, v: dot_product_attention(q, k, v, is_causal=True, return_statistics=True)
    )
    ours, statistics = attention(query, key, value)
    plain = plain_attention(query, key, value, scores="float16", prescaled=True, is_causal=True)
    exact = float64_attention(np.asarray(query), np.asarray(key), np.asarray(value), is_causal=True)

    def error(out: jax.Array) -> np.ndarray:
        return np.abs(np.asarray(out, np.float64) - exact).max(axis=(0, 1, 3))

    errors = {"plain": error(plain), "ours": error(ours)}
    for head in range(heads):
        print(f"head {head}: {statistics.describe(head, batch=0)}")
        print(f"        error: plain {errors['plain'][head]:.1e}, ours {errors['ours'][head]:.1e}")
    return errors


if __name__ == "__main__":
    main()
