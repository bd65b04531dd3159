"""Schedules: equal to the golden orders and figures, and valid, finite and bounded at any size."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytron.config import SCHEDULE_CHUNKS
from raytron.errors import ScheduleError
from raytron.plan.actions import round_robin, v_shape
from raytron.plan.schedule import Action, Op, Schedule, forward_only, generate, placement
from raytron.plan.simulate import Cost, peak, simulate

GOLDEN = Path(__file__).parents[1] / "golden" / "schedules"
NAMES = {
    "gpipe": "gpipe", "1f1b": "1f1b", "interleaved1f1b": "interleaved", "loopedbfs": "looped-bfs", "zbh1": "zb-h1",
    "zbh2": "zb-h2",
}  # fmt: skip
EVERY = [name for name in SCHEDULE_CHUNKS if name != "auto"]
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


def limit_of(name, pp, v, m):
    """The most model chunks in flight on a rank, from F to W."""
    group = max(pp, -(-m // max(1, m // pp)))
    return {
        "gpipe": m, "looped-bfs": m * v, "1f1b": pp, "zb-h1": pp, "zb-h2": 2 * pp - 1,
        "interleaved": (v - 1) * group + 2 * pp - 1, "interleaved-zb": pp * v, "zb-v": 2 * pp,
        "v-half": 2 * (pp // 2) + 2, "v-min": 2 * ((pp + 1) // 3) + 2, "dualpipe-v": 2 * pp + 1,
    }[name]  # fmt: skip


@given(name=st.sampled_from(EVERY), data=st.data(), m=batches, f=times, i=times, w=times, comm=st.just(0.0) | times)
def test_any_size_ends_within_its_memory(name, data, m, f, i, w, comm):
    least, most = SCHEDULE_CHUNKS[name]
    pp = data.draw(st.integers(1 if least == 1 else 2, 8))
    v = data.draw(st.integers(least, most or 4))
    m = m + 2 * pp if name == "dualpipe-v" else m
    schedule = generate(name, pp, v, m, Cost(f, i, w, comm))
    assert schedule.rank_of == placement(name, pp, v)
    line = simulate(schedule, Cost(f, i, w, comm))  # every action once, and it ends
    assert line.busy == pytest.approx((m * v * (f + i + w),) * pp)
    assert max(line.peak_at_weight_grad) <= min(m * v, limit_of(name, pp, v, m))


@given(
    name=st.sampled_from(["interleaved-zb", "zb-v", "v-half", "v-min"]), data=st.data(), pp=st.integers(2, 5), m=batches
)
def test_uneven_stages_are_scheduled_by_their_cost(name, data, pp, m):
    forward, inputs, weights = (tuple(data.draw(st.lists(times, min_size=2 * pp, max_size=2 * pp))) for _ in range(3))
    cost = Cost(forward, inputs, weights, data.draw(times))
    line = simulate(generate(name, pp, 2, m, cost), cost)
    assert max(line.peak_at_weight_grad) <= limit_of(name, pp, 2, m)


@given(pp=ranks, v=st.integers(1, 4), m=batches, comm=st.floats(0, 3))
def test_forward_only_holds_its_row_and_ends(pp, v, m, comm):
    for rank_of in (round_robin(pp, v), v_shape(pp)):
        schedule = forward_only(rank_of, m)
        assert schedule.forward_only
        line = simulate(schedule, Cost(comm=comm))
        assert line.makespan >= m * len(rank_of) // pp


# makespan (F = I = W = 1 of a rank's whole share) and micro-batches in flight at 4 ranks and 8 micro-batches
KNOWN = {
    "gpipe": (33, 8), "1f1b": (33, 4), "interleaved": (28.5, 5.5), "looped-bfs": (28.5, 8), "zb-h1": (27, 4),
    "zb-h2": (27, 7), "interleaved-zb": (25.5, 4), "zb-v": (25.5, 4), "v-half": (26.5, 3), "v-min": (29.5, 2),
    "dualpipe-v": (25.5, 4.5),
}  # fmt: skip


@pytest.mark.parametrize("name", EVERY)
def test_four_ranks_and_eight_micro_batches_take_what_is_known(name):
    v = SCHEDULE_CHUNKS[name][0]
    line = simulate(generate(name, 4, v, 8), Cost(1 / v, 1 / v, 1 / v))
    assert (line.makespan, max(line.peak_at_weight_grad) / v) == KNOWN[name]


@given(pp=ranks, m=batches, f=times, i=times, w=times)
def test_closed_forms_of_one_chunk(pp, m, f, i, w):
    """Bubbles of the busiest rank: (p-1)(F+B), (p-1)(F+I-W) and, within a rank's own span, (p-1)(F+I-2W)."""
    m += 2 * pp
    assert simulate(generate("gpipe", pp, 1, m), Cost(f, i, w)).bubble_time == pytest.approx((pp - 1) * (f + i + w))
    w = min(f, i, w)
    i = f = max(f, w)  # F = I ≥ W, as the closed forms have it
    assert simulate(generate("zb-h1", pp, 1, m), Cost(f, i, w)).bubble_time == pytest.approx((pp - 1) * (f + i - w))
    line = simulate(generate("zb-h2", pp, 1, m), Cost(f, f, f))
    assert line.own_span_bubble_time == pytest.approx(0, abs=1e-6)
    assert line.bubble_time == pytest.approx((pp - 1) * f)


@given(pp=st.integers(2, 6), v=chunks, groups=st.integers(1, 4), f=times)
def test_interleaving_divides_the_bubble(pp, v, groups, f):
    for name in ("interleaved", "looped-bfs"):
        line = simulate(generate(name, pp, v, groups * pp), Cost(f / v, f / v, f / v))
        assert line.bubble_time == pytest.approx((pp - 1) * 3 * f / v)
        if name == "interleaved" and groups > 1:
            assert max(line.peak_at_weight_grad) == pp * v + pp - 1


@given(pp=st.integers(2, 8), more=st.integers(0, 12), f=times)
def test_zb_v_has_no_bubble_but_its_start(pp, more, f):
    line = simulate(generate("zb-v", pp, 2, 2 * pp - 1 + more), Cost(f / 2, f / 2, f / 2))
    assert line.own_span_bubble_time == pytest.approx(0, abs=1e-6)
    assert line.bubble_time == pytest.approx((pp - 1) * f / 2)
    assert line.own_span == pytest.approx(line.makespan - line.bubble_time)


@pytest.mark.parametrize("pp", [2, 3, 4, 5, 6, 7, 8, 12, 16])
def test_vs_trade_memory_for_idle_time(pp):
    """With F = I = W: zb-v idles for its start-up alone, v-half for half as long as 1f1b, v-min for two thirds."""
    m, full = 3 * pp, 3 * (pp - 1)
    bubbles = {name: simulate(generate(name, pp, 2, m), Cost(0.5, 0.5, 0.5)).bubble_time for name in EVERY[-4:-1]}
    assert bubbles["zb-v"] == pytest.approx((pp - 1) / 2)
    assert bubbles["v-half"] <= full / 2
    assert bubbles["v-min"] <= full * 2 / 3 + 0.5


def paired_makespan(schedule):
    """The makespan where a forward and the full backward after it are one action, done when both are."""
    blocks = [[[row[0]]] for row in schedule.rows]
    for row, made in zip(schedule.rows, blocks, strict=True):
        for action in row[1:]:
            joined = action.op is Op.B and len(made[-1]) == 1 and made[-1][0].op is Op.F
            made[-1].append(action) if joined else made.append([action])
    ends, last, changed = {}, schedule.num_stages - 1, True
    while changed:
        changed = False
        for made in blocks:
            clock = 0.0
            for block in made:
                for op, stage, batch in block:
                    needs = {Op.F: (Op.F, stage - 1, batch), Op.W: None}.get(op, (Op.I, stage + 1, batch))
                    if needs and 0 <= needs[1] <= last:
                        clock = max(clock, ends.get(needs, 0.0))
                clock += sum(1.0 if action.op is Op.B else 0.5 for action in block)
                for op, stage, batch in block:
                    key = (Op.I if op is Op.B else op, stage, batch)
                    changed = changed or ends.get(key) != clock
                    ends[key] = clock
    return max(ends.values())


@pytest.mark.parametrize("pp", [2, 3, 4, 8])
def test_dualpipe_v_has_the_bubble_of_its_pairs(pp):
    """(p-1)(F&B+B-3W)/2 where a pair F&B is one action of 3 units; half of it as F is handed on before its B begins."""
    schedule = generate("dualpipe-v", pp, 2, 3 * pp)
    assert paired_makespan(schedule) - 9 * pp == pytest.approx((pp - 1) * (3 + 2 - 3) / 2)
    assert simulate(schedule, Cost(0.5, 0.5, 0.5)).bubble_time == pytest.approx((pp - 1) / 2)


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
        (("dualpipe-v", 4, 2, 7), "at least 8 micro-batches"),
        (("zb-v", 4, 3, 7), "zb-v has two model chunks on a rank, not 3"),
        (("1f1b", 2, 2, 4), "1f1b has one model chunk on a rank, not 2"),
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


@pytest.mark.parametrize("name", EVERY)
def test_a_large_schedule_takes_a_second(name):
    """32 ranks and 256 micro-batches, generated and simulated."""
    start = time.process_time()
    simulate(generate(name, 32, SCHEDULE_CHUNKS[name][0], 256))
    assert time.process_time() - start < 3  # about a third of it on a machine that has nothing else to do


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
