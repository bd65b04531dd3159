"""What is written down about a generation: JSON documents.

    COMMIT         step, time, ranks, facts, and the size and digest of metadata.json; sealed with a digest of itself.
                   Small: a folder of many generations is listed by their COMMIT files alone.
    metadata.json  files: name, size, digest of each shard
                   tensors: dtype, global shape, and chunks: which rectangle stands at which byte of which file
    VALIDATION     the loss on validation batches, sealed; comes after COMMIT, or never

Reading them back trusts nothing: every field is checked for type and range, file names are plain, byte ranges stay
inside their files, chunks cover their tensor exactly. Whatever is wrong is a CheckpointError that says where.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytron.checkpoint.coverage import Box, coverage_problem
from raytron.checkpoint.files import digest_bytes, from_json, is_plain_name, to_json
from raytron.errors import CheckpointError

COMMIT = "COMMIT"
VALIDATION = "VALIDATION"
METADATA = "metadata.json"
FORMAT = "raytron-checkpoint"
VERSION = 1
LARGEST = 1 << 62  # elements, bytes, steps
DIGEST = re.compile(r"[0-9a-f]{32}")

# bytes of an element, by the names that safetensors uses
ELEMENT_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8, "BOOL": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1,
}  # fmt: skip


@dataclass(frozen=True)
class FileRecord:
    """One shard: a safetensors file. size in bytes, digest in 32 hexadecimal digits."""

    name: str
    size: int
    digest: str


@dataclass(frozen=True)
class Chunk:
    """One stored rectangle of a tensor: its elements, row-major, from byte `start` of a file."""

    box: Box
    file: str
    start: int


@dataclass(frozen=True)
class TensorRecord:
    """One global tensor; `dtype` by its safetensors name. No chunks where the shape holds no element."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * ELEMENT_BYTES[self.dtype]


@dataclass(frozen=True)
class Records:
    """All files and tensors of a generation."""

    files: dict[str, FileRecord]
    tensors: dict[str, TensorRecord]

    @property
    def bytes(self) -> int:
        """Of all tensors, each counted once."""
        return sum(tensor.bytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class Commit:
    """The content of a COMMIT file. time in seconds since the epoch; metadata: size and digest of metadata.json."""

    step: int
    time: float
    ranks: int
    facts: dict[str, Any]
    metadata: FileRecord


def dump_commit(commit: Commit) -> bytes:
    """A COMMIT file's bytes. Raises ValueError or TypeError where the facts are not JSON."""
    body = {
        "format": FORMAT,
        "version": VERSION,
        "step": commit.step,
        "time": commit.time,
        "ranks": commit.ranks,
        "facts": commit.facts,
        "metadata": {"size": commit.metadata.size, "digest": commit.metadata.digest},
    }
    return to_json({**body, "seal": digest_bytes(to_json(body))})


def parse_commit(path: Path, data: bytes) -> Commit:
    """The content of a COMMIT file. Raises CheckpointError."""
    reader = _Reader(path)
    body = from_json(path, data)
    seal = body.pop("seal", None)
    if body.get("format") != FORMAT:
        raise reader.error("it is not a COMMIT file of Raytron")
    if body.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: format version {body.get('version')!r} is unknown here, only {VERSION} is known"
        )
    try:
        expected = digest_bytes(to_json(body))
    except (ValueError, RecursionError) as error:
        raise reader.error(str(error)) from error
    if seal != expected or to_json({**body, "seal": seal}) != data:  # two texts may mean one number
        raise reader.error("its seal does not match its content")
    metadata = reader.mapping(body.get("metadata"), "metadata")
    return Commit(
        step=reader.count(body.get("step"), "step"),
        time=reader.seconds(body.get("time"), "time"),
        ranks=reader.count(body.get("ranks"), "ranks"),
        facts=reader.mapping(body.get("facts"), "facts"),
        metadata=FileRecord(
            METADATA,
            reader.count(metadata.get("size"), "metadata.size"),
            reader.digest(metadata.get("digest"), "metadata.digest"),
        ),
    )


def dump_loss(loss: float) -> bytes:
    """A VALIDATION file's bytes. Raises ValueError where the loss is not finite."""
    body = {"loss": float(loss)}
    return to_json({**body, "seal": digest_bytes(to_json(body))})


def parse_loss(path: Path, data: bytes) -> float:
    """The loss in a VALIDATION file, in nats. Raises CheckpointError."""
    loss = from_json(path, data).get("loss")
    if type(loss) is not float or not math.isfinite(loss) or dump_loss(loss) != data:
        raise CheckpointError(f"{path}: damaged: its seal does not match its content")
    return loss


def dump_records(records: Records) -> bytes:
    """A metadata.json file's bytes."""
    files = list(records.files.values())
    place = {file.name: index for index, file in enumerate(files)}
    return to_json(
        {
            "files": [{"name": file.name, "size": file.size, "digest": file.digest} for file in files],
            "tensors": {
                name: {
                    "dtype": tensor.dtype,
                    "shape": tensor.shape,
                    "chunks": [
                        {"offsets": c.box.offsets, "sizes": c.box.sizes, "file": place[c.file], "start": c.start}
                        for c in tensor.chunks
                    ],
                }
                for name, tensor in records.tensors.items()
            },
        }
    )


def parse_records(path: Path, data: bytes) -> Records:
    """Files and tensors out of a metadata.json file, checked for sense. Raises CheckpointError."""
    reader = _Reader(path)
    body = from_json(path, data)
    listed = [reader.file(entry, f"files[{i}]") for i, entry in enumerate(reader.array(body.get("files"), "files"))]
    files = {file.name: file for file in listed}
    if len(files) != len(listed):
        raise reader.error("a file is listed twice")
    tensors = {
        name: reader.tensor(entry, f"tensor {name}", listed)
        for name, entry in reader.mapping(body.get("tensors"), "tensors").items()
    }
    used = dict.fromkeys(files, 8)  # a safetensors file begins with the length of its header
    for tensor in tensors.values():
        for chunk in tensor.chunks:
            used[chunk.file] += chunk.box.volume * ELEMENT_BYTES[tensor.dtype]
    for name, count in used.items():
        if count > files[name].size:
            raise reader.error(f"{count} bytes of tensors can't stand in {name} of {files[name].size} bytes")
    return Records(files, tensors)


class _Reader:
    """Checks values of a JSON document; errors name the document and the field."""

    def __init__(self, path: Path):
        self.path = path

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: damaged: {what}")

    def mapping(self, value: object, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.error(f"{where} is not an object")
        return value

    def array(self, value: object, where: str) -> list[Any]:
        if not isinstance(value, list):
            raise self.error(f"{where} is not an array")
        return value

    def count(self, value: object, where: str) -> int:
        if type(value) is not int or not 0 <= value < LARGEST:
            raise self.error(f"{where} is no count: {str(value)[:50]}")
        return value

    def counts(self, value: object, where: str) -> tuple[int, ...]:
        return tuple(self.count(each, where) for each in self.array(value, where))

    def seconds(self, value: object, where: str) -> float:
        if type(value) not in (int, float) or not 0 <= value < 1e12:  # type: ignore[operator]
            raise self.error(f"{where} is no time: {str(value)[:50]}")
        return float(value)  # type: ignore[arg-type]

    def digest(self, value: object, where: str) -> str:
        if not isinstance(value, str) or not DIGEST.fullmatch(value):
            raise self.error(f"{where} is no digest")
        return value

    def file(self, value: object, where: str) -> FileRecord:
        entry = self.mapping(value, where)
        name = entry.get("name")
        if not isinstance(name, str) or not is_plain_name(name):
            raise self.error(f"{where} has a name that may leave the directory: {str(name)[:100]!r}")
        size = self.count(entry.get("size"), f"{where}.size")
        return FileRecord(name, size, self.digest(entry.get("digest"), f"{where}.digest"))

    def tensor(self, value: object, where: str, files: list[FileRecord]) -> TensorRecord:
        entry = self.mapping(value, where)
        dtype = entry.get("dtype")
        if not isinstance(dtype, str) or dtype not in ELEMENT_BYTES:
            raise self.error(f"{where} has the unknown dtype {str(dtype)[:50]!r}")
        shape = self.counts(entry.get("shape"), f"{where}.shape")
        if len(shape) > 32 or math.prod(max(size, 1) for size in shape) * ELEMENT_BYTES[dtype] >= LARGEST:
            raise self.error(f"{where} has an impossible shape")
        chunks = self.array(entry.get("chunks"), f"{where}.chunks")
        record = TensorRecord(dtype, shape, tuple(self.chunk(each, where, dtype, files) for each in chunks))
        problem = coverage_problem(shape, [chunk.box for chunk in record.chunks])
        if problem:
            raise self.error(f"{where}: {problem}")
        return record

    def chunk(self, value: object, where: str, dtype: str, files: list[FileRecord]) -> Chunk:
        entry = self.mapping(value, f"a chunk of {where}")
        offsets, sizes = self.counts(entry.get("offsets"), where), self.counts(entry.get("sizes"), where)
        if len(offsets) != len(sizes) or 0 in sizes:
            raise self.error(f"a chunk of {where} is no rectangle")
        index = self.count(entry.get("file"), f"{where}: file")
        if index >= len(files):
            raise self.error(f"a chunk of {where} stands in a file that is not listed")
        start, box = self.count(entry.get("start"), f"{where}: start"), Box(offsets, sizes)
        if start + box.volume * ELEMENT_BYTES[dtype] > files[index].size:
            raise self.error(f"a chunk of {where} ends beyond {files[index].name}")
        return Chunk(box, files[index].name, start)
