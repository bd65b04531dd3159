"""Opens what one rank trains with: the streams of a data set, and a Trainer over them."""

from __future__ import annotations

from pathlib import Path

from raytron.checkpoint.store import Hook, no_hook
from raytron.config import RunConfig
from raytron.data.reader import has_samples
from raytron.data.shards import Dataset, open_dataset
from raytron.data.stream import open_stream
from raytron.observe.trace import Tracer
from raytron.parallel.mesh import Mesh
from raytron.plan.plan import Plan
from raytron.training.trainer import Trainer


def evaluates(config: RunConfig, data: Dataset) -> bool:
    """Whether a run evaluates: it is asked to, and a validation sample exists."""
    return config.evaluate.batches > 0 and has_samples(config, data, "validation")


def open_trainer(plan: Plan, mesh: Mesh, dataset: Path, hook: Hook = no_hook) -> Trainer:
    """A rank's trainer at step 0. Raises DataError where the data set can't be read or is too short.

    hook: told the phases of its work as they begin.
    """
    config, data = plan.config, open_dataset(dataset)
    stream = open_stream(config, data, "train")
    validation = open_stream(config, data, "validation") if evaluates(config, data) else None
    return Trainer(plan, mesh, stream, validation, data_digest=data.hash, tracer=Tracer.wanted(plan, mesh), hook=hook)
