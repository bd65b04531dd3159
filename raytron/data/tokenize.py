"""Tokenization on every core of a Ray cluster, by Ray Data.

    units ─► groups ─► from_items ─► map_batches: one task a group ─► a row of facts ─► the driver
                                     reads, encodes, writes parts     (no text, no tokens)

Only descriptions travel: a task reads its own files and writes its own tokens, so nothing large passes through the
object store or the driver. Which group a unit belongs to depends on the corpus and the configuration alone, so the data
set is the same, byte for byte, for any number of workers. Tasks are stateless and hold a CPU only while they run, no
actor pool is kept: a pool that takes every CPU of a cluster can starve the stages before it.

What a task does stands in `raytron.data.task`; one that an attempt before this one has done is not done again.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import ray
import xxhash
from numpy.typing import NDArray

from raytron.data.corpus import Corpus
from raytron.data.fast import FAST
from raytron.data.parts import Done, Part
from raytron.data.records import SHOWN_BAD, Unit
from raytron.data.task import Job, tokenize_group
from raytron.errors import ClusterError, DataError, Problem, RaytronError

Report = Callable[[float, str], None]  # (share that is done, in [0, 1]; a line for a human)
Task = Callable[..., dict[str, Any]]  # of Ray Data's map_batches

GROUPS = 32  # tasks that a corpus is cut in, within the limits of a group's size
SMALLEST_GROUP_BYTES = 2**20
WAIT_FOR_CPU_S = 10.0
MIB = 2**20


@dataclass(frozen=True)
class Tokenized:
    parts: tuple[Part, ...]
    counts: NDArray[np.int64]  # (vocab,) of each id in the training parts
    corpus_xxh3_128: str
    skipped: int  # files, or parts of files, without a document
    bad: int  # records that were skipped
    bad_examples: tuple[str, ...]
    backend: str  # the libraries that encoded


def tokenize_corpus(corpus: Corpus, job: Job, vocab: int, shard_bytes: int, report: Report) -> Tokenized:
    """Tokenizes a corpus into parts under `job.folder`. Ray must be initialised.

    Raises DataError for text that can't be read, ClusterError where Ray is not initialised or no CPU is free.
    """
    groups = group_units(corpus.units, _group_bytes(corpus.bytes, shard_bytes))
    progress = _Progress(corpus.bytes, [sum(unit.bytes for unit in group) for group in groups], report)
    dones: dict[int, Done] = {}
    counts = np.zeros(vocab, np.int64)
    for row in over_cluster(_task, groups, job=job):
        facts = json.loads(row["facts"])
        if "error" in facts:
            raise DataError(facts["error"])
        done = Done.of(facts)
        dones[done.group] = done
        counts += np.frombuffer(row["counts"], np.int64)
        progress.tell(done)
    return _collect([dones[number] for number in range(len(groups))], counts)


class _Progress:
    """Tells how far it is, how fast, and how long it will take; what was found done counts for no speed."""

    def __init__(self, total: int, sizes: Sequence[int], report: Report):
        self.total, self.sizes, self.report = total, sizes, report
        self.done = self.fresh = self.tokens = self.kept = 0
        self.backend = ""
        self.started = time.monotonic()

    def tell(self, done: Done) -> None:
        size = self.sizes[done.group]
        self.done += size
        share = self.done / self.total
        if done.kept:
            self.kept += 1
            self.report(share, f"tokenized before: {self.kept} of {len(self.sizes)} tasks")
            return
        self.fresh, self.tokens = self.fresh + size, self.tokens + done.tokens
        if done.backend != self.backend:
            self.backend = done.backend
            why = f": {FAST} is not used, {done.reason}" if done.reason else ""
            self.report(share, f"encoding with {done.backend}{why}")
        took_s = max(time.monotonic() - self.started, 1e-6)
        left = timedelta(seconds=round((self.total - self.done) * took_s / self.fresh))
        speed = f"{self.fresh / MIB / took_s:.1f} MiB/s, {self.tokens / took_s:,.0f} tokens/s, {left} left"
        self.report(share, f"tokenized {self.done / MIB:.1f} of {self.total / MIB:.1f} MiB, {speed}")


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


def _task(batch: dict[str, Any], job: Job) -> dict[str, Any]:
    """The Ray Data function: one row in, one row of facts out. An expected error is a row too, so it keeps its text."""
    group = int(batch["group"][0])
    units = units_of(batch)
    counts = np.zeros(0, np.int64)
    try:
        done, counts = tokenize_group(group, units, job)
        facts = asdict(done)
    except RaytronError as error:
        facts = {"error": str(error)}
    return {"facts": [json.dumps(facts)], "counts": [counts.tobytes()]}


def over_cluster(task: Task, groups: Sequence[Sequence[Unit]], **arguments: Any) -> Iterator[Mapping[str, Any]]:
    """The rows that a task gives for groups of units, as tasks end, in any order. Raises ClusterError where Ray is not
    initialised or no CPU is free.

    task: of a batch of one row, the number of its group and its units in JSON (`units_of`), and of the arguments.
    """
    from ray import data as ray_data  # takes most of a second: only where text is really read

    _wait_for_cpu()
    items = [{"group": n, "units": json.dumps([astuple(unit) for unit in group])} for n, group in enumerate(groups)]
    with _quiet(ray_data.DataContext.get_current()):
        rows = ray_data.from_items(items, override_num_blocks=len(items))
        rows = rows.map_batches(task, batch_size=1, num_cpus=1, zero_copy_batch=True, fn_kwargs=arguments)
        yield from rows.iter_rows()


def units_of(batch: Mapping[str, Any]) -> list[Unit]:
    """The units of a task's row."""
    return [Unit(*values) for values in json.loads(batch["units"][0])]


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


def _collect(dones: Sequence[Done], counts: NDArray[np.int64]) -> Tokenized:
    """What all tasks did, in the order of the corpus, as one."""
    examples = [example for done in dones for example in done.bad_examples]
    return Tokenized(
        parts=tuple(part for done in dones for part in done.parts),
        counts=counts,
        corpus_xxh3_128=xxhash.xxh3_128_hexdigest("".join(done.digest for done in dones).encode()),
        skipped=sum(done.skipped for done in dones),
        bad=sum(done.bad for done in dones),
        bad_examples=tuple(examples[:SHOWN_BAD]),
        backend=", ".join(sorted({done.backend for done in dones if done.documents})),
    )
