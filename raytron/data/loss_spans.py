"""Which tokens count in the loss, where not all do: the loss spans of documents.

    document   <user> w w w <assistant> w w w w <user> w w <assistant> w w e         spans [5, 9) and [13, 16)
    counts       0    0 0 0      0      1 1 1 1   0    0 0      0      1 1 1

A conversation teaches the model its own part: what it is to say, not what it is told. A token in a span is one to say, so
it counts as the *label* of the token before it (`raytron.data.rows`). In a shard without the column every token counts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from raytron.data.shard_file import Shard, Spans


def counted(shard: Shard, start: int, stop: int) -> NDArray[np.bool_]:
    """(stop - start,): whether each of those tokens of a shard lies in one of its document's loss spans."""
    assert shard.spans is not None
    first = int(np.searchsorted(shard.offsets, start, side="right")) - 1
    last = int(np.searchsorted(shard.offsets, stop, side="left"))  # documents [first, last) have tokens among these
    offsets = shard.spans.offsets[first : last + 1]
    spans = shard.spans.values[offsets[0] : offsets[-1]].astype(np.int64).reshape(-1, 2)
    spans = spans + np.repeat(shard.offsets[first:last], np.diff(offsets) // 2)[:, None] - start
    spans = np.clip(spans, 0, stop - start)
    steps = np.zeros(stop - start + 1, np.int32)
    np.add.at(steps, spans[:, 0], 1)
    np.add.at(steps, spans[:, 1], -1)
    inside: NDArray[np.bool_] = np.cumsum(steps[:-1]) > 0
    return inside


def spans_fit(spans: Spans, lengths: NDArray[np.int64]) -> bool:
    """Whether the spans of documents of these lengths (d,) are 0 <= start < stop <= start < stop … <= length."""
    counts = np.diff(spans.offsets)
    if len(counts) != len(lengths) or spans.offsets[0] != 0 or spans.offsets[-1] != len(spans.values):
        return False
    if (counts < 0).any() or (counts % 2).any():
        return False
    starts, stops = spans.values.reshape(-1, 2).T
    document = np.repeat(np.arange(len(lengths)), counts // 2)
    next_in_same = document[1:] == document[:-1]
    apart = bool((stops[:-1] <= starts[1:])[next_in_same].all())
    return apart and bool((starts >= 0).all() and (starts < stops).all() and (stops <= lengths[document]).all())
