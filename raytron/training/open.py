"""Opens what one rank trains with: the streams of a run's data, and a Trainer over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from raytron.checkpoint.store import Hook, no_hook
from raytron.config import RunConfig
from raytron.data.batch import Batch, TokenStream
from raytron.data.feed import RayDataStream
from raytron.data.prefetch import PrefetchStream
from raytron.data.run_data import RunData, open_run_data
from raytron.data.text_index import TextCorpus
from raytron.observe.trace import Tracer
from raytron.parallel.mesh import Mesh
from raytron.plan.plan import Plan
from raytron.training.read_once import ReadOnce
from raytron.training.trainer import ALIKE, Trainer

BEHIND = 8  # requests that a rank may lag behind the one that reads, beside those that are read ahead


def open_trainer(plan: Plan, mesh: Mesh, dataset: Path, hook: Hook = no_hook) -> Trainer:
    """A rank's trainer at step 0. Raises DataError where a data set can't be read or is too short.

    dataset: the folder of the run's data set; a blend names its own. hook: told the phases of its work as they begin.
    """
    data = open_run_data(plan.config, dataset)
    facts = {"data": data.recipe.hash, **({"data_recipe": data.recipe.facts()} if plan.config.data.blend else {})}
    samples, once = _training(data), None
    if _is_dear(data) and len(mesh.shape.group(mesh.rank, *ALIKE)) > 1:
        samples = once = ReadOnce(samples, plan.config.data.prefetch + BEHIND)
    tracer, stream = Tracer.wanted(plan, mesh), _read_ahead(plan.config, samples, mesh)
    return Trainer(plan, mesh, stream, data.validation(), data_facts=facts, tracer=tracer, once=once, hook=hook)


def _is_dear(data: RunData) -> bool:
    """Whether reading is more than to slice memory maps."""
    remote = any(isinstance(each, TextCorpus) or each.url is not None for each in data.sources)
    return remote or data.config.data.feed == "ray_data"


def _training(data: RunData) -> TokenStream:
    """The training samples, by the way that `data.feed` names."""
    return RayDataStream(data, data.config.batch_size_at) if data.config.data.feed == "ray_data" else data.train()


def _read_ahead(config: RunConfig, stream: TokenStream, mesh: Mesh) -> TokenStream:
    """A stream whose next batches are read beside the steps, as many as `data.prefetch` says."""
    if not config.data.prefetch:
        return stream
    keep = pinned if mesh.device.type == "cuda" else None
    return PrefetchStream(stream, config.data.prefetch, config.batch_size_at, keep)


def pinned(batch: Batch) -> Batch:
    """A batch in page-locked memory, from which a copy to a device goes on beside other work. Needs CUDA; not run yet."""
    ids, tokens, labels, weights = (_pinned(part) for part in batch[:4])
    return Batch(ids, tokens, labels, weights, batch.documents)


def _pinned(part: NDArray[Any]) -> NDArray[Any]:
    return torch.from_numpy(np.ascontiguousarray(part)).pin_memory().numpy()
