"""BERT encoders, such as sentence-transformers' all-MiniLM-L6-v2, with PASA's attention.

Devlin et al., arXiv 1810.04805; the numbers are those of Hugging Face's `BertModel`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

import pasa_jax
from pasa_jax.core.errors import wrong
from pasa_jax.models._checks import brief, epsilon, inside, integer
from pasa_jax.models._files import read_config, read_tensors
from pasa_jax.models._weights import Tensors, checked_dtype, fill

Array = jax.Array
# (query, key, value [B, T, N, D], lengths [B] or None, layer []) -> [B, T, N, D]
AttentionFn = Callable[[Array, Array, Array, Array | None, Array], Array]

# Fields of `BertModel` of which one value is implemented here.
_ONLY = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "quantization_config": None,
}
_SIZES = ("vocabulary", "max_length", "types", "layers", "heads", "width", "hidden")
_DEFAULTS = {**_ONLY, "model_type": None, "type_vocab_size": 2, "layer_norm_eps": 1e-12}


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The sizes of a BERT encoder.

    Arguments:
      vocabulary, types: rows of the embeddings of words and of segments.
      max_length: the most positions that the model was trained for.
      layers, heads: how many; ``width`` is a multiple of ``heads``.
      width, hidden: of the activations, and of the feed-forward's inner layer.
      epsilon: added to the variance in each layer norm; in (0, 1].

    Raises:
      ValueError: a number out of its range; a width that the heads do not divide.
    """

    vocabulary: int
    max_length: int
    types: int
    layers: int
    heads: int
    width: int
    hidden: int
    epsilon: float

    def __post_init__(self) -> None:
        for name in _SIZES:
            integer(name, getattr(self, name))
        epsilon("epsilon", self.epsilon)
        if self.width % self.heads:
            raise wrong("heads", f"divide the width {self.width}", self.heads)

    @staticmethod
    def from_hf(config: Mapping[str, Any]) -> EncoderConfig:
        """From a Hugging Face config.json; what it leaves out is as in `BertConfig`.

        Raises:
          ValueError: a size is missing, or the model does what is not implemented here.
        """
        for name, only in _ONLY.items():
            if (seen := _entry(config, name)) != only:
                allowed = f"be {only!r}: nothing else is implemented"
                raise wrong(f"config.{name}", allowed, brief(seen))
        return EncoderConfig(
            vocabulary=_size(config, "vocab_size"),
            max_length=_size(config, "max_position_embeddings"),
            types=_size(config, "type_vocab_size"),
            layers=_size(config, "num_hidden_layers"),
            heads=_size(config, "num_attention_heads"),
            width=_size(config, "hidden_size"),
            hidden=_size(config, "intermediate_size"),
            epsilon=epsilon("config.layer_norm_eps", _entry(config, "layer_norm_eps")),
        )


def _size(config: Mapping[str, Any], name: str) -> int:
    return integer(f"config.{name}", _entry(config, name))


def _entry(config: Mapping[str, Any], name: str) -> Any:
    if name not in config and name not in _DEFAULTS:
        raise wrong(f"config.{name}", "be given", "none", "Is this the config.json of a BERT?")
    return config.get(name, _DEFAULTS.get(name))


def attend(
    query: Array,
    key: Array,
    value: Array,
    lengths: Array | None,
    layer: Array,
    *,
    dtype: DTypeLike | None = None,
    **options: Any,
) -> Array:
    """The attention of each layer, unless another function is given to the model.

    Arguments:
      query, key, value: [B, T, N, D] of the model's type.
      lengths: [B] integers, positions beyond are padding; None: there is none.
      layer: the number of the layer, a scalar; not used.
      dtype: the type query, key and value are cast to; None: the model's. With `functools.partial`,
        16-bit attention inside a float32 model.
      options: further keywords of `pasa_jax.dot_product_attention`.

    Returns:
      [B, T, N, D] of query's own type.
    """
    narrow = (x if dtype is None else x.astype(dtype) for x in (query, key, value))
    # By its public name, so that `pasa_jax.diagnostics` sees the module call it.
    out = pasa_jax.dot_product_attention(
        *narrow, query_seq_lengths=lengths, key_value_seq_lengths=lengths, **options
    )
    return out.astype(query.dtype)


class LayerNorm(nnx.Module):
    """Layer norm over the last axis, computed in float32 whatever the type of ``x``."""

    def __init__(self, width: int, epsilon: float, dtype: DTypeLike) -> None:
        self.scale = nnx.Param(jnp.ones(width, dtype))
        self.bias = nnx.Param(jnp.zeros(width, dtype))
        self.epsilon = epsilon

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        scale, bias = (p[...].astype(jnp.float32) for p in (self.scale, self.bias))
        return (wide * scale + bias).astype(x.dtype)


class Attention(nnx.Module):
    """Self-attention [B, T, width] -> [B, T, width], without the residual."""

    def __init__(self, config: EncoderConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        def linear() -> nnx.Linear:
            return _linear(config.width, config.width, dtype, rngs)

        self.query, self.key, self.value, self.out = linear(), linear(), linear(), linear()
        self.heads = config.heads

    def __call__(
        self, x: Array, lengths: Array | None, layer: Array, attention: AttentionFn
    ) -> Array:
        q, k, v = (f(x) for f in (self.query, self.key, self.value))
        q, k, v = (y.reshape(*y.shape[:2], self.heads, -1) for y in (q, k, v))
        return self.out(attention(q, k, v, lengths, layer).reshape(x.shape))


class Layer(nnx.Module):
    """Attention and feed-forward, each with its residual and a norm after it."""

    def __init__(self, config: EncoderConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.attention = Attention(config, dtype, rngs)
        self.attention_norm = LayerNorm(config.width, config.epsilon, dtype)
        self.up = _linear(config.width, config.hidden, dtype, rngs)
        self.down = _linear(config.hidden, config.width, dtype, rngs)
        self.norm = LayerNorm(config.width, config.epsilon, dtype)

    def __call__(
        self, x: Array, lengths: Array | None, layer: Array, attention: AttentionFn
    ) -> Array:
        x = self.attention_norm(x + self.attention(x, lengths, layer, attention))
        inner = jax.nn.gelu(self.up(x).astype(jnp.float32), approximate=False)
        return self.norm(x + self.down(inner.astype(x.dtype)))


class Encoder(nnx.Module):
    """BERT: embeddings, and layers that are stacked and scanned, so that one is compiled.

    Arguments:
      config: the sizes.
      dtype: of weights and activations: float32, float16 or bfloat16. The norms, the gelu and
        what `embed` does are computed in float32.
      rngs: for initial weights, which only training would start from; see `load`.
    """

    def __init__(self, config: EncoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        dtype = checked_dtype(dtype)

        def embedding(rows: int) -> nnx.Embed:
            return nnx.Embed(rows, config.width, dtype=dtype, param_dtype=dtype, rngs=rngs)

        self.words = embedding(config.vocabulary)
        self.positions = embedding(config.max_length)
        self.types = embedding(config.types)
        self.norm = LayerNorm(config.width, config.epsilon, dtype)
        make = nnx.vmap(lambda rngs: Layer(config, dtype, rngs))
        self.layers = make(rngs.split(config.layers))
        self.config = config

    def __call__(
        self,
        tokens: Array,
        lengths: Array | None = None,
        token_types: Array | None = None,
        *,
        attention: AttentionFn = attend,
    ) -> Array:
        """The hidden states after the last layer.

        Arguments:
          tokens: [B, T] integers, T at most ``config.max_length``.
          lengths: [B] integers; tokens beyond are padding, which no other token sees and whose own
            hidden states mean nothing. None: there is no padding.
          token_types: [B, T] integers, the segment of each token; None: all 0.
          attention: called once for all layers, in each of which it is traced with another layer
            number; see `attend`, the default.

        Returns:
          [B, T, width] of the model's type.

        Raises:
          ValueError: a wrong shape or type, by name.
        """
        self._check(tokens, lengths, token_types)
        x = self.words(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        x = x + self.types(jnp.zeros_like(tokens) if token_types is None else token_types)

        def step(x: Array, inputs: tuple[Layer, Array]) -> tuple[Array, None]:
            layer, number = inputs
            return layer(x, lengths, number, attention), None

        numbers = jnp.arange(self.config.layers, dtype=jnp.int32)
        return jax.lax.scan(step, self.norm(x), (self.layers, numbers))[0]

    def embed(
        self,
        tokens: Array,
        lengths: Array | None = None,
        *,
        attention: AttentionFn = attend,
    ) -> Array:
        """Sentence embeddings: the mean hidden state, of length 1, as sentence-transformers'.

        Arguments: as when the model is called. A sentence of length 0 has the embedding 0.

        Returns:
          [B, width] float32; products of two are cosines.
        """
        hidden = self(tokens, lengths, attention=attention).astype(jnp.float32)
        count = tokens.shape[1] if lengths is None else jnp.asarray(lengths)[:, None, None]
        total = jnp.sum(hidden, axis=1, where=jnp.arange(tokens.shape[1])[:, None] < count)
        # The sum has the direction of the mean, and only the direction counts.
        return total / jnp.maximum(jnp.linalg.norm(total, axis=-1, keepdims=True), 1e-12)

    def _check(self, tokens: Array, lengths: Array | None, token_types: Array | None) -> None:
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise wrong("tokens", "be [B, T] integers", f"{tokens.shape} {tokens.dtype}")
        if tokens.shape[1] > self.config.max_length:
            allowed = f"hold at most the model's {self.config.max_length} positions"
            raise wrong("tokens", allowed, tokens.shape[1], "Cut the text.")
        if lengths is not None and jnp.shape(lengths) != tokens.shape[:1]:
            raise wrong("lengths", f"be [{tokens.shape[0]}], one a text", jnp.shape(lengths))
        if token_types is not None and token_types.shape != tokens.shape:
            raise wrong("token_types", f"be {tokens.shape}, as `tokens`", token_types.shape)


def _linear(inputs: int, outputs: int, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(inputs, outputs, dtype=dtype, param_dtype=dtype, rngs=rngs)


# From the files of a Hugging Face directory.

# Where a module's tensors stand in the files; {} is the number of the layer.
_NAMES = {
    "words": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "types": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
    "layers.attention.query": "encoder.layer.{}.attention.self.query",
    "layers.attention.key": "encoder.layer.{}.attention.self.key",
    "layers.attention.value": "encoder.layer.{}.attention.self.value",
    "layers.attention.out": "encoder.layer.{}.attention.output.dense",
    "layers.attention_norm": "encoder.layer.{}.attention.output.LayerNorm",
    "layers.up": "encoder.layer.{}.intermediate.dense",
    "layers.down": "encoder.layer.{}.output.dense",
    "layers.norm": "encoder.layer.{}.output.LayerNorm",
}
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
# Tensors of `BertModel` that have no effect on the hidden states.
_UNUSED = ("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias")


def load(directory: Path, dtype: DTypeLike = "float32") -> Encoder:
    """The encoder of a Hugging Face model directory.

    Arguments:
      directory: holds config.json and *.safetensors.
      dtype: what the weights are cast to, and the activations' type.

    Raises:
      FileNotFoundError: a file is missing.
      ModuleNotFoundError: the extra "models" is not installed.
      ValueError: the model is no BERT that this one implements, or a tensor is missing, is not
        expected or has another shape, by name.
    """
    read = read_config(directory)
    with inside(directory / "config.json"):
        config = EncoderConfig.from_hf(read)
    weights = {name: x for name, x in read_tensors(directory).items() if name not in _UNUSED}
    tensors = Tensors(weights, "directory")

    def value(path: str, like: Any) -> Array:
        module, _, leaf = path.rpartition(".")
        name = f"{_NAMES[module]}.{_LEAVES[leaf]}"
        if not module.startswith("layers."):
            return jnp.asarray(tensors.parameter(name, leaf, like.shape), dtype)
        stack = (
            tensors.parameter(name.format(i), leaf, like.shape[1:]) for i in range(config.layers)
        )
        return jnp.stack([jnp.asarray(x, dtype) for x in stack])

    model = fill(lambda: Encoder(config, dtype=dtype, rngs=nnx.Rngs(0)), value)
    tensors.check_empty()
    return model
