"""Files of tiny random models: Hugging Face's directories, and GGUF."""

import json

import jax.numpy as jnp
import numpy as np

from pasa_jax._extras import require

CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA = CONFIG | {"model_type": "llama"}


def shapes(config):
    """The shapes of a decoder's tensors, by Hugging Face's names."""
    width, hidden = config["hidden_size"], config["intermediate_size"]
    size = config.get("head_dim") or width // config["num_attention_heads"]
    queries, keys = (size * config[f"num_{x}_heads"] for x in ("attention", "key_value"))
    table = (config["vocab_size"], width)
    found = {"model.embed_tokens.weight": table, "model.norm.weight": (width,)}
    found["lm_head.weight"] = table
    projections = {"q": (queries, width), "k": (keys, width), "v": (keys, width)}
    projections["o"] = (width, queries)
    biased = "qkv" if config["model_type"] == "qwen2" else ""
    biased = "qkvo" if config.get("attention_bias") else biased
    for i in range(config["num_hidden_layers"]):
        block = {
            "input_layernorm.weight": (width,),
            **{f"self_attn.{n}_proj.weight": shape for n, shape in projections.items()},
            "post_attention_layernorm.weight": (width,),
            "mlp.gate_proj.weight": (hidden, width),
            "mlp.up_proj.weight": (hidden, width),
            "mlp.down_proj.weight": (width, hidden),
            **{f"self_attn.{n}_proj.bias": projections[n][:1] for n in biased},
        }
        found |= {f"model.layers.{i}.{name}": shape for name, shape in block.items()}
    return found


def tensors(config, dtype=np.float32):
    """Random ones for ``config``."""
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(x).astype(dtype) for name, x in shapes(config).items()}


def write(directory, config, weights):
    from safetensors.flax import save_file

    (directory / "config.json").write_text(json.dumps(config))
    save_file({k: jnp.asarray(x) for k, x in weights.items()}, directory / "model.safetensors")


def in_shards(directory):
    """Splits ``directory``'s tensors over two files, as large models are saved."""
    from safetensors.numpy import load_file, save_file

    whole = directory / "model.safetensors"
    weights = load_file(whole)
    whole.unlink()
    index = {}
    for i, names in enumerate((sorted(weights)[::2], sorted(weights)[1::2]), 1):
        file = f"model-{i:05}-of-00002.safetensors"
        save_file({name: weights[name] for name in names}, directory / file)
        index |= dict.fromkeys(names, file)
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": index}))


def write_gguf(path, config, weights, kind=None, **fields):
    """A file as llama.cpp's converter writes it.

    ``kind``: name -> the GGMLQuantizationType of a tensor. ``fields``: more of them, as strings
    and arrays; __ in a name stands for a dot.
    """
    gguf = require("gguf", "models")
    writer = gguf.GGUFWriter(path, config["model_type"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(config["vocab_size"])
    for name, value in fields.items():
        add = writer.add_string if isinstance(value, str) else writer.add_array
        add(name.replace("__", "."), value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, x in weights.items():
        x = permuted(name, x, config) if config["model_type"] == "llama" else x
        stored = names.get_name(name, (".weight", ".bias")) or name
        writer.add_tensor(stored, np.ascontiguousarray(x), raw_dtype=kind and kind(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def permuted(name, x, config):
    """A Llama's rows of q and k in interleaved pairs: llama.cpp's ``LlamaModel.permute``."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    field = next((field for part, field in heads.items() if part in name), None)
    if field is None:
        return x
    return x.reshape(config[field], 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
