"""Less memory for more work: parts of a block that run again in backward instead of keeping what they made.

A region is a function of some tensors whose output some consumer keeps for its own backward, as a linear layer keeps its
input. Usually both sides keep: the region what is inside, the consumer the output. Here neither does:

    forward    x ──region──> y ──consumer──> z          kept: x
    backward   consumer asks for y: the region runs again, now recording; the consumer uses y;
               dy arrives at the region: it goes back through what was recorded, and frees it

So a region runs twice, never three times, and its output costs nothing between. A whole block is a region, too, whose
output nobody keeps (Chen et al., arXiv 1604.06174). It works because the same function of the same input gives the same
bits: dropout is keyed by position, and collectives inside run again in the same order on all their ranks.

torch hands every tensor that some backward keeps to the pack hook that is active, and asks the unpack hook for it later:
`Keep` is that pair of hooks for one pass of one block. It also sends what is kept to the host (`raytron.parallel.offload`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from raytron.parallel.offload import Parked


class _Again:
    """A tensor that is made again when backward asks for it."""

    def __init__(self, keep: Keep, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]):
        self.keep, self.function = keep, function
        self.inputs = [(keep.pack(x), x.requires_grad) for x in inputs]
        self.recorded: tuple[list[Tensor], Tensor] | None = None

    def record(self) -> tuple[list[Tensor], Tensor]:
        """The region's inputs, as leaves, and its output with the graph between them."""
        if self.recorded is None:
            inputs = [self.keep.unpack(x).detach().requires_grad_(needs) for x, needs in self.inputs]
            with torch.enable_grad():
                self.recorded = inputs, self.function(*inputs)
        return self.recorded

    def tensor(self) -> Tensor:
        """The output alone; nothing is recorded for what has no inputs, such as a mask."""
        return self.record()[1].detach() if self.inputs else self.function()


class _View(NamedTuple):
    """A tensor in the storage of another one that is made again; as made, the two lie alike."""

    again: _Again
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        return self.again.tensor().as_strided(self.size, self.stride, self.offset)


class _Region(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, again: _Again, *inputs: Tensor) -> Tensor:
        ctx.again = again
        return again.function(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        inputs, out = ctx.again.record()
        ctx.again.recorded = None
        torch.autograd.backward(out, dy)
        return None, *(x.grad for x in inputs)


class Keep:
    """What one pass of one block keeps: everything, without arguments. A context manager around the pass."""

    def __init__(self, parts: frozenset[str] = frozenset(), parked: Parked | None = None):
        """parts: names of the regions that run again. parked: where what is kept goes, if not nowhere."""
        self.parts, self.parked = parts, parked
        self._again: dict[StorageWeakRef, tuple[torch.dtype, _Again]] = {}
        self._hooks: torch.autograd.graph.saved_tensors_hooks | None = None

    def region(self, part: str, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """function(*inputs); it runs again in backward where `part` is among the parts."""
        if part not in self.parts:
            return function(*inputs)
        again = _Again(self, function, inputs)
        out: Tensor = _Region.apply(again, *inputs)  # type: ignore[no-untyped-call]
        return self._remember(out, again)

    def constant(self, part: str, function: Callable[[], Tensor]) -> Tensor:
        """function(), a tensor without a gradient; it is made again in backward where `part` is among the parts."""
        if part not in self.parts:
            return function()
        return self._remember(function(), _Again(self, function, ()))

    def _remember(self, out: Tensor, again: _Again) -> Tensor:
        self._again[_storage(out)] = out.dtype, again
        return out

    def pack(self, x: Tensor) -> Any:
        """What stands for a tensor until backward asks for it."""
        known = self._again.get(_storage(x))
        if known is not None and known[0] == x.dtype:
            return _View(known[1], x.shape, x.stride(), int(x.storage_offset()))
        parked = self.parked.put(x) if self.parked is not None else None
        return x.detach() if parked is None else parked  # detached: else a node would keep itself alive by its output

    def unpack(self, kept: Any) -> Tensor:
        """The way back of `pack`."""
        if isinstance(kept, Tensor):
            return kept
        out: Tensor = kept.tensor()
        return out

    def __enter__(self) -> Keep:
        if self.parts or self.parked is not None:
            self._hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)
            self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._hooks is not None:
            self._hooks.__exit__(*exception)
            self._hooks = None
            self._again.clear()


EVERYTHING = Keep()


def _storage(x: Tensor) -> StorageWeakRef:
    return StorageWeakRef(x.untyped_storage())  # type: ignore[no-untyped-call]
