"""Steps without a barrier: `optimizer.at_once`.

A step ends in one sum over all ranks: of the gradient norm, which may forbid the update. Whoever waits for it waits for the
slowest rank, and a schedule whose ranks start and end at different times (ZB-H2, ZB-V) loses what it had won. So a rank
updates as soon as its own gradients are summed and goes on; what the others say is looked at one step later:

    rank 0   step 1  update │ step 2 ………………… hear of 1, update │ step 3 …
    rank 1     step 1  update │ step 2 ………………… hear of 1, update │ …

(Post-validation, after Qi et al., arXiv 2401.10241, section 4.) If the gradient of step 1 was not finite anywhere, all ranks
learn so at the same place, the end of the backward of step 2: each restores what it had before the update of step 1, bit by
bit, and runs step 2 again. Updates are therefore those of a run that waits. That takes a copy of masters and moments, and a
result that is known one call late; a limit on the norm would need it at every step, and is refused.

The number of real tokens, by which the loss is divided, every rank hears of from those that hold other tokens, before its
own update. The scalars travel between hosts, so that no kernel waits on a device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from raytron.data.batch import Batch
from raytron.parallel.collectives import Wait, start_all_reduce
from raytron.parallel.mesh import Group
from raytron.training.engine import Engine, StepResult


class Before:
    """What a model and its optimizer were before an update."""

    def __init__(self, engine: Engine):
        self.optimizer, self.updates = engine.optimizer, engine.optimizer.updates
        self.live = engine.state()
        self.state = {name: part._replace(tensor=part.tensor.clone()) for name, part in self.live.items()}

    @torch.no_grad()
    def restore(self) -> None:
        for name, part in self.live.items():
            part.tensor.copy_(self.state[name].tensor)
        self.optimizer.loaded(self.updates)


class Unheard(NamedTuple):
    """A step of which the ranks have not heard from each other yet."""

    keys: list[str]
    summed: Wait
    sequences: int
    before: Before


class AtOnce:
    """Steps of an engine, each of whose results comes with the next one."""

    def __init__(self, engine: Engine):
        self.engine, mesh = engine, engine.mesh
        self.hosts = Group(mesh.world.ranks, mesh.rank, mesh.control, mesh.waiting)
        self.unheard: Unheard | None = None
        self.settled: Callable[[StepResult | None], None] = _nothing  # told before each update: the state is committed

    def step(
        self, batch: Batch, lr: float, request: int = 0, *, sequences: int | None = None, layer_norms: bool = False
    ) -> StepResult | None:
        """As `Engine.step`; returns the result of the step before, if it is not known yet."""
        engine = self.engine
        sequences = sequences or engine.plan.config.global_batch_size
        counted = engine.start_counting(batch)
        loss, tokens = engine.forward_backward(batch, sequences)
        result = self.settle()
        if result is not None and result.skipped:
            loss, tokens = engine.forward_backward(batch, sequences)
        self.settled(result)
        values = engine.values(loss, tokens, request, layer_norms)
        before = Before(engine)
        engine.update(lr, engine.mend(counted().item(), sequences))
        engine.before_commit()
        vector = torch.tensor(list(values.values()), dtype=torch.float64)
        self.unheard = Unheard(list(values), start_all_reduce(vector, self.hosts), sequences, before)
        return result

    def settle(self) -> StepResult | None:
        """The result that is not known yet, if there is one; waits for the slowest rank. What was done in vain is undone."""
        if self.unheard is None:
            return None
        keys, summed, sequences, before = self.unheard
        result = self.engine.result(dict(zip(keys, summed().tolist(), strict=True)), sequences)
        self.unheard = None
        if result.skipped:
            with self.engine.changing():
                before.restore()
        return result


def _nothing(result: StepResult | None) -> None:
    """Nobody wants to know."""
