"""The answer to a request: at once or as events, as long as the client is there."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from .chat import Text
from .engine import Engine, Tokens
from .request import Completion

_FAILED = {"message": "The engine failed.", "type": "server_error", "param": None, "code": None}


@dataclass
class Answer(Response):
    """An ASGI response. Whatever ends it, the engine's request is cancelled then.

    Arguments:
      tokens: of the engine, for ``asked``, after a prompt of ``prompt`` tokens.
      limit: the most tokens that come.
    """

    asked: Completion
    engine: Engine
    tokens: Tokens
    text: Text
    prompt: int
    limit: int
    made: int = 0
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            work = self._events(send) if self.asked.stream else self._whole(scope, receive, send)
            await while_connected(receive, work)
        finally:
            self.engine.cancel(self.tokens)

    async def _pieces(self) -> AsyncIterator[str]:
        """The text, piece by piece."""
        async for token in self.tokens:
            self.made += 1
            if piece := self.text.add(token):
                yield piece
        if piece := self.text.rest():
            yield piece

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            content = "".join([piece async for piece in self._pieces()])
        except Exception:
            logging.exception("%s: the engine failed", self.id)
            await JSONResponse({"error": _FAILED}, 500)(scope, receive, send)
            return
        choice = {"index": 0, "message": {"role": "assistant", "content": content}}
        choices = [choice | {"finish_reason": self._reason()}]
        body = self._body("chat.completion", choices) | {"usage": self._usage()}
        await JSONResponse(body)(scope, receive, send)

    async def _events(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def event(data: Any, more: bool = True) -> None:
            line = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
            body = f"data: {line}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": more})

        await event(self._chunk({"role": "assistant", "content": ""}))
        try:
            async for piece in self._pieces():
                await event(self._chunk({"content": piece}))
        except Exception:
            logging.exception("%s: the engine failed", self.id)
            await event({"error": _FAILED})
        else:
            await event(self._chunk({}, self._reason()))
            if self.asked.usage:
                chunk = self._body("chat.completion.chunk", [])
                await event(chunk | {"usage": self._usage()})
        await event("[DONE]", more=False)

    def _chunk(self, delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return self._body("chat.completion.chunk", [choice])

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.asked.model}
        return head | {"choices": choices}

    def _reason(self) -> str:
        return "length" if self.made >= self.limit else "stop"

    def _usage(self) -> dict[str, int]:
        total = self.prompt + self.made
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.made,
            "total_tokens": total,
        }


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Does ``work`` unless the client goes away before it is done."""
    tasks = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    if isinstance(results[0], Exception):
        raise results[0]


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
