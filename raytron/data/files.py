"""Where the files of a corpus are: on this machine's disks, or wherever fsspec reaches (s3://, gs://, https://, …).

    find    the files that a name stands for: itself, all below a folder, or those that a glob matches
    opened  one of them, to be read from any place in it

A remote file is read by byte ranges, each asked for again, after ever longer waits, where the store does not answer; a
store that stays silent is named. A web server that knows no ranges gives only whole files: such a file is fetched once
into a temporary one. Credentials and endpoints come from where the protocol's client looks for them, such as AWS_PROFILE
and AWS_ENDPOINT_URL, on every node that reads.
"""

from __future__ import annotations

import functools
import glob
import io
import os
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import fsspec

from raytron.errors import DataError, Problem

WAITS_S = (0.5, 1.0, 2.0, 4.0)  # before each further attempt
RANGE_BYTES = 4 * 2**20  # of a remote file that are asked for at once
CLIENTS = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "https": "aiohttp"}
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError, ValueError)
STAMPS = ("ETag", "etag", "Last-Modified", "LastModified", "mtime", "created")  # what stores call a file's version

T = TypeVar("T")


@dataclass(frozen=True)
class File:
    path: str
    size: int  # bytes
    stamp: str  # differs when the file was changed: the time of its last change, or a store's tag


def scheme_of(path: str) -> str | None:
    """The protocol of a URL; None for a path of this machine."""
    found = re.match(r"([a-z][a-z0-9+.-]+)://", path)
    return found[1] if found else None


def is_folder(name: str) -> bool:
    """Whether a name is that of a folder. Raises DataError where a store can't be reached."""
    if scheme_of(name) is None:
        return os.path.isdir(name)
    return not name.startswith("http") and bool(_patiently(name, lambda: _files(name).isdir(name)))


def find(name: str, without: tuple[str, ...] = ()) -> list[File] | None:
    """The files of a file, a folder or a glob, sorted; None where nothing has that name.

    Of a folder, all below it, but what is hidden and what lies in folders named in `without`. Raises DataError where a
    store can't be reached.
    """
    if is_folder(name):
        found = [file for file in _below(name, without) if not _is_left_out(parts_below(name, file.path), without)]
        return sorted(found, key=lambda file: parts_below(name, file.path))
    if exists(name):
        return [_file(name)]
    return sorted(_matching(name), key=lambda file: file.path) if glob.has_magic(name) else None


def exists(name: str) -> bool:
    """Whether there is such a file. Raises DataError where a store can't be reached."""
    if scheme_of(name) is None:
        return os.path.exists(name)
    try:
        _info(name)
        return True
    except FileNotFoundError:
        return False


def opened(path: str) -> IO[bytes]:
    """A file, open to be read from any place. Raises OSError where it is not there, DataError where its store is silent."""
    if scheme_of(path) is None:
        return open(path, "rb")
    facts = _info(path)
    if path.startswith("http") and not _knows_ranges(path, _stamp(facts)):
        return open(_fetched(path, _stamp(facts)).name, "rb")
    return io.BufferedReader(_Ranges(path, int(facts["size"])), RANGE_BYTES)


class Range(NamedTuple):
    """Bytes [start, stop) of a remote file."""

    url: str
    start: int
    stop: int


def read_ranges(ranges: Sequence[Range]) -> list[bytes]:
    """The bytes of ranges of files of one store, all asked for at once, and exactly these.

    Raises FileNotFoundError where there is no such file, DataError where the store is silent or gives other bytes.
    """
    wanted = [each for each in ranges if each.stop > each.start]
    if not wanted:
        return [b""] * len(ranges)
    url, urls = wanted[0].url, [each.url for each in wanted]
    starts, stops = [each.start for each in wanted], [each.stop for each in wanted]
    data = _patiently(url, lambda: _files(url).cat_ranges(urls, starts, stops, on_error="raise"))
    for each, found in zip(wanted, data, strict=True):
        if len(found) != each.stop - each.start:
            what = f"gave {len(found)} bytes for {each.stop - each.start} from byte {each.start} on"
            raise DataError(Problem(each.url, what, "use a store that knows byte ranges, or fetch the data set"))
    found_in_order = iter(data)
    return [next(found_in_order) if each.stop > each.start else b"" for each in ranges]


def read_file(url: str) -> bytes:
    """A whole remote file. Raises FileNotFoundError, or DataError where the store is silent."""
    data: bytes = _patiently(url, lambda: _files(url).cat_file(url))
    return data


def url_of(place: str | Path) -> str | None:
    """The URL that a place is, also where it went through a Path, which keeps one slash of two; None for a path."""
    found = re.match(r"([a-z][a-z0-9+.-]+):/+", str(place))
    return None if found is None or found[1] == "file" else f"{found[1]}://{str(place)[found.end() :]}".rstrip("/")


def parts_below(root: str, path: str) -> list[str]:
    """The names on the way from a folder down to a file."""
    if scheme_of(path) is None:
        return path[len(root) :].strip(os.sep).split(os.sep)
    return _key(path)[len(_key(root)) :].strip("/").split("/")


class _Ranges(io.RawIOBase):
    """The bytes of a remote file."""

    def __init__(self, path: str, size: int):
        self.path, self.size, self.position = path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + (0, self.position, self.size)[whence]
        return self.position

    def readinto(self, view: Any) -> int:
        start, stop = self.position, min(self.position + len(view), self.size)
        if start >= stop:
            return 0
        data = _patiently(self.path, lambda: _files(self.path).cat_file(self.path, start=start, end=stop))
        if not data:
            raise EOFError("the file ends too early")
        view[: len(data)] = data
        self.position += len(data)
        return len(data)


def _key(url: str) -> str:
    """A URL without its protocol."""
    return url.partition("://")[2].strip("/")


def _below(folder: str, without: tuple[str, ...]) -> list[File]:
    """Every file below a folder, but what lies in folders named in `without`, as far as that spares a walk."""
    if scheme_of(folder) is not None:
        return _listed(folder, lambda: _files(folder).find(folder, detail=True))
    paths = []
    for above, below, names in os.walk(folder):
        below[:] = [name for name in below if not _is_left_out([name], without)]
        paths += [os.path.join(above, name) for name in names]
    return [_file(path) for path in paths if os.path.isfile(path)]


def _matching(pattern: str) -> list[File]:
    """What a glob matches, but what is hidden."""
    if scheme_of(pattern) is None:
        return [_file(path) for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
    found = _listed(pattern, lambda: _files(pattern).glob(pattern, detail=True))
    return [file for file in found if not _is_left_out([_key(file.path).rpartition("/")[2]], ())]


def _listed(place: str, action: Callable[[], dict[str, dict[str, Any]]]) -> list[File]:
    """The files of a listing, which tells sizes and stamps too."""
    unstrip = _files(place).unstrip_protocol
    found = _patiently(place, action).items()
    return [_remote(unstrip(key), facts) for key, facts in found if facts["type"] == "file"]


def _is_left_out(parts: list[str], without: tuple[str, ...]) -> bool:
    return any(part.startswith(".") or part in without for part in parts)


def _file(path: str) -> File:
    if scheme_of(path) is not None:
        return _remote(path, _info(path))
    status = os.stat(path)
    return File(path, status.st_size, str(status.st_mtime_ns))


def _remote(path: str, facts: dict[str, Any]) -> File:
    if facts.get("size") is None:
        raise DataError(Problem(path, "its server does not tell its size", "fetch it, and give the path of the copy"))
    return File(path, int(facts["size"]), _stamp(facts))


def _info(path: str) -> dict[str, Any]:
    facts: dict[str, Any] = _patiently(path, lambda: _files(path).info(path))
    return facts


def _stamp(facts: dict[str, Any]) -> str:
    return next((str(facts[key]) for key in STAMPS if facts.get(key)), "")


@functools.cache
def _file_system(scheme: str) -> Any:
    try:
        return fsspec.filesystem(scheme, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        client = CLIENTS.get(scheme, f"fsspec's client of {scheme}")
        raise DataError(Problem(f"{scheme}://", f"can't be used: {error}", f"install {client}")) from None


def _files(path: str) -> Any:
    return _file_system(str(scheme_of(path)))


@functools.lru_cache(maxsize=64)
def _knows_ranges(url: str, stamp: str) -> bool:
    """Whether a web server gives a part of a file: it is asked for the second byte."""

    def second_byte() -> bytes:
        with _files(url).open(url, cache_type="none") as file:
            file.seek(1)
            data: bytes = file.read(1)
            return data

    try:
        _patiently(url, second_byte)
        return True
    except ValueError:
        return False


@functools.lru_cache(maxsize=1)
def _fetched(url: str, stamp: str) -> Any:
    """A temporary copy of a file; gone when another one is fetched."""
    copy = tempfile.NamedTemporaryFile(prefix="raytron-")  # noqa: SIM115
    _patiently(url, lambda: _files(url).get_file(url, copy.name))
    return copy


def _patiently(path: str, action: Callable[[], T]) -> T:
    """What an action returns, tried again where a store does not answer. Raises DataError where it never does.

    An answer that another attempt would not change (no such file, no permission) is raised as it is.
    """
    for wait_s in (*WAITS_S, None):
        try:
            return action()
        except DataError:
            raise
        except Exception as error:  # each client has exceptions of its own
            if _is_final(error):
                raise
            if wait_s is None:
                told = f"can't be reached: {type(error).__name__}: {error}; asked {len(WAITS_S) + 1} times"
                remedy = "look whether the store is up, and at the credentials and the endpoint on this node"
                raise DataError(Problem(path, f"{told} in {sum(WAITS_S):g} s", remedy)) from None
            time.sleep(wait_s)
    raise AssertionError


def _is_final(error: Exception) -> bool:
    """Whether another attempt would give the same. (fsspec says that a file is not there where its server is not.)"""
    cause = error.__cause__
    absent = (
        cause is None or isinstance(cause, FileNotFoundError | KeyError) or getattr(cause, "status", None) in (404, 410)
    )
    return isinstance(error, FINAL) and (absent or not isinstance(error, FileNotFoundError))
