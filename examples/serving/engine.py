"""What the server asks of an engine: tokens for a prompt, until they end or are not wanted."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Protocol


class Overloaded(RuntimeError):
    """The engine takes no more requests now. The server answers 429."""


class Engine(Protocol):
    """Its methods are called in the server's event loop and must return at once."""

    @property
    def max_length(self) -> int:
        """The most tokens of a prompt and its answer."""
        ...

    def submit(
        self, prompt_tokens: Sequence[int], max_new_tokens: int, temperature: float, seed: int
    ) -> Tokens:
        """A request whose tokens come as they are made: at most ``max_new_tokens``, fewer where
        the text ends before. The token that ends a text is not among them.

        Arguments:
          prompt_tokens: at least one; with ``max_new_tokens`` no more than ``max_length``.
          temperature: 0 for the likeliest token.
          seed: of the samples.

        Raises:
          Overloaded: too many requests.
        """
        ...

    def cancel(self, request: Tokens) -> None:
        """No more tokens of ``request`` are wanted: its pages are free for others. Does nothing
        where the request has ended."""
        ...


class Tokens:
    """The tokens of one request, from an engine's thread to the event loop it is made in."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[int | Exception | None] = asyncio.Queue()

    def put(self, token: int) -> None:
        """One more token, from any thread."""
        self._send(token)

    def end(self, error: Exception | None = None) -> None:
        """There are no more, from any thread; ``error`` where the engine failed."""
        self._send(error)

    def _send(self, item: int | Exception | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    async def __aiter__(self) -> AsyncIterator[int]:
        while (item := await self._queue.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
