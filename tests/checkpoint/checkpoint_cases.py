"""Tensors, cuts and damage for the tests of checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from raytron.parallel.layout import Slice, chunk


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """A small state: several dtypes, a scalar, an empty tensor, one that 4 ranks can't share evenly."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "model.layers.0.weight": normal(12, 10),
        "model.layers.1.weight": normal(12, 10),
        "model.norm": normal(10).bfloat16(),
        "model.gate_up": normal(2, 6, 4),
        "optimizer.moment": normal(5, 3).double(),
        "optimizer.step": torch.tensor(7 + seed),
        "optimizer.none": torch.empty(0, 4),
        "rng": torch.arange(9, dtype=torch.uint8) + seed,
    }


def cut(whole: torch.Tensor, dim: int, parts: int, part: int, *, blank: bool = False) -> Slice:
    """Part of a tensor, cut along `dim`, in storage of its own that is not contiguous; blank: filled with ones."""
    start, length = chunk(whole.shape[dim], parts, part)
    piece = whole.narrow(dim, start, length)
    store = torch.ones(*(size + 1 for size in piece.shape), dtype=whole.dtype)
    view = store[tuple(slice(1, None) for _ in piece.shape)]
    if not blank:
        view.copy_(piece)
    return Slice(tuple(whole.shape), tuple(start if d == dim else 0 for d in range(whole.dim())), view)


def share(whole: Mapping[str, torch.Tensor], ranks: int, rank: int, *, blank: bool = False) -> dict[str, Slice]:
    """What a rank of `ranks` holds: even names cut on the first dimension, odd ones on the last, scalars replicated."""
    held = {}
    for index, (name, tensor) in enumerate(whole.items()):
        if tensor.dim() == 0:
            held[name] = Slice((), (), torch.zeros_like(tensor) if blank else tensor.clone())
        else:
            held[name] = cut(tensor, 0 if index % 2 == 0 else tensor.dim() - 1, ranks, rank, blank=blank)
    return held


def wrong(whole: Mapping[str, torch.Tensor], held: Mapping[str, Slice]) -> list[str]:
    """Names whose slices differ from the tensors that they are part of."""
    return [
        name
        for name, piece in held.items()
        if not torch.equal(
            piece.tensor,
            whole[name][tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.tensor.shape, strict=True))],
        )
    ]


def shards(generation: Path) -> list[Path]:
    """The safetensors files of a generation."""
    return sorted(generation.glob("*.safetensors"))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip_bit(path: Path, at: int = -5) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def zero_page(path: Path) -> None:
    data = bytearray(path.read_bytes())
    size = min(64, len(data))
    data[-size:] = bytes(size)
    path.write_bytes(data)


def remove(path: Path) -> None:
    path.unlink()


def make_link(path: Path) -> None:
    elsewhere = path.parent.parent / f"elsewhere-{path.name}"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


DAMAGE: Iterable[Callable[[Path], None]] = (truncate, flip_bit, zero_page, remove, make_link)
