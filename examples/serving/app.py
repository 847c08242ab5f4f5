"""The routes: `POST /v1/chat/completions` and `GET /v1/models`.

Errors are JSON of the usual form, ``{"error": {"message", "type", "param", "code"}}``: 400 for an
argument that is wrong, 404 for an unknown model, 413 for a body that is too large, 429 for an
engine that takes no more requests now.
"""

from __future__ import annotations

import time

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .answer import Answer
from .chat import Chat
from .engine import Engine, Overloaded
from .request import BadRequest, completion

_MOST_BYTES = 2**20


def app(engine: Engine, chat: Chat, model: str) -> Starlette:
    """The server of one engine.

    Arguments:
      model: the name by which clients ask for it.
    """
    created = int(time.time())

    async def models(request: Request) -> Response:
        entry = {"id": model, "object": "model", "created": created, "owned_by": "pasa-jax"}
        return JSONResponse({"object": "list", "data": [entry]})

    async def completions(request: Request) -> Response:
        asked = completion(await _body(request))
        if asked.model != model:
            message = f"`model` must be {model!r}; got {asked.model[:80]!r}."
            return _error(404, message, "model", code="model_not_found")
        prompt = await run_in_threadpool(chat.tokens, asked.messages)
        limit = asked.room(len(prompt), engine.max_length)
        tokens = engine.submit(prompt, limit, asked.temperature, asked.seed)
        return Answer(asked, engine, tokens, chat.text(), len(prompt), limit)

    routes = [
        Route("/v1/models", models),
        Route("/v1/chat/completions", completions, methods=["POST"]),
    ]
    handlers = {HTTPException: _by_status, BadRequest: _bad, Overloaded: _overloaded}
    return Starlette(routes=routes, exception_handlers=handlers)


async def _body(request: Request) -> bytes:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > _MOST_BYTES:
            raise HTTPException(413, f"The body must have at most {_MOST_BYTES} bytes.")
    return body


def _error(
    status: int,
    message: str,
    argument: str | None = None,
    *,
    kind: str = "invalid_request_error",
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    error = {"message": message, "type": kind, "param": argument, "code": code}
    return JSONResponse({"error": error}, status, headers)


def _bad(request: Request, error: Exception) -> Response:
    assert isinstance(error, BadRequest)
    return _error(400, str(error), error.argument)


def _by_status(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, error.detail, headers=dict(error.headers or {}))


def _overloaded(request: Request, error: Exception) -> Response:
    message = str(error) or "The server takes no more requests now."
    return _error(429, message, kind="overloaded", headers={"retry-after": "1"})
