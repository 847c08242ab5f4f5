"""Hugging Face directories of tiny random models, without torch."""

import json

import jax.numpy as jnp
import numpy as np

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


def tensors(config, dtype=np.float32):
    """Random ones for ``config``, by Hugging Face's names."""
    rng = np.random.default_rng(0)
    width, hidden, keys = 16, 24, 8
    shapes = {"model.embed_tokens.weight": (20, width), "model.norm.weight": (width,)}
    shapes["lm_head.weight"] = (20, width)
    for i in range(2):
        block = {
            "input_layernorm.weight": (width,),
            "self_attn.q_proj.weight": (width, width),
            "self_attn.k_proj.weight": (keys, width),
            "self_attn.v_proj.weight": (keys, width),
            "self_attn.o_proj.weight": (width, width),
            "post_attention_layernorm.weight": (width,),
            "mlp.gate_proj.weight": (hidden, width),
            "mlp.up_proj.weight": (hidden, width),
            "mlp.down_proj.weight": (width, hidden),
        }
        if config["model_type"] == "qwen2":
            block |= {
                f"self_attn.{n}_proj.bias": (s,) for n, s in zip("qkv", (16, 8, 8), strict=True)
            }
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in block.items()}
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def write(directory, config, weights):
    from safetensors.flax import save_file

    (directory / "config.json").write_text(json.dumps(config))
    save_file({k: jnp.asarray(x) for k, x in weights.items()}, directory / "model.safetensors")
