"""A Qwen2 whose scores overflow float16: in torch, with Flax's attention, and with PASA.

    pip install "pasa-jax[models]" torch transformers
    python examples/qwen2_in_float16.py

No trained weights are needed: a random Qwen2 gets biases on its keys as large as published ones
(the norm of k_proj.bias is 600 to 900 in the first and the last layer of Qwen2-7B) and on its
queries such that q·k is above float16's 65504. They are the same for every key of a row, so softmax
does not see them in real arithmetic. They lie on the rotary channels that hardly turn, which hold
nothing else, so the cast of the keys to 16 bits loses next to nothing, and what the rows differ by
is attention's own doing. (On 48 channels that do hold something, the cast alone costs a divergence
of 0.4, in torch as here, and no attention can give that back.)
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]
from flax import linen

import pasa_jax
from pasa_jax.models import decoder, metrics

Array = jax.Array
NORMS = {0: 900.0, -1: 600.0}  # of k_proj.bias, by layer
QUIET = 60  # of 64 rotary pairs; those from here on turn by less than 3e-6 a position
BEYOND = 1.3  # q·k over 65504


def main(
    length: int = 128,
    layers: int = 6,
    vocabulary: int = 512,
    new_tokens: int = 24,
    dtypes: Sequence[str] = ("float16", "bfloat16", "float32"),
) -> list[dict[str, Any]]:
    """Prints a line per model, torch in float32 first; returns what it prints."""
    transformers.utils.logging.disable_progress_bar()
    tokens = np.random.default_rng(0).integers(0, vocabulary, (1, length))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        random_qwen2(layers, vocabulary).save_pretrained(directory)
        for name, logits, follow in answers(Path(directory), dtypes, tokens, new_tokens):
            row = {"model": name, "logits": np.asarray(logits, np.float32), "greedy": follow}
            rows.append(row | compared(rows[0] if rows else row, row))
            print(line(rows[-1]) if rows[1:] else f"{HEADER}\n{line(rows[-1])}")
    return rows


HEADER = f"{'':36}     NaN       KL  argmax  greedy"


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    return (
        f"{row['model']:36}  {row['nan']:6.1%}  {row['divergence']:7.1e}  {row['argmax']:6.1%}"
        f"  {row['same']:2} of {len(row['greedy'])}"
    )


def compared(true: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """The columns: against the first row, torch in float32."""
    true_log_p, log_p = (metrics.log_probabilities(jnp.asarray(x["logits"])) for x in (true, row))
    return {
        "nan": float(np.isnan(row["logits"]).mean()),
        "divergence": metrics.divergence(true_log_p, log_p),
        "argmax": float(np.mean(jnp.argmax(true_log_p, -1) == jnp.argmax(log_p, -1))),
        "same": int(np.cumprod(true["greedy"] == row["greedy"]).sum()),
    }


def random_qwen2(layers: int, vocabulary: int) -> Any:
    """Heads of 128, two queries a key head; float32, eager."""
    torch.manual_seed(0)
    config: Any = transformers.Qwen2Config(
        vocab_size=vocabulary, hidden_size=512, intermediate_size=1024, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, initializer_range=0.06,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).eval()
    # As in trained models, the token itself weighs in the stream, and some next tokens are likely.
    model.model.embed_tokens.weight.data *= 8
    model.lm_head.weight.data *= 2
    for layer, norm in NORMS.items():
        attention: Any = model.model.layers[layer].self_attn
        bias = quiet_bias(config.num_key_value_heads, norm)
        attention.k_proj.bias.data = bias.flatten()
        attention.k_proj.weight.data[bias.flatten() != 0] = 0
        along = BEYOND * 65504 / bias.square().sum(1, keepdim=True) * bias
        attention.q_proj.bias.data = along.repeat_interleave(2, dim=0).flatten()
    return model


def quiet_bias(heads: int, norm: float) -> torch.Tensor:
    """[heads, 128] of random signs on the last rotary pairs, of the given norm in all."""
    signs = torch.randint(0, 2, (heads, 2, 64)) * 2.0 - 1
    signs[..., :QUIET] = 0
    return (signs * norm / signs.norm()).flatten(1)


def answers(
    directory: Path, dtypes: Sequence[str], tokens: np.ndarray, count: int
) -> Iterator[tuple[str, Any, np.ndarray]]:
    """Name, logits [1, T, V] rounded to the model's type, the tokens that follow."""
    for dtype, attention in (
        ("float32", "eager"),
        ("float16", "eager"),
        ("float16", "sdpa"),
        ("bfloat16", "eager"),
        ("bfloat16", "sdpa"),
    ):
        if dtype in ("float32", *dtypes):
            answer = in_torch(directory, dtype, attention, tokens, count)
            yield f"torch {dtype}, {attention}", *answer
    for dtype, name, attention in (
        ("float16", "Flax's attention", flax_attention),
        ("float16", "float32 scores", float32_scores),
        ("float16", "PASA", None),
        ("bfloat16", "PASA", None),
        ("float32", "PASA", None),
    ):
        if dtype in dtypes:
            yield f"ours {dtype}, {name}", *in_jax(directory, dtype, attention, tokens, count)


def in_torch(
    directory: Path, dtype: str, attention: str, tokens: np.ndarray, count: int
) -> tuple[Any, np.ndarray]:
    """Hugging Face's model."""
    model: Any = transformers.Qwen2ForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype), attn_implementation=attention
    ).eval()
    ids = torch.from_numpy(tokens)
    with torch.no_grad():
        logits = model(ids).logits.float().numpy()
        mask = torch.ones_like(ids)
        texts = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=count, pad_token_id=0
        )
    return logits, texts[0, ids.shape[1] :].numpy()


def in_jax(
    directory: Path, dtype: str, attention: Callable[..., Array] | None, tokens: Any, count: int
) -> tuple[Any, np.ndarray]:
    """Ours, on the same weights."""
    model = decoder.load(directory, dtype)
    forward = jax.jit(decoder.Decoder.__call__, static_argnames="attention")
    logits = forward(model, tokens, attention=attention)
    follow = model.generate(tokens, count, attention=attention)
    return logits.astype(dtype).astype(jnp.float32), np.asarray(follow[0])


def flax_attention(query: Array, key: Array, value: Array, layer: Array) -> Array:
    """Flax's own, which multiplies scores out in the activations' type."""
    groups = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
    mask = linen.make_causal_mask(jnp.ones(query.shape[:2]), dtype=bool)
    return linen.dot_product_attention(query, key, value, mask=mask)


def float32_scores(query: Array, key: Array, value: Array, layer: Array) -> Array:
    """The best that inputs in 16 bits allow, at the price of scores in 32."""
    return pasa_jax.dot_product_attention(
        query, key, value, is_causal=True, shift="none", precision="float32"
    )


if __name__ == "__main__":
    main()
