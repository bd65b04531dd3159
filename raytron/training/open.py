"""Opens what one rank trains with: the streams of a run's data, and a Trainer over them."""

from __future__ import annotations

from pathlib import Path

from raytron.checkpoint.store import Hook, no_hook
from raytron.data.run_data import open_run_data
from raytron.observe.trace import Tracer
from raytron.parallel.mesh import Mesh
from raytron.plan.plan import Plan
from raytron.training.trainer import Trainer


def open_trainer(plan: Plan, mesh: Mesh, dataset: Path, hook: Hook = no_hook) -> Trainer:
    """A rank's trainer at step 0. Raises DataError where a data set can't be read or is too short.

    dataset: the folder of the run's data set; a blend names its own. hook: told the phases of its work as they begin.
    """
    data = open_run_data(plan.config, dataset)
    facts = {"data": data.recipe.hash, **({"data_recipe": data.recipe.facts()} if plan.config.data.blend else {})}
    tracer = Tracer.wanted(plan, mesh)
    return Trainer(plan, mesh, data.train(), data.validation(), data_facts=facts, tracer=tracer, hook=hook)
