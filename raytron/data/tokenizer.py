"""Text to token ids and back: byte-level BPE, in the `tokenizer.json` format of the `tokenizers` library.

Byte-pair encoding (Sennrich, Haddow and Birch, arXiv 1508.07909) begins with the 256 bytes and joins, again and again,
the pair that occurs most often in the training text; on bytes (GPT-2) there is no unknown text. One more token ends each
document. Training is deterministic: the same text gives the same file.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray

from raytron.data.shard_file import replacing
from raytron.errors import ConfigError, DataError, Problem

SMALLEST_VOCAB = 257  # the bytes, and the token that ends a document
PIECE_CHARS = 2**20  # a longer document is encoded in pieces
SEAM = re.compile(r"(?<=\S)\n(?=\S)")  # a line end where pieces encode as the whole would


class Tokenizer:
    """A loaded tokenizer. Text that spells a special token is encoded as text: a document can't end another."""

    def __init__(self, path: str | Path, eod: str):
        """Loads a tokenizer.json. Raises DataError where it can't, ConfigError where it lacks the `eod` token."""
        self.path = Path(path)
        remedy = "give the path of a tokenizer.json of the `tokenizers` library"
        try:
            content = self.path.read_bytes()
            self._inner = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except OSError as error:
            raise DataError(Problem(str(path), f"can't be read: {error.strerror}", remedy)) from None
        except Exception as error:  # the library raises bare Exception for a file that it does not understand
            raise DataError(Problem(str(path), f"is not a tokenizer: {error}", remedy)) from None
        self._inner.encode_special_tokens = True
        self._inner.no_truncation()
        self._inner.no_padding()
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.vocab = 1 + max(self._inner.get_vocab(with_added_tokens=True).values(), default=-1)
        found = self._inner.token_to_id(eod)
        if found is None:
            special = [token.content for token in self._inner.get_added_tokens_decoder().values()]
            what = f"{self.path} has no token {eod!r}"
            raise ConfigError([Problem("data.tokenizer.eod", what, f"use one of: {', '.join(special[:8])}")])
        self.eod: int = found

    def encode(self, text: str) -> list[int]:
        """Token ids of one text, nothing added."""
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out; bytes that are no UTF-8 become U+FFFD."""
        return str(self._inner.decode(list(ids), skip_special_tokens=True))

    def encode_documents(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """The ids of each document, the end-of-document token last."""
        split = [list(pieces(text)) for text in texts]
        flat = [piece for parts in split for piece in parts]
        encoded = iter(self._inner.encode_batch_fast(flat, add_special_tokens=False))
        end = [self.eod]
        return [np.concatenate([*(next(encoded).ids for _ in parts), end]).astype(np.uint32) for parts in split]


def token_ids(path: Path, names: Sequence[str]) -> list[int | None]:
    """The ids of tokens by name in a tokenizer.json; None for one that it does not have. Raises DataError."""
    try:
        inner = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        remedy = "give the path of a tokenizer.json of the `tokenizers` library"
        raise DataError(Problem(str(path), f"is not a tokenizer: {error}", remedy)) from None
    return [inner.token_to_id(name) for name in names]


def train_tokenizer(path: Path, texts: Iterable[str], vocab: int, eod: str) -> Tokenizer:
    """Trains a byte-level BPE of up to `vocab` ids (the `eod` token is id 0), saves it and loads it.

    Little text gives fewer ids. Raises ConfigError where `vocab` has no room for the bytes.
    """
    if vocab < SMALLEST_VOCAB:
        what = f"{vocab} ids have no room for 256 bytes and the end-of-document token"
        raise ConfigError([Problem("data.tokenizer.vocab", what, f"use {SMALLEST_VOCAB} or more")])
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[eod],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator((piece for text in texts for piece in pieces(text)), trainer)
    with replacing(path) as temporary:
        temporary.write_text(inner.to_str(pretty=False), encoding="utf-8")
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
