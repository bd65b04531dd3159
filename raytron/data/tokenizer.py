"""Text to token ids and back, one interface over the formats that tokenizers come in.

    tokenizer.json     of the `tokenizers` library          raytron.data.codec_json
    *.model            of SentencePiece                     raytron.data.codec_sentencepiece
    *.tiktoken         ranks of tiktoken, and a pattern     raytron.data.codec_tiktoken
    the word `byte`    no file: 256 bytes                   raytron.data.codec_bytes

A `Codec` knows one format; `Tokenizer` adds what all share: an identity (a digest), the token that ends each document, and
documents longer than a piece. Whatever the format, what is stored in a data set, a run and beside a checkpoint is one
file, tokenizer.json: the library's own, or one of ours that holds the other format whole.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from raytron.data import codec_bytes, codec_json, codec_sentencepiece, codec_tiktoken
from raytron.data.shard_file import replacing
from raytron.errors import ConfigError, DataError, Problem, RaytronError

SMALLEST_VOCAB = 257  # the bytes, and the token that ends a document
BYTE = codec_bytes.KIND  # stands in place of a path
PIECE_CHARS = 2**20  # a longer document is encoded in pieces
SEAM = re.compile(r"(?<=\S)\n(?=\S)")  # a line end where pieces encode as the whole would
PACKED = "raytron_tokenizer"  # the key of our own files: which format they hold


class Codec(Protocol):
    """One format."""

    kind: str  # "tokenizers", "sentencepiece", "tiktoken" or "byte"
    vocab: int  # ids are in [0, vocab)

    def id_of(self, token: str) -> int | None:
        """The id of a token by its name."""

    def special_tokens(self) -> list[str]:
        """Names of tokens that may end a document."""

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Ids of each text, nothing added; text that spells a special token is text."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out; bytes that are no UTF-8 become U+FFFD."""

    def packed(self) -> dict[str, Any] | None:
        """What one of our own files holds; None where the format is a tokenizer.json by itself."""


class Tokenizer:
    """A loaded tokenizer. Text that spells a special token is encoded as text: a document can't end another."""

    def __init__(self, path: str | Path, eod: str, pattern: str | None = None):
        """Loads a tokenizer. path: its file, or `byte`. pattern: how tiktoken's ranks cut text, a name or a regex.

        Raises DataError where it can't, ConfigError where it lacks the `eod` token or the pattern is missing or unused.
        """
        self.path, self._eod_name = Path(path), eod
        self.codec, self.content = _load(self.path, eod, pattern)
        self.sha256 = hashlib.sha256(self.content).hexdigest()
        self.vocab = self.codec.vocab
        found = self.codec.id_of(eod)
        if found is None:
            what = f"{self.path} has no token {eod!r}"
            remedy = f"use one of: {', '.join(self.codec.special_tokens()[:8])}"
            raise ConfigError([Problem("data.tokenizer.eod", what, remedy)])
        self.eod: int = found

    def save(self, path: Path) -> Tokenizer:
        """Stores the tokenizer as one file, which loads without a pattern; that one, loaded."""
        with replacing(path) as temporary:
            temporary.write_bytes(self.content)
        return Tokenizer(path, self._eod_name)

    def encode(self, text: str) -> list[int]:
        """Token ids of one text, nothing added."""
        ids: list[int] = self.codec.encode_batch([text])[0].tolist()
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out; bytes that are no UTF-8 become U+FFFD."""
        return self.codec.decode(list(ids))

    @property
    def kind(self) -> str:
        """The library that encodes: "tokenizers", "sentencepiece", "tiktoken"; or "byte"."""
        return self.codec.kind

    def encode_documents(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """The ids of each document, the end-of-document token last."""
        split = [list(pieces(text)) for text in texts]
        encoded = iter(self.codec.encode_batch([piece for parts in split for piece in parts]))
        end = np.array([self.eod], np.uint32)
        return [np.concatenate([*(next(encoded) for _ in parts), end]) for parts in split]


UNPACK: Mapping[str, Callable[[Mapping[str, Any]], Codec]] = {
    codec_bytes.KIND: codec_bytes.unpacked,
    codec_sentencepiece.KIND: codec_sentencepiece.unpacked,
    codec_tiktoken.KIND: codec_tiktoken.unpacked,
}


def token_ids(path: Path, names: Sequence[str], eod: str = "", pattern: str | None = None) -> list[int | None]:
    """The ids of tokens by name in a tokenizer's file; None for one that it does not have. Raises as `Tokenizer`, whose
    arguments the others are: a file that was stored needs none."""
    codec, _ = _codec(path, eod, pattern)
    return [codec.id_of(name) for name in names]


def train_tokenizer(path: Path, texts: Iterable[str], vocab: int, eod: str) -> Tokenizer:
    """Trains a byte-level BPE of up to `vocab` ids (the `eod` token is id 0), saves it and loads it.

    Little text gives fewer ids. Raises ConfigError where `vocab` has no room for the bytes.
    """
    if vocab < SMALLEST_VOCAB:
        what = f"{vocab} ids have no room for 256 bytes and the end-of-document token"
        raise ConfigError([Problem("data.tokenizer.vocab", what, f"use {SMALLEST_VOCAB} or more")])
    content = codec_json.trained((piece for text in texts for piece in pieces(text)), vocab, eod)
    with replacing(path) as temporary:
        temporary.write_text(content, encoding="utf-8")
    return Tokenizer(path, eod)


def pieces(text: str, limit: int = PIECE_CHARS) -> Iterator[str]:
    """Cuts a text into pieces of about `limit` characters, at line ends where there are any; joined they are the text."""
    start = 0
    while len(text) - start > limit:
        seam = SEAM.search(text, start + limit, start + 2 * limit)
        if seam is None and len(text) - start <= 2 * limit:
            break
        stop = seam.end() if seam else start + limit
        yield text[start:stop]
        start = stop
    yield text[start:]


def _load(path: Path, eod: str, pattern: str | None) -> tuple[Codec, bytes]:
    """The codec of a file, and what is stored of it."""
    codec, content = _codec(path, eod, pattern)
    if pattern is not None and codec.kind != codec_tiktoken.KIND:
        what = f"has no effect: {path} is no ranks of tiktoken"
        raise ConfigError([Problem(codec_tiktoken.WHERE, what, "leave it at null")])
    packed = codec.packed()
    return codec, content if packed is None else json.dumps({PACKED: codec.kind, **packed}).encode()


def _codec(path: Path, eod: str, pattern: str | None) -> tuple[Codec, bytes]:
    if str(path) == BYTE:
        return codec_bytes.ByteCodec(eod), b""
    remedy = f"give a tokenizer.json, a SentencePiece .model, tiktoken's ranks, or the word {BYTE}"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(Problem(str(path), f"can't be read: {error.strerror}", remedy)) from None
    try:
        if content[:1] == b"{":
            facts = json.loads(content)
            return (UNPACK[facts[PACKED]](facts) if PACKED in facts else codec_json.JsonCodec(content)), content
        if codec_tiktoken.are_ranks(content):
            return codec_tiktoken.ranked(content, eod, pattern), content
        return codec_sentencepiece.SentencePieceCodec(content), content
    except RaytronError:
        raise
    except Exception as error:  # libraries raise bare Exception for a file that they do not understand
        raise DataError(Problem(str(path), f"is not a tokenizer: {error}", remedy)) from None
