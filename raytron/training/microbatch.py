"""Cuts a dp rank's share of a step into micro-batches, and each sequence into what this cp rank holds of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raytron.data.batch import Batch, document_positions, document_starts
from raytron.model.context import Documents


class MicroBatch(NamedTuple):
    """B sequences of `length` tokens, of each of which this rank holds s = length / cp. Tensors are on the device."""

    samples: Tensor  # (B,) int64
    tokens: Tensor  # (B,s) int64
    labels: Tensor  # (B,s) int64
    weights: Tensor  # (B,s) float32
    length: int
    documents: Documents | None  # None: not kept apart


def micro_batches(batch: Batch, size: int, held: NDArray[np.int64], device: torch.device) -> Iterator[MicroBatch]:
    """Micro-batches of `size` sequences each; held (s,): the positions of a sequence that this rank holds."""
    length = batch.tokens.shape[1]
    parts: list[NDArray[Any]] = [batch.tokens, batch.labels, batch.weights]
    if batch.documents is not None:
        parts.append(document_positions(batch.documents))
    if len(held) < length:
        parts = [part[:, held] for part in parts]
    tensors = [torch.from_numpy(part).to(device, non_blocking=True) for part in (batch.ids, *parts)]
    for number, pieces in enumerate(zip(*(torch.split(tensor, size) for tensor in tensors), strict=True)):
        documents = None
        if batch.documents is not None:
            rows = batch.documents[number * size : (number + 1) * size]
            documents = Documents(document_starts(rows), pieces[4])
        samples, tokens, labels, weights = pieces[:4]
        yield MicroBatch(samples, tokens, labels, weights, length, documents)
