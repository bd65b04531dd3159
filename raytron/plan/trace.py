"""Timelines in Chrome's trace format, for https://ui.perfetto.dev: of a simulation, and of a run beside its simulation.

    raytron plan CONFIG --trace FILE     what is expected
    raytron trace RUN_DIR                what `observe.trace_steps` recorded, and what was to be expected with its times

An event is one action: pid is the rank (of a simulation: 100,000 + the pipeline rank), tid the pipeline rank, name the
action's text, ts and dur are in µs. Each rank writes a file of its own, `run_dir/trace/rank-N.json`; `merge` joins them.

The comparison simulates the recorded row of every rank with the mean times of the recorded actions: what the run took
longer is what transfers and the interpreter took, and what mean times hide.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from raytron.errors import RaytronError
from raytron.plan.actions import Action, Op, Schedule
from raytron.plan.cost import Cost
from raytron.plan.simulate import Timeline, simulate

FOLDER = "trace"
SIMULATED = 100_000  # first pid of a simulation
Event = dict[str, Any]


class Compared(NamedTuple):
    """A step as it ran on one pipeline, and as it is simulated with the mean times of its actions. Seconds, shares."""

    step: int
    measured: float
    simulated: float
    measured_idle: float  # of the busiest rank
    simulated_idle: float

    def __str__(self) -> str:
        idle = f"busiest rank idle {100 * self.measured_idle:.1f} %, simulated {100 * self.simulated_idle:.1f} %"
        times = f"{1e3 * self.measured:.2f} ms, simulated {1e3 * self.simulated:.2f} ms"
        return f"step {self.step}: {times} ({self.measured / self.simulated:.2f}×); {idle}"


def action_event(action: Action, start_us: float, end_us: float, rank: int, pipeline_rank: int, step: int) -> Event:
    """One action as an event."""
    return {
        "name": str(action), "cat": action.op.value, "ph": "X", "ts": start_us, "dur": end_us - start_us, "pid": rank,
        "tid": pipeline_rank, "args": {"stage": action.stage, "microbatch": action.microbatch, "step": step},
    }  # fmt: skip


def named(pid: int, name: str) -> Event:
    """What a process is called."""
    return {"name": "process_name", "ph": "M", "pid": pid, "args": {"name": name}}


def simulated_events(
    schedule: Schedule, line: Timeline, unit_us: float = 1000.0, begin_us: float = 0.0, step: int = 1
) -> list[Event]:
    """A simulation as events. unit_us: µs of its unit; begin_us: when its first action starts."""
    events = [named(SIMULATED + rank, f"simulated {schedule.name}, rank {rank}") for rank in range(schedule.num_ranks)]
    for rank, (row, starts, ends) in enumerate(zip(schedule.rows, line.start, line.end, strict=True)):
        for action, start, end in zip(row, starts, ends, strict=True):
            at, until = begin_us + start * unit_us, begin_us + end * unit_us
            events.append(action_event(action, at, until, SIMULATED + rank, rank, step))
    return events


def document(events: Sequence[Event], **more: Any) -> str:
    """A trace file."""
    return json.dumps({"traceEvents": list(events), "displayTimeUnit": "ms", **more})


def read_trace(run_dir: Path) -> list[dict[str, Any]]:
    """What the ranks of a run wrote, by rank. Raises RaytronError where there is nothing."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in (run_dir / FOLDER).glob("rank-*.json")]
    if not files:
        raise RaytronError(f"{run_dir / FOLDER} holds no trace: set observe.trace_steps, such as [2, 4], and run")
    return sorted(files, key=lambda file: int(file["raytron"]["rank"]))


def merge(files: Sequence[Mapping[str, Any]]) -> tuple[list[Event], list[Compared]]:
    """The events of all ranks on one clock, with the simulation of each step beside, and the steps compared."""
    one_host = len({file["raytron"]["host"] for file in files}) == 1
    shift = {file["raytron"]["rank"]: 0.0 if one_host else file["raytron"]["wall_us"] for file in files}
    events = [
        event | {"ts": event["ts"] + shift[event["pid"]]} if "ts" in event else dict(event)
        for file in files
        for event in file["traceEvents"]
    ]
    zero = min(event["ts"] for event in events if "ts" in event)
    for event in events:
        if "ts" in event:
            event["ts"] -= zero
    pipeline = {file["raytron"]["rank"] for file in files if not any(file["raytron"]["others"])}
    mine = [event for event in events if event["pid"] in pipeline and event.get("cat") in set(Op)]
    compared = []
    for step in sorted({event["args"]["step"] for event in mine}):
        made, figures = _compare(step, [event for event in mine if event["args"]["step"] == step], files[0])
        events += made
        compared.append(figures)
    return events, compared


def _compare(step: int, events: Sequence[Event], file: Mapping[str, Any]) -> tuple[list[Event], Compared]:
    schedule = _recorded(events, file["raytron"]["schedule"])
    line = simulate(schedule, mean_cost(schedule, [(Action.parse(e["name"]), e["dur"]) for e in events]))
    begin = min(event["ts"] for event in events)
    span = max(event["ts"] + event["dur"] for event in events) - begin
    busy = [sum(event["dur"] for event in events if event["tid"] == rank) for rank in range(schedule.num_ranks)]
    figures = Compared(step, span / 1e6, line.makespan / 1e6, 1 - max(busy) / span, line.bubble)
    return simulated_events(schedule, line, 1.0, begin, step), figures


def _recorded(events: Iterable[Event], name: str) -> Schedule:
    """The schedule that was run: the rows as they were recorded."""
    rows: dict[int, list[tuple[float, Action]]] = {}
    for event in events:
        rows.setdefault(event["tid"], []).append((event["ts"], Action.parse(event["name"])))
    made = tuple(tuple(action for _, action in sorted(rows[rank], key=lambda row: row[0])) for rank in sorted(rows))
    owner = {action.stage: rank for rank, row in enumerate(made) for action in row}
    batches = 1 + max(action.microbatch for row in made for action in row)
    return Schedule(name, made, tuple(owner[stage] for stage in range(len(owner))), batches)


def mean_cost(schedule: Schedule, seen: Iterable[tuple[Action, float]]) -> Cost:
    """The mean time of each operation in each stage. Where only whole backwards were seen, half of one counts as I."""
    times: dict[tuple[Op, int], list[float]] = {}
    for action, time in seen:
        times.setdefault((action.op, action.stage), []).append(time)
    mean = {key: statistics.fmean(values) for key, values in times.items()}
    stages = range(schedule.num_stages)
    half = [mean.get((Op.B, stage), 0.0) / 2 for stage in stages]
    return Cost(
        forward=tuple(mean.get((Op.F, stage), 0.0) for stage in stages),
        input_grad=tuple(mean.get((Op.I, stage), half[stage]) for stage in stages),
        weight_grad=tuple(mean.get((Op.W, stage), half[stage]) for stage in stages),
    )
