"""Timelines in Chrome's format: simulated, recorded, joined and compared."""

import json

import pytest

from raytron.errors import RaytronError
from raytron.plan.actions import Op
from raytron.plan.cost import Cost
from raytron.plan.schedule import generate
from raytron.plan.simulate import simulate
from raytron.plan.trace import action_event, document, merge, named, read_trace, simulated_events


def files_of(schedule, line, hosts=("a",), late=0.0):
    """What ranks would have written that ran exactly as simulated, in ms, each rank on its host's clock; `late`: the
    share by which each starts later."""
    for rank, row in enumerate(schedule.rows):
        host = hosts[rank % len(hosts)]
        clock = 5000.0 * (rank % len(hosts))
        events = [named(rank, f"rank {rank}")]
        for action, start, end in zip(row, line.start[rank], line.end[rank], strict=True):
            begin = 1000 * start * (1 + late) - clock
            until = begin + 1000 * (end - start)
            events.append(action_event(action, begin, until, rank, rank, 3))
        facts = {"rank": rank, "others": [0, 0, 0], "host": host, "wall_us": clock, "schedule": schedule.name}
        yield json.loads(document(events, raytron=facts))


def test_a_simulation_is_written_action_by_action():
    schedule = generate("zb-v", 2, 2, 4)
    events = simulated_events(schedule, simulate(schedule), unit_us=10.0)
    actions = [event for event in events if event["ph"] == "X"]
    assert sorted(event["name"] for event in actions) == sorted(str(a) for row in schedule.rows for a in row)
    assert all(event["dur"] == 10.0 for event in actions)
    assert {(event["pid"], event["tid"]) for event in actions} == {(100_000, 0), (100_001, 1)}
    assert json.loads(document(events))["traceEvents"] == events


@pytest.mark.parametrize("hosts", [("a",), ("a", "b")])
@pytest.mark.parametrize("name", ["1f1b", "zb-h1", "v-half", "dualpipe-v"])
def test_what_ran_as_simulated_compares_equal(name, hosts):
    chunks = 2 if name in ("v-half", "dualpipe-v") else 1
    schedule = generate(name, 2, chunks, 6)
    line = simulate(schedule, Cost(1.0, 1.0, 1.0))
    events, (compared,) = merge(list(files_of(schedule, line, hosts)))
    assert compared.step == 3
    assert compared.measured == pytest.approx(line.makespan * 1e-3)
    assert compared.simulated == pytest.approx(line.makespan * 1e-3)
    assert compared.simulated_idle == pytest.approx(line.bubble)
    assert compared.measured_idle == pytest.approx(line.bubble)
    assert min(event["ts"] for event in events if "ts" in event) == pytest.approx(0.0)
    ran = {event["name"]: event["ts"] for event in events if event["ph"] == "X" and event["pid"] < 100_000}
    again = {event["name"]: event["ts"] for event in events if event["ph"] == "X" and event["pid"] >= 100_000}
    assert ran == pytest.approx(again)
    assert {event["cat"] for event in events if "cat" in event} <= {op.value for op in Op}


def test_a_slower_run_says_by_how_much():
    schedule = generate("gpipe", 2, 1, 2)
    line = simulate(schedule)
    _, (compared,) = merge(list(files_of(schedule, line, late=0.1)))
    assert compared.measured == pytest.approx(compared.simulated + 0.7e-3)
    assert "step 3: 9.70 ms, simulated 9.00 ms (1.08×)" in str(compared)


def test_nothing_recorded_says_how_to_record(tmp_path):
    with pytest.raises(RaytronError, match=r"observe\.trace_steps"):
        read_trace(tmp_path)
