"""Reads samples of indexed text: a window's text is fetched, checked, tokenized, and cut or padded to S + 1 tokens.

    sample ─► OpenPart.window ─► Texts.read ─► digest as indexed? ─► ids, end of each document ─► row

A window that holds one document or several keeps each as it is in the corpus, so a document that lies whole in a window
has the very ids that a tokenized data set would have. Nothing but the index is remembered from one sample to the next,
which is why any process may read any sample at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from raytron.data.bounds import Bounds
from raytron.data.fast import Encoder
from raytron.data.manifest import Split
from raytron.data.rows import Rows
from raytron.data.text_files import Texts
from raytron.data.text_index import OpenPart, TextCorpus
from raytron.data.tokenizer import Tokenizer
from raytron.data.windows import Window
from raytron.errors import DataError, Problem


class Encoded(NamedTuple):
    """One window, tokenized whole."""

    window: Window
    tokens: NDArray[np.uint32]  # (t,) which may be more than a sample holds
    lengths: NDArray[np.int64]  # (slices,) tokens of each, the end of its document included


class TextReader:
    """The samples of one split of an index. What is left of a row is padding: the end-of-document token, which does not
    count, as a document of its own.

    documents: whether rows tell the documents apart. Raises DataError where the split holds no sample, the tokenizer is
    another one, or its backend can't be had here.
    """

    def __init__(self, corpus: TextCorpus, split: Split, *, documents: bool = False):
        self.corpus, self.split, self._documents = corpus, split, documents
        self._parts = corpus.parts(split)
        self._ends = np.cumsum([part.samples for part in self._parts], dtype=np.int64)
        if not len(self._ends):
            raise DataError(no_text(corpus, split))
        self._open: dict[int, OpenPart] = {}
        rule = corpus.manifest.rule
        self._length = rule.sequence_length
        self._texts = Texts(corpus.manifest.units, rule.text_key)
        tokenizer = Tokenizer(corpus.tokenizer, rule.eod_name)
        if tokenizer.sha256 != rule.tokenizer_sha256:
            what = "is not the tokenizer that the text was indexed with"
            raise DataError(Problem(str(corpus.tokenizer), what, "remove the folder: it is made again"))
        self._encoder = Encoder(tokenizer, corpus.manifest.backend)

    @property
    def size(self) -> int:
        """Samples of one epoch."""
        return int(self._ends[-1])

    def window(self, sample: int) -> Window:
        """What a sample, in [0, size), is made of."""
        number = int(np.searchsorted(self._ends, sample, side="right"))
        if number not in self._open:
            self._open[number] = OpenPart(self.corpus.path / self._parts[number].path)
        return self._open[number].window(sample - (int(self._ends[number - 1]) if number else 0))

    def encoded(self, samples: Sequence[int]) -> list[Encoded]:
        """Windows by number, tokenized. Raises DataError where text is not what was indexed."""
        windows = [self.window(sample) for sample in samples]
        texts = self._texts.read([each for window in windows for each in window.slices])
        at = 0
        for window in windows:
            state = xxhash.xxh3_64()
            for text in texts[at : (at := at + len(window.slices))]:
                state.update(text)
            if state.intdigest() != window.digest:
                raise self._texts.changed(window.slices[0])
        flat, lengths = self._encoder.encode([text.decode() for text in texts])
        ends = np.array([each.ends for window in windows for each in window.slices], bool)
        after = np.cumsum(lengths)
        flat, lengths = np.insert(flat, after[ends], self.corpus.eod), lengths + ends
        counts = [len(window.slices) for window in windows]
        each_lengths = np.split(lengths, np.cumsum(counts)[:-1])
        tokens = np.split(flat, np.cumsum([part.sum() for part in each_lengths], dtype=np.int64)[:-1])
        return [Encoded(*parts) for parts in zip(windows, tokens, each_lengths, strict=True)]

    def read(self, samples: NDArray[np.int64]) -> Rows:
        """Rows (n, S + 1) of samples (n,). Raises DataError where text is not what was indexed."""
        shape = (len(samples), self._length + 1)
        rows, columns = Rows(np.full(shape, self.corpus.eod, np.int64), np.zeros(shape, np.bool_)), list[list[int]]()
        for row, (_, tokens, lengths) in enumerate(self.encoded(samples.tolist()) if len(samples) else ()):
            kept = min(len(tokens), shape[1])
            rows.tokens[row, :kept], rows.counts[row, :kept] = tokens[:kept], True
            ends = np.unique(np.cumsum(lengths))  # of documents, and so where the next one begins, or padding
            columns.append([0, *ends[ends < shape[1]].tolist()])
        return rows._replace(documents=Bounds.of_rows(columns, shape[1])) if self._documents else rows


def no_text(corpus: TextCorpus, split: Split) -> Problem:
    """What to say where a split has no sample."""
    remedy = "use a larger data.validation_fraction or more text" if split == "validation" else "use more text"
    return Problem(corpus.name, f"the {split} split holds no document", remedy)


def fullness(reader: TextReader, samples: Sequence[int]) -> tuple[float, float]:
    """Of some samples: the share of their rows that are tokens, and the share of all their tokens that is cut off."""
    width, kept, tokens = reader.corpus.manifest.rule.sequence_length + 1, 0, 0
    for sample in samples:
        found = len(reader.encoded([sample])[0].tokens)
        kept, tokens = kept + min(found, width), tokens + found
    return kept / (width * len(samples)), (tokens - kept) / max(tokens, 1)
