"""The safetensors format, written as a stream that is digested on its way, and read by byte ranges.

    8 bytes   length of the header, little-endian
    header    JSON: {"name": {"dtype": "F32", "shape": [...], "data_offsets": [begin, end]}, ...}, padded with spaces
    data      the tensors, row-major, without gaps; offsets count from here

Tensors with wide elements come first, so that each is aligned. A rectangle of a stored tensor is read as runs of
contiguous bytes, straight into its target where the target is contiguous too; short gaps between runs are read along.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from raytron.checkpoint.files import Digest, storage_of
from raytron.checkpoint.record import FileRecord
from raytron.checkpoint.storage import Source
from raytron.errors import CheckpointError


class Entry(NamedTuple):
    """A tensor to be written: its key in the file, dtype by its safetensors name, shape, bytes."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


def layout(entries: Sequence[Entry], step: int) -> tuple[bytes, list[int]]:
    """The head of a file that holds `entries` in this order, and the byte at which each begins in the file."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", "step": str(step)}}
    begins, at = [], 0
    for entry in entries:
        if entry.key in header:
            raise CheckpointError(f"two tensors are called {entry.key!r} in one file")
        header[entry.key] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [at, at + entry.bytes]}
        begins.append(at)
        at += entry.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, [len(head) + begin for begin in begins]


def write(path: Path, blocks: Iterable[memoryview]) -> FileRecord:
    """Write a new file durably, its head first, digested on its way; blocks are fetched one by one. Raises OSError.

    Never overwrites.
    """
    digest = Digest()
    storage_of(path).write(path, digest.through(blocks))
    return FileRecord(path.name, digest.size, digest.text)


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's elements, row-major, as bytes; shares memory where the tensor is contiguous and on the host."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array)


def read_rectangle(
    source: Source, start: int, shape: Sequence[int], offsets: Sequence[int], target: torch.Tensor, dtype: torch.dtype
) -> None:
    """Read the rectangle of `target`'s sizes at `offsets` of a stored tensor into `target`, converting to its dtype.

    start: the byte at which the stored tensor, of `shape` and `dtype`, begins in the file. Raises OSError.
    """
    sizes = tuple(target.shape)
    if not sizes:
        target.copy_(_read(source, start, 1, dtype)[0])
        return
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    first = start + offsets[0] * row_bytes
    whole_rows = sizes[1:] == tuple(shape[1:])
    if whole_rows and target.is_contiguous() and target.dtype == dtype and target.device.type == "cpu":
        source.read_into(raw_bytes(target), first)
    elif whole_rows or row_bytes - math.prod(sizes[1:]) * dtype.itemsize <= source.gap:
        _read_rows(source, first, (row_bytes, tuple(shape[1:])), offsets[1:], target, dtype)
    else:
        for row in range(sizes[0]):
            read_rectangle(source, first + row * row_bytes, shape[1:], offsets[1:], target[row], dtype)


def _read_rows(
    source: Source,
    first: int,
    row: tuple[int, tuple[int, ...]],
    offsets: Sequence[int],
    target: torch.Tensor,
    dtype: torch.dtype,
) -> None:
    """Read whole rows, a few at a time, and copy the wanted part of each. row: its bytes and shape."""
    row_bytes, row_shape = row
    step = max(1, source.span // max(row_bytes, 1))
    for begin in range(0, target.shape[0], step):
        count = min(step, target.shape[0] - begin)
        elements = count * row_bytes // dtype.itemsize
        rows = _read(source, first + begin * row_bytes, elements, dtype).view(count, *row_shape)
        for dim, (offset, size) in enumerate(zip(offsets, target.shape[1:], strict=True), start=1):
            rows = rows.narrow(dim, offset, size)
        target.narrow(0, begin, count).copy_(rows)


def _read(source: Source, start: int, elements: int, dtype: torch.dtype) -> torch.Tensor:
    buffer = torch.empty(elements, dtype=dtype)
    source.read_into(raw_bytes(buffer), start)
    return buffer
