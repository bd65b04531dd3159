"""Named configurations: each a function, its hardware in its name, derived from a model and a mesh in a few lines.

    config = presets.find("llama3_8b_8xh100")
    config = presets.llama3_8b_8xh100().replace(run_dir="runs/mine", steps=1000)

The widths are those of the published models; the meshes are laid out for the hardware named, and are legal in this
version. The data is the Python standard library's source unless `data.sources` or `data.dataset` say otherwise.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from raytron.config import (
    ClusterConfig,
    EvaluateConfig,
    ExpertsConfig,
    LearningRateConfig,
    MeshConfig,
    ModelConfig,
    PipelineConfig,
    PrecisionConfig,
    RunConfig,
    load,
    to_mapping,
)
from raytron.errors import ConfigError, Problem


def quickstart_4xcpu() -> RunConfig:
    """A small Llama on two busy cores: minutes to a loss well below the unigram entropy."""
    model = ModelConfig(layers=4, hidden=256, heads=8, kv_heads=4, ffn=704, vocab=4096)
    config = _run("quickstart_4xcpu", model, MeshConfig(pp=2, tp=2), sequence_length=256, global_batch_size=16)
    return config.replace(
        **{
            "steps": 100,
            "micro_batch_size": 4,
            "lr.peak": 1e-3,
            "lr.final": 1e-4,
            "lr.warmup_steps": 10,
            "evaluate.prompt": "def main():",
            "cluster.cpus_per_worker": 0.5,
            "cluster.device": "cpu",
        }
    )


def gpt2_124m_1xcpu() -> RunConfig:
    """GPT-2 small on one CPU: slow, for a look at the model."""
    return _run("gpt2_124m_1xcpu", _gpt2(), MeshConfig(), sequence_length=1024, global_batch_size=8)


def gpt2_124m_8xh100() -> RunConfig:
    """GPT-2 small, data parallel on one node, half a million tokens in a step."""
    config = _run("gpt2_124m_8xh100", _gpt2(), MeshConfig(dp=8), sequence_length=1024, global_batch_size=512, gpu=True)
    return config.replace(micro_batch_size=16, **{"lr.peak": 6e-4, "lr.final": 6e-5})


def llama3_8b_8xh100() -> RunConfig:
    """Llama 3 8B on one node."""
    return _run("llama3_8b_8xh100", _llama3_8b(), MeshConfig(dp=2, tp=4), sequence_length=8192, gpu=True)


def llama3_8b_8xh200() -> RunConfig:
    """Llama 3 8B on one node with more memory: less tensor parallel."""
    return llama3_8b_8xh100().replace(name="llama3_8b_8xh200", run_dir="runs/llama3_8b_8xh200", **_mesh(dp=4, tp=2))


def llama3_70b_64xh100() -> RunConfig:
    """Llama 3 70B on eight nodes, tensor parallel within a node."""
    mesh = MeshConfig(pp=4, dp=2, tp=8)
    return _run("llama3_70b_64xh100", _llama3_70b(), mesh, sequence_length=8192, gpu=True)


def llama3_405b_1024xh200() -> RunConfig:
    """Llama 3.1 405B on 128 nodes; activations are kept, not recomputed, which takes the larger memory."""
    mesh = MeshConfig(pp=16, dp=8, tp=8)
    config = _run("llama3_405b_1024xh200", _llama3_405b(), mesh, sequence_length=8192, gpu=True)
    return config.replace(global_batch_size=1024, **{"lr.peak": 8e-5, "lr.final": 8e-7})


def qwen3_0_6b_1xh200() -> RunConfig:
    """Qwen3 0.6B on one GPU."""
    model = _qwen3(layers=28, hidden=1024, heads=16, ffn=3072, tied_embeddings=True)
    return _run("qwen3_0_6b_1xh200", model, MeshConfig(), sequence_length=4096, global_batch_size=64, gpu=True)


def qwen3_8b_8xh100() -> RunConfig:
    """Qwen3 8B on one node."""
    model = _qwen3(layers=36, hidden=4096, heads=32, ffn=12288)
    return _run("qwen3_8b_8xh100", model, MeshConfig(dp=2, tp=4), sequence_length=4096, gpu=True)


def mistral_7b_8xh100() -> RunConfig:
    """Mistral 7B, with its sliding window, on one node."""
    model = ModelConfig(**_wide(32, 4096, 32, 14336), kv_heads=8, vocab=32000, window=4096)
    return _run("mistral_7b_8xh100", model, MeshConfig(dp=2, tp=4), sequence_length=8192, gpu=True)


def mixtral_8x7b_64xh100() -> RunConfig:
    """Mixtral 8x7B on eight nodes: one expert on each GPU of a node."""
    model = ModelConfig(
        **_wide(32, 4096, 32, 14336),
        kv_heads=8,
        vocab=32000,
        rope_theta=1_000_000.0,
        experts=ExpertsConfig(count=8, top_k=2, aux_loss=0.02),
    )
    mesh = MeshConfig(pp=4, dp=4, tp=4, ep=8)
    return _run("mixtral_8x7b_64xh100", model, mesh, sequence_length=4096, global_batch_size=256, gpu=True)


def qwen3_30b_a3b_16xh100() -> RunConfig:
    """Qwen3 30B-A3B on two nodes, eight experts of each layer on each GPU."""
    model = _qwen3(
        layers=48, hidden=2048, heads=32, kv_heads=4, ffn=6144, experts=ExpertsConfig(128, 8, ffn=768, aux_loss=0.001)
    )
    mesh = MeshConfig(dp=16, ep=16)
    config = _run("qwen3_30b_a3b_16xh100", model, mesh, sequence_length=4096, global_batch_size=1024, gpu=True)
    return config.replace(**{"memory.recompute": "full"})


def deepseek_v3_shaped_1024xh100() -> RunConfig:
    """A model of DeepSeek-V3's shape (arXiv 2412.19437) on 128 nodes, four experts of each layer on each GPU.

    Its layers, widths, experts, router and balancing are those of the paper. Its attention is not: grouped queries of about
    the same size stand for the latent attention, and there is no multi-token prediction.
    """
    experts = ExpertsConfig(
        count=256,
        top_k=8,
        ffn=2048,
        shared_ffn=2048,
        first_dense=3,
        score="sigmoid",
        scale=2.5,
        groups=8,
        group_top_k=4,
        aux_loss=0.0001,
        bias_rate=0.001,
    )
    model = ModelConfig(
        **_wide(61, 7168, 96, 18432), kv_heads=8, head_dim=128, vocab=129280, norm_eps=1e-6, experts=experts
    )
    mesh = MeshConfig(pp=16, dp=32, tp=2, ep=64)
    config = _run("deepseek_v3_shaped_1024xh100", model, mesh, sequence_length=4096, global_batch_size=8192, gpu=True)
    return config.replace(**{"memory.recompute": "full", "lr.peak": 2.2e-4, "lr.final": 2.2e-5})


PRESETS: dict[str, Callable[[], RunConfig]] = {
    preset.__name__: preset
    for preset in (
        quickstart_4xcpu,
        gpt2_124m_1xcpu,
        gpt2_124m_8xh100,
        llama3_8b_8xh100,
        llama3_8b_8xh200,
        llama3_70b_64xh100,
        llama3_405b_1024xh200,
        qwen3_0_6b_1xh200,
        qwen3_8b_8xh100,
        mistral_7b_8xh100,
        mixtral_8x7b_64xh100,
        qwen3_30b_a3b_16xh100,
        deepseek_v3_shaped_1024xh100,
    )
}


def names() -> list[str]:
    """Every name that `find` knows."""
    return list(PRESETS)


def find(name: str) -> RunConfig:
    """The configuration of this name. Raises ConfigError with the nearest name for an unknown one."""
    if name in PRESETS:
        return PRESETS[name]()
    close = difflib.get_close_matches(name, names(), n=1, cutoff=0.4)
    remedy = f"did you mean {close[0]}?" if close else "use one of " + ", ".join(names())
    raise ConfigError([Problem("preset", f"{name!r} is no preset", remedy)])


def read(source: RunConfig | str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> RunConfig:
    """The configuration of a preset's name, a YAML file, a mapping or another configuration, with overrides laid over it.

    A text without a suffix that is no file is a preset's name. Raises ConfigError as `load` and `find` do.
    """
    if isinstance(source, RunConfig):
        return load(to_mapping(source), overrides)
    if isinstance(source, str) and not Path(source).suffix and not Path(source).exists():
        return load(to_mapping(find(source)), overrides)
    return load(source, overrides)


def _run(
    name: str,
    model: ModelConfig,
    mesh: MeshConfig,
    *,
    sequence_length: int,
    global_batch_size: int = 128,
    gpu: bool = False,
) -> RunConfig:
    """A run of a model on a mesh; on GPUs in bf16, each worker with a GPU."""
    return RunConfig(
        name=name,
        run_dir=f"runs/{name}",
        steps=10_000 if gpu else 100,
        global_batch_size=global_batch_size,
        sequence_length=sequence_length,
        model=model,
        mesh=mesh,
        pipeline=PipelineConfig(),
        precision=PrecisionConfig(dtype="bf16" if gpu else "fp32"),
        lr=LearningRateConfig(warmup_steps=500 if gpu else 0),
        evaluate=EvaluateConfig(every=1000 if gpu else None),
        cluster=ClusterConfig(device="cuda" if gpu else "auto", timeout_s=600.0 if gpu else 120.0),
    )


def _mesh(**sizes: int) -> dict[str, int]:
    return {f"mesh.{axis}": size for axis, size in sizes.items()}


def _wide(layers: int, hidden: int, heads: int, ffn: int) -> dict[str, Any]:
    return {"layers": layers, "hidden": hidden, "heads": heads, "ffn": ffn}


def _gpt2() -> ModelConfig:
    """Radford et al., 2019: the smallest of four."""
    return ModelConfig(
        **_wide(12, 768, 12, 3072),
        vocab=50257,
        norm="layernorm",
        positions="learned",
        max_positions=1024,
        activation="gelu_tanh",
        qkv_bias=True,
        bias=True,
        tied_embeddings=True,
        dropout=0.1,
    )


def _llama3(**widths: Any) -> ModelConfig:
    """Dubey et al., arXiv 2407.21783."""
    return ModelConfig(**widths, kv_heads=8, vocab=128256, rope_theta=500_000.0)


def _llama3_8b() -> ModelConfig:
    return _llama3(**_wide(32, 4096, 32, 14336))


def _llama3_70b() -> ModelConfig:
    return _llama3(**_wide(80, 8192, 64, 28672))


def _llama3_405b() -> ModelConfig:
    return _llama3(**_wide(126, 16384, 128, 53248))


def _qwen3(**widths: Any) -> ModelConfig:
    """Yang et al., arXiv 2505.09388."""
    return ModelConfig(
        **{"kv_heads": 8, **widths},
        head_dim=128,
        vocab=151936,
        norm_eps=1e-6,
        rope_theta=1_000_000.0,
        qk_norm=True,
    )
