"""What it costs to read training samples, beside other readers of tokens: python benchmarks/data.py

The same 16 million tokens (documents log-normal: median 403, mean 829) in each reader's own format, samples of 2,048
tokens in batches of 8, in shuffled order where the reader has one, from a warm cache. Tokens per second of CPU time of
this process, of one thread, and all that it has started, the best of interleaved rounds; Ray Data, whose Ray takes time
beside whatever else is read, has its rounds after the others. Every reader makes int64 arrays. A peer that is not installed
is left out; `ratios` are those to each of them.

`cold` reads samples of 4,096 tokens after the files were dropped from the page cache, and counts what the disk was asked
for; `remote` counts the bytes that byte ranges of a data set in a store cost; `wait` is how long a step of 20 ms of other
work waits for its batch, and `feed` the same where Ray Data's tasks read (`data.feed: ray_data`).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
from context import context, cpu_seconds, write

from raytron.config import RunConfig
from raytron.data import files
from raytron.data.feed import RayDataStream
from raytron.data.manifest import Manifest, ShardEntry, Unigram, write_manifest
from raytron.data.megatron import export_megatron
from raytron.data.prefetch import PrefetchStream
from raytron.data.run_data import open_run_data
from raytron.data.shard_file import digest_of, offsets_of, read_shard, write_shard
from raytron.data.shards import Dataset, open_dataset
from raytron.data.stream import ShardStream, open_stream
from raytron.testing.nodes import descendants

LENGTH, BATCH, SAMPLES, DOCUMENTS = 2048, 8, 4096, 20_000
COLD_LENGTH, COLD_SAMPLES = 4096, 300
STEPS, STEP = 50, 64  # samples of a step
PLAIN, APART, PLACES = "raytron, chop", "raytron, documents apart", "raytron, documents apart, with positions"
MEGATRON, MEGATRON_APART = "megatron-core, GPTDataset", "megatron-core, positions anew per document"
RAY = "ray.data, streaming_split"
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


def batches_of(stream: ShardStream, positions: bool) -> Reader:
    def read() -> int:
        for first in range(0, SAMPLES, BATCH):
            batch = stream.batch(first, BATCH)
            if positions and batch.documents is not None:
                batch.documents.positions()
        return SAMPLES * LENGTH

    return read


def own(dataset: Dataset) -> Iterator[tuple[str, Reader]]:
    for name, changes in (
        (PLAIN, {}),
        (APART, {"data.document_mask": True}),
        (PLACES, {"data.document_mask": True}),
        ("raytron, best_fit", {"data.packing": "best_fit"}),
    ):
        config = RunConfig().replace(**{"sequence_length": LENGTH, "data.dataset": str(dataset.path), **changes})
        yield name, batches_of(open_stream(config, dataset, "train"), name == PLACES)


def memory_map(dataset: Dataset) -> Iterator[tuple[str, Reader]]:
    tokens = read_shard(dataset.path / dataset.entries("train")[0].path).tokens
    starts = np.random.default_rng(0).integers(0, len(tokens) - LENGTH, SAMPLES).tolist()

    def read() -> int:
        for first in range(0, SAMPLES, BATCH):
            np.stack([tokens[at : at + LENGTH + 1] for at in starts[first : first + BATCH]]).astype(np.int64)
        return SAMPLES * LENGTH

    yield "slices of a memory map", read


def megatron(dataset: Dataset, folder: Path) -> Iterator[tuple[str, Reader]]:
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    class Words:
        eod, pad, bos, vocab_size, unique_identifiers = 0, 0, 0, 32_000, {"class": "words"}

    export_megatron(dataset.path, folder / "megatron")
    for name, apart in ((MEGATRON, False), (MEGATRON_APART, True)):
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


def rows_of(dataset: Dataset) -> np.ndarray:
    """All samples, one after another, as most other formats store them."""
    tokens = all_tokens(dataset)
    return tokens[: len(tokens) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)


def hugging_face(dataset: Dataset, folder: Path) -> Iterator[tuple[str, Reader]]:
    import datasets

    rows = rows_of(dataset).astype(np.int32)
    datasets.Dataset.from_dict({"tokens": list(rows)}).save_to_disk(folder / "hugging_face")
    stored = datasets.load_from_disk(str(folder / "hugging_face")).with_format("numpy")
    order = np.random.default_rng(0).integers(0, len(stored), SAMPLES)

    def read() -> int:
        for first in range(0, SAMPLES, BATCH):
            np.asarray(stored[order[first : first + BATCH]]["tokens"]).astype(np.int64)
        return SAMPLES * LENGTH

    yield "datasets, numpy format", read


def mosaic(dataset: Dataset, folder: Path) -> Iterator[tuple[str, Reader]]:
    stub_torchvision()
    from streaming import MDSWriter, StreamingDataset

    with MDSWriter(out=str(folder / "mosaic"), columns={"tokens": f"ndarray:uint16:{LENGTH + 1}"}) as out:
        for row in rows_of(dataset):
            out.write({"tokens": row})
    stored = StreamingDataset(local=str(folder / "mosaic"), shuffle=True, batch_size=BATCH)

    def read() -> int:
        by_batches((row["tokens"] for row in stored), lambda rows: np.stack(rows).astype(np.int64))
        return len(stored) * LENGTH

    yield "mosaicml-streaming, shuffled", read


def by_batches(rows: Iterable[Any], join: Callable[[list[Any]], Any]) -> None:
    """Makes a batch of each BATCH rows that come."""
    held: list[Any] = []
    for row in rows:
        held.append(row)
        if len(held) == BATCH:
            join(held)
            held.clear()


def stub_torchvision() -> None:
    """mosaicml-streaming imports it for what is not used here."""
    if "torchvision" in sys.modules:
        return
    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__spec__ = ModuleSpec(name, None)
    sys.modules["torchvision.datasets"].VisionDataset = object  # type: ignore[attr-defined]
    sys.modules["torchvision.transforms.functional"].to_tensor = None  # type: ignore[attr-defined]


def litdata_tokens(document: np.ndarray) -> Iterator[Any]:
    yield torch.from_numpy(document.astype(np.int32))


def litdata(dataset: Dataset, folder: Path) -> Iterator[tuple[str, Reader]]:
    from litdata import StreamingDataset, TokensLoader, optimize

    inputs = [read_shard(dataset.path / entry.path).tokens for entry in dataset.entries("train")]
    optimize(
        litdata_tokens, inputs, str(folder / "litdata"), chunk_size=(LENGTH + 1) * 1024, num_workers=1,
        item_loader=TokensLoader(block_size=LENGTH + 1),
    )  # fmt: skip
    stored = StreamingDataset(str(folder / "litdata"), item_loader=TokensLoader(block_size=LENGTH + 1), shuffle=True)

    def read() -> int:
        by_batches(stored, lambda rows: torch.stack(rows).long())
        return len(stored) * LENGTH

    yield "litdata, TokensLoader, shuffled", read


def ray_data(dataset: Dataset, folder: Path) -> Iterator[tuple[str, Reader]]:
    """As a trainer of one worker is fed. What Ray itself costs while it runs counts: it is there for this."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import ray

    flat = rows_of(dataset)
    rows = pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), LENGTH + 1)
    (folder / "ray").mkdir()
    for number, first in enumerate(range(0, len(rows), 1024)):
        pq.write_table(pa.table({"tokens": rows[first : first + 1024]}), folder / "ray" / f"{number:03d}.parquet")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False

    def read() -> int:
        stored = ray.data.read_parquet(str(folder / "ray"), shuffle="files")
        (feed,) = stored.streaming_split(1, equal=True)
        count = 0
        for batch in feed.iter_batches(batch_size=BATCH, batch_format="numpy"):
            np.stack(batch["tokens"]).astype(np.int64)
            count += len(batch["tokens"])
        return count * LENGTH

    yield RAY, read


def cases(dataset: Dataset, folder: Path) -> tuple[dict[str, Reader], list[str]]:
    """Every reader that is installed, and those that are not."""
    found, absent = dict([*own(dataset), *memory_map(dataset)]), []
    for name, make_cases in (
        ("megatron-core", megatron),
        ("datasets", hugging_face),
        ("mosaicml-streaming", mosaic),
        ("litdata", litdata),
    ):
        try:
            found |= dict(make_cases(dataset, folder))
        except ImportError as error:
            absent.append(f"{name}: {error}")
    return found, absent


def cpu_times() -> dict[int, float]:
    """Seconds of this process and of children that are over, under 0; of each process that it has started and that lives."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = {0: time.process_time() + ended.ru_utime + ended.ru_stime}
    for pid in descendants([os.getpid()])[1:]:
        with suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            found[pid] = sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
    return found


def spent_since(before: dict[int, float]) -> float:
    """Seconds that all of these have spent."""
    return sum(seconds - before.get(pid, 0.0) for pid, seconds in cpu_times().items())


def best_of(rounds: int, readers: dict[str, Reader]) -> dict[str, float]:
    """Tokens per second of CPU time."""
    best = dict.fromkeys(readers, 0.0)
    for _ in range(rounds):
        for name, read in readers.items():
            before = cpu_times()
            tokens = read()
            best[name] = max(best[name], tokens / spent_since(before))
    return best


def ratios(found: dict[str, float]) -> dict[str, float]:
    """How often as many tokens Raytron reads as each peer; of documents apart, as Megatron that way."""
    peers = [name for name in found if not name.startswith("raytron")]
    return {
        f"{mine} / {peer}": round(found[mine] / found[peer], 2)
        for mine in (PLAIN, APART, PLACES)
        for peer in peers
        if (peer == MEGATRON_APART) == (mine != PLAIN) and found[peer]
    }


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


def verified(dataset: Dataset) -> float:
    """What `raytron inspect --verify` hashes."""
    paths = [dataset.path / entry.path for entry in dataset.entries("train")]
    size = sum(path.stat().st_size for path in paths)
    return round(size / cpu_seconds(lambda: [digest_of(path) for path in paths], 5) / 1e9, 1)


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
    """Of a step, until its batch is there."""
    stream: Any = ShardStream(dataset, "train", LENGTH, 5, documents=True)
    return waited(PrefetchStream(stream, depth, lambda first: STEP) if depth else stream)


def waited(stream: Any) -> dict[str, float]:
    """Of 50 steps of 20 ms, until their samples are there."""
    found = []
    for step in range(STEPS):
        begin = time.perf_counter()
        stream.batch(STEP * step, STEP)
        found.append(time.perf_counter() - begin)
        time.sleep(0.02)
    figures = {"median_ms": np.median(found), "p90_ms": sorted(found)[45], "mean_ms": np.mean(found)}
    return {name: round(1e3 * float(seconds), 3) for name, seconds in figures.items()}


def feed(dataset: Dataset) -> dict[str, float]:
    """Ray Data's tasks read ahead; a Ray has to be there. The first step, for which they start, is not counted."""
    config = RunConfig().replace(
        **{"sequence_length": LENGTH, "data.dataset": str(dataset.path), "data.feed": "ray_data"}
    )
    stream = RayDataStream(open_run_data(config, dataset.path), lambda first: STEP)
    ahead = PrefetchStream(stream, 2, lambda first: STEP)
    ahead.batch(0, STEP)
    before, begin = cpu_times(), time.perf_counter()
    found = waited(ahead)
    seconds, tokens = time.perf_counter() - begin, STEPS * STEP * LENGTH
    return {**found, "tokens_per_s": round(tokens / seconds), "tokens_per_cpu_s": round(tokens / spent_since(before))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = f"{scratch}/cache"
        dataset = make(Path(scratch) / "tokens")
        first_cold = cold(dataset)  # before anything maps the files, which would keep them in memory
        readers, absent = cases(dataset, Path(scratch))
        best = best_of(rounds, readers)
        waits = {"read in the step": wait(dataset, 0), "2 steps ahead": wait(dataset, 2)}
        best |= best_of(rounds, dict(ray_data(dataset, Path(scratch))))
        fed = feed(dataset)
        result = {
            "context": context(numpy=np.__version__, rounds=rounds, sequence_length=LENGTH, batch=BATCH),
            "tokens_per_cpu_s": {name: round(value) for name, value in best.items()},
            "ratios": ratios(best),
            "not_installed": absent,
            "cold": first_cold,
            "verified_gb_per_cpu_s": verified(dataset),
            "remote": remote(dataset),
            "wait": waits,
            "feed": fed,
        }
    write("data", result)


if __name__ == "__main__":
    main()
