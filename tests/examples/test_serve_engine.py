"""The engine of examples/serving: through the server and a real client, against one text alone."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.serving import pool
from examples.serving.batching import Batching
from examples.serving.chat import END, START, Chat, Message
from examples.serving.row import Ask, Row, chosen
from examples.serving.sequences import Request, alike, shares
from pasa_jax.models import Decoder, DecoderConfig
from pasa_jax.models._generate import choose
from tests.examples import load
from tests.examples.test_serving import asking, events, found_error, served, wait_for
from tests.thin import only
from tests.weights import needs_smollm2

CONFIG = DecoderConfig(
    vocabulary=258,
    width=32,
    hidden=64,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=8,
    max_length=256,
)
LONGEST, NEW, PAGE = 128, 12, 8
SIZES = {"sequences": 6, "pages": 96, "page_size": PAGE, "max_length": 192, "rows": (6, 32)}


class Letters:
    """A tokenizer: a token for each byte, START and END; as text, each token is one letter."""

    encode_special_tokens = False

    def encode(self, text):
        self.ids = list(text.encode())
        return self

    def decode(self, ids):
        return "".join(chr(0x4E00 + x) for x in ids)

    def token_to_id(self, token):
        return {START: 256, END: 257}[token]


@pytest.fixture(scope="module")
def model():
    """A model whose steps are compiled."""
    model = Decoder(CONFIG, rngs=nnx.Rngs(3))
    pool.Pool(model, pool.Sizes(**SIZES, kept=4)).compile()
    return model


@contextmanager
def answering(model, **options):
    with (
        Batching(model, **SIZES | options) as engine,
        served(engine, Letters()) as client,
    ):
        yield engine, client


def alone(model, prompt, seed=0, temperature=0.0):
    """The answer that the model gives to a prompt, alone."""
    padded = jnp.asarray([prompt + [0] * (LONGEST - len(prompt))])
    key = jax.random.key(seed)
    said = model.generate(padded, NEW, lengths=[len(prompt)], temperature=temperature, key=key)
    return said[0].tolist()


def said(response, stream):
    """The text of an answer, and why it ended."""
    assert response.status_code == 200, response.text
    if not stream:
        choice = response.json()["choices"][0]
        return choice["message"]["content"], choice["finish_reason"]
    *pieces, last = events(response.text.splitlines())
    text = "".join(x["choices"][0]["delta"]["content"] for x in pieces)
    return text, last["choices"][0]["finish_reason"]


def check_pages(engine, kept=None):
    """All have ended, and pages are in use by the texts that are kept alone."""
    wait_for(lambda: engine.is_idle)
    assert kept in (None, len(engine.pool.kept))
    table = engine.pool.cache.table
    held = np.asarray(table.pages)
    counts = np.bincount(held[held >= 0], minlength=SIZES["pages"])
    np.testing.assert_array_equal(table.references, counts)
    assert engine.pool.free == int(table.count) == int((counts == 0).sum())
    assert np.flatnonzero(table.length).tolist() == sorted(x.slot for x in engine.pool.kept)


class Watched:
    """`step`, watched and disturbed.

    Arguments:
      pause: seconds before each.
      read, most: how many tokens were read, and the most sequences in one row.
      may_go: steps wait until it is set.
      fails: whether steps raise an error.
      loses: the sequence that the next step loses.
    """

    def __init__(self, monkeypatch, pause=0.0):
        self.step, self.pause, self.read, self.most = pool.step, pause, 0, 0
        self.may_go, self.fails, self.loses = threading.Event(), False, None
        self.may_go.set()
        monkeypatch.setattr(pool, "step", self)

    def __call__(self, model, blocks, cache, row):
        if row.counts.any():
            assert self.may_go.wait(20)
            time.sleep(self.pause)
            self.read += int(row.counts.sum())
            self.most = max(self.most, int((row.counts > 0).sum()))
            if self.fails:
                raise RuntimeError("no more")
        if self.loses is not None:
            lost = cache.table.lost.at[self.loses].set(True)
            cache, self.loses = replace(cache, table=replace(cache.table, lost=lost)), None
        return self.step(model, blocks, cache, row)


BEGINNINGS = [
    "Be brief. Say what is known, and no more than that.",
    "Speak as a pirate would! " * 2,
]


@pytest.mark.parametrize("temperature", only([0.0], [0.0, 0.7]))
def test_32_requests_with_shared_beginnings(model, monkeypatch, temperature):
    watched = Watched(monkeypatch)
    texts = [(BEGINNINGS[i % 2], f"{i * i} {'why ' * (i % 7)}?") for i in range(32)]
    prompts = [Chat(Letters()).tokens([Message("system", a), Message("user", b)]) for a, b in texts]
    temperatures = [0.0 if i % 4 else temperature for i in range(32)]
    options = [*zip(prompts, range(32), temperatures, strict=True)]
    expected = [alone(model, *x) for x in options]
    end = max(range(256), key=lambda x: sum(x in y[2:] for y in expected))
    expected = [x[: x.index(end)] if end in x else x for x in expected]
    assert len({tuple(x) for x in expected}) > 20
    with answering(model, ends=[257, end]) as (engine, client), ThreadPoolExecutor(32) as threads:

        def ask(i):
            messages = [
                {"role": "system", "content": texts[i][0]},
                {"role": "user", "content": texts[i][1]},
            ]
            body = asking(max_tokens=NEW, stream=i % 3 > 0, seed=i, temperature=temperatures[i])
            body["messages"] = messages
            return said(client.post("/chat/completions", json=body), body["stream"])

        found = list(threads.map(ask, range(32)))
        check_pages(engine)
    for (text, reason), tokens in zip(found, expected, strict=True):
        assert text == Letters().decode(tokens)
        assert reason == ("stop" if len(tokens) < NEW else "length")
    # Of 32 prompts, all but the first of each kind share what is common.
    shared = 30 * min(len(x) // PAGE * PAGE for x in BEGINNINGS)
    assert watched.read < sum(map(len, prompts)) + 32 * NEW - shared


def test_more_than_may_wait(model, monkeypatch):
    watched = Watched(monkeypatch)
    with answering(model, waiting=2) as (engine, client), ThreadPoolExecutor(3) as threads:

        def ask():
            return client.post("/chat/completions", json=asking(max_tokens=5, temperature=0))

        watched.may_go.clear()
        found = [threads.submit(ask)]
        wait_for(lambda: engine.pool.running)
        found += [threads.submit(ask) for _ in range(2)]
        wait_for(lambda: engine.waiting == 2)
        refused = ask()
        watched.may_go.set()
        assert refused.status_code == 429
        assert refused.json()["error"]["message"] == "2 requests are waiting; try again later."
        assert len({said(x.result(), False) for x in found}) == 1
        check_pages(engine, kept=3)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_pages(model, monkeypatch, stream):
    Watched(monkeypatch, pause=0.1)
    with answering(model) as (engine, client), ThreadPoolExecutor(1) as threads:
        body = asking("a" * 40, max_tokens=100, stream=stream, temperature=0)
        stays = threads.submit(client.post, "/chat/completions", json=asking(max_tokens=NEW))
        if stream:
            with client.stream("POST", "/chat/completions", json=body) as response:
                lines = response.iter_lines()
                assert [next(lines) for _ in range(3)][-1].startswith("data: ")
                assert engine.pool.free < SIZES["pages"]
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/chat/completions", json=body, timeout=0.5)
        wait_for(lambda: engine.is_idle, 8)  # long before 100 tokens are made
        assert len(said(stays.result(), False)[0]) == NEW
        check_pages(engine, kept=1)  # the other's


def test_requests_wait_for_pages(model, monkeypatch):
    watched = Watched(monkeypatch)
    bodies = [asking(x * 100, max_tokens=50, temperature=0) for x in "abcdef"]
    with answering(model) as (engine, client), ThreadPoolExecutor(6) as threads:
        watched.may_go.clear()
        first = threads.submit(client.post, "/chat/completions", json=bodies[0])
        wait_for(lambda: engine.pool.running)  # and its step waits
        found = [threads.submit(client.post, "/chat/completions", json=x) for x in bodies[1:]]
        wait_for(lambda: engine.waiting == 5)
        watched.may_go.set()
        assert [len(said(x.result(), False)[0]) for x in (first, *found)] == [50] * 6
        assert watched.most == 4  # each needs 21 of the 96 pages
        check_pages(engine, kept=4)
    assert watched.read == 6 * (119 + 49)


def test_a_sequence_that_is_lost(model, monkeypatch, caplog):
    watched = Watched(monkeypatch)
    with answering(model) as (engine, client), ThreadPoolExecutor(2) as threads:
        bodies = [asking(x * 50, max_tokens=NEW, temperature=0) for x in "ab"]
        watched.may_go.clear()
        lost = threads.submit(client.post, "/chat/completions", json=bodies[0])
        wait_for(lambda: engine.pool.running)  # and its step waits
        watched.loses = engine.pool.running[0].slot
        spared = threads.submit(client.post, "/chat/completions", json=bodies[1])
        wait_for(lambda: engine.waiting == 1)
        watched.may_go.set()
        texts = [Chat(Letters()).tokens([Message("user", x * 50)]) for x in "ab"]
        assert lost.result().status_code == 500
        assert "The sequence is lost: its tokens did not fit." in caplog.text
        expected = Letters().decode(alone(model, texts[1]))
        assert said(spared.result(), False) == (expected, "length")
        check_pages(engine, kept=1)


def test_a_step_that_fails(model, monkeypatch, caplog):
    watched = Watched(monkeypatch)
    with answering(model) as (engine, client):
        watched.fails = True
        failed = client.post("/chat/completions", json=asking(stream=True))
        assert events(failed.text.splitlines())[-1] == found_error(caplog)
        watched.fails = False
        with monkeypatch.context() as broken:
            broken.setattr(pool.Pool, "admit", None)
            assert client.post("/chat/completions", json=asking()).status_code == 500
        found = client.post("/chat/completions", json=asking(max_tokens=NEW))
        assert len(said(found, False)[0]) == NEW
        check_pages(engine, kept=1)


def test_a_prompt_that_goes_on_where_an_answer_ended(model):
    found = pool.Pool(model, pool.Sizes(**SIZES, kept=4))

    def answer(prompt):
        """The prompt and its answer, and how many tokens were shared."""
        assert found.admit(Request(prompt, NEW, 0.0, 0, tokens=None)) is True
        (text,) = found.running
        shared = text.written
        while text.made < NEW:
            tokens, lost = found.read()
            assert not lost
            text.tokens += tokens.values()
        said = list(text.tokens)
        found.keep(text)
        return said, shared

    first, shared = answer([*range(2 * PAGE + PAGE - NEW % PAGE)])  # ends where a page ends
    assert (len(first) % PAGE, shared) == (0, 0)
    second, shared = answer([*first, 1, 2, 3])
    assert shared == len(first) - PAGE  # its last token was never read
    assert second[-NEW:] == alone(model, [*first, 1, 2, 3])


def test_answers_do_not_wait_for_prompts(model):
    found = pool.Pool(model, pool.Sizes(**SIZES, kept=4))
    assert found.admit(Request([1, 2, 3], 20, 0.0, 0, tokens=None))
    found.running[0].tokens += found.read()[0].values()
    assert found.admit(Request([5] * 150, 2, 0.0, 0, tokens=None))
    assert found.admit(Request([6] * 10, 2, 0.0, 0, tokens=None))
    asked = []
    for _ in range(6):
        tokens, _ = found.read()
        asked.append([found.running.index(x) for x in tokens])
        for text, token in tokens.items():
            text.tokens.append(token)
    assert asked == [[0, 2], [0, 2], [0, 2], [0, 2], [0, 2], [0, 1, 2]]


def test_samples_are_those_of_a_text_alone():
    logits = jax.random.normal(jax.random.key(1), (4, 50)) * 3
    temperatures, seeds, made = (0.0, 0.5, 1.0, 2.0), (1, 2, 3, 2**31 - 1), (0, 1, 2, 70)
    asks = [Ask(0, *x) for x in zip(temperatures, seeds, made, strict=True)]
    row = Row.of(4, np.zeros(1, np.int32), [], asks, 8)
    keys = [jax.random.fold_in(jax.random.key(s), i) for s, i in zip(seeds, made, strict=True)]
    alone = [choose(logits[i, None], t, keys[i])[0] for i, t in enumerate(temperatures)]
    assert chosen(logits, row.asks).tolist() == [int(x) for x in alone]
    assert chosen(logits.at[2, 7].set(jnp.nan), row.asks).tolist()[2] == -1


def test_the_shares_of_a_row():
    assert shares([1, 1, 1], 8) == [1, 1, 1]
    assert shares([1, 500, 1, 20], 100) == [1, 78, 1, 20]
    assert shares([300, 300, 300], 64) == [32, 16, 16]
    assert shares([5] * 4, 4) == [1] * 4


def test_what_is_alike():
    assert alike([1, 2, 3, 4, 5], [1, 2, 3, 4, 6], 2) == 4
    assert alike([1, 2, 3], [1, 2, 3, 4], 4) == 0
    assert alike([0], [1], 1) == 0


WRONG = {
    "rows": (
        {"rows": (1, 5)},
        "`rows` must be positive, and one of them at least `sequences`, 6; got (1, 5).",
    ),
    "max_length": (
        {"pages": 4},
        "`max_length` must be at most 32, what `pages` hold, and the model's 256; got 192.",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_sizes(model, name):
    options, message = WRONG[name]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        Batching(model, **SIZES | options)
    assert str(error.value) == message


@pytest.mark.full
@needs_smollm2
@pytest.mark.usefixtures("optimized")
def test_32_requests_of_smollm2(capsys):
    engine, chat = load("serve").loaded("float32", 16, 256, 16, 256)
    system = "Answer in one sentence, and say so if you are not sure of what you say. " * 3
    asked = [f"What is the {i + 1}th letter, and a word with it?" for i in range(32)]
    prompts = [chat.tokens([Message("system", system), Message("user", x)]) for x in asked]
    model = engine.pool._model
    with engine, served(engine, chat.tokenizer) as client, ThreadPoolExecutor(32) as threads:
        client.timeout = httpx.Timeout(600)

        def ask(i):
            body = asking(asked[i], max_tokens=16, stream=i % 2 > 0, temperature=0)
            body["messages"].insert(0, {"role": "system", "content": system})
            return said(client.post("/chat/completions", json=body), body["stream"])

        found = list(threads.map(ask, range(32)))
        wait_for(lambda: engine.is_idle)
    padded = np.zeros((1, 128), np.int32)
    for (text, _), prompt in zip(found, prompts, strict=True):
        padded[0, : len(prompt)] = prompt
        alone = model.generate(padded, 16, lengths=[len(prompt)], eos=sorted(engine.ends))
        tokens = [x for x in alone[0].tolist() if x not in engine.ends]
        assert text == chat.tokenizer.decode(tokens)


@pytest.mark.full
@needs_smollm2
@pytest.mark.usefixtures("optimized")
def test_the_speed_of_smollm2(capsys):
    load("serve").bench([1, 2], ["bfloat16"], 3)
    assert capsys.readouterr().out.count("tokens per second") == 2


@pytest.mark.full
def test_clients_that_come_and_go(model, monkeypatch):
    """Of 150 requests every third one is given up, somewhere; no page is lost."""
    Watched(monkeypatch, pause=0.005)
    rng = np.random.default_rng(0)
    texts = [BEGINNINGS[i % 3 % 2] + str(i) * rng.integers(1, 9) for i in range(150)]
    new, given_up = rng.integers(1, NEW + 1, 150), rng.integers(0, 8, 150)
    with answering(model, waiting=150) as (engine, client), ThreadPoolExecutor(24) as threads:

        def ask(i):
            body = asking(texts[i], max_tokens=int(new[i]), stream=True, temperature=0)
            if i % 3:
                return said(client.post("/chat/completions", json=body), True)[0]
            with client.stream("POST", "/chat/completions", json=body) as response:
                for _, _ in zip(range(given_up[i]), response.iter_lines(), strict=False):
                    pass
            return None

        found = list(threads.map(ask, range(150)))
        check_pages(engine)
        assert client.get("/models").status_code == 200
    for i, text in enumerate(found):
        if text is not None:
            prompt = Chat(Letters()).tokens([Message("user", texts[i])])
            assert text == Letters().decode(alone(model, prompt)[: new[i]])
