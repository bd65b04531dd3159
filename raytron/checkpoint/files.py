"""Files of a checkpoint: opened without following links, measured, digested, and published in one stroke.

A name that comes out of metadata is data from outside: it must be one plain component, and what it names must be a
regular file (no link, pipe or device), so that nothing outside the generation's directory is ever read.

Digests are xxh3-128: they find every accident (a flipped bit, a zeroed page, another step's file); they are no proof
against somebody who forges a file and its digest, which is why metadata is also checked for sense.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from raytron.errors import CheckpointError

BLOCK = 4 << 20  # bytes read at a time
PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}")


def digest_bytes(data: bytes) -> str:
    """xxh3-128 of some bytes, 32 hexadecimal digits."""
    return str(xxhash.xxh3_128_hexdigest(data))


def is_plain_name(name: object) -> bool:
    """Whether a name is one harmless path component."""
    return isinstance(name, str) and PLAIN.fullmatch(name) is not None


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor to read a regular file. Raises CheckpointError, also for links, pipes and read errors inside."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be opened: {error.strerror}") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        yield descriptor
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror}") from error
    finally:
        os.close(descriptor)


def read_file(path: Path) -> bytes:
    """A small file's bytes. Raises CheckpointError."""
    with opened(path) as descriptor, open(descriptor, "rb", closefd=False) as stream:
        return stream.read()


def check_file(path: Path, size: int, digest: str | None = None) -> None:
    """Compare a file with its size in bytes and, if given, its digest. Raises CheckpointError naming the file."""
    with opened(path) as descriptor:
        check_size(path, descriptor, size)
        if digest is None:
            return
        hasher, block = xxhash.xxh3_128(), memoryview(bytearray(BLOCK))
        while count := os.readv(descriptor, [block]):
            hasher.update(block[:count])
    if hasher.hexdigest() != digest:
        raise CheckpointError(f"{path}: damaged: its digest is {hasher.hexdigest()}, not {digest} as committed")


def check_size(path: Path, descriptor: int, size: int) -> None:
    """Raise CheckpointError unless an open file has `size` bytes."""
    actual = os.fstat(descriptor).st_size
    if actual != size:
        raise CheckpointError(f"{path}: damaged: it has {actual} bytes, not {size} as committed")


def write_durably(path: Path, data: bytes) -> None:
    """Write a new file and fsync it. Raises OSError, also where the file exists."""
    with open(path, "xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def publish(path: Path, data: bytes) -> None:
    """Let `path` appear whole or not at all, durably: a temporary file, fsync, rename, fsync of the directory."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    write_durably(temporary, data)
    os.rename(temporary, path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the entries of a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_json(value: Any) -> bytes:
    """Canonical JSON: the same value gives the same bytes. Raises ValueError or TypeError for what is not JSON."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def from_json(path: Path, data: bytes) -> dict[str, Any]:
    """The JSON object in some bytes. Raises CheckpointError naming `path`."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: damaged: not a JSON object")
    return value
