"""Other libraries' TPU kernels, made so that the TPU compiler can estimate their cycles.

The estimate follows conditions that come from program ids. Splash attention decides which blocks to
compute by data in scalar memory, which the estimate takes for "never": it reports half of the
cycles, or fewer. Here those tables are `Table`s: the same numbers, computed from the program id.
Nothing else about the kernels changes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = Any
MakeArray = Callable[[Any, str], jax.ShapeDtypeStruct]


class Table:
    """Numbers known beforehand, read at an index known when the program runs.

    It stands for a ref. A selection for each change of the value: no memory is read, and nothing is
    divided, which the estimate does not follow either.
    """

    def __init__(self, values: Any) -> None:
        array = np.asarray(values)
        self.shape, self.dtype = array.shape, array.dtype
        self._values = array.reshape(-1).astype(np.int64)

    def __getitem__(self, index: Any) -> jax.Array:
        index = index if isinstance(index, tuple) else (index,)
        flat: Any = 0
        for i, size in zip(index, self.shape, strict=True):
            flat = flat * size + i
        result = jnp.int32(self._values[0])
        for t in np.flatnonzero(np.diff(self._values)) + 1:
            result = lax.select(flat >= jnp.int32(t), jnp.int32(self._values[t]), result)
        return result


def _operands(
    array: MakeArray, length: int, size: int, kv_heads: int, head_major: bool
) -> tuple[Any, Any, Any]:
    """Shapes of 8 query heads, [1, N, T, D] or [1, T, N, D]."""

    def shape(heads: int) -> tuple[int, ...]:
        return (1, heads, length, size) if head_major else (1, length, heads, size)

    keys = array(shape(kv_heads), "bfloat16")
    return array(shape(HEADS), "bfloat16"), keys, keys


HEADS = 8


def _called(
    attention: Callable[[Any, Any, Any], Any], head_major: bool, gradient: bool
) -> Callable[..., Any]:
    """``attention`` on [1, N, T, D] as a program on the layout asked for, or its gradient."""

    def turned(x: Any) -> Any:
        return x if head_major else jnp.swapaxes(x, 1, 2)

    def program(q: Any, k: Any, v: Any) -> Any:
        return turned(attention(*map(turned, (q, k, v))))

    if not gradient:
        return program

    def total(q: Any, k: Any, v: Any, d_out: Any) -> Any:
        return jnp.sum(program(q, k, v).astype(jnp.float32) * d_out.astype(jnp.float32))

    return lambda q, k, v: jax.grad(total, (0, 1, 2))(q, k, v, q)


def flash(
    array: MakeArray,
    *,
    length: int,
    causal: bool,
    blocks: Sequence[int],
    size: int = 128,
    kv_heads: int = HEADS,
    window: int | None = None,
    gradient: bool = False,
    head_major: bool = True,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """jax's stock TPU flash attention; ``blocks``: of queries, of keys in memory, of keys."""
    from jax.experimental.pallas.ops.tpu import flash_attention as stock

    if window is not None or kv_heads != HEADS:
        raise ValueError("stock flash attention has neither windows nor shared keys")
    q, major, k = blocks
    sizes = stock.BlockSizes(
        block_q=q,
        block_k_major=major,
        block_k=k,
        block_b=1,
        block_q_major_dkv=q,
        block_k_major_dkv=major,
        block_k_dkv=k,
        block_q_dkv=q,
        block_k_major_dq=major,
        block_k_dq=k,
        block_q_dq=q,
    )

    def attention(q: Any, k: Any, v: Any) -> Any:
        return stock.flash_attention(q, k, v, causal=causal, sm_scale=size**-0.5, block_sizes=sizes)

    operands = _operands(array, length, size, kv_heads, head_major)
    return _called(attention, head_major, gradient), operands


def _scaled(q: Any, size: int) -> Any:
    return (q.astype(jnp.float32) * size**-0.5).astype(q.dtype)


def splash(
    array: MakeArray,
    *,
    length: int,
    causal: bool,
    blocks: Sequence[int],
    size: int = 128,
    kv_heads: int = HEADS,
    window: int | None = None,
    gradient: bool = False,
    head_major: bool = True,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """jax's splash attention, fused backward pass; ``blocks``: as for `flash`."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    bq, bkv, compute = blocks
    backward: dict[str, Any] = {}
    if gradient:
        backward = {"block_q_dkv": bq, "block_kv_dkv": bkv, "block_kv_dkv_compute": compute}
        backward["use_fused_bwd_kernel"] = True
    make = kernel.make_splash_mqa if kv_heads == 1 else kernel.make_splash_mha
    call = make(
        masks.MultiHeadMask([_mask(masks, length, causal, window)] * HEADS),
        block_sizes=kernel.BlockSizes(
            block_q=bq, block_kv=bkv, block_kv_compute=compute, **backward
        ),
        head_shards=1,
        q_seq_shards=1,
    )
    infos = {False: call.fwd_mask_info, True: call.dkv_mask_info}
    tables = {
        which: tuple(None if x is None else Table(x) for x in (info.data_next, info.block_mask))
        for which, info in infos.items()
        if info is not None
    }
    original = kernel._next_nonzero

    def next_nonzero(
        h: Any, i: Any, j: Any, data: Any, block: Any, masked: Any, next_i: bool = False
    ) -> Any:
        if data is not None:
            data, block = tables[next_i]
        return original(h, i, j, data, block, masked, next_i)

    def attention(q: Any, k: Any, v: Any) -> Any:
        if kv_heads == 1:
            k, v = k[:, 0], v[:, 0]
        return jax.vmap(call)(_scaled(q, size), k, v)

    program = _called(attention, head_major, gradient)

    def patched(*args: Any) -> Any:  # a backward pass is traced after the forward pass
        with mock.patch.object(kernel, "_next_nonzero", next_nonzero):
            return program(*args)

    return patched, _operands(array, length, size, kv_heads, head_major)


def _mask(masks: Any, length: int, causal: bool, window: int | None) -> Any:
    shape = (length, length)
    if window is not None:
        return masks.LocalMask(shape, (window, 0 if causal else window), 0)
    return masks.CausalMask(shape) if causal else masks.FullMask(shape)


class _Query:
    """What a read of the queries gives tokamax's kernel, which multiplies it by log2 e.

    The product in bfloat16 ends the estimator; here it is formed in float32 and rounded.
    """

    def __init__(self, x: Any) -> None:
        self._x = x

    def __imul__(self, factor: float) -> Any:
        return (self._x.astype(jnp.float32) * factor).astype(self._x.dtype)


class _QueryRef:
    def __init__(self, ref: Any) -> None:
        self._ref = ref

    def __getitem__(self, index: Any) -> _Query:
        return _Query(self._ref[index])


def tokamax(
    array: MakeArray,
    *,
    length: int,
    causal: bool,
    blocks: Sequence[int],
    lp_scheduler: bool = False,
    size: int = 128,
    kv_heads: int = HEADS,
    window: int | None = None,
    gradient: bool = False,
    head_major: bool = True,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """tokamax's splash attention; ``blocks``: as for `flash`.

    Arguments:
      lp_scheduler: whether the compiler schedules by linear programming, as tokamax may ask it.
    """
    folder = "tokamax._src.ops.experimental.tpu.splash_attention"
    kernel, masks = (
        importlib.import_module(f"{folder}.splash_attention_{name}") for name in ("kernel", "mask")
    )
    if gradient:
        raise ValueError("tokamax's backward pass is not made for the estimate here")
    bq, bkv, compute = blocks
    config = kernel.SplashConfig(
        block_q=bq,
        block_kv=bkv,
        block_kv_compute=compute,
        use_experimental_scheduler=lp_scheduler,
    )
    make = kernel.make_splash_mqa if kv_heads == 1 else kernel.make_splash_mha
    call = make(_mask(masks, length, causal, window), config=config, q_seq_shards=1)
    info = jax.tree.map(np.asarray, call.fwd_mask_info)
    rows = info.active_rows
    tables: tuple[Any, ...] | None = None
    if rows is not None:
        first = np.diff(rows, prepend=-1) != 0
        last = np.diff(rows, append=-1) != 0
        tables = tuple(map(Table, (info.active_cols, first, last, info.block_mask)))
    original = kernel.flash_attention_kernel
    forward = kernel._splash_attention_forward

    def body(*refs: Any, **keywords: Any) -> None:
        # active rows, active columns, next mask, bounds, block mask, then the queries
        refs_list = list(refs)
        if tables is not None:
            refs_list[1], refs_list[3], refs_list[4], refs_list[5] = tables
        refs_list[6] = _QueryRef(refs_list[6])
        original(*refs_list, **keywords)

    def with_static_grid(mask_info: Any, *args: Any, **keywords: Any) -> Any:
        if tables is not None:
            mask_info = mask_info._replace(num_active_blocks=(int(info.num_active_blocks[0]),))
        return forward(mask_info, *args, **keywords)

    @contextmanager
    def patched() -> Any:
        with (
            mock.patch.object(kernel, "flash_attention_kernel", body),
            mock.patch.object(kernel, "_splash_attention_forward", with_static_grid),
        ):
            yield

    def attention(q: Any, k: Any, v: Any) -> Any:
        if kv_heads == 1:
            k, v = k[:, 0], v[:, 0]
        with patched():  # one batch entry: under vmap the grid would be dynamic again
            return call(_scaled(q, size)[0], k[0], v[0])[None]

    operands = _operands(array, length, size, kv_heads, head_major)
    return _called(attention, head_major, gradient), operands
