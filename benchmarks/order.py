"""What the order of data costs: nanoseconds for each sample, and the opening of large data sets: python benchmarks/order.py

`choose` says which source a sample id names, and the how-many-eth of it; `locate` also shuffles each epoch of each source.
Beside them, in the same rounds, stands `numpy.random.permutation`, which costs its time at the start, and 8 bytes for each
sample all along. Data sets of 10^5 to 10^10 documents are opened by their manifests; there are no shards.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from context import context, cpu_seconds, write

from raytron.data.blend import BlendOrder, Stage, whole_weights
from raytron.data.manifest import Manifest, ShardEntry, Source, Unigram, write_manifest
from raytron.data.order import ShuffledOrder
from raytron.data.shards import open_dataset
from raytron.data.stream import ShardStream

SAMPLES = 1 << 18
FIRST = 10**9  # the id that is asked for first
BLOCK = 1024
SHARD_TOKENS, DOCUMENT_TOKENS, LENGTH = 1 << 27, 800, 4096  # a shard of 256 MiB


def blend(sources: int) -> BlendOrder:
    random = np.random.default_rng(sources)
    weights = random.dirichlet(np.ones(sources)) / 2 + 1 / (2 * sources)
    sizes = random.integers(10**5, 10**7, sources).tolist()
    return BlendOrder(tuple(sizes), (Stage(0, whole_weights(weights.tolist())),), 1, BLOCK)


def large(folder: Path, documents: int) -> Path:
    """A manifest of so many documents."""
    count = max(2, documents * DOCUMENT_TOKENS // SHARD_TOKENS)
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    each = SHARD_TOKENS // DOCUMENT_TOKENS, SHARD_TOKENS, 2 * SHARD_TOKENS
    shards = [ShardEntry(f"train-{n:05d}.arrow", "train", *each, f"{n:032x}") for n in range(count)]
    unigram, source = Unigram.of(np.ones(100_000, np.int64)), (Source("made", 1, 1),)
    digest = hashlib.sha256(b"{}").hexdigest()
    write_manifest(folder, Manifest(tuple(shards), digest, 100_000, 0, source, 0.0, unigram, {}, "0" * 32))
    return folder


def opened(folder: Path) -> tuple[float, float]:
    """Milliseconds and megabytes until samples can be asked for, in a process that has opened one before."""

    def work() -> ShardStream:
        return ShardStream(open_dataset(folder), "train", LENGTH)

    best = cpu_seconds(work, 5)
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return round(best * 1e3, 1), round(peak / 1e6, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    ids = np.arange(FIRST, FIRST + SAMPLES)
    single, orders = ShuffledOrder(10**7, 1), {sources: blend(sources) for sources in (3, 16, 64, 256)}
    cases: dict[str, Callable[[], Any]] = {
        "numpy.random.permutation": lambda: np.random.default_rng(1).permutation(SAMPLES),
        "one source": lambda: single.locate(ids),
    }
    for sources, order in orders.items():
        cases[f"choose among {sources} sources"] = lambda order=order: order.choose(ids)
        cases[f"locate among {sources} sources"] = lambda order=order: order.locate(ids)
    best = dict.fromkeys(cases, float("inf"))
    for _ in range(rounds):
        for name, work in cases.items():
            best[name] = min(best[name], cpu_seconds(work))
    with tempfile.TemporaryDirectory() as scratch:
        made = {documents: large(Path(scratch) / str(documents), documents) for documents in (10**5, 10**8, 10**10)}
        opening = {f"{documents:.0e} documents": opened(folder) for documents, folder in made.items()}
    write(
        "order",
        {
            "context": context(rounds=rounds, samples=SAMPLES, block=BLOCK, numpy=np.__version__),
            "ns_per_sample": {name: round(value / SAMPLES * 1e9) for name, value in best.items()},
            "open": {name: {"cpu_ms": ms, "peak_mb": mb} for name, (ms, mb) in opening.items()},
        },
    )


if __name__ == "__main__":
    main()
