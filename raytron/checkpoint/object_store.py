"""Checkpoints in an object store, through fsspec.

A store has no folders, links or fsync: an object appears whole when its upload ends, and is durable then. What must appear
once is put under the condition that it is not there (`If-None-Match: *` on S3); where a store does not know conditions it is
simply put, which only two runs in one place would notice. Rectangles are read by byte ranges.

Credentials and endpoints come from where the protocol's client looks for them, such as AWS_PROFILE and AWS_ENDPOINT_URL.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import fsspec

from raytron.checkpoint.storage import Source, key_of, scheme_of, url_of
from raytron.errors import CheckpointError

CLIENTS = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}


class _Object:
    """An object that is open to be read."""

    span = 32 << 20
    gap = 4 << 20

    def __init__(self, files: Any, path: Path, size: int):
        self.files, self.path, self.size = files, path, size

    def read_into(self, view: memoryview, start: int) -> None:
        while len(view):
            with _told(self.path):
                data = self.files.cat_file(key_of(self.path), start=start, end=start + min(len(view), self.span))
            if not data:
                raise OSError(errno.EIO, "the object ends too early")
            view[: len(data)] = data
            view, start = view[len(data) :], start + len(data)


class ObjectStore:
    """The objects of one protocol. files: an fsspec file system."""

    def __init__(self, files: Any):
        self.files = files

    def exists(self, path: Path) -> bool:
        with _told(path):
            return bool(self.files.exists(key_of(path)))

    def is_folder(self, path: Path) -> bool:
        with _told(path):
            return bool(self.files.isdir(key_of(path)))

    def folders(self, path: Path) -> list[Path]:
        return sorted(path / name for name, entry in self._list(path).items() if entry["type"] == "directory")

    def sizes(self, folder: Path) -> dict[str, int]:
        return {name: int(entry["size"] or 0) for name, entry in self._list(folder).items()}

    def last_change(self, folder: Path) -> float:
        times = []
        for name in self._list(folder):
            try:
                times.append(self.files.modified(key_of(folder / name)).timestamp())
            except Exception:  # it has gone, or the store does not tell
                return time.time()
        return max(times, default=0.0)

    def _list(self, folder: Path) -> dict[str, Any]:
        key = key_of(folder).rstrip("/")
        with _told(folder):
            try:
                entries = self.files.ls(key, detail=True)
            except FileNotFoundError:
                return {}
        names = ((entry["name"].rstrip("/").rpartition("/"), entry) for entry in entries)
        return {name: entry for (above, _, name), entry in names if name and above.strip("/") == key.strip("/")}

    @contextlib.contextmanager
    def opened(self, path: Path) -> Iterator[Source]:
        try:
            with _told(path):
                entry = self.files.info(key_of(path))
            if entry["type"] != "file":
                raise CheckpointError(f"{url_of(path)}: not an object")
            yield _Object(self.files, path, int(entry["size"]))
        except OSError as error:
            reason = error.strerror or ("no such object" if isinstance(error, FileNotFoundError) else str(error))
            raise CheckpointError(f"{url_of(path)}: can't be read: {reason}") from error

    def make_folder(self, path: Path) -> None:
        """Nothing to make: a folder is there when something is in it."""

    def write(self, path: Path, blocks: Iterable[memoryview]) -> None:
        if self.exists(path):
            raise FileExistsError(errno.EEXIST, "the object exists", url_of(path))
        with _told(path), self.files.open(key_of(path), "wb") as stream:
            for block in blocks:
                stream.write(block)

    def publish(self, path: Path, data: bytes, *, replace: bool = False) -> None:
        key = key_of(path)
        with _told(path):
            if replace:
                self.files.pipe_file(key, data)
                return
            try:
                self.files.pipe_file(key, data, mode="create")
            except FileExistsError:
                if self.files.cat_file(key) != data:  # else an attempt had succeeded whose answer was lost
                    raise
            except (TypeError, NotImplementedError):
                self.files.pipe_file(key, data)

    def sync(self, folder: Path) -> None:
        """Nothing to do: an object that was put is durable."""

    def rename(self, path: Path, name: str) -> None:
        with _told(path):
            self.files.copy(key_of(path), key_of(path.with_name(name)))
            self.files.rm_file(key_of(path))

    def remove(self, path: Path) -> None:
        with contextlib.suppress(Exception):
            self.files.rm(key_of(path), recursive=True)


@functools.cache
def object_store(scheme: str) -> ObjectStore:
    """The store of a protocol. Raises CheckpointError where its client is not installed."""
    kind: dict[str, Any] = {"auto_mkdir": True} if scheme == "file" else {}
    try:
        return ObjectStore(fsspec.filesystem(scheme, use_listings_cache=False, **kind))
    except (ImportError, ValueError) as error:
        client = CLIENTS.get(scheme, f"fsspec's client of {scheme}")
        raise CheckpointError(f"{scheme}:// can't be used: {error}; install {client}") from error


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Whatever a client raises as an OSError that names the place."""
    try:
        yield
    except OSError:
        raise
    except (TypeError, NotImplementedError):
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        raise OSError(errno.EIO, text, url_of(path) if scheme_of(path) else str(path)) from error
