"""Generations on disk: which are committed, which are good, which are leftovers.

    checkpoints/
      step-00000120-5f1c09ab/       a generation: its own directory, never written again once committed
        rank00000-000.safetensors     shards
        metadata.json                 which rectangle of which tensor stands where; size and digest of each shard
        COMMIT                        written last: step, facts, size and digest of metadata.json
      step-00000140-77e0d2c4/
        WRITING                       no COMMIT: being written, or what a fault left behind

A directory without COMMIT is not a checkpoint, whatever else it holds. A generation is *good* if COMMIT,
metadata.json and every shard verify by size and digest.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from raytron.checkpoint import owner
from raytron.checkpoint.files import (
    check_file,
    digest_bytes,
    publish,
    read_file,
    sync_directory,
    to_json,
    write_durably,
)
from raytron.checkpoint.record import (
    COMMIT,
    METADATA,
    Commit,
    FileRecord,
    Records,
    dump_commit,
    dump_records,
    parse_commit,
    parse_records,
)
from raytron.errors import CheckpointError

DIRECTORY = re.compile(r"step-(\d{8,18})-[0-9a-z]+")
Report = Callable[[Path, CheckpointError], None]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generation:
    """A committed generation. time: when it was committed, in seconds since the epoch; ranks: how many wrote it."""

    path: Path
    step: int
    time: float
    ranks: int
    facts: dict[str, Any]
    metadata: FileRecord

    @cached_property
    def records(self) -> Records:
        """Its files and tensors, from metadata.json. Raises CheckpointError if that is missing or damaged."""
        path = self.path / METADATA
        data = read_file(path)
        if len(data) != self.metadata.size or digest_bytes(data) != self.metadata.digest:
            raise CheckpointError(f"{path}: damaged: its {len(data)} bytes are not those that were committed")
        return parse_records(path, data)

    def __str__(self) -> str:
        return f"step {self.step} ({self.path.name})"


# ---- reading


def open_generation(path: Path | str) -> Generation:
    """The committed generation in a directory. Raises CheckpointError where there is none, or COMMIT is damaged."""
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory")
    if not os.path.lexists(path / COMMIT):
        raise CheckpointError(f"{path}: not committed: it has no {COMMIT} file")
    commit = parse_commit(path / COMMIT, read_file(path / COMMIT))
    return Generation(path, commit.step, commit.time, commit.ranks, commit.facts, commit.metadata)


def committed(directory: Path | str, report: Report | None = None) -> list[Generation]:
    """Generations with a readable COMMIT, newest first: by step, then time.

    Those whose COMMIT is unreadable go to `report` (default: the log).
    """
    found = []
    for path in _directories(directory):
        if not os.path.lexists(path / COMMIT):
            continue
        try:
            found.append(open_generation(path))
        except CheckpointError as error:
            (report or _warn)(path, error)
    return sorted(found, key=lambda generation: (generation.step, generation.time, generation.path.name), reverse=True)


def verify(generation: Generation, *, digests: bool = True) -> Records:
    """Check metadata.json and every shard by size and, unless told otherwise, digest.

    Raises CheckpointError that names every damaged file. Reads all bytes, with a few threads.
    """
    files = generation.records.files.values()
    with ThreadPoolExecutor(max_workers=4) as pool:
        problems = [problem for problem in pool.map(lambda file: _problem(generation, file, digests), files) if problem]
    if problems:
        raise CheckpointError("\n".join(problems))
    return generation.records


def _problem(generation: Generation, file: FileRecord, digests: bool) -> str | None:
    try:
        check_file(generation.path / file.name, file.size, file.digest if digests else None)
    except CheckpointError as error:
        return str(error)
    return None


def newest_good(directory: Path | str, report: Report | None = None, *, digests: bool = True) -> Generation | None:
    """The newest generation that verifies; None if there is none.

    Each one passed over is told to `report` (default: the log) with its reason, newest first; those whose COMMIT is
    unreadable come before all others. One process reads every byte of the candidates, so call it on one rank.
    """
    for generation in committed(directory, report):
        try:
            verify(generation, digests=digests)
            return generation
        except CheckpointError as error:
            (report or _warn)(generation.path, error)
    return None


def find(path: Path | str) -> Generation:
    """The generation meant by a path: itself, or the newest committed one of a checkpoints folder or run directory.

    Raises CheckpointError.
    """
    path = Path(path)
    if os.path.lexists(path / COMMIT):
        return open_generation(path)
    for directory in (path, path / "checkpoints"):
        generations = committed(directory)
        if generations:
            return generations[0]
    raise CheckpointError(f"{path}: no committed checkpoint here, in a folder of checkpoints or in a run directory")


# ---- writing


def create(directory: Path | str, step: int) -> Path:
    """A new, empty generation directory that this process owns. Raises OSError."""
    path = Path(directory) / f"step-{step:08d}-{secrets.token_hex(4)}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir()
    owner.claim(path)
    return path


def check_facts(facts: dict[str, Any]) -> None:
    """Raise CheckpointError unless facts are a JSON object."""
    try:
        if not isinstance(facts, dict):
            raise TypeError(f"a dict is wanted, not {type(facts).__name__}")
        to_json(facts)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"the facts of a checkpoint must be JSON: {error}") from error


def commit(path: Path, step: int, ranks: int, facts: dict[str, Any], records: Records) -> Generation:
    """Make a generation count: write metadata.json, then COMMIT, each durably. Raises OSError or CheckpointError."""
    check_facts(facts)
    data = dump_records(records)
    write_durably(path / METADATA, data)
    sync_directory(path)
    sync_directory(path.parent)
    metadata = FileRecord(METADATA, len(data), digest_bytes(data))
    record = Commit(step, time.time(), ranks, facts, metadata)
    publish(path / COMMIT, dump_commit(record))
    owner.release(path)
    return Generation(path, step, record.time, ranks, facts, metadata)


def abandon(path: Path) -> None:
    """Make sure that a generation never counts, whatever state its save was left in; a later `prune` removes it."""
    marker = path / owner.ABANDONED
    try:
        if os.path.lexists(path / COMMIT):
            os.rename(path / COMMIT, marker)
        elif path.is_dir():
            marker.touch()
    except OSError as error:
        log.warning("%s: can't be marked as abandoned: %s", path, error.strerror)


def remove(path: Path) -> bool:
    """Remove a generation's directory: first it stops to count, then its files go. True if nothing of it is left."""
    abandon(path)
    shutil.rmtree(path, ignore_errors=True)
    gone = not path.exists()
    if not gone:
        log.warning("%s: can't be removed; it does not count any more", path)
    return gone


# ---- retention


def prune(
    directory: Path | str, keep_last: int | None, *, digests: bool = True, abandoned_after_s: float = 86400.0
) -> list[Path]:
    """Remove generations beyond the newest `keep_last` (None: keep all), and leftovers that no writer can own.

    The newest good generation always stays: if none of the newest `keep_last` verifies, the search goes on below them
    and stops at the first that does. `digests=False` judges by sizes alone, which reads no shard. Call it on one rank.
    Returns the directories that are gone.
    """
    if keep_last is not None and keep_last < 1:
        raise ValueError(f"keep_last is {keep_last}: at least one generation has to be kept")
    unreadable: list[Path] = []
    generations = committed(directory, lambda path, _error: unreadable.append(path))
    leftovers = [
        path
        for path in _directories(directory)
        if not os.path.lexists(path / COMMIT) and owner.is_ownerless(path, abandoned_after_s)
    ]
    old = _beyond(generations, unreadable, keep_last, digests) if keep_last is not None else []
    return [path for path in (*old, *leftovers) if remove(path)]


def _beyond(generations: list[Generation], unreadable: list[Path], keep_last: int, digests: bool) -> list[Path]:
    """What retention lets go: all that is older than the newest `keep_last` and than the newest good one."""
    beyond = len(generations) > keep_last
    good = _first_good(generations, digests) if beyond else None
    if beyond and good is None:
        return []
    kept = generations[: max(keep_last, (good or 0) + 1)]
    gone = [generation.path for generation in generations[len(kept) :]]
    return gone + [path for path in unreadable if len(kept) >= keep_last and _step(path) < kept[-1].step]


def _first_good(generations: list[Generation], digests: bool) -> int | None:
    for index, generation in enumerate(generations):
        try:
            verify(generation, digests=digests)
            return index
        except CheckpointError as error:
            _warn(generation.path, error)
    return None


def _directories(directory: Path | str) -> Iterable[Path]:
    """Directories named like generations; links are not followed."""
    try:
        entries = sorted(Path(directory).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [path for path in entries if DIRECTORY.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]


def _step(path: Path) -> int:
    match = DIRECTORY.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _warn(path: Path, error: CheckpointError) -> None:
    log.warning("checkpoint passed over: %s: %s", path.name, error)
