"""CPU time of masks and biases as data and functions, each beside what it should cost as much as.

    python benchmarks/masks.py
    python benchmarks/masks.py --quick

Every round runs both sides of each case once, in an order that changes; what counts is the ratio of
two medians over the same rounds. Prints numbers and asserts nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from pasa_jax import (
    BlockMask,
    LowRankBias,
    alibi_slopes,
    create_block_mask,
    dot_product_attention,
)

Array = jax.Array
Timed = Callable[[], Any]


def arrays(length: int, batch: int = 1, heads: int = 8, size: int = 64) -> list[Array]:
    """query, key and value, bfloat16."""
    rng = np.random.default_rng(0)
    shape = (batch, length, heads, size)
    return [jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for _ in range(3)]


def timed(function: Callable[..., Any], *args: Any, gradient: bool = False) -> Timed:
    """A call of the compiled function, or of its gradients."""

    def total(*args: Any) -> Array:
        return jnp.sum(function(*args).astype(jnp.float32))

    compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2)) if gradient else function)
    return lambda: jax.block_until_ready(compiled(*args))


def attention(**keywords: Any) -> Callable[..., Array]:
    return lambda q, k, v: dot_product_attention(q, k, v, **keywords)


def cases(scale: int) -> Iterator[tuple[str, float, Timed, Timed]]:
    """Name, target of the ratio, the side that is measured, and what it is measured against.

    Arguments:
      scale: by which all lengths are divided.
    """
    length, documents = 8192 // scale, 8
    packed = arrays(length)
    ids = jnp.repeat(jnp.arange(documents, dtype=jnp.int32), length // documents)[None]
    as_batch = [x.reshape(documents, -1, *x.shape[2:]) for x in packed]
    for causal in (False, True):
        for gradient in (False, True):
            keywords = {"is_causal": causal, "implementation": "lax"}
            name = f"{documents} documents of {length // documents} by segments, over their batch"
            name += (", causal" if causal else "") + (", gradients" if gradient else "")
            ours = timed(attention(segment_ids=ids, **keywords), *packed, gradient=gradient)
            yield name, 1.15, ours, timed(attention(**keywords), *as_batch, gradient=gradient)

    length = 32768 // scale
    window, long = 1024 // scale, arrays(length, heads=2)
    share = 2 * (window + 512) / length  # of the tiles that a causal call visits
    ours = timed(attention(is_causal=True, local_window_size=(window, 0)), *long)
    name = f"window of {window} at {length}, over causal · share of tiles {share:.3f}"
    yield name, 1.3 * share, ours, timed(attention(is_causal=True), *long)

    length = 16384 // scale
    long, rng = arrays(length, heads=2), np.random.default_rng(1)
    for block in (128, 512):
        blocks = max(1, length // block)
        kinds = 2 * (rng.random((1, 1, blocks, blocks)) < 0.1)
        mask = BlockMask.from_kinds(kinds, (length, length), block)
        name = f"10 % of the blocks of {block} at {length}, over all"
        yield name, 0.15, timed(attention(block_mask=mask), *long), timed(attention(), *long)

    length = 4096 // scale
    short, slopes = arrays(length), alibi_slopes(8)
    low_rank = LowRankBias.alibi(slopes, length)
    dense = low_rank.dense()
    ours = timed(attention(bias=low_rank, implementation="lax"), *short)
    peer = timed(
        lambda q, k, v: jax.nn.dot_product_attention(q, k, v, dense.astype(q.dtype)), *short
    )
    yield f"bias of rank 2 at {length}, over jax.nn with it dense", 1 / 1.3, ours, peer
    plain = timed(attention(implementation="lax"), *short)
    yield f"bias of rank 2 at {length}, over none", 1.1, ours, plain

    def causal_mod(b: Array, h: Array, q: Array, kv: Array) -> Array:
        return q >= kv

    def alibi(s: Array, b: Array, h: Array, q: Array, kv: Array, *, head_data: Array) -> Array:
        return s + head_data * (kv - q).astype(s.dtype)

    by_place = timed(attention(is_causal=True), *short)
    masked = timed(attention(mask_mod=causal_mod), *short)
    yield f"causal as mask_mod at {length}, over is_causal", 1.0, masked, by_place
    blocks_of = create_block_mask(causal_mod, None, None, length, length, 512)
    yield (
        f"causal as block mask at {length}, over is_causal",
        1.0,
        timed(attention(block_mask=blocks_of), *short),
        by_place,
    )
    scored = timed(attention(score_mod=alibi, head_data=slopes), *short)
    yield f"ALiBi as score_mod at {length}, over none", 1.0, scored, plain


def measured(ours: Timed, other: Timed, rounds: int) -> tuple[float, float]:
    """Median seconds of both, over the same rounds."""
    times: tuple[list[float], list[float]] = ([], [])
    for r in range(rounds + 1):
        for side in ((0, 1), (1, 0))[r % 2]:
            start = time.perf_counter()
            (ours, other)[side]()
            if r:  # the first round compiles
                times[side].append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="An eighth of the lengths.")] = False,
    only: Annotated[str, typer.Option(help="Cases whose name holds this.")] = "",
) -> None:
    """Prints a table of ratios."""
    table = Table("case", "ours ms", "other ms", "ratio", "target")
    for name, target, ours, other in cases(8 if quick else 1):
        if only not in name:
            continue
        a, b = measured(ours, other, rounds)
        row = (f"{1000 * a:.1f}", f"{1000 * b:.1f}", f"{a / b:.3f}", f"{target:.3f}")
        table.add_row(name, *row)
        print(name, *row, flush=True)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
