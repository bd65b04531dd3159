"""Names of weights here and in Hugging Face's models: one two-way table for each family.

A row pairs one parameter of ours with one or several of theirs, and says how the one is packed from the others. `{i}` is
a layer. Ours are described in `raytron.model.attention` and `mlp`; theirs are matrices (out, in), in GPT-2 (in, out).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from raytron.config import ModelConfig

Unpack = Callable[[Tensor, ModelConfig], list[Tensor]]
Pack = Callable[[list[Tensor], ModelConfig], Tensor]


class Row(NamedTuple):
    ours: str
    theirs: tuple[str, ...]
    unpack: Unpack  # ours -> theirs
    pack: Pack  # theirs -> ours


def _same(ours: str, theirs: str) -> Row:
    return Row(ours, (theirs,), lambda w, m: [w], lambda ws, m: ws[0])


def _transposed(ours: str, theirs: str) -> Row:
    return Row(ours, (theirs,), lambda w, m: [w.t()], lambda ws, m: ws[0].t())


def _cut(w: Tensor, heads: int, model: ModelConfig) -> Tensor:
    """(heads·h, ...) as (heads, h, ...)."""
    return w.reshape(heads, model.dim_per_head, *w.shape[1:])


def _heads(ours: str, theirs: str) -> Row:
    """(H, h, ...) as (H·h, ...)."""
    return Row(ours, (theirs,), lambda w, m: [w.flatten(0, 1)], lambda ws, m: _cut(ws[0], m.heads, m))


def _key_value(ours: str, keys: str, values: str) -> Row:
    """(KV, 2, h, ...) as two of (KV·h, ...)."""
    return Row(
        ours,
        (keys, values),
        lambda w, m: [w[:, 0].flatten(0, 1), w[:, 1].flatten(0, 1)],
        lambda ws, m: torch.stack([_cut(w, m.num_kv_heads, m) for w in ws], 1),
    )


def _gate_up(ours: str, gate: str, up: str) -> Row:
    """(2, F, D) as two of (F, D)."""
    return Row(ours, (gate, up), lambda w, m: [w[0], w[1]], lambda ws, m: torch.stack(ws))


_LAYER = "model.layers.{i}."
LLAMA = [  # also Mistral, Qwen2 (biases) and Qwen3 (QK norms)
    _same("embed.weight", "model.embed_tokens.weight"),
    _same("layers.{i}.attention.norm.weight", _LAYER + "input_layernorm.weight"),
    _heads("layers.{i}.attention.q.weight", _LAYER + "self_attn.q_proj.weight"),
    _heads("layers.{i}.attention.q.bias", _LAYER + "self_attn.q_proj.bias"),
    _key_value(
        "layers.{i}.attention.kv.weight", _LAYER + "self_attn.k_proj.weight", _LAYER + "self_attn.v_proj.weight"
    ),
    _key_value("layers.{i}.attention.kv.bias", _LAYER + "self_attn.k_proj.bias", _LAYER + "self_attn.v_proj.bias"),
    _same("layers.{i}.attention.q_norm.weight", _LAYER + "self_attn.q_norm.weight"),
    _same("layers.{i}.attention.k_norm.weight", _LAYER + "self_attn.k_norm.weight"),
    _same("layers.{i}.attention.out.weight", _LAYER + "self_attn.o_proj.weight"),
    _same("layers.{i}.attention.out.bias", _LAYER + "self_attn.o_proj.bias"),
    _same("layers.{i}.mlp.norm.weight", _LAYER + "post_attention_layernorm.weight"),
    _gate_up("layers.{i}.mlp.up.weight", _LAYER + "mlp.gate_proj.weight", _LAYER + "mlp.up_proj.weight"),
    _gate_up("layers.{i}.mlp.up.bias", _LAYER + "mlp.gate_proj.bias", _LAYER + "mlp.up_proj.bias"),
    _same("layers.{i}.mlp.down.weight", _LAYER + "mlp.down_proj.weight"),
    _same("layers.{i}.mlp.down.bias", _LAYER + "mlp.down_proj.bias"),
    _same("norm.weight", "model.norm.weight"),
    _same("head.weight", "lm_head.weight"),
]


def _gpt2_qkv_unpack(q: Tensor, kv: Tensor) -> Tensor:
    """(H, h, ...) and (H, 2, h, ...) as (3·H·h, ...)."""
    return torch.cat([q.flatten(0, 1), kv[:, 0].flatten(0, 1), kv[:, 1].flatten(0, 1)])


_BLOCK = "transformer.h.{i}."
GPT2 = [
    _same("embed.weight", "transformer.wte.weight"),
    _same("position.weight", "transformer.wpe.weight"),
    _same("layers.{i}.attention.norm.weight", _BLOCK + "ln_1.weight"),
    _same("layers.{i}.attention.norm.bias", _BLOCK + "ln_1.bias"),
    _transposed("layers.{i}.attention.out.weight", _BLOCK + "attn.c_proj.weight"),
    _same("layers.{i}.attention.out.bias", _BLOCK + "attn.c_proj.bias"),
    _same("layers.{i}.mlp.norm.weight", _BLOCK + "ln_2.weight"),
    _same("layers.{i}.mlp.norm.bias", _BLOCK + "ln_2.bias"),
    _transposed("layers.{i}.mlp.up.weight", _BLOCK + "mlp.c_fc.weight"),
    _same("layers.{i}.mlp.up.bias", _BLOCK + "mlp.c_fc.bias"),
    _transposed("layers.{i}.mlp.down.weight", _BLOCK + "mlp.c_proj.weight"),
    _same("layers.{i}.mlp.down.bias", _BLOCK + "mlp.c_proj.bias"),
    _same("norm.weight", "transformer.ln_f.weight"),
    _same("norm.bias", "transformer.ln_f.bias"),
]


def to_hugging_face(weights: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Our whole weights under Hugging Face's names: GPT-2's where positions are learned, else Llama's."""
    gpt2 = model.positions == "learned"
    out: dict[str, Tensor] = {}
    for row in GPT2 if gpt2 else LLAMA:
        for index in _layers(row, model):
            name = row.ours.format(i=index)
            if name in weights:
                parts = row.unpack(weights[name], model)
                out.update((theirs.format(i=index), part) for theirs, part in zip(row.theirs, parts, strict=True))
    if gpt2:
        for index in range(model.layers):
            ours, theirs = f"layers.{index}.attention.", f"transformer.h.{index}.attn.c_attn."
            out[theirs + "weight"] = _gpt2_qkv_unpack(weights[ours + "q.weight"], weights[ours + "kv.weight"]).t()
            out[theirs + "bias"] = _gpt2_qkv_unpack(weights[ours + "q.bias"], weights[ours + "kv.bias"])
    if model.tied_embeddings:
        out["lm_head.weight"] = weights["embed.weight"]
    return out


def _layers(row: Row, model: ModelConfig) -> Sequence[int]:
    return range(model.layers) if "{i}" in row.ours else (0,)
