"""Masked tokens: a model with attention to both sides says what stood there (BERT: Devlin et al., arXiv 1810.04805).

Of the tokens 15 % are chosen. Of those 80 % are replaced by the mask token, 10 % by any token of the vocabulary, and 10 %
stay, so that no token can be trusted blindly. The labels are the tokens that stood there, at the same place (no shift by
one), and only the chosen ones count. With a table of the tokens that begin a word, whole words are chosen: the draw for a
word's first token holds for all of it.

    tokens     the  cat  s  at    on   the  mat          chosen: cat s, on
    inputs     the   ▒   ▒  at   dog   the  mat
    weights     0    1   1   0    1     0    0

A causal decoder can't be trained so, since its place t sees t, and not what follows: this is for other models.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray

from raytron.data.batch import Batch
from raytron.data.bounds import Bounds
from raytron.data.draw import below, uniform
from raytron.data.order import derive_key
from raytron.data.rows import Rows

SITE = 0x4D4C4D  # sets these draws apart from others of the same seed


@dataclass(frozen=True, eq=False)
class Masking:
    """Which tokens are chosen, and what becomes of them."""

    seed: int
    mask: int  # id of the mask token
    vocab: int  # random tokens are in [0, vocab)
    rate: float = 0.15  # share of tokens (or words) that are chosen
    masked: float = 0.8  # of the chosen: replaced by the mask token
    random: float = 0.1  # replaced by any token; the rest stay
    word_starts: NDArray[np.bool_] | None = None  # (vocab,): tokens that begin a word; None: each token by itself
    spared: tuple[int, ...] = ()  # ids that are never chosen, such as the one that ends a document

    def __call__(self, rows: Rows, ids: NDArray[np.int64]) -> Batch:
        """The batch of samples `ids` (n,): of each row the first S tokens. Tokens that do not count are never chosen."""
        tokens, counts = rows.tokens[:, :-1], rows.counts[:, :-1]
        documents = None if rows.documents is None else rows.documents.cut(tokens.shape[1])
        count, length = tokens.shape
        draws = uniform(derive_key(self.seed, SITE), ids, 3 * length).reshape(count, 3, length)
        chosen = np.take_along_axis(draws[:, 0], self._decides(tokens, documents), axis=1) < self.rate
        chosen &= counts & ~np.isin(tokens, self.spared)
        inputs = np.where(chosen & (draws[:, 1] < self.masked), self.mask, tokens)
        other = (draws[:, 1] >= self.masked) & (draws[:, 1] < self.masked + self.random)
        inputs = np.where(chosen & other, below(draws[:, 2], self.vocab), inputs)
        return Batch(ids, inputs, np.ascontiguousarray(tokens), chosen.astype(np.float32), documents)

    def _decides(self, tokens: NDArray[np.int64], documents: Bounds | None) -> NDArray[np.int64]:
        """(n, S): the place whose draw decides for each token: its own, or that of its word's first token."""
        at = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
        if self.word_starts is None:
            return at
        begins = self.word_starts[tokens]
        begins[:, :1] = True
        if documents is not None:
            begins[documents.where()] = True
        return np.maximum.accumulate(np.where(begins, at, 0), axis=1)


def word_starts(path: str | Path) -> NDArray[np.bool_]:
    """(vocab,): whether each token of a tokenizer.json begins a word, by the mark of its kind.

    WordPiece marks tokens that go on (##ing), SentencePiece (▁the) and byte-level BPE (Ġthe, or a line's end) those that
    begin; beside those a token without a letter or digit is a word of its own, and so is a special token.
    """
    inner = tokenizers.Tokenizer.from_file(str(path))
    vocab = inner.get_vocab(with_added_tokens=True)
    special = {token.content for token in inner.get_added_tokens_decoder().values()}
    pieces = any(text.startswith("##") and len(text) > 2 for text in vocab) and not any("Ġ" in text for text in vocab)
    begins = np.zeros(1 + max(vocab.values(), default=-1), np.bool_)
    for text, number in vocab.items():
        if pieces:
            begins[number] = not text.startswith("##")
        else:
            begins[number] = text[:1] in ("Ġ", "▁", "Ċ", "ĉ") or not any(map(str.isalnum, text))
        begins[number] |= text in special
    return begins
