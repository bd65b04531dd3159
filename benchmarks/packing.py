"""How fast documents are packed into samples, how little padding that leaves, and how fast they are read: python
benchmarks/packing.py

Document lengths are log-normal (median 403 tokens, mean 829), in shards of 131,072 documents. Rates are pieces, or tokens,
per second of CPU time of this process, the best of three rounds; `plain_loop` is the textbook's best-fit-decreasing, piece
by piece, over the first window. Samples are read in batches of 8 in shuffled order from a warm cache.
"""

from __future__ import annotations

import hashlib
import tempfile
from bisect import bisect_left, insort
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from context import context, cpu_seconds, write
from numpy.typing import NDArray

from raytron.data.best_fit import best_fit
from raytron.data.manifest import Manifest, ShardEntry, Unigram, write_manifest
from raytron.data.pack import WINDOW, PackRule, cut, open_plan
from raytron.data.reader import PackReader
from raytron.data.shard_file import digest_of, offsets_of, write_shard
from raytron.data.shards import Dataset, open_dataset
from raytron.data.stream import ShardStream

SHARD, DOCUMENTS, READ = (
    1 << 17,
    1 << 22,
    4096,
)  # documents of a shard, documents that are packed, samples that are read


def lengths_of(count: int) -> NDArray[np.int64]:
    return np.minimum(np.random.default_rng(0).lognormal(6.0, 1.2, count).astype(np.int64) + 2, 200_000)


def plain_loop(lengths: list[int], capacity: int) -> int:
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        at = bisect_left(rooms, length)
        insort(rooms, (rooms.pop(at) if at < len(rooms) else capacity) - length)
    return len(rooms)


def packing(sequence_length: int) -> dict[str, Any]:
    lengths, capacity = lengths_of(DOCUMENTS), sequence_length + 1
    shards = [offsets_of(lengths[at : at + SHARD]) for at in range(0, DOCUMENTS, SHARD)]
    pieces = np.concatenate([cut(offsets, sequence_length, False)[0].lengths for offsets in shards])
    windows = [pieces[at : at + WINDOW] for at in range(0, len(pieces), WINDOW)]
    cutting = cpu_seconds(lambda: [cut(offsets, sequence_length, False) for offsets in shards], 3)
    fitting = cpu_seconds(lambda: [best_fit(window, capacity) for window in windows], 3)
    bins = sum(len(best_fit(window, capacity).ends) for window in windows)
    sample = pieces[: WINDOW // 16].tolist()
    return {
        "pieces": len(pieces),
        "best_fit_pieces_per_s": round(len(pieces) / fitting),
        "with_cutting_pieces_per_s": round(len(pieces) / (fitting + cutting)),
        "plain_loop_pieces_per_s": round(len(sample) / cpu_seconds(lambda: plain_loop(sample, capacity), 3)),
        "padding_percent": round(100 * (1 - int(pieces.sum()) / (bins * capacity)), 4),
        "chop_cuts_percent_of_documents": round(100 * _chopped(shards, sequence_length) / DOCUMENTS, 1),
        "best_fit_cuts_percent_of_documents": round(100 * float((lengths > capacity).mean()), 1),
    }


def _chopped(shards: list[NDArray[np.int64]], sequence_length: int) -> int:
    """Documents that a cut every `sequence_length` tokens goes through."""
    return sum(
        int((offsets[:-1] // sequence_length != (offsets[1:] - 1) // sequence_length).sum()) for offsets in shards
    )


def make(folder: Path) -> Dataset:
    """Two shards of random tokens."""
    (folder / "tokenizer.json").write_bytes(b"{}")
    entries = []
    for number, lengths in enumerate(np.split(lengths_of(60_000), 2)):
        path, offsets = folder / f"train-{number:05d}.arrow", offsets_of(lengths)
        tokens = np.random.default_rng(number).integers(1, 32_000, int(offsets[-1])).astype(np.uint16)
        write_shard(path, tokens, offsets, np.arange(len(lengths), dtype=np.uint64))
        size = path.stat().st_size
        entries.append(ShardEntry(path.name, "train", len(lengths), len(tokens), size, digest_of(path)))
    tokenizer, unigram = hashlib.sha256(b"{}").hexdigest(), Unigram.of(np.ones(1, np.int64))
    write_manifest(folder, Manifest(tuple(entries), tokenizer, 32_000, 0, (), 0.1, unigram, {}, "0" * 32))
    return open_dataset(folder)


def reading(dataset: Dataset, sequence_length: int) -> dict[str, int]:
    streams = {
        "chop": ShardStream(dataset, "train", sequence_length),
        "chop, documents apart": ShardStream(dataset, "train", sequence_length, documents=True),
    }
    for name in ("best_fit", "pad"):
        plan = open_plan(dataset, PackRule("train", name, sequence_length), [dataset.path])  # type: ignore[arg-type]
        reader = PackReader(dataset, plan)
        streams[name] = ShardStream(dataset, "train", sequence_length, documents=True, reader=reader)

    def read(stream: ShardStream) -> None:
        for first in range(0, READ, 8):
            stream.batch(first, 8)

    tokens = READ * sequence_length
    return {name: round(tokens / cpu_seconds(partial(read, stream), 3)) for name, stream in streams.items()}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        tokens_per_s = reading(make(Path(folder)), 2048)
    packed = {str(length): packing(length) for length in (2048, 4096, 8192, 32_768)}
    write("packing", {"context": context(numpy=np.__version__, window=WINDOW), "packed": packed, "read": tokens_per_s})


if __name__ == "__main__":
    main()
