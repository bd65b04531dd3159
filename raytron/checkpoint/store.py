"""Where a plan's rectangles go and come from: torch's StorageWriter and StorageReader over safetensors files and JSON.

Each rank writes its own files, each fsynced, digested while written. The coordinator then looks at what is on disk, and
only if every planned rectangle was reported, every file is there with its size, and no other, is COMMIT written.

On loading, the files that the ranks need are shared out so that each is digested once, by one of its readers, while
every rank reads only its own byte ranges; no rank uses what it read before all ranks have reported success.

Nothing read back is ever unpickled, and entries that are not tensors are refused in both directions.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from raytron.checkpoint import catalog
from raytron.checkpoint.files import check_file, check_size, opened, sync_directory
from raytron.checkpoint.owner import WRITING
from raytron.checkpoint.planner import DTYPE_OF_NAME, NAME_OF_DTYPE, box_of, tensor_metadata
from raytron.checkpoint.record import ELEMENT_BYTES, Chunk, FileRecord, Records, TensorRecord
from raytron.checkpoint.safetensors_file import Entry, layout, read_rectangle, write
from raytron.errors import CheckpointError

SHARD_BYTES = 4 << 30  # a rank begins another file beyond this
Hook = Callable[[str], None]  # told each phase as it begins; a test may raise or die there


def no_hook(_phase: str) -> None:
    """The default: nothing happens between phases."""


class StoredAt(NamedTuple):
    """Where a rectangle was written."""

    file: FileRecord
    start: int


class SafetensorsWriter(StorageWriter):
    """Writes one generation. step, facts and ranks matter on the coordinator alone, which commits."""

    def __init__(
        self, path: Path, *, step: int, facts: dict[str, Any], rank: int, ranks: int, hook: Hook = no_hook
    ) -> None:
        self.path, self.step, self.facts, self.rank, self.ranks, self.hook = path, step, facts, rank, ranks, hook

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A writer is made for one generation; there is nothing to reset."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """The directory was made before."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's rectangles, durably. Raises CheckpointError or OSError naming the file."""
        self.hook("write")
        results: list[WriteResult] = []
        for number, items in enumerate(_split(plan.items)):
            results += self._write_file(f"rank{self.rank:05d}-{number:03d}.safetensors", items, planner)
        sync_directory(self.path)
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _write_file(self, name: str, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        head, begins = layout([_entry(item) for item in items], self.step)
        try:
            file = write(self.path / name, head, [_fetch(planner, item) for item in items])
        except OSError as error:
            raise CheckpointError(f"{self.path / name}: can't be written: {error.strerror or error}") from error
        return [
            WriteResult(item.index, _entry(item).bytes, StoredAt(file, begin))
            for item, begin in zip(items, begins, strict=True)
        ]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator: check what was written, then commit. Raises CheckpointError or OSError."""
        records = _records(metadata, results)
        self._check_directory(records)
        self.hook("publish")
        catalog.commit(self.path, self.step, self.ranks, self.facts, records)

    def _check_directory(self, records: Records) -> None:
        """The shards that were reported are there, with their sizes, and nothing else is."""
        present = {entry.name for entry in self.path.iterdir() if not entry.name.startswith(".")} - {WRITING}
        strangers = sorted(present - set(records.files))
        if strangers:
            raise CheckpointError(f"{self.path / strangers[0]}: this file is not part of the save")
        for file in records.files.values():
            check_file(self.path / file.name, file.size)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Generations are found by the catalog, never guessed from a path."""
        return False


def _entry(item: WriteItem) -> Entry:
    if item.type == WriteItemType.BYTE_IO or item.tensor_data is None:
        raise CheckpointError(f"{item.index.fqn}: entries that are not tensors are refused")
    box, dtype = box_of(item.tensor_data.chunk), item.tensor_data.properties.dtype
    whole = box.sizes == tuple(item.tensor_data.size)
    key = item.index.fqn if whole else f"{item.index.fqn}{box}"
    return Entry(key, NAME_OF_DTYPE[dtype], box.sizes, box.volume * dtype.itemsize)


def _fetch(planner: SavePlanner, item: WriteItem) -> Callable[[], torch.Tensor]:
    def fetch() -> torch.Tensor:
        tensor = planner.resolve_data(item)
        assert isinstance(tensor, torch.Tensor)
        return tensor

    return fetch


def _split(items: list[WriteItem]) -> list[list[WriteItem]]:
    """Items in the order in which they are written, wide elements first, in lists that make one file each."""
    files: list[list[WriteItem]] = []
    room = 0
    for entry, item in sorted(((_entry(item), item) for item in items), key=lambda pair: _order(pair[0])):
        if not files or entry.bytes > room:
            files.append([])
            room = SHARD_BYTES
        files[-1].append(item)
        room -= entry.bytes
    return files


def _order(entry: Entry) -> tuple[int, str]:
    return -ELEMENT_BYTES[entry.dtype], entry.key


def _records(metadata: Metadata, results: list[list[WriteResult]]) -> Records:
    """What the ranks reported, as it will be written down. Raises CheckpointError if something planned is not reported."""
    stored = {(r.index.fqn, tuple(r.index.offset or ())): r.storage_data for rank in results for r in rank}
    files = {place.file.name: place.file for place in stored.values()}
    tensors, missing = {}, []
    for name, record in metadata.state_dict_metadata.items():
        assert isinstance(record, TensorStorageMetadata)
        chunks = []
        for box in map(box_of, record.chunks):
            place = stored.get((name, box.offsets))
            if place is None or not place.file.digest:
                missing.append(f"{name}{box}")
            else:
                chunks.append(Chunk(box, place.file.name, place.start))
        tensors[name] = TensorRecord(NAME_OF_DTYPE[record.properties.dtype], tuple(record.size), tuple(chunks))
    if missing:
        raise CheckpointError(f"no rank reported to have written {', '.join(missing[:5])}")
    return Records(dict(sorted(files.items())), tensors)


class SafetensorsReader(StorageReader):
    """Reads one generation, whose COMMIT and metadata were checked before."""

    def __init__(self, generation: catalog.Generation, *, hook: Hook = no_hook) -> None:
        self.generation, self.records, self.hook = generation, generation.records, hook
        self.chunks: dict[tuple[str, tuple[int, ...]], Chunk] = {
            (name, chunk.box.offsets): chunk for name, tensor in self.records.tensors.items() for chunk in tensor.chunks
        }

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A reader is made for one generation; there is nothing to reset."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(
            {
                name: tensor_metadata(DTYPE_OF_NAME[tensor.dtype], tensor.shape, [chunk.box for chunk in tensor.chunks])
                for name, tensor in self.records.tensors.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        plan.storage_data = {self._chunk(item).file for item in plan.items}
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Each file that anyone reads is digested by one of its readers: the biggest first, to the least loaded."""
        readers: dict[str, list[int]] = defaultdict(list)
        for rank, plan in enumerate(plans):
            for name in plan.storage_data:
                readers[name].append(rank)
            plan.storage_data = []
        load = [0] * len(plans)
        for name in sorted(readers, key=lambda name: (-self.records.files[name].size, name)):
            rank = min(readers[name], key=lambda rank: load[rank])
            load[rank] += self.records.files[name].size
            plans[rank].storage_data.append(name)
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Digest the files that fell to this rank, then read its rectangles. Raises CheckpointError naming files."""
        self.hook("load")
        self._verify(plan.storage_data)
        by_file: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            by_file[self._chunk(item).file].append(item)
        for name, items in by_file.items():
            self._read_file(self.records.files[name], items, planner)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _verify(self, names: list[str]) -> None:
        problems = []
        for name in names:
            file = self.records.files[name]
            try:
                check_file(self.generation.path / name, file.size, file.digest)
            except CheckpointError as error:
                problems.append(str(error))
        if problems:
            raise CheckpointError("\n  ".join(problems))

    def _read_file(self, file: FileRecord, items: list[ReadItem], planner: LoadPlanner) -> None:
        path = self.generation.path / file.name
        with opened(path) as descriptor:
            check_size(path, descriptor, file.size)
            for item in sorted(items, key=lambda item: self._chunk(item).start):
                chunk, dtype = self._chunk(item), self.records.tensors[item.storage_index.fqn].dtype
                target = planner.resolve_tensor(item)
                offsets = tuple(item.storage_offsets)
                read_rectangle(descriptor, chunk.start, chunk.box.sizes, offsets, target, DTYPE_OF_NAME[dtype])
                planner.commit_tensor(item, target)

    def _chunk(self, item: ReadItem) -> Chunk:
        if item.type == LoadItemType.BYTE_IO:
            raise CheckpointError(f"{item.dest_index.fqn}: entries that are not tensors are refused")
        return self.chunks[item.storage_index.fqn, tuple(item.storage_index.offset or ())]

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Generations are found by the catalog, never guessed from a path."""
        return False
