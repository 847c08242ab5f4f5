"""`Pool`: the texts that a cache holds, and the steps that read them."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from pasa_jax.core import bits
from pasa_jax.core.errors import wrong
from pasa_jax.models import Decoder
from pasa_jax.serving import PagedCache, Table

from .row import Ask, Found, Row, step
from .sequences import Request, Text, beginning, shares

_QUERY_ROWS = 96  # of a tile: the parts of prompts in a row are short


class Sizes(NamedTuple):
    """Arguments: see `Batching`."""

    sequences: int
    pages: int
    page_size: int
    max_length: int
    rows: tuple[int, ...]
    kept: int

    def check(self, model: Decoder) -> None:
        """Raises ValueError for sizes that do not fit each other or the model."""
        if min(self.rows) < 1 or max(self.rows) < self.sequences:
            allowed = f"be positive, and one of them at least `sequences`, {self.sequences}"
            raise wrong("rows", allowed, self.rows)
        held, most = self.pages * self.page_size, model.config.max_length
        if self.max_length > min(held, most):
            allowed = f"be at most {held}, what `pages` hold, and the model's {most}"
            raise wrong("max_length", allowed, self.max_length)

    @property
    def slots(self) -> int:
        """S, sequences of the cache: one is vacant wherever a request may be admitted."""
        return self.sequences + self.kept


class Pool:
    """Texts that are being answered, and some that were, in one cache. Of one thread.

    Arguments:
      running: the oldest first.
      kept: ended texts whose pages may be shared; the one that was shared last is the last.
      free: how many pages are free.
    """

    def __init__(self, model: Decoder, sizes: Sizes) -> None:
        sizes.check(model)
        self.sizes, self._model = sizes, model
        self._blocks = bits.stored_tree(model.blocks)
        self.rows = sorted(sizes.rows)
        self.reset()

    def reset(self) -> None:
        """Forgets all texts."""
        config, sizes = self._model.config, self.sizes
        shape = (sizes.slots, sizes.pages, sizes.page_size, sizes.max_length)
        heads = (config.kv_heads, config.head_dim, self._model.dtype)
        schedule = PagedCache.empty(1, 1, *shape[2:], *heads).schedule
        schedule = replace(schedule, block_q=min(schedule.block_q, _QUERY_ROWS))
        self.cache = PagedCache.empty(*shape, *heads, layers=config.layers, schedule=schedule)
        self.free = sizes.pages
        self.running: list[Text] = []
        self.kept: list[Text] = []

    def compile(self) -> float:
        """The seconds that it took to compile a step for each length of a row."""
        begin = time.monotonic()
        for total in self.rows:
            self._do(Row.of(total, self._by_slot({}), [], [], self.sizes.sequences))
        return time.monotonic() - begin

    def admit(self, request: Request) -> bool | None:
        """Whether there is room for all that the request and those that run may need: then it runs.

        It shares the pages of the text that begins like the longest part of its prompt; None where
        it should wait, because a text that begins like more of it is being read.
        """
        if len(self.running) == self.sizes.sequences:
            return False
        texts = [*self.running, *self.kept]
        found = beginning(request.prompt, texts, self.sizes.page_size)
        if found.waits:
            return None
        text = Text(request, self._vacant(), found.length)
        table = self.cache.table
        if found.text is not None:
            table = table.forked(found.text.slot, text.slot, length=found.length)
        if not self._make_room(table, text):
            return False
        self.running.append(text)
        if found.text in self.kept:
            self.kept.append(self.kept.pop(self.kept.index(found.text)))
        return True

    def read(self) -> tuple[dict[Text, int], list[Text]]:
        """Reads a row of tokens. Returns the next token of each text that is read to its end (-1
        where logits are not finite), and the texts that are lost."""
        pending = [x.pending for x in self.running]
        wanted = min(sum(pending), self.rows[-1])
        total = next(x for x in self.rows if x >= wanted)
        counts = dict(zip(self.running, shares(pending, total), strict=True))
        tokens: list[int] = []
        asks: dict[Text, Ask] = {}
        for text in sorted(counts, key=lambda x: x.slot):
            tokens += text.tokens[text.written : text.written + counts[text]]
            if counts[text] == text.pending:
                asked = text.request
                asks[text] = Ask(len(tokens) - 1, asked.temperature, asked.seed, text.made)
        by_slot = self._by_slot({x.slot: count for x, count in counts.items()})
        found = self._do(Row.of(total, by_slot, tokens, [*asks.values()], self.sizes.sequences))
        for text, count in counts.items():
            text.written += count
        chosen = dict(zip(asks, found.tokens.tolist(), strict=False))
        return chosen, [x for x in counts if found.lost[x.slot]]

    def keep(self, text: Text) -> None:
        """The text has ended; its pages may be shared until others need them."""
        del text.tokens[text.written :]  # the last one, which is not in the cache
        self.running.remove(text)
        self.kept.append(text)
        if len(self.kept) > self.sizes.kept:
            self.drop([self.kept.pop(0)])

    def drop(self, texts: list[Text]) -> None:
        """The texts have ended, and their pages are free."""
        if texts:
            self.running = [x for x in self.running if x not in texts]
            gone = self._by_slot({x.slot: 1 for x in texts}) > 0
            self._take(self.cache.table.freed(gone))

    def _make_room(self, table: Table, text: Text) -> bool:
        """Takes the table, with which ``text`` begins, if there is room: texts that are kept give
        their pages up for it."""
        kept = list(self.kept)
        needed = self._by_slot({x.slot: x.room for x in (*self.running, text)})
        while not bool(jnp.all(table.fits(needed))):
            if not kept:
                return False
            table = table.freed(self._by_slot({kept.pop(0).slot: 1}) > 0)
        self.kept = kept
        self._take(table)
        return True

    def _do(self, row: Row) -> Found:
        found, self.cache = step(self._model, self._blocks, self.cache, row)
        found = Found(*(np.asarray(x) for x in found))  # type: ignore[arg-type]
        self.free = int(found.free)
        return found

    def _take(self, table: Table) -> None:
        self.cache, self.free = replace(self.cache, table=table), int(table.count)

    def _vacant(self) -> int:
        used = {x.slot for x in (*self.running, *self.kept)}
        return next(x for x in range(self.sizes.slots) if x not in used)

    def _by_slot(self, numbers: dict[int, int]) -> np.ndarray:
        """[S] int32."""
        array = np.zeros(self.sizes.slots, np.int32)
        array[list(numbers)] = list(numbers.values())
        return array
