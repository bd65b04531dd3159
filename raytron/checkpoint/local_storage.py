"""Checkpoints in a file system, local or shared: files are fsynced, renamed into place, and reached without a link."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from raytron.checkpoint.storage import Source
from raytron.errors import CheckpointError


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor of a regular file, to read it. Raises CheckpointError, also for links, pipes and OSErrors inside."""
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


class Descriptor:
    """A local file that is open to be read."""

    span = 4 << 20  # as much as a processor's cache holds
    gap = 32 << 10

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    @property
    def size(self) -> int:
        return os.fstat(self.descriptor).st_size

    def read_into(self, view: memoryview, start: int) -> None:
        while len(view):
            count = os.preadv(self.descriptor, [view[: 1 << 30]], start)
            if count == 0:
                raise OSError(errno.EIO, "the file ends too early")
            view, start = view[count:], start + count


class LocalStorage:
    """A file system. What is read must be a regular file, reached without a link."""

    def exists(self, path: Path) -> bool:
        return os.path.lexists(path)

    def is_folder(self, path: Path) -> bool:
        return path.is_dir()

    def folders(self, path: Path) -> list[Path]:
        try:
            entries = sorted(path.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [entry for entry in entries if entry.is_dir() and not entry.is_symlink()]

    def sizes(self, folder: Path) -> dict[str, int]:
        return {entry.name: entry.lstat().st_size for entry in folder.iterdir()}

    def last_change(self, folder: Path) -> float:
        return max(entry.stat().st_mtime for entry in (folder, *folder.iterdir()))

    @contextlib.contextmanager
    def opened(self, path: Path) -> Iterator[Source]:
        with opened(path) as descriptor:
            yield Descriptor(descriptor)

    def make_folder(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir()

    def write(self, path: Path, blocks: Iterable[memoryview]) -> None:
        with open(path, "xb", buffering=1 << 20) as stream:
            for block in blocks:
                stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())

    def publish(self, path: Path, data: bytes, *, replace: bool = False) -> None:
        if not replace and os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, "File exists", str(path))
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        self.write(temporary, [memoryview(data)])
        os.rename(temporary, path)
        self.sync(path.parent)

    def sync(self, folder: Path) -> None:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, path: Path, name: str) -> None:
        os.rename(path, path.with_name(name))

    def remove(self, path: Path) -> None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()
