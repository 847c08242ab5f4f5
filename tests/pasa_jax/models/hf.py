"""Random models of Hugging Face transformers, in torch, to compare with."""

import importlib.util

import numpy as np
import pytest

ABSENT = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
needs_torch = pytest.mark.skipif(
    bool(ABSENT), reason=f'{ABSENT} not installed: pip install "pasa-jax[test]"'
)
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


def random_model(family, seed=0, **options):
    """A float32 model, eager, none of whose parameters is at its initial 0 or 1."""
    import torch
    import transformers

    config = getattr(transformers, f"{family}Config")(
        **SIZES | options, attn_implementation="eager"
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        size = 0.2 if parameter.ndim == 2 else 0.1
        parameter.data = (parameter.data if parameter.ndim == 1 else 0) + size * noise
    return model


def logits(model, tokens):
    """[B, T, V] float32."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(np.asarray(tokens))).logits.float().numpy()


def greedy(model, tokens, count, lengths=None):
    """The likeliest ``count`` tokens after prompts padded on the right; [B, count]."""
    import torch

    tokens = np.asarray(tokens)
    longest = tokens.shape[1]
    lengths = np.full(len(tokens), longest) if lengths is None else np.asarray(lengths)
    # Hugging Face generates after prompts padded on the left.
    left = np.stack([np.roll(row, longest - n) for row, n in zip(tokens, lengths, strict=True)])
    mask = np.arange(longest) >= longest - lengths[:, None]
    with torch.no_grad():
        texts = model.generate(
            torch.from_numpy(left),
            attention_mask=torch.from_numpy(mask.astype(np.int64)),
            do_sample=False,
            max_new_tokens=count,
            pad_token_id=0,
        )
    return texts[:, longest:].numpy()
