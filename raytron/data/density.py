"""For how many tokens windows of text are best cut, where only an estimate of them is known.

Were they cut for all S tokens of a sample, half of them would hold more than S + 1 and lose the last ones. Where they are
cut for fewer, less is lost, and more of a sample is padding:

    tokens of windows    ▂▅█▅▂ ┊            ▂▅█▅▂              the line: S + 1 tokens
                      padded   ┊ little cut    ┊ half are cut

So a part of the corpus is tokenized once: the estimate is fitted to it, and of the sizes of windows the largest is taken
with which at most CUT of its tokens are cut off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raytron.data.estimate import TOKEN, Estimate, fitted
from raytron.data.windows import Cutter

CUT = 0.01  # of all tokens, that may be cut off
FILLS = tuple(fill / 100 for fill in range(100, 49, -1))  # shares of S that are tried
FINE = 16  # pieces of a window, whose tokens are counted apart
BATCH = 256  # documents that are encoded at once
FIRST_CHARS = 512  # of a document, by which the size of pieces is chosen

Encode = Callable[
    [Sequence[str]], tuple[NDArray[np.uint32], NDArray[np.int64]]
]  # as `raytron.data.fast.Encoder.encode`


@dataclass(frozen=True)
class Density:
    """What was measured on a part of the text."""

    estimate: Estimate
    fill: float  # share of S tokens that windows are best cut for
    mean: float  # bytes of text for a token, ends of documents not counted
    counts: NDArray[np.int64]  # (vocab,) of each id


def measure(texts: Iterable[str], encode: Encode, sequence_length: int, vocab: int, eod: int) -> Density:
    """Measures documents, or parts of them. Raises ValueError where they hold no token."""
    whole = [text for text in texts if text]
    if not whole:
        raise ValueError("no token")
    begins = [text[:FIRST_CHARS] for text in whole[:BATCH]]
    rough = sum(len(text.encode()) for text in begins) / max(int(encode(begins)[1].sum()), 1)
    pieces, ends, tokens, counts = _pieces(whole, encode, sequence_length * rough / FINE, vocab)
    if not tokens.sum():
        raise ValueError("no token")
    estimate = fitted(pieces, tokens)
    worth = np.array([estimate.running(piece, 0, len(piece))[-1] for piece in pieces]) / TOKEN
    counts[eod] += len(whole)
    fill = best_fill(worth + ends, tokens + ends, sequence_length)
    return Density(estimate, fill, sum(map(len, pieces)) / int(tokens.sum()), counts)


def best_fill(worth: NDArray[np.float64], tokens: NDArray[np.int64], sequence_length: int) -> float:
    """The largest of FILLS with which windows of fill · S tokens by estimate lose at most CUT of their tokens.

    worth, tokens: (pieces,) estimated and true tokens of pieces of text, one after another; in between both grow evenly.
    """
    estimated, counted = np.cumsum([0.0, *worth]), np.cumsum([0, *tokens])
    for fill in FILLS:
        limit = fill * sequence_length
        windows = np.diff(np.interp(np.arange(0.0, estimated[-1] + limit, limit), estimated, counted))
        if np.maximum(windows - (sequence_length + 1), 0).sum() <= CUT * counted[-1]:
            return fill
    return FILLS[-1]


def _pieces(
    texts: Sequence[str], encode: Encode, limit: float, vocab: int
) -> tuple[list[bytes], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Pieces of about `limit` bytes: their text, 1 where a document ends (pieces,), their tokens (pieces,); and how often
    each id occurs (vocab,)."""
    pieces: list[bytes] = []
    ends: list[bool] = []
    tokens: list[int] = []
    counts = np.zeros(vocab, np.int64)
    for batch in _batches(texts):
        cut = list(_cut(batch, limit))
        ids, lengths = encode([piece.decode() for piece, _ in cut])
        counts += np.bincount(ids, minlength=vocab)
        pieces += [piece for piece, _ in cut]
        ends += [last for _, last in cut]
        tokens += lengths.tolist()
    return pieces, np.array(ends, np.int64), np.array(tokens, np.int64), counts


def _cut(texts: Sequence[str], limit: float) -> Iterator[tuple[bytes, bool]]:
    """Pieces of documents, and whether each is its document's last."""
    for text in texts:
        content, cutter = text.encode(), Cutter(Estimate.even(), limit, alone=True)
        for window in cutter.add(0, 0, 0, 0, content):
            for piece in window.slices:
                yield content[piece.begin : piece.end], piece.ends


def _batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    return (texts[start : start + BATCH] for start in range(0, len(texts), BATCH))
