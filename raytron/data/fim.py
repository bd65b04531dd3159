"""Fill in the middle: a decoder learns to write what stands between two texts (Bavarian et al., arXiv 2207.14255).

A document is cut in three at two places drawn at random, and the middle moved to the end, where a decoder writes it last:

    prefix suffix middle       <PRE> prefix <SUF> suffix <MID> middle
    suffix prefix middle       <PRE> <SUF> suffix <MID> prefix middle      (the paper's second form of SPM)

It is done to the documents of a sample after they were packed (the paper's context level), and none gets longer: for the
three tokens that are added its last three are left out, before the token that ends it. The middle goes on to that token,
so that the model learns when to stop. Which documents, which form and which places is drawn by (seed, sample id).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raytron.config import DataConfig
from raytron.data.draw import below, uniform
from raytron.data.order import derive_key
from raytron.data.rows import Rows
from raytron.data.tokenizer import token_ids
from raytron.errors import Problem

SITE = 0x46494D  # sets these draws apart from others of the same seed
DRAWS = 4  # for each document: whether, which form, two places
ADDED = 3  # tokens


@dataclass(frozen=True)
class FillInTheMiddle:
    """The transform of rows that know their documents."""

    seed: int
    rate: float  # share of documents
    spm_rate: float  # of those, the share with the suffix first
    prefix: int  # ids of the three tokens that are added
    middle: int
    suffix: int
    eod: int  # id of the token that ends a document

    def __call__(self, rows: Rows, ids: NDArray[np.int64]) -> Rows:
        """Rows of the same shape, documents and padding where they were. Every added token counts."""
        assert rows.documents is not None, "documents that are not known can't be filled in"
        tokens, counts = rows.tokens.copy(), rows.counts.copy()
        most = int(np.diff(rows.documents.splits).max(initial=0))
        draws = uniform(derive_key(self.seed, SITE), ids, DRAWS * most).reshape(len(ids), most, DRAWS)
        for row, document in np.argwhere(draws[:, :, 0] < self.rate).tolist():
            ends = [*rows.documents[row].tolist(), tokens.shape[1]]
            start, stop = ends[document : document + 2] if document + 1 < len(ends) else (0, 0)
            if not counts[row, start:stop].any():
                continue  # padding, or a number that this row does not have
            moved = self.moved(tokens[row, start:stop], draws[row, document])
            if moved is not None:
                tokens[row, start:stop], order = moved
                told = np.append(counts[row, start:stop], True)
                counts[row, start:stop] = told[order]
        return rows._replace(tokens=tokens, counts=counts)

    def moved(
        self, tokens: NDArray[np.int64], draws: NDArray[np.float64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        """One document's tokens (n,) with its middle last, and where each was in it (n,), -1 for an added one. None where it
        is too short. draws: (DRAWS,)."""
        ended = int(tokens[-1] == self.eod)
        kept = len(tokens) - ended - ADDED
        if kept < 1:
            return None
        low, high = np.sort(below(draws[2:], kept + 1)).tolist()
        prefix, middle, suffix = (np.arange(*ends) for ends in ((0, low), (low, high), (high, kept)))
        end, added = np.arange(kept + ADDED, len(tokens)), np.array([-1])
        if draws[1] < self.spm_rate:
            order, marks = [added, added, suffix, added, prefix, middle, end], (self.prefix, self.suffix, self.middle)
        else:
            order, marks = [added, prefix, added, suffix, added, middle, end], (self.prefix, self.suffix, self.middle)
        places = np.concatenate(order)
        out = tokens[places]
        out[places == -1] = marks
        return out, places


def fim_problems(tokenizer: Path, data: DataConfig, pattern: str | None = None) -> list[Problem]:
    """Each token that filling in the middle needs and a tokenizer lacks. pattern: of tiktoken's ranks.

    Raises DataError where it can't be read.
    """
    if not data.fim.rate:
        return []
    names = {key: getattr(data.fim, key) for key in ("prefix", "middle", "suffix")}
    remedy = "name one that it has, or use another tokenizer"
    return [
        Problem(f"data.fim.{key}", f"{tokenizer} has no token {name!r}", remedy)
        for (key, name), number in zip(
            names.items(), token_ids(tokenizer, list(names.values()), data.tokenizer.eod, pattern), strict=True
        )
        if number is None
    ]
