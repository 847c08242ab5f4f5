"""How much of a bias a low rank keeps, and what that costs attention (FlashBias).

    python examples/low_rank_bias.py    # half a minute

Two biases that models hold as T × S numbers for each head. A table of relative positions, as Swin's
windows have: one number for each offset of two pixels, smooth with noise, as trained tables are. A
pair bias, as AlphaFold's blocks have: features of each pair of residues, projected to a number for
each head. `LowRankBias.from_svd` takes the leading singular vectors; the error is that of float16
attention with them beside float16 attention with the whole bias, relative to the largest output.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pasa_jax import LowRankBias, dot_product_attention
from pasa_jax.core.low_rank import energy_of_ranks


def swin_bias(width: int, heads: int, noise: float, rng: np.random.Generator) -> np.ndarray:
    """[N, T, T] of a window of width² pixels, from a table [(2·width − 1)², N]."""
    offsets = np.arange(1 - width, width)
    far = np.hypot(offsets[:, None], offsets[None])
    reach = width * np.geomspace(0.4, 1.5, heads)
    table = 4 * np.exp(-((far[..., None] / reach) ** 2))
    table += noise * rng.standard_normal(table.shape)
    row, column = np.divmod(np.arange(width**2), width)
    rows, columns = (x[:, None] - x[None] + width - 1 for x in (row, column))
    return np.moveaxis(table[rows, columns], -1, 0)


def pair_bias(length: int, heads: int, noise: float, rng: np.random.Generator) -> np.ndarray:
    """[N, T, T] of a chain that folds: the distances of two residues in space and along it."""
    chain = np.cumsum(rng.standard_normal((length, 3)), axis=0)
    apart = np.linalg.norm(chain[:, None] - chain[None], axis=-1)
    along = np.abs(np.arange(length)[:, None] - np.arange(length)[None])
    centres = np.linspace(0, apart.max(), 16)
    bins = np.exp(-(((apart[..., None] - centres) / (centres[1] - centres[0])) ** 2))
    pair = np.concatenate([bins, np.exp(-along[..., None] / np.asarray([2.0, 8.0, 32.0]))], axis=-1)
    pair += noise * rng.standard_normal(pair.shape)
    projection = rng.standard_normal((pair.shape[-1], heads)) / np.sqrt(pair.shape[-1])
    return np.moveaxis(pair @ projection, -1, 0)


@jax.jit
def attend(arrays: list[jax.Array], bias: jax.Array | LowRankBias) -> jax.Array:
    query, key, value = arrays
    return dot_product_attention(query, key, value, bias)


def measure(bias: np.ndarray, ranks: tuple[int, ...]) -> dict[int, tuple[float, float]]:
    """By rank: the share of the energy of the worst head, and the error of attention."""
    heads, length, _ = bias.shape
    shares = energy_of_ranks(np.linalg.svd(bias, compute_uv=False)).min(axis=0)
    arrays = [
        jax.random.normal(x, (1, length, heads, 32), jnp.float16)
        for x in jax.random.split(jax.random.key(0), 3)
    ]
    whole = np.asarray(attend(arrays, jnp.asarray(bias[None], jnp.float32)), np.float64)

    def error(rank: int) -> float:
        out = np.asarray(attend(arrays, LowRankBias.from_svd(bias, rank=rank)), np.float64)
        return float(np.abs(out - whole).max() / np.abs(whole).max())

    return {rank: (float(shares[rank - 1]), error(rank)) for rank in ranks}


def main(
    width: int = 14,
    length: int = 196,
    heads: int = 4,
    ranks: tuple[int, ...] = (2, 8, 32, 128),
) -> dict[str, dict[int, tuple[float, float]]]:
    """Prints a line for each rank; returns the shares and errors."""
    rng = np.random.default_rng(0)
    found = {}
    for noise in (0.0, 0.05):
        for name, make, size in (("Swin", swin_bias, width), ("pair", pair_bias, length)):
            bias = make(size, heads, noise, rng)
            name = f"{name}, noise {noise}"
            chosen = LowRankBias.from_svd(bias, energy=0.995)
            print(f"{name}: T = {bias.shape[1]}; 99.5 % need rank {jnp.shape(chosen.q_factors)[2]}")
            found[name] = measure(bias, ranks)
            for rank, (share, error) in found[name].items():
                numbers = 2 * rank / bias.shape[1]
                print(
                    f"  rank {rank:3d}: {100 * share:6.2f} % of the energy, "
                    f"error {error:.1e}, {100 * numbers:3.0f} % of the numbers"
                )
    return found


if __name__ == "__main__":
    main()
