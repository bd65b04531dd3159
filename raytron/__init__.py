"""Raytron trains transformers on a Ray cluster with actors.

    import raytron

    result = raytron.train(raytron.load("examples/quickstart.yaml"))

The public names are loaded when they are first used, so that planning needs neither torch nor Ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raytron.actors.run import Run, attach, launch, train
    from raytron.config import (
        BatchRampConfig,
        CheckpointConfig,
        ClusterConfig,
        DataConfig,
        DataParallelConfig,
        DataStageConfig,
        ElasticConfig,
        EvaluateConfig,
        ExpertsConfig,
        FimConfig,
        GuardConfig,
        LearningRateChange,
        LearningRateConfig,
        MemoryConfig,
        MeshConfig,
        ModelConfig,
        ObserveConfig,
        OptimizerConfig,
        ParameterGroup,
        PipelineConfig,
        PrecisionConfig,
        RecoveryConfig,
        ResumeConfig,
        RunConfig,
        SourceConfig,
        TokenizerConfig,
        ValidationConfig,
        load,
    )
    from raytron.errors import (
        CheckpointError,
        ClusterError,
        ConfigError,
        DataError,
        GuardError,
        OutOfMemoryError,
        Problem,
        RaytronError,
        ScheduleError,
        WorkerError,
    )
    from raytron.observe.result import Result
    from raytron.plan.plan import Plan, make_plan
    from raytron.training.upcycle import upcycle

__version__ = "0.1.0"

_HOMES = {
    "raytron.actors.run": ("Run", "attach", "launch", "train"),
    "raytron.config": (
        "BatchRampConfig", "CheckpointConfig", "ClusterConfig", "DataConfig", "DataParallelConfig", "DataStageConfig",
        "ElasticConfig", "EvaluateConfig", "ExpertsConfig", "FimConfig", "GuardConfig", "LearningRateChange",
        "LearningRateConfig", "MemoryConfig", "MeshConfig", "ModelConfig", "ObserveConfig", "OptimizerConfig",
        "ParameterGroup", "PipelineConfig", "PrecisionConfig", "RecoveryConfig", "ResumeConfig", "RunConfig", "SourceConfig",
        "TokenizerConfig", "ValidationConfig", "load",
    ),
    "raytron.errors": (
        "CheckpointError", "ClusterError", "ConfigError", "DataError", "GuardError", "OutOfMemoryError", "Problem",
        "RaytronError", "ScheduleError", "WorkerError",
    ),
    "raytron.observe.result": ("Result",),
    "raytron.plan.plan": ("Plan", "make_plan"),
    "raytron.training.upcycle": ("upcycle",),
}  # fmt: skip
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "BatchRampConfig",
    "CheckpointConfig",
    "CheckpointError",
    "ClusterConfig",
    "ClusterError",
    "ConfigError",
    "DataConfig",
    "DataError",
    "DataParallelConfig",
    "DataStageConfig",
    "ElasticConfig",
    "EvaluateConfig",
    "ExpertsConfig",
    "FimConfig",
    "GuardConfig",
    "GuardError",
    "LearningRateChange",
    "LearningRateConfig",
    "MemoryConfig",
    "MeshConfig",
    "ModelConfig",
    "ObserveConfig",
    "OptimizerConfig",
    "OutOfMemoryError",
    "ParameterGroup",
    "PipelineConfig",
    "Plan",
    "PrecisionConfig",
    "Problem",
    "RaytronError",
    "RecoveryConfig",
    "Result",
    "ResumeConfig",
    "Run",
    "RunConfig",
    "ScheduleError",
    "SourceConfig",
    "TokenizerConfig",
    "ValidationConfig",
    "WorkerError",
    "attach",
    "launch",
    "load",
    "make_plan",
    "train",
    "upcycle",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'raytron' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
