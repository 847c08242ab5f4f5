"""What Hugging Face's models in torch answer, for small models of random weights.

    python -m tests.pasa_jax.models.answers

asks torch and writes answers.npz and answers.json beside this file. `make test` compares with what
is recorded there, and so needs no torch; `make test-full` asks torch again (test_answers.py). The
weights are random numbers of NumPy, of the seeds below.
"""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from pasa_jax import models
from pasa_jax.models import _files
from tests.pasa_jax.models import directories

SIZES = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
}
TIED = {"tie_word_embeddings": True}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {}),
    "qwen2, tied": ("Qwen2", TIED),
    "llama": ("Llama", {}),
    "llama, tied, one key head": ("Llama", {**TIED, "num_key_value_heads": 1}),
    "llama, biases, wide heads": ("Llama", {"attention_bias": True, "head_dim": 24}),
    "llama, another theta": (
        "Llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ),
}
# Rotary positions that hardly turn the slowest pair of each head.
SLOW = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e8}}
TOKENS = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, 13))
PROMPTS = np.random.default_rng(1).integers(0, 50, (3, 11))
LENGTHS = np.array([11, 1, 6])
BERT = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
}
TEXT_LENGTHS = np.array([24, 5, 13])
SENTENCES = (
    "A man is eating food at a table.",
    "Someone is having a meal.",
    "The central bank raised interest rates again, to slow the rise of prices.",
    "Interest rates went up.",
)
PIECES = "It's 2024: x1 = 12.5\n\n  naïve naïve  'LL don't\tend  <|im_end|>ok"
FOLDER = Path(__file__).parent


@cache
def _recorded() -> dict[str, Any]:
    texts = json.loads((FOLDER / "answers.json").read_text(encoding="utf-8"))
    with np.load(FOLDER / "answers.npz") as arrays:
        return texts | dict(arrays)


def recorded(name: str) -> Any:
    """The answer of that name: an array, or what JSON holds."""
    return _recorded()[name]


# The models, written without torch.


def weights(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """A decoder's, none of which is at its initial 0 or 1."""
    found = directories.tensors(config)
    if config["tie_word_embeddings"]:
        del found["lm_head.weight"]
    return {
        name: (0.2 if x.ndim == 2 else 0.1) * x + np.float32(name.endswith("norm.weight"))
        for name, x in found.items()
    }


def biased(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Queries and keys of layer 0 biased so far that float16 cannot hold their product.

    On the slowest pair of each head, so that the bias is the same at every position.
    """
    tensors = {name: x.copy() for name, x in tensors.items()}
    for name, heads in (("q", 4), ("k", 2)):
        slow = np.tile(np.arange(16) % 8 == 7, heads)
        tensors[f"model.layers.0.self_attn.{name}_proj.bias"][slow] = 256.0
    tensors["model.layers.0.self_attn.k_proj.weight"][slow] = 0
    return tensors


def write_decoder(directory: Path, name: str, config: dict[str, Any] | None = None) -> Path:
    """One of `DECODERS`, or "qwen2, biased"; with Hugging Face's own config.json."""
    config = recorded(f"config: {name}") if config is None else config
    tensors = weights(config)
    directories.write(directory, config, biased(tensors) if "biased" in name else tensors)
    return directory


def write_encoder(directory: Path, config: dict[str, Any] | None = None) -> Path:
    """A BERT of random weights."""
    config = recorded("config: bert") if config is None else config
    width, hidden = config["hidden_size"], config["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], width),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], width),
        "embeddings.token_type_embeddings.weight": (config["type_vocab_size"], width),
        "embeddings.LayerNorm.weight": (width,),
        "embeddings.LayerNorm.bias": (width,),
        "pooler.dense.weight": (width, width),
        "pooler.dense.bias": (width,),
    }
    layer = {f"attention.self.{x}": (width, width) for x in ("query", "key", "value")}
    layer |= {"attention.output.dense": (width, width), "attention.output.LayerNorm": (width,)}
    layer |= {"intermediate.dense": (hidden, width), "output.dense": (width, hidden)}
    layer["output.LayerNorm"] = (width,)
    for i in range(config["num_hidden_layers"]):
        for name, shape in layer.items():
            shapes[f"encoder.layer.{i}.{name}.weight"] = shape
            shapes[f"encoder.layer.{i}.{name}.bias"] = shape[:1]
    rng = np.random.default_rng(2)
    tensors = {
        name: (0.1 * rng.standard_normal(x) + name.endswith("LayerNorm.weight")).astype(np.float32)
        for name, x in shapes.items()
    }
    directories.write(directory, config, tensors)
    return directory


def text(seed: int) -> np.ndarray:
    """[3, 24] tokens for the encoder."""
    return np.random.default_rng(seed).integers(0, BERT["vocab_size"], (3, 24))


def token_types() -> np.ndarray:
    return np.random.default_rng(6).integers(0, 2, (3, 24))


def minilm_tokens() -> tuple[np.ndarray, np.ndarray]:
    """The ids of `SENTENCES`, padded, and their lengths."""
    tokenizer = _files.read_tokenizer(models.find("minilm"))
    tokenizer.enable_padding()
    found = tokenizer.encode_batch(list(SENTENCES))
    lengths = [sum(one.attention_mask) for one in found]
    return np.asarray([one.ids for one in found]), np.asarray(lengths)


# The answers, by torch.


def ask() -> dict[str, Any]:
    """Every answer, by name."""
    import torch
    import transformers

    versions = {x.__name__: x.__version__ for x in (torch, transformers, np)}
    found: dict[str, Any] = {"versions": versions}
    found["config: bert, whole"] = transformers.BertConfig(**BERT).to_dict()
    pieces = transformers.Qwen2Tokenizer().backend_tokenizer
    normal = pieces.normalizer.normalize_str(PIECES)
    found["pieces"] = [[x, list(at)] for x, at in pieces.pre_tokenizer.pre_tokenize_str(normal)]
    for name, (family, options) in (DECODERS | {"qwen2, biased": ("Qwen2", SLOW)}).items():
        config = getattr(transformers, f"{family}Config")(**SIZES | options)
        found[f"config: {name}"] = json.loads(config.to_json_string())
        with tempfile.TemporaryDirectory() as directory:
            write_decoder(Path(directory), name, found[f"config: {name}"])
            found |= _decoder_answers(name, _decoder(family, directory))
    for family in ("Qwen2", "Llama"):
        found[f"gguf: {family.lower()}"] = _gguf_answer(family)
    return found | _encoder_answers()


def _decoder(family: str, directory: Any) -> Any:
    import torch
    import transformers

    kind = getattr(transformers, f"{family}ForCausalLM")
    options = {"attn_implementation": "eager", "dtype": torch.float32}
    return kind.from_pretrained(directory, **options).eval()


def _logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """[B, T, V] float32."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.float().numpy()


def _decoder_answers(name: str, model: Any) -> dict[str, Any]:
    import torch

    found = {f"logits: {name}": _logits(model, TOKENS)}
    if name == "qwen2":
        found["text"] = _greedy(model)
    if name.startswith("qwen2") and name != "qwen2, tied":
        for dtype in (torch.bfloat16, torch.float16):
            found[f"logits: {name}, {str(dtype)[6:]}"] = _logits(model.to(dtype), TOKENS)
    return found


def _greedy(model: Any) -> np.ndarray:
    """The 16 likeliest tokens after each of `PROMPTS`."""
    import torch

    longest = PROMPTS.shape[1]
    # Hugging Face generates after prompts padded on the left.
    left = np.stack([np.roll(row, longest - n) for row, n in zip(PROMPTS, LENGTHS, strict=True)])
    mask = np.arange(longest) >= longest - LENGTHS[:, None]
    with torch.no_grad():
        texts = model.generate(
            torch.from_numpy(left),
            attention_mask=torch.from_numpy(mask.astype(np.int64)),
            do_sample=False,
            max_new_tokens=16,
            pad_token_id=0,
        )
    return texts[:, longest:].numpy()


GGUF_TOKENS = np.arange(24)[None] % 64


def _gguf_answer(family: str) -> np.ndarray:
    """By Hugging Face's own reader of GGUF files, which knows whose rows are permuted."""
    import transformers
    from transformers import modeling_gguf_pytorch_utils

    from tests.pasa_jax.models.test_gguf import write_quantized

    with tempfile.TemporaryDirectory() as directory:
        path, config = write_quantized(Path(directory) / "model.gguf", family.lower())
        model = getattr(transformers, f"{family}ForCausalLM")(
            transformers.AutoConfig.for_model(**config, attn_implementation="eager")
        )
        found = modeling_gguf_pytorch_utils.load_gguf_checkpoint(path, True, model)
    model.load_state_dict(found["tensors"])
    return _logits(model.eval(), GGUF_TOKENS)


def _encoder_answers() -> dict[str, Any]:
    import transformers

    config = json.loads(transformers.BertConfig(**BERT).to_json_string()) | {"model_type": "bert"}
    with tempfile.TemporaryDirectory() as directory:
        write_encoder(Path(directory), config)
        model = transformers.BertModel.from_pretrained(directory).eval()
    everything = np.full(3, 24)
    found = {"config: bert": config}
    found["states: padded"] = _states(model, text(1), TEXT_LENGTHS, token_types())
    found |= {f"states: {i}": _states(model, text(i), everything) for i in (2, 3)}
    model = transformers.BertModel.from_pretrained(models.find("minilm")).eval()
    tokens, lengths = minilm_tokens()
    states = _states(model, tokens, lengths)
    means = [rows[:n].mean(axis=0) for rows, n in zip(states, lengths, strict=True)]
    found["minilm"] = np.stack(means) / np.linalg.norm(means, axis=-1, keepdims=True)
    return found


def _states(model: Any, tokens: Any, lengths: Any, types: Any = None) -> np.ndarray:
    """Hidden states [B, T, width]."""
    import torch

    seen = np.arange(tokens.shape[1]) < lengths[:, None]
    with torch.no_grad():
        out = model(
            torch.tensor(tokens),
            attention_mask=torch.tensor(seen),
            token_type_ids=None if types is None else torch.tensor(types),
        )
    return out.last_hidden_state.numpy()


def main() -> None:
    found = ask()
    arrays = {name: x for name, x in found.items() if isinstance(x, np.ndarray)}
    np.savez_compressed(FOLDER / "answers.npz", **arrays)
    texts = {name: x for name, x in found.items() if name not in arrays}
    text = json.dumps(texts, indent=1, ensure_ascii=False)
    (FOLDER / "answers.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
