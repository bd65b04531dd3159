"""Metrics and events on disk: one line at a time, torn lines forgiven, steps counted once."""

import json

import pytest

from raytron.observe.records import JsonLines, Metrics, dump, event, read_records


@pytest.fixture
def path(tmp_path):
    return tmp_path / "below" / "metrics.jsonl"


def steps_of(path):
    return [record["step"] for record in read_records(path)]


def test_a_record_is_on_the_disk_when_append_returns(path):
    lines = JsonLines(path)
    lines.append({"step": 1, "loss": 4.5})
    assert path.read_text() == '{"step": 1, "loss": 4.5}\n'


def test_there_are_no_records_where_there_is_no_file(path):
    assert read_records(path) == []


def test_a_torn_last_line_is_passed_over_and_cut_off_by_the_next_writer(path):
    JsonLines(path).append({"step": 1})
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert steps_of(path) == [1]
    lines = JsonLines(path)
    lines.append({"step": 2})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_file_torn_in_its_first_line_begins_anew(path):
    path.parent.mkdir()
    path.write_text('{"st')
    JsonLines(path).append({"step": 1})
    assert steps_of(path) == [1]


def test_numbers_that_are_not_finite_become_null_at_any_depth():
    record = {"loss": float("nan"), "parts": {"norm": float("inf"), "all": [1.0, -float("inf")]}}
    assert json.loads(dump(record)) == {"loss": None, "parts": {"norm": None, "all": [1.0, None]}}


@pytest.mark.parametrize("text", ["a\u2028b", "a\x85b", "a\nb", "é\U0001f600"])
def test_any_text_comes_back_as_it_went_in(path, text):
    JsonLines(path).append({"message": text})
    assert read_records(path) == [{"message": text}]


def test_metrics_hold_each_step_once(path):
    metrics = Metrics(path)
    assert metrics.last_step == 0
    for step in (1, 2, 5):
        metrics.append({"step": step})
    with pytest.raises(ValueError, match="step 5 is not after step 5"):
        metrics.append({"step": 5})
    assert steps_of(path) == [1, 2, 5]
    assert Metrics(path).last_step == 5


def test_a_rewind_takes_back_later_steps_and_returns_them(path):
    metrics = Metrics(path)
    for step in range(1, 6):
        metrics.append({"step": step, "loss": 5.0 - step})
    assert [record["step"] for record in metrics.rewind(3)] == [4, 5]
    assert metrics.last_step == 3
    metrics.append({"step": 4, "loss": 0.5})
    assert steps_of(path) == [1, 2, 3, 4]
    assert read_records(path)[-1]["loss"] == 0.5


def test_a_rewind_to_a_later_step_changes_nothing(path):
    metrics = Metrics(path)
    metrics.append({"step": 1})
    assert metrics.rewind(7) == []
    assert metrics.last_step == 1


def test_an_event_says_when_what_and_why():
    made = event("lost", "rank 1 died", ranks=[1])
    assert list(made) == ["time", "event", "message", "ranks"]
    assert made["time"] > 1.7e9
