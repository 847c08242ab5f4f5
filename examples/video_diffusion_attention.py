"""Spatial attention of a video diffusion UNet in 16 bits, where queries and keys resonate.

    python examples/video_diffusion_attention.py    # Stable Video Diffusion's shapes, 2 minutes

The heads of a layer: quiet ones, and ones whose queries and keys are waves along the head's
channels, q_c = A·sin(ωc), k_c = ±B·sin(ωc) plus noise, the same wave at every pixel. Then
q·k ≈ ±A·B·D/2: in phase or against it, a little or ten times beyond float16's 65504
(arXiv 2503.01873 finds such heads in this model). First the attention alone, on the same 16-bit
arrays as its float64 reference. Then the whole block, a third of its heads quiet and the others a
little beyond: there the rounding of q and k to 16 bits counts as well, which no attention can give
back, so the output is compared with that of float32 scores in a 16-bit block, too.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from pasa_jax import dot_product_attention
from pasa_jax.evidence.plain import float64_attention, plain_attention

Array = jax.Array
AttentionFn = Callable[[Array, Array, Array], Array]

LARGEST = 65504.0  # float16's
# Kinds of heads: q·k as a multiple of float16's largest number.
KINDS = {
    "quiet": 0.0,
    "in phase": 1.2,
    "against": -1.2,
    "in phase, ×10": 12.0,
    "against, ×10": -12.0,
}


class Scheme(NamedTuple):
    """One way to compute attention of arrays of a type; ``tiled``: no [T, S] scores are held."""

    dtype: str
    attention: AttentionFn
    tiled: bool


def plain(prescaled: bool) -> AttentionFn:
    return partial(plain_attention, scores="float16", prescaled=prescaled)


WIDE = partial(dot_product_attention, precision="float32")
SCHEMES = {
    "plain, scaled after rounding": Scheme("float16", plain(False), False),
    "plain, query pre-scaled": Scheme("float16", plain(True), False),
    "Flax's": Scheme("float16", linen.dot_product_attention, False),
    "float32 scores": Scheme("float16", WIDE, True),
    "PASA (auto)": Scheme("float16", dot_product_attention, True),
    "bfloat16, float32 scores": Scheme("bfloat16", WIDE, True),
    "bfloat16, PASA (auto)": Scheme("bfloat16", dot_product_attention, True),
}


def waves(level: float, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The waves [D] of a head's queries and keys, whose product is ``level`` times 65504."""
    product = abs(level) * LARGEST * 2 / size  # A·B
    wave = np.sin(2 * np.pi * 3 * np.arange(size) / size)  # its square sums up to D/2
    # Real keys are larger than queries (Qwen2.5's biases make 211 of them).
    return np.sqrt(product) / 5 * wave, np.sign(level) * np.sqrt(product) * 5 * wave


def resonant(tokens: int, heads: int, size: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Queries, keys and values [1, T, N, D], float32."""
    rng = np.random.default_rng(seed)
    query, key, value = rng.standard_normal((3, 1, tokens, heads, size), np.float32)
    for head in range(heads):
        q, k = waves(list(KINDS.values())[head % len(KINDS)], size)
        query[:, :, head] += q
        # The wave multiplies the noise of the keys; this much leaves a softmax over many keys.
        key[:, :, head] *= 1 / max(1.0, np.abs(q).max() / 2)
        key[:, :, head] += k
    return query, key, value


def attention_errors(tokens: int, heads: int, size: int, sample: int) -> dict[str, np.ndarray]:
    """Relative error of each scheme by kind of head, on ``sample`` queries.

    NaN where any output is. Relative to the root mean square of the exact outputs. Schemes that
    hold all scores are given the sampled queries alone: 9216² scores a head are 170 MB in float16.
    """
    arrays = resonant(tokens, heads, size)
    rows = np.random.default_rng(1).choice(tokens, min(sample, tokens), replace=False)
    errors = {}
    for name, scheme in SCHEMES.items():
        query, key, value = (jnp.asarray(x, scheme.dtype) for x in arrays)
        exact = float64_attention(*(np.asarray(x) for x in (query[:, rows], key, value)))
        if scheme.tiled:
            out = jax.jit(scheme.attention)(query, key, value)[:, rows]
        else:
            out = scheme.attention(query[:, rows], key, value)
        squares = np.square(np.asarray(out, np.float64) - exact).mean(axis=(0, 1, 3))
        relative = np.sqrt(squares / np.square(exact).mean(axis=(0, 1, 3)))
        errors[name] = np.array([relative[kind :: len(KINDS)].max() for kind in range(len(KINDS))])
    return errors


class Attention(nnx.Module):
    """Attention of x [B, T, C] to itself or to a context [B, S, E], as diffusers' `Attention`."""

    def __init__(self, width: int, heads: int, context: int, *, rngs: nnx.Rngs) -> None:
        self.q = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        self.k = nnx.Linear(context, width, use_bias=False, rngs=rngs)
        self.v = nnx.Linear(context, width, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(width, width, rngs=rngs)
        self.heads = heads

    def __call__(self, x: Array, context: Array, attention: AttentionFn) -> Array:
        q, k, v = self.q(x), self.k(context), self.v(context)
        q, k, v = (y.reshape(*y.shape[:2], self.heads, -1) for y in (q, k, v))
        return self.out(attention(q, k, v).reshape(x.shape))


class FeedForward(nnx.Module):
    """GEGLU: half of the hidden layer gates the other."""

    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(width, 8 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        hidden, gate = jnp.split(self.up(x), 2, axis=-1)
        return self.down(hidden * jax.nn.gelu(gate, approximate=False))


class TransformerBlock(nnx.Module):
    """diffusers' `BasicTransformerBlock`: self-attention, cross-attention, feed-forward."""

    def __init__(self, width: int, heads: int, context: int, *, rngs: nnx.Rngs) -> None:
        self.norms = nnx.List([nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs) for _ in range(3)])
        self.own = Attention(width, heads, width, rngs=rngs)
        self.cross = Attention(width, heads, context, rngs=rngs)
        self.feed_forward = FeedForward(width, rngs=rngs)

    def __call__(self, x: Array, context: Array, attention: AttentionFn) -> Array:
        h = self.norms[0](x)
        x = x + self.own(h, h, attention)
        x = x + self.cross(self.norms[1](x), context, attention)
        return x + self.feed_forward(self.norms[2](x))


class SpatialTransformer(nnx.Module):
    """diffusers' `Transformer2DModel` with linear projections: each image [B, H, W, C] by itself.

    The context [B, 1, E] is the embedding of the image that the video starts from.
    """

    def __init__(self, width: int, heads: int, context: int, *, rngs: nnx.Rngs) -> None:
        self.norm = nnx.GroupNorm(width, num_groups=32, epsilon=1e-6, rngs=rngs)
        self.inner = nnx.Linear(width, width, rngs=rngs)
        self.block = TransformerBlock(width, heads, context, rngs=rngs)
        self.outer = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x: Array, context: Array, attention: AttentionFn) -> Array:
        h = self.inner(self.norm(x).reshape(x.shape[0], -1, x.shape[-1]))
        return x + self.outer(self.block(h, context, attention)).reshape(x.shape)


def resonate(model: SpatialTransformer, levels: Sequence[float] = (0, 1.2, -1.2)) -> None:
    """Gives the self-attention's heads the waves of these levels, in turn.

    What the norm puts out has the mean 0 over its channels, so a bias of 1 and weights that add
    the channels up put a wave on each query and key, and nothing else.
    """
    block = model.block
    width, bias = block.own.q.kernel.shape[0], block.norms[0].bias
    assert bias is not None
    bias[...] = jnp.ones(width)
    count = block.own.heads
    heads = [waves(levels[head % len(levels)], width // count) for head in range(count)]
    for linear, wave in zip((block.own.q, block.own.k), zip(*heads, strict=True), strict=True):
        kernel = linear.kernel[...]
        # Keys with less noise, as in `resonant`.
        quieter = 1 / 8 if linear is block.own.k else 1.0
        linear.kernel[...] = quieter * (kernel - kernel.mean(axis=0)) + np.concatenate(wave) / width


def block_errors(
    side: tuple[int, int], heads: int, size: int, context: int
) -> dict[str, tuple[float, float]]:
    """Relative differences of what the block adds in 16 bits: from all of it in float32, and from
    the 16-bit block with float32 scores."""
    width = heads * size
    model = SpatialTransformer(width, heads, context, rngs=nnx.Rngs(0))
    resonate(model)
    rng = np.random.default_rng(2)
    image = rng.standard_normal((1, *side, width), np.float32)
    image_embedding = rng.standard_normal((1, 1, context), np.float32)
    graph, state = nnx.split(model)

    @partial(jax.jit, static_argnums=(0, 1))
    def run(attention: AttentionFn, dtype: str) -> Array:
        narrow = nnx.merge(graph, jax.tree.map(lambda x: x.astype(dtype), state))
        x, context = (jnp.asarray(y, dtype) for y in (image, image_embedding))
        return (narrow(x, context, attention) - x).astype(jnp.float32)  # what the block adds

    def difference(out: Array, true: Array) -> float:
        return float(jnp.sqrt(jnp.mean((out - true) ** 2) / jnp.mean(true**2)))

    true = run(partial(plain_attention, scores="float32", prescaled=True), "float32")
    floor = {dtype: run(WIDE, dtype) for dtype in ("float16", "bfloat16")}
    errors = {}
    for name, scheme in SCHEMES.items():
        out = run(scheme.attention, scheme.dtype)
        errors[name] = difference(out, true), difference(out, floor[scheme.dtype])
    return errors


def main(
    shapes: Sequence[tuple[int, int]] = ((9216, 5), (2304, 10)),
    size: int = 64,
    sample: int = 128,
    side: tuple[int, int] = (36, 64),
    heads: int = 10,
    context: int = 1024,
) -> tuple[list[dict[str, np.ndarray]], dict[str, tuple[float, float]]]:
    """Prints and returns the errors of the attention at each shape, and of the block."""
    attentions = []
    for tokens, count in shapes:
        attentions.append(attention_errors(tokens, count, size, sample))
        print(f"attention, {tokens} tokens, {count} heads of {size}: relative error")
        print(" " * 29 + "".join(f"{kind:>15}" for kind in KINDS))
        for name, errors in attentions[-1].items():
            print(f"{name:29}" + "".join(f"{error:15.1e}" for error in errors))
    block = block_errors(side, heads, size, context)
    print(f"the whole block, {side[0]} × {side[1]} pixels, {heads * size} channels: what it adds")
    print(f"{'':29}{'from float32':>15}{'from float32 scores':>21}")
    for name, (from_float32, from_wide) in block.items():
        print(f"{name:29}{from_float32:15.1e}{from_wide:21.1e}")
    return attentions, block


if __name__ == "__main__":
    main()
