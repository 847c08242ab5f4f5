"""Qwen2 and Llama in flax.nnx, on PASA's attention or any other.

Blocks of one shape: the parameters of all of them are stacked along a leading axis and walked by
`jax.lax.scan`, so one block is compiled. Letters: B batch, T tokens, L layers, W width, N query
heads, K key heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike

import pasa_jax
from pasa_jax.core import bits
from pasa_jax.core.errors import wrong
from pasa_jax.core.rotary import Rotation, rotated, rotation
from pasa_jax.models import _files, _generate, _gguf
from pasa_jax.models._checks import inside
from pasa_jax.models._config import DecoderConfig
from pasa_jax.models._weights import Tensors, checked_dtype, fill
from pasa_jax.plugins.cache import KVCaches
from pasa_jax.serving import Batch, PagedCache

__all__ = ["Decoder", "DecoderConfig", "load", "load_gguf"]

Array = jax.Array
# (query [B, T, N, D], key [B, T, K, D], value [B, T, K, D], layer []) -> [B, T, N, D], causal
AttentionFn = Callable[[Array, Array, Array, Array], Array]
# The same arguments -> any pytree of arrays.
Look = Callable[[Array, Array, Array, Array], Any]
# The attention of a block: (its module, q, k, v) -> (output [B, T, N, D], a pytree to stack)
Mix = Callable[["Attention", Array, Array, Array], tuple[Array, Any]]
# (memory, layer, q, k, v) -> (output [B, T, N, D], the memory with k and v)
Remember = Callable[[Any, Array, Array, Array, Array], tuple[Array, Any]]


class Linear(nnx.Module):
    """x·W + b, added up and biased in float32, then rounded to x's type."""

    def __init__(
        self, size: int, out: int, *, bias: bool = False, dtype: Any, rngs: nnx.Rngs
    ) -> None:
        kernel = jax.random.normal(rngs.params(), (size, out), jnp.float32) / np.sqrt(size)
        self.kernel = nnx.Param(kernel.astype(dtype))
        self.bias = nnx.Param(jnp.zeros(out, dtype)) if bias else None

    def __call__(self, x: Array) -> Array:
        y = _product(x, self.kernel[...])
        if self.bias is not None:
            y = y + self.bias[...].astype(y.dtype)
        return y.astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / √(mean x² + ε) · scale; the root mean square in float32, as Hugging Face has it."""

    def __init__(self, size: int, epsilon: float, *, dtype: Any) -> None:
        self.scale = nnx.Param(jnp.ones(size, dtype))
        self.epsilon = epsilon

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        return self.scale[...] * (wide * lax.rsqrt(square + self.epsilon)).astype(x.dtype)


class Attention(nnx.Module):
    """Projections, rotary positions, attention over grouped heads, projection."""

    def __init__(self, config: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs) -> None:
        query, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        options: dict[str, Any] = {"bias": config.qkv_bias, "dtype": dtype, "rngs": rngs}
        self.query = Linear(config.width, query, **options)
        self.key = Linear(config.width, keys, **options)
        self.value = Linear(config.width, keys, **options)
        options["bias"] = config.out_bias
        self.out = Linear(query, config.width, **options)
        self.head_dim = config.head_dim

    def __call__(self, x: Array, turn: Rotation | None, mix: Mix) -> tuple[Array, Any]:
        q, k, v = (
            project(x).reshape(*x.shape[:2], -1, self.head_dim)
            for project in (self.query, self.key, self.value)
        )
        if turn is not None:
            q, k = rotated(q, turn), rotated(k, turn)
        mixed, extra = mix(self, q, k, v)
        return self.out(mixed.reshape(*x.shape[:2], -1)), extra

    def causal(self, q: Array, k: Array, v: Array) -> Array:
        """PASA, by its public name, so that `pasa_jax.diagnostics` sees this module call it."""
        return pasa_jax.dot_product_attention(q, k, v, is_causal=True)


class FeedForward(nnx.Module):
    """SwiGLU: (silu(x·G) ∘ x·U)·D."""

    def __init__(self, config: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs) -> None:
        self.gate = Linear(config.width, config.hidden, dtype=dtype, rngs=rngs)
        self.up = Linear(config.width, config.hidden, dtype=dtype, rngs=rngs)
        self.down = Linear(config.hidden, config.width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs) -> None:
        self.attention_norm = RMSNorm(config.width, config.epsilon, dtype=dtype)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.feed_forward_norm = RMSNorm(config.width, config.epsilon, dtype=dtype)
        self.feed_forward = FeedForward(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, turn: Rotation | None, mix: Mix) -> tuple[Array, Any]:
        mixed, extra = self.attention(self.attention_norm(x), turn, mix)
        x = x + mixed
        return x + self.feed_forward(self.feed_forward_norm(x)), extra


class Decoder(nnx.Module):
    """A causal language model of the Qwen2 or Llama architecture.

    Arguments:
      config: its sizes.
      dtype: of weights and activations: float32, float16 or bfloat16. As in
        ``torch_model.to(dtype)``, but that rotary positions and biases are rounded once, after
        the sum, and logits not at all.
      rngs: for random weights; `load` reads trained ones.

    Source: modeling_qwen2.py and modeling_llama.py of Hugging Face transformers 5.

    >>> config = DecoderConfig(vocabulary=50, width=32, hidden=64, layers=2, heads=4, kv_heads=2,
    ...                        head_dim=8, max_length=64)
    >>> model = Decoder(config, rngs=nnx.Rngs(0))
    >>> jax.jit(Decoder.__call__)(model, jnp.array([[1, 2, 3]])).shape
    (1, 3, 50)
    >>> model.generate(jnp.array([[1, 2, 3]]), 4).shape
    (1, 4)
    """

    def __init__(self, config: DecoderConfig, *, dtype: Any = "float32", rngs: nnx.Rngs) -> None:
        self.config = config
        dtype = checked_dtype(dtype)
        shape = (config.vocabulary, config.width)
        table = jax.random.normal(rngs.params(), shape, jnp.float32) / np.sqrt(config.width)
        self.embedding = nnx.Param(table.astype(dtype))
        self.blocks = nnx.vmap(lambda rngs: Block(config, dtype=dtype, rngs=rngs))(
            rngs.split(config.layers)
        )
        self.norm = RMSNorm(config.width, config.epsilon, dtype=dtype)
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.head = None if config.tied else Linear(config.width, config.vocabulary, **options)

    @property
    def dtype(self) -> Any:
        """Of weights and activations; ``jax.tree.map(lambda x: x.astype(t), model)`` changes it."""
        return self.embedding[...].dtype

    def __call__(self, tokens: ArrayLike, *, attention: AttentionFn | None = None) -> Array:
        """Logits of the token that follows each position.

        Where it is called more than once, `jax.jit` it with the model as an argument:
        ``jax.jit(Decoder.__call__, static_argnames="attention")(model, tokens)``. Prompts of
        unlike lengths may be padded on the right: no token sees what comes after it.

        Arguments:
          tokens: [B, T] integers below V; T at most ``config.max_length``.
          attention: (query [B, T, N, D], key [B, T, K, D], value [B, T, K, D], layer []) ->
            [B, T, N, D], causal; default `pasa_jax.dot_product_attention`.

        Returns:
          [B, T, V] float32.

        Raises:
          ValueError: a wrong shape or type, too many tokens, or (where ids are known) an id that
            the vocabulary does not hold.
        """
        hidden, _ = self.walk(self.checked(tokens), attention)
        return self.logits(hidden)

    def observe(
        self, tokens: ArrayLike, look: Look, *, attention: AttentionFn | None = None
    ) -> Any:
        """``look(query, key, value, layer)`` of every layer, stacked: leaves [L, …].

        Queries and keys are those that attention is given: with their rotary positions.
        """
        return self.walk(self.checked(tokens), attention, look)[1]

    def generate(
        self,
        tokens: ArrayLike,
        max_new_tokens: int,
        *,
        lengths: ArrayLike | None = None,
        eos: int | Sequence[int] | None = None,
        temperature: float = 0.0,
        key: Array | None = None,
        attention: AttentionFn | None = None,
        on_token: _generate.OnToken | None = None,
    ) -> Array:
        """The tokens that follow: the likeliest ones, or sampled ones.

        Prompt and steps are compiled once for every shape of ``tokens``, ``max_new_tokens`` and
        set of options.

        Arguments:
          tokens: [B, T] prompts, padded on the right with any token.
          max_new_tokens: how many, at least 1; T and they at most ``config.max_length``.
          lengths: [B] integers in [1, T], tokens of each prompt that are no padding; default T.
          eos: the token, or the tokens, after which a text has ended.
          temperature: 0 for the likeliest token; else logits are divided by it and sampled.
          key: a key of `jax.random` for temperature > 0.
          attention: as in a call. `pasa_jax.plugins.KVCaches` hold the keys of the default; with
            another one every step reads the whole text again.
          on_token: called on the host as soon as a token of each text is there, while the next is
            computed, with how many came before, the tokens [B] and whether each text has ended by
            it. The loop is compiled for the function: pass the same one again.
            `jax.effects_barrier` waits for the last call.

        Returns:
          [B, max_new_tokens] int32; what follows an ``eos`` is the first of ``eos``.

        Raises:
          ValueError: as in a call, and for a wrong ``max_new_tokens``, ``lengths``,
            ``temperature`` or ``on_token``, or a missing ``key``.
        """
        tokens = self.checked(tokens)
        request = _generate.checked_request(
            tokens,
            self.config.max_length,
            max_new_tokens,
            eos,
            temperature,
            key,
            attention,
            on_token,
        )
        lengths = _generate.checked_lengths(lengths, tokens)
        key = jax.random.key(0) if key is None else key
        return _generate.run(self, tokens, lengths, key, request)

    def checked(self, tokens: ArrayLike) -> Array:
        """``tokens`` as [B, T] int32, or the error for them."""
        array = jnp.asarray(tokens)
        if array.ndim != 2 or 0 in array.shape or not jnp.issubdtype(array.dtype, jnp.integer):
            seen = f"{array.dtype}{list(array.shape)}"
            raise wrong("tokens", "be integers of shape [B, T], B and T at least 1", seen)
        if array.shape[1] > self.config.max_length:
            allowed = f"be at most max_length = {self.config.max_length} tokens long"
            raise wrong("tokens", allowed, array.shape[1])
        if not isinstance(array, Tracer):
            ids = np.asarray(array)  # jnp's functions would give a tracer for a constant of jit
            for id in (int(ids.min()), int(ids.max())):
                if not 0 <= id < self.config.vocabulary:
                    allowed = f"be ids in [0, {self.config.vocabulary})"
                    raise wrong("tokens", allowed, id, "Is the tokenizer the model's?")
        return array.astype(jnp.int32)

    def walk(
        self,
        tokens: Array,
        attention: AttentionFn | None = None,
        look: Look | None = None,
        *,
        rotate: bool = True,
    ) -> tuple[Array, Any]:
        """Final states [B, T, W], normalised, and what ``look`` saw in each layer.

        Arguments:
          rotate: False gives ``attention`` and ``look`` queries and keys without their rotary
            positions, which ``attention`` has to add.
        """

        def step(x: Array, inputs: tuple[Block, Array]) -> tuple[Array, Any]:
            block, layer = inputs

            def mix(module: Attention, q: Array, k: Array, v: Array) -> tuple[Array, Any]:
                seen = None if look is None else look(q, k, v, layer)
                if attention is None:
                    return module.causal(q, k, v), seen
                return attention(q, k, v, layer), seen

            return block(x, turn, mix)

        turn = self._turn(jnp.arange(tokens.shape[1])[None]) if rotate else None
        layers = jnp.arange(self.config.layers, dtype=jnp.int32)
        x, seen = lax.scan(step, self.embedding[...][tokens], (self.blocks, layers))
        return self.norm(x), seen

    def step(self, tokens: Array, caches: KVCaches, blocks: Block) -> tuple[Array, KVCaches]:
        """Final states [B, 1, W] of the next tokens [B, 1], and the caches with them.

        Arguments:
          blocks: `bits.stored_tree` of this model's, of which the loop takes a layer in place.
        """

        def attend(caches: KVCaches, layer: Array, q: Array, k: Array, v: Array) -> Any:
            grown = caches[layer].append(k, v)
            return grown.attend(q), caches.beside(layer, grown)

        turn = self._turn(caches.length[0][:, None])
        return self.remember(tokens, turn, caches, blocks, attend)

    def paged_step(
        self, tokens: Array, cache: PagedCache, batch: Batch, blocks: Block
    ) -> tuple[Array, PagedCache]:
        """Final states [T, W] of the new tokens [T] of many sequences, and the cache with them.

        Inside `jax.jit`, the cache donated, its pages are written in place.

        Arguments:
          tokens: one sequence after another, as the batch has them.
          cache, batch: as `PagedCache.grown` returns them; the cache has L layers.
          blocks: as in `step`.
        """

        def attend(cache: PagedCache, layer: Array, q: Array, k: Array, v: Array) -> Any:
            cache = cache.write(batch, k[0], v[0], layer=layer)
            return cache.attend(q[0], batch, layer=layer)[None], cache

        turn = self._turn(batch.position[None])
        states, cache = self.remember(tokens[None], turn, cache, blocks, attend)
        return states[0], cache

    def remember(
        self, tokens: Array, turn: Rotation | None, memory: Any, blocks: Block, attend: Remember
    ) -> tuple[Array, Any]:
        """Final states [B, T, W], and the memory that each layer leaves to the next.

        Arguments:
          turn: of the tokens' positions; None: ``attend`` is given queries and keys without.
          memory: what ``attend`` stores keys and values in.
          blocks: as in `step`.
        """

        def step(carry: tuple[Array, Any], inputs: tuple[Block, Array]) -> tuple[Any, None]:
            (x, memory), (block, layer) = carry, inputs
            block = bits.read_tree(block, self.dtype)

            def mix(_: Attention, q: Array, k: Array, v: Array) -> tuple[Array, Any]:
                return attend(memory, layer, q, k, v)

            return block(x, turn, mix), None

        layers = jnp.arange(self.config.layers, dtype=jnp.int32)
        x = self.embedding[...][tokens]
        (x, memory), _ = lax.scan(step, (x, memory), (blocks, layers))
        return self.norm(x), memory

    def logits(self, states: Array) -> Array:
        """Logits [..., V] float32 of final states [..., W]."""
        if self.head is None:
            return _product(states, self.embedding[...].T)
        return _product(states, self.head.kernel[...])

    def _turn(self, positions: Array) -> Rotation:
        """Of positions [B or 1, T]."""
        return rotation(positions, self.config.head_dim, self.config.rope_base)


def load(directory: str | Path, dtype: Any = "float32") -> Decoder:
    """The model in a Hugging Face directory: config.json and *.safetensors, in one file or many.

    Arguments:
      directory: model_type qwen2 or llama.
      dtype: float32, float16 or bfloat16, which the weights are cast to.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a config that is not written here, or a tensor that is missing, left over or
        of the wrong shape, by name.
      ModuleNotFoundError: the extra "models" is not installed.
    """
    directory = Path(directory)
    read = _files.read_config(directory)
    with inside(directory / "config.json"):
        config = DecoderConfig.from_hf(read)
    return _assembled(config, _files.read_tensors(directory), dtype, "directory")


def load_gguf(path: str | Path, dtype: Any = "float32") -> Decoder:
    """The model in a GGUF file of the architecture qwen2 or llama, quantized or not.

    Raises:
      As `load`.
    """
    return from_gguf(_gguf.read(Path(path)), dtype)


def from_gguf(gguf: _gguf.Gguf, dtype: Any = "float32") -> Decoder:
    """The model of a file that was read; empties its tensors."""
    return _assembled(gguf.config, gguf.tensors, dtype, "path")


_TOP = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
_BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}


def _assembled(
    config: DecoderConfig, tensors: dict[str, np.ndarray], dtype: Any, source: str
) -> Decoder:
    """The decoder of tensors by Hugging Face's names, matrices [out, in]; empties ``tensors``."""
    dtype = checked_dtype(dtype)
    # Some tools also write a copy of the embedding and the constants of RoPE; they are not needed.
    spare = {"lm_head.weight"} if config.tied else set()
    for name in [n for n in tensors if n in spare or "rotary_emb" in n]:
        del tensors[name]
    taken = Tensors(tensors, source)

    def value(path: str, like: Any) -> Array:
        leaf = path.rpartition(".")[2]
        if not path.startswith("blocks."):
            return jnp.asarray(taken.parameter(_hf_name(path, _TOP), leaf, like.shape), dtype)
        name = _hf_name(path.removeprefix("blocks."), _BLOCK)
        layers = (
            taken.parameter(f"model.layers.{i}.{name}", leaf, like.shape[1:])
            for i in range(config.layers)
        )
        return jnp.stack([jnp.asarray(x, dtype) for x in layers])

    model = fill(lambda: Decoder(config, dtype=dtype, rngs=nnx.Rngs(0)), value)
    taken.check_empty()
    return model


def _hf_name(path: str, names: dict[str, str]) -> str:
    """attention.query.kernel -> self_attn.q_proj.weight."""
    module, _, leaf = path.rpartition(".")
    return f"{names[module or leaf]}.{'bias' if leaf == 'bias' else 'weight'}"


def _product(x: Array, w: Array) -> Array:
    """x·W in float32, not in the TF32 or bfloat16 that accelerators would take float32 for."""
    return jnp.matmul(x, w, preferred_element_type=jnp.float32, precision=lax.Precision.HIGHEST)
