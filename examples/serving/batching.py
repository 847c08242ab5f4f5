"""`Batching`: an engine that answers many requests in the steps of one model.

A step reads a row of tokens: the next one of each answer, and parts of the prompts that are not
read yet. The lengths of rows are few and fixed, so that few programs are compiled. A request is
admitted when the free pages hold all that it and those before it may need, so none runs out of
pages. A prompt that begins like another text shares that text's full pages.

This is an example and no part of the library, because whom a server admits, prefers and remembers
is its own affair. The library's part is `Decoder.paged_step` and `PagedCache`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Collection, Sequence
from typing import Any

from pasa_jax.models import Decoder

from .engine import Overloaded, Tokens
from .pool import Pool, Sizes
from .sequences import Request, Text

_log = logging.getLogger(__name__)
_SECONDS = 5.0  # between two lines of the log


class Batching:
    """An `Engine` of a decoder: one thread that makes step after step. ``with`` closes it.

    Arguments:
      ends: tokens that end a text.
      sequences: the most that are answered at once.
      pages, page_size, max_length: of the cache, as in `PagedCache.empty`.
      rows: of how many tokens a step may be; the longest at least ``sequences``.
      kept: how many texts that have ended keep their pages for prompts that begin alike, as long
        as nobody else needs these.
      waiting: how many requests may wait; beyond them `submit` raises Overloaded.

    Raises:
      ValueError: rows that are too short, or a ``max_length`` beyond the cache or the model.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        ends: Collection[int] = (),
        sequences: int = 32,
        pages: int = 1024,
        page_size: int = 16,
        max_length: int = 2048,
        rows: Sequence[int] = (1, 32, 128),
        kept: int = 4,
        waiting: int = 64,
    ) -> None:
        self.max_length = max_length
        self.pool = Pool(model, Sizes(sequences, pages, page_size, max_length, tuple(rows), kept))
        self.ends, self._most_waiting = frozenset(ends), waiting
        self._begin_line()
        # Of all threads, under the lock.
        self._changed = threading.Condition()
        self._waiting: deque[Request] = deque()
        self._asked: dict[Tokens, Request] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(
        self, prompt_tokens: Sequence[int], max_new_tokens: int, temperature: float, seed: int
    ) -> Tokens:
        """See `Engine.submit`."""
        with self._changed:
            if self._closed:
                raise Overloaded("The engine is closed.")
            if len(self._waiting) >= self._most_waiting:
                raise Overloaded(f"{len(self._waiting)} requests are waiting; try again later.")
            tokens = Tokens()
            request = Request(list(prompt_tokens), max_new_tokens, temperature, seed, tokens)
            self._asked[tokens] = request
            self._waiting.append(request)
            self._changed.notify()
        return tokens

    def cancel(self, request: Tokens) -> None:
        """See `Engine.cancel`."""
        with self._changed:
            if asked := self._asked.pop(request, None):
                asked.cancelled = True
                if asked in self._waiting:
                    self._waiting.remove(asked)

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        """Whether all requests have ended."""
        return not self._asked and not self.pool.running

    def close(self) -> None:
        """Ends the thread; requests that have not ended fail."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def __enter__(self) -> Batching:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _work(self) -> None:
        try:
            _log.info("compiling steps of %s tokens", self.pool.rows)
            _log.info("compiled in %.0f s", self.pool.compile())
            self._begin_line()
            while self._has_work():
                self._try_step()
        except Exception as error:
            _log.exception("The engine ends.")
            return self._stop(error)
        return self._stop(RuntimeError("The engine is closed."))

    def _has_work(self) -> bool:
        """Waits until there is something to do; False when the engine is closed."""
        with self._changed:
            if not self.pool.running and not self._waiting:
                self._write_line(at_once=True)
                self._changed.wait_for(lambda: self._waiting or self._closed)
                self._begin_line()
            return not self._closed

    def _try_step(self) -> None:
        """A step; if it fails, so do requests, and the next one begins with no texts."""
        try:
            self.pool.drop([x for x in self.pool.running if x.request.cancelled])
            self._admit()
            if self.pool.running:
                self._answer(*self.pool.read())
        except Exception as error:
            _log.exception("A step failed.")
            self._fail(error)
        self._write_line()

    def _admit(self) -> None:
        """Takes requests in, in their order; one may overtake others that wait for a beginning
        that is being read."""
        with self._changed:
            waiting = list(self._waiting)
        for request in waiting:
            is_admitted = self.pool.admit(request)
            if is_admitted is False:
                return
            with self._changed:
                if is_admitted and not request.cancelled:
                    self._waiting.remove(request)

    def _answer(self, tokens: dict[Text, int], lost: list[Text]) -> None:
        """Hands tokens out, and ends what has ended."""
        for text in list(self.pool.running):
            token = tokens.get(text)
            if text in lost or token == -1:
                reason = "its tokens did not fit" if text in lost else "logits are not finite"
                self._end(text.request, RuntimeError(f"The sequence is lost: {reason}."))
                self.pool.drop([text])
                continue
            if token is not None and token not in self.ends:
                text.tokens.append(token)
                text.request.tokens.put(token)
                self._made += 1
            if token in self.ends or text.made == text.request.limit:
                self.pool.keep(text)
                self._end(text.request)

    def _end(self, request: Request, error: Exception | None = None) -> None:
        with self._changed:
            self._asked.pop(request.tokens, None)
        request.tokens.end(error)

    def _fail(self, error: Exception) -> None:
        """All that run end with the error; where none does, those that wait."""
        for request in [x.request for x in self.pool.running] or self._turned_away():
            self._end(request, error)
        self.pool.reset()

    def _turned_away(self) -> list[Request]:
        """Those that waited."""
        with self._changed:
            waiting = list(self._waiting)
            self._waiting.clear()
        return waiting

    def _stop(self, error: Exception) -> None:
        with self._changed:
            self._closed = True
        for request in self._turned_away():
            self._end(request, error)
        self._fail(error)

    def _begin_line(self) -> None:
        self._since, self._made = time.monotonic(), 0

    def _write_line(self, at_once: bool = False) -> None:
        """One line of the log every few seconds, and one at the end of work."""
        seconds = time.monotonic() - self._since
        if not self._made or (seconds < _SECONDS and not at_once):
            return
        _log.info(
            "requests: %d running, %d waiting; %.0f tokens per second; %d of %d pages in use",
            len(self.pool.running),
            self.waiting,
            self._made / seconds,
            self.pool.sizes.pages - self.pool.free,
            self.pool.sizes.pages,
        )
        self._begin_line()
