"""Cycles of the TPU kernels beside lists, functions and biases of low rank, by the TPU compiler.

    python benchmarks/mods_cycles.py --chip tpu_v6e

As `tpu_cycles`: no TPU is needed, one batch entry, 8 heads of 128 channels, bfloat16. Counted are
the kernels alone: of the forward pass with the residuals, and of the backward pass.

The compiler's estimate follows what comes from the indices of a program, and takes a condition that
comes from data for false. So here lists are known when the kernel is compiled, and a tile that is
listed as partly seen is computed, whatever its mask would say. What makes the lists is not counted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated, Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

import pallas_kernels._tpu_backward_head
import pallas_kernels._tpu_backward_streamed
import pallas_kernels.tpu
from pallas_kernels import _common
from pallas_kernels._tpu_lists import TileList
from pallas_kernels.aot import Compiler, MakeArray, gradient_alone
from pasa_jax import BlockMask, LowRankBias, Schedule, alibi_slopes
from pasa_jax.call.api import canonical
from pasa_jax.core.mask import Mask
from pasa_jax.core.walk import Walk

HEADS, SIZE = 8, 128
Array = jax.Array


def _alibi(s: Array, b: Array, h: Array, q: Array, kv: Array, *, head_data: Array) -> Array:
    return s + head_data * (kv - q).astype(jnp.float32)


def _blocks(length: int, block: int, share: float) -> BlockMask:
    """As many blocks as that share, drawn at random, each seen whole."""
    side = length // block
    shown = np.random.default_rng(0).permutation(side * side) < share * side * side
    kinds = 2 * shown.reshape(1, 1, side, side).astype(np.int8)
    return BlockMask.from_kinds(kinds, (length, length), block)


# The keywords by name, of a length.
CALLS: dict[str, Callable[[int], dict[str, Any]]] = {
    "full": lambda n: {},
    "causal": lambda n: {"is_causal": True},
    "causal, by positions": lambda n: {
        "is_causal": True,
        "q_positions": np.arange(n),
        "kv_positions": np.arange(n),
    },
    "causal, documents of 512": lambda n: {
        "is_causal": True,
        "segment_ids": np.arange(n)[None] // 512,
    },
    "causal, documents of 512, as a batch": lambda n: {"is_causal": True, "batch": n // 512},
    "causal, ALiBi as a score_mod": lambda n: {
        "is_causal": True,
        "score_mod": _alibi,
        "head_data": alibi_slopes(HEADS),
    },
    "causal, ALiBi as a LowRankBias": lambda n: {
        "is_causal": True,
        "bias": LowRankBias.alibi(alibi_slopes(HEADS), n),
    },
    "10 % of the blocks of 512": lambda n: {"block_mask": _blocks(n, 512, 0.1)},
}


class _Known(tuple):  # type: ignore[type-arg]
    """The shape of lists, and the lists, whose numbers are known."""

    lists: Any


def _chosen(numbers: np.ndarray, i: Any) -> Any:
    """numbers[i] of a traced index, by comparisons, which the estimate follows."""
    found = jnp.int32(numbers[0])
    for place, x in enumerate(numbers[1:], 1):
        found = jnp.where(i == place, jnp.int32(x), found)
    return found


@contextlib.contextmanager
def known_lists(mask: Mask) -> Iterator[None]:
    """Lists of this mask, whose arrays hold numbers, whatever a kernel is given."""

    def lists_of(_: Mask, *sizes: int, **options: bool) -> Any:
        with jax.ensure_compile_time_eval():
            return _common.lists_of(mask, *sizes, **options)

    def of(lists: Any) -> TileList:
        numbers = original(lists).numbers
        shape = _Known(lists.order.shape)
        shape.lists = jax.tree.map(lambda x: np.asarray(x)[0, 0], lists)
        return TileList(numbers, shape)

    def known(name: str) -> Any:
        return lambda self, b, h, i: _chosen(getattr(self.shape.lists, name), i)

    def steps_of(lists: Any, *, interpret: bool) -> int:
        del interpret
        return max(1, int(np.asarray(lists.count).max()))

    def step(self: Walk, i: Any, seen: Any, body: Any, carry: Any) -> Any:
        return body(i, seen(i), carry)

    original = TileList.of
    modules = (
        pallas_kernels.tpu,
        pallas_kernels._tpu_backward_head,
        pallas_kernels._tpu_backward_streamed,
    )
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, "lists_of", lists_of))
            if hasattr(module, "steps_of"):
                stack.enter_context(mock.patch.object(module, "steps_of", steps_of))
        stack.enter_context(mock.patch.object(TileList, "of", staticmethod(of)))
        for method, name in (("partials", "partial"), ("count", "count")):
            stack.enter_context(mock.patch.object(TileList, method, known(name)))
        stack.enter_context(mock.patch.object(Walk, "masked_step", step))
        yield


def attention(
    array: MakeArray, *, name: str, length: int, schedule: dict[str, Any]
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The kernels of a named call, and its arguments."""
    keywords = CALLS[name](length)
    batch = keywords.pop("batch", 1)
    length //= batch
    options = {"implementation": "pallas_tpu", "schedule": Schedule(**schedule)}
    shape = (batch, length, HEADS, SIZE)
    like = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    mask = canonical(*(jnp.zeros(like.shape, like.dtype),) * 3, **keywords, **options).mask

    def compute(*arrays: Array) -> Any:
        turned = (jnp.swapaxes(x, 1, 2) for x in arrays)
        with known_lists(mask):
            *found, rest = gradient_alone("tpu", *turned, **keywords, **options)
        return [jnp.swapaxes(x, 1, 2) for x in found], rest

    return compute, (array((batch, HEADS, length, SIZE), "bfloat16"),) * 3


def main(
    chip: Annotated[str, typer.Option(help="The chip to compile for.")] = "tpu_v6e",
    length: Annotated[int, typer.Option(help="T = S.")] = 2048,
    call: Annotated[list[str], typer.Option(help="Calls by name.")] = list(CALLS),  # noqa: B006
    block_q: Annotated[int, typer.Option(help="Queries of a tile beside lists.")] = 512,
    block_kv: Annotated[int, typer.Option(help="Keys of a tile beside lists.")] = 512,
) -> None:
    """Prints the table of estimated cycles."""
    table = Table("call", "forward", "backward", "both", "kernels of the backward pass")
    own = Schedule(block_q=block_q, block_kv=block_kv, target=chip)
    with Compiler(limit=560) as compiler:
        for name in call:
            causal = name.startswith("causal")
            tuned = partial(Schedule.for_target, chip, head_dim=SIZE, dtype="bfloat16")
            listed = any(word in name for word in ("positions", "blocks", "documents of 512"))
            schedule = own if listed else tuned(length=length, is_causal=causal)
            report = compiler(
                "mods_cycles:attention", chip, name=name, length=length, schedule=vars(schedule)
            )
            found = {x: n for x, n in report.cycles.items() if x.startswith("pasa_tpu")}
            backward = {x: n for x, n in found.items() if "backward" in x}
            both, of_backward = sum(found.values()), sum(backward.values())
            shown = ", ".join(f"{x} {n}" for x, n in backward.items()) or report.error[:80]
            table.add_row(name, *map(str, (both - of_backward, of_backward, both)), shown)
            print(name, report.seconds, report.cycles, report.error, flush=True)
    Console(width=160).print(table)


if __name__ == "__main__":
    typer.run(main)
