"""Schedules: equal to the golden orders and figures, and valid, finite and bounded at any size."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytron.errors import ScheduleError
from raytron.plan.schedule import Action, Op, Schedule, forward_only, generate, interleaved
from raytron.plan.simulate import Cost, peak, simulate

GOLDEN = Path(__file__).parents[1] / "golden" / "schedules"
NAMES = {"gpipe": "gpipe", "1f1b": "1f1b", "interleaved1f1b": "interleaved", "zbh1": "zb-h1"}
COSTS = {
    "F1_I1_W1": (1, 1, 1, 0),
    "F1_I1_W1_comm0.1": (1, 1, 1, 0.1),
    "F1_I1.2_W0.8": (1, 1.2, 0.8, 0),
    "F1_I1.6_W0.8": (1, 1.6, 0.8, 0),
}
FILES = sorted(path.stem for path in GOLDEN.glob("*.json") if not path.stem.startswith("dualpipe"))
ranks = st.integers(1, 8)
batches = st.integers(1, 20)
chunks = st.integers(2, 4)
times = st.floats(0.1, 5)


def golden(stem):
    record = json.loads((GOLDEN / f"{stem}.json").read_text())
    rows = tuple(tuple(map(Action.parse, record["order"][str(rank)])) for rank in range(record["p"]))
    rank_of = tuple(record["stage_to_rank"][str(stage)] for stage in range(record["n_stages"]))
    return record, Schedule(stem, rows, rank_of, record["m"])


@pytest.mark.parametrize("stem", [stem for stem in FILES if stem.split("_")[0] in NAMES])
def test_orders_equal_the_golden_ones(stem):
    record, expected = golden(stem)
    made = generate(NAMES[stem.split("_")[0]], record["p"], record["v"], record["m"])
    assert (made.rows, made.rank_of) == (expected.rows, expected.rank_of)


@pytest.mark.parametrize("model", COSTS)
@pytest.mark.parametrize("stem", FILES)
def test_figures_equal_the_golden_ones(stem, model):
    record, schedule = golden(stem)
    forward, inputs, weights, comm = COSTS[model]
    v, expected = record["v"], record["metrics"][model]
    line = simulate(schedule, Cost(forward / v, inputs / v, weights / v, comm))
    assert line.makespan == pytest.approx(expected["makespan"])
    assert max(line.busy) == pytest.approx(expected["busy"])
    assert line.bubble == pytest.approx(expected["bubble_over_total"])
    assert line.bubble_time == pytest.approx(expected["bubble_time"])
    assert line.own_span_bubble_time == pytest.approx(expected["bubble_own_span"])
    assert list(line.peak_at_input_grad) == expected["peak_inflight_released_at_I"]
    assert list(line.peak_at_weight_grad) == expected["peak_inflight_released_at_W"]


@given(name=st.sampled_from(["gpipe", "1f1b", "zb-h1"]), pp=ranks, m=batches, f=times, i=times, w=times, comm=times)
def test_any_size_ends_within_its_memory(name, pp, m, f, i, w, comm):
    schedule = generate(name, pp, 1, m)
    line = simulate(schedule, Cost(f, i, w, comm))
    assert line.busy == pytest.approx((m * (f + i + w),) * pp)
    limit = m if name == "gpipe" else min(m, pp)
    assert max(line.peak_at_weight_grad) <= limit
    assert sum(map(len, schedule.rows)) == pp * m * (3 if name == "zb-h1" else 2)


@given(pp=st.integers(2, 6), v=chunks, groups=st.integers(1, 4), comm=st.floats(0, 3))
def test_interleaved_ends_within_its_memory(pp, v, groups, comm):
    line = simulate(interleaved(pp, v, groups * pp), Cost(comm=comm))
    assert max(line.peak_at_weight_grad) <= pp * v + pp - 1
    assert line.bubble_time >= 0


@given(pp=ranks, v=st.integers(1, 4), m=batches, comm=st.floats(0, 3))
def test_forward_only_holds_its_row_and_ends(pp, v, m, comm):
    schedule = forward_only(pp, v, m)
    assert schedule.forward_only
    line = simulate(schedule, Cost(comm=comm))
    assert line.makespan >= m * v


@given(pp=ranks, m=batches, f=times, i=times)
def test_one_f_one_b_has_the_known_bubble(pp, m, f, i):
    line = simulate(generate("1f1b", pp, 1, m), Cost(f, i, i))
    assert line.bubble_time == pytest.approx((pp - 1) * (f + 2 * i))


@given(pp=ranks, m=batches, f=times, i=times, w=times)
def test_every_action_waits_for_its_rank_and_its_message(pp, m, f, i, w):
    schedule = generate("zb-h1", pp, 1, m)
    line = simulate(schedule, Cost(f, i, w, comm=0.25))
    starts = {a: t for row, at in zip(schedule.rows, line.start, strict=True) for a, t in zip(row, at, strict=True)}
    ends = {a: t for row, at in zip(schedule.rows, line.end, strict=True) for a, t in zip(row, at, strict=True)}
    for action, start in starts.items():
        step = {Op.F: -1, Op.I: 1}.get(action.op, 0)
        before = action._replace(stage=action.stage + step)
        if step and before in ends:
            assert start >= ends[before] + 0.25 - 1e-9
    for start, end in zip(line.start, line.end, strict=True):
        assert all(a <= b + 1e-9 for a, b in zip(end, start[1:], strict=False))


def test_per_stage_costs_move_the_bottleneck():
    schedule = generate("1f1b", 2, 1, 8)
    assert simulate(schedule, Cost(forward=(1.0, 3.0))).busy == (24.0, 40.0)
    with pytest.raises(ScheduleError, match="3 stages does not fit 2"):
        simulate(schedule, Cost(forward=(1.0, 2.0, 3.0)))


def test_a_receiver_stashes_what_comes_early():
    rows = ("0F0 0F1 0B1 0B0", "1F1 1F0 1B1 1B0")
    line = simulate(read(rows, (0, 1), 2))
    assert line.stash == (0, 1)


def read(rows, rank_of, microbatches):
    parsed = tuple(tuple(map(Action.parse, row.split())) for row in rows)
    return Schedule("drawn", parsed, rank_of, microbatches)


def test_a_deadlock_is_named():
    schedule = read(("0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1"), (0, 1), 2)
    with pytest.raises(ScheduleError) as caught:
        simulate(schedule)
    assert "rank 0 stands at 0B0 and waits for 1I0 from rank 1" in str(caught.value)
    assert "rank 1 stands at 1F1 and waits for 0F1 from rank 0" in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (("0F0 0B0 0F0",), "0F0 stands there more than once"),
        (("0F0",), "fine"),
        (("0F0 0B0 1F0",), "outside"),
        (("0B0 0F0",), "backward before its forward"),
        (("0F0 0I0",), "no weight gradient"),
        (("0F0 0W0 0I0",), "F, I and W in this order"),
        (("0F0 0B0 0W0",), "a full backward and a part of one"),
        (("0B0",), "has no forward"),
    ],
)
def test_malformed_rows_are_refused(rows, message):
    if message == "fine":
        assert read(rows, (0,), 1).forward_only
        return
    with pytest.raises(ScheduleError, match=message):
        read(rows, (0,), 1)


def test_rows_belong_to_their_rank():
    with pytest.raises(ScheduleError, match="its stage on rank 1"):
        read(("1F0 0F0", ""), (0, 1), 1)


def test_what_is_illegal_says_so():
    for arguments, message in [
        (("interleaved", 1, 2, 4), "2 or more ranks"),
        (("interleaved", 4, 2, 6), "a multiple of 4"),
        (("1f1b", 2, 2, 4), "use interleaved"),
        (("dualpipe", 2, 1, 4), "is not a schedule"),
        (("1f1b", 0, 1, 4), "at least one"),
    ]:
        with pytest.raises(ScheduleError, match=message):
            generate(*arguments)


@given(st.sampled_from(Op), st.integers(0, 999), st.integers(0, 999))
def test_an_action_reads_what_it_writes(op, stage, microbatch):
    action = Action(op, stage, microbatch)
    assert Action.parse(str(action)) == action
    assert str(Action(Op.F, 2, 0)) == "2F0"


def test_text_that_is_no_action_is_refused():
    with pytest.raises(ScheduleError, match="such as 2F0"):
        Action.parse("2X0")


def test_weighted_peak_counts_bytes():
    row = generate("1f1b", 2, 1, 4).rows[0]
    assert peak(row) == 2
    assert peak(row, weight=(10.0, 1.0)) == 20


def test_simulation_is_linear():
    def seconds(m):
        schedule = generate("zb-h1", 16, 1, m)
        start = time.process_time()
        simulate(schedule)
        return time.process_time() - start

    small, large = min(seconds(64) for _ in range(3)), min(seconds(512) for _ in range(3))
    assert large < 8 * small * 4


def test_a_missing_action_of_one_stage_is_found():
    schedule = generate("gpipe", 2, 1, 2)
    with pytest.raises(ScheduleError, match="stage 1, micro-batch 1 has no backward"):
        replace(schedule, rows=(schedule.rows[0], schedule.rows[1][:-1]))
