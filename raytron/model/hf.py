"""Names of weights here and in Hugging Face's models: one two-way table for each family.

A row pairs one parameter of ours with one or several of theirs, and says how the one is packed from the others. `{i}` is
a layer, `{e}` an expert. Ours are described in `raytron.model.attention`, `mlp` and `moe`; theirs are matrices (out, in), in
GPT-2 (in, out), and their names are those of the files, where each expert has matrices of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from raytron.config import ModelConfig
from raytron.errors import ConfigError, Problem

Unpack = Callable[[Tensor, ModelConfig], list[Tensor]]
Pack = Callable[[list[Tensor], ModelConfig], Tensor]


class Row(NamedTuple):
    """A parameter here, its pieces there, and the way between them and back."""

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


def _stacked(matrices: list[Tensor], count: int) -> Tensor:
    """n matrices for each of `count` experts as (count, n, ...), n = 1 left out."""
    stacked = torch.stack(matrices)
    return stacked if len(matrices) == count else stacked.view(count, -1, *stacked.shape[1:])


def _experts(ours: str, *theirs: str) -> Row:
    """(E, n, F, D), or (E, D, F), as n matrices for each expert."""
    return Row(
        ours,
        theirs,
        lambda w, m: list(w.flatten(0, w.dim() - 3)),
        lambda ws, m: _stacked(ws, m.experts.count),
    )


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


_MLP = "layers.{i}.mlp."
_MIX = _LAYER + "block_sparse_moe."
MIXTRAL = [
    *LLAMA,
    _same(_MLP + "router.weight", _MIX + "gate.weight"),
    _experts(_MLP + "experts.up.weight", _MIX + "experts.{e}.w1.weight", _MIX + "experts.{e}.w3.weight"),
    _experts(_MLP + "experts.down.weight", _MIX + "experts.{e}.w2.weight"),
]
_ONE, _ALL = _LAYER + "mlp.experts.{e}.", _LAYER + "mlp.shared_expert."
QWEN_MOE = [  # Qwen2 (shared expert and gate) and Qwen3
    *LLAMA,
    _same(_MLP + "router.weight", _LAYER + "mlp.gate.weight"),
    _experts(_MLP + "experts.up.weight", _ONE + "gate_proj.weight", _ONE + "up_proj.weight"),
    _experts(_MLP + "experts.down.weight", _ONE + "down_proj.weight"),
    _gate_up(_MLP + "shared.up.weight", _ALL + "gate_proj.weight", _ALL + "up_proj.weight"),
    _same(_MLP + "shared.down.weight", _ALL + "down_proj.weight"),
    _same(_MLP + "shared.gate.weight", _LAYER + "mlp.shared_expert_gate.weight"),
]


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
    """Our whole weights under Hugging Face's names: GPT-2's where positions are learned, of experts Mixtral's or Qwen's,
    else Llama's. Raises ConfigError for experts that neither has."""
    out: dict[str, Tensor] = {}
    for ours, theirs, row in _names(model):
        if ours in weights:
            out.update(zip(theirs, row.unpack(weights[ours], model), strict=True))
    if _is_gpt2(model):
        for layer in range(model.layers):
            for kind in ("weight", "bias"):
                q, kv = (weights[f"layers.{layer}.attention.{part}.{kind}"] for part in ("q", "kv"))
                packed = torch.cat([q.flatten(0, 1), kv[:, 0].flatten(0, 1), kv[:, 1].flatten(0, 1)])
                out[f"transformer.h.{layer}.attn.c_attn.{kind}"] = packed.t() if kind == "weight" else packed
    if model.tied_embeddings:
        out["lm_head.weight"] = weights["embed.weight"]
    return out


def from_hugging_face(weights: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Hugging Face's weights under our names: the way back from `to_hugging_face`."""
    out = {
        ours: row.pack([weights[name] for name in theirs], model)
        for ours, theirs, row in _names(model)
        if theirs[0] in weights
    }
    if _is_gpt2(model):
        for layer in range(model.layers):
            for kind in ("weight", "bias"):
                packed = weights[f"transformer.h.{layer}.attn.c_attn.{kind}"]
                q, k, v = (packed.t() if kind == "weight" else packed).chunk(3)
                out[f"layers.{layer}.attention.q.{kind}"] = _cut(q, model.heads, model)
                both = torch.stack([_cut(k, model.heads, model), _cut(v, model.heads, model)], 1)
                out[f"layers.{layer}.attention.kv.{kind}"] = both
    if model.tied_embeddings:
        out.pop("head.weight", None)
    return out


def _is_gpt2(model: ModelConfig) -> bool:
    return model.positions == "learned"


def _names(model: ModelConfig) -> Iterator[tuple[str, list[str], Row]]:
    """Every row of the model's family for every layer: our name, theirs, and the row."""
    for row in _family(model):
        each = range(model.experts.count if "{e}" in row.theirs[0] else 1)
        for layer in range(model.layers) if "{i}" in row.ours else (0,):
            theirs = [name.format(i=layer, e=expert) for expert in each for name in row.theirs]
            yield row.ours.format(i=layer), theirs, row


def _family(model: ModelConfig) -> list[Row]:
    """The table that names the model's weights."""
    if model.experts.count == 0:
        return GPT2 if _is_gpt2(model) else LLAMA
    found = list(_unnamed(model))
    if found:
        raise ConfigError(found)
    everywhere = model.expert_layers == model.layers and model.expert_ffn == model.ffn
    plain = not (model.qk_norm or model.qkv_bias or model.experts.shared_ffn) and model.experts.normalize
    return MIXTRAL if everywhere and plain else QWEN_MOE


def _unnamed(model: ModelConfig) -> Iterator[Problem]:
    """What neither Mixtral nor Qwen-MoE has."""
    experts, remedy = model.experts, "only Mixtral's and Qwen's mixtures have names there"
    if model.positions == "learned" or model.activation != "swiglu":
        yield Problem("model", "experts with learned positions or another activation than swiglu", remedy)
    if experts.score != "softmax" or experts.groups > 1 or experts.bias_rate > 0 or experts.scale != 1:
        what = "a router with sigmoid scores, groups, a balancing bias or a scale"
        yield Problem("model.experts.score", what, remedy)
    if bool(experts.shared_ffn) != experts.shared_gate or (experts.shared_ffn and model.qk_norm):
        yield Problem("model.experts.shared_ffn", "a shared expert without a gate, or beside QK norms", remedy)
