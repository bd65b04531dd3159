"""Small configurations that between them use every choice of the model."""

from __future__ import annotations

from typing import Any

import numpy as np

from raytron.config import RunConfig, from_mapping
from raytron.data.batch import Batch, part_of
from raytron.data.bounds import Bounds

LLAMA = {
    "layers": 4, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 48, "vocab": 67,
}  # fmt: skip
GPT2 = {
    "layers": 4, "hidden": 32, "heads": 4, "ffn": 64, "vocab": 67, "norm": "layernorm", "positions": "learned",
    "max_positions": 32, "activation": "gelu_tanh", "qkv_bias": True, "bias": True, "tied_embeddings": True,
}  # fmt: skip
QWEN3 = {
    **LLAMA, "qk_norm": True, "qkv_bias": True, "head_dim": 16, "window": 5, "tied_embeddings": True,
}  # fmt: skip
DROPPED = {**GPT2, "dropout": 0.2, "attention_dropout": 0.1}
MODELS = {"llama": LLAMA, "gpt2": GPT2, "qwen3": QWEN3, "dropped": DROPPED}


def tiny(model: str | dict[str, Any] = "llama", **changes: Any) -> RunConfig:
    """A run of a tiny model: 8 sequences of 12 tokens in each step."""
    base = {
        "steps": 20, "seed": 11, "global_batch_size": 8, "micro_batch_size": 2, "sequence_length": 12,
        "model": MODELS[model] if isinstance(model, str) else model,
        "data_parallel": {"bucket_mb": 0.02}, "data": {"dataset": "not-read"},
        "optimizer": {"clip_norm": 1.0},
        "lr": {"peak": 3e-3, "final": 3e-4, "warmup_steps": 2},
    }  # fmt: skip
    return from_mapping(base).replace(**changes)


def batch_of(config: RunConfig, step: int = 0, part: int = 0, parts: int = 1) -> Batch:
    """A part of a step's random tokens, some of which don't count in the loss; with documents, if they are kept apart."""
    length, count = config.sequence_length, config.global_batch_size
    ids = np.arange(step * count, (step + 1) * count)
    rows = np.stack([np.random.default_rng(int(i)).integers(0, config.model.vocab, length + 1) for i in ids])
    weights = np.stack([np.random.default_rng([int(i), 1]).random(length) < 0.8 for i in ids]).astype(np.float32)
    share = slice(*part_of(0, count, part, parts, config.micro_batch_size if parts > 1 else 1))
    documents = None
    if config.data.document_mask:
        begins = np.stack([np.random.default_rng([int(i), 2]).random(length) < 0.25 for i in ids])
        documents = Bounds.of_numbers(begins.cumsum(1)[share])
    return Batch(ids[share], rows[share, :-1], rows[share, 1:], weights[share], documents)
