"""Ranks of tiktoken: a byte-pair vocabulary as lines of `base64 rank`, read by its own library, an optional extra.

Ranks do not say how text is cut before pairs are joined, and hold no special tokens: both are part of an encoding's code.
So a pattern is given, by the name of a published scheme or as a regular expression. Where the ranks are those that a
scheme was published with, its special tokens have their published ids; else the end of a document has the first id after
the ranks.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from raytron.errors import ConfigError, DataError, Problem

KIND = "tiktoken"
WHERE = "data.tokenizer.pattern"
_CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA = _SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT4 = (  # blanks at the end of a text stay together, line ends among them or not
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
    r"|\s+(?!\S)|\s"
)


class Scheme(NamedTuple):
    pattern: str
    ranks: int  # of the vocabulary that it was published with
    special: Mapping[str, int]


SCHEMES: Mapping[str, Scheme] = {
    "gpt2": Scheme(
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", 50256, {"<|endoftext|>": 50256}
    ),
    "cl100k": Scheme(_GPT4, 100256, {"<|endoftext|>": 100257, "<|endofprompt|>": 100276}),
    "o200k": Scheme(
        rf"{_CASED}*[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+{_SHORT}?|{_CASED}+[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*{_SHORT}?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        199998,
        {"<|endoftext|>": 199999, "<|endofprompt|>": 200018},
    ),
    "llama3": Scheme(
        _LLAMA, 128000, {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|eot_id|>": 128009}
    ),
}  # fmt: skip


def are_ranks(content: bytes) -> bool:
    """Whether a file begins as ranks do."""
    return re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", content) is not None


def ranked(content: bytes, eod: str, pattern: str | None) -> TiktokenCodec:
    """The codec of a .tiktoken file. Raises ConfigError without a pattern, ValueError for what are no ranks."""
    if pattern is None:
        what = "is missing, and ranks of tiktoken do not say how they cut text"
        remedy = f"give one of {', '.join(SCHEMES)}, or the regular expression of your encoding"
        raise ConfigError([Problem(WHERE, what, remedy)])
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, content.splitlines())}
    scheme = SCHEMES.get(pattern, Scheme(pattern, 0, {}))
    special = dict(scheme.special) if len(ranks) == scheme.ranks else {eod: max(ranks.values()) + 1}
    return TiktokenCodec(ranks, scheme.pattern, special)


class TiktokenCodec:
    """Raises DataError without the library, ConfigError for a pattern that is no regular expression."""

    kind = KIND

    def __init__(self, ranks: Mapping[bytes, int], pattern: str, special: Mapping[str, int]):
        try:
            import tiktoken
        except ImportError:
            problem = Problem("data.tokenizer.path", "ranks of tiktoken need its library", "install raytron[tiktoken]")
            raise DataError(problem) from None
        self.ranks, self.pattern, self.special = dict(ranks), pattern, dict(special)
        try:
            self._inner = tiktoken.Encoding(
                "raytron", pat_str=pattern, mergeable_ranks=self.ranks, special_tokens=self.special
            )
        except ValueError as error:
            what = f"{pattern!r} is no regular expression: {error}"
            raise ConfigError([Problem(WHERE, what, f"give one of {', '.join(SCHEMES)}, or mend it")]) from None
        self.vocab = self._inner.n_vocab

    def id_of(self, token: str) -> int | None:
        return self.special.get(token)

    def special_tokens(self) -> list[str]:
        return list(self.special)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        return [np.array(self._inner.encode_ordinary(text), np.uint32) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        special = set(self.special.values())
        return str(self._inner.decode([one for one in ids if one not in special]))

    def packed(self) -> dict[str, Any]:
        ranks = {base64.b64encode(token).decode("ascii"): rank for token, rank in self.ranks.items()}
        return {"pattern": self.pattern, "special": self.special, "ranks": ranks}


def unpacked(facts: Mapping[str, Any]) -> TiktokenCodec:
    ranks = {base64.b64decode(token): int(rank) for token, rank in facts["ranks"].items()}
    return TiktokenCodec(ranks, str(facts["pattern"]), facts["special"])
