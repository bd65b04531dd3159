"""Samples on their way from a shard to a batch: rows of S + 1 tokens, not yet cut into tokens and labels.

    row        t0 t1 t2 t3 t4         S = 4
    tokens     t0 t1 t2 t3
    labels        t1 t2 t3 t4

Whether a token counts is said of the token, not of the place before it: it counts as a *label*. So whatever moves tokens
about (`Transform`) moves their counts with them, and only the last step, `batch_of`, knows of the shift by one. Where
documents are kept apart it also gives weight 0 to the label of a document's last token, the first of another document.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from raytron.data.batch import Batch
from raytron.data.bounds import Bounds


class Rows(NamedTuple):
    """Some samples; n is their number."""

    tokens: NDArray[np.int64]  # (n, S + 1)
    counts: NDArray[np.bool_]  # (n, S + 1) whether the token is one to learn, as the label of the one before
    documents: Bounds | None = None  # of n rows of S + 1 tokens; None: not known


Transform = Callable[[Rows, NDArray[np.int64]], Rows]  # of rows, and their sample ids (n,); pure, and of the same shape


def batch_of(ids: NDArray[np.int64], rows: Rows, apart: bool) -> Batch:
    """The batch of samples `ids` (n,). apart: documents are kept apart, which needs rows that know them."""
    tokens, labels = rows.tokens[:, :-1], rows.tokens[:, 1:]  # two views of the same row
    weights = rows.counts.astype(np.float32)
    if not apart:
        return Batch(ids, tokens, labels, weights[:, 1:])
    assert rows.documents is not None, "rows without documents can't be kept apart by them"
    weights[rows.documents.where()] = 0
    return Batch(ids, tokens, labels, weights[:, 1:], rows.documents.cut(tokens.shape[1]))
