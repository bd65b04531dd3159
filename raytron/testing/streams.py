"""Token streams without a data set."""

from __future__ import annotations

import numpy as np

from raytron.data.batch import Batch, part_of


class RandomStream:
    """Tokens drawn anew for each sample id, all of which count in the loss. No two ids are alike, so it has no epochs."""

    samples_per_epoch = 1 << 40

    def __init__(self, vocab: int, sequence_length: int, seed: int = 0):
        self.vocab, self.sequence_length, self.seed = vocab, sequence_length, seed

    def batch(self, first: int, count: int, part: int = 0, parts: int = 1) -> Batch:
        ids = np.arange(*part_of(first, count, part, parts))
        shape = (self.sequence_length + 1,)
        rows = [np.random.default_rng([self.seed, int(i)]).integers(0, self.vocab, shape) for i in ids]
        rows_array = np.stack(rows) if rows else np.zeros((0, *shape), dtype=np.int64)
        weights = np.ones((len(ids), self.sequence_length), dtype=np.float32)
        return Batch(ids, rows_array[:, :-1].copy(), rows_array[:, 1:].copy(), weights)
