"""Files of a checkpoint: their names, digests and JSON, wherever they are stored.

A name that comes out of metadata is data from outside: it must be one plain component, and what it names must be a
regular file (no link, pipe or device), so that nothing outside the generation's directory is ever read.

Digests are xxh3-128: they find every accident (a flipped bit, a zeroed page, another step's file); they are no proof
against somebody who forges a file and its digest, which is why metadata is also checked for sense.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import xxhash

from raytron.checkpoint.local_storage import LocalStorage
from raytron.checkpoint.object_store import object_store
from raytron.checkpoint.storage import Source, Storage, scheme_of
from raytron.errors import CheckpointError

BLOCK = 4 << 20  # bytes digested and written at a time
LARGEST_DOCUMENT = 8 << 30  # bytes of a JSON document that is read
PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}")
LOCAL = LocalStorage()


def storage_of(path: Path) -> Storage:
    """Who holds a place. Raises CheckpointError where nothing here speaks its protocol."""
    scheme = scheme_of(path)
    return LOCAL if scheme is None else object_store(scheme)


def digest_bytes(data: bytes) -> str:
    """xxh3-128 of some bytes, 32 hexadecimal digits."""
    return str(xxhash.xxh3_128_hexdigest(data))


class Digest:
    """xxh3-128 and the length of what has passed through. A block goes on while it is still in the processor's cache."""

    def __init__(self) -> None:
        self._hash, self.size = xxhash.xxh3_128(), 0

    def through(self, blocks: Iterable[memoryview]) -> Iterator[memoryview]:
        for block in blocks:
            for start in range(0, len(block), BLOCK):
                part = block[start : start + BLOCK]
                self._hash.update(part)
                self.size += len(part)
                yield part

    @property
    def text(self) -> str:
        """32 hexadecimal digits."""
        return str(self._hash.hexdigest())


def is_plain_name(name: object) -> bool:
    """Whether a name is one harmless path component."""
    return isinstance(name, str) and PLAIN.fullmatch(name) is not None


def opened(path: Path) -> AbstractContextManager[Source]:
    """A regular file to be read. Raises CheckpointError, also for links, pipes and read errors inside."""
    return storage_of(path).opened(path)


def read_file(path: Path, most: int = LARGEST_DOCUMENT) -> bytes:
    """A small file's bytes. Raises CheckpointError, also where it has more than `most` bytes."""
    with opened(path) as source:
        if source.size > min(most, LARGEST_DOCUMENT):
            raise CheckpointError(f"{path}: damaged: it has {source.size} bytes, more than are expected")
        data = bytearray(source.size)
        source.read_into(memoryview(data), 0)
        return bytes(data)


def check_file(path: Path, size: int, digest: str | None = None) -> None:
    """Compare a file with its size in bytes and, if given, its digest. Raises CheckpointError naming the file."""
    with opened(path) as source:
        check_size(path, source, size)
        if digest is None:
            return
        found = digest_of(source)
    if found != digest:
        raise CheckpointError(f"{path}: damaged: its digest is {found}, not {digest} as committed")


def check_size(path: Path, source: Source, size: int) -> None:
    """Raise CheckpointError unless an open file has `size` bytes."""
    if source.size != size:
        raise CheckpointError(f"{path}: damaged: it has {source.size} bytes, not {size} as committed")


def digest_of(source: Source) -> str:
    """The digest of all bytes of an open file. Raises OSError."""
    hasher, size = xxhash.xxh3_128(), source.size
    buffer = memoryview(bytearray(min(source.span, size)))
    for start in range(0, size, source.span):
        part = buffer[: size - start]
        source.read_into(part, start)
        hasher.update(part)
    return str(hasher.hexdigest())


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
