"""A ledger of the samples that a run was trained on, told by the ranks themselves.

    rank ─ draws samples [first, first + count) for step n ─► a line in a file of its own     also for steps that are lost
    events.jsonl ─ when each mesh began, and at which step ─► which of these lines count

A line counts if its step was committed by the mesh that drew it: by the last one that began before that step. So a recovery
that skipped a sample, or trained on it twice, shows as a number that is missing, or there twice.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from raytron.data.batch import Batch, TokenStream
from raytron.observe.records import Record, read_records
from raytron.parallel.mesh import Mesh
from raytron.plan.plan import Plan
from raytron.training.trainer import Trainer

ROUNDED_S = 0.001  # events tell their time in milliseconds
Open = Callable[[Plan, Mesh, Path], Trainer]


class Ledger:
    """Opens trainers that tell what they draw: an `OpenTrainer` around another one. folder: one that all processes see."""

    def __init__(self, open_trainer: Open, folder: Path | str):
        self.open_trainer, self.folder = open_trainer, Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, plan: Plan, mesh: Mesh, dataset: Path) -> Trainer:
        trainer = self.open_trainer(plan, mesh, dataset)
        if mesh.coords.tp == mesh.coords.cp == mesh.coords.pp == 0:  # the others draw what this one draws
            trainer.stream = _Told(trainer.stream, trainer, self.folder / f"{os.getpid()}.jsonl")
        return trainer


def committed(folder: Path | str, events: Sequence[Record]) -> Counter[int]:
    """How often each sample id was trained on in a committed step. folder: of the ledger; events: of the whole run."""
    lines = [line for path in sorted(Path(folder).glob("*.jsonl")) for line in read_records(path)]
    begun = [(record["time"], record["step"]) for record in events if record["event"] == "workers"]
    ids: Counter[int] = Counter()
    for line in lines:
        began = max(at for at, step in begun if step < line["step"])
        if line["time"] >= began - ROUNDED_S:
            ids.update(range(line["first"], line["first"] + line["count"]))
    return ids


class _Told:
    """A stream that writes down what is drawn from it."""

    def __init__(self, stream: TokenStream, trainer: Trainer, path: Path):
        self.stream, self.trainer, self.path = stream, trainer, path
        self.sequence_length, self.samples_per_epoch = stream.sequence_length, stream.samples_per_epoch

    def batch(self, first: int, count: int, part: int = 0, parts: int = 1) -> Batch:
        line = {"time": time.time(), "step": self.trainer.step + 1, "first": first, "count": count}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        return self.stream.batch(first, count, part, parts)
