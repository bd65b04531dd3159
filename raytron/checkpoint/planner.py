"""What to read: torch's load planner over `Mapping[str, Slice]`.

torch's re-sharding resolves the rectangle that a rank wants against the rectangles that are stored; what is read goes into
shadow buffers in host memory, and to the live tensors only by `swap`, after all ranks have succeeded.

Problems of all ranks travel in the plans and are raised together, as one CheckpointError on every rank.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from raytron.checkpoint.coverage import Box
from raytron.checkpoint.deal import Offer, Offered, by_rank, raise_all
from raytron.errors import CheckpointError
from raytron.parallel.layout import Slice

# what safetensors calls a dtype
NAME_OF_DTYPE = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
}  # fmt: skip
DTYPE_OF_NAME = {name: dtype for dtype, name in NAME_OF_DTYPE.items()}


def box_of(chunk: ChunkStorageMetadata) -> Box:
    """torch's rectangle as ours."""
    return Box(tuple(chunk.offsets), tuple(chunk.sizes))


def chunk_of(box: Box) -> ChunkStorageMetadata:
    """Our rectangle as torch's."""
    return ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))


def tensor_metadata(dtype: torch.dtype, shape: Iterable[int], boxes: Iterable[Box]) -> TensorStorageMetadata:
    """torch's record of a stored tensor."""
    return TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), [chunk_of(box) for box in boxes])


def slice_box(piece: Slice) -> Box:
    """The rectangle that a slice holds."""
    return Box(tuple(piece.offsets), tuple(piece.tensor.shape))


def slice_problem(name: str, piece: Slice) -> str | None:
    """Why a slice can't be saved or loaded, or None."""
    if not name or name == "__metadata__":
        return f"a tensor can't be named {name!r}"
    if not slice_box(piece).inside(piece.shape):
        return f"{name}: a slice {slice_box(piece)} lies outside the shape {tuple(piece.shape)}"
    if piece.tensor.dtype not in NAME_OF_DTYPE:
        return f"{name}: {piece.tensor.dtype} can't be stored in safetensors"
    if piece.tensor.is_meta or piece.tensor.layout != torch.strided:
        return f"{name}: only dense tensors with storage are saved and loaded"
    return None


def offer(slices: Mapping[str, Slice]) -> Offered:
    """What a rank holds, for the deal."""
    problems = [problem for name, piece in slices.items() if (problem := slice_problem(name, piece))]
    if problems:
        return Offered([], problems)
    return Offered(
        [
            Offer(name, NAME_OF_DTYPE[piece.tensor.dtype], tuple(piece.shape), slice_box(piece))
            for name, piece in slices.items()
        ],
        [],
    )


class ShadowPlanner(LoadPlanner):
    """Plans a load into shadow buffers of the slices.

    convert: a stored floating-point dtype may differ from the target's.
    partial: the checkpoint may hold tensors that no rank asks for.
    """

    def __init__(self, where: str, slices: Mapping[str, Slice], *, convert: bool = False, partial: bool = False):
        self.where, self.slices, self.convert, self.partial = where, slices, convert, partial
        self.shadows: dict[str, torch.Tensor] = {}
        self.metadata = Metadata({})

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        assert metadata is not None
        self.metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        problems = [problem for name, piece in self.slices.items() if (problem := self._problem(name, piece))]
        if problems:
            return LoadPlan([], planner_data=(problems, set(self.slices)))
        items = [item for name, piece in self.slices.items() for item in self._read_items(name, piece)]
        return LoadPlan(items, planner_data=(problems, set(self.slices)))

    def _problem(self, name: str, piece: Slice) -> str | None:
        """Why a slice can't be loaded from this checkpoint, or None."""
        stored = self.metadata.state_dict_metadata.get(name)
        if not isinstance(stored, TensorStorageMetadata):
            return f"{name}: missing in the checkpoint"
        if tuple(stored.size) != tuple(piece.shape):
            return f"{name}: its shape is {tuple(stored.size)} in the checkpoint, not {tuple(piece.shape)}"
        have, want = stored.properties.dtype, piece.tensor.dtype
        both_floating = have.is_floating_point and want.is_floating_point
        if have != want and not (self.convert and both_floating):
            return f"{name}: its dtype is {have} in the checkpoint, not {want}"
        return slice_problem(name, piece)

    def _read_items(self, name: str, piece: Slice) -> list[ReadItem]:
        stored = self.metadata.state_dict_metadata[name]
        if not piece.tensor.numel():
            return []
        assert isinstance(stored, TensorStorageMetadata)
        return create_read_items_for_chunk_list(name, stored, [chunk_of(slice_box(piece))])

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Report what any rank found wrong, and names that no rank asks for. Raises Agreed."""
        problems = by_rank((rank, text) for rank, plan in enumerate(global_plan) for text in plan.planner_data[0])
        wanted = set().union(*(plan.planner_data[1] for plan in global_plan))
        if not self.partial:
            extra = sorted(set(self.metadata.state_dict_metadata) - wanted)
            problems += [f"{name}: unexpected: in the checkpoint, but no rank asks for it" for name in extra]
        raise_all(f"{self.where}: does not fit", problems)
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        self.shadows = {
            name: torch.empty(piece.tensor.shape, dtype=piece.tensor.dtype) for name, piece in self.slices.items()
        }
        return central_plan

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """The part of a shadow buffer that a read fills: a view."""
        target = self.shadows[read_item.dest_index.fqn]
        for dim, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(dim, offset, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing to do: `resolve_tensor` gave a view."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise CheckpointError(f"{read_item.dest_index.fqn}: entries that are not tensors are refused")

    @torch.no_grad()
    def swap(self) -> None:
        """Copy every shadow buffer into its live tensor, and let the buffers go."""
        while self.shadows:
            name, shadow = self.shadows.popitem()
            self.slices[name].tensor.detach().copy_(shadow)
