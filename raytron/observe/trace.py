"""A rank's own timeline: what its actions took, in the steps that are asked for.

The interpreter tells a Tracer of every action while it is active; after the last of its steps it writes, once,

    run_dir/times/rank-N.json    the median time of each operation in each stage (`raytron.plan.times`)
    run_dir/trace/rank-N.json    if `observe.trace_steps` is set: the actions, in Chrome's format (`raytron.plan.trace`)

On CUDA a traced action ends when the device has done it: the steps that are traced are slower than others.
"""

from __future__ import annotations

import socket
import statistics
import time
from pathlib import Path

import torch

from raytron.parallel.mesh import Mesh
from raytron.plan import times
from raytron.plan.actions import Action
from raytron.plan.plan import Plan
from raytron.plan.trace import FOLDER, Event, action_event, document, named

MEASURED = (2, 4)  # of the steps since it was built, those that `auto` measures: the first one also warms up


class Tracer:
    """Watches one rank. steps: the first and the last step that count, from 1; None: MEASURED, and no events."""

    def __init__(self, plan: Plan, mesh: Mesh, steps: tuple[int, int] | None):
        self.plan, self.mesh, self.write_events = plan, mesh, steps is not None
        self.steps = steps
        self.active = False
        self._step = 0
        self._seen: list[tuple[int, Action, float, float]] = []  # step, action, start and end in seconds

    @classmethod
    def wanted(cls, plan: Plan, mesh: Mesh) -> Tracer | None:
        """The tracer that the configuration asks for, if any."""
        asked = plan.config.observe.trace_steps
        if asked is None and plan.config.pipeline.schedule != "auto":
            return None
        return cls(plan, mesh, None if asked is None else (asked[0], asked[1]))

    def now(self) -> float:
        """Seconds, when the device is done."""
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize(self.mesh.device)
        return time.perf_counter()

    def saw(self, action: Action, start: float, end: float) -> None:
        """An action of the step that is under way."""
        self._seen.append((self._step, action, start, end))

    def begin(self, step: int) -> None:
        """A step begins."""
        if self.steps is None:
            self.steps = (step - 1 + MEASURED[0], step - 1 + MEASURED[1])
        self._step, self.active = step, self.steps[0] <= step <= self.steps[1]

    def finish(self) -> None:
        """A step has ended; after the last one the files are written."""
        self.active = False
        if self.steps is None or self._step < self.steps[1] or not self._seen:
            return
        directory, coords = Path(self.plan.config.run_dir), self.mesh.coords
        if self.write_events:
            path = directory / FOLDER / f"rank-{self.mesh.rank}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self._document(), encoding="utf-8")
        if not any(coords[1:]):
            times.write_times(directory, coords.pp, self.record())
        self._seen.clear()

    def record(self) -> dict[str, object]:
        """The median seconds of each operation in each stage, and what they depend on."""
        found: dict[str, dict[str, list[float]]] = {}
        for _, action, start, end in self._seen:
            found.setdefault(action.op.value, {}).setdefault(str(action.stage), []).append(end - start)
        medians = {
            op: {stage: statistics.median(values) for stage, values in stages.items()} for op, stages in found.items()
        }
        return {
            "stages": self.plan.stages,
            "seconds": medians,
            "schedule": self.plan.schedule.name,
            "steps": [self._seen[0][0], self._seen[-1][0]],
            "facts": times.facts(self.plan.config),
        }

    def _document(self) -> str:
        rank, coords = self.mesh.rank, self.mesh.coords
        events: list[Event] = [named(rank, f"rank {rank} ({coords})")]
        for step, action, start, end in self._seen:
            events.append(action_event(action, 1e6 * start, 1e6 * end, rank, coords.pp, step))
        facts = {
            "rank": rank, "others": list(coords[1:]), "host": socket.gethostname(),
            "wall_us": 1e6 * (time.time() - time.perf_counter()), "schedule": self.plan.schedule.name,
        }  # fmt: skip
        return document(events, raytron=facts)
