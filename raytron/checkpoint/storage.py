"""Where the files of checkpoints live: in a file system that all ranks share, or in an object store.

    /runs/a/checkpoints              a file system: fsync, rename, no link followed
    s3://bucket/runs/a/checkpoints   an object store, through fsspec: s3 (s3fs), gs (gcsfs), az (adlfs), memory, ...

A place is a `Path` in both cases, and its first part tells which: Path("s3://bucket/a") is `s3:/bucket/a`, whose parts,
name and parent mean what they should, and which no file system is ever asked for. `files.storage_of` finds the one that
holds it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

SCHEME = re.compile(r"([a-z][a-z0-9+.-]+):")  # two letters at least: one is a drive


class Source(Protocol):
    """A file that is open to be read. span: bytes that are worth one request; gap: that cost less to read than to leap."""

    span: int
    gap: int

    @property
    def size(self) -> int:
        """Of the file, in bytes."""

    def read_into(self, view: memoryview, start: int) -> None:
        """Fills `view` with the bytes from `start` on. Raises OSError, also at the end of the file."""


class Storage(Protocol):
    """What a checkpoint needs of a place. Methods raise OSError; `opened` raises CheckpointError, which names the file."""

    def exists(self, path: Path) -> bool:
        """Whether anything has this name."""

    def is_folder(self, path: Path) -> bool: ...

    def folders(self, path: Path) -> list[Path]:
        """The folders inside one, by name; none where it is missing. Links are left out."""

    def sizes(self, folder: Path) -> dict[str, int]:
        """Bytes of everything inside a folder, by name."""

    def last_change(self, folder: Path) -> float:
        """When anything in a folder was written last, in seconds since the epoch."""

    def opened(self, path: Path) -> AbstractContextManager[Source]:
        """A regular file to be read. OSErrors inside become CheckpointErrors."""

    def make_folder(self, path: Path) -> None:
        """A new folder. Raises FileExistsError."""

    def write(self, path: Path, blocks: Iterable[memoryview]) -> None:
        """A new file of these blocks, durably; never one that exists."""

    def publish(self, path: Path, data: bytes, *, replace: bool = False) -> None:
        """A file that appears whole or not at all, durably. Raises FileExistsError where it is there and may not be
        replaced, if the storage can tell at that moment."""

    def sync(self, folder: Path) -> None:
        """Makes the names in a folder durable."""

    def rename(self, path: Path, name: str) -> None:
        """Gives a file another name in its folder."""

    def remove(self, path: Path) -> None:
        """Removes a file, or a folder with all that is in it, as far as that is possible; no error."""


def scheme_of(path: Path | str) -> str | None:
    """The protocol of an object store's place: "s3" for s3://bucket/a; None for a file system's."""
    parts = Path(path).parts
    match = SCHEME.fullmatch(parts[0]) if parts else None
    return None if match is None else match[1]


def url_of(path: Path | str) -> str:
    """A place as people write it."""
    scheme = scheme_of(path)
    return str(path) if scheme is None else f"{scheme}://{key_of(path)}"


def key_of(path: Path | str) -> str:
    """What an object store calls a place: "bucket/a" for s3://bucket/a; "/a" for file:///a."""
    scheme, parts = scheme_of(path), Path(path).parts
    return ("/" if scheme == "file" else "") + "/".join(parts[1:])
