"""The body of a request for a completion, checked argument by argument."""

from __future__ import annotations

import json
import math
import reprlib
import secrets
from dataclasses import dataclass
from typing import Any

from pasa_jax.core.errors import wrong

from .chat import Message

_ROLES = ("system", "developer", "user", "assistant")
_DEFAULT_TOKENS = 256
# What has no effect here, with the values that ask for none.
_ABSENT: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "top_p": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logprobs": (False,),
    "stop": ([],),
    "tools": ([],),
}
_READ = ("model", "messages", "max_tokens", "max_completion_tokens", "temperature", "seed")
_READ += ("stream", "stream_options", "user")


class BadRequest(ValueError):
    """A request that is wrong: its argument, and the sentence that says what is allowed."""

    def __init__(self, argument: str | None, sentence: str) -> None:
        super().__init__(sentence)
        self.argument = argument


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What is asked for.

    Arguments:
      messages: at least one.
      max_new_tokens: None where the client left it open.
      usage: whether the events end with one that counts tokens.
    """

    model: str
    messages: tuple[Message, ...]
    max_new_tokens: int | None
    temperature: float
    seed: int
    stream: bool
    usage: bool

    def room(self, prompt: int, max_length: int) -> int:
        """How many tokens are made after a prompt of ``prompt`` tokens.

        Raises:
          BadRequest: the prompt, or what is asked for after it, is too long.
        """
        left = max_length - prompt
        if left < 1:
            allowed = f"be at most {max_length - 1} tokens long"
            raise _refused("messages", allowed, prompt)
        if self.max_new_tokens is None:
            return min(left, _DEFAULT_TOKENS)
        if self.max_new_tokens > left:
            allowed = f"be at most {left}, what {prompt} tokens of messages leave of {max_length}"
            raise _refused("max_tokens", allowed, self.max_new_tokens)
        return self.max_new_tokens


def completion(body: bytes) -> Completion:
    """The request of a JSON body.

    Raises:
      BadRequest: no JSON object, or an argument that is missing, wrong or unknown.
    """
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(None, f"The body must be JSON: {error}.") from error
    if not isinstance(given, dict):
        raise BadRequest(None, f"The body must be a JSON object; got {reprlib.repr(given)}.")
    given = {name: x for name, x in given.items() if x is not None}
    _check_names(given)
    options = given.get("stream_options", {})
    if not isinstance(options, dict):
        raise _refused("stream_options", "be an object", options)
    model = given.get("model")
    if not isinstance(model, str):
        raise _refused("model", "be a string", model)
    return Completion(
        model=model,
        messages=_messages(given.get("messages")),
        max_new_tokens=_max_new_tokens(given),
        temperature=_temperature(given.get("temperature", 1)),
        seed=_seed(given.get("seed")),
        stream=_flag("stream", given.get("stream", False)),
        usage=_flag("stream_options.include_usage", options.get("include_usage", False)),
    )


def _check_names(given: dict[str, Any]) -> None:
    for name, value in given.items():
        if name in _ABSENT:
            if value not in _ABSENT[name]:
                allowed = f"be absent or {json.dumps(_ABSENT[name][0])}, as it has no effect here"
                raise _refused(name, allowed, value)
        elif name not in _READ:
            allowed = f"have the arguments {', '.join((*_READ, *_ABSENT))} alone"
            raise BadRequest(
                ascii(name[:80])[1:-1], str(wrong("body", allowed, reprlib.repr(name)))
            )


def _messages(given: Any) -> tuple[Message, ...]:
    if not isinstance(given, list) or not given:
        raise _refused("messages", "be a list of at least one message", given)
    return tuple(_message(f"messages[{i}]", x) for i, x in enumerate(given))


def _message(name: str, given: Any) -> Message:
    if not isinstance(given, dict):
        raise _refused(name, "be an object with role and content", given)
    role = given.get("role")
    if role not in _ROLES:
        allowed = f"be one of {', '.join(map(repr, _ROLES))}"
        raise _refused(f"{name}.role", allowed, role)
    role = "system" if role == "developer" else role
    return Message(role, _content(f"{name}.content", given.get("content")))


def _content(name: str, given: Any) -> str:
    parts = [{"type": "text", "text": given}] if isinstance(given, str) else given
    texts = [_text(x) for x in parts] if isinstance(parts, list) else [None]
    if None in texts:
        raise _refused(name, "be a string or a list of parts of type 'text'", given)
    content = "".join(x for x in texts if x)
    if any("\ud800" <= x <= "\udfff" for x in content):
        raise BadRequest(name, f"`{name}` must be Unicode; got half of a surrogate pair.")
    return content


def _text(part: Any) -> str | None:
    """The text of a part of a message; None where it has another type."""
    if not isinstance(part, dict) or part.get("type") != "text":
        return None
    return part["text"] if isinstance(part.get("text"), str) else None


def _max_new_tokens(given: dict[str, Any]) -> int | None:
    names = [x for x in ("max_completion_tokens", "max_tokens") if x in given]
    for name in names:
        if type(given[name]) is not int or given[name] < 1:
            raise _refused(name, "be a positive integer", given[name])
    return given[names[0]] if names else None


def _temperature(given: Any) -> float:
    if type(given) not in (int, float) or not 0 <= given <= 2 or math.isnan(given):
        raise _refused("temperature", "be a number from 0 to 2", given)
    return float(given)


def _seed(given: Any) -> int:
    """The seed modulo 2³¹; a random one where there is none."""
    if given is None:
        return secrets.randbits(31)
    if type(given) is not int:
        raise _refused("seed", "be an integer", given)
    return given % 2**31


def _flag(name: str, given: Any) -> bool:
    if not isinstance(given, bool):
        raise _refused(name, "be true or false", given)
    return given


def _refused(argument: str, allowed: str, seen: Any) -> BadRequest:
    return BadRequest(argument, str(wrong(argument, allowed, reprlib.repr(seen))))
