"""What Raytron's step costs beside a plain PyTorch loop of the same model, on one worker: python benchmarks/overhead.py

Both run in this process with the same threads, batch and number of micro-batches, a step of the one after a step of the
other, so that what disturbs the machine disturbs both. The figure is the median ratio of pairs of neighbouring steps.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch
from context import context, write
from plain import PlainLoop

from raytron.config import RunConfig, from_mapping
from raytron.data.batch import Batch
from raytron.parallel.mesh import Mesh
from raytron.plan.mesh import MeshShape
from raytron.plan.plan import make_plan
from raytron.training.trainer import Trainer

SIZES = {
    "small": {"layers": 2, "hidden": 192, "heads": 6, "kv_heads": 2, "ffn": 512, "vocab": 2048},
    "medium": {"layers": 4, "hidden": 256, "heads": 8, "kv_heads": 4, "ffn": 704, "vocab": 4096},
    "large": {"layers": 6, "hidden": 512, "heads": 8, "kv_heads": 8, "ffn": 1408, "vocab": 8192},
}


class FixedStream:
    """The same random tokens in every step."""

    def __init__(self, config: RunConfig):
        rng = np.random.default_rng(0)
        rows = rng.integers(0, config.model.vocab, (config.global_batch_size, config.sequence_length + 1))
        self.tokens, self.labels = np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])
        self.sequence_length, self.samples_per_epoch = config.sequence_length, 1 << 40

    def batch(self, first: int, count: int, part: int = 0, parts: int = 1) -> Batch:
        weights = np.ones(self.tokens.shape, dtype=np.float32)
        return Batch(np.arange(first, first + count), self.tokens, self.labels, weights)


def measure(name: str, pairs: int) -> dict[str, object]:
    config = from_mapping(
        {"model": SIZES[name], "sequence_length": 128, "global_batch_size": 8, "micro_batch_size": 4, "steps": 10**6,
         "data": {"dataset": "random"}}
    )  # fmt: skip
    stream = FixedStream(config)
    trainer = Trainer(make_plan(config, None), Mesh(MeshShape(), 0), stream)
    plain = PlainLoop(config)
    tokens, labels = torch.from_numpy(stream.tokens), torch.from_numpy(stream.labels)
    ours, theirs = [], []
    for number in range(pairs + 3):
        start = time.perf_counter()
        trainer.train_step()
        middle = time.perf_counter()
        plain.step(tokens, labels)
        end = time.perf_counter()
        if number >= 3:
            ours.append(middle - start)
            theirs.append(end - middle)
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    return {
        "model": SIZES[name],
        "pairs": pairs,
        "raytron_ms": round(statistics.median(ours) * 1e3, 2),
        "plain_ms": round(statistics.median(theirs) * 1e3, 2),
        "ratio_median": round(statistics.median(ratios), 4),
        "ratio_quartiles": [round(ratios[len(ratios) // 4], 4), round(ratios[3 * len(ratios) // 4], 4)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    write("overhead", {"context": context(), "runs": {name: measure(name, arguments.pairs) for name in SIZES}})


if __name__ == "__main__":
    main()
