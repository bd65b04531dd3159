"""Flash attention on a GPU (Dao, arXiv 2307.08691), by torch's own kernels below scaled_dot_product_attention.

They return the log-sum-exp that tiles are merged by, take grouped queries as they are, and know bands: a query sees `left`
keys before its own and `right` after it, the last query's own being the last key. So no tile needs a mask.

A batch of packed documents is many small tiles on the diagonal. Where they cover it all, one call does them all: tokens lie
side by side, (B·S,H,h), and an array says where documents end.

    tiles    ■ · · · ·      pack   lengths 2, 3
             ■ ■ · · ·
             · · ■ · ·
             · · ■ ■ ·
             · · ■ ■ ■

Dropout is never the kernel's own, so it needs no random state. Not run yet: written by the operators' declarations, and
tested on a CPU with a formula in their place.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from raytron.kernels.tiles import Tile

_forward, _backward = torch.ops.aten._flash_attention_forward, torch.ops.aten._flash_attention_backward


def takes(q: Tensor) -> bool:
    """Whether these kernels take the heads of q (B,H,S,h)."""
    return q.is_cuda and q.dtype != torch.float32 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def forward(q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """The output (B,H,S,h) and log-sum-exp (B,H,S), float32, of one tile: q (B,H,S,h), k and v (B,KV,T,h)."""
    left, right = tile.band
    out, lse, *_ = _forward(
        *(x.transpose(1, 2) for x in (q, k, v)), None, None, tile.height, tile.width, 0.0, False, False,
        window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return out.transpose(1, 2), lse


def backward(
    dout: Tensor, q: Tensor, out: Tensor, lse: Tensor, k: Tensor, v: Tensor, tile: Tile
) -> tuple[Tensor, Tensor, Tensor]:
    left, right = tile.band
    random = torch.zeros(2, dtype=torch.uint64, device=q.device)
    dq, dk, dv = _backward(
        *(x.transpose(1, 2) for x in (dout, q, k, v, out)), lse.contiguous(), None, None, tile.height, tile.width,
        0.0, False, random, random, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


class Pack(NamedTuple):
    """Documents side by side that cover a whole batch, each of which sees itself: what one call of a GPU does at once."""

    lengths: tuple[int, ...]  # of the documents, row by row
    left: int  # keys that a query sees before its own; -1 for no limit


def packed(q: Tensor, tiles: Sequence[Tile]) -> tuple[Pack | None, Sequence[Tile]]:
    """What of the tiles a GPU does as one pack, and the rest."""
    own = sorted((tile for tile in tiles if tile.lead == 0 and tile.queries == tile.keys), key=lambda tile: tile[:2])
    at = (0, 0)  # the row and the query that the next document begins with
    for tile in own:
        if (tile.rows[0], tile.queries[0]) != at or tile.rows[1] != tile.rows[0] + 1:
            return None, tiles
        at = (at[0], tile.queries[1]) if tile.queries[1] < q.shape[2] else (at[0] + 1, 0)
    if len(own) < 2 or at != (q.shape[0], 0):
        return None, tiles
    window = max(tile.window or 0 for tile in own)
    chosen = set(own)
    return Pack(tuple(tile.height for tile in own), window - 1), [tile for tile in tiles if tile not in chosen]


def pack_forward(q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> tuple[Tensor, Tensor]:
    ends, longest = _ends(pack.lengths, q.device), max(pack.lengths)
    out, lse, *_ = _forward(
        *(_side_by_side(x) for x in (q, k, v)), ends, ends, longest, longest, 0.0, False, False,
        window_size_left=pack.left, window_size_right=0,
    )  # fmt: skip
    return _apart(out, q), lse.view(q.shape[1], q.shape[0], q.shape[2]).transpose(0, 1)


def pack_backward(
    dout: Tensor, q: Tensor, out: Tensor, lse: Tensor, k: Tensor, v: Tensor, pack: Pack
) -> tuple[Tensor, Tensor, Tensor]:
    ends, longest = _ends(pack.lengths, q.device), max(pack.lengths)
    random = torch.zeros(2, dtype=torch.uint64, device=q.device)
    dq, dk, dv = _backward(
        *(_side_by_side(x) for x in (dout, q, k, v, out)), lse.transpose(0, 1).flatten(1).contiguous(), ends, ends,
        longest, longest, 0.0, False, random, random, window_size_left=pack.left, window_size_right=0,
    )  # fmt: skip
    return _apart(dq, q), _apart(dk, k), _apart(dv, v)


@functools.lru_cache(64)
def _ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where documents of these lengths begin, and the end."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def _side_by_side(x: Tensor) -> Tensor:
    """(B,H,S,h) -> (B·S,H,h)."""
    return x.transpose(1, 2).flatten(0, 1)


def _apart(x: Tensor, like: Tensor) -> Tensor:
    """(B·S,H,h) -> (B,H,S,h), the shape of `like`."""
    return x.view(like.shape[0], like.shape[2], *x.shape[1:]).transpose(1, 2)
