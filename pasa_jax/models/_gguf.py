"""A Qwen2 or Llama model in a GGUF file: config, tensors by Hugging Face's names, tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pasa_jax._extras import require
from pasa_jax.core.errors import wrong
from pasa_jax.models import _files, _gguf_file
from pasa_jax.models._checks import brief, epsilon, inside, integer, rope_base
from pasa_jax.models._config import FAMILIES, DecoderConfig

EXTRA = "models"
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# How Qwen2's tokenizer splits a text before the bytes of its pieces are merged.
_QWEN2_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTROL = 3  # a token that stands for no text


class Fields:
    """The fields of a file, by name."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = fields

    def get(self, name: str, default: Any = None) -> Any:
        """A number, a bool, a string or a list."""
        value = self._fields.get(name, default)
        if not isinstance(value, (_gguf_file.Text, _gguf_file.Array)):
            return value
        with inside(f"`{name}`"):
            return value.value()

    def size(self, name: str, default: int | None = None) -> int:
        """A positive int."""
        return integer(name, self.get(name, default))

    def text(self, name: str, default: str | None = None) -> str:
        """A string."""
        if not isinstance(value := self.get(name, default), str):
            raise wrong(name, "be a string", brief(value))
        return value

    def many(self, name: str, kind: type) -> list[Any]:
        """A list of ``kind``."""
        value = self.get(name)
        if not isinstance(value, list) or not all(isinstance(x, kind) for x in value):
            raise wrong(name, f"be an array of {kind.__name__}", brief(value))
        return value


class Gguf(NamedTuple):
    """What stands in a file; ``fields`` by GGUF's names, for the tokenizer."""

    config: DecoderConfig
    tensors: dict[str, np.ndarray]
    fields: Fields


def read(path: Path) -> Gguf:
    """The config, and float32 tensors [out, in] by Hugging Face's names.

    Raises:
      FileNotFoundError: it is not there.
      ValueError: it is damaged or no regular file, has a field that is missing or out of range,
        another architecture than qwen2 and llama, scaled rotary positions, or a type of tensor
        that the package gguf does not dequantize.
      ModuleNotFoundError: the extra is not installed.
    """
    require("gguf", EXTRA)
    _files.regular(path, f"{path} is not there: a .gguf file is needed.")
    with inside(path):
        file = _gguf_file.read(path)
        fields = Fields(file.fields)
        family = fields.text("general.architecture")
        if family not in FAMILIES:
            allowed = f"be a GGUF file of the architecture {' or '.join(map(repr, FAMILIES))}"
            raise wrong("path", allowed, brief(family))
        config = _config(fields, family, tied="output.weight" not in file.tensors)
        tensors = {
            _hf_name(name): _as_hf(name, tensor, config, family)
            for name, tensor in file.tensors.items()
        }
        return Gguf(config, tensors, fields)


def tokenizer(path: Path, fields: Fields) -> Any:
    """The byte-level BPE of the file at ``path``.

    Raises:
      ValueError: another splitting of the text than SmolLM's and Qwen2's, which is not written
        here; tokens or merges that are missing or of no use.
    """
    with inside(path):
        kind = fields.get("tokenizer.ggml.pre")
        if kind not in ("smollm", "qwen2"):
            allowed = "be a file whose tokenizer.ggml.pre is 'smollm' or 'qwen2'"
            raise wrong("path", allowed, brief(kind))
        bpe = _merging(fields)
        tokenizers = require("tokenizers", EXTRA)
        split = tokenizers.pre_tokenizers
        if kind == "qwen2":
            bpe.normalizer = tokenizers.normalizers.NFC()
            pieces = split.Split(tokenizers.Regex(_QWEN2_PIECES), behavior="isolated")
        else:
            pieces = split.Digits(individual_digits=True)
        in_bytes = split.ByteLevel(add_prefix_space=False, use_regex=kind != "qwen2")
        bpe.pre_tokenizer = split.Sequence([pieces, in_bytes])
        bpe.decoder = tokenizers.decoders.ByteLevel()
        return bpe


def _merging(fields: Fields) -> Any:
    """The tokens, the merges, and the tokens that stand for no text."""
    tokenizers = require("tokenizers", EXTRA)
    tokens = fields.many("tokenizer.ggml.tokens", str)
    merges = [tuple(merge.split(" ", 1)) for merge in fields.many("tokenizer.ggml.merges", str)]
    ids = {token: i for i, token in enumerate(tokens)}
    try:
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE(ids, merges))
    except Exception as error:  # that package raises no narrower one
        raise ValueError(f"`tokenizer.ggml.merges`: {error}") from error
    if fields.get("tokenizer.ggml.token_type") is not None:
        kinds = fields.many("tokenizer.ggml.token_type", int)
        control = [token for token, kind in zip(tokens, kinds, strict=False) if kind == _CONTROL]
        bpe.add_special_tokens(control)
    return bpe


def _config(fields: Fields, family: str, tied: bool) -> DecoderConfig:
    def size(name: str, default: int | None = None) -> int:
        return fields.size(f"{family}.{name}", default)

    heads, width = size("attention.head_count"), size("embedding_length")
    head_dim = size("attention.key_length", width // heads)
    if (turned := size("rope.dimension_count", head_dim)) != head_dim:
        raise wrong(f"{family}.rope.dimension_count", f"be the head size {head_dim}", turned)
    scaling = fields.text(f"{family}.rope.scaling.type", "none")
    if scaling != "none":
        allowed = "be 'none': rotary positions as they are"
        raise wrong(f"{family}.rope.scaling.type", allowed, brief(scaling))
    names = {"base": f"{family}.rope.freq_base", "ε": f"{family}.attention.layer_norm_rms_epsilon"}
    return DecoderConfig(
        vocabulary=_vocabulary(fields, family),
        width=width,
        hidden=size("feed_forward_length"),
        layers=size("block_count"),
        heads=heads,
        kv_heads=size("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_length=size("context_length"),
        rope_base=rope_base(names["base"], fields.get(names["base"], 10_000.0)),
        epsilon=epsilon(names["ε"], fields.get(names["ε"], 1e-6)),
        qkv_bias=family == "qwen2",
        tied=tied,
    )


def _vocabulary(fields: Fields, family: str) -> int:
    """As it is written, or as many as there are tokens."""
    written = fields.get(f"{family}.vocab_size")
    if written is not None:
        return integer(f"{family}.vocab_size", written)
    return len(fields.many("tokenizer.ggml.tokens", str))


def _hf_name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight; others stay as they are."""
    parts = name.split(".")
    prefix = f"model.layers.{parts[1]}." if parts[0] == "blk" and len(parts) == 4 else ""
    base, leaf = parts[-2:] if len(parts) > 1 else (name, "")
    return f"{prefix}{_NAMES[base]}.{leaf}" if base in _NAMES else name


def _as_hf(name: str, tensor: _gguf_file.Tensor, config: DecoderConfig, family: str) -> np.ndarray:
    """float32, its rows in Hugging Face's order.

    A Llama's file turns the pairs (0, 1), (2, 3), … of a head and has the rows of q and k permuted
    for that: llama.cpp's converter permutes what Hugging Face has, and this is the inverse. A
    Qwen2's turns the pairs (0, D/2), (1, D/2 + 1), …, as here, and has the rows as they were.
    """
    x = tensor.value()
    heads = {"attn_q": config.heads, "attn_k": config.kv_heads}.get(name.split(".")[-2:][0])
    if heads is None or family != "llama":
        return x
    if len(x) % (2 * heads):
        raise wrong(name, f"have rows for {heads} heads of an even size", len(x))
    return x.reshape(heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
