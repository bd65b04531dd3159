"""How long each action of a schedule takes: what a simulation is given."""

from __future__ import annotations

from dataclasses import dataclass

from raytron.errors import ScheduleError
from raytron.plan.actions import Op

PerStage = float | tuple[float, ...]


@dataclass(frozen=True)
class Cost:
    """How long an action takes, in any one unit: one number for all stages, or one for each.

    A full backward takes input_grad + weight_grad. comm: from the end of an action to the arrival of its message at
    another rank.
    """

    forward: PerStage = 1.0
    input_grad: PerStage = 1.0
    weight_grad: PerStage = 1.0
    comm: float = 0.0

    def table(self, num_stages: int) -> dict[Op, tuple[float, ...]]:
        """The time of each operation by stage. Raises ScheduleError for a wrong number of stages or negative times."""
        forward, inputs, weights = (_spread(v, num_stages) for v in (self.forward, self.input_grad, self.weight_grad))
        if min(*forward, *inputs, *weights, self.comm) < 0:
            raise ScheduleError("a cost can't be negative")
        full = tuple(i + w for i, w in zip(inputs, weights, strict=True))
        return {Op.F: forward, Op.B: full, Op.I: inputs, Op.W: weights}


UNIT = Cost()  # every forward, input gradient and weight gradient takes one


def _spread(value: PerStage, num_stages: int) -> tuple[float, ...]:
    if not isinstance(value, tuple):
        return (float(value),) * num_stages
    if len(value) != num_stages:
        raise ScheduleError(f"a cost for {len(value)} stages does not fit {num_stages} stages")
    return value
