"""Conversations as documents: a chat template makes their text, and only the assistant's turns are learned.

    messages   [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    text       <|im_start|>user⏎Hi<|im_end|>⏎<|im_start|>assistant⏎ Hello<|im_end|>⏎ e
    learned                                                         ━━━━━━━━━━━━━━━━ ━     one loss span

The template is Jinja, as Hugging Face's tokenizers have it, run in a sandbox. A turn of the assistant is what the template
adds to the text that a model is prompted with at that point: the text is cut there, and at special tokens, before it is
encoded, so that training sees the very ids that generation will. A message that spells a special token, or a mark of the
template below, is refused: it could end a turn, or feign one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment
from numpy.typing import NDArray

from raytron.data.fast import Encoder
from raytron.data.tokenizer import Tokenizer
from raytron.errors import DataError, Problem

TEMPLATE_NAME = "chat_template.jinja"
MARKS = ("<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASSISTANT = "assistant"
PAIR_KEYS = ("prompt", "chosen", "rejected")
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")  # that templates know by these names
WHERE = "data.chat_template"

Message = Mapping[str, Any]


class Segment(NamedTuple):
    """A piece of a conversation that is encoded by itself."""

    text: str
    special: int | None  # the id of the special token that it is
    learned: bool


class ChatError(ValueError):
    """A conversation that can't be used, and why."""


def read_template(path: str | None, tokenizer: str | None) -> str:
    """The template in a file; None: that of the tokenizer_config.json (or chat_template.jinja) beside a tokenizer's file, or
    ChatML where there is none. Raises DataError."""
    if path is None:
        return _beside(Path(tokenizer).parent) if tokenizer is not None else CHATML
    try:
        template = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(Problem(WHERE, f"{path} can't be read: {error}", "give the path of a Jinja template")) from None
    return template


def _beside(folder: Path) -> str:
    if (folder / TEMPLATE_NAME).is_file():
        return (folder / TEMPLATE_NAME).read_text(encoding="utf-8")
    try:
        facts = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return CHATML
    found = facts.get("chat_template")
    return "".join(_set(key, facts.get(key)) for key in NAMED) + found if isinstance(found, str) else CHATML


def _set(key: str, token: Any) -> str:
    """A template's words that give a name to a token, so that the template says all."""
    name = token.get("content") if isinstance(token, dict) else token
    return f"{{% set {key} = {json.dumps(name)} %}}" if isinstance(name, str) else ""


def check_template(template: str) -> jinja2.Template:
    """A template, ready to be laid over messages. Raises DataError for what is none."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _refuse
    environment.filters["tojson"] = _to_json
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise DataError(Problem(WHERE, f"is no template: {error}", "mend it")) from None


def messages_of(value: Any) -> list[Message]:
    """A conversation as it stands in a record. Raises ChatError."""
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise ChatError("is no list of messages")
    for one in value:
        if not isinstance(one.get("role"), str) or not isinstance(one.get("content"), str):
            raise ChatError("has a message without a role or content of text")
    if not any(one["role"] == ASSISTANT for one in value):
        raise ChatError("has no turn of the assistant, so there is nothing to learn")
    return value


def pair_of(record: Mapping[str, Any]) -> tuple[list[Message], list[Message], int]:
    """The chosen and the rejected conversation of a record, and the number of the first message in which they differ.

    A side is a list of messages, or an answer as text; what comes before it is `prompt`, messages or what the user says,
    unless the side holds it already. Raises ChatError.
    """
    prompt = record.get("prompt") or []
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    chosen, rejected = (_side(record.get(key), before) for key in ("chosen", "rejected"))
    equal = [one == other for one, other in zip(chosen, rejected, strict=False)]
    first = equal.index(False) if False in equal else len(equal)
    if not all(any(one["role"] == ASSISTANT for one in side[first:]) for side in (chosen, rejected)):
        raise ChatError("has sides that do not differ in a turn of the assistant")
    return chosen, rejected, first


def _side(value: Any, before: Any) -> list[Message]:
    side = [{"role": ASSISTANT, "content": value}] if isinstance(value, str) else value
    if isinstance(side, list) and side and isinstance(side[0], dict) and side[0].get("role") != ASSISTANT:
        before = []  # it begins at the beginning
    return messages_of([*before, *side] if isinstance(before, list) and isinstance(side, list) else None)


def transcript(messages: Sequence[Message]) -> str:
    """A conversation as plain text: what it is known by, and what a tokenizer is trained on."""
    return "\n\n".join(f"{one['role']}: {one['content']}" for one in messages)


class Chat:
    """A template, for a tokenizer. Raises DataError for what is no template."""

    def __init__(self, template: str, tokenizer: Tokenizer):
        self._template = check_template(template)
        names = tokenizer.codec.special_tokens()
        self._special = {name: tokenizer.codec.id_of(name) for name in names if name}
        self._marks = (*self._special, *(MARKS if template == CHATML else ()))
        longest_first = sorted(self._special, key=len, reverse=True)
        self._cut = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None

    def segments(self, messages: Sequence[Message], first: int = 0) -> list[Segment]:
        """A conversation in pieces, of which the assistant's turns from message `first` on are learned.

        Raises ChatError where the template refuses it or does not add turn to turn.
        """
        for one in messages:
            spelled = next((mark for mark in self._marks if mark in one["content"] or mark in one["role"]), None)
            if spelled is not None:
                raise ChatError(f"has a message that spells {spelled}")
        found: list[Segment] = []
        done = ""
        for number, one in enumerate(messages):
            if one["role"] == ASSISTANT:
                prompt, answered = self._text(messages[:number], True), self._text(messages[: number + 1], False)
                found += self._pieces(_added(done, prompt), learned=False)
                found += self._pieces(_added(prompt, answered), learned=number >= first)
                done = answered
        rest = self._text(messages, False)
        return found + self._pieces(_added(done, rest), learned=False)

    def _text(self, messages: Sequence[Message], prompt: bool) -> str:
        if not messages and not prompt:
            return ""
        try:
            return self._template.render(messages=messages, add_generation_prompt=prompt, tools=None)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            raise ChatError(f"is refused by the template: {error}") from None

    def _pieces(self, text: str, learned: bool) -> list[Segment]:
        """A text cut at special tokens."""
        parts = [text] if self._cut is None else self._cut.split(text)
        return [Segment(part, self._special.get(part), learned) for part in parts if part]


def encode(
    conversations: Sequence[Sequence[Segment]], encoder: Encoder, eod: int
) -> tuple[NDArray[np.uint32], NDArray[np.int64], list[list[int]]]:
    """Tokens of all conversations one after another, each with its end; how many each has; and the loss spans of each."""
    texts = [one.text for segments in conversations for one in segments if one.special is None]
    flat, lengths = encoder.encode(texts)
    encoded = iter(np.split(flat, np.cumsum(lengths)[:-1]) if texts else [])
    pieces: list[NDArray[np.uint32]] = []
    totals, spans = [], []
    for segments in conversations:
        total, learned = 0, list[int]()
        for one in segments:
            ids = next(encoded) if one.special is None else np.array([one.special], np.uint32)
            pieces.append(ids)
            _extend(learned, total, total + len(ids), one.learned)
            total += len(ids)
        _extend(learned, total, total + 1, bool(segments) and segments[-1].learned)
        pieces.append(np.array([eod], np.uint32))
        totals.append(total + 1)
        spans.append(learned)
    return np.concatenate(pieces), np.array(totals, np.int64), spans


def _extend(spans: list[int], start: int, stop: int, learned: bool) -> None:
    """Adds a span, to the last one where it touches that."""
    if not learned or start == stop:
        return
    if spans and spans[-1] == start:
        spans[-1] = stop
    else:
        spans += [start, stop]


def _added(before: str, after: str) -> str:
    if not after.startswith(before):
        raise ChatError("is not built up turn by turn by the template, so the assistant's turns can't be told")
    return after[len(before) :]


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
