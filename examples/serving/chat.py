"""Messages as tokens in the form that SmolLM2 and Qwen2 are trained on, and tokens as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

START, END = "<|im_start|>", "<|im_end|>"
_UNFINISHED = "\ufffd"  # what a decoder writes for a character that lacks bytes


class Message(NamedTuple):
    role: str
    content: str


class Tokenizer(Protocol):
    """What is used of `tokenizers.Tokenizer`."""

    encode_special_tokens: bool

    def encode(self, text: str, /) -> Any: ...
    def decode(self, ids: Sequence[int], /) -> str: ...
    def token_to_id(self, token: str, /) -> int | None: ...


class Chat:
    """Messages as tokens, with ``tokenizer``, which is set to read START and END in a message as
    text: no message can pretend to be another one.

    Raises:
      ValueError: a tokenizer without START and END.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.encode_special_tokens = True
        start, end = (tokenizer.token_to_id(x) for x in (START, END))
        if start is None or end is None:
            raise ValueError(f"`tokenizer` must have the tokens {START} and {END}; got none.")
        self.tokenizer, self.start, self.end = tokenizer, start, end

    def tokens(self, messages: Iterable[Message]) -> list[int]:
        """The messages, and the beginning of the assistant's."""
        tokens: list[int] = []
        for role, content in messages:
            text = self._encoded(f"{role}\n{content}")
            tokens += [self.start, *text, self.end, *self._encoded("\n")]
        return [*tokens, self.start, *self._encoded("assistant\n")]

    def _encoded(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def text(self) -> Text:
        """The text of an answer, of which there are no tokens yet."""
        return Text(self.tokenizer)


class Text:
    """The text of tokens that come one by one.

    A character may need several tokens. So what is new is the text of the last few tokens, less
    the text of those among them that were told before.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._told = 0

    def add(self, token: int) -> str:
        """What ``token`` adds to the text, with what was held back; "" in mid-character."""
        self._tokens.append(token)
        new = self.rest()
        if new.endswith(_UNFINISHED):
            return ""
        self._tokens, self._told = self._tokens[self._told :], len(self._tokens) - self._told
        return new

    def rest(self) -> str:
        """What is held back."""
        before = self._tokenizer.decode(self._tokens[: self._told])
        return self._tokenizer.decode(self._tokens).removeprefix(before)
