"""One generation: a directory of its own, written once, committed by its last file, never written again.

    step-00000120-5f1c09ab/
      rank00000-000.safetensors     shards
      metadata.json                 which rectangle of which tensor stands where; size and digest of each shard
      COMMIT                        written last: step, facts, size and digest of metadata.json
      VALIDATION                    if it was evaluated: its loss (retention keeps the best)
    step-00000140-77e0d2c4/
      WRITING                       no COMMIT: being written, or what a fault left behind

A directory without COMMIT is not a checkpoint, whatever else it holds.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from raytron.checkpoint import owner
from raytron.checkpoint.files import digest_bytes, read_file, storage_of, to_json
from raytron.checkpoint.record import (
    COMMIT,
    METADATA,
    VALIDATION,
    Commit,
    FileRecord,
    Records,
    dump_commit,
    dump_loss,
    dump_records,
    parse_commit,
    parse_loss,
    parse_records,
)
from raytron.errors import CheckpointError

DIRECTORY = re.compile(r"step-(\d{8,18})-[0-9a-z]+")
SMALL = 64 << 20  # bytes of a COMMIT or VALIDATION file, at most
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
        data = read_file(path, self.metadata.size)
        if len(data) != self.metadata.size or digest_bytes(data) != self.metadata.digest:
            raise CheckpointError(f"{path}: damaged: its {len(data)} bytes are not those that were committed")
        return parse_records(path, data)

    @cached_property
    def validation_loss(self) -> float | None:
        """In nats; None where it was not evaluated. Raises CheckpointError where the note of it is damaged."""
        path = self.path / VALIDATION
        return parse_loss(path, read_file(path, SMALL)) if storage_of(path).exists(path) else None

    def __str__(self) -> str:
        return f"step {self.step} ({self.path.name})"


def open_generation(path: Path | str) -> Generation:
    """The committed generation in a directory. Raises CheckpointError where there is none, or COMMIT is damaged."""
    path = Path(path)
    storage = storage_of(path)
    if not storage.is_folder(path):
        raise CheckpointError(f"{path}: no such directory")
    if not storage.exists(path / COMMIT):
        raise CheckpointError(f"{path}: not committed: it has no {COMMIT} file")
    commit = parse_commit(path / COMMIT, read_file(path / COMMIT, SMALL))
    return Generation(path, commit.step, commit.time, commit.ranks, commit.facts, commit.metadata)


def is_committed(path: Path) -> bool:
    """Whether a directory has a COMMIT file, be it readable or not."""
    return storage_of(path).exists(path / COMMIT)


def step_of(path: Path) -> int:
    """The step that a generation's directory is named after."""
    match = DIRECTORY.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def create(directory: Path | str, step: int) -> Path:
    """A new, empty generation directory that this process owns. Raises OSError."""
    path = Path(directory) / f"step-{step:08d}-{secrets.token_hex(4)}"
    storage_of(path).make_folder(path)
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
    data, storage = dump_records(records), storage_of(path)
    storage.write(path / METADATA, [memoryview(data)])
    storage.sync(path)
    storage.sync(path.parent)
    metadata = FileRecord(METADATA, len(data), digest_bytes(data))
    record = Commit(step, time.time(), ranks, facts, metadata)
    storage.publish(path / COMMIT, dump_commit(record))
    owner.release(path)
    return Generation(path, step, record.time, ranks, facts, metadata)


def abandon(path: Path, *, even_committed: bool = True) -> None:
    """Make sure that a generation never counts, whatever state its save was left in; a later `prune` removes it.

    even_committed: else one that was committed stays.
    """
    storage = storage_of(path)
    try:
        if is_committed(path):
            if even_committed:
                storage.rename(path / COMMIT, owner.ABANDONED)
        elif storage.is_folder(path):
            storage.publish(path / owner.ABANDONED, b"", replace=True)
    except OSError as error:
        log.warning("%s: can't be marked as abandoned: %s", path, error.strerror)


def note_validation(path: Path | str, loss: float) -> bool:
    """Write down a generation's validation loss, in nats, for retention to keep the best; it may not be committed yet.
    False where it can't be written, since the generation is gone or the storage refuses: then it stays unknown."""
    path = Path(path)
    storage = storage_of(path)
    try:
        if not storage.is_folder(path):
            return False
        storage.publish(path / VALIDATION, dump_loss(loss), replace=True)
    except (OSError, ValueError) as error:
        log.warning("%s: its validation loss %s can't be noted: %s", path, loss, error)
        return False
    return True


def remove(path: Path) -> bool:
    """Remove a generation's directory: first it stops to count, then its files go. True if nothing of it is left."""
    abandon(path)
    storage = storage_of(path)
    storage.remove(path)
    gone = not storage.is_folder(path)
    if not gone:
        log.warning("%s: can't be removed; it does not count any more", path)
    return gone
