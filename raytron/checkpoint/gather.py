"""Fills a rank's slices from a generation in memory: any mesh from any mesh, rank to rank, each byte once.

torch's re-sharding says which part of which stored rectangle a rank needs, as it does for files. A part of a rectangle is a
*window*: a box in a row-major array of bytes. Windows of segments on the rank's own node are read where they are mapped;
those on another node are asked for there (`Fetch`), so that only what is needed crosses the network. Everything lands in
shadow buffers, and in the live tensors only when all ranks have succeeded.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem

from raytron.checkpoint.coverage import Box
from raytron.checkpoint.peers import Peers
from raytron.checkpoint.planner import DTYPE_OF_NAME, ShadowPlanner, tensor_metadata
from raytron.checkpoint.record import ELEMENT_BYTES
from raytron.checkpoint.segment import mapped, read_head
from raytron.checkpoint.sources import Held, MemoryGeneration, Stands
from raytron.errors import CheckpointError
from raytron.parallel.layout import Slice

FETCH_BYTES = 64 << 20  # about what is asked for at once


class Window(NamedTuple):
    """A box of a row-major array of bytes of `shape` that begins at byte `start` of a file."""

    start: int
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.sizes)

    def of(self, data: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The window of a file's bytes: a view. Raises CheckpointError where it lies outside."""
        end = self.start + math.prod(self.shape)
        if not Box(self.offsets, self.sizes).inside(self.shape) or not 0 <= self.start <= end <= len(data):
            raise CheckpointError(f"{self} lies outside {len(data)} bytes")
        array = data[self.start : end].reshape(self.shape)
        view: NDArray[np.uint8] = array[
            tuple(slice(at, at + size) for at, size in zip(self.offsets, self.sizes, strict=True))
        ]
        return view


# the windows of a segment on another node, one after another: (node, path, seal of the segment, windows) -> bytes
Fetch = Callable[[str, str, str, Sequence[Window]], NDArray[np.uint8]]


def no_fetch(node: str, path: str, seal: str, windows: Sequence[Window]) -> NDArray[np.uint8]:
    """The fetch of those who have one node only."""
    raise CheckpointError(f"{path} lies on node {node}, and there is no way to it")


def read_windows(path: Path | str, seal: str, windows: Sequence[Window]) -> NDArray[np.uint8]:
    """The bytes of some windows of a segment on this node, one after another: what stands behind a Fetch.

    Raises CheckpointError where the segment is not, or not any more, the one with this seal.
    """
    out = np.empty(sum(window.bytes for window in windows), np.uint8)
    with _bytes_of(Path(path), seal) as data:
        for window, place in zip(windows, _places(windows), strict=True):
            out[place].reshape(window.sizes)[...] = window.of(data)
    return out


def load(
    slices: Mapping[str, Slice],
    generation: MemoryGeneration,
    node: str,
    fetch: Fetch = no_fetch,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Fills the slices' tensors from memory and returns the generation's facts. Collective over `group`.

    slices: what this rank holds, on any mesh. node: what the survey called the node of this rank.

    Raises CheckpointError on every rank if anything does not fit or can't be read on any; no tensor has then changed.
    Needs host memory for one more copy of this rank's slices.
    """
    peers = Peers(group)
    what = f"{generation} was not loaded"
    planner = ShadowPlanner(str(generation), slices)
    planner.set_up_planner({}, _metadata(generation))
    plan = LoadPlan([])

    def plan_here() -> LoadPlan:
        nonlocal plan
        plan = planner.create_local_plan()
        return LoadPlan([], planner_data=plan.planner_data)

    planner.create_global_plan(peers.attempt(what, plan_here))
    peers.attempt(what, lambda: _read(planner.finish_plan(plan), planner, generation, node, fetch, peers.rank))
    planner.swap()
    return generation.facts


def _metadata(generation: MemoryGeneration) -> Metadata:
    return Metadata(
        {
            name: tensor_metadata(DTYPE_OF_NAME[tensor.dtype], tensor.shape, tensor.boxes)
            for name, tensor in generation.tensors.items()
        }
    )


class _Need(NamedTuple):
    """A window of a segment, and where it goes."""

    window: Window
    target: NDArray[np.uint8]


def _read(
    plan: LoadPlan, planner: ShadowPlanner, generation: MemoryGeneration, node: str, fetch: Fetch, rank: int
) -> None:
    stood = {
        (name, box.offsets): (box, stands)
        for name, tensor in generation.tensors.items()
        for box, stands in tensor.boxes.items()
    }
    by_source: dict[int, list[_Need]] = defaultdict(list)
    for item in plan.items:
        name = item.storage_index.fqn
        box, stands = stood[name, tuple(item.storage_index.offset or ())]
        stand = _nearest(stands, generation.sources, node, rank)
        window = _window(item, box, stand.start, ELEMENT_BYTES[generation.tensors[name].dtype])
        by_source[stand.source].append(_Need(window, _as_bytes(planner.resolve_tensor(item))))
    for number, needs in by_source.items():
        _read_source(generation.sources[number], needs, node, fetch)


def _nearest(stands: Sequence[Stands], sources: Sequence[Held], node: str, rank: int) -> Stands:
    """On this rank's node if it is there, else anywhere, so that ranks ask different nodes."""
    here = [stand for stand in stands if sources[stand.source].node == node]
    return here[0] if here else stands[rank % len(stands)]


def _window(item: ReadItem, box: Box, start: int, element: int) -> Window:
    """The bytes that a read wants of a rectangle whose elements have `element` bytes; a scalar has one dimension."""

    def in_bytes(counts: Sequence[int], scalar: int) -> tuple[int, ...]:
        counts = tuple(counts) or (scalar,)
        return (*counts[:-1], counts[-1] * element)

    return Window(start, in_bytes(box.sizes, 1), in_bytes(item.storage_offsets, 0), in_bytes(item.lengths, 1))


def _as_bytes(target: torch.Tensor) -> NDArray[np.uint8]:
    """A part of a shadow buffer, whose last dimension is dense, as bytes."""
    bytes_of: NDArray[np.uint8] = (target if target.dim() else target.unsqueeze(0)).view(torch.uint8).numpy()
    return bytes_of


def _read_source(held: Held, needs: list[_Need], node: str, fetch: Fetch) -> None:
    """Fills the targets of one segment's windows."""
    seal = held.head.seal
    if held.node == node:
        with _bytes_of(Path(held.path), seal) as data:
            for need in needs:
                need.target[...] = need.window.of(data)
        return
    for some in _batches([part for need in needs for part in _split(need)]):
        windows = [need.window for need in some]
        data = fetch(held.node, held.path, seal, windows)
        if len(data) != sum(window.bytes for window in windows):
            raise CheckpointError(f"{held}: {len(data)} bytes came, not those that were asked for")
        for need, place in zip(some, _places(windows), strict=True):
            need.target[...] = data[place].reshape(need.window.sizes)


def _split(need: _Need) -> Iterator[_Need]:
    """A large window as several, cut along its first dimension."""
    window, target = need
    rows = max(1, FETCH_BYTES * window.sizes[0] // max(1, window.bytes))
    for first in range(0, window.sizes[0], rows):
        count = min(rows, window.sizes[0] - first)
        offsets, sizes = (window.offsets[0] + first, *window.offsets[1:]), (count, *window.sizes[1:])
        yield _Need(window._replace(offsets=offsets, sizes=sizes), target[first : first + count])


def _batches(needs: Sequence[_Need]) -> Iterator[list[_Need]]:
    """Runs of windows of about FETCH_BYTES."""
    batch: list[_Need] = []
    room = FETCH_BYTES
    for need in needs:
        if batch and need.window.bytes > room:
            yield batch
            batch, room = [], FETCH_BYTES
        batch.append(need)
        room -= need.window.bytes
    if batch:
        yield batch


def _places(windows: Sequence[Window]) -> Iterator[slice]:
    """Where each window stands when their bytes are laid end to end."""
    at = 0
    for window in windows:
        yield slice(at, at + window.bytes)
        at += window.bytes


@contextlib.contextmanager
def _bytes_of(path: Path, seal: str) -> Iterator[NDArray[np.uint8]]:
    """A segment's bytes, mapped. Raises CheckpointError unless it has this seal before and after."""
    with mapped(path) as view:
        _check_seal(path, view, seal)
        yield np.frombuffer(view, np.uint8)
        _check_seal(path, view, seal)


def _check_seal(path: Path, view: mmap.mmap, seal: str) -> None:
    if read_head(path, view).seal != seal:
        raise CheckpointError(f"{path}: it has been written again since it was chosen")
