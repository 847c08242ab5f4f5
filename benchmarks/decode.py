"""CPU time of a step of decoding beside plain products over the same keys, of text beside torch.

    python benchmarks/decode.py
    python benchmarks/decode.py --text      # also tokens per second of SmolLM2, beside transformers

Every round runs both sides of each case once, in an order that changes; what counts is the ratio of
two medians over the same rounds. Prints numbers and asserts nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from pasa_jax import dot_product_attention, models
from pasa_jax.plugins import KVCache

Array = jax.Array
Timed = Callable[[], Any]
KEYS, HEADS, KV_HEADS, SIZE = 32768, 16, 4, 64
PROMPT = "def fibonacci(n):"


def arrays(dtype: str, keys: int) -> list[Array]:
    """query [1, 1, N, D], key and value [1, S, K, D]."""
    rng = np.random.default_rng(0)
    shapes = [(1, 1, HEADS, SIZE), *[(1, keys, KV_HEADS, SIZE)] * 2]
    return [jnp.asarray(rng.standard_normal(x), dtype) for x in shapes]


def timed(function: Callable[..., Any], *args: Any) -> Timed:
    compiled = jax.jit(function)
    return lambda: jax.block_until_ready(compiled(*args))


def products(q: Array, k: Array, v: Array) -> Array:
    """Two products and a softmax over keys [K, S, D] whose heads come first."""
    q = q.reshape(KV_HEADS, -1, SIZE)
    s = jnp.einsum("kgd,ksd->kgs", q, k, preferred_element_type=jnp.float32)
    p = jax.nn.softmax(s / np.float32(np.sqrt(SIZE)), axis=-1).astype(v.dtype)
    return jnp.einsum("kgs,ksd->kgd", p, v, preferred_element_type=jnp.float32)


def filled(k: Array, v: Array, **options: Any) -> KVCache:
    empty = KVCache.empty(1, k.shape[1], KV_HEADS, SIZE, k.dtype, **options)
    return jax.block_until_ready(jax.jit(KVCache.append)(empty, k, v))


def cases(keys: int) -> Iterator[tuple[str, float | None, Timed, Timed]]:
    """Name, target of the ratio, the side that is measured, and what it is measured against."""
    for dtype in ("bfloat16", "float32"):
        q, k, v = arrays(dtype, keys)
        first = [jnp.moveaxis(x[0], 1, 0) for x in (k, v)]
        plain = timed(products, q, *first)
        cache = filled(k, v)
        ours = timed(KVCache.attend, cache, q)
        yield f"{dtype}: a step over {keys} keys, over two products", 1.3, ours, plain
        short = replace(cache, length=jnp.full_like(cache.length, 512))
        name = f"{dtype}: a step over 512 keys of {keys}, over all"
        yield name, 0.05, timed(KVCache.attend, short, q), ours
        windowed = timed(lambda c, q: c.attend(q, local_window_size=(1024, 0)), cache, q)
        yield f"{dtype}: a step with a window of 1024, over all", None, windowed, ours
        packed = timed(KVCache.attend, filled(k, v, format="int8"), q)
        yield f"{dtype}: a step over int8 pages, over its own type", None, packed, ours
        of_jax = timed(jax.nn.dot_product_attention, q, k, v)
        name = f"{dtype}: one query without a cache, over jax.nn"
        yield name, 1.2, timed(dot_product_attention, q, k, v), of_jax


def in_torch(model: models.Decoder, dtype: str) -> Any:
    """The same weights in transformers' Llama."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    c = model.config
    config = transformers.LlamaConfig(
        vocab_size=c.vocabulary,
        hidden_size=c.width,
        intermediate_size=c.hidden,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        head_dim=c.head_dim,
        max_position_embeddings=c.max_length,
        rms_norm_eps=c.epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_base},
        tie_word_embeddings=c.tied,
        eos_token_id=None,
        bos_token_id=None,
    )
    peer = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()

    def tensor(x: Any) -> Any:
        return torch.from_numpy(np.array(x[...], np.float32)).to(getattr(torch, dtype))

    blocks, state = model.blocks, {"model.embed_tokens.weight": tensor(model.embedding)}
    state |= {"lm_head.weight": state["model.embed_tokens.weight"]}
    state |= {"model.norm.weight": tensor(model.norm.scale)}
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
    layers = {f"self_attn.{y}": getattr(blocks.attention, x) for x, y in names.items()}
    layers |= {f"mlp.{x}_proj": getattr(blocks.feed_forward, x) for x in ("gate", "up", "down")}
    norms = {"input_layernorm": blocks.attention_norm}
    norms |= {"post_attention_layernorm": blocks.feed_forward_norm}
    for i in range(c.layers):
        at = f"model.layers.{i}."
        state |= {f"{at}{x}.weight": tensor(y.kernel)[i].T for x, y in layers.items()}
        state |= {f"{at}{x}.weight": tensor(y.scale)[i] for x, y in norms.items()}
    peer.load_state_dict(state)
    return peer


def text(dtype: str, tokens: int) -> tuple[str, None, Timed, Timed]:
    """SmolLM2's own next ``tokens``, by `Decoder.generate` and by transformers in torch."""
    import torch  # pyright: ignore[reportMissingImports]

    model, tokenizer = models.load("smollm2", dtype=dtype)
    ids, peer = np.asarray([tokenizer.encode(PROMPT).ids]), in_torch(model, dtype)
    given = torch.from_numpy(ids)
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}

    def by_torch() -> Any:
        with torch.inference_mode():
            return peer.generate(given, attention_mask=torch.ones_like(given), **options)

    def ours() -> Any:
        return jax.block_until_ready(model.generate(jnp.asarray(ids), tokens))

    if dtype == "float32":  # the same text
        theirs = by_torch()[0, ids.shape[1] :].numpy()
        same = np.array_equal(theirs, np.asarray(ours())[0])
        print(f"{dtype}: both write the same text: {same}")
    return f"{dtype}: {tokens} tokens of SmolLM2, over torch", None, ours, by_torch


def medians(ours: Timed, peer: Timed, rounds: int) -> tuple[float, float]:
    """Milliseconds of both sides, interleaved."""
    sides = (ours, peer)
    for side in sides:
        side()
    seconds: tuple[list[float], list[float]] = ([], [])
    for i in range(rounds):
        for which in (0, 1) if i % 2 else (1, 0):
            start = time.perf_counter()
            sides[which]()
            seconds[which].append(time.perf_counter() - start)
    return statistics.median(seconds[0]) * 1e3, statistics.median(seconds[1]) * 1e3


def main(
    keys: Annotated[int, typer.Option(help="Keys in the cache.")] = KEYS,
    rounds: Annotated[int, typer.Option(help="Rounds of each case.")] = 31,
    text_too: Annotated[bool, typer.Option("--text", help="SmolLM2 beside torch.")] = False,
    tokens: Annotated[int, typer.Option(help="Tokens of text.")] = 128,
) -> None:
    """Prints a table of times and ratios."""
    table = Table("case", "ms", "ms of the other", "ratio", "target")

    def add(name: str, target: float | None, ours: Timed, peer: Timed, rounds: int) -> None:
        found = medians(ours, peer, rounds)
        shown = "–" if target is None else f"{target:.2f}"
        table.add_row(name, *(f"{x:.2f}" for x in found), f"{found[0] / found[1]:.3f}", shown)

    for case in cases(keys):
        add(*case, rounds)
    if text_too:
        for dtype in ("float32", "bfloat16"):
            add(*text(dtype, tokens), 5)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
