"""Sequences in the pages of a cache: what each has to read, and with whom it shares pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .engine import Tokens


@dataclass(eq=False)
class Request:
    """What a client asks for: see `Engine.submit`. The engine stops when it is ``cancelled``."""

    prompt: list[int]
    limit: int
    temperature: float
    seed: int
    tokens: Tokens
    cancelled: bool = False


@dataclass(eq=False)
class Text:
    """A prompt and what was answered so far, as a sequence of the cache.

    Arguments:
      slot: which sequence.
      written: how many of its tokens the cache has.
    """

    request: Request
    slot: int
    written: int
    tokens: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)

    @property
    def pending(self) -> int:
        """How many tokens the model has not read yet: one, or more of a prompt."""
        return len(self.tokens) - self.written

    @property
    def made(self) -> int:
        """How many tokens of the answer there are."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def room(self) -> int:
        """How many more tokens the cache may have to hold; the last of an answer is not read."""
        return len(self.request.prompt) + self.request.limit - 1 - self.written


class Beginning(NamedTuple):
    """Whose pages a prompt can share: ``length`` tokens of ``text``, in whole pages.

    Arguments:
      waits: a text that begins like more of the prompt is being read right now.
    """

    text: Text | None
    length: int
    waits: bool


def beginning(prompt: Sequence[int], texts: Iterable[Text], page_size: int) -> Beginning:
    """The longest beginning of ``prompt``, less its last token, that a text has, too."""
    best, most = Beginning(None, 0, False), 0
    for text in texts:
        same = alike(prompt[:-1], text.tokens, page_size)
        most = max(most, same)
        there = min(same, text.written // page_size * page_size)
        if there > best.length:
            best = Beginning(text, there, False)
    return best._replace(waits=most > best.length)


def alike(a: Sequence[int], b: Sequence[int], page_size: int) -> int:
    """How many tokens, in whole pages, are the same at the beginning of both."""
    ends = range(page_size, min(len(a), len(b)) + 1, page_size)
    same = 0
    for end in ends:
        if a[same:end] != b[same:end]:
            break
        same = end
    return same


def shares(pending: Sequence[int], room: int) -> list[int]:
    """How many tokens of each text the next row of ``room`` tokens has.

    One of each, so that no answer waits for a prompt. Prompts share the rest: the oldest gets half
    of it, the next one half of what is left, and so on; then the youngest gets what is left, so
    that no short prompt waits for a long one.

    >>> shares([1, 500, 1, 20], 100)
    [1, 78, 1, 20]
    """
    counts = [1] * len(pending)
    oldest_first = range(len(pending))
    for part, order in ((2, oldest_first), (1, reversed(oldest_first))):
        for i in order:
            left = room - sum(counts)
            counts[i] += min(pending[i] - counts[i], -(-left // part))
    return counts
