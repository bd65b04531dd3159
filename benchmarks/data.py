"""What it costs to read training samples, beside other readers of tokens: python benchmarks/data.py

The same 16 million tokens (documents log-normal: median 403, mean 829) in each reader's own format, samples of 2,048
tokens in batches of 8, in shuffled order where the reader has one, from a warm cache. Tokens per second of CPU time of
this process and its children, the best of interleaved rounds; every reader makes int64 arrays. A peer that is not
installed is left out.

`cold` reads samples of 4,096 tokens after the files were dropped from the page cache, and counts what the disk was asked
for; `remote` counts the bytes that byte ranges of a data set in a store cost; `wait` is how long a step of 20 ms of other
work waits for its batch.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from context import context, write

from raytron.config import RunConfig
from raytron.data import files
from raytron.data.manifest import Manifest, ShardEntry, Unigram, write_manifest
from raytron.data.megatron import export_megatron
from raytron.data.prefetch import PrefetchStream
from raytron.data.shard_file import digest_of, offsets_of, read_shard, write_shard
from raytron.data.shards import Dataset, open_dataset
from raytron.data.stream import ShardStream, open_stream

LENGTH, BATCH, SAMPLES, DOCUMENTS = 2048, 8, 4096, 20_000
COLD_LENGTH, COLD_SAMPLES = 4096, 300
Reader = Callable[[], int]  # reads SAMPLES samples, or all there are; how many tokens


def make(folder: Path) -> Dataset:
    """Two shards of random tokens."""
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(b"{}")
    numbers, entries = np.random.default_rng(0), []
    lengths = np.minimum(numbers.lognormal(6.0, 1.2, DOCUMENTS).astype(np.int64) + 2, 200_000)
    for number, part in enumerate(np.split(lengths, 2)):
        path, offsets = folder / f"train-{number:05d}.arrow", offsets_of(part)
        tokens = numbers.integers(1, 32_000, int(offsets[-1])).astype(np.uint16)
        tokens[offsets[1:] - 1] = 0
        write_shard(path, tokens, offsets, np.arange(len(part), dtype=np.uint64))
        size = path.stat().st_size
        entries.append(ShardEntry(path.name, "train", len(part), len(tokens), size, digest_of(path)))
    tokenizer, unigram = hashlib.sha256(b"{}").hexdigest(), Unigram.of(np.ones(1, np.int64))
    write_manifest(folder, Manifest(tuple(entries), tokenizer, 32_000, 0, (), 0.1, unigram, {}, "0" * 32))
    return open_dataset(folder)


def all_tokens(dataset: Dataset) -> np.ndarray:
    return np.concatenate([dataset.read(entry).tokens for entry in dataset.entries("train")])


def batches_of(stream: ShardStream) -> Reader:
    def read() -> int:
        for first in range(0, SAMPLES, BATCH):
            stream.batch(first, BATCH)
        return SAMPLES * LENGTH

    return read


def own(dataset: Dataset) -> Iterator[tuple[str, Reader]]:
    for name, changes in (
        ("raytron, chop", {}),
        ("raytron, chop, documents apart", {"data.document_mask": True}),
        ("raytron, best_fit", {"data.packing": "best_fit"}),
    ):
        config = RunConfig().replace(**{"sequence_length": LENGTH, "data.dataset": str(dataset.path), **changes})
        yield name, batches_of(open_stream(config, dataset, "train"))


def memory_map(dataset: Dataset) -> Iterator[tuple[str, Reader]]:
    tokens = read_shard(dataset.path / dataset.entries("train")[0].path).tokens
    starts = np.random.default_rng(0).integers(0, len(tokens) - LENGTH, SAMPLES).tolist()

    def read() -> int:
        for first in range(0, SAMPLES, BATCH):
            np.stack([tokens[at : at + LENGTH + 1] for at in starts[first : first + BATCH]]).astype(np.int64)
        return SAMPLES * LENGTH

    yield "slices of a memory map", read


def megatron(dataset: Dataset, folder: Path) -> Iterator[tuple[str, Reader]]:
    import torch
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    class Words:
        eod, pad, bos, vocab_size, unique_identifiers = 0, 0, 0, 32_000, {"class": "words"}

    export_megatron(dataset.path, folder / "megatron")
    for name, apart in (("megatron-core, GPTDataset", False), ("megatron-core, positions anew per document", True)):
        config = GPTDatasetConfig(
            random_seed=1, sequence_length=LENGTH, split="1,0,0", path_to_cache=str(folder / f"cache-{apart}"),
            reset_position_ids=apart, reset_attention_mask=False, eod_mask_loss=apart, create_attention_mask=False,
            tokenizer=Words(), blend=None, blend_per_split=None, mid_level_dataset_surplus=0.005,
        )  # fmt: skip
        inner = IndexedDataset(str(folder / "megatron-train"), mmap=True)
        indices = np.arange(len(inner), dtype=np.int32)
        given = GPTDataset(inner, str(folder / "megatron-train"), indices, SAMPLES, Split.train, config)

        def read(given: Any = given) -> int:
            for first in range(0, SAMPLES, BATCH):
                torch.stack([given[at]["tokens"] for at in range(first, first + BATCH)])
            return SAMPLES * LENGTH

        yield name, read


def hugging_face(dataset: Dataset, folder: Path) -> Iterator[tuple[str, Reader]]:
    import datasets

    tokens = all_tokens(dataset)
    rows = tokens[: len(tokens) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1).astype(np.int32)
    datasets.Dataset.from_dict({"tokens": list(rows)}).save_to_disk(folder / "hugging_face")
    stored = datasets.load_from_disk(str(folder / "hugging_face")).with_format("numpy")
    order = np.random.default_rng(0).integers(0, len(stored), SAMPLES)

    def read() -> int:
        for first in range(0, SAMPLES, BATCH):
            np.asarray(stored[order[first : first + BATCH]]["tokens"]).astype(np.int64)
        return SAMPLES * LENGTH

    yield "datasets, numpy format", read


def cases(dataset: Dataset, folder: Path) -> tuple[dict[str, Reader], list[str]]:
    """Every reader that is installed, and those that are not."""
    found, absent = dict([*own(dataset), *memory_map(dataset)]), []
    for name, make_cases in (("megatron-core", megatron), ("datasets", hugging_face)):
        try:
            found |= dict(make_cases(dataset, folder))
        except ImportError as error:
            absent.append(f"{name}: {error}")
    return found, absent


def cpu_of_all() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def cold(dataset: Dataset) -> dict[str, float]:
    """Bytes that the disk was asked for, by bytes of tokens, and milliseconds a sample."""
    for entry in dataset.entries("train"):
        descriptor = os.open(dataset.path / entry.path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    stream = ShardStream(dataset, "train", COLD_LENGTH, 3)
    before, begin = _disk_bytes(), time.perf_counter()
    for sample in range(COLD_SAMPLES):
        stream.batch(sample, 1)
    seconds = time.perf_counter() - begin
    read, wanted = _disk_bytes() - before, COLD_SAMPLES * (COLD_LENGTH + 1) * 2
    return {
        "bytes_read_by_bytes_wanted": round(read / wanted, 2),
        "ms_per_sample": round(1e3 * seconds / COLD_SAMPLES, 3),
    }


def _disk_bytes() -> int:
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


def remote(dataset: Dataset) -> dict[str, float]:
    """The same of a store: fsspec's memory, which answers at once."""
    url = "memory://benchmark/tokens"
    store, fetched = fsspec.filesystem("memory"), 0
    for path in dataset.path.iterdir():
        store.pipe_file(f"{url}/{path.name}", path.read_bytes())
    inside = files._files(url)
    real = inside.cat_ranges

    def counted(urls: list[str], starts: list[int], stops: list[int], **more: Any) -> list[bytes]:
        nonlocal fetched
        fetched += sum(stops) - sum(starts)
        return list(real(urls, starts, stops, **more))

    inside.cat_ranges = counted
    stream = ShardStream(open_dataset(url), "train", COLD_LENGTH, 3)
    for sample in range(0, COLD_SAMPLES, BATCH):
        stream.batch(sample, BATCH)
    samples = -(-COLD_SAMPLES // BATCH) * BATCH
    return {"bytes_read_by_bytes_wanted": round(fetched / (samples * (COLD_LENGTH + 1) * 2), 2)}


def wait(dataset: Dataset, depth: int) -> dict[str, float]:
    """Of a step of 20 ms, until its batch of 64 is there."""
    stream: Any = ShardStream(dataset, "train", LENGTH, 5, documents=True)
    if depth:
        stream = PrefetchStream(stream, depth, lambda first: 64)
    waited = []
    for step in range(50):
        begin = time.perf_counter()
        stream.batch(64 * step, 64)
        waited.append(time.perf_counter() - begin)
        time.sleep(0.02)
    return {"median_ms": round(1e3 * float(np.median(waited)), 3), "p90_ms": round(1e3 * sorted(waited)[45], 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = f"{scratch}/cache"
        dataset = make(Path(scratch) / "tokens")
        first_cold = cold(dataset)  # before anything maps the files, which would keep them in memory
        readers, absent = cases(dataset, Path(scratch))
        best = dict.fromkeys(readers, 0.0)
        for _ in range(rounds):
            for name, read in readers.items():
                begin = cpu_of_all()
                tokens = read()
                best[name] = max(best[name], tokens / (cpu_of_all() - begin))
        result = {
            "context": context(numpy=np.__version__, rounds=rounds, sequence_length=LENGTH, batch=BATCH),
            "tokens_per_cpu_s": {name: round(value) for name, value in best.items()},
            "not_installed": absent,
            "cold": first_cold,
            "remote": remote(dataset),
            "wait": {"read in the step": wait(dataset, 0), "2 steps ahead": wait(dataset, 2)},
        }
    write("data", result)


if __name__ == "__main__":
    main()
