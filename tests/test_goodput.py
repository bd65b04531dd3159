"""The goodput simulator (benchmarks/goodput.py): closed forms, a trace by hand, and the figures of an earlier simulation."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

PATH = Path(__file__).parents[1] / "benchmarks" / "goodput.py"
spec = importlib.util.spec_from_file_location("goodput", PATH)
goodput = importlib.util.module_from_spec(spec)
sys.modules["goodput"] = goodput
spec.loader.exec_module(goodput)
Change, Policy, Trace = goodput.Change, goodput.Policy, goodput.Trace


def trace_of(*changes, ends_s):
    return Trace("by hand", tuple(Change(at, nodes) for at, nodes in changes), ends_s)


def test_without_changes_all_of_it_is_training():
    for policy in goodput.fixed():
        outcome = goodput.simulate(trace_of((0, 8), ends_s=1000), policy, 4)
        assert outcome == (1.0, 0.0, 0.0, 0.0, 0)


def test_odd_nodes_idle():
    assert goodput.simulate(trace_of((0, 10), ends_s=100), Policy("", 0, 0), 4) == (0.8, 0.2, 0.0, 0.0, 0)


def test_a_trace_by_hand():
    """8 nodes, 7 from 100 s to 200 s; replicas of 4; 10 s after a loss, 20 s to grow; commits every 40 s of training."""
    trace = trace_of((0, 8), (100, 7), (200, 8), ends_s=300)
    policy = Policy("", 10, 20, commit_s=40)
    kept = 8 * 80 + 4 * 90 + 8 * 80
    outcome = goodput.simulate(trace, policy, 4)
    there = 8 * 100 + 7 * 100 + 8 * 100
    assert outcome.goodput == pytest.approx(kept / there)
    assert outcome.redone == pytest.approx(8 * 20 / there)
    assert outcome.stopped == pytest.approx((4 * 10 + 8 * 20) / there)
    assert outcome.idle == pytest.approx(3 * 100 / there)
    assert outcome.stops == 2
    restarted = goodput.simulate(trace, goodput.replace(policy, grow_loses=True), 4)
    assert restarted.redone == pytest.approx((8 * 20 + 4 * 10) / there)
    noticed = goodput.simulate(trace, goodput.replace(policy, notice=True), 4)
    assert noticed.redone == 0


def test_a_change_while_it_stands_still_begins_anew():
    trace = trace_of((0, 8), (100, 7), (105, 6), ends_s=200)
    assert goodput.simulate(trace, Policy("", 10, 0), 4).stopped == pytest.approx(4 * 15 / trace.available)


def test_growing_waits_for_room_that_stays():
    policy = Policy("", 0, 0, stop_always=False, grow_after_s=30)
    there = trace_of((0, 4), (100, 8), ends_s=200)
    assert goodput.simulate(there, policy, 4).idle == pytest.approx(4 * 30 / there.available)
    gone = trace_of((0, 4), (100, 8), (120, 4), ends_s=200)
    assert goodput.simulate(gone, policy, 4).idle == pytest.approx(4 * 20 / gone.available)
    odd = trace_of((0, 4), (100, 5), ends_s=200)
    assert goodput.simulate(odd, policy, 4).stops == 0


@given(
    st.lists(st.tuples(st.floats(1, 500), st.integers(0, 12)), max_size=12),
    st.floats(0, 100), st.floats(0, 100), st.sampled_from([0, 7.0, 60.0]), st.booleans(), st.booleans(), st.integers(1, 4),
)  # fmt: skip
def test_every_node_second_is_accounted_for(gaps, loss_s, grow_s, commit_s, loses, always, group):
    at, changes = 0.0, [(0.0, 8)]
    for gap, nodes in gaps:
        at += gap
        changes.append((at, nodes))
    trace = trace_of(*changes, ends_s=at + 50)
    policy = Policy("", loss_s, grow_s, commit_s=commit_s, grow_loses=loses, stop_always=always, grow_after_s=5.0)
    outcome = goodput.simulate(trace, policy, group)
    assert sum(outcome[:4]) == pytest.approx(1.0)
    assert min(outcome[:4]) >= -1e-9


def test_an_earlier_simulation_is_found_again():
    """Within 4 points: it did not say all that it assumed."""
    trace = goodput.read_trace(goodput.TRACES / "parcae_aws_p3.csv")
    assert (trace.losses, round(trace.available / trace.ends_s)) == (79, 24)
    for policy in goodput.fixed():
        assert 100 * goodput.simulate(trace, policy, 4).goodput == pytest.approx(goodput.BEFORE[policy.name], abs=4)


def test_synthetic_traces_have_the_rates_that_they_are_asked_for():
    (spot, _), (often, _), (llama, group) = goodput.traces(seed=1)
    assert spot.losses / 11 == pytest.approx(6.8, rel=0.35)
    assert often.losses / 24 == pytest.approx(6, rel=0.25)
    assert llama.losses == pytest.approx(419, rel=0.15)
    assert llama.changes[0].nodes % group == 0
    assert goodput.traces(seed=1) == goodput.traces(seed=1)


def test_constants_are_measured_or_given_or_assumed(tmp_path):
    path = tmp_path / "recovery.json"
    assert goodput.constants_of(path, {"loss_s": None}) == (goodput.ASSUMED, "assumed")
    path.write_text(json.dumps({"constants": {"loss_s": 3.5, "grow_s": 2.0}}))
    constants, source = goodput.constants_of(path, {"loss_s": None, "grow_s": 4.0})
    assert (constants["loss_s"], constants["grow_s"], constants["notice_s"]) == (3.5, 4.0, 5.0)
    assert source == "measured: loss_s, grow_s; given: grow_s"
