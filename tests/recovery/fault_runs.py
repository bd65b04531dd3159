"""Runs that faults happen to: their smallest configuration, and what is compared with an undisturbed run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from raytron.actors.run import Run
from raytron.checkpoint.catalog import find
from raytron.checkpoint.whole import read_whole
from raytron.config import RunConfig, load
from raytron.observe.records import Record
from raytron.observe.result import Result
from raytron.testing.ledger import committed

SMALL: dict[str, Any] = {
    "steps": 8,
    "global_batch_size": 4,
    "micro_batch_size": 1,
    "sequence_length": 16,
    "determinism": "canonical",
    "model": {"layers": 2, "hidden": 32, "heads": 2, "ffn": 48, "vocab": 300},
    "checkpoint": {"every": 4},
    "evaluate": {"batches": 0},
    "cluster": {"cpus_per_worker": 0.5, "timeout_s": 30, "device": "cpu", "threads_per_worker": 1},
}  # fmt: skip


class Told(NamedTuple):
    """What a run left behind."""

    result: Result
    events: list[Record]
    weights: dict[str, np.ndarray]
    samples: Counter[int]  # how often each was trained on in a committed step

    def all(self, kind: str) -> list[Record]:
        return [record for record in self.events if record["event"] == kind]


def told(run: Run, result: Result) -> Told:
    """The story of a run that is over, and its final weights."""
    assert result.checkpoint is not None
    weights = {name: tensor.numpy() for name, tensor in read_whole(find(result.checkpoint)).items()}
    return Told(result, run.events(), weights, committed(ledger_of(run.run_dir), run.events()))


def ledger_of(run_dir: Path) -> Path:
    return run_dir / "ledger"


def assert_same_end(run: Told, undisturbed: Told) -> None:
    """Losses, weights and moments to the bit, one record for each step, and each sample used once."""
    assert [record["step"] for record in run.result.metrics] == [
        record["step"] for record in undisturbed.result.metrics
    ]
    assert run.result.losses == undisturbed.result.losses
    assert run.weights.keys() == undisturbed.weights.keys()
    differing = [name for name, values in run.weights.items() if not np.array_equal(values, undisturbed.weights[name])]
    assert not differing
    assert run.samples == Counter(range(SMALL["global_batch_size"] * undisturbed.result.step))


def configured(dataset: Path, run_dir: Path, name: str, **changes: Any) -> RunConfig:
    made = load({**SMALL, "name": name, "run_dir": str(run_dir), "data": {"dataset": str(dataset)}})
    return made.replace(**changes)
