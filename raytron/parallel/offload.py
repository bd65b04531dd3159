"""Activations wait in host memory: out while the forward goes on, back one block ahead of the backward.

    forward    block 0      block 1      block 2      ...        copies leave on a stream of their own;
                  └─ out 0 ────┴─ out 1 ────┴─ out 2             at most two blocks' copies are under way
    backward   ...      block 2      block 1      block 0        a block's first question for a tensor brings all of the
                  in 2 ─┘  in 1 ─┘      in 0 ─┘                  block's, and starts those of the block before it

What is moved is a storage, once, however many views of it are kept; a view is rebuilt on the way back. Parameters, small
tensors and tables that all blocks share stay. On a CPU the same happens with an ordinary copy, which saves nothing and
shows that it works. (The streams of a GPU are written and not run yet.)
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from raytron.parallel.parameter import Param

IN_FLIGHT = 2  # blocks whose copies to the host may be under way at once


class Offload:
    """The way to host memory of one rank. `smallest`: bytes of a storage that is worth moving."""

    def __init__(self, device: torch.device, smallest: int):
        self.device, self.smallest = device, smallest
        self.stream: Any = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._leaving: deque[list[tuple[Any, Tensor]]] = deque()

    def block(self, previous: Parked | None, stay: Iterable[Tensor]) -> Parked:
        """The place for what the next block keeps. `previous`: of the block before it in the same pass. `stay`: tables
        that are not moved."""
        self.settle(IN_FLIGHT - 1)
        if self.stream is not None:
            self._leaving.append([])
        return Parked(self, previous, stay)

    def settle(self, blocks: int) -> None:
        """Lets go of what has left, but for the youngest `blocks`; the device waits for it, the host does not."""
        while len(self._leaving) > blocks:
            for left, _ in self._leaving.popleft():
                torch.cuda.current_stream(self.device).wait_event(left)

    def out(self, source: Tensor) -> Tensor:
        """Starts copying bytes to the host; they stay where they are until they have left."""
        if self.stream is None:
            return source.clone()
        host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            host.copy_(source, non_blocking=True)
        self._leaving[-1].append((self.stream.record_event(), source))
        return host

    def back(self, host: Tensor) -> tuple[Tensor, Any]:
        """Starts copying bytes from the host: where they will be, and what to wait for."""
        if self.stream is None:
            return host.clone(), None
        here = torch.empty(host.shape, dtype=host.dtype, device=self.device)
        here.record_stream(self.stream)  # whoever never asks for it may let go of it before it is here
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            here.copy_(host, non_blocking=True)
        return here, self.stream.record_event()


class _Storage:
    """The bytes of one storage, on the host and, when they are wanted, back on the device."""

    def __init__(self, offload: Offload, source: Tensor):
        self.offload = offload
        self.host: Tensor | None = offload.out(source)
        self.here: Tensor | None = None
        self.arrived: Any = None

    def fetch(self) -> None:
        if self.host is not None:
            self.here, self.arrived = self.offload.back(self.host)
            self.host = None

    def wait(self) -> Tensor:
        self.fetch()
        if self.arrived is not None:
            torch.cuda.current_stream(self.offload.device).wait_event(self.arrived)
            self.arrived = None
        assert self.here is not None
        return self.here


class _Ticket:
    """A tensor whose storage is away."""

    def __init__(self, parked: Parked, storage: _Storage, x: Tensor):
        self.parked, self.storage = parked, storage
        self.dtype, self.offset, self.shape, self.stride = x.dtype, x.storage_offset(), x.shape, x.stride()

    def tensor(self) -> Tensor:
        self.parked.fetch()
        storage = self.storage.wait().untyped_storage()
        made = torch.empty(0, dtype=self.dtype, device=storage.device)
        return made.set_(storage, self.offset, self.shape, self.stride)


class Parked:
    """What one block of one pass keeps on the host. It lives as long as its tickets do."""

    def __init__(self, offload: Offload, previous: Parked | None, stay: Iterable[Tensor]):
        self.offload, self.previous = offload, previous
        self._stay = {x.untyped_storage().data_ptr() for x in stay}
        self._storages: weakref.WeakValueDictionary[StorageWeakRef, _Storage] = weakref.WeakValueDictionary()

    def put(self, x: Tensor) -> _Ticket | None:
        """Sends a tensor's storage off; None for what stays."""
        source = x.untyped_storage()
        if isinstance(x, Param) or source.nbytes() < self.offload.smallest or source.data_ptr() in self._stay:
            return None
        key = StorageWeakRef(source)  # type: ignore[no-untyped-call]
        storage = self._storages.get(key)
        if storage is None:
            all_bytes = torch.empty(0, dtype=torch.uint8, device=x.device).set_(source)
            storage = _Storage(self.offload, all_bytes)
            self._storages[key] = storage
        return _Ticket(self, storage, x)

    def fetch(self) -> None:
        """Brings all of this block back, and starts bringing the block before it."""
        self.offload.settle(0)
        self._bring()
        if self.previous is not None:
            self.previous._bring()
            self.previous = None

    def _bring(self) -> None:
        for storage in list(self._storages.values()):
            storage.fetch()
