"""Tokenization on every core of a Ray cluster, by Ray Data.

    units ─► groups ─► from_items ─► map_batches: one task a group ─► a row of facts ─► the driver
                                     reads, encodes, writes parts     (no text, no tokens)

Only descriptions travel: a task reads its own files and writes its own tokens, so nothing large passes through the
object store or the driver. Which group a unit belongs to depends on the corpus and the configuration alone, so the data
set is the same, byte for byte, for any number of workers. Tasks are stateless and hold a CPU only while they run, no
actor pool is kept: a pool that takes every CPU of a cluster can starve the stages before it.

A document's id is a digest of its text, and that chooses its split: it stays in its split when text is added later, and
two copies of one document never stand on both sides.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import xxhash
from numpy.typing import NDArray

from raytron.data.compact import SPLITS, Part
from raytron.data.corpus import Corpus, Unit, documents
from raytron.data.order import mix64
from raytron.data.shard_file import offsets_of, token_dtype, write_shard
from raytron.data.tokenizer import Tokenizer
from raytron.errors import ClusterError, DataError, Problem, RaytronError

Report = Callable[[float, str], None]  # (share that is done, in [0, 1]; a line for a human)

CHUNK_CHARS = 2**20  # text that is encoded at once
GROUPS = 32  # tasks that a corpus is cut in, within the limits of a group's size
SMALLEST_GROUP_BYTES = 2**20
WAIT_FOR_CPU_S = 10.0
MIB = 2**20


@dataclass(frozen=True)
class Job:
    """What is the same for every task."""

    folder: str  # where parts are written; the same directory on every node
    tokenizer: str
    eod: str
    text_key: str
    validation_fraction: float


@dataclass(frozen=True)
class Tokenized:
    parts: tuple[Part, ...]
    counts: NDArray[np.int64]  # (vocab,) of each id in the training parts
    corpus_xxh3_128: str
    skipped: int  # files without a document


def tokenize_corpus(corpus: Corpus, job: Job, vocab: int, shard_bytes: int, report: Report) -> Tokenized:
    """Tokenizes a corpus into parts under `job.folder`. Ray must be initialised.

    Raises DataError for text that can't be read, ClusterError where Ray is not initialised or no CPU is free.
    """
    _wait_for_cpu()
    groups = group_units(corpus.units, _group_bytes(corpus.bytes, shard_bytes))
    rows: dict[int, Mapping[str, Any]] = {}
    done, started = 0, time.monotonic()
    for row in _run(groups, job):
        facts = json.loads(row["facts"])
        if "error" in facts:
            raise DataError(facts["error"])
        rows[facts["group"]] = {**facts, "counts": np.frombuffer(row["counts"], np.int64)}
        done += sum(unit.bytes for unit in groups[facts["group"]])
        rate = done / MIB / max(time.monotonic() - started, 1e-6)
        report(done / corpus.bytes, f"tokenized {done / MIB:.1f} of {corpus.bytes / MIB:.1f} MiB, {rate:.1f} MiB/s")
    return _collect([rows[number] for number in range(len(groups))], vocab)


def group_units(units: Sequence[Unit], group_bytes: int) -> list[list[Unit]]:
    """Consecutive units that together hold at least `group_bytes` of text; the last group may hold less."""
    groups: list[list[Unit]] = [[]]
    held = 0
    for unit in units:
        if held >= group_bytes:
            groups.append([])
            held = 0
        groups[-1].append(unit)
        held += unit.bytes
    return groups


def is_validation(doc_id: int, fraction: float) -> bool:
    """Whether a document belongs to the validation split: true for `fraction` of all ids."""
    return mix64(doc_id) < fraction * 2**64


def tokenize_group(group: int, units: Sequence[Unit], job: Job) -> tuple[dict[str, Any], NDArray[np.int64]]:
    """One task: writes up to one part for each split. Returns its facts (JSON) and the counts (vocab,) of its ids."""
    tokenizer = _tokenizer(job.tokenizer, job.eod)
    tokens: dict[str, list[NDArray[Any]]] = {split: [] for split in SPLITS}
    ids: dict[str, list[int]] = {split: [] for split in SPLITS}
    order: list[int] = []
    skipped = 0
    for texts, empty in _chunks(units, job.text_key):
        skipped += empty
        for text, encoded in zip(texts, tokenizer.encode_documents(texts), strict=True):
            doc_id = xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))
            split = "validation" if is_validation(doc_id, job.validation_fraction) else "train"
            tokens[split].append(encoded.astype(token_dtype(tokenizer.vocab)))
            ids[split].append(doc_id)
            order.append(doc_id)
    counts = np.zeros(tokenizer.vocab, np.int64)
    parts = []
    for split in SPLITS:
        path = Path(job.folder) / f"{group:06d}-{split}.arrow"
        lengths = np.array([len(document) for document in tokens[split]], np.int64)
        if len(lengths):
            flat = np.concatenate(tokens[split])
            write_shard(path, flat, offsets_of(lengths), np.array(ids[split], np.uint64))
            if split == "train":
                counts += np.bincount(flat, minlength=tokenizer.vocab)
        parts.append(astuple(Part(str(path), split, len(lengths), int(lengths.sum()))))
    digest = xxhash.xxh3_128_hexdigest(np.array(order, np.uint64).tobytes())
    return {"group": group, "parts": parts, "digest": digest, "skipped": skipped}, counts


def _chunks(units: Sequence[Unit], text_key: str) -> Iterator[tuple[list[str], int]]:
    """Documents in lists of about CHUNK_CHARS, each with the number of units since the last that held none."""
    texts: list[str] = []
    chars = empty = 0
    for unit in units:
        held = False
        for text in documents(unit, text_key):
            held = True
            texts.append(text)
            chars += len(text)
            if chars >= CHUNK_CHARS:
                yield texts, empty
                texts, chars, empty = [], 0, 0
        empty += not held
    yield texts, empty


@functools.lru_cache(maxsize=1)
def _tokenizer(path: str, eod: str) -> Tokenizer:
    """Loaded once a process for the tasks of a job, each of which has one CPU and so starts no threads."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return Tokenizer(path, eod)


def _task(batch: dict[str, Any], job: Job) -> dict[str, Any]:
    """The Ray Data function: one row in, one row of facts out. An expected error is a row too, so it keeps its text."""
    group = int(batch["group"][0])
    units = [Unit(*values) for values in json.loads(batch["units"][0])]
    counts = np.zeros(0, np.int64)
    try:
        facts, counts = tokenize_group(group, units, job)
    except RaytronError as error:
        facts = {"group": group, "error": str(error)}
    return {"facts": [json.dumps(facts)], "counts": [counts.tobytes()]}


def _run(groups: Sequence[Sequence[Unit]], job: Job) -> Iterator[Mapping[str, Any]]:
    """Rows of facts as tasks end, in any order."""
    from ray import data as ray_data  # takes most of a second: only where text is really tokenized

    items = [{"group": n, "units": json.dumps([astuple(unit) for unit in group])} for n, group in enumerate(groups)]
    with _quiet(ray_data.DataContext.get_current()):
        rows = ray_data.from_items(items, override_num_blocks=len(items))
        rows = rows.map_batches(_task, batch_size=1, num_cpus=1, zero_copy_batch=True, fn_kwargs={"job": job})
        yield from rows.iter_rows()


@contextmanager
def _quiet(context: Any) -> Iterator[None]:
    """Keeps Ray Data's progress bars and logging off the console; its log files stay."""
    keys = ("enable_progress_bars", "print_on_execution_start")
    kept = {key: getattr(context, key) for key in keys if hasattr(context, key)}
    logger = logging.getLogger("ray.data")
    consoles = [handler for handler in logger.handlers if "File" not in type(handler).__name__]
    levels = [handler.level for handler in consoles]
    for key in kept:
        setattr(context, key, False)
    for handler in consoles:
        handler.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for key, value in kept.items():
            setattr(context, key, value)
        for handler, level in zip(consoles, levels, strict=True):
            handler.setLevel(level)


def require_ray() -> None:
    """Raises ClusterError where Ray is not initialised."""
    if not ray.is_initialized():
        raise ClusterError("Ray is not initialised\n    remedy: call ray.init() before a data set is prepared")


def _wait_for_cpu() -> None:
    """Tasks need a CPU that no actor holds: says so rather than wait without end."""
    require_ray()
    deadline = time.monotonic() + WAIT_FOR_CPU_S
    while ray.available_resources().get("CPU", 0.0) < 1.0:
        if time.monotonic() > deadline:
            total = ray.cluster_resources().get("CPU", 0.0)
            what = f"none of the cluster's {total:g} CPUs was free for {WAIT_FOR_CPU_S:g} s"
            raise ClusterError(str(Problem("tokenization", what, "stop other work, or add a node")))
        time.sleep(0.1)


def _group_bytes(corpus_bytes: int, shard_bytes: int) -> int:
    """Text of one task: much of a corpus gives full shards (a token is 2 bytes for about 4 of text), little many tasks."""
    return min(max(corpus_bytes // GROUPS, SMALLEST_GROUP_BYTES), max(2 * shard_bytes, SMALLEST_GROUP_BYTES))


def _collect(rows: Sequence[Mapping[str, Any]], vocab: int) -> Tokenized:
    """The facts of all groups, in the order of the corpus, as one."""
    counts = np.zeros(vocab, np.int64)
    for row in rows:
        counts += row["counts"]
    return Tokenized(
        parts=tuple(Part(*values) for row in rows for values in row["parts"]),
        counts=counts,
        corpus_xxh3_128=xxhash.xxh3_128_hexdigest("".join(row["digest"] for row in rows).encode()),
        skipped=sum(row["skipped"] for row in rows),
    )
