"""Queries, keys and values of the tests, and what the definitions say of them, in NumPy."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from pasa_jax.evidence.plain import numpy_attention


def arrays(t=40, s=40, n=2, k=1, d=8, b=1, dtype="float32", seed=0, size=2.0):
    """q [b, t, n, d], k and v [b, s, k, d], normal with this standard deviation."""
    rng = np.random.default_rng(seed)
    shapes = ((b, t, n, d), (b, s, k, d), (b, s, k, d))
    return tuple(jnp.asarray(size * rng.standard_normal(x), dtype) for x in shapes)


def weights(q, k):
    """The causal softmax of one head, q [T, D] and k [S, D], the last query at the last key."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    scores = q @ k.T / np.sqrt(q.shape[1])
    scores = np.where(causal(len(q), len(k)), scores, -np.inf)
    p = np.exp(scores - scores.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def causal(t, s):
    return np.arange(s)[None] <= np.arange(t)[:, None] + s - t


def blocks(seen, size):
    """[rows, columns] bool: whether ``seen`` [T, S] is True somewhere in each block."""
    t, s = seen.shape
    padded = np.pad(seen, ((0, -t % size), (0, -s % size)))
    return padded.reshape(-(-t // size), size, -(-s // size), size).any(axis=(1, 3))


def kept(block_mask) -> Any:
    """[B, N, rows, columns] bool."""
    found = np.zeros(block_mask.kv_indices.shape, bool)
    parts = ("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices")
    for number, index in ([np.asarray(getattr(block_mask, x)) for x in part] for part in parts):
        for place in np.ndindex(number.shape):
            found[place][index[place][: number[place]]] = True
    return found


def attention(q, k, v, visible: Any = True):
    """[B, T, N, E] float64: attention over the keys visible [B|1, N|1, T, S], causal besides."""
    visible = np.broadcast_to(visible, (len(q), q.shape[2], q.shape[1], k.shape[1]))
    visible = visible & causal(q.shape[1], k.shape[1])
    entries = zip(*(np.asarray(x) for x in (q, k, v)), visible, strict=True)
    return np.stack([numpy_attention(*x, visible=seen) for *x, seen in entries])


def relative(got, exact):
    return np.linalg.norm(np.asarray(got, np.float64) - exact) / np.linalg.norm(exact)
