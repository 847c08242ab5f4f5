"""Kernels with a block mask: query tiles that visit the key tiles of a list."""

from __future__ import annotations

import functools
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import npu_bridge
from npu_bridge import interface, interpreter, lists
from npu_bridge.cores.context import Context
from npu_bridge.program import build
from npu_bridge.timing import cost
from pasa_jax import BlockMask, Schedule
from tests import gallery
from tests.npu_bridge.functions_cases import CASES, Case, Sizes, plain
from tests.thin import only

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="g++ is not installed: apt install g++"
)
BOUND = 3e-3  # how far scores of float16 may be from the plain formula
LONG = Sizes(batch=2, heads=2, queries=200, keys=500)
ODD = Sizes(heads=1, queries=300, keys=300)


def _documents(sizes: Sizes) -> dict[str, Any]:
    def ids(length: int) -> np.ndarray:
        cuts = np.asarray([[100, 300, 301], [1, 256, 450]])[: sizes.batch, :, None]
        return np.sum(np.arange(length) >= cuts, axis=1).astype(np.int32)

    return {"q_data": {"document": ids(sizes.queries)}, "kv_data": {"document": ids(sizes.keys)}}


def _sparse(sizes: Sizes) -> np.ndarray:
    """Tiles far from each other; the last query tile sees none."""
    rows, columns = -(-sizes.queries // 128), -(-sizes.keys // 128)
    kinds = np.zeros((1, 1, rows, columns), np.int8)
    kinds[:, :, :-1, ::17] = 2
    kinds[:, :, 0, 5] = 1
    return kinds


def _shown(sizes: Sizes) -> np.ndarray:
    shown = np.repeat(np.repeat(_sparse(sizes), 128, axis=2), 128, axis=3)
    return shown[:, :, : sizes.queries, : sizes.keys] != 0


SPARSE = Sizes(heads=1, queries=200, keys=128 * 36 + 5)


def _of_documents() -> np.ndarray:
    return kinds_of(_in_document(*LONG.places(), _documents(LONG)), (128, 256))


def _in_document(b: Any, h: Any, q: Any, kv: Any, data: dict[str, Any]) -> np.ndarray:
    own, other = (data[n]["document"] for n in ("q_data", "kv_data"))
    seen = own[:, None, :, None] == other[:, None, None]
    return np.broadcast_to(seen, (len(own), h.shape[1], *seen.shape[2:]))


def _of_causal(rows: int) -> np.ndarray:
    return kinds_of(np.tri(300, dtype=bool)[None, None], (rows, 128))


# A kernel; the kinds of its blocks; their function and size.
MASKS: dict[str, tuple[Case, Any, Any, tuple[int, int]]] = {
    "causal": (
        replace(CASES["causal"], options={}, sizes=ODD),
        lambda: _of_causal(128),
        gallery.causal_mod,
        (128, 128),
    ),
    "documents, ALiBi": (
        replace(
            CASES["ALiBi"],
            options={"score_mod": gallery.alibi_mod, "return_lse": True},
            sizes=LONG,
            data=lambda sizes: _documents(sizes) | CASES["ALiBi"].data(sizes),
            seen=_in_document,
        ),
        _of_documents,
        gallery.document_mod,
        (128, 256),
    ),
    "beside a function": (
        Case(
            options={"mask_mod": gallery.dilated_mod},
            sizes=ODD,
            seen=lambda b, h, q, kv, data: (np.abs(q - kv) <= 24) & ((q - kv) % 3 == 0) & (kv <= q),
        ),
        lambda: _of_causal(256),
        gallery.causal_mod,
        (256, 128),
    ),
    "lists without a function": (
        Case(options={}, sizes=SPARSE, seen=lambda *x: _shown(SPARSE)),
        lambda: _sparse(SPARSE),
        None,
        (128, 128),
    ),
}


def kinds_of(seen: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[B, N, rows, columns]: 2 for blocks all of whose pairs are seen, 1 for others with some."""
    t, s = seen.shape[2:]
    rows, columns = -(-t // size[0]), -(-s // size[1])
    found = np.zeros((*seen.shape[:2], rows, columns), np.int8)
    for i in range(rows):
        for j in range(columns):
            block = seen[:, :, i * size[0] : (i + 1) * size[0], j * size[1] : (j + 1) * size[1]]
            found[:, :, i, j] = block.any((2, 3)).astype(int) + block.all((2, 3))
    return found


def made(name: str, **more: Any) -> tuple[Case, npu_bridge.Kernel, dict[str, Any]]:
    """The case of a name, its kernel and its inputs."""
    case, kinds, mod, size = MASKS[name]
    lengths = (case.sizes.queries, case.sizes.keys)
    mask = BlockMask.from_kinds(kinds(), lengths, size, mod)
    kernel = case.kernel(**{"head_dim": 64, "block_mask": mask, **more})
    visits = {"visits": jnp.asarray(npu_bridge.visits(kernel, mask))}
    return case, kernel, case.inputs(kernel) | visits


def off(case: Case, kernel: npu_bridge.Kernel, inputs: dict[str, Any]) -> float:
    """The largest difference of what is interpreted from the plain formula."""
    arrays = {n: np.asarray(x) for n, x in inputs.items()}
    output = interpreter.run(build(kernel), arrays, cores=3)["output"].astype(np.float64)
    return float(np.abs(output - plain(case, inputs)).max())


@pytest.mark.parametrize("name", only(("documents, ALiBi",), MASKS))
def test_output_is_that_of_the_plain_formula(name: str) -> None:
    assert off(*made(name)) < BOUND


def _never_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Context, "opens", property(lambda self: "t == 0"))


def _whole(patch: pytest.MonkeyPatch) -> None:
    listed = lists._listed
    patch.setattr(lists, "_listed", lambda kinds: listed(np.where(kinds == 1, 2, kinds)))


def _first_row(patch: pytest.MonkeyPatch) -> None:
    listed = Context._listed
    patch.setattr(
        Context,
        "_listed",
        lambda self: [
            replace(x, value=str(x.value).replace("+ tile", "+ 0")) for x in listed(self)
        ],
    )


FAULTS = {
    "the offsets of the first tiles": (_never_again, "lists without a function"),
    "no tile is asked about": (_whole, "causal"),
    "the list of the first query tile": (_first_row, "causal"),
}


@pytest.mark.parametrize("name", only(("the offsets of the first tiles",), FAULTS))
def test_a_fault_is_shown(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault, shown_by = FAULTS[name]
    fault(monkeypatch)
    case, kernel, inputs = made(shown_by)
    inputs["key"] = (
        inputs["key"]
        + jnp.arange(inputs["key"].shape[1])[:, None, None].astype(inputs["key"].dtype) / 512
    )  # so that blocks have other means
    assert not off(case, kernel, inputs) < 3 * BOUND


@pytest.mark.npu_full
@needs_compiler
@pytest.mark.parametrize("shift", ["mean", "none", "reference", "auto"])
@pytest.mark.parametrize("name", MASKS)
def test_executed_on_the_emulator(name: str, shift: str, tmp_path: Path) -> None:
    repair = shift == "auto"
    case, kernel, inputs = made(name, shift=shift, repair=repair)
    npu_bridge.emit(kernel, tmp_path)
    assert npu_bridge.check(tmp_path, kernel) == []
    policies = ("round_robin", "random 1", "delay AIV PIPE_V")
    found = npu_bridge.run(tmp_path, inputs, kernel=kernel, policies=policies)
    assert found.ok, (found.complaints, found.error)
    assert np.abs(found.output - plain(case, inputs)).max() < BOUND


@pytest.mark.npu_full
@needs_compiler
def test_in_bfloat16(tmp_path: Path) -> None:
    """The shift "bound" is computed by "mean" beside a block mask."""
    case, kernel, inputs = made("documents, ALiBi", dtype="bfloat16", head_dim=128)
    npu_bridge.emit(kernel, tmp_path)
    found = npu_bridge.run(tmp_path, inputs, kernel=kernel, policies=("round_robin",))
    assert found.ok, (found.complaints, found.error)
    assert np.abs(found.output - plain(case, inputs)).max() < 2.5e-2


# What the lists are.


def test_lists_say_which_tiles_are_visited() -> None:
    mask = BlockMask.from_kinds([[[[1, 0], [2, 1]]]], (512, 512), 256, gallery.causal_mod)
    kernel = npu_bridge.kernel(head_dim=64, block_mask=mask, repair=False)
    assert kernel.schedule.block_kv == 256
    assert interface.argument(kernel, "visits").shape == "[1, 1, query tiles, key tiles + 1]"
    visits = npu_bridge.visits(kernel, mask)
    assert [list(row[1 : 1 + row[0]]) for row in visits[0, 0]] == [[0], [0], [1, 2], [1, 2]]
    query, key = jnp.zeros((1, 512, 1, 1)), jnp.zeros((1, 512, 1, 1))
    again = lists.block_mask(kernel, {"visits": visits, "query": query, "key": key})
    assert again is not None
    np.testing.assert_array_equal(
        np.asarray(again.kinds)[0, 0], np.repeat(np.asarray(mask.kinds)[0, 0], 2, axis=0)
    )


def test_hidden_tiles_take_no_time() -> None:
    kernel = made("lists without a function")[1]
    program = build(kernel, careful=False)
    all_of, some = (cost(program, queries=4096, visited=share).seconds for share in (1.0, 0.25))
    assert some < 0.4 * all_of


def test_bound_beside_a_block_mask_is_mean() -> None:
    kernel = made("causal", shift="bound", dtype="bfloat16")[1]
    assert (kernel.shift, kernel.precision.scores) == ("mean", "float16")


# What is refused.


@functools.cache
def mask(keys: int = 256) -> BlockMask:
    """A block mask with blocks of 128 × ``keys``, or of 64 × 64."""
    size = (min(keys, 128), keys)
    kinds = np.ones((1, 1, 512 // size[0], 512 // size[1]), np.int8)
    return BlockMask.from_kinds(kinds, (512, 512), size, gallery.causal_mod)


SCHEDULE = Schedule(block_q=128, block_kv=128, target="ascend_910b")
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"block_mask": "all"}, "`block_mask` must be a pasa_jax.BlockMask; got 'all'."),
    *(
        (
            {name: x},
            f"`{name}` must not be given beside a block_mask; got True. Let the block mask's "
            "function say it.",
        )
        for name, x in {
            "is_causal": True,
            "local_window_size": 5,
            "lengths": True,
            "packed": True,
            "decode": True,
        }.items()
    ),
    (
        {"block_mask": 64},
        "`block_mask` must have blocks that are multiples of a tile, (128, 128); got blocks of "
        "(64, 64). Give create_block_mask such a block_size, or give its function as mask_mod.",
    ),
    (
        {"schedule": replace(SCHEDULE, block_kv=512)},
        "`block_mask` must have blocks that are multiples of a tile, (128, 512); got blocks of "
        "(128, 256). Give create_block_mask such a block_size, or give its function as mask_mod.",
    ),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_argument(options: dict[str, Any], message: str) -> None:
    given = options.get("block_mask", 256)
    own = mask(given) if isinstance(given, int) else given
    options = {"head_dim": 64, "schedule": SCHEDULE, **options, "block_mask": own}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        npu_bridge.kernel(**options)


def test_lists_of_another_mask_are_refused() -> None:
    options = {"head_dim": 64, "schedule": SCHEDULE, "repair": False}
    kernel = npu_bridge.kernel(block_mask=mask(), **options)
    kinds = np.ones((2, 1, 4, 2), np.int8)
    other = BlockMask.from_kinds(kinds, (512, 512), (128, 256))
    with pytest.raises(ValueError, match=r"`block_mask` must have the axes '11' and blocks"):
        npu_bridge.visits(kernel, other)
    without = npu_bridge.kernel(**options)
    with pytest.raises(ValueError, match="`kernel` must have a block_mask; got one without"):
        npu_bridge.visits(without, mask())
