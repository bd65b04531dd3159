"""How data-parallel ranks share out parameters: who owns which part of each, and how parts travel side by side.

The share of a parameter is a chunk along its widest local dimension, so an owned tensor is always one rectangle of the
global one: what a checkpoint wants. A collective needs the chunks of one owner side by side, so tensors are packed before
they are sent and unpacked where they arrive:

    parameters   A (4, 2)   B (3,)              packed (owners, size)
    owners 2     0 0        0 0 1               owner 0:  A A A A B B
                 0 0                            owner 1:  A A A A B .      the last is padding
                 1 1
                 1 1
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raytron.parallel.layout import Slice, chunk
from raytron.parallel.mesh import Mesh
from raytron.parallel.parameter import Param


@dataclass
class Owned:
    """The share of one parameter that this rank's optimizer updates."""

    param: Param
    dim: int  # along which dp cuts the local tensor
    start: int  # of the share along `dim`, in the local tensor
    length: int
    gradient: Tensor  # fp32, the share's shape, where the optimizer's state shall live; valid after `finish`
    counted: bool  # this rank is the one that counts the share in the gradient norm
    value: Tensor | None = None  # the share in the parameter's type, where the parameter itself comes and goes (ZeRO 3)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.gradient.shape)

    def view(self, local: Tensor) -> Tensor:
        """The owned share of a tensor of the parameter's local shape."""
        return local.narrow(self.dim, self.start, self.length)

    def master(self) -> Tensor:
        """The fp32 share that the optimizer updates: what is there already where that is fp32, apart from other shares and
        on the gradient's device, else a copy."""
        share = self.view(self.param.detach()) if self.value is None else self.value
        alone = self.value is not None or self.length == self.param.shape[self.dim]
        if share.dtype == torch.float32 and alone and share.device == self.gradient.device:
            return share
        made = share.to(self.gradient.device, torch.float32, copy=True).contiguous()
        return made.pin_memory() if self.gradient.is_pinned() else made

    def slice(self, share: Tensor, mesh: Mesh) -> Slice:
        """A tensor of the share's shape as a Slice of the global parameter, without padding."""
        layout = self.param.cut
        offsets, sizes = layout.box(mesh.place)
        starts = [self.start if dim == self.dim else 0 for dim in range(len(sizes))]
        for dim, (size, start) in enumerate(zip(sizes, starts, strict=True)):
            share = share.narrow(dim, 0, max(0, min(share.shape[dim], size - start)))
        return Slice(layout.shape, tuple(map(operator.add, offsets, starts)), share)


class Shares:
    """The cut of some parameters over `owners` ranks, of which this is number `index`. Sizes count elements."""

    def __init__(self, params: Sequence[Param], owners: int, index: int):
        self.params, self.owners, self.index = list(params), owners, index
        self.dims = [_widest(param.shape) for param in self.params]
        self.offsets, self.size = _offsets(
            param.numel() // param.shape[dim] * -(-param.shape[dim] // owners)
            for param, dim in zip(self.params, self.dims, strict=True)
        )
        self.padded = any(param.shape[dim] % owners for param, dim in zip(self.params, self.dims, strict=True))

    def bounds(self, number: int, owner: int) -> tuple[int, int]:
        """(start, length) of an owner's share of parameter `number` along its dimension."""
        return chunk(self.params[number].shape[self.dims[number]], self.owners, owner)

    def piece(self, flat: Tensor, number: int, owner: int | None = None) -> Tensor:
        """Parameter `number`'s part of an owner's packed share (size,), in its shape; of this rank's without `owner`."""
        length = self.bounds(number, self.index if owner is None else owner)[1]
        shape, dim, offset = self.params[number].shape, self.dims[number], self.offsets[number]
        shape = torch.Size((*shape[:dim], length, *shape[dim + 1 :]))
        return flat[offset : offset + math.prod(shape)].view(shape)

    def part(self, tensor: Tensor, number: int, owner: int | None = None) -> Tensor:
        """An owner's share of a tensor of parameter `number`'s shape; this rank's without `owner`."""
        return tensor.narrow(self.dims[number], *self.bounds(number, self.index if owner is None else owner))

    def pack(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """(owners, size): tensors of the parameters' shapes with all that belongs to one owner side by side."""
        make = torch.zeros if self.padded else torch.empty
        packed = make(self.owners, self.size, dtype=dtype, device=tensors[0].device)
        torch._foreach_copy_(*self._matched(packed, tensors))
        return packed

    def unpack(self, packed: Tensor, tensors: Sequence[Tensor]) -> None:
        """The way back of `pack`."""
        pieces, parts = self._matched(packed, tensors)
        torch._foreach_copy_(parts, pieces)

    def _matched(self, packed: Tensor, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Views into `packed`, and of the tensors, that hold the same: one of all owners where their shares are equally
        long, so that many owners take no more copies than few."""
        pieces, parts = [], []
        for number, tensor in enumerate(tensors):
            dim, offset = self.dims[number], self.offsets[number]
            if tensor.shape[dim] % self.owners:
                for owner in range(self.owners):
                    pieces.append(self.piece(packed[owner], number, owner))
                    parts.append(self.part(tensor, number, owner))
                continue
            shape = tensor.shape
            part = tensor.view(*shape[:dim], self.owners, -1, *shape[dim + 1 :]).movedim(dim, 0)
            pieces.append(packed[:, offset : offset + part[0].numel()].view(part.shape))
            parts.append(part)
        return pieces, parts


def keep_share(param: Param, owners: int, index: int) -> None:
    """Frees a new parameter but for the share of one of its owners, so that a rank never has room for the whole model."""
    param.kept = Shares([param], owners, index).part(param.detach(), 0).clone()
    param.untyped_storage().resize_(0)


def _widest(shape: Sequence[int]) -> int:
    return max(range(len(shape)), key=lambda dim: (shape[dim], -dim))


def _offsets(sizes: Iterable[int]) -> tuple[list[int], int]:
    """Where pieces of these sizes start when laid end to end, and the size of it all."""
    offsets, total = [], 0
    for size in sizes:
        offsets.append(total)
        total += size
    return offsets, total
