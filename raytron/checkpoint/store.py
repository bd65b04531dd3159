"""Where a plan's rectangles come from: torch's StorageReader over safetensors files and JSON.

The files that the ranks need are shared out so that each is digested once, by one of its readers, while every rank reads
only its own byte ranges; no rank uses what it read before all ranks have reported success.

Nothing read back is ever unpickled, and entries that are not tensors are refused.
"""

from __future__ import annotations

import os
from collections import defaultdict
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
)
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from raytron.checkpoint.files import check_file, check_size, opened
from raytron.checkpoint.generation import Generation
from raytron.checkpoint.peers import Hook, no_hook
from raytron.checkpoint.planner import DTYPE_OF_NAME, tensor_metadata
from raytron.checkpoint.record import Chunk, FileRecord
from raytron.checkpoint.safetensors_file import read_rectangle
from raytron.errors import CheckpointError

__all__ = ["Hook", "SafetensorsReader", "no_hook"]


class SafetensorsReader(StorageReader):
    """Reads one generation, whose COMMIT and metadata were checked before."""

    def __init__(self, generation: Generation, *, hook: Hook = no_hook) -> None:
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
        with opened(path) as source:
            check_size(path, source, file.size)
            for item in sorted(items, key=lambda item: self._chunk(item).start):
                chunk, dtype = self._chunk(item), self.records.tensors[item.storage_index.fqn].dtype
                target = planner.resolve_tensor(item)
                offsets = tuple(item.storage_offsets)
                read_rectangle(source, chunk.start, chunk.box.sizes, offsets, target, DTYPE_OF_NAME[dtype])
                planner.commit_tensor(item, target)

    def _chunk(self, item: ReadItem) -> Chunk:
        if item.type == LoadItemType.BYTE_IO:
            raise CheckpointError(f"{item.dest_index.fqn}: entries that are not tensors are refused")
        return self.chunks[item.storage_index.fqn, tuple(item.storage_index.offset or ())]

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Generations are found by the catalog, never guessed from a path."""
        return False
