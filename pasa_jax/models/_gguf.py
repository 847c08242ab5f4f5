"""A Llama model in a GGUF file: its config, tensors and tokenizer, as Hugging Face has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pasa_jax._errors import wrong
from pasa_jax._extras import require

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


class Gguf(NamedTuple):
    """What stands in a file; ``fields`` by GGUF's names, for the tokenizer."""

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    fields: dict[str, Any]


def read(path: Path) -> Gguf:
    """Config in the words of config.json, and float32 tensors [out, in] by Hugging Face's names.

    Raises:
      FileNotFoundError: it is not there.
      ValueError: it holds another architecture than llama, or scaled rotary positions.
      ModuleNotFoundError: the extra is not installed.
    """
    gguf = require("gguf", EXTRA)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: a .gguf file is needed.")
    reader = gguf.GGUFReader(str(path))
    fields = {name: field.contents for name, field in reader.fields.items()}
    family = fields["general.architecture"]()
    if family != "llama":
        raise wrong("path", "be a GGUF file of the architecture 'llama'", repr(family))
    raw = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(fields, tied="output.weight" not in raw)
    tensors = {}
    for name, tensor in raw.items():
        x = np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
        tensors[_hf_name(name)] = _unpermuted(name, x, config)
    return Gguf(config, tensors, fields)


def tokenizer(fields: dict[str, Any]) -> Any:
    """The byte-level BPE of the file; "smollm" splits digits one by one, then as GPT-2.

    Raises:
      ValueError: another splitting of the text, which is not written here.
    """
    name = "tokenizer.ggml.pre"
    kind = fields[name]() if name in fields else None
    if kind != "smollm":
        raise wrong("path", "be a file whose tokenizer.ggml.pre is 'smollm'", repr(kind))
    tokenizers = require("tokenizers", EXTRA)
    merges = (merge.split(" ", 1) for merge in fields["tokenizer.ggml.merges"]())
    ids = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"]())}
    found = tokenizers.Tokenizer(
        tokenizers.models.BPE(ids, [(left, right) for left, right in merges])
    )
    split = tokenizers.pre_tokenizers
    found.pre_tokenizer = split.Sequence(
        [split.Digits(individual_digits=True), split.ByteLevel(add_prefix_space=False)]
    )
    found.decoder = tokenizers.decoders.ByteLevel()
    return found


def _config(fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    def field(name: str, default: Any = None) -> Any:
        return fields[f"llama.{name}"]() if f"llama.{name}" in fields else default

    return {
        "model_type": "llama",
        "vocab_size": field("vocab_size") or len(fields["tokenizer.ggml.tokens"]()),
        "hidden_size": field("embedding_length"),
        "intermediate_size": field("feed_forward_length"),
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": field("attention.head_count"),
        "num_key_value_heads": field("attention.head_count_kv"),
        "head_dim": field("attention.key_length"),
        "max_position_embeddings": field("context_length"),
        "rms_norm_eps": field("attention.layer_norm_rms_epsilon", 1e-6),
        "rope_theta": field("rope.freq_base", 10_000.0),
        "rope_scaling": {"rope_type": _default(field("rope.scaling.type", "none"))},
        "tie_word_embeddings": tied,
    }


def _default(scaling: str) -> str:
    return "default" if scaling == "none" else scaling


def _hf_name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight; others stay as they are."""
    parts = name.split(".")
    prefix = f"model.layers.{parts[1]}." if parts[0] == "blk" else ""
    base, leaf = parts[-2:] if len(parts) > 1 else (name, "")
    return f"{prefix}{_NAMES[base]}.{leaf}" if base in _NAMES else name


def _unpermuted(name: str, x: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """Rows of q and k: GGUF turns the pairs (0, 1), (2, 3), …; here it is (0, D/2), (1, D/2+1), …

    llama.cpp's converter permutes what Hugging Face has; this is its inverse.
    """
    heads = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"] or config["num_attention_heads"],
    }.get(name.split(".")[-2] if "." in name else name)
    if heads is None:
        return x
    return x.reshape(heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
