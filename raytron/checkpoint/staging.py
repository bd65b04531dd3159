"""Host memory that a rank's part of a checkpoint is copied to, so that training goes on while it is written.

    shard    ┌ head ┐┌ tensor ┐┌ tensor ┐┌ tensor ┐     the buffer of a shard is what follows its head, byte for byte
    buffer           └────────────────────────────┘

The state stays as it is until the next update, so the copy runs beside the forward and backward before it: in the thread
that will write it, or on CUDA on a stream of its own into pinned memory. Whoever is about to change the state calls `hold`.
(The part for CUDA is written for real and was not run yet.) Buffers are kept from save to save: to touch fresh memory costs
more than to copy into it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from raytron.checkpoint.deal import Shard
from raytron.checkpoint.safetensors_file import raw_bytes
from raytron.parallel.layout import Slice

Blocks = Callable[[Shard], Iterable[memoryview]]  # the bytes of a shard after its head


class Staging:
    """One rank's buffers, by shard."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream: Any = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._buffers: dict[str, torch.Tensor] = {}

    def buffer(self, shard: Shard) -> torch.Tensor:
        """The bytes of a shard's tensors."""
        kept = self._buffers.get(shard.file)
        if kept is None or kept.numel() != shard.bytes:
            kept = torch.empty(shard.bytes, dtype=torch.uint8, pin_memory=self.stream is not None)
            self._buffers[shard.file] = kept
        return kept

    def copy(self, shards: Sequence[Shard], slices: Mapping[str, Slice]) -> Copy:
        """Begins to copy what the shards hold."""
        return Copy(self, shards, slices)


class Copy:
    """A copy under way. A thread calls `run`, then `blocks`; the thread that trains calls `hold`."""

    def __init__(self, staging: Staging, shards: Sequence[Shard], slices: Mapping[str, Slice]):
        self._staging, self._shards = staging, shards
        self._slices: Mapping[str, Slice] | None = slices
        self._done = threading.Event()
        self._copied: Any = None
        if staging.stream is not None:
            staging.stream.wait_stream(torch.cuda.current_stream(staging.device))
            with torch.cuda.stream(staging.stream):
                self._fill()
            self._copied = staging.stream.record_event()

    def run(self) -> None:
        """Returns when everything is copied; until then the tensors must not change."""
        try:
            if self._copied is not None:
                self._copied.synchronize()
            else:
                self._fill()
        finally:
            self._slices = None
            self._done.set()

    def hold(self) -> None:
        """Before the tensors change: waits for the copy, on CUDA by the device alone."""
        if self._copied is not None:
            torch.cuda.current_stream(self._staging.device).wait_event(self._copied)
        else:
            self._done.wait()

    def blocks(self, shard: Shard) -> Iterable[memoryview]:
        """The bytes of a shard after its head."""
        return [raw_bytes(self._staging.buffer(shard))]

    @torch.no_grad()
    def _fill(self) -> None:
        assert self._slices is not None
        for shard in self._shards:
            buffer, at = self._staging.buffer(shard), 0
            for offer in shard.offers:
                tensor = self._slices[offer.name].tensor.detach()
                room = buffer[at : at + offer.bytes].view(tensor.dtype).view(tensor.shape)
                room.copy_(tensor, non_blocking=True)
                at += offer.bytes
