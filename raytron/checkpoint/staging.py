"""Host memory that a rank's part of a checkpoint is copied to, so that training goes on while it is written.

    shard    ┌ head ┐┌ tensor ┐┌ tensor ┐┌ tensor ┐     the buffer of a shard is what follows its head, byte for byte
    buffer           └────────────────────────────┘

Buffers are kept from save to save: to touch fresh memory costs more than to copy into it. On CUDA they are pinned, and
copies run on a stream of their own; updates wait for them on the device, the host does not. (That part was not run yet.)
"""

from __future__ import annotations

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
        self._buffers: dict[str, torch.Tensor] = {}
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def copy(self, shards: Sequence[Shard], slices: Mapping[str, Slice]) -> Blocks:
        """Copies what the shards hold; its bytes are those of this moment, whatever becomes of the tensors."""
        for shard in shards:
            if self._stream is None:
                self._fill(shard, slices)
                continue
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                self._fill(shard, slices)
        buffers = {shard.file: self._buffers[shard.file] for shard in shards}
        if self._stream is None:
            return lambda shard: [raw_bytes(buffers[shard.file])]
        copied = self._stream.record_event()
        torch.cuda.current_stream(self.device).wait_event(copied)

        def wait(shard: Shard) -> Iterable[memoryview]:
            copied.synchronize()
            return [raw_bytes(buffers[shard.file])]

        return wait

    def _fill(self, shard: Shard, slices: Mapping[str, Slice]) -> None:
        buffer = self._buffer(shard)
        at = 0
        for offer in shard.offers:
            tensor = slices[offer.name].tensor.detach()
            room = buffer[at : at + offer.bytes].view(tensor.dtype).view(tensor.shape)
            room.copy_(tensor, non_blocking=True)
            at += offer.bytes

    def _buffer(self, shard: Shard) -> torch.Tensor:
        kept = self._buffers.get(shard.file)
        if kept is None or kept.numel() != shard.bytes:
            kept = torch.empty(shard.bytes, dtype=torch.uint8, pin_memory=self._stream is not None)
            self._buffers[shard.file] = kept
        return kept
