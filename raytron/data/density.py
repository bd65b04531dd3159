"""How many bytes of text a token is best taken to have, for windows of bytes that become samples of tokens.

Text is not equally dense: with windows of S · (mean bytes per token), half of them would hold more than S + 1 tokens and
be cut. With fewer bytes less is cut, and more of a sample is padding:

    tokens of windows    ▂▅█▅▂ ┊            ▂▅█▅▂              the line: S + 1 tokens
                      padded   ┊ little cut    ┊ half are cut

So a part of the corpus is tokenized once, and the most bytes are taken with which at most CUT of its tokens are cut off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raytron.data.windows import Cutter

CUT = 0.01  # of all tokens, that may be cut off
SHARES = tuple(share / 100 for share in range(100, 49, -1))  # of the mean, that are tried
FINE = 16  # pieces of a window, whose tokens are counted apart
BATCH = 256  # documents that are encoded at once
FIRST_CHARS = 512  # of a document, by which the size of pieces is chosen

Encode = Callable[
    [Sequence[str]], tuple[NDArray[np.uint32], NDArray[np.int64]]
]  # as `raytron.data.fast.Encoder.encode`


@dataclass(frozen=True)
class Density:
    """What was measured on a part of the text."""

    bytes_per_token: float  # to cut windows by
    mean: float  # bytes of text for a token, ends of documents not counted
    tokens: int  # that were counted
    counts: NDArray[np.int64]  # (vocab,) of each id


def measure(texts: Iterable[str], encode: Encode, sequence_length: int, vocab: int, eod: int) -> Density:
    """Measures documents, or parts of them. Raises ValueError where they hold no token."""
    whole = [text for text in texts if text]
    if not whole:
        raise ValueError("no token")
    begins = [text[:FIRST_CHARS] for text in whole[:BATCH]]
    rough = sum(len(text.encode()) for text in begins) / max(int(encode(begins)[1].sum()), 1)
    sizes, tokens, ends, counts = _pieces(whole, encode, max(sequence_length * rough / FINE, 1.0), vocab)
    if not tokens.sum():
        raise ValueError("no token")
    mean = float(sizes.sum() / tokens.sum())
    counts[eod] += len(whole)
    chosen = mean * best_share(sizes + mean * ends, tokens + ends, sequence_length, mean)
    return Density(max(round(chosen, 3), 0.001), mean, int(counts.sum()), counts)


def best_share(costs: NDArray[np.float64], tokens: NDArray[np.int64], sequence_length: int, mean: float) -> float:
    """The largest of SHARES with which windows of share · mean · S bytes lose at most CUT of their tokens.

    costs, tokens: (pieces,) bytes and tokens of pieces of text, one after another; in between both grow evenly.
    """
    ends, counted = np.cumsum([0.0, *costs]), np.cumsum([0, *tokens])
    for share in SHARES:
        limit = share * mean * sequence_length
        windows = np.diff(np.interp(np.arange(0.0, ends[-1] + limit, limit), ends, counted))
        if np.maximum(windows - (sequence_length + 1), 0).sum() <= CUT * counted[-1]:
            return share
    return SHARES[-1]


def _pieces(
    texts: Sequence[str], encode: Encode, limit: float, vocab: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Of pieces of at most about `limit` bytes (pieces,): bytes, tokens, and 1 where a document ends; and how often each id
    occurs (vocab,)."""
    sizes: list[int] = []
    tokens: list[int] = []
    ends: list[int] = []
    counts = np.zeros(vocab, np.int64)
    for batch in _batches(texts):
        cut = list(_cut(batch, limit))
        ids, lengths = encode([text for text, _ in cut])
        counts += np.bincount(ids, minlength=vocab)
        sizes += [len(text.encode()) for text, _ in cut]
        tokens += lengths.tolist()
        ends += [int(last) for _, last in cut]
    return np.array(sizes, np.int64), np.array(tokens, np.int64), np.array(ends, np.int64), counts


def _cut(texts: Sequence[str], limit: float) -> Iterator[tuple[str, bool]]:
    """Pieces of documents, and whether each is its document's last."""
    for text in texts:
        content, cutter = text.encode(), Cutter(limit, 0.0, alone=True)
        for window in (*cutter.add(0, 0, 0, 0, content), *cutter.finish()):
            for piece in window.slices:
                yield content[piece.begin : piece.end].decode(), piece.ends


def _batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    return (texts[start : start + BATCH] for start in range(0, len(texts), BATCH))
