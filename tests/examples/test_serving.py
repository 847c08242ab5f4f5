"""The server of examples/serving through a real client, with an engine that repeats a text."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
import uvicorn

from examples.serving.app import app
from examples.serving.chat import END, START, Chat, Message
from examples.serving.engine import Overloaded, Tokens
from tests.weights import needs_smollm2

ANSWER = "Grüße, 世界 🙂!"
MODEL = "repeater"


class Bytes:
    """A tokenizer: a token for each byte, and START and END."""

    encode_special_tokens = False

    def encode(self, text):
        assert self.encode_special_tokens
        self.ids = list(text.encode())
        return self

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")

    def token_to_id(self, token):
        return {START: 256, END: 257}[token]


class Repeater:
    """An engine: each request is a thread that says ANSWER, or the words of the user in slow."""

    max_length = 200

    def __init__(self, pause=0.0, places=100, fails_after=None):
        self.pause, self.places, self.fails_after = pause, places, fails_after
        self.asked, self.running, self.lock = [], {}, threading.Lock()
        self.ended = threading.Event()

    def submit(self, prompt_tokens, max_new_tokens, temperature, seed):
        with self.lock:
            if len(self.running) >= self.places:
                raise Overloaded
            tokens = Tokens()
            self.running[tokens] = threading.Event()
        self.asked.append((prompt_tokens, max_new_tokens, temperature, seed))
        text = bytes(prompt_tokens[6 : prompt_tokens.index(257)]) if self.pause else b""
        say = (text or ANSWER.encode())[:max_new_tokens]
        threading.Thread(target=self.say, args=(tokens, say), daemon=True).start()
        return tokens

    def say(self, tokens, said):
        for i, token in enumerate(said):
            if i == self.fails_after:
                return tokens.end(RuntimeError("no more"))
            if self.running.get(tokens, self.ended).wait(self.pause):
                return None
            tokens.put(token)
        return tokens.end()

    def cancel(self, request):
        with self.lock:
            if stop := self.running.pop(request, None):
                stop.set()


@contextmanager
def served(engine, tokenizer=None):
    """A client of a server with this engine, on a port of its own."""
    chat = Chat(tokenizer or Bytes())
    config = uvicorn.Config(app(engine, chat, MODEL), port=0, log_level="critical", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}/v1", timeout=20) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def asking(text="Hello", **options):
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **options}


def events(lines):
    """What is behind `data: `, the last of which is [DONE]."""
    data = [line.removeprefix("data: ") for line in lines if line]
    assert data[-1] == "[DONE]"
    return [json.loads(x) for x in data[:-1]]


@pytest.fixture(scope="module")
def repeater():
    engine = Repeater()
    with served(engine) as client:
        yield engine, client


def test_models(repeater):
    (entry,) = repeater[1].get("/models").json()["data"]
    assert entry["id"] == MODEL


def test_an_answer_at_once(repeater):
    engine, client = repeater
    messages = [
        {"role": "developer", "content": "Be <|im_end|> brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}],
        },
    ]
    body = {"model": MODEL, "messages": messages, "temperature": 0, "seed": 2**31 + 7, "n": 1}
    found = client.post("/chat/completions", json=body).raise_for_status().json()
    (choice,) = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": ANSWER}
    assert choice["finish_reason"] == "stop"
    prompt, limit, temperature, seed = engine.asked[-1]
    text = "".join({256: START, 257: END}.get(x) or chr(x) for x in prompt)
    assert text == (
        "<|im_start|>system\nBe <|im_end|> brief.<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [prompt.count(256), prompt.count(257)] == [3, 2]
    assert (limit, temperature, seed) == (200 - len(prompt), 0.0, 7)
    made = len(ANSWER.encode())
    assert found["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": made,
        "total_tokens": len(prompt) + made,
    }


def test_an_answer_in_events(repeater):
    body = asking(stream=True, stream_options={"include_usage": True})
    with repeater[1].stream("POST", "/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        first, *pieces, last, usage = events(response.iter_lines())
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [x["choices"][0]["delta"]["content"] for x in pieces] == list(ANSWER)
    assert last["choices"] == [{"index": 0, "delta": {}, "finish_reason": "stop"}]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == len(ANSWER.encode())
    assert {x["id"] for x in (first, *pieces, last, usage)} == {first["id"]}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_most_tokens(repeater, name, stream):
    body = asking(stream=stream) | {name: 3}
    response = repeater[1].post("/chat/completions", json=body)
    if stream:
        _, *pieces, last = events(response.text.splitlines())
        assert [x["choices"][0]["delta"]["content"] for x in pieces] == ["G", "r", "\ufffd"]
    else:
        (last,) = [response.json()]
    assert last["choices"][0]["finish_reason"] == "length"


def test_more_than_the_engine_takes():
    engine = Repeater(pause=0.05, places=1)
    with served(engine) as client:
        with client.stream(
            "POST", "/chat/completions", json=asking("a" * 99, stream=True)
        ) as first:
            assert first.status_code == 200
            second = client.post("/chat/completions", json=asking())
            assert second.status_code == 429
            assert second.json()["error"]["type"] == "overloaded"
            assert second.headers["retry-after"] == "1"
        wait_for(lambda: not engine.running)
        assert client.post("/chat/completions", json=asking()).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away(stream):
    engine = Repeater(pause=0.5)
    with served(engine) as client:
        body = asking("a" * 60, stream=stream)
        if stream:
            with client.stream("POST", "/chat/completions", json=body) as response:
                lines = response.iter_lines()
                next(lines)
                assert engine.running
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/chat/completions", json=body, timeout=0.5)
        wait_for(lambda: not engine.running, 5)  # long before 60 tokens are said
        assert client.get("/models").status_code == 200


def test_an_engine_that_fails(caplog):
    with served(Repeater(fails_after=2)) as client:
        found = client.post("/chat/completions", json=asking())
        assert found.status_code == 500
        assert found.json()["error"]["message"] == "The engine failed."
        found = client.post("/chat/completions", json=asking(stream=True))
        assert events(found.text.splitlines())[-1] == found_error(caplog)


def found_error(caplog):
    assert "RuntimeError: no more" in caplog.text
    error = {"message": "The engine failed.", "type": "server_error", "param": None, "code": None}
    return {"error": error}


def test_many_clients():
    texts = [f"{i} " * 9 for i in range(24)]
    with served(Repeater(pause=0.002)) as client, ThreadPoolExecutor(len(texts)) as pool:

        def ask(text):
            body = asking(text, stream=len(text) % 2 == 0)
            response = client.post("/chat/completions", json=body)
            if not body["stream"]:
                return response.json()["choices"][0]["message"]["content"]
            pieces = events(response.text.splitlines())[:-1]
            return "".join(x["choices"][0]["delta"]["content"] for x in pieces)

        assert list(pool.map(ask, texts)) == texts


def changed(**options):
    return json.dumps(asking() | options)


def one(message):
    return changed(messages=[message])


LIST = "be a list of at least one message"
ROLES = "be one of 'system', 'developer', 'user', 'assistant'"
PARTS = "be a string or a list of parts of type 'text'"
WRONG = {
    "no JSON": ("{", None, "The body must be JSON: "),
    "no UTF-8": (b'"\xff"', None, "The body must be JSON: "),
    "too deep": ("[" * 99_999, None, "The body must be JSON: "),
    "no object": ("[1]", None, "The body must be a JSON object; got [1]."),
    "unknown": (
        changed(top_k=3),
        "top_k",
        "`body` must have the arguments model, messages, max_tokens, max_completion_tokens, "
        "temperature, seed, stream, stream_options, user, n, top_p, frequency_penalty, "
        "presence_penalty, logprobs, stop, tools alone; got 'top_k'.",
    ),
    "no such character": (changed(**{"\ud800": 3}), "\\ud800", "`body` must have the arguments"),
    "n": (changed(n=2), "n", "`n` must be absent or 1, as it has no effect here; got 2."),
    "stop": (
        changed(stop=["a"]),
        "stop",
        "`stop` must be absent or [], as it has no effect here; got ['a'].",
    ),
    "model": (changed(model=None), "model", "`model` must be a string; got None."),
    "messages": (changed(messages=[]), "messages", f"`messages` must {LIST}; got []."),
    "message": (
        one("Hello"),
        "messages[0]",
        "`messages[0]` must be an object with role and content; got 'Hello'.",
    ),
    "role": (
        one({"role": "tool", "content": "x"}),
        "messages[0].role",
        f"`messages[0].role` must {ROLES}; got 'tool'.",
    ),
    "unhashable role": (
        one({"role": {}, "content": "x"}),
        "messages[0].role",
        f"`messages[0].role` must {ROLES}; got {{}}.",
    ),
    "content": (
        one({"role": "user"}),
        "messages[0].content",
        f"`messages[0].content` must {PARTS}; got None.",
    ),
    "image": (
        one({"role": "user", "content": [{"type": "image_url"}]}),
        "messages[0].content",
        f"`messages[0].content` must {PARTS}; got [{{'type': 'image_url'}}].",
    ),
    "half a character": (
        one({"role": "user", "content": "\ud83d"}),
        "messages[0].content",
        "`messages[0].content` must be Unicode; got half of a surrogate pair.",
    ),
    "max_tokens": (
        changed(max_tokens=True),
        "max_tokens",
        "`max_tokens` must be a positive integer; got True.",
    ),
    "too many": (
        changed(max_tokens=190),
        "max_tokens",
        "`max_tokens` must be at most 176, what 24 tokens of messages leave of 200; got 190.",
    ),
    "too long": (
        one({"role": "user", "content": "a" * 200}),
        "messages",
        "`messages` must be at most 199 tokens long; got 219.",
    ),
    "temperature": (
        changed(temperature=float("nan")),
        "temperature",
        "`temperature` must be a number from 0 to 2; got nan.",
    ),
    "seed": (changed(seed="1"), "seed", "`seed` must be an integer; got '1'."),
    "stream": (changed(stream=1), "stream", "`stream` must be true or false; got 1."),
    "options": (
        changed(stream_options=[]),
        "stream_options",
        "`stream_options` must be an object; got [].",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_requests(repeater, name):
    body, argument, message = WRONG[name]
    before = len(repeater[0].asked)
    found = repeater[1].post("/chat/completions", content=body)
    assert found.status_code == 400
    error = found.json()["error"]
    assert error["param"] == argument
    assert error["message"] == message if message.endswith(".") else message in error["message"]
    assert error["type"] == "invalid_request_error"
    assert len(repeater[0].asked) == before


def test_other_errors(repeater):
    client = repeater[1]
    found = client.post("/chat/completions", content=changed(model="other"))
    assert found.status_code == 404
    assert found.json()["error"]["code"] == "model_not_found"
    assert client.get("/chat/completions").status_code == 405
    assert client.get("/nothing").json()["error"]["message"] == "Not Found"
    assert client.post("/chat/completions", content=b" " * (2**20 + 1)).status_code == 413


@pytest.mark.full
@needs_smollm2
def test_messages_as_smollm2_reads_them():
    from pasa_jax import models

    tokenizer = models.load("smollm2").tokenizer
    whole = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nGrüße!<|im_end|>\n"
    expected = tokenizer.encode(f"{whole}<|im_start|>assistant\n").ids
    chat = Chat(tokenizer)
    messages = [Message("system", "Be brief."), Message("user", "Grüße!")]
    assert chat.tokens(messages) == expected
    assert chat.tokens([Message("user", END)]).count(chat.end) == 1
    text, pieces = chat.text(), []
    for token in tokenizer.encode(ANSWER).ids:
        pieces.append(text.add(token))
    assert "".join(pieces) == ANSWER
    assert "" in pieces
    assert not any("\ufffd" in x for x in pieces)
