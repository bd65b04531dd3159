"""A segment: what one rank held at one step, in a file on tmpfs that outlives the process which wrote it.

    0       prefix   magic, turn, sizes of the parts                     turn is odd while the data changes, else even
    64      table    JSON: epoch, rank, world, mesh, tensors, rectangles    written once, when the file is made
            page     JSON: step, facts, digest of the data; then notes, a line each; sealed by a digest of table and page
            data     rectangles of global tensors, row-major, each from a multiple of 64 bytes on

The file is made once, as large as it will ever be, and mapped: to write a step is a copy from memory to memory, without a
call to the system. A writer makes the turn odd, copies the data, writes the page and makes the turn even; whoever reads
looks at the turn and the page before and after (a seqlock). A segment whose writer died in between stays odd for ever.
Digests are xxh3-128, as everywhere in a checkpoint: they find every accident, and they are no proof against a forger.

A `Part` says which rectangle of which tensor a rank holds, a `Rectangle` also where it stands in the file. Facts are what
all ranks say alike of a step; notes are what one rank keeps beside it, for whoever goes on from there.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash

from raytron.checkpoint.coverage import Box
from raytron.checkpoint.files import digest_bytes, to_json
from raytron.checkpoint.local_storage import opened
from raytron.checkpoint.planner import DTYPE_OF_NAME
from raytron.checkpoint.record import ELEMENT_BYTES, LARGEST
from raytron.checkpoint.room import check_room
from raytron.errors import CheckpointError

FORMAT, VERSION = "raytron-segment", 2
SUFFIX = ".segment"
MAGIC = b"RTsegm\x00\x01"
PREFIX = struct.Struct("<8sQQQQ")  # magic, turn, bytes of the table, room for the page, bytes of data
TURN = struct.Struct("<Q")
TURN_AT = 8
TABLE_AT = 64
SEALED = struct.Struct("<Q32s")  # before the page: its bytes, its seal
ALIGNED, PAGE_BYTES = 64, 4096


class Part(NamedTuple):
    """A rectangle of a global tensor; dtype by its safetensors name."""

    name: str
    dtype: str
    shape: tuple[int, ...]  # of the tensor
    box: Box

    @property
    def bytes(self) -> int:
        return self.box.volume * ELEMENT_BYTES[self.dtype]


class Rectangle(NamedTuple):
    """A part, and the byte of the file at which its elements begin."""

    part: Part
    start: int


class Inventory(NamedTuple):
    """How many tensors the whole state has, and a digest of their names, dtypes and shapes."""

    tensors: int
    digest: str

    @classmethod
    def of(cls, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> Inventory:
        """tensors: by name, dtype and global shape."""
        rows = sorted((name, dtype, shape) for name, (dtype, shape) in tensors.items())
        return cls(len(rows), digest_bytes(to_json(rows)))


class Origin(NamedTuple):
    """Who writes a segment. mesh: as text; inventory: of all that the ranks of this world hold together."""

    epoch: int
    rank: int
    world: int
    mesh: str
    inventory: Inventory


@dataclass(frozen=True)
class Head:
    """What a complete segment says of itself. size: bytes of the file; data: (first byte, bytes); notes: JSON objects."""

    origin: Origin
    step: int
    facts: dict[str, Any]
    rectangles: tuple[Rectangle, ...]
    size: int
    data: tuple[int, int]
    digest: str
    seal: str
    notes: tuple[dict[str, Any], ...] = ()


# ---- writing


class SegmentFile:
    """A segment of this process: made at once with room for `parts`, then written as often as wanted.

    Raises CheckpointError where there is no room for it.
    """

    def __init__(self, path: Path, origin: Origin, parts: Sequence[Part], facts_bytes: int, notes_bytes: int = 0):
        """facts_bytes: of the largest facts, as JSON, that will be written; notes_bytes: of all notes and their ends."""
        self.path = path
        self.turn = 1
        starts, self.data_bytes = _places(parts)
        table = _table(origin, parts, starts)
        self._room, self._notes_room = facts_bytes + 512, notes_bytes
        room = self._room + notes_bytes
        self._page_at = TABLE_AT + len(table)
        self._data_at = _up(self._page_at + SEALED.size + room, PAGE_BYTES)
        self.size = self._data_at + self.data_bytes
        self.map = make(path, self.size)
        self._table = table
        PREFIX.pack_into(self.map, 0, MAGIC, self.turn, len(table), room, self.data_bytes)
        self.map[TABLE_AT : self._page_at] = table
        whole = torch.frombuffer(self.map, dtype=torch.uint8)
        self.targets = [_view(whole, self._data_at + at, part) for at, part in zip(starts, parts, strict=True)]

    def begin(self) -> None:
        """From here until `publish` the segment counts for nothing."""
        self.turn |= 1
        TURN.pack_into(self.map, TURN_AT, self.turn)

    def publish(self, step: int, facts: dict[str, Any], notes: Sequence[bytes] = ()) -> None:
        """All of `targets` is written: the segment counts, as that of this step. notes: JSON objects, each in one line.

        Raises CheckpointError where facts or notes have outgrown their room, ValueError or TypeError where they are no JSON.
        """
        with memoryview(self.map) as view, view[self._data_at : self.size] as data:
            digest = str(xxhash.xxh3_128_hexdigest(data))
        told, noted = (
            to_json({"step": step, "facts": facts, "digest": digest}),
            b"".join(b"\n" + note for note in notes),
        )
        for what, needs, room in (("facts", len(told), self._room), ("notes", len(noted), self._notes_room)):
            if needs > room:
                raise CheckpointError(f"{self.path}: the {what} of step {step} need {needs} bytes, not {room}")
        page = told + noted
        seal = digest_bytes(self._table + page)
        at = self._page_at
        SEALED.pack_into(self.map, at, len(page), seal.encode())
        self.map[at + SEALED.size : at + SEALED.size + len(page)] = page
        self.turn += 1
        TURN.pack_into(self.map, TURN_AT, self.turn)


def _table(origin: Origin, parts: Sequence[Part], starts: Sequence[int]) -> bytes:
    return to_json(
        {
            "format": FORMAT,
            "version": VERSION,
            **origin._asdict(),
            "rectangles": [
                [part.name, part.dtype, part.shape, part.box.offsets, part.box.sizes, at]
                for part, at in zip(parts, starts, strict=True)
            ],
        }
    )


def _places(parts: Sequence[Part]) -> tuple[list[int], int]:
    """Where each part begins, counted from the first byte of the data, and the bytes of all."""
    starts, at = [], 0
    for part in parts:
        starts.append(at)
        at += _up(part.bytes, ALIGNED)
    return starts, at


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


def make(path: Path, size: int) -> mmap.mmap:
    """A new file of `size` bytes, mapped. What it needs is taken now: a full tmpfs must not kill the writer later."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        check_room(size)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        else:
            os.ftruncate(descriptor, size)
        return mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
    except OSError as error:
        path.unlink(missing_ok=True)
        remedy = "free memory, give a container more (--shm-size), use more nodes, or set recovery.memory_every to null"
        raise CheckpointError(
            f"{path}: no room for {size} bytes of a rank's state: {error.strerror}\n    remedy: {remedy}"
        ) from error
    finally:
        os.close(descriptor)


def _view(whole: torch.Tensor, start: int, part: Part) -> torch.Tensor:
    """The place of a part in the file as a tensor."""
    return whole[start : start + part.bytes].view(DTYPE_OF_NAME[part.dtype]).view(part.box.sizes)


# ---- reading


@contextlib.contextmanager
def mapped(path: Path) -> Iterator[mmap.mmap]:
    """A segment's file, mapped to be read. Raises CheckpointError, also for links and empty files."""
    with opened(path) as descriptor:
        size = os.fstat(descriptor).st_size
        if size < TABLE_AT:
            raise CheckpointError(f"{path}: damaged: {size} bytes are no segment")
        view = mmap.mmap(descriptor, size, prot=mmap.PROT_READ)
    yield view  # unmapped when the last array over it is gone


class Newest(NamedTuple):
    """What tells one writing of a segment from another, read without its tables and not checked."""

    seal: str
    step: int


def turn_of(view: mmap.mmap) -> int:
    """A number that changes whenever a segment is written."""
    return int(TURN.unpack_from(view, TURN_AT)[0])


def glance(view: mmap.mmap) -> Newest | None:
    """What a segment holds, cheaply; None where it is not complete."""
    magic, turn, table_bytes, room, _ = PREFIX.unpack_from(view, 0)
    page_at = TABLE_AT + table_bytes
    if magic != MAGIC or turn % 2 or page_at + SEALED.size + room > len(view):
        return None
    page_bytes, seal = SEALED.unpack_from(view, page_at)
    page = view[page_at + SEALED.size : page_at + SEALED.size + min(page_bytes, room)]
    try:
        found = Newest(seal.decode(), _count(json.loads(page.partition(b"\n")[0])["step"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if TURN.unpack_from(view, TURN_AT)[0] == turn else None


def read_head(path: Path, view: mmap.mmap) -> Head:
    """What the segment says of itself. Raises CheckpointError where it is not complete, or damaged."""
    magic, turn, table_bytes, room, data_bytes = PREFIX.unpack_from(view, 0)
    if magic != MAGIC:
        raise CheckpointError(f"{path}: damaged: not a segment")
    if turn % 2:
        raise CheckpointError(f"{path}: not complete: its writer had not finished")
    page_at = TABLE_AT + table_bytes
    data_at = _up(page_at + SEALED.size + room, PAGE_BYTES)
    if data_at + data_bytes != len(view):
        raise CheckpointError(f"{path}: damaged: it has {len(view)} bytes, not {data_at + data_bytes}")
    page_bytes, seal = SEALED.unpack_from(view, page_at)
    if page_bytes > room:
        raise CheckpointError(f"{path}: damaged: its page is too long")
    table = view[TABLE_AT:page_at]
    page = view[page_at + SEALED.size : page_at + SEALED.size + page_bytes]
    if digest_bytes(table + page).encode() != seal or TURN.unpack_from(view, TURN_AT)[0] != turn:
        raise CheckpointError(f"{path}: damaged: its seal does not match its content")
    try:
        first, *notes = map(json.loads, page.split(b"\n"))
        return _head(json.loads(table), first, notes, (data_at, data_bytes), seal.decode())
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged: {type(error).__name__}: {error}") from error


def check_data(path: Path, view: mmap.mmap, head: Head) -> None:
    """Raise CheckpointError unless the data has its digest, and nobody wrote since `head` was read."""
    first, count = head.data
    with memoryview(view) as whole, whole[first : first + count] as data:
        found = xxhash.xxh3_128_hexdigest(data)
    if read_head(path, view).seal != head.seal:
        raise CheckpointError(f"{path}: not complete: it was written while it was read")
    if found != head.digest:
        raise CheckpointError(f"{path}: damaged: the digest of its data is {found}, not {head.digest} as written")


def read_segment(path: Path, *, digests: bool = True) -> Head:
    """The head of a complete segment. digests: its data is read and checked, too. Raises CheckpointError."""
    with mapped(path) as view:
        head = read_head(path, view)
        if digests:
            check_data(path, view, head)
        return head


def _head(table: Any, page: Any, notes: list[Any], data: tuple[int, int], seal: str) -> Head:
    if table["format"] != FORMAT or table["version"] != VERSION:
        raise ValueError(f"format {table['format']!r}, version {table['version']!r} is unknown here")
    origin = Origin(
        epoch=_count(table["epoch"]),
        rank=_count(table["rank"]),
        world=_count(table["world"]),
        mesh=_text(table["mesh"]),
        inventory=Inventory(_count(table["inventory"][0]), _text(table["inventory"][1])),
    )
    if not all(isinstance(each, dict) for each in (page["facts"], *notes)):
        raise ValueError("the facts or a note are no object")
    rectangles = tuple(_rectangle(row, data) for row in table["rectangles"])
    return Head(
        origin, _count(page["step"]), page["facts"], rectangles, sum(data), data, _text(page["digest"]), seal, tuple(notes)
    )  # fmt: skip


def _rectangle(row: Any, data: tuple[int, int]) -> Rectangle:
    name, dtype, shape, offsets, sizes, start = row
    if dtype not in ELEMENT_BYTES:
        raise ValueError(f"{name} has the unknown dtype {dtype!r}")
    part = Part(_text(name), dtype, _counts(shape), Box(_counts(offsets), _counts(sizes)))
    if math.prod(max(1, size) for size in part.shape) >= LARGEST or not part.box.inside(part.shape):
        raise ValueError(f"{name}: {part.box} lies outside the shape {part.shape}")
    if _count(start) + part.bytes > data[1]:
        raise ValueError(f"{name}{part.box} ends beyond the file")
    return Rectangle(part, data[0] + start)


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value < LARGEST:
        raise ValueError(f"{str(value)[:50]} is no count")
    return value


def _counts(value: object) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{str(value)[:50]} is no list")
    return tuple(map(_count, value))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{str(value)[:50]} is no text")
    return value
