"""The page table against a plain model of it, and against faults that are put into its source."""

import inspect
import sys
import types
from collections import Counter
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax.serving import _table
from pasa_jax.serving._table import Table
from tests.thin import some

B, P, PAGE, M, TOTAL = 5, 14, 4, 6, 12


class Plain:
    """Sequences as lists of tokens, served one after another; no name of a page is used twice."""

    def __init__(self):
        self.tokens = [[] for _ in range(B)]
        self.blocks = [{} for _ in range(B)]
        self.lost = [False] * B
        self.names = 0

    def references(self):
        return Counter(name for blocks in self.blocks for name in blocks.values())

    def new_name(self):
        self.names += 1
        return self.names

    def append(self, counts, tokens):
        tokens = list(tokens)
        for b, count in enumerate(counts):
            new, tokens, room = tokens[:count], tokens[count:], len(tokens)
            self.lost[b] |= not self.append_one(b, new) if count <= room else True

    def append_one(self, b, new):
        length, blocks, references = len(self.tokens[b]), self.blocks[b], self.references()
        if self.lost[b] or length + len(new) > M * PAGE:
            return False
        taken = list(range(-(-length // PAGE), -(-(length + len(new)) // PAGE)))
        if new and length % PAGE and references[blocks[length // PAGE]] > 1:
            taken.insert(0, length // PAGE)
        if len(taken) > P - len(references):
            return False
        blocks |= {m: self.new_name() for m in taken}
        self.tokens[b] += new
        return True

    def fork(self, source, target, length):
        there = len(self.tokens[source])
        length = there if length == -1 else length
        is_empty = not self.tokens[target] and not self.lost[target]
        is_wrong = self.lost[source] or source == target or not is_empty or length > there
        if is_wrong or (length > 0 and (length - 1) // PAGE not in self.blocks[source]):
            self.lost[target] = True
            return
        self.tokens[target] = self.tokens[source][:length]
        self.blocks[target] = {m: x for m, x in self.blocks[source].items() if m * PAGE < length}

    def free(self, which):
        for b in np.flatnonzero(which):
            self.tokens[b], self.blocks[b], self.lost[b] = [], {}, False

    def trim(self, window):
        for tokens, blocks in zip(self.tokens, self.blocks, strict=True):
            for m in [m for m in blocks if (m + 1) * PAGE <= len(tokens) - window]:
                del blocks[m]


class Played:
    """A table of ``module`` and its pages' tokens, beside the model, under random operations."""

    def __init__(self, module, seed):
        kinds = module.Table
        self.jitted = {
            "append": jax.jit(kinds.appended, static_argnames="total", donate_argnums=0),
            "fork": jax.jit(lambda t, x, y, n: t.forked(x, y, length=n), donate_argnums=0),
            "free": jax.jit(kinds.freed, donate_argnums=0),
            "trim": jax.jit(kinds.trimmed, donate_argnums=0),
        }
        self.table = kinds.empty(B, P, PAGE, M * PAGE)
        self.plain, self.memory = Plain(), np.zeros((P, PAGE), int)
        self.rng, self.token = np.random.default_rng(seed), 0
        self.seen = Counter()  # in how many steps something rare was met

    def steps(self, steps):
        kinds = ["append", "fork", "free", "trim"]
        for kind in self.rng.choice(kinds, steps, p=[0.55, 0.25, 0.16, 0.04]):
            getattr(self, kind)()
            self.check()

    def check(self):
        check(self.table, self.plain, self.memory)
        self.seen["lost"] += any(self.plain.lost)
        self.seen["sharing"] += any(n > 1 for n in self.plain.references().values())
        self.seen["full"] += len(self.plain.references()) == P

    def append(self):
        most = self.rng.choice([2, 3, 5, TOTAL], p=[0.5, 0.4, 0.08, 0.02])
        counts = self.rng.integers(self.rng.random() < 0.3, most, B).astype(np.int32)
        tokens = self.token + 1 + np.arange(TOTAL)
        self.token += TOTAL
        self.table, places = self.jitted["append"](self.table, counts, total=TOTAL)
        self.plain.append(counts.tolist(), tokens.tolist())
        places = jax.device_get(places)
        write(self.memory, places, tokens)
        self.seen["copy"] += (places.source < P).any()

    def fork(self):
        filled = np.array([bool(x) for x in self.plain.tokens])
        if self.rng.random() < 0.03:  # a wrong one, mostly
            source, target = self.rng.integers(0, B, 2)
        elif 0 < filled.sum() < B:
            source, target = (self.rng.choice(np.flatnonzero(x)) for x in (filled, ~filled))
        else:
            return
        length = self.rng.integers(-1, 8) if self.rng.random() < 0.3 else -1
        pair = (np.int32(x) for x in (source, target, length))
        self.table = self.jitted["fork"](self.table, *pair)
        self.plain.fork(int(source), int(target), int(length))

    def free(self):
        which = self.rng.random(B) < np.where(self.plain.lost, 0.9, 0.15)
        self.table = self.jitted["free"](self.table, which)
        self.plain.free(which)

    def trim(self):
        window = self.rng.integers(0, 12)
        self.table = self.jitted["trim"](self.table, np.int32(window))
        self.plain.trim(int(window))


def write(memory, places, tokens):
    """What a cache does with `Places`: copies, then writes."""
    copied = places.source < P
    memory[places.target[copied]] = memory[places.source[copied]]
    fit = places.page < P
    memory[places.page[fit], places.slot[fit]] = tokens[fit]


def check(table, plain, memory):
    """Whether the table is sound by itself, equals the model, and each token is where it says."""
    table = jax.device_get(table)
    used = table.pages[table.pages >= 0]
    assert (table.references == np.bincount(used, minlength=P)).all(), "references"
    free = table.free[: table.count].tolist()
    assert sorted(free) == np.flatnonzero(table.references == 0).tolist(), "the stack"
    assert table.lost.tolist() == plain.lost, "lost"
    assert table.length.tolist() == [len(x) for x in plain.tokens], "lengths"
    names = np.full((B, M), -1)
    for b, blocks in enumerate(plain.blocks):
        names[b, list(blocks)] = list(blocks.values())
    assert ((names >= 0) == (table.pages >= 0)).all(), "blocks"
    pairs = set(zip(names.reshape(-1).tolist(), table.pages.reshape(-1).tolist(), strict=True))
    assert len(pairs) == len({x for x, _ in pairs}) == len({y for _, y in pairs}), "sharing"
    for b, m in zip(*np.nonzero(names >= 0), strict=True):
        tokens = plain.tokens[b][m * PAGE : (m + 1) * PAGE]
        assert memory[table.pages[b, m], : len(tokens)].tolist() == tokens, "tokens"


@pytest.mark.parametrize(
    ("seed", "steps"),
    [(0, 250), (1, 250), pytest.param(2, 10_000, marks=pytest.mark.full)],
)
def test_random_operations(seed, steps):
    played = Played(_table, seed)
    played.steps(steps)
    assert min(played.seen[x] for x in ("copy", "lost", "full", "sharing")) > steps // 80


FAULTS = {
    "a fork does not count its pages": (
        "jnp.where(row >= 0, row, none), 1)",
        "jnp.where(row >= 0, row, none), 0)",
    ),
    "a fork does not count the open page": (
        "jnp.where(row >= 0, row, none), 1)",
        "jnp.where((row >= 0) & (block < length // self.page_size), row, none), 1)",
    ),
    "no copy on write": ("- left > 1)", "- left > 99)"),
    "the last that refers to the open page copies it, too": ("- left > 1)", "> 1)"),
    "the page that was copied keeps its reference": (
        "taken, 1), source, -1)",
        "taken, 1), source, 0)",
    ),
    "a page is free when one of two sequences is": ("& (references <= 0)", "& (references <= 1)"),
    "two sequences freed at once count as one": (
        "return references.at[pages].add(by, mode",
        "return references.at[pages].set(_at(references, pages, 0) + by, mode",
    ),
    "pages are pushed a place too far": ("dtype=jnp.int32) - 1\n", "dtype=jnp.int32)\n"),
    "freed pages are not pushed": ("count=self.count + jnp.sum", "count=self.count + 0 * jnp.sum"),
    "a new page one token late": (
        "opens = written & ((slot == 0)",
        "opens = written & ((slot == 1)",
    ),
    "a full page counts as open": ("(length + (page_size - 1)) //", "(length + page_size) //"),
    "a page goes while its last token is seen": (
        "jnp.maximum(window, 0), 0) //",
        "jnp.maximum(window, 0) + 1, 0) //",
    ),
    "more pages than there are": ("dtype=jnp.int32) > self.count)", "dtype=jnp.int32) < 0)"),
    "all after one that does not fit are lost": (
        "fits & (row != jnp.argmax(over(fits)).astype(jnp.int32))",
        "fits & ~over(fits)",
    ),
    "a lost sequence goes on": ("fits = ~self.lost & (counts", "fits = (counts"),
    "a sequence that is freed stays lost": ("table.lost & ~which", "table.lost"),
    "tokens beyond the row": ("(_ends(counts, total) <= total)", "(_ends(counts, total) >= 0)"),
}


def with_fault(old, new, name):
    source = inspect.getsource(_table)
    assert source.count(old) == 1
    module = types.ModuleType(name)
    sys.modules[name] = module  # where dataclasses look for it
    exec(compile(source.replace(old, new), name, "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("name", some(FAULTS, every=6))
def test_a_fault_is_seen(name):
    module = with_fault(*FAULTS[name], f"fault_{list(FAULTS).index(name)}")
    with pytest.raises(AssertionError):
        Played(module, seed=0).steps(250)


def empty():
    return Table.empty(3, 6, PAGE, 3 * PAGE)


def append(table, *counts):
    """With one T, for which JAX compiles once."""
    return table.appended(counts, total=TOTAL)


in_jit = jax.jit(append)


def test_places_of_a_row():
    table, places = append(empty(), 3, 0, 6)
    assert table.pages.tolist() == [[0, -1, -1], [-1, -1, -1], [1, 2, -1]]
    assert places.page.tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2, 6, 6, 6]
    assert places.slot.tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1, 0, 0, 0]
    assert places.sequence.tolist() == [0, 0, 0, 2, 2, 2, 2, 2, 2, 3, 3, 3]
    assert places.position.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 0, 0, 0]
    table, places = append(table, 2, 1, 0)
    assert table.pages.tolist() == [[0, 3, -1], [4, -1, -1], [1, 2, -1]]
    assert places.page.tolist()[:4] == [0, 3, 4, 6]
    assert places.position.tolist()[:4] == [3, 4, 0, 0]
    assert table.length.tolist() == [5, 1, 6]
    assert int(table.count) == 1


def test_all_but_the_last_copy_the_open_page():
    table = append(empty(), 6, 0, 0)[0].forked(0, 1).forked(0, 2)
    assert table.references.tolist() == [3, 3, 0, 0, 0, 0]
    table, places = append(table, 1, 1, 1)
    assert places.source.tolist() == [1, 1, 6]
    assert places.target.tolist() == [2, 3, 6]
    assert places.page.tolist()[:4] == [2, 3, 1, 6]
    assert table.references.tolist() == [3, 1, 1, 1, 0, 0]
    assert int(table.freed(np.ones(3, bool)).count) == 6


def test_a_fork_of_the_first_tokens():
    table = append(empty(), 11, 0, 0)[0].forked(0, 2, length=5)
    assert table.pages.tolist()[2] == [0, 1, -1]
    assert table.length.tolist() == [11, 0, 5]
    _, places = append(table, 1, 0, 1)
    assert places.source.tolist() == [6, 6, 1]
    assert places.slot.tolist()[:2] == [3, 1]


def test_one_that_does_not_fit_keeps_its_tokens_and_the_others_go_on():
    table, _ = append(append(empty(), 4, 8, 0)[0], 0, 0, 3)
    assert table.fits([5, 1, 1]).tolist() == [True, False, True]
    assert table.fits([9, 1, 1]).tolist() == [False, True, True]
    table, places = in_jit(table, 9, 1, 1)
    assert table.lost.tolist() == [True, False, False]
    assert table.length.tolist() == [4, 9, 4]
    assert places.page.tolist() == [6] * 9 + [4, 3, 6]
    table, _ = in_jit(table, 0, -1, 0)
    assert table.lost.tolist() == [True, True, False]
    table = table.freed(np.asarray([True, False, False]))
    assert table.lost.tolist() == [False, True, False]
    assert int(table.count) == 2


def test_pages_behind_a_window():
    table, _ = append(append(empty(), 9, 0, 2)[0], 0, 8, 0)
    trimmed = table.trimmed(3)
    assert (trimmed.pages >= 0).tolist() == [[0, 1, 1], [0, 1, 0], [1, 0, 0]]
    assert trimmed.valid([1, 1, 0], [3, 2, 1]).tolist() == [True] * 3
    assert trimmed.valid([0, 0, 0], [3, 2, 1]).tolist() == [False, False, True]
    assert int(trimmed.count) == 2
    assert (table.trimmed(5).pages >= 0).tolist() == [[0, 1, 1], [1, 1, 0], [1, 0, 0]]
    assert append(trimmed, 3, 0, 0)[0].length.tolist() == [12, 8, 2]


def test_valid():
    table, _ = append(empty(), 5, 5, 2)
    assert table.valid([0, 0, 0], [2, 2, 1]).tolist() == [True] * 3
    assert table.valid([0, 0, 3], [3, 4, 3]).tolist() == [False, False, True]
    for page in (-1, 6, 2**30, 5):  # missing, out of range twice, free
        bad = replace(table, pages=table.pages.at[1, 0].set(page))
        assert bad.valid([0, 0, 0], [2, 2, 1]).tolist() == [True, False, True]
        assert bad.valid([0, 1, 0], [2, 2, 1]).tolist() == [True] * 3
    lost = replace(table, lost=jnp.asarray([True, False, False]))
    assert lost.valid([0, 0, 0], [2, 2, 1]).tolist() == [False, True, True]


def test_scan_and_donation():
    def step(table, counts):
        table, places = table.appended(counts, total=4)
        return table.trimmed(6), places.page

    counts = jnp.ones((9, 3), jnp.int32)
    steps = jax.jit(lambda table: jax.lax.scan(step, table, counts), donate_argnums=0)
    before = Table.empty(3, 9, PAGE, 12)
    table, page = steps(before)
    assert before.pages.is_deleted()
    assert page[:, 0].tolist() == [0] * 4 + [3] * 4 + [6]
    assert table.length.tolist() == [9] * 3


def test_wide_integers(x64):
    @jax.jit
    def some_steps(table, counts):
        table, places = table.appended(counts, total=8)
        return table.forked(1, 2).trimmed(2).freed(counts == 3), places

    for x in jax.tree.leaves(some_steps(empty(), np.asarray([3, 4, 0]))):
        assert x.dtype in (jnp.int32, bool)


@cache
def full():
    return append(append(empty(), 12, 0, 0)[0], 0, 6, 0)[0]


@cache
def lost():
    return in_jit(full(), 1, 0, 0)[0]


ROW = "be integers of shape [B] = [3]; got"
WRONG = {
    "size": (
        lambda: Table.empty(2, 0, 4, 8),
        "`pages` must be a positive int; got 0.",
    ),
    "shape": (lambda: full().appended([1, 2], total=TOTAL), f"`counts` must {ROW} int32[2]."),
    "type": (lambda: full().appended([1.0, 2, 0], total=TOTAL), f"`counts` must {ROW} float32[3]."),
    "blocks": (
        lambda: full().valid([0, 0, 0], 2),
        "`hi_block` must be integers of shape [B] = [3]; got int32[].",
    ),
    "total": (
        lambda: full().appended([0, 0, 0], total=0),
        "`total` must be a positive int; got 0.",
    ),
    "negative": (
        lambda: full().appended([-1, 0, 0], total=TOTAL),
        "`counts` must not be negative; got [-1, 0, 0].",
    ),
    "sum": (
        lambda: full().appended([0, 2, 11], total=TOTAL),
        "`counts` must add up to at most `total`, 12; got 13.",
    ),
    "too long": (
        lambda: full().appended([0, 7, 0], total=TOTAL),
        "`counts` must leave each sequence at most 12 tokens; got 6 + 7 of sequence 1. "
        "Make a table of a larger `max_length`.",
    ),
    "no page": (
        lambda: full().appended([0, 3, 4], total=TOTAL),
        "`counts` must need at most the 1 free pages; got 2. Free or trim sequences.",
    ),
    "lost": (
        lambda: lost().appended([1, 0, 0], total=TOTAL),
        "`counts` must be 0 for sequence 0, which is lost; got 1. Free it.",
    ),
    "which": (
        lambda: full().freed([1, 0, 0]),
        "`which` must be bool of shape [B] = [3]; got int32[3].",
    ),
    "window": (lambda: full().trimmed(-1), "`window` must not be negative; got -1."),
    "number": (lambda: full().trimmed(1.5), "`window` must be one integer; got float32[]."),
    "no source": (
        lambda: full().forked(3, 2),
        "`source` must be one of the 3 sequences; got 3.",
    ),
    "lost source": (
        lambda: lost().forked(0, 2),
        "`source` must not be a sequence that is lost; got 0. Free it.",
    ),
    "target": (
        lambda: full().forked(0, 1),
        "`target` must be another sequence, which has no tokens and is not lost; got 1. Free it.",
    ),
    "length": (
        lambda: full().forked(1, 2, length=7),
        "`length` must be at most source's 6 tokens, or -1 for all; got 7.",
    ),
    "given up": (
        lambda: full().trimmed(1).forked(0, 2, length=4),
        "`length` must end in a page that source has not given up; got 4.",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name):
    call, message = WRONG[name]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call()
    assert str(error.value) == message
