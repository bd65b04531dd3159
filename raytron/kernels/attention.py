"""Causal attention, grouped queries included: whole sequences at once, or tile by tile with the log-sum-exp kept.

`causal_attention` is torch's scaled_dot_product_attention, which picks cuDNN or flash attention on a GPU and a flash
kernel on a CPU. A sliding window, documents or keys that come from other ranks leave only some tiles of the scores
(`raytron.kernels.tiles`). A tile gives its output and, for each query, the logarithm ℓ of the sum of its exponentials;
tiles are merged by these (Milakov and Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135):

    ℓ = log(e^ℓ₁ + e^ℓ₂)      o = e^(ℓ₁ − ℓ) o₁ + e^(ℓ₂ − ℓ) o₂

The gradient of a tile needs nothing of the other tiles but the final o and ℓ, since p = e^(s − ℓ):

    dv = pᵀ do      ds = p · (do vᵀ − Σ do·o)      dq = ds k / √h      dk = dsᵀ q / √h

Three kernels do a tile: torch's flash attention on a CPU, flash attention on a GPU in half precision, and the formula
elsewhere and under dropout. `reference` is the formula of the whole.

Shapes: B batch, H query heads, KV key-value heads (H a multiple of KV), S queries, T keys, h head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from raytron.kernels import flash
from raytron.kernels.tiles import Tile, strips

Keep = Callable[[Tile], Tensor]  # dropout: what multiplies the probabilities of a tile, (rows, H, height, width)

STRIP = 512  # queries of a tile that is not a plain rectangle or square: what bounds the size of its mask
_cpu_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (B,H,S,h), k and v (B,KV,S,h) -> (B,H,S,h). A query sees itself and all tokens before it."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def reference(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, keep: Tensor | None = None) -> Tensor:
    """The formula, in float32: softmax(q kᵀ / √h) v over what is `seen` ((S,T) or (B,1,S,T), bool); `keep` (B,H,S,T), if
    given, multiplies the probabilities. q (B,H,S,h), k and v (B,KV,T,h) -> (B,H,S,h)."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])
    probabilities = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    if keep is not None:
        probabilities = probabilities * keep
    return probabilities.to(v.dtype) @ v


def seen_by(length: int, window: int | None = None, documents: Tensor | None = None) -> Tensor:
    """(S,S), or (B,1,S,S) with documents (B,S): whether a query (row) sees a key (column). For small S only."""
    at = torch.arange(length)
    distance = at[:, None] - at[None, :]
    seen = (distance >= 0) & (distance < (window or length))
    if documents is None:
        return seen
    return (seen & (documents[:, :, None] == documents[:, None, :])).unsqueeze(1)


@torch.no_grad()
def add_attention(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[Tile], keep: Keep | None = None
) -> None:
    """Merges the attention of q (B,H,S,h) to k and v (B,KV,T,h) in some tiles into `out` (B,H,S,h) and `lse` (B,H,S), both
    float32; before the first, `out` is 0 and `lse` -∞."""
    pack, tiles = _packed(q, tiles, keep)
    if pack is not None:
        _merge(out, lse, *flash.pack_forward(q, k, v, pack))
    for tile in _pieces(q, tiles, keep):
        part = _forward(_queries(tile, q), _keys(tile, k), _keys(tile, v), tile, keep)
        _merge(_queries(tile, out), _queries(tile, lse), *part)


@torch.no_grad()
def add_gradients(
    gradients: tuple[Tensor, Tensor, Tensor],
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tiles: Sequence[Tile],
    keep: Keep | None = None,
) -> None:
    """Adds to the gradients of q, k and v (float32, of their shapes) what some tiles give; `out` (B,H,S,h) and `lse`
    (B,H,S) are the final ones, of all tiles."""
    dq, dk, dv = gradients
    pack, tiles = _packed(q, tiles, keep)
    if pack is not None:
        for whole, part in zip(gradients, flash.pack_backward(dout, q, out, lse, k, v, pack), strict=True):
            whole.add_(part)
    for tile in _pieces(q, tiles, keep):
        dy, x, y, log_sum = (_queries(tile, whole) for whole in (dout, q, out, lse))
        parts = _backward(dy, x, y, log_sum, _keys(tile, k), _keys(tile, v), tile, keep)
        for whole, part in zip((_queries(tile, dq), _keys(tile, dk), _keys(tile, dv)), parts, strict=True):
            whole.add_(part)


def _merge(whole: Tensor, whole_lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    merged = torch.logaddexp(whole_lse, part_lse)
    whole.mul_((whole_lse - merged).exp_().unsqueeze(-1))
    whole.add_(part * (part_lse - merged).exp_().unsqueeze(-1))
    whole_lse.copy_(merged)


def _queries(tile: Tile, x: Tensor) -> Tensor:
    """A tile's part of a tensor (B, heads, S, ...)."""
    return x[tile.rows[0] : tile.rows[1], :, tile.queries[0] : tile.queries[1]]


def _keys(tile: Tile, x: Tensor) -> Tensor:
    """A tile's part of a tensor (B, heads, T, ...)."""
    return x[tile.rows[0] : tile.rows[1], :, tile.keys[0] : tile.keys[1]]


def _packed(q: Tensor, tiles: Sequence[Tile], keep: Keep | None) -> tuple[flash.Pack | None, Sequence[Tile]]:
    return flash.packed(q, tiles) if keep is None and flash.takes(q) else (None, tiles)


def _pieces(q: Tensor, tiles: Sequence[Tile], keep: Keep | None) -> Iterator[Tile]:
    """The tiles, in strips where the kernel would need a mask of one or the formula its scores."""
    for tile in tiles:
        plain = keep is None and (flash.takes(q) or (not q.is_cuda and (tile.full or tile.square)))
        yield from (tile,) if plain else strips(tile, STRIP)


def _forward(q: Tensor, k: Tensor, v: Tensor, tile: Tile, keep: Keep | None) -> tuple[Tensor, Tensor]:
    """The output (B,H,S,h) and log-sum-exp (B,H,S), float32, of one tile."""
    if keep is not None or (q.is_cuda and not flash.takes(q)):
        return tile_formula(q, k, v, tile, keep)
    if flash.takes(q):
        return flash.forward(q, k, v, tile)
    out, lse = _cpu_flash(q, k, v, 0.0, tile.square, attn_mask=_bias(q, tile))
    return out, lse


def _backward(
    dout: Tensor, q: Tensor, out: Tensor, lse: Tensor, k: Tensor, v: Tensor, tile: Tile, keep: Keep | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v in one tile."""
    if keep is not None or (q.is_cuda and not flash.takes(q)):
        return tile_formula_backward(dout, q, out, lse, k, v, tile, keep)
    if flash.takes(q):
        return flash.backward(dout, q, out, lse, k, v, tile)
    dq, dk, dv = _cpu_flash_backward(dout, q, k, v, out, lse, 0.0, tile.square, attn_mask=_bias(q, tile))
    return dq, dk, dv


def hidden_in(tile: Tile, device: torch.device) -> Tensor | None:
    """(height, width) bool: which keys a query of the tile does not see; None where it sees all."""
    if tile.full:
        return None
    at = torch.arange(max(tile.height, tile.width), device=device)
    distance = at[: tile.height, None] - at[None, : tile.width] + tile.lead
    hidden = distance < 0
    return hidden if tile.window is None else hidden | (distance >= tile.window)


def _bias(q: Tensor, tile: Tile) -> Tensor | None:
    hidden = None if tile.square else hidden_in(tile, q.device)
    return None if hidden is None else torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, -torch.inf)


def tile_formula(q: Tensor, k: Tensor, v: Tensor, tile: Tile, keep: Keep | None = None) -> tuple[Tensor, Tensor]:
    """One tile by the formula: q (B,H,S,h), k and v (B,KV,T,h) -> output (B,H,S,h) and log-sum-exp (B,H,S), float32."""
    scores = _scores(q, k, tile)
    lse = scores.logsumexp(-1)
    probabilities = scores.sub_(lse.unsqueeze(-1)).exp_()
    if keep is not None:
        probabilities *= keep(tile)
    out = _folded(probabilities, k) @ v.float()
    return out.view(q.shape), lse


def tile_formula_backward(
    dout: Tensor, q: Tensor, out: Tensor, lse: Tensor, k: Tensor, v: Tensor, tile: Tile, keep: Keep | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of one tile by the formula, float32; `out` and `lse` are those of all tiles."""
    probabilities = _scores(q, k, tile).sub_(lse.unsqueeze(-1)).exp_()
    dout, folded = dout.float(), _folded(dout.float(), k)
    kept = probabilities if keep is None else probabilities * keep(tile)
    dv = _folded(kept, k).transpose(-1, -2) @ folded
    dp = (folded @ v.float().transpose(-1, -2)).view(kept.shape)
    delta = (dout * out.float()).sum(-1, keepdim=True)
    ds = (kept * dp).sub_(probabilities * delta).div_(math.sqrt(q.shape[-1]))
    dq = (_folded(ds, k) @ k.float()).view(q.shape)
    return dq, _folded(ds, k).transpose(-1, -2) @ _folded(q.float(), k), dv


def _scores(q: Tensor, k: Tensor, tile: Tile) -> Tensor:
    """(B,H,S,T) float32, -∞ where a query does not see a key."""
    scores = (_folded(q.float(), k) @ k.float().transpose(-1, -2)).div_(math.sqrt(q.shape[-1]))
    scores = scores.view(*q.shape[:3], k.shape[2])
    hidden = hidden_in(tile, q.device)
    return scores if hidden is None else scores.masked_fill_(hidden, -torch.inf)


def _folded(x: Tensor, k: Tensor) -> Tensor:
    """(B,H,S,n) as (B,KV,H/KV·S,n): the queries that share a KV head side by side, so that it need not be repeated."""
    return x.reshape(x.shape[0], k.shape[1], -1, x.shape[-1])
