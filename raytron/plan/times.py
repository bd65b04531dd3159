"""How long actions take in a run: what its ranks have measured, as a value and as files.

Each pipeline rank of a run writes `run_dir/times/rank-N.json`: the median time of each operation in each of its stages over
a few steps. `read_times` puts them together. They hold for the model, the micro-batch and the precision that they were
measured with, on any number of stages (`raytron.plan.weigh`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytron.config import RunConfig, flatten, to_mapping
from raytron.errors import ConfigError, Problem
from raytron.plan.actions import Op
from raytron.plan.split import Range

FOLDER = "times"
DEPEND = ("model.", "memory.", "micro_batch_size", "sequence_length", "mesh.tp", "mesh.cp", "mesh.ep", "mesh.etp",
          "mesh.sequence_parallel", "precision.dtype")  # fmt: skip


@dataclass(frozen=True)
class Times:
    """Seconds of F, B, I and W by stage; None where a stage had no such action. stages: the layers of each.

    schedule, steps: of the run that measured them, and which of its steps.
    """

    stages: tuple[Range, ...]
    seconds: dict[Op, tuple[float | None, ...]]
    schedule: str
    steps: tuple[int, int]

    def __str__(self) -> str:
        return f"the times of {self.schedule}, measured in steps {self.steps[0]} to {self.steps[1]}"


def facts(config: RunConfig) -> dict[str, Any]:
    """What times depend on."""
    return {key: value for key, value in flatten(to_mapping(config)).items() if key.startswith(DEPEND)}


def write_times(run_dir: Path, rank: int, record: dict[str, Any]) -> Path:
    """Writes what pipeline rank `rank` has measured: stages, seconds (operation: stage: seconds), schedule, steps, facts."""
    path = run_dir / FOLDER / f"rank-{rank}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record), encoding="utf-8")
    temporary.replace(path)
    return path


def read_times(run_dir: Path, config: RunConfig) -> Times:
    """The times of a run, for a configuration. Raises ConfigError where they are not all there, or of another model."""
    where = str(run_dir / FOLDER)
    found = [_read(path) for path in sorted((run_dir / FOLDER).glob("rank-*.json"))]
    again = "run with pipeline.schedule=auto or with observe.trace_steps"
    if not found:
        raise ConfigError([Problem(where, "holds no measured times", again)])
    first = found[0]
    if any(record[key] != first[key] for record in found for key in ("stages", "schedule", "steps")):
        raise ConfigError([Problem(where, "holds times of different runs", again)])
    now = json.loads(json.dumps(facts(config)))
    differs = [key for key in now if first["facts"].get(key) != now[key]]
    if differs:
        what = f"holds times of another {', '.join(differs[:3])}"
        raise ConfigError([Problem(where, what, "measure with this configuration, or leave the times out")])
    stages = tuple((begin, end) for begin, end in first["stages"])
    seconds = {op: tuple(_of(found, op, stage) for stage in range(len(stages))) for op in Op}
    if any(time is None for time in seconds[Op.F]):
        raise ConfigError([Problem(where, "lacks the times of some ranks", again)])
    return Times(stages, seconds, first["schedule"], (first["steps"][0], first["steps"][1]))


def _of(found: list[dict[str, Any]], op: Op, stage: int) -> float | None:
    for record in found:
        value = record["seconds"].get(op.value, {}).get(str(stage))
        if value is not None:
            return float(value)
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError([Problem(str(path), f"can't be read: {error}", "delete it, and measure again")]) from None
    assert isinstance(record, dict)
    return record
