"""Calls with lists of tiles and functions, to be compiled for chips that are not there.

`pallas_kernels.aot.Compiler` imports this module in its own process and asks `attention` by name.

    python -m tests.pallas_kernels.mods_aot tpu_v6e --length 8192 --block-q 512 --block-kv 1024
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.aot import Compiler, MakeArray, gradient_alone, kernel_alone
from pasa_jax import BlockMask, LowRankBias, Schedule, alibi_slopes
from pasa_jax.core.target import find_target

Array = jax.Array


def documents(b: Array, h: Array, q: Array, kv: Array, *, q_data: Array, kv_data: Array) -> Array:
    return (q_data == kv_data) & (q >= kv)


def alibi(s: Array, b: Array, h: Array, q: Array, kv: Array, *, head_data: Array) -> Array:
    return s + head_data * (kv - q).astype(jnp.float32)


def _neighbours(b: Array, h: Array, q: Array, kv: Array) -> Array:
    # Shifts, not // and %: Mosaic lowers those only where a TPU is there.
    return (abs((q >> 5) - (kv >> 5)) <= 3) & (abs((q & 31) - (kv & 31)) <= 3)


def _bucket(s: Array, b: Array, h: Array, q: Array, kv: Array, *, head_data: list[Array]) -> Array:
    place = jnp.clip(q - kv, 0, len(head_data) - 1)
    for i, x in enumerate(head_data):
        s = s + jnp.where(place == i, x, 0.0)
    return s


def _soft_cap(s: Array, b: Array, h: Array, q: Array, kv: Array) -> Array:
    return 20.0 * jnp.tanh(s / 20.0)


def _prefix(b: Array, h: Array, q: Array, kv: Array, *, head_data: Array) -> Array:
    return (q >= kv) | (kv < head_data)


def _blocks(length: int, size: int, *, causal: bool) -> Callable[[Array], dict[str, Any]]:
    def keywords(kinds: Array) -> dict[str, Any]:
        mask = BlockMask.from_kinds(kinds, (length, length), size)
        return {"block_mask": mask, "is_causal": causal}

    return keywords


NAMES = (
    "block mask",
    "segments",
    "positions",
    "documents",
    "prefix",
    "dilated",
    "neighbours",
    "ALiBi",
    "relative",
    "soft cap",
    "low rank",
)


def case(name: str, length: int, heads: int, block: int) -> tuple[list[Any], Any]:
    """The arrays (shape and type) and the keywords that they make, of a named call."""
    ids, tiles = ((1, length), "int32"), -(-length // block)
    of_heads = ((heads,), "float32")
    cases: dict[str, tuple[list[Any], Any]] = {
        "segments": ([ids], lambda x: {"segment_ids": x, "is_causal": True}),
        "positions": (
            [ids],
            lambda x: {"q_positions": x, "kv_positions": x, "local_window_size": (1024, 0)},
        ),
        "block mask": ([((1, 1, tiles, tiles), "int8")], _blocks(length, block, causal=True)),
        "documents": (
            [ids],
            lambda x: {"mask_mod": documents, "q_data": x, "kv_data": x},
        ),
        "prefix": ([((heads,), "int32")], lambda x: {"mask_mod": _prefix, "head_data": x}),
        "dilated": ([], lambda: {"mask_mod": lambda b, h, q, kv: (q - kv) % 4 == 0}),
        "neighbours": ([], lambda: {"mask_mod": _neighbours}),
        "ALiBi": ([of_heads], lambda x: {"score_mod": alibi, "head_data": x, "is_causal": True}),
        "relative": (
            [of_heads] * 8,
            lambda *x: {"score_mod": _bucket, "head_data": list(x), "is_causal": True},
        ),
        "soft cap": ([], lambda: {"score_mod": _soft_cap}),
        "low rank": (
            [],
            lambda: {"bias": LowRankBias.alibi(alibi_slopes(heads), length), "is_causal": True},
        ),
    }
    return cases[name]


def attention(
    array: MakeArray,
    *,
    name: str,
    length: int,
    schedule: dict[str, Any],
    heads: int = 8,
    kv_heads: int | None = None,
    head_dim: int = 128,
    block: int = 1024,
    dtype: str = "bfloat16",
    gradient: bool = False,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The kernel of a named call, and its arguments.

    Arguments:
      gradient: the pullback of the queries instead, the forward pass included.
    """
    kind = find_target(schedule["target"]).kind
    shapes, keywords = case(name, length, heads, block)

    def forward(q: Array, k: Array, v: Array, *further: Array) -> Any:
        options = {"implementation": f"pallas_{kind}", "schedule": Schedule(**schedule)}
        compute = gradient_alone if gradient else kernel_alone
        return compute(kind, q, k, v, **keywords(*further), **options)

    kv = (1, length, kv_heads or heads, head_dim)
    operands = (array((1, length, heads, head_dim), dtype), array(kv, dtype), array(kv, dtype))
    return forward, (*operands, *(array(*x) for x in shapes))


def main() -> None:
    """Prints for each call whether it compiles, and how long that takes."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("chip")
    for name, default in (("length", 8192), ("block-q", 512), ("block-kv", 1024), ("heads", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--gradient", action="store_true", help="the backward pass too")
    parser.add_argument("--limit", type=int, default=600, help="seconds for each")
    parser.add_argument("--only", nargs="*", default=NAMES, choices=NAMES)
    given = parser.parse_args()
    schedule = {"target": given.chip, "block_q": given.block_q, "block_kv": given.block_kv}
    with Compiler(limit=given.limit) as compiler:
        for name in given.only:
            start = time.monotonic()
            report = compiler(
                "tests.pallas_kernels.mods_aot:attention",
                given.chip,
                estimates=False,
                name=name,
                length=given.length,
                heads=given.heads,
                schedule=schedule,
                block=max(given.block_q, given.block_kv),
                gradient=given.gradient,
            )
            said = report.error or f"compiles in {time.monotonic() - start:.0f} s"
            if report.registers:
                said += f", {report.registers} registers, {report.spills} bytes spilt"
            print(given.chip, name, given.length, said, flush=True)


if __name__ == "__main__":
    main()
